"""A padded batch decodes to what each prompt alone decodes to, token by token without a cache."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import make_toy
from transformers import AutoConfig, AutoModelForCausalLM

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.models import decoding, refill
from softcot_ds.models.backbone import cache_name
from softcot_ds.models.decoding import Output, Sampling, decode, try_decoding
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.reading import PADDING

D, VOCAB, STOP = 16, 40, 2
LLAMA = {
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
}
CAUSAL = {"llama": LLAMA, "qwen2": LLAMA, "mistral": LLAMA | {"sliding_window": 4}}
OTHERS = (
    "gemma3",  # as the hub has it, with a vision tower: its generate refuses embeddings; scales, two kinds of cache
    "bamba",  # recurrent layers beside attention; its generate refuses embeddings too
    "gpt2",  # learned positions
    "openai-gpt",  # keeps no cache
    "biogpt",  # scales in the embedding module
    "falcon-alibi",
    "rwkv",
    "recurrent_gemma",
)
WAYS = {"bamba": "in batches", "openai-gpt": "in batches", "rwkv": "one by one", "recurrent_gemma": "one by one"}


def make_model(family="llama", dtype=torch.float64, **special):
    config = AutoConfig.for_model(family, **{"vocab_size": VOCAB} | CAUSAL[family] | special)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return make_model()


def alone(model, prompt: BasePrompt, thoughts_TD, stop_ids, max_new_tokens) -> Output:
    """The most likely tokens of one prompt: each from a fresh pass over everything before it."""
    embed = model.get_input_embeddings()(torch.arange(model.config.get_text_config().vocab_size)[None])[0]
    rows = [*embed[prompt.prefix_ids], *([] if thoughts_TD is None else thoughts_TD), *embed[prompt.suffix_ids]]
    output: list[int] = []
    while len(output) < max_new_tokens:
        logits = model(inputs_embeds=torch.stack(rows)[None], use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in stop_ids:
            return Output(output, cut=False)
        output.append(token)
        rows.append(embed[token])
    return Output(output, cut=True)


def draw(lengths, thoughts, seed=0, dtype=torch.float64, width=D):
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    prompts = [BasePrompt(ids(prefix), ids(suffix)) for prefix, suffix in lengths]
    # Each prompt's thoughts differ, as large as token embeddings: a swap or a shift shows.
    return prompts, torch.randn(len(prompts), thoughts, width, generator=generator, dtype=dtype) if thoughts else None


LENGTHS = [(9, 3), (1, 0), (0, 6), (0, 0), (14, 2), (2, 4)]  # two of one length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_batch_decodes_like_each_prompt_alone(family, dtype):
    model = make_model(family, dtype)
    prompts, thoughts = draw(LENGTHS, 3, dtype=dtype)
    expected = [alone(model, p, t, [STOP], 12) for p, t in zip(prompts, thoughts, strict=True)]
    assert len({tuple(output.token_ids) for output in expected}) > 1
    for size in (1, 2, 4, None):
        assert decode(model, prompts, thoughts, [STOP], Sampling(12), batch_size=size) == expected, size


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if WAYS.get(name) == "one by one" else ()) for name in OTHERS]
)
def test_other_families_decode_a_batch_like_each_prompt_alone(family):
    model = make_toy(family)
    assert try_decoding(model) == WAYS.get(family, "refilled")
    prompts, thoughts = draw(LENGTHS, 3, dtype=torch.float32, width=model.config.get_text_config().hidden_size)
    outputs = decode(model, prompts, thoughts, [STOP], Sampling(12), batch_size=4)
    assert outputs == [alone(model, p, t, [STOP], 12) for p, t in zip(prompts, thoughts, strict=True)]
    assert len({tuple(output.token_ids) for output in outputs}) > 1
    # From a table, the module is asked for what was written alone.
    tokens = {PADDING}.union(*(prompt.prefix_ids + prompt.suffix_ids for prompt in prompts))
    table, lengths = CompactTable.of(model.get_input_embeddings(), tokens), []
    look_up = model.get_input_embeddings().forward
    model.get_input_embeddings().forward = lambda ids: lengths.append(ids.shape[1]) or look_up(ids)
    assert decode(model, prompts, thoughts, [STOP], Sampling(12), table, batch_size=4) == outputs
    assert 1 <= max(lengths) <= 11
    with pytest.raises(SoftCoTError, match="is not among"):
        decode(model, [BasePrompt([VOCAB], [])], None, [STOP], Sampling(12), table)


@pytest.mark.parametrize("family", ["llama", "gpt2", "openai-gpt", "bamba"])
def test_an_output_ends_where_the_context_does(family):
    """Its own, whatever prompts are longer: both where rows make room and in batches."""
    if family == "llama":
        model = make_model(max_position_embeddings=16)
    else:
        model = make_toy(family)
        model.config.max_position_embeddings = 16
    width, dtype = model.config.hidden_size, model.dtype
    prompts, thoughts = draw([(7, 2), (4, 0), (5, 0), (6, 0)], 3, dtype=dtype, width=width)
    for batch_size in (1, 2, 4):
        outputs = decode(model, prompts, thoughts, [], Sampling(99), batch_size=batch_size)
        assert [len(output.token_ids) for output in outputs] == [4, 9, 8, 7]
        for output, prompt, vectors in zip(outputs, prompts, thoughts, strict=True):
            assert output == alone(model, prompt, vectors, [], len(output.token_ids))
    model = make_model(max_position_embeddings=16)
    with pytest.raises(SoftCoTError, match="a prompt of 16 tokens does not fit LlamaForCausalLM, whose context has 16"):
        decode(model, *draw([(8, 5)], 3), [STOP], Sampling(1))


def begun_alike(prompts, count):
    """The same prompts behind so many tokens."""
    tokens = torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    return [BasePrompt(tokens + prompt.prefix_ids, prompt.suffix_ids) for prompt in prompts]


@pytest.mark.parametrize("count", [1, 7, 30])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_all_prompts_begin_with_is_read_once(family, count, monkeypatch):
    model = make_model(family)
    prompts, thoughts = draw(LENGTHS, 3)
    prompts = begun_alike(prompts, count)
    expected = [alone(model, p, t, [STOP], 12) for p, t in zip(prompts, thoughts, strict=True)]
    try_decoding(model)
    for batch_size in (2, 4, None):
        with monkeypatch.context() as patch:
            read = counting_passes(model, patch, read=True)
            assert decode(model, prompts, thoughts, [STOP], Sampling(12), batch_size=batch_size) == expected
        assert read[0] == (1, count)
        own = max(len(prompt.prefix_ids) + len(prompt.suffix_ids) for prompt in prompts) + 3 - count
        assert max(tokens for _, tokens in read[1:]) == own
        assert sum(rows for rows, _ in read[1:]) == len(prompts)
        assert len(read) == 1 + -(-len(prompts) // (batch_size or len(prompts))), "a batch at a time"


@pytest.mark.parametrize(
    ("family", "batch_size"),
    [*(("llama", size) for size in (1, 4, 7, None)), ("bamba", 4), pytest.param("rwkv", 4, marks=pytest.mark.slow)],
)
def test_a_prompt_is_read_once_for_all_its_samples_and_each_is_as_if_alone(family, batch_size, monkeypatch):
    model = make_toy(family)
    prompts, thoughts = draw(LENGTHS[:3], 3, dtype=torch.float32, width=model.config.hidden_size)
    sampling = Sampling(8, temperature=1.0, top_p=0.9)
    seeds = [[100 * prompt + sample for sample in range(5)] for prompt in range(3)]
    expected = [
        decode(model, [prompt], vectors[None], [STOP], sampling, seeds=[seed])[0]
        for prompt, vectors, own in zip(prompts, thoughts, seeds, strict=True)
        for seed in own
    ]
    assert len({tuple(output.token_ids) for output in expected}) == 15
    read = counting_passes(model, monkeypatch, read=True)
    given = {"batch_size": batch_size, "seeds": [seed for own in seeds for seed in own], "samples": 5}
    assert decode(model, prompts, thoughts, [STOP], sampling, **given) == expected
    if family == "llama":
        assert sum(rows for rows, _ in read) == 3


def counting_passes(model, monkeypatch, read=False):
    """The rows of each forward pass from now on; rows and tokens of each that reads."""
    rows, original = [], model.forward

    @functools.wraps(original)
    def forward(*args, input_ids=None, **kwargs):
        if not read:
            rows.append(len(input_ids))
        elif input_ids.shape[1] > 1 or not kwargs.get(cache_name(original)):
            rows.append(tuple(input_ids.shape))
        return original(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return rows


def test_prompts_are_decoded_one_by_one_where_a_batch_changes_them(monkeypatch):
    model = make_toy("rwkv")
    prompts, thoughts = draw([(4, 1), (3, 2), (2, 1)], 2, dtype=torch.float32, width=model.config.hidden_size)
    expected = [alone(model, p, t, [STOP], 6) for p, t in zip(prompts, thoughts, strict=True)]
    try_decoding(model)
    rows, calls, generate = counting_passes(model, monkeypatch), [], model.generate

    def counted(*args, synced_gpus, **kwargs):
        calls.append(synced_gpus)
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    assert decode(model, prompts, thoughts, [STOP], Sampling(6)) == expected
    assert set(rows) == {1}
    assert calls == [False] * 3
    # Partitioned over ranks, of which another has five: this one takes part in all passes, also without a prompt.
    monkeypatch.setattr(decoding, "max_over_ranks", lambda count: 5)
    monkeypatch.setattr(decoding, "needs_all_ranks", lambda _: True)
    assert decode(model, prompts, thoughts, [STOP], Sampling(6)) == expected
    assert decode(model, [], None, [STOP], Sampling(6)) == []
    assert calls[3:] == [True] * 10


def test_prompts_that_wait_take_the_place_of_outputs_that_have_ended(model, monkeypatch):
    prompts, thoughts = draw([(5, 2)] * 40, 3)
    limits = Sampling(24)
    stops = [STOP, *range(10, 13)]
    lengths = [len(output.token_ids) + 1 for output in decode(model, prompts, thoughts, stops, limits)]
    assert min(lengths) < 4
    assert max(lengths) > 20
    with monkeypatch.context() as patch:
        rows = counting_passes(model, patch)
        decode(model, prompts, thoughts, stops, limits, batch_size=8)
    batches = [lengths[start : start + 8] for start in range(0, 40, 8)]
    assert max(rows) == 8
    assert len(rows) < sum(map(max, batches)), "fewer passes, those that read prompts included"
    assert sum(rows) < 0.8 * sum(8 * max(batch) for batch in batches), "and most rows of each are at work"
    ended = []
    decode(model, prompts, thoughts, stops, limits, batch_size=8, progress=ended.append)
    assert ended == sorted(ended)
    assert ended[-1] == 40


@pytest.mark.parametrize("others", [0, 3, 50])
@pytest.mark.parametrize("has_prompts", [True, False])
def test_a_rank_takes_as_many_passes_as_the_others(model, monkeypatch, others, has_prompts):
    prompts, thoughts = draw(LENGTHS if has_prompts else [], 3 if has_prompts else 0)
    try_decoding(model)
    expected = decode(model, prompts, thoughts, [STOP], Sampling(6), batch_size=2)
    table = CompactTable.of(model.get_input_embeddings(), range(VOCAB))
    rows, looked_up, look_up = counting_passes(model, monkeypatch), [], model.get_input_embeddings().forward
    monkeypatch.setattr(
        model.get_input_embeddings(), "forward", lambda ids: looked_up.append(len(rows)) or look_up(ids)
    )

    def most(own):
        """The others have so many passes to take, of which the first reads prompts, the others write."""
        return max(own, 0 if len(rows) >= others else 1 if not rows else 2)

    monkeypatch.setattr(refill, "needs_all_ranks", lambda _: True)
    monkeypatch.setattr(refill, "max_over_ranks", most)
    assert decode(model, prompts, thoughts, [STOP], Sampling(6), table, batch_size=2) == expected
    assert len(rows) >= others
    if not has_prompts:
        assert len(rows) == others
        assert decode(model, [], None, [STOP], Sampling(6, temperature=1.0)) == []
    if others == 50 or not has_prompts:
        assert looked_up == list(range(2, others + 1)), "the module is asked on all ranks or on none"


def test_the_trial_refuses_a_model_that_generates_other_than_it_reads():
    model = make_model("llama")
    embed = model.get_input_embeddings()
    original = model.model.forward
    # Tokens count twice when they come as ids: thoughts among them would be worth half of what they were in training.
    model.model.forward = lambda *args, input_ids=None, inputs_embeds=None, **kwargs: original(
        *args, inputs_embeds=2 * embed(input_ids) if inputs_embeds is None else inputs_embeds, **kwargs
    )
    with pytest.raises(SoftCoTError, match=r"LlamaForCausalLM cannot decode with thoughts .* differs from a pass"):
        try_decoding(model)


def test_logits_may_all_be_equal_but_not_nan(model):
    silent = copy.deepcopy(model)
    torch.nn.init.zeros_(silent.get_output_embeddings().weight)
    assert try_decoding(silent) == "refilled"
    torch.nn.init.constant_(silent.get_output_embeddings().weight, torch.nan)
    with pytest.raises(SoftCoTError, match="logits are not finite; are its weights damaged"):
        try_decoding(copy.deepcopy(silent))


def test_a_family_whose_code_fails_is_refused_in_one_line():
    model = make_model("llama")
    model.model.forward = lambda *args, **kwargs: {}["per_layer"]
    with pytest.raises(SoftCoTError, match=r"LlamaForCausalLM cannot decode with thoughts in its prompt: 'per_layer'$"):
        decode(model, *draw(LENGTHS, 3), [STOP], Sampling(3))


def test_what_says_nothing_about_a_model_chooses_no_slower_way(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(refill.Rows, "begin", fail)
    for failure in (torch.OutOfMemoryError("no memory"), RuntimeError("[gloo/pair.cc:1] Connection closed by peer")):
        with pytest.raises(type(failure), match=str(failure).rpartition(" ")[2]):
            try_decoding(make_model("llama"))
    failure = RuntimeError("no such cache")
    assert try_decoding(make_model("llama")) == "in batches"


def test_the_trial_leaves_the_random_numbers_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert try_decoding(copy.deepcopy(model))
    assert torch.equal(torch.rand(3), expected)


def test_prompts_without_thoughts_decode_too(model):
    prompts, _ = draw([(5, 0), (2, 0), (9, 0)], 0)
    outputs = decode(model, prompts, None, [STOP], Sampling(8))
    assert outputs == [alone(model, prompt, None, [STOP], 8) for prompt in prompts]


def test_the_thoughts_matter_and_stand_between_prefix_and_suffix(model):
    (prompt,), thoughts = draw([(4, 4)], 2)
    embed = model.get_input_embeddings().weight
    words = [7, 30]
    as_thoughts = decode(model, [prompt], embed[words][None], [STOP], Sampling(10))
    in_words = BasePrompt(prompt.prefix_ids + words + prompt.suffix_ids, [])
    as_tokens = decode(model, [in_words], None, [STOP], Sampling(10))
    assert as_thoughts == as_tokens
    assert decode(model, [prompt], thoughts, [STOP], Sampling(10)) != as_thoughts


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 99),
    st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 3),
)
def test_any_batch_and_any_stop_tokens(model, lengths, thoughts, seed, stops, batch_size, alike, samples):
    prompts, vectors = draw(lengths, thoughts, seed)
    prompts = begun_alike(prompts, alike)
    outputs = decode(model, prompts, vectors, sorted(stops), Sampling(6), batch_size=batch_size, samples=samples)
    expected = [alone(model, p, t, stops, 6) for p, t in zip(prompts, vectors, strict=True)]
    assert outputs == [output for output in expected for _ in range(samples)]


def test_an_output_ends_before_the_first_stop_token(model):
    prompts, thoughts = draw(LENGTHS, 3)
    free = decode(model, prompts, thoughts, [STOP], Sampling(12))
    rows = [output.token_ids for output in free]
    stop = rows[0][4]
    stopped = decode(model, prompts, thoughts, [STOP, stop], Sampling(12))
    assert [output.token_ids for output in stopped] == [row[: row.index(stop)] if stop in row else row for row in rows]
    assert [output.cut for output in stopped] == [
        output.cut and stop not in row for output, row in zip(free, rows, strict=True)
    ]
    assert len(stopped[0].token_ids) <= 4


def test_a_stop_token_as_the_last_one_allowed_is_no_cut(model):
    prompts, thoughts = draw(LENGTHS[:1], 3)
    free = alone(model, prompts[0], thoughts[0], [STOP], 12).token_ids
    stop = free[4]
    assert stop not in free[:4]
    for most, expected in ((4, Output(free[:4], cut=True)), (5, Output(free[:4], cut=False))):
        assert decode(model, prompts, thoughts, [stop], Sampling(most)) == [expected]


def test_no_more_tokens_than_asked_for(model):
    prompts, thoughts = draw(LENGTHS, 3)
    long = decode(model, prompts, thoughts, [STOP], Sampling(10))
    for count in (1, 4):
        short = decode(model, prompts, thoughts, [STOP], Sampling(count))
        assert [output.token_ids for output in short] == [output.token_ids[:count] for output in long]


def test_sampling_is_repeated_by_its_seed_and_differs_without(model):
    prompts, thoughts = draw(LENGTHS, 3)

    def sample(seed, **settings):
        torch.manual_seed(seed)
        return decode(model, prompts, thoughts, [STOP], Sampling(10, **settings))

    assert sample(0, temperature=1.0) == sample(0, temperature=1.0)
    assert sample(0, temperature=1.0) != sample(1, temperature=1.0)
    greedy = sample(0)
    assert sample(1) == greedy
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1, temperature=5.0, top_p=1e-6) == greedy


@pytest.mark.parametrize("family", ["llama", "bamba", "rwkv"])
def test_what_is_sampled_depends_on_its_own_seed_alone(family):
    model = make_toy(family)
    prompts, thoughts = draw(LENGTHS, 3, dtype=torch.float32, width=model.config.hidden_size)
    seeds, sampling = [7, 2**64 - 1, 0, 9, 7, 2**63], Sampling(8, temperature=1.0, top_p=0.9)

    def sample(rows, batch_size=None):
        some = [prompts[row] for row in rows]
        own = [seeds[row] for row in rows]
        return decode(model, some, thoughts[rows], [STOP], sampling, batch_size=batch_size, seeds=own)

    together = sample([0, 1, 2, 3, 4, 5])
    assert len({tuple(output.token_ids) for output in together}) == 6
    torch.manual_seed(5)
    assert sample([5, 4, 3, 2, 1, 0], batch_size=2) == together[::-1]
    assert [sample([row])[0] for row in range(6)] == together
    assert sample([0, 0]) == [together[0]] * 2
    seeds[0] = 8
    assert sample([0]) != [together[0]]


@pytest.mark.slow
def test_sampled_tokens_have_the_frequencies_of_the_softmax(model):
    (prompt,), thoughts = draw([(5, 2)], 2)
    embed = model.get_input_embeddings().weight
    rows = torch.cat([embed[prompt.prefix_ids], thoughts[0], embed[prompt.suffix_ids]])
    temperature = 3.0
    expected = (model(inputs_embeds=rows[None]).logits[0, -1] / temperature).softmax(dim=-1)
    torch.manual_seed(0)
    count = 4000
    outputs = decode(model, [prompt] * count, thoughts.expand(count, -1, -1), [STOP], Sampling(1, temperature))
    found = (
        torch.bincount(
            torch.tensor([output.token_ids[0] if output.token_ids else STOP for output in outputs]), minlength=VOCAB
        )
        / count
    )
    # Five standard deviations of a frequency.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [5, 6, 7, 8]},
        {"num_beams": 3},
        {"eos_token_id": [9, 10, 11]},
    ],
)
def test_a_models_own_generation_settings_do_not_change_the_decode(model, own):
    prompts, thoughts = draw(LENGTHS, 3)
    expected = decode(model, prompts, thoughts, [STOP], Sampling(12))
    other = copy.deepcopy(model)
    for name, value in own.items():
        setattr(other.generation_config, name, value)
    torch.manual_seed(0)
    assert decode(other, prompts, thoughts, [STOP], Sampling(12)) == expected


def test_a_models_own_top_k_and_min_p_do_not_narrow_sampling(model):
    (prompt,), thoughts = draw([(5, 2)], 2)
    other = copy.deepcopy(model)
    other.generation_config.top_k, other.generation_config.min_p = 2, 0.999
    torch.manual_seed(0)
    outputs = decode(other, [prompt] * 300, thoughts.expand(300, -1, -1), [STOP], Sampling(1, temperature=10.0))
    assert len({tuple(output.token_ids) for output in outputs}) > VOCAB / 2
