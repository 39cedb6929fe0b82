"""Toy models of transformers' causal families, made from nothing but a family's name; and the embedded pair anew."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from softcot_ds.models import toy
from softcot_ds.models.toy import VOCABULARY, WIDTH, toy_config
from softcot_ds.values import resolve_location

__all__ = ["VARIANTS", "VOCABULARY", "WIDTH", "make_config", "make_random_pair", "make_toy"]

_SWA = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 16}},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon-alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma4_text": {"hidden_size_per_layer_input": 8, **_GEMMA4},
    "gemma4_text-plain": {"hidden_size_per_layer_input": 0, **_GEMMA4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "hrm_text": {"num_hidden_layers": 8},
    "jamba": {"use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "opt-projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen2-sliding": {"use_sliding_window": True, **_SWA},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 0, 1]},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}
"""What a toy's family does not say by itself. A name may go on after a dash where one is tried in several ways."""


def make_config(name: str) -> PreTrainedConfig:
    """The configuration of a toy; ``gemma3`` is what the hub has, with a vision tower."""
    family = name if name in CONFIG_MAPPING else name.partition("-")[0]
    return toy_config(CONFIG_MAPPING[family](), **VARIANTS.get(name, {}))


def make_toy(name: str) -> PreTrainedModel:
    """A frozen toy in float32. Raises ValueError where a family has not become small."""
    return toy.make_toy(make_config(name))


def make_random_pair(folder: Path) -> list[str]:
    """The embedded pair with random weights in float32, as overrides of a recipe; its files lie in ``folder``.

    Trained weights amplify float32's rounding: any float32 pass through them, the naive one too, gives a gradient some
    2e-5 away from float64's.
    """
    torch.manual_seed(0)
    overrides = []
    for name in ("assistant", "base"):
        location = resolve_location(f"package:pair/{name}")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(location), dtype=torch.float32)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(location).save_pretrained(folder / name)
        overrides.append(f"{name}.model={folder / name}")
    return overrides
