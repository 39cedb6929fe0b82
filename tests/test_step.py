"""The training step against a naive float64 computation, written here from the paper's description.

The truth takes one example at a time: render, tokenize, look the embeddings up, put the projected thoughts between
them, run the model once without mask, cache or padding, and average the cross entropy of the answer's tokens.
"""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.modeling_flash_attention_utils as flash
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softcot_ds.data.batches import collate
from softcot_ds.data.examples import Example, make_example
from softcot_ds.data.prompts import AssistantInput, AssistantPrompts, BasePrompts, ChatFormat, PromptFile
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.prompt_tuning import StaticThoughts
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.assistant import compute_thoughts
from softcot_ds.tasks import Problem

P, D, VOCAB = 12, 16, 48

SHAPE = {
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama eager": (LlamaConfig, {"attn_implementation": "eager", "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {}),
    "mistral with a sliding window": (MistralConfig, {"sliding_window": 4}),
    "gemma": (GemmaConfig, {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": (Gemma2Config, {"sliding_window": 4, "query_pre_attn_scalar": 4, "attn_implementation": "eager"}),
    "gemma3": (
        Gemma3TextConfig,
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}


def make_model(family: str, **changes):
    """A random model with weights large enough that every path shows in the loss."""
    kind, special = FAMILIES[family]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(kind(**(SHAPE | special | changes)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def make_projection() -> LinearProjection:
    torch.manual_seed(6)
    return LinearProjection(P, D)


# ----------------------------------------------------------------------------------------------------- the truth


def true_embeddings(model, weight, bias, prefix: list[int], hidden_TP, rest: list[int]) -> torch.Tensor:
    """Input embeddings (S, D) of one example."""
    embed = model.get_input_embeddings()
    rows = [embed(torch.tensor(token)) for token in prefix]
    rows += [torch.stack([(weight[d] * hidden).sum() + bias[d] for d in range(len(bias))]) for hidden in hidden_TP]
    rows += [embed(torch.tensor(token)) for token in rest]
    return torch.stack(rows)


def true_loss_and_gradient(model, projection, examples, dtype=torch.float64) -> tuple[float, torch.Tensor]:
    """Mean cross entropy and its gradient (weight and bias in one vector), both in float64.

    Args:
        examples: prefix, states (T, P), suffix and target of each.
        dtype: what the model computes in.
    """
    model = copy.deepcopy(model).to(dtype)
    weight = projection.weight.detach().to(dtype).requires_grad_()
    bias = projection.bias.detach().to(dtype).requires_grad_()
    terms = []
    for prefix, hidden, suffix, target in examples:
        embeds = true_embeddings(model, weight, bias, prefix, hidden.to(dtype), suffix + target)
        log_p = model(inputs_embeds=embeds[None], use_cache=False).logits[0].double().log_softmax(dim=-1)
        first = len(embeds) - len(target)
        terms += [-log_p[first + i - 1, token] for i, token in enumerate(target)]
    loss = torch.stack(terms).mean()
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten(), bias.grad]).double()


# ------------------------------------------------------------------------------------------------ what is tested


def make_batch(examples, dtype, pad_id=0, num_shared=0, number=lambda ids: ids):
    slots = list(range(examples[0][1].shape[-2]))
    asked = AssistantInput("id", [0] * len(slots), slots)
    rows = [Example(Problem("q", "r", "1"), asked, prefix, *ids) for prefix, _, *ids in examples]
    batch = collate(rows, pad_id, num_shared, number)
    batch.thoughts = torch.stack([hidden for _, hidden, _, _ in examples]).to(dtype)
    return batch


def loss_and_gradient(step: SoftThoughts, examples, dtype, pad_id=0) -> tuple[float, torch.Tensor]:
    step.projection.zero_grad()
    batch = make_batch(examples, dtype, pad_id, step.num_shared, step.number)
    loss = step(batch) / sum(len(target) for *_, target in examples)
    loss.backward()
    assert all(parameter.grad is None for parameter in step.base.parameters())
    return loss.item(), torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad])


def check(found, truth, loss_tolerance, gradient_tolerance):
    loss_error = abs(found[0] - truth[0]) / abs(truth[0])
    gradient_error = ((found[1].double() - truth[1]).norm() / truth[1].norm()).item()
    assert loss_error <= loss_tolerance, f"loss {found[0]} is not {truth[0]}: {loss_error:.1e}"
    assert gradient_error <= gradient_tolerance, f"gradient differs by {gradient_error:.1e}"


TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-10, 1e-10)}


def check_steps(model, examples, dtype, num_shared=0, **options):
    truth = true_loss_and_gradient(model, make_projection(), examples)
    shared_ids = examples[0][0][:num_shared]
    found = {}
    for name, kind, ids in (("full", "full", ()), ("fast", "fast", ()), ("shared", "fast", shared_ids)):
        step = SoftThoughts(
            copy.deepcopy(model).to(dtype), make_projection().to(dtype), None, kind, shared_ids=ids, **options
        )
        assert step.num_shared == len(ids)
        found[name] = loss_and_gradient(step, examples, dtype)
        check(found[name], truth, *TOLERANCES[dtype])
    for name in ("fast", "shared"):
        check(found[name], (found["full"][0], found["full"][1].double()), *TOLERANCES[dtype])


def draw_examples(lengths, thoughts: int, seed: int = 0, shared: int = 0):
    """Random examples of the given (prefix, suffix, target) lengths; ``shared`` more tokens begin every prefix."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    first = ids(shared)
    return [
        (first + ids(prefix), torch.randn(thoughts, P, generator=generator), ids(suffix), ids(target))
        for prefix, suffix, target in lengths
    ]


UNEVEN = [(9, 3, 5), (0, 2, 4), (1, 0, 1), (12, 0, 7), (0, 0, 1)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_matches_examples_run_alone(family, dtype):
    model = make_model(family)
    if dtype == torch.float64 and model.config._attn_implementation == "eager":
        pytest.skip(
            "transformers' eager attention takes its softmax in float32, where a float64 mask is minus infinity"
        )
    check_steps(model, draw_examples(UNEVEN, thoughts=3, shared=6), dtype, num_shared=6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recomputed_activations_give_the_same_gradient(family):
    examples = draw_examples(UNEVEN, thoughts=3, shared=6)
    check_steps(make_model(family), examples, torch.float64, num_shared=6, activation_checkpointing=True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
@pytest.mark.parametrize(
    "lengths",
    [[(0, 0, 1)], [(0, 0, 1), (0, 3, 2)], [(6, 0, 1)], [(6, 2, 3)] * 3, [(0, 5, 1), (30, 0, 2)]],
    ids=["nothing but thoughts", "no prefix at all", "no suffix", "no padding", "a row of prefix padding"],
)
def test_edges_match_examples_run_alone(lengths, dtype):
    check_steps(make_model("mistral with a sliding window"), draw_examples(lengths, thoughts=2), dtype)


@pytest.fixture(scope="module")
def steps():
    """A model for the truth, and the steps to try in float32 and float64, made once."""
    model = make_model("llama")
    made = [
        (SoftThoughts(copy.deepcopy(model).to(dtype), make_projection().to(dtype), step=kind), dtype)
        for dtype in TOLERANCES
        for kind in ("fast", "full")
    ]
    return model, made


# Each example is its lengths of prefix, suffix and target.
length_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=25)
@given(length_lists, st.integers(1, 5), st.integers(0, 5), st.integers(0, 99), st.sampled_from([0, 2, VOCAB - 1]))
def test_any_lengths_match_examples_run_alone(steps, lengths, thoughts, shared, seed, pad_id):
    model, made = steps
    examples = draw_examples(lengths, thoughts, seed, shared)
    truth = true_loss_and_gradient(model, make_projection(), examples)
    for step, dtype in made:
        check(loss_and_gradient(step, examples, dtype, pad_id), truth, *TOLERANCES[dtype])
    for dtype in TOLERANCES:
        shared_ids = examples[0][0][:shared]
        step = SoftThoughts(copy.deepcopy(model).to(dtype), make_projection().to(dtype), shared_ids=shared_ids)
        check(loss_and_gradient(step, examples, dtype, pad_id), truth, *TOLERANCES[dtype])


STRETCHING = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.2],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 20,
    },
}


@pytest.mark.parametrize("kind", STRETCHING)
def test_rotary_embeddings_that_stretch_end_where_a_row_would_change_its_neighbours(kind):
    longest = {"max_position_embeddings": 20 if kind == "dynamic" else 80}
    model = make_model("llama", rope_parameters=STRETCHING[kind], **longest)
    check_steps(model, draw_examples([(8, 2, 3), (1, 2, 4)], thoughts=3, shared=4), torch.float32, num_shared=4)
    long = draw_examples([(9, 2, 3), (1, 2, 4)], thoughts=3, shared=4)  # 21 tokens
    for step in ("full", "fast"):
        with pytest.raises(SoftCoTError, match="a sequence has 21 tokens, and LlamaForCausalLM takes 20 here"):
            loss_and_gradient(SoftThoughts(copy.deepcopy(model), make_projection(), step=step), long, torch.float32)
    too_long = AssistantInput("a", [3] * 21, [19, 20])
    with pytest.raises(SoftCoTError, match="a sequence has 21 tokens"):
        compute_thoughts(model, [too_long])


def test_architecture_with_other_states_runs_the_full_step_and_says_so():
    torch.manual_seed(5)
    config = MambaConfig(hidden_size=D, num_hidden_layers=2, state_size=4, vocab_size=VOCAB)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="MambaForCausalLM runs the full step: "):
        step = SoftThoughts(copy.deepcopy(model), make_projection(), shared_ids=[4, 5])
    assert step.num_shared == 0
    examples = draw_examples([(6, 2, 3)] * 2, thoughts=2)
    truth = true_loss_and_gradient(model, make_projection(), examples)
    check(loss_and_gradient(step, examples, torch.float32), truth, *TOLERANCES[torch.float32])


# -------------------------------------------------------------------------- from words to gradient, by template


QUESTIONS = ["Tom has 3 apples; he eats 1. How many?", "2+2?", "Käthe hat {thoughts} Äpfel — wieviel?"]
TARGETS = ["3 - 1 = 2\n#### 2", "4", "Unklar."]
WORDING = {
    "assistant": [{"role": "user", "content": "Give {count} hints. {question} Hints: {thoughts}"}],
    "assistant_text": [{"role": "user", "content": "Hint: {question}"}],
    "base": [{"role": "user", "content": "Solve this. {question}\nHints: {thoughts}\nThink."}],
    "base_without_thoughts": [{"role": "user", "content": "Solve this. {question}"}],
}


def test_from_words_to_gradient_for_every_tokenizer_and_template(chat):
    tokenizer, end = chat
    vocabulary = len(tokenizer)
    model = make_model("llama", vocab_size=vocabulary + 7, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(4, P, generator=generator) for _ in QUESTIONS]

    naive = []
    for question, target, states in zip(QUESTIONS, TARGETS, hidden, strict=True):
        content = "Solve this. " + question + "\nHints: @@@\nThink."
        asked, answered = {"role": "user", "content": content}, {"role": "assistant", "content": target}
        show = partial(tokenizer.apply_chat_template, tokenize=False, date_string="26 Jul 2024")
        text = show([asked], add_generation_prompt=True)
        before, after = (tokenizer.encode(part, add_special_tokens=False) for part in text.split("@@@"))
        written = show([asked, answered]).removeprefix(text)
        answer = tokenizer.encode(written[: written.rindex(end) + len(end)], add_special_tokens=False)
        naive.append((before, states, after, answer))
    projection = make_projection()
    truth = true_loss_and_gradient(model, projection, naive)

    prompts = PromptFile(**WORDING)
    chat_format = ChatFormat(tokenizer, {"date_string": "26 Jul 2024"}, "model")
    base, assistant = BasePrompts(chat_format, prompts), AssistantPrompts(chat_format, prompts, 4, "x")
    examples = [
        make_example(Problem(question, "", ""), target, base, assistant)
        for question, target in zip(QUESTIONS, TARGETS, strict=True)
    ]
    assert [(e.prefix_ids, e.suffix_ids, e.target_ids) for e in examples] == [(p, s, t) for p, _, s, t in naive]

    for dtype, kind in ((torch.float32, "full"), (torch.float32, "fast"), (torch.float64, "fast")):
        step = SoftThoughts(copy.deepcopy(model).to(dtype), make_projection().to(dtype), step=kind)
        seen = {}
        step.base.register_forward_pre_hook(lambda _, __, kwargs, seen=seen: seen.update(kwargs), with_kwargs=True)
        batch = collate(examples, 0)
        batch.thoughts = torch.stack(hidden)
        loss = step(batch) / sum(len(target) for *_, target in naive)
        loss.backward()
        gradient = torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad])
        check((loss.item(), gradient), truth, *TOLERANCES[dtype])
        if kind == "full":
            for row, (before, states, after, answer) in enumerate(naive):
                real = seen["inputs_embeds"][row][: len(before) + 4 + len(after) + len(naive[row][3])]
                expected = true_embeddings(
                    copy.deepcopy(model).double(),
                    projection.weight.double(),
                    projection.bias.double(),
                    before,
                    states.double(),
                    after + answer,
                )
                torch.testing.assert_close(real.double(), expected, rtol=1e-5, atol=1e-6)


def test_static_thoughts_are_the_same_vectors_for_every_question():
    model = make_model("qwen2").double()
    torch.manual_seed(3)
    vectors = torch.randn(3, D, dtype=torch.float64)
    examples = draw_examples(UNEVEN, thoughts=3)
    truth_vectors = vectors.clone().requires_grad_()
    terms = []
    for prefix, _, suffix, target in examples:
        embed = model.get_input_embeddings()
        rest = torch.tensor(suffix + target)
        embeds = torch.cat([embed(torch.tensor(prefix, dtype=torch.int64)), truth_vectors, embed(rest)])
        log_p = model(inputs_embeds=embeds[None]).logits[0].log_softmax(dim=-1)
        terms += [-log_p[len(embeds) - len(target) + i - 1, token] for i, token in enumerate(target)]
    truth = torch.stack(terms).mean()
    truth.backward()
    for kind in ("full", "fast"):
        step = SoftThoughts(copy.deepcopy(model), StaticThoughts(vectors), step=kind)
        batch = make_batch(examples, torch.float64)
        batch.thoughts = None
        loss = step(batch) / len(terms)
        loss.backward()
        found = (loss.item(), step.projection.weight.grad)
        check(found, (truth.item(), truth_vectors.grad), *TOLERANCES[torch.float64])


def test_thoughts_computed_online_equal_the_same_states_from_a_cache():
    base = make_model("llama")
    assistant = make_model("qwen2", hidden_size=P, num_attention_heads=3, num_key_value_heads=3)
    inputs = [AssistantInput("a", [5, 6, 7, 3, 3], [3, 4]), AssistantInput("b", [8, 3, 3], [1, 2])]
    examples = draw_examples([(3, 1, 2), (0, 2, 3)], thoughts=2)
    with torch.no_grad():
        states = [
            assistant.model(input_ids=torch.tensor([item.token_ids])).last_hidden_state[0, item.positions]
            for item in inputs
        ]
    examples = [(prefix, state, *rest) for (prefix, _, *rest), state in zip(examples, states, strict=True)]
    truth = true_loss_and_gradient(base, make_projection(), examples)
    batch = make_batch(examples, torch.float32)
    batch.thoughts, batch.assistant = None, inputs
    step = SoftThoughts(copy.deepcopy(base), make_projection(), assistant)
    loss = step(batch) / 5
    loss.backward()
    gradient = torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad])
    check((loss.item(), gradient), truth, *TOLERANCES[torch.float32])


@pytest.mark.parametrize("kind", ["full", "fast"])
@pytest.mark.parametrize("family", ["llama", "mistral with a sliding window"])
def test_recomputing_activations_changes_nothing(family, kind):
    model = make_model(family)
    examples = draw_examples(UNEVEN, thoughts=3)
    truth = true_loss_and_gradient(model, make_projection(), examples)
    step = SoftThoughts(
        copy.deepcopy(model).double(), make_projection().double(), step=kind, activation_checkpointing=True
    )
    step.train()
    runs = []
    step.base.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: runs.append(1))
    check(loss_and_gradient(step, examples, torch.float64), truth, *TOLERANCES[torch.float64])
    # Once in the forward pass (fast: and once for the prefix, without gradient), once more in the backward pass.
    assert len(runs) == (2 if kind == "full" else 3)


DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}


@pytest.mark.filterwarnings("ignore:GPT2LMHeadModel runs the full step")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_mode_leaves_the_frozen_models_without_dropout(family):
    if family == "llama":
        model = make_model("llama", attention_dropout=0.5)
    else:
        config = GPT2Config(n_embd=D, n_layer=2, n_head=2, vocab_size=VOCAB, **DROPOUT)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    examples = draw_examples(UNEVEN, thoughts=3)
    truth = true_loss_and_gradient(model, make_projection(), examples)
    for kind in ("full", "fast"):
        step = SoftThoughts(copy.deepcopy(model).double(), make_projection().double(), copy.deepcopy(model), kind)
        step.train()
        assert step.projection.training
        assert not any(module.training for part in (step.base, step.assistant) for module in part.modules())
        check(loss_and_gradient(step, examples, torch.float64), truth, *TOLERANCES[torch.float64])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_shared", [0, 6])
def test_the_prefix_carries_no_gradient_and_keeps_no_activations(num_shared, checkpointing):
    """The prefix has a number of tokens that is no other dimension; what is saved for the backward pass shows it."""
    examples = draw_examples([(31, 2, 5), (31, 3, 4)], thoughts=3, shared=num_shared)
    saved = {}
    for kind in ("fast", "full"):
        step = SoftThoughts(
            make_model("llama"),
            make_projection(),
            step=kind,
            shared_ids=examples[0][0][:num_shared],
            activation_checkpointing=checkpointing,
        )
        batch = make_batch(examples, torch.float32, num_shared=step.num_shared)
        embeds = step._embeds(batch, batch.thoughts).detach().requires_grad_()
        step._embeds = lambda *_, embeds=embeds: embeds
        shapes = []
        pack = lambda tensor, shapes=shapes: shapes.append(tuple(tensor.shape)) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step(batch)
        saved[kind] = sum(math.prod(shape) for shape in shapes)
        loss.backward()
        if kind == "fast":
            assert not [shape for shape in shapes if 31 in shape]
            assert not embeds.grad[:, :31].any()
            assert embeds.grad[:, 31:34].all()
    assert 0 < saved["fast"] < saved["full"] / 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_layers_get_the_same_masks_and_positions_ready_for_attention(attention):
    model = make_model("mistral with a sliding window", attn_implementation=attention)
    given = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs), with_kwargs=True)
    SoftThoughts(model, make_projection())(make_batch(draw_examples(UNEVEN, thoughts=3), torch.float32))
    for calls in (given[0::2], given[1::2]):  # a layer's prefix, then its suffix
        assert len(calls) == 3
        tensors = [(call["attention_mask"], *call["position_embeddings"]) for call in calls]
        assert all(found is first for layer in tensors for found, first in zip(layer, tensors[0], strict=True))
        mask = tensors[0][0]
        assert mask.dtype == torch.float32
        assert all(stride % 8 == 0 for stride in mask.stride()[:-1]), "rows begin where GPU kernels want them"


def naive_flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, window_size=(-1, -1), **kwargs):
    """Attention over packed rows: what flash attention's function for rows of unequal length computes."""
    out = []
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in bounds:
        keys, values = (t[k_start:k_stop].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_stop], keys)
        scores = scores * (kwargs.get("softmax_scale") or q.shape[-1] ** -0.5)
        # The last query is at the last key.
        at = torch.arange(q_stop - q_start)[:, None] + (k_stop - k_start) - (q_stop - q_start)
        distance = at - torch.arange(k_stop - k_start)
        hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
        hidden = hidden | ((distance > window_size[0]) if window_size[0] >= 0 else hidden)
        scores = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out.append(torch.einsum("hqk,khd->qhd", scores, values))
    return torch.cat(out)


def naive_flash_attention_without_padding(q, k, v, **kwargs):
    lengths = [torch.arange(len(q) + 1) * t.shape[1] for t in (q, k)]
    return naive_flash_attention(*(t.flatten(0, 1) for t in (q, k, v)), *lengths, **kwargs).view_as(q)


def flash_arguments(query_length, key_length, is_causal, softmax_scale=None, sliding_window=None, **_):
    window = (sliding_window - 1,) * 2 if sliding_window is not None and key_length > sliding_window else (-1, -1)
    return {"causal": is_causal, "softmax_scale": softmax_scale, "window_size": window}


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_flash_attention_from_either_package_gets_masks_that_it_understands(name, monkeypatch):
    functions = (
        naive_flash_attention_without_padding,
        naive_flash_attention,
        None,
        flash._pad_input,
        flash._unpad_input,
    )
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (functions, (flash_arguments,) * 2))
    monkeypatch.setattr(flash_integration, "_use_top_left_mask", False, raising=False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash_integration.flash_attention_forward)
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(masks, name, masks["flash_attention_2"])
    for family in ("llama", "mistral with a sliding window"):
        model = make_model(family)
        for shared in (0, 6):
            examples = draw_examples(UNEVEN, thoughts=3, shared=shared)
            truth = true_loss_and_gradient(model, make_projection(), examples)
            ours = copy.deepcopy(model)
            ours.config._attn_implementation_internal = name
            step = SoftThoughts(ours, make_projection(), shared_ids=examples[0][0][:shared])
            check(loss_and_gradient(step, examples, torch.float32), truth, *TOLERANCES[torch.float32])
