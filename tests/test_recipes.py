"""No recipe and no DeepSpeed configuration is dead text: each one loads, and trains at toy width."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from launch import ROOT
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softcot_ds.methods.base import method_class
from softcot_ds.recipe import ModelConfig, load_recipe
from softcot_ds.values import resolve_location

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PAPER = sorted((ROOT / "recipes/paper").glob("*.yaml"))
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
# The families of the models that recipes name, so that they can be built without the hub.
FAMILIES = {
    "meta-llama/Llama-3": "llama",
    "HuggingFaceTB/SmolLM2": "llama",
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
    assert recipe.evaluation.conditions[0] == "learned"
    controls = {"shuffled", "mean", "zero", "none"}
    if known := method_class(recipe.method).conditions:
        controls &= {*known}
    assert controls <= set(recipe.evaluation.conditions), "accuracy never comes alone"


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


def test_recipes_of_the_paper_have_its_settings_for_every_task_and_pair():
    """Its published code has the same for each, but for the task and the models."""
    recipes = [load_recipe(path) for path in PAPER]
    tasks = ("gsm8k", "asdiv_aug", "aqua", "strategy_qa")
    pairs = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
    assert {(recipe.task.name, recipe.base.model) for recipe in recipes} == set(product(tasks, pairs))
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        training, evaluation = recipe.training, recipe.evaluation
        assert (training.epochs, training.steps, training.global_batch_size) == (10, None, 4)
        assert (training.learning_rate, training.schedule, training.min_lr_ratio) == (2e-5, "linear", 0)
        assert (training.warmup_steps, training.weight_decay, training.gradient_clipping) == (0, 0, 1.0)
        assert (recipe.thoughts.count, evaluation.thoughts, recipe.projection.init_scale) == (32, 4, 1)
        assert (evaluation.temperature, evaluation.top_p, evaluation.text_max_tokens) == (1.0, 1.0, 24)
        assert evaluation.max_new_tokens == (256 if recipe.task.name == "strategy_qa" else 1024)
        of_llama = recipe.base.model == pairs[0]
        assert recipe.thoughts.placeholder == ("<|end_of_text|>" if of_llama else "<|endoftext|>")
        assert evaluation.placeholder == recipe.thoughts.placeholder
        assert recipe.assistant.model.startswith("meta-llama/Llama-3.2-1B" if of_llama else "Qwen/Qwen2.5-1.5B")


def record_of(task: str, number: int) -> dict[str, Any]:
    """A made-up record in the format in which the task is published."""
    question, double = f"What is {number} plus {number}?", 2 * number
    return {
        "gsm8k": {"question": question, "answer": f"<<{number}+{number}={double}>>\n#### {double}"},
        "asdiv_aug": {"question": question, "answer": f"<<{number}+{number}={double}>>\n####{double}"},
        "aqua": {
            "question": question,
            "options": [f"A){double}", f"B){double + 1}"],
            "rationale": f"{number}+{number}={double}",
            "correct": "A",
        },
        "strategy_qa": {"question": question, "answer": True, "facts": [f"{number}+{number}={double}"]},
    }[task]


@pytest.mark.distributed
def test_recipes_of_real_models_train_at_toy_width(tmp_path):
    """Each with its own families, bf16, batch sizes and DeepSpeed configuration, in one process after another."""
    for task in ("gsm8k", "asdiv_aug", "aqua", "strategy_qa"):
        for split, numbers in {"train": range(80), "test": [100]}.items():
            lines = [json.dumps(record_of(task, number)) + "\n" for number in numbers]
            (tmp_path / f"{task}-{split}.jsonl").write_text("".join(lines))
    trained = [path for path in RECIPES if not load_recipe(path).base.model.startswith("package:")]
    commands = []
    for path in trained:
        recipe = load_recipe(path)
        data = tmp_path / recipe.task.name
        steps = "training.steps=2 task.validation_problems=4"
        if path in PAPER:
            steps = "training.epochs=1 task.train_problems=11"  # two batches and a rest
        placeholder = recipe.thoughts.placeholder
        folder = tmp_path / recipe.name
        base = toy_model(recipe.base, folder / "base", 64, placeholder)
        assistant = toy_model(recipe.assistant, folder / "assistant", 32, placeholder)
        commands += [
            path,
            f"base.model={base} assistant.model={assistant} task.train={data}-train.jsonl task.test={data}-test.jsonl "
            f"output_dir={tmp_path} cache.path={tmp_path}/cache {steps} training.warmup_steps=0 "
            # One rank is fewer than a group, and the data less than a global batch.
            f"backbone.group_size=null training.global_batch_size={min(64, recipe.training.global_batch_size)}",
        ]
    done = run_forked(1, "train_worker", *commands)
    for path in trained:
        checkpoint = tmp_path / load_recipe(path).name / "checkpoints/step-2"
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
