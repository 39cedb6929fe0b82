"""The builder: right thoughts, computed once."""

import json
import random
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import run_forked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from softcot_ds import cache
from softcot_ds.data.batches import collate
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import OtherRankFailed, SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.files import TEMPORARY_SUFFIX
from softcot_ds.methods import trial
from softcot_ds.models.assistant import compute_thoughts, end_after, read_shared
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts import builder as thought_builder
from softcot_ds.thoughts import computing as thought_computing
from softcot_ds.thoughts import inspection
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts import store as ts
from softcot_ds.thoughts.manifest import StoreIdentity
from softcot_ds.thoughts.ranks import Ranks
from softcot_ds.thoughts.reader import cache_identity, cached, input_key, open_cache
from softcot_ds.thoughts.store import ThoughtStore
from softcot_ds.training.engine import build_model

T, P, VOCABULARY = 4, 32, 120
TOY = {
    "vocab_size": VOCABULARY,
    "hidden_size": P,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Large enough for attention to choose; at the default of 0.02 it is nearly uniform and hides mistakes.
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 16}),
}
IDENTITY = StoreIdentity("f" * 64, T, P, "float32", "float32", "sdpa", assistant="toys/llama")


def make_assistant(family: str = "llama", dtype: torch.dtype = torch.float32):
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**TOY | extra)).to(dtype).eval().requires_grad_(False)


def make_inputs(count: int, prefix: int = 21, seed: int = 0, tail: int = 0) -> list[AssistantInput]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCABULARY) for _ in range(prefix)]
    inputs = []
    for i in range(count):
        question = [i % VOCABULARY, *(rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 40)))]
        start = prefix + len(question)
        inputs.append(AssistantInput(f"e{i}", [*shared, *question, *[7] * T, *[9] * tail], [*range(start, start + T)]))
    return inputs


def one_by_one(assistant, inputs, layer: int = -1) -> torch.Tensor:
    """The definition: last of all hidden states of the whole causal language model, or another, each input alone."""
    rows = []
    with torch.no_grad():
        for item in inputs:
            states = assistant(torch.tensor([item.token_ids]), output_hidden_states=True).hidden_states
            rows.append(states[layer][:, item.positions])
    return torch.cat(rows)


def alone() -> Ranks:
    return Ranks(0, 1, 0, 1, dist.HashStore(), "no launcher")


def fill(folder: Path, inputs, compute, ranks: Ranks | None = None, identity: StoreIdentity = IDENTITY, **kwargs):
    thought_builder.fill(folder, identity, inputs, lambda: compute, ranks or alone(), **kwargs)
    return ThoughtStore.open(folder, identity)


def read(store: ThoughtStore, inputs) -> torch.Tensor:
    return store.read([input_key(item) for item in inputs])


def never(_batch):
    raise AssertionError("nothing was to be computed")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [-1, 1, 2])
def test_thoughts_are_the_hidden_states_at_the_placeholders(family, attention, layer):
    assistant = make_assistant(family, torch.float64)
    assistant.set_attn_implementation(attention)
    inputs = make_inputs(9, tail=2)
    truth = one_by_one(assistant, inputs, layer)
    assert (truth[0] - truth[1]).abs().max() > 0.1
    if layer != -1:
        end_after(assistant, layer)
    prefix = read_shared(assistant, inputs)
    assert prefix.length == 21
    for used in (prefix, read_shared(assistant, inputs[:1])):
        thoughts = compute_thoughts(assistant, inputs[:1] if used is not prefix else inputs, used)
        # transformers' RMS norms compute in float32 whatever the dtype
        torch.testing.assert_close(thoughts, truth[: len(thoughts)], rtol=0, atol=2e-5)
    torch.testing.assert_close(compute_thoughts(assistant, inputs), truth, rtol=0, atol=2e-5)


def test_a_shared_prefix_is_not_changed_by_its_use():
    assistant = make_assistant()
    inputs = make_inputs(5)
    prefix = read_shared(assistant, inputs)
    first = compute_thoughts(assistant, inputs, prefix)
    compute_thoughts(assistant, inputs[:2], prefix)
    assert torch.equal(compute_thoughts(assistant, inputs, prefix), first)


@pytest.mark.parametrize(
    ("ids", "positions", "shared"),
    [
        ([[1, 2, 3, 7], [1, 2, 4, 7]], [3], 2),
        ([[5, 2, 3, 7], [1, 2, 4, 7]], [3], 0),
        ([[1, 2, 3, 7], [1, 2, 3, 7]], [2], 2),  # never a placeholder
        ([[1, 2, 3, 7]], [0], 0),
    ],
)
def test_a_shared_prefix_ends_where_inputs_differ_or_thoughts_begin(ids, positions, shared):
    inputs = [AssistantInput(str(i), tokens, positions) for i, tokens in enumerate(ids)]
    assert read_shared(make_assistant(), inputs).length == shared


def test_cached_thoughts_equal_online_thoughts_bit_for_bit(tmp_path):
    """Through the disk and back, against the same function on the same batches."""
    assistant, inputs = make_assistant(dtype=torch.bfloat16), make_inputs(40)
    prefix = read_shared(assistant, inputs)
    online = {}

    def compute(batch):
        thoughts = compute_thoughts(assistant, batch, prefix)
        online.update({item.example_id: row for item, row in zip(batch, thoughts.clone(), strict=True)})
        return thoughts

    identity = StoreIdentity("f" * 64, T, P, "bfloat16", "bfloat16", "sdpa")
    store = fill(tmp_path, inputs, compute, identity=identity, tokens_per_batch=400)
    assert torch.equal(read(store, inputs), torch.stack([online[item.example_id] for item in inputs]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_thoughts_hardly_depend_on_the_batch(tmp_path, dtype, tolerance):
    """The stated tolerance: relative error of a row, Euclidean norm."""
    assistant, inputs = make_assistant(dtype=dtype), make_inputs(30)
    prefix = read_shared(assistant, inputs)
    name = str(dtype).removeprefix("torch.")
    rows = []
    for budget in (1, 200, 100_000):
        store = fill(
            tmp_path / str(budget),
            inputs,
            lambda batch: compute_thoughts(assistant, batch, prefix),
            identity=StoreIdentity("f" * 64, T, P, name, name, "sdpa"),
            tokens_per_batch=budget,
        )
        rows.append(read(store, inputs).double().flatten(1))
    for other in rows[1:]:
        assert ((other - rows[0]).norm(dim=1) / rows[0].norm(dim=1)).max() < tolerance


def test_batches_keep_the_token_budget_and_hold_each_input_once():
    lengths = [random.Random(0).randrange(1, 300) for _ in range(500)] + [5000]
    batches = thought_builder.token_budget_batches(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(501))
    assert batches[0] == [500]  # longer than the budget: alone
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1000 for batch in batches[1:])
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)


def fake(batch) -> torch.Tensor:
    """Thoughts that depend on the tokens alone, cheap and exact."""
    return torch.stack([torch.full((T, P), float(sum(item.token_ids))) for item in batch])


def test_a_second_build_computes_nothing_and_says_so(tmp_path, capsys):
    inputs = make_inputs(20)
    fill(tmp_path, inputs, fake)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("thoughts-*")}
    capsys.readouterr()
    store = fill(tmp_path, inputs, never)
    assert "all 20 rows are in" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("thoughts-*")}
    assert torch.equal(read(store, inputs), fake(inputs))


def test_reordered_and_added_data_reuses_what_is_there(tmp_path):
    inputs = make_inputs(30)
    fill(tmp_path, inputs[:20], fake)
    computed = []

    def compute(batch):
        computed.extend(item.example_id for item in batch)
        return fake(batch)

    store = fill(tmp_path, inputs[::-1], compute)
    assert sorted(computed) == sorted(item.example_id for item in inputs[20:])
    assert torch.equal(read(store, inputs), fake(inputs))


def test_equal_inputs_are_computed_once(tmp_path):
    inputs = make_inputs(5)
    twins = [AssistantInput("twin", item.token_ids, item.positions) for item in inputs]
    computed = []

    def compute(batch):
        computed.extend(batch)
        return fake(batch)

    fill(tmp_path, inputs + twins, compute)
    assert len(computed) == 5


def test_a_folder_of_another_assistant_is_refused(tmp_path):
    inputs = make_inputs(3)
    fill(tmp_path, inputs, fake)
    other = StoreIdentity("0" * 64, T, P, "float32", "float32", "sdpa")
    with pytest.raises(SoftCoTError, match="fingerprint"):
        fill(tmp_path, inputs, never, identity=other)


def test_what_is_computed_before_ctrl_c_is_kept(tmp_path):
    inputs, batches = make_inputs(20), []

    def compute(batch):
        batches.append(batch)
        if len(batches) == 6:
            raise KeyboardInterrupt
        return fake(batch)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, inputs, compute, tokens_per_batch=1)
    done = [item for batch in batches[:5] for item in batch]
    store = ThoughtStore.open(tmp_path, IDENTITY)
    assert len(store) == 5
    assert torch.equal(read(store, done), fake(done))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_the_build_and_name_the_example(tmp_path, value):
    inputs = make_inputs(20)

    def compute(batch):
        thoughts = fake(batch)
        for item, row in zip(batch, thoughts, strict=True):
            if item.example_id == "e13":
                row[1, 2] = value
        return thoughts

    with pytest.raises(SoftCoTError, match=r"example e13: 1 of the 128 values"):
        fill(tmp_path, inputs, compute, tokens_per_batch=100)
    store = ThoughtStore.open(tmp_path, IDENTITY)
    assert input_key(inputs[13]) not in store
    kept = [item for item in inputs if input_key(item) in store]
    assert kept
    assert torch.equal(read(store, kept), fake(kept))


def test_a_value_too_large_for_the_stored_dtype_is_not_finite(tmp_path):
    identity = StoreIdentity("f" * 64, T, P, "float16", "float32", "sdpa")
    with pytest.raises(SoftCoTError, match="stored as float16"):
        fill(tmp_path, make_inputs(1), lambda batch: fake(batch) * 1e6, identity=identity)


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = thought_builder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(thought_builder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SoftCoTError, match=r"needs 0\.0 MB \(10 rows x 4 x 32 x 4 bytes\).*free; make room"):
        fill(tmp_path, make_inputs(10), never)


def test_the_builder_holds_few_batches_however_slow_the_disk(tmp_path, monkeypatch):
    held = most = 0
    lock = threading.Lock()
    append = ts.StoreWriter.append

    def slow(self, keys, rows):
        nonlocal held
        threading.Event().wait(0.005)
        append(self, keys, rows)
        with lock:
            held -= len(keys)

    def compute(batch):
        nonlocal held, most
        with lock:
            held += len(batch)
            most = max(most, held)
        return fake(batch)

    monkeypatch.setattr(ts.StoreWriter, "append", slow)
    inputs = make_inputs(60)
    fill(tmp_path, inputs, compute, tokens_per_batch=1)
    assert 2 <= most <= 4  # one computed, two waiting, one being written


def test_progress_tells_rows_rate_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(thought_builder, "PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr(thought_builder, "_MANIFEST_SECONDS", 0.05)

    def compute(batch):
        threading.Event().wait(0.03)
        return fake(batch)

    fill(tmp_path, make_inputs(30), compute, tokens_per_batch=1)
    out = capsys.readouterr().out
    assert "30 of 30 rows to compute" in out
    assert "no launcher" not in out
    assert "tokens/s" in out
    assert " left" in out
    assert "done: 30 rows" in out


def test_info_tells_what_a_cache_is(tmp_path, capsys):
    fill(tmp_path / "a", make_inputs(7), fake)
    assert cache.main(["--info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in ("toys/llama", "7 of 4 x 32 float32", "in 1 shard", "created", "sdpa", "of all rows", "by question"):
        assert text in out


def test_info_of_a_large_cache_is_of_the_same_few_rows_whatever_the_shards(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "_SAMPLED_ROWS", 5)
    found = []
    for folder, inputs in ((tmp_path / "a", make_inputs(30)), (tmp_path / "b", make_inputs(30)[::-1])):
        fill(folder, inputs, fake)
        assert cache.main(["--info", str(folder)]) == 0
        out = capsys.readouterr().out
        assert "of a fixed sample of 5 rows" in out
        found.append(out[out.index("states") :])
    assert found[0] == found[1]


def test_verify_finds_a_flipped_bit_and_exits_with_2(tmp_path, capsys):
    fill(tmp_path, make_inputs(7), fake)
    assert cache.main([str(tmp_path), "--verify"]) == 0
    assert "all checksums agree, 7 rows" in capsys.readouterr().out
    (shard,) = tmp_path.glob("thoughts-*")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 4
    shard.write_bytes(data)
    assert cache.main(["--verify", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert f"damaged: {shard}: the checksum of row 1 of 7 differs" in captured.out
    assert "1 of 1 shards" in captured.err


def test_prune_removes_leftovers_and_nothing_else(tmp_path, capsys):
    inputs = make_inputs(7)
    fill(tmp_path, inputs, fake)
    (tmp_path / f"thoughts-0{tm.SHARD_SUFFIX}{TEMPORARY_SUFFIX}").write_bytes(b"x" * 1000)
    (tmp_path / f"thoughts-1{tm.SHARD_SUFFIX}{tm.DAMAGED_SUFFIX}").write_bytes(b"x" * 1000)
    assert cache.main(["--prune", str(tmp_path)]) == 0
    assert "removed 2 files" in capsys.readouterr().out
    assert torch.equal(read(ThoughtStore.open(tmp_path, IDENTITY), inputs), fake(inputs))
    assert len(list(tmp_path.iterdir())) == 3  # manifest, lock, shard


def test_a_folder_without_a_cache_is_said_to_be_one(tmp_path, capsys):
    assert cache.main(["--info", str(tmp_path)]) == 2
    assert "no thought cache in" in capsys.readouterr().err


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    """A recipe with toy models whose tokenizer has a token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*alphabet, "<|thought|>", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|thought|>"]})
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    for name in ("assistant", "base"):
        torch.manual_seed(0)
        config = LlamaConfig(**TOY | {"vocab_size": len(tokens), "max_position_embeddings": 2048})
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
    values = {
        "name": "toy",
        "task": {"name": "word_problems", "train_problems": 30, "validation_problems": 5, "test_problems": 10},
        "assistant": {"model": str(tmp_path / "assistant"), "dtype": "float32"},
        "base": {"model": str(tmp_path / "base"), "dtype": "float32"},
        "thoughts": {"count": T, "placeholder": "<|thought|>"},
        "cache": {"path": str(tmp_path / "caches"), "tokens_per_batch": 1000},
        "backbone": {"partition": "none"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_the_command_builds_a_recipes_cache_once(recipe_file, capsys):
    assert cache.main([str(recipe_file)]) == 0
    assert "done: " in capsys.readouterr().out
    recipe = load_recipe(recipe_file)
    inputs = Experiment(recipe).splits.assistant_inputs()
    assistant = LlamaForCausalLM.from_pretrained(recipe.assistant.model)
    rows = read(open_cache(recipe, inputs), inputs)
    torch.testing.assert_close(rows, one_by_one(assistant, inputs), rtol=1e-4, atol=1e-4)

    assert cache.main([str(recipe_file)]) == 0
    assert "nothing to compute" in capsys.readouterr().out


@pytest.mark.slow
def test_states_of_another_layer_have_a_cache_of_their_own(recipe_file, capsys):
    """Of three layers the last, which it is by default, and the one in the middle, each named in two ways."""
    inputs = Experiment(load_recipe(recipe_file)).splits.assistant_inputs()
    for override, anew in ("layer=-1", True), ("layer=3", False), ("layer=2", True), ("layer=-2", False):
        assert cache.main([str(recipe_file), f"thoughts.{override}"]) == 0
        assert ("nothing to compute" not in capsys.readouterr().out) == anew
    recipe = load_recipe(recipe_file, ["thoughts.layer=2"])
    assistant = LlamaForCausalLM.from_pretrained(recipe.assistant.model)
    rows = read(open_cache(recipe, inputs), inputs)
    torch.testing.assert_close(rows, one_by_one(assistant, inputs, 2), rtol=1e-4, atol=1e-4)
    assert cache.main([str(recipe_file), "thoughts.layer=2", "--verify"]) == 0
    with pytest.raises(SoftCoTError, match=r"There are others: .* \(layer is 2, wanted 1\)"):
        open_cache(load_recipe(recipe_file, ["thoughts.layer=1"]))


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_the_assistant_has_not_is_refused(recipe_file, layer):
    with pytest.raises(
        SoftCoTError, match=rf"thoughts.layer={layer}: .*assistant has 3 layers; set it to one from 1 to 3"
    ):
        Experiment(load_recipe(recipe_file, [f"thoughts.layer={layer}"]))


@pytest.mark.slow
def test_evaluation_with_other_thoughts_has_a_cache_of_its_own(recipe_file, capsys):
    other = "evaluation.thoughts=2"
    assert cache.main([str(recipe_file), other]) == 0
    recipe = load_recipe(recipe_file, [other])
    splits, evaluated = Experiment(recipe).splits, Experiment(load_recipe(recipe_file, ["thoughts.count=2"])).splits
    training = [example.assistant for example in (*splits.train, *splits.validation)]
    test = [example.assistant for example in evaluated.test]
    assert {len(item.positions) for item in training} == {T}
    assert {len(item.positions) for item in test} == {2}
    assistant = LlamaForCausalLM.from_pretrained(recipe.assistant.model)
    for of, inputs in ((recipe, training), (recipe.in_evaluation, test)):
        store = open_cache(of, inputs)
        assert store.manifest.rows == len(inputs), "nothing that is not read with so many thoughts"
        torch.testing.assert_close(read(store, inputs), one_by_one(assistant, inputs), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert cache.main(["--verify", str(recipe_file), other]) == 0
    assert capsys.readouterr().out.count("rows computed again") == 2
    assert cache.main([str(recipe_file), "task.train_problems=40", "--verify"]) == 0
    assert "rows computed again: largest relative error" in capsys.readouterr().out


def test_nothing_is_computed_for_a_base_that_cannot_be_one(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr(trial, "why_unsuitable", lambda model, role: "it is not causal" if role == "base" else None)
    for small_bytes in (trial.SMALL_BYTES, 0):
        monkeypatch.setattr(trial, "SMALL_BYTES", small_bytes)
        assert cache.main([str(recipe_file)]) == 2
        assert "it is not causal. Name another model in base.model" in capsys.readouterr().err
    assert not list((recipe_file.parent / "caches").rglob("thoughts-*"))


def test_other_ranks_load_nothing_for_a_base_that_cannot_be_one(recipe_file, monkeypatch, capsys):
    second = Ranks(1, 2, 1, 2, dist.HashStore(), "no launcher")
    second.fail()  # as rank 0 does when it gives up
    monkeypatch.setattr(thought_computing, "fill", lambda *arguments, **_: arguments[3]())
    monkeypatch.setattr(thought_computing, "load_assistant", lambda *_: pytest.fail("nothing is to be loaded"))
    with pytest.raises(OtherRankFailed):
        thought_computing.build(load_recipe(recipe_file), second)


def test_recipes_with_one_assistant_share_a_cache_and_new_data_adds_its_rows_alone(recipe_file, capsys):
    assert cache.main([str(recipe_file)]) == 0
    capsys.readouterr()
    other_run = ["name=other", "seed=5", "training.steps=7", "projection.init_scale=0.5", "task.validation_problems=7"]
    assert cache.main([str(recipe_file), *other_run, "task.train_problems=28"]) == 0
    assert "nothing to compute" in capsys.readouterr().out
    assert cache.main([str(recipe_file), *other_run, "task.test_problems=13"]) == 0
    assert re.search(r": 3 of \d+ rows to compute", capsys.readouterr().out)
    assert len([path for path in (recipe_file.parent / "caches").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_several_thoughts_of_an_input_are_built_like_one(tmp_path, dtype):
    """Rows of SoftCoT++, (K, T, P), from the computing function to the reader."""
    identity = StoreIdentity("f" * 64, T, P, dtype, "float32", "sdpa", num_initial_embeddings=3)
    inputs = make_inputs(9)
    truth = torch.randn(9, 3, T, P, generator=torch.Generator().manual_seed(0))
    number = {item.example_id: i for i, item in enumerate(inputs)}
    store = fill(
        tmp_path,
        inputs,
        lambda batch: truth[[number[item.example_id] for item in batch]],
        identity=identity,
        tokens_per_batch=200,
    )
    found = read(store, inputs)
    assert found.shape == (9, 3, T, P)
    assert torch.equal(found, truth.to(getattr(torch, dtype)))


@pytest.mark.parametrize("layer", [-1, 1])
def test_training_online_sees_the_cached_thoughts_bit_for_bit(recipe_file, layer):
    """The models and the builder's function of both commands, one batch of the same inputs."""
    recipe = load_recipe(recipe_file, ["thoughts.source=online", f"thoughts.layer={layer}"])
    experiment = Experiment(recipe)
    inputs = experiment.splits.assistant_inputs()
    compute = thought_computing.load_assistant(recipe, inputs, alone())
    identity = cache_identity(recipe)
    store = fill(recipe.cache.path / identity.folder_name, inputs, compute, identity=identity, tokens_per_batch=10**6)
    examples = experiment.splits.train
    batch = collate(sorted(examples, key=lambda e: -e.assistant.positions[-1])[:8], 0)
    in_one_batch = fill(recipe.cache.path / "8", batch.assistant, compute, identity=identity, tokens_per_batch=10**6)

    model = build_model(recipe, experiment, None)
    online = model.thoughts(batch)
    batch.thoughts = read(in_one_batch, batch.assistant)
    assert torch.equal(model.thoughts(batch), online)
    # In the batches of the recipe's own cache, which are others, rounding is all that differs.
    batch.thoughts = read(store, batch.assistant)
    torch.testing.assert_close(model.thoughts(batch), online, rtol=1e-5, atol=1e-5)


def test_a_missing_cache_is_told_from_one_of_other_thoughts(recipe_file):
    recipe = load_recipe(recipe_file)
    with pytest.raises(SoftCoTError, match=r"no cache of these thoughts at .*; build it with: softcot-ds cache"):
        open_cache(recipe)
    assert cache.main([str(recipe_file)]) == 0
    with pytest.raises(SoftCoTError, match=r"There are others: assistant-T4.* \(num_thoughts is 4, wanted 2\)"):
        open_cache(load_recipe(recipe_file, ["thoughts.count=2"]))
    more = Experiment(load_recipe(recipe_file, ["task.test_problems=20"])).splits.assistant_inputs()
    with pytest.raises(SoftCoTError, match=r"lacks 10 of 50 examples, .* first; add them"):
        open_cache(recipe, more)


def test_verify_computes_rows_again_and_names_a_wrong_one(recipe_file, capsys):
    """Checksums agree with what was written; only computing again can tell that it was wrong."""
    recipe = load_recipe(recipe_file)
    identity = cache_identity(recipe)
    inputs = Experiment(recipe).splits.assistant_inputs()
    fill(recipe.cache.path / identity.folder_name, inputs, fake, identity=identity)
    assert cache.main(["--verify", str(recipe_file)]) == 2
    captured = capsys.readouterr()
    assert "all checksums agree" in captured.out
    assert re.search(r"example \S+: computed again it differs by .* \(relative, tolerance 1e-04\)", captured.err)


@pytest.mark.parametrize("exchanged", [False, True])
def test_verify_tells_exchanged_rows_that_differ_by_less_than_the_tolerance(
    recipe_file, monkeypatch, capsys, exchanged
):
    """As SmolLM2's in bfloat16: 2.0% of a row is its own, and computed again it differs by 0.9%."""
    recipe = load_recipe(recipe_file, ["cache.dtype=bfloat16"])
    inputs = Experiment(recipe).splits.assistant_inputs()

    def states(item: AssistantInput, seed: str) -> torch.Tensor:
        own, noise = (
            torch.randn(T, P, generator=torch.Generator().manual_seed(random.Random(text).getrandbits(32)))
            for text in (item.example_id, seed + item.example_id)
        )
        constant = torch.zeros(T, P).index_fill(1, torch.tensor([3]), P**0.5)
        return constant + 0.02 * own + 0.0063 * noise

    other = dict(zip((item.example_id for item in inputs), inputs[1:] + inputs[:1], strict=True))

    def built(batch):
        return torch.stack([states(other[item.example_id] if exchanged else item, "built") for item in batch])

    identity = cache_identity(recipe)
    fill(recipe.cache.path / identity.folder_name, inputs, built, identity=identity)
    monkeypatch.setattr(
        thought_computing, "load_assistant", lambda *_: lambda batch: torch.stack([states(i, "again") for i in batch])
    )
    assert cache.main(["--verify", str(recipe_file), "cache.dtype=bfloat16"]) == 2 * exchanged
    captured = capsys.readouterr()
    if exchanged:
        found = re.search(
            r"differs by (\S+) \(relative\) from its row, and by (\S+) from that of (\S+): rows are ex", captured.err
        )
        error, nearest = map(float, found.groups()[:2])
        assert nearest < error < thought_computing.RECOMPUTE_TOLERANCE["bfloat16"]
    else:
        assert re.search(r"error 1\.\de-02, tolerance 5e-02; the nearest row .* is 2\.\de-02 away", captured.out)


@pytest.mark.distributed
def test_an_assistant_split_over_two_ranks_has_the_same_thoughts(recipe_file, tmp_path):
    """Ranks as of the deepspeed launcher, with 45 batches: in the last round one rank has nothing to save. Of a layer
    before the last, so that others are let go."""
    of = ["evaluation.thoughts=2", "thoughts.layer=2"]
    split = [str(recipe_file), f"cache.path={tmp_path / 'split'}", "cache.partition=zero3", "cache.tokens_per_batch=1"]
    run_forked(2, "softcot_ds.cache", *split, *of)
    assert cache.main([str(recipe_file), *of]) == 0
    wholes, splits = (cached(load_recipe(recipe_file, [*some, *of])) for some in ([], split[1:]))
    for (whole, inputs), (parts, _) in zip(wholes, splits, strict=True):
        found, wanted = (read(open_cache(of, inputs), inputs) for of in (parts, whole))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def run_ranks(size: int, work) -> list[BaseException | None]:
    """``work(ranks)`` in threads that share a board, as processes would; what each raised."""
    board = dist.HashStore()
    raised: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            work(Ranks(rank, size, rank, size, board, "threads"))
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_a_slow_rank_holds_nobody_up(tmp_path):
    inputs = make_inputs(40)
    done = [0, 0]

    def work(ranks):
        def compute(batch):
            threading.Event().wait(0.2 if ranks.rank == 0 else 0.005)
            done[ranks.rank] += len(batch)
            return fake(batch)

        thought_builder.fill(tmp_path, IDENTITY, inputs, lambda: compute, ranks, tokens_per_batch=1)

    assert run_ranks(2, work) == [None, None]
    assert sum(done) == 40
    assert done[1] > 3 * done[0]
    assert torch.equal(read(ThoughtStore.open(tmp_path, IDENTITY), inputs), fake(inputs))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_failing_rank_stops_all_and_what_is_finished_is_kept(tmp_path, bad_rank):
    inputs = make_inputs(40)

    def work(ranks):
        computed = 0

        def compute(batch):
            nonlocal computed
            threading.Event().wait(0.01)
            computed += 1
            if ranks.rank == bad_rank and computed == 3:
                raise SoftCoTError("out of luck")
            return fake(batch)

        thought_builder.fill(tmp_path, IDENTITY, inputs, lambda: compute, ranks, tokens_per_batch=1)

    raised = run_ranks(3, work)
    assert str(raised[bad_rank]) == "out of luck"
    assert all(isinstance(error, OtherRankFailed) for rank, error in enumerate(raised) if rank != bad_rank)
    store = ThoughtStore.open(tmp_path, IDENTITY)
    assert 4 <= len(store) < 40
    kept = [item for item in inputs if input_key(item) in store]
    assert torch.equal(read(store, kept), fake(kept))
