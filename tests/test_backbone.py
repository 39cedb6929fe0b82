"""Loading the frozen models: partitioned memory, missing weights, fingerprints."""

import json
import shutil

import pytest
import torch
from launch import ROOT, deepspeed_command, run
from safetensors.torch import load_file, save_file
from toy_models import make_config, make_toy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPConfig

from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.models import backbone
from softcot_ds.models.backbone import generation_stop_ids, load_frozen, load_tokenizer, weights_fingerprint, width
from softcot_ds.recipe import ModelConfig, load_recipe
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"
MIB = 2**20


@pytest.mark.distributed
def test_a_zero3_rank_holds_its_share_and_the_layers_at_work_and_expects_it(tmp_path):
    config = AutoConfig.for_model(
        "llama",
        vocab_size=768,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=20,
        num_attention_heads=8,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model_bytes = 4 * sum(p.numel() for p in model.parameters())
    layer_bytes = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "base")
    del model
    AutoTokenizer.from_pretrained(resolve_location("package:pair/base")).save_pretrained(tmp_path / "base")
    # The shipped buffer for gradients is for projections of real models: it would be larger than all of this.
    zero3 = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    zero3["zero_optimization"]["reduce_bucket_size"] = 100_000
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    peaks = {}
    for partition, extra in (("zero3", [f"backbone.deepspeed={tmp_path}/zero3.json"]), ("none", [])):
        output = tmp_path / f"peak-{partition}"
        common = [f"base.model={tmp_path}/base", f"backbone.partition={partition}", *extra]
        run(
            deepspeed_command(2, "memory_worker", RECIPE, output, *common),
            PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}",
            MALLOC_MMAP_THRESHOLD_="16384",  # or glibc keeps what is freed, and it would count
            MALLOC_TRIM_THRESHOLD_="0",
        )
        measured = [json.loads((tmp_path / f"peak-{partition}.{rank}").read_text()) for rank in (0, 1)]
        peaks[partition] = max(rank["peak"] for rank in measured)
        expected = sum(measured[0]["expected"].values())
        assert expected < peaks[partition] < 1.5 * expected, f"{partition}: {measured}"
    assert peaks["none"] > model_bytes, "the measurement sees a whole model"
    # The layer at work, the next one and some of another, the buffer that one is gathered in, and the activations.
    live_set = 4 * layer_bytes + 64 * MIB
    assert peaks["zero3"] < model_bytes / 2 + live_set < 0.8 * model_bytes, (
        f"peak {peaks['zero3'] / MIB:.0f} MiB of a {model_bytes / MIB:.0f} MiB model; "
        f"whole: {peaks['none'] / MIB:.0f} MiB"
    )


@pytest.fixture
def base_copy(tmp_path):
    shutil.copytree(resolve_location("package:pair/base"), tmp_path / "base")
    return tmp_path / "base"


def test_missing_weights_are_refused(base_copy):
    weights = load_file(base_copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, base_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SoftCoTError, match=r"1 weights are missing .*'model.layers.2.mlp.up_proj.weight'"):
        load_frozen(ModelConfig(model=str(base_copy)), "none", torch.device("cpu"))


def test_attention_that_a_family_or_this_machine_lacks_is_named_with_the_setting(base_copy, tmp_path):
    make_toy("rwkv").save_pretrained(tmp_path)
    for folder, attention, reason in (
        (tmp_path, "sdpa", "RwkvForCausalLM does not support an attention implementation through"),
        (base_copy, "flash_attention_2", "FlashAttention2 has been toggled on, but it cannot be used"),
    ):
        config = ModelConfig(model=str(folder), attention=attention, dtype="float32")
        with pytest.raises(SoftCoTError) as caught:
            load_frozen(config, "none", torch.device("cpu"))
        message = str(caught.value)
        assert message.startswith(f"{folder} cannot be loaded with attention {attention}: {reason}")
        assert message.endswith("Set attention: eager for it in the recipe (base.attention or assistant.attention)")
        assert "\n" not in message
        load_frozen(config.model_copy(update={"attention": "eager"}), "none", torch.device("cpu"))


@pytest.mark.slow
def test_the_width_is_that_of_the_embeddings_wherever_a_family_writes_it():
    assert [width(make_config(name)) for name in ("llama", "gemma3", "opt", "opt-projected")] == [32, 32, 32, 16]
    with pytest.raises(SoftCoTError, match="model type 'clip' is no causal language model here: Unrecognized"):
        width(CLIPConfig())


def test_loaded_model_is_frozen_and_in_its_dtype(base_copy):
    model = load_frozen(ModelConfig(model=str(base_copy), dtype="float32"), "none", torch.device("cpu"))
    assert not model.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_fingerprint_tells_weights_apart(base_copy, tmp_path):
    config = ModelConfig(model=str(base_copy))
    original = weights_fingerprint(config)
    assert original == weights_fingerprint(ModelConfig(model="package:pair/base")), "the place does not matter"
    weights = load_file(base_copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 0.01  # in the middle of the file
    save_file(weights, base_copy / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(config) != original
    (base_copy / "model.safetensors").unlink()
    with pytest.raises(SoftCoTError, match="no weights"):
        weights_fingerprint(config)


def edit_config(folder, **settings):
    values = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({key: values[key] for key in sorted(values, reverse=True)}))


def test_fingerprint_is_over_what_is_loaded(base_copy):
    config = ModelConfig(model=str(base_copy))
    original = weights_fingerprint(config)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (base_copy / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        assert weights_fingerprint(config) == original, f"{name} is not read"
    edit_config(base_copy, transformers_version="9.9", torch_dtype="float16", _name_or_path="elsewhere")
    assert weights_fingerprint(config) == original
    edit_config(base_copy, rms_norm_eps=0.1)
    assert weights_fingerprint(config) != original


def test_a_large_file_is_sampled(base_copy, monkeypatch):
    config = ModelConfig(model=str(base_copy))
    whole = weights_fingerprint(config)
    monkeypatch.setattr(backbone, "_WHOLE_BYTES", 1000)
    sampled = weights_fingerprint(config)
    weights = load_file(base_copy / "model.safetensors")
    save_file({name: weight * 1.001 for name, weight in weights.items()}, base_copy / "model.safetensors")
    assert len({whole, sampled, weights_fingerprint(config)}) == 3


@pytest.mark.parametrize("settings", [{"vocab_size": 9000}, {"intermediate_size": 8}])
def test_shapes_unlike_the_configuration_are_refused(base_copy, settings):
    edit_config(base_copy, **settings)
    with pytest.raises(SoftCoTError, match=r"weights have other shapes .* '.*\.weight' first: .* in the files, "):
        load_frozen(ModelConfig(model=str(base_copy)), "none", torch.device("cpu"))


def test_weights_that_the_configuration_leaves_out_are_refused_and_other_parts_are_not(base_copy):
    config = ModelConfig(model=str(base_copy))
    weights = load_file(base_copy / "model.safetensors")
    for extra, refused in (
        ("vision_tower.layers.0.weight", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("model.layers.99.mlp.up_proj.weight", True),
    ):
        save_file(weights | {extra: torch.zeros(3)}, base_copy / "model.safetensors", {"format": "pt"})
        if refused:
            with pytest.raises(SoftCoTError, match=f"leaves out 1 weights of its files, '{extra}' first"):
                load_frozen(config, "none", torch.device("cpu"))
        else:
            load_frozen(config, "none", torch.device("cpu"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_no_file(base_copy, name):
    (base_copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 4976698672\n")
    config = ModelConfig(model=str(base_copy))
    with pytest.raises(SoftCoTError, match=f"{name} is a pointer of git-lfs.* git lfs pull"):
        load_frozen(config, "none", torch.device("cpu"))


def test_attention_that_a_family_lacks_names_the_setting():
    recipe = ModelConfig(model="package:pair/base", attention="flash_attention_2")
    with pytest.raises(SoftCoTError, match=r"cannot be loaded with attention flash_attention_2: .* attention: eager"):
        load_frozen(recipe, "none", torch.device("cpu"))


def test_a_token_beyond_the_table_is_refused(base_copy):
    tokenizer = AutoTokenizer.from_pretrained(base_copy)
    tokenizer.add_tokens(["<|more|>"], special_tokens=True)
    tokenizer.save_pretrained(base_copy)
    edit_config(base_copy, vocab_size=len(tokenizer) - 1)
    recipe = load_recipe(RECIPE, [f"assistant.model={base_copy}", "thoughts.placeholder=<|more|>"])
    with pytest.raises(SoftCoTError, match=r"the tokenizer of the assistant makes token \d+ \('<\|more\|>'\), but "):
        Experiment(recipe)


def test_a_shard_that_the_index_names_and_that_is_missing_is_refused(base_copy):
    config = ModelConfig(model=str(base_copy))
    weights = load_file(base_copy / "model.safetensors")
    (base_copy / "model.safetensors").unlink()
    shards = {f"model-0000{part + 1}-of-00003.safetensors": sorted(weights)[part::3] for part in range(3)}
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, base_copy / shard, {"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = base_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert len(weights_fingerprint(config)) == 64
    load_frozen(config, "none", torch.device("cpu"))
    (base_copy / "model-00002-of-00003.safetensors").unlink()
    named = "1 of 3 weight files are missing in .*, model-00002-of-00003.safetensors first.* fetch the model again"
    with pytest.raises(SoftCoTError, match=named):
        weights_fingerprint(config)
    with pytest.raises(SoftCoTError, match=named):
        load_frozen(config, "none", torch.device("cpu"))
    index.write_text("{}")
    with pytest.raises(SoftCoTError, match=r"index.json: no index of weights \('weight_map'\); fetch the model again"):
        weights_fingerprint(config)


def test_broken_folders_get_one_line(base_copy):
    config = ModelConfig(model=str(base_copy))
    (base_copy / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(SoftCoTError, match="cannot load the model"):
        load_frozen(config, "none", torch.device("cpu"))
    (base_copy / "tokenizer.json").write_text("{")
    with pytest.raises(SoftCoTError, match="cannot load the tokenizer"):
        load_tokenizer(config)


def test_chat_template_of_the_recipe_wins(base_copy, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(ModelConfig(model=str(base_copy), chat_template=template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello!"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\xff\xfe{", "can't decode byte"), (b"{% if %}", None)],
)
def test_a_chat_template_that_cannot_be_read_is_named(base_copy, tmp_path, content, reason):
    template = tmp_path / "own.jinja"
    template.write_bytes(content or b"")
    config = ModelConfig(model=str(base_copy), chat_template=template)
    if content is None:
        template.unlink()
    if reason is None:
        assert load_tokenizer(config).chat_template == "{% if %}"  # what Jinja makes of it is ChatFormat's to say
        return
    with pytest.raises(SoftCoTError, match=f"cannot read the chat template {template}: .*{reason}"):
        load_tokenizer(config)


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ('{"eos_token_id": [1, 106]}', [1, 106]),
        ('{"eos_token_id": 2}', [2]),
        ('{"eos_token_id": null}', []),
        ("{}", []),
        (None, []),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', no token id and no list of them; fetch the model again"),
        ('{"eos_token_id": [1, null]}', r"eos_token_id is \[1, None\], no token id"),
        ('{"eos_token_id": true}', "eos_token_id is True, no token id"),
        ('{"eos_token_id": -1}', "eos_token_id is -1, no token id"),
        ('"text"', "eos_token_id is 'text', no token id"),
        ("{", "generation_config.json: not JSON: line 1"),
    ],
)
def test_the_models_own_stop_tokens_are_those_of_its_generation_config(base_copy, content, ids):
    path = base_copy / "generation_config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    if isinstance(ids, list):
        assert generation_stop_ids(ModelConfig(model=str(base_copy))) == ids
        return
    with pytest.raises(SoftCoTError, match=ids):
        generation_stop_ids(ModelConfig(model=str(base_copy)))


def test_an_experiment_stops_at_what_the_files_list_and_the_recipe_says(base_copy):
    (base_copy / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    changes = [f"base.model={base_copy}", "base.end_of_turn='<|user|>'", "evaluation.conditions=[learned, text]"]
    experiment = Experiment(load_recipe(RECIPE, changes))
    end, eos = (experiment.base_tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|end|>"))
    assert experiment.base_prompts.stop_ids == [end, *sorted([eos, 5, 7])]
    assert experiment.assistant_prompts.stop_ids == [eos]
    assert experiment.chat_identity["base"]["known_stop_ids"] == sorted([eos, 5, 7])
    assert experiment.chat_identity["base"]["end_of_turn"] == "<|user|>"
    assert experiment.chat_identity["assistant"]["known_stop_ids"] == [eos]


def test_a_listed_stop_token_within_the_targets_is_said(base_copy):
    small = ["task.train_problems=8", "task.validation_problems=2", "task.test_problems=2", f"base.model={base_copy}"]
    experiment = Experiment(load_recipe(RECIPE, small))
    assert experiment.splits.notes == []
    word = experiment.splits.train[0].target_ids[1]
    (base_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [word]}))
    splits = Experiment(load_recipe(RECIPE, small)).splits
    count, text = sum(word in e.target_ids for e in splits.train), experiment.base_tokenizer.decode([word])
    (note,) = splits.notes
    assert note.startswith(f"{count} of {len(splits.train)} training targets contain {text!r}, where decoding stops")
