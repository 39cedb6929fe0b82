"""Toys made from the settings of real models, and what they say before a large model is loaded."""

import json

import pytest
import torch
from test_quantized import FOUR
from torch import nn
from toy_models import VOCABULARY, WIDTH, make_toy
from transformers import AutoConfig

from softcot_ds.errors import SoftCoTError
from softcot_ds.methods import trial
from softcot_ds.methods.trial import Untried, check_ahead, why_unsuitable_ahead
from softcot_ds.models import quantized, toy
from softcot_ds.models.backbone import width
from softcot_ds.models.toy import toy_config
from softcot_ds.recipe import ModelConfig
from softcot_ds.values import resolve_location

REAL = {
    "llama-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "eos_token_id": [128001, 128008, 128009],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "phi3-128k": {
        "model_type": "phi3",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "vocab_size": 32064,
        "pad_token_id": 32000,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48},
    },
    "gemma3-27b": {
        "model_type": "gemma3",
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "patch_size": 14,
        },
    },
    "deepseek-671b": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "vocab_size": 129280,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    },
    "jamba-large": {  # an attention layer in eight: a toy without any would do what the model does not
        "model_type": "jamba",
        "hidden_size": 8192,
        "num_hidden_layers": 72,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "num_experts": 16,
        "use_mamba_kernels": False,
    },
    "qwen3-next-80b": {
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "vocab_size": 151936,
    },
}


def write_config(folder, settings) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return ModelConfig(model=str(folder))


def save_toy(folder, family) -> ModelConfig:
    make_toy(family).save_pretrained(folder)
    return ModelConfig(model=str(folder), dtype="float32")


@pytest.fixture
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(trial, "SMALL_BYTES", 0)
    monkeypatch.setattr(trial, "load_frozen", lambda *_: pytest.fail("a large model is not to be loaded"))


@pytest.mark.parametrize("name", REAL)
def test_a_toy_has_its_models_code_and_settings_and_is_small(tmp_path, name):
    write_config(tmp_path, REAL[name])
    real = AutoConfig.from_pretrained(tmp_path)
    model = toy.make_toy(toy_config(real))
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**6
    assert type(model.config) is type(real)
    small, large = model.config.get_text_config(), real.get_text_config()
    assert (width(model.config), small.vocab_size, small.num_hidden_layers) == (WIDTH, VOCABULARY, 3)
    assert {*(getattr(small, "layer_types", None) or ())} == {*(getattr(large, "layer_types", None) or ())}
    assert (small.num_key_value_heads == small.num_attention_heads) == (
        large.num_key_value_heads == large.num_attention_heads
    )
    assert real.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict(), "the model's own is not changed"
    assert trial.why_unsuitable(model, "base") is None


def test_making_a_toy_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    make_toy("llama")
    assert torch.rand(1) == first


@pytest.mark.parametrize(
    ("family", "role", "reason"),
    [
        ("llama", "base", None),
        ("lfm2", "base", None),
        ("llama", "assistant", None),
        ("gemma3n_text", "base", "it needs token ids beside embeddings"),
        ("gemma4_text", "base", "without providing `input_ids`"),
    ],
)
def test_a_toy_says_ahead_what_the_model_would_say(tmp_path, monkeypatch, family, role, reason):
    config = save_toy(tmp_path, family)
    loaded = why_unsuitable_ahead(config, role)
    monkeypatch.setattr(trial, "SMALL_BYTES", 0)
    ahead = why_unsuitable_ahead(config, role)
    if reason is None:
        assert loaded is ahead is None
        check_ahead(config, role)
        return
    assert reason in loaded
    assert ahead == f"a small model made from its configuration shows that {loaded}"
    with pytest.raises(
        SoftCoTError, match=rf"{tmp_path} \(model type '{family}'\) cannot be the {role}: a small model"
    ):
        check_ahead(config, role)


@pytest.mark.parametrize("small_bytes", [trial.SMALL_BYTES, 0])
def test_a_base_whose_layers_pass_back_a_wrong_gradient_is_told_ahead(tmp_path, monkeypatch, small_bytes):
    config = save_toy(tmp_path, "llama")
    monkeypatch.setattr(trial, "SMALL_BYTES", small_bytes)
    product = nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear, "forward", lambda layer, states: product(layer, 0.9 * states + 0.1 * states.detach())
    )
    with pytest.raises(SoftCoTError, match=r"a small model .* the gradient .* off from .* Name another model in base"):
        check_ahead(config, "base")
    check_ahead(config, "assistant")


@pytest.mark.parametrize("bits", [8, FOUR])
def test_a_base_is_tried_ahead_in_the_bits_that_it_will_have(monkeypatch, nothing_is_small, bits):
    config = ModelConfig(model=str(resolve_location("package:pair/base")))
    monkeypatch.setattr(trial, "try_decoding", lambda model: tried.append(model))
    tried = []
    check_ahead(config, "base", bits)
    (decoder,) = (model.get_decoder() for model in tried)
    assert {module.weight.ndim for module in decoder.modules() if isinstance(module, nn.Linear)} == {1}, "all packed"
    backward = quantized._Product.backward
    monkeypatch.setattr(quantized._Product, "backward", lambda ctx, g: backward(ctx, 0.9 * g))
    with pytest.raises(SoftCoTError, match=rf"pass back none, or a wrong one \(with backbone.bits={bits}\)"):
        check_ahead(config, "base", bits)


def test_a_base_that_cannot_decode_is_told_ahead(tmp_path, monkeypatch, nothing_is_small):
    def refuse(_model):
        raise SoftCoTError("it cannot decode")

    monkeypatch.setattr(trial, "try_decoding", refuse)
    config = save_toy(tmp_path, "llama")
    assert why_unsuitable_ahead(config, "base").endswith("it cannot decode")
    assert why_unsuitable_ahead(config, "assistant") is None, "an assistant decodes nothing"


@pytest.mark.parametrize("role", ["base", "assistant"])
def test_a_toy_that_fails_at_what_every_model_does_says_nothing(tmp_path, monkeypatch, nothing_is_small, role):
    config = save_toy(tmp_path, "llama")
    make = trial.make_toy

    def broken(settings):
        model = make(settings)
        model.model.layers[0].mlp.forward = lambda hidden: hidden[..., :1] @ hidden
        return model

    monkeypatch.setattr(trial, "make_toy", broken)
    with pytest.raises(Untried, match="no small model can be made from its configuration: RuntimeError"):
        why_unsuitable_ahead(config, role)
    check_ahead(config, role)


def test_a_size_of_unknown_name_leaves_a_model_untried(tmp_path, monkeypatch, nothing_is_small):
    config = save_toy(tmp_path, "llama")
    monkeypatch.setattr(toy, "_MOST_PARAMETERS", 100)
    with pytest.raises(Untried, match=r"ValueError: [\d,]+ parameters are not small"):
        why_unsuitable_ahead(config, "base")
