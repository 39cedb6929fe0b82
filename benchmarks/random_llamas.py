"""Frozen Llamas with random weights, for the benchmarks: what is computed is worthless, what it costs is real."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
# Widths x 3 / 32, layers / 8; the vocabulary x 3 / 256, so that the head keeps its share: 7% of the base.
SMALL_8B = {
    "hidden_size": 384,
    "intermediate_size": 1344,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 1503,
}
SMALL_1B = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 1503,
    "tie_word_embeddings": True,
}


def default_device() -> torch.device:
    """The GPU, or the CPU on a machine without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_llama(shape: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """A frozen model, made on the device: in bfloat16 on a GPU, in float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, max_position_embeddings=4096), dtype=dtype)
    return model.eval().requires_grad_(False)
