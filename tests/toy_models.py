"""Toy models of transformers' causal families, made from nothing but a family's name.

A family's default configuration is shrunk by the names of its settings, and by what a few families say besides.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, WIDTH, VOCABULARY = 3, 32, 96

_SMALL = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), WIDTH)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS)
    | dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_experts", "num_local_experts"), 4)
    | dict.fromkeys(("n_routed_experts", "mamba_dt_rank"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256)
    | dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"), 8)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_n_heads", "mamba_d_head"), 8)
    | dict.fromkeys(("mamba_d_state", "state_size"), 8)
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_experts_per_tok", "mamba_expand"), 2)
    | dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1)
    | {"num_key_value_heads": 2, "q_lora_rank": 12, "mamba_chunk_size": 16, "sliding_window": 6}
    | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA4 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_SWA = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon-alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 5, "final_logit_softcapping": 3.0},
    "gemma3_text": _SWA,
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 1,
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, **_GEMMA4},
    "gemma4_text-plain": {"hidden_size_per_layer_input": 0, **_GEMMA4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gpt_oss": _SWA,
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "olmo3": _SWA,
    "opt-projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen2-sliding": {"use_sliding_window": True, **_SWA},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 0, 1]},
}
"""What a toy needs besides. A name may go on after a dash where one family is tried in several ways."""


def make_config(name: str) -> PreTrainedConfig:
    """The configuration of a toy; ``gemma3`` is what the hub has, with a vision tower."""
    if name == "gemma3":
        return CONFIG_MAPPING[name](
            text_config=make_config("gemma3_text"), vision_config=_VISION, mm_tokens_per_image=4, image_token_index=95
        )
    family = name if name in CONFIG_MAPPING else name.partition("-")[0]
    kind = CONFIG_MAPPING[family]
    default = kind()
    settings = {key: value for key, value in _SMALL.items() if _has(default, key) and not _is_read_only(kind, key)}
    for key in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(default, key, None) or ()))
        if kinds and not _is_read_only(kind, key):
            settings[key] = (kinds * LAYERS)[:LAYERS]
    heads_are_keys = getattr(default, "num_key_value_heads", 1) == getattr(default, "num_attention_heads", 2)
    if "num_key_value_heads" in settings and (heads_are_keys or "kv_lora_rank" in settings):
        settings["num_key_value_heads"] = 4
    return kind(**(settings | VARIANTS.get(name, {})))


def _has(config: PreTrainedConfig, key: str) -> bool:
    try:
        unset = getattr(config, key) is None
    except (AttributeError, RuntimeError):  # what varies from layer to layer cannot be asked of the whole
        return False
    return not (unset and key in ("num_key_value_heads", "sliding_window"))  # where None means: as many, or none


def _is_read_only(kind: type, key: str) -> bool:
    found = getattr(kind, kind.attribute_map.get(key, key), None)
    return isinstance(found, property) and found.fset is None


def make_toy(name: str) -> PreTrainedModel:
    """A frozen toy in float32 with weights large enough that every path shows in what it says.

    Raises:
        ValueError: the family's settings have other names, and it has not become small.
    """
    config = make_config(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2**24:
        raise ValueError(f"{size:,} parameters are not small")
    torch.manual_seed(11)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.2 / max(1, parameter.shape[-1]) ** 0.5)
            elif not name.endswith(("A_log", "dt_bias", ".D")):  # rates that must stay in range
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)
