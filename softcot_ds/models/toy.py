"""A toy made from a model's configuration: its code and its settings, a few narrow layers, random weights.

It shows in a second what the code of a model that takes hours to load would do. What is a size is known by its name.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from softcot_ds.distributed import device

LAYERS, WIDTH, VOCABULARY = 3, 32, 96
_HEADS, _HEAD_WIDTH = 4, 8
_MOST_PARAMETERS = 2**24
_TOLERANCE = 1e-3
"""Relative error in float32: a fault changes all of a toy's logits, the order of a sum their last digits."""

_WIDTHS: dict[str, int] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "word_embed_proj_dim"), WIDTH)
    | dict.fromkeys(("attention_hidden_size", "lru_width"), WIDTH)
    | dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS)
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
)
"""What ranks divide that hold a model in slices."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
"""What configurations call the number of layers."""
_SIZES: dict[str, int] = (
    dict.fromkeys(DEPTHS, LAYERS)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_dt_rank"), 4)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256)
    | dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), _HEAD_WIDTH)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_n_heads", "mamba_d_head"), 8)
    | dict.fromkeys(("mamba_headdim", "mamba_d_state", "state_size", "kv_lora_rank"), 8)
    | dict.fromkeys(("num_experts_per_tok", "mamba_expand"), 2)
    | dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1)
    | dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2)
    | dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "num_layers_per_stack"), 1)
    | {"mamba_d_ssm": 64, "qk_head_dim": 2 * _HEAD_WIDTH}
    | {"vocab_size_per_layer_input": VOCABULARY, "rotary_dim": 4, "num_kv_shared_layers": 0}
    | {"q_lora_rank": 12, "mamba_chunk_size": 16, "sliding_window": 6}
    | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)


_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_MAY_BE_UNSET = (*_KEY_HEADS, "sliding_window", "q_lora_rank")
"""Where None is a way of its own: as many as heads, no window, no compression. Elsewhere it hides a default."""


def layer_configs(config: PreTrainedConfig, layers: int) -> list[PreTrainedConfig]:
    """The configuration of each of so many layers: its own where they differ, such as in how wide their heads are."""
    return list(config.per_layer_config) if config.is_heterogeneous else [config] * layers


def toy_config(config: PreTrainedConfig, ranks: int = 1, **settings: Any) -> PreTrainedConfig:
    """The configuration of a toy of the same model type; ``settings`` replace what it says.

    Args:
        ranks: make the toy so many times as wide, so that each of so many ranks can hold a slice of it.
    """
    return type(config).from_dict(_shrunk(config.to_dict(), config.attribute_map, ranks) | settings)


def _shrunk(values: dict[str, Any], names: dict[str, str], ranks: int) -> dict[str, Any]:
    """A configuration's settings made small, in its parts too. ``names``: other names of settings, and their own."""
    sizes = _SIZES | {name: ranks * size for name, size in _WIDTHS.items()}
    sizes |= {own: sizes[other] for other, own in names.items() if other in sizes}
    depth = next((values[names.get(name, name)] for name in DEPTHS if names.get(name, name) in values), None)
    return {key: _small(key, value, sizes, depth, values, ranks) for key, value in values.items()}


def _small(key: str, value: Any, sizes: dict[str, int], depth: int | None, values: dict[str, Any], ranks: int) -> Any:
    if key == "per_layer_config":  # what some layers have of their own; those are others now
        return {}
    if isinstance(value, dict):
        return _shrunk(value, {}, ranks) if "model_type" in value else _small_rope(value)
    if isinstance(value, list) and len(value) == depth:  # one entry for each layer
        kinds = list(dict.fromkeys(value)) if all(isinstance(entry, str) for entry in value) else value
        return [sizes.get(key, entry) for entry in (kinds * LAYERS)[:LAYERS]]
    if isinstance(value, bool | list) or (value is None and (key in _MAY_BE_UNSET or key.endswith("_token_id"))):
        return value
    if key in _KEY_HEADS:  # one for each head, one for all, or between
        heads = values.get("num_attention_heads")
        return ranks * (_HEADS if value == heads or values.get("kv_lora_rank") else min(value, _HEADS // 2))
    if key in ("partial_rotary_factor", "rotary_pct"):
        return _whole_pairs(value)
    if key.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
        return sizes.get(key, VOCABULARY - 1)
    return sizes.get(key, value)


def _whole_pairs(factor: float) -> float:
    """The nearest part of a head that is rotated in whole pairs of dimensions."""
    return max(2, 2 * round(_HEAD_WIDTH * factor / 2)) / _HEAD_WIDTH


def _small_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, one set or one for each kind of layer: what has an entry for each frequency is cut."""
    small = {key: _small_rope(value) if isinstance(value, dict) else value for key, value in values.items()}
    if small.get("partial_rotary_factor"):
        small["partial_rotary_factor"] = _whole_pairs(small["partial_rotary_factor"])
    frequencies = int(_HEAD_WIDTH * small.get("partial_rotary_factor", 1)) // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(small.get(key), list):
            small[key] = small[key][:frequencies]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = min(64, small["original_max_position_embeddings"])
    return small


def make_toy(config: PreTrainedConfig) -> PreTrainedModel:
    """A frozen model of a small configuration, in float32, with weights so large that every path shows in what it says.

    Raises:
        ValueError: it is not small: its sizes have names that are not known here.
    """
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > _MOST_PARAMETERS:
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


def says_the_same(found: list[torch.Tensor], true: list[torch.Tensor]) -> bool:
    """Whether two toys differ by rounding alone."""
    return all((a - b).norm() <= _TOLERANCE * b.norm() for a, b in zip(found, true, strict=True))


def said(model: PreTrainedModel) -> list[torch.Tensor]:
    """What a toy on this rank's device says: a gradient with respect to embeddings, the logits of that pass, and logits
    without gradient."""
    model.requires_grad_(False)
    ids = torch.arange(VOCABULARY // 4, VOCABULARY // 4 + 10, device=device()).view(2, 5)
    with torch.enable_grad():
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.logsumexp(dim=-1).sum(), [embeds])
    with torch.no_grad():
        run: Any = model(input_ids=ids, use_cache=False).logits
    # Some families mask entries of their vocabulary.
    return [gradient, *(found.detach().clamp(min=-1e4) for found in (logits, run))]
