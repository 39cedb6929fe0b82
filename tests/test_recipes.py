"""No recipe and no DeepSpeed configuration is dead text: each one loads, and trains at toy width."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_forked
from launch import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softcot_ds.recipe import ModelConfig, load_recipe
from softcot_ds.values import resolve_location

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
# The families of the models that recipes name, so that they can be built without the hub.
FAMILIES = {
    "meta-llama/Llama-3": "llama",
    "Qwen/Qwen2.5": "qwen2",
    "Qwen/Qwen3": "qwen3",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "Qwen/Qwen3-235B-A22B": "qwen3_moe",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def toy_model(model: ModelConfig, folder: Path, width: int, placeholder: str) -> Path:
    """A random model of the family of ``model`` at toy width, with the embedded pair's tokenizer."""
    family = FAMILIES[max((prefix for prefix in FAMILIES if model.model.startswith(prefix)), key=len)]
    tokenizer = AutoTokenizer.from_pretrained(resolve_location("package:pair/base"))
    tokenizer.chat_template += "".join(f"{{% set unused = {name} %}}" for name in model.template_kwargs)
    tokenizer.add_special_tokens({"additional_special_tokens": [placeholder]})
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(EXPERTS | {"moe_intermediate_size": width} if family == "qwen3_moe" else {}),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_needs(path):
    recipe = load_recipe(path)
    assert load_recipe(path).to_yaml() == recipe.to_yaml()
    assert recipe.base.model != recipe.assistant.model
    assert recipe.evaluation.conditions[0] == "learned"
    assert {"shuffled", "mean", "zero", "none"} <= set(recipe.evaluation.conditions), "accuracy never comes alone"


def test_recipes_cover_the_named_pairs():
    pairs = {(load_recipe(path).base.model, load_recipe(path).assistant.model) for path in RECIPES}
    assert pairs >= {
        ("package:pair/base", "package:pair/assistant"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-0.6B"),
    }


@pytest.mark.distributed
def test_recipes_of_real_models_train_at_toy_width(tmp_path):
    """Each with its own families, bf16, batch sizes and DeepSpeed configuration, in one process after another."""
    data = tmp_path / "data.jsonl"
    records = [
        {"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>\n#### {2 * i}"}
        for i in range(80)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"question": "What is 100 plus 1?", "answer": "#### 101"}) + "\n")
    commands = []
    for path in RECIPES:
        recipe = load_recipe(path)
        if recipe.task.name != "gsm8k":
            continue
        placeholder = recipe.thoughts.placeholder
        folder = tmp_path / path.stem
        base = toy_model(recipe.base, folder / "base", 64, placeholder)
        assistant = toy_model(recipe.assistant, folder / "assistant", 32, placeholder)
        commands += [
            path,
            f"base.model={base} assistant.model={assistant} task.train={data} task.test={test} output_dir={tmp_path} "
            f"task.validation_problems=4 cache.path={tmp_path}/cache training.steps=2 training.warmup_steps=0 "
            # One rank is fewer than a group, and the data less than a global batch.
            f"backbone.group_size=null training.global_batch_size={min(64, recipe.training.global_batch_size)}",
        ]
    done = run_forked(1, "train_worker", *commands)
    for path in RECIPES:
        recipe = load_recipe(path)
        if recipe.task.name == "gsm8k":
            checkpoint = tmp_path / recipe.name / "checkpoints/step-2"
            assert (checkpoint / "COMPLETE").exists(), done.stdout
            weight = load_file(checkpoint / "projection.safetensors")["weight"]
            assert not torch.equal(weight, weight.bfloat16().float()), "bf16 compute, float32 master weights"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_accepts_the_configuration(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads(path.read_text())
    assert '"auto"' not in path.read_text()
    parsed = DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1})
    assert parsed.zero_config.stage == config["zero_optimization"]["stage"]
    # pydantic fields of DeepSpeed accept unknown keys in places: each of ours must be known.
    known = set(type(parsed.zero_config).model_fields) | {
        field.alias for field in type(parsed.zero_config).model_fields.values()
    }
    assert set(config["zero_optimization"]) <= known


def test_every_key_of_a_configuration_has_its_reason():
    reasons = (ROOT / "ds_configs" / "README.md").read_text()
    for path in CONFIGS:
        assert f"`{path.name}`" in reasons
        for key, value in json.loads(path.read_text()).items():
            for name in value if key == "zero_optimization" else [key]:
                assert name in reasons, f"{path.name}: no reason for {name}"
