"""Frozen layers in 8 bits: what is held, and what is computed with it."""

import copy

import numpy as np
import pytest
import torch
from kept import Kept
from launch import ROOT
from toy_models import make_toy
from transformers import LlamaConfig, LlamaForCausalLM

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.decoder import Decoder
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.decoding import Sampling
from softcot_ds.models.quantized import can_quantize, check_bits, pack, quantize, unpack
from softcot_ds.recipe import ModelConfig, load_recipe
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"


def in_8_bits(weight: np.ndarray) -> np.ndarray:
    """What 8 bits make of a matrix in float32: every 64 weights in 256 levels from their smallest to their largest."""
    groups = weight.reshape(-1, 64).astype(np.float64)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    step = (high - low) / 255
    return (low + np.round((groups - low) / np.where(step == 0, 1, step)) * step).reshape(weight.shape)


def test_packed_weights_are_those_of_256_levels():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 192, generator=generator) * torch.logspace(-6, 3, 48)[:, None]
    weight[3] = 0.0
    weight[4] = 0.7
    packed = pack(weight)
    assert packed.nbytes == 48 * 192 + 48 * 192 // 64 * 2 * 4
    found, truth = unpack(packed, weight.shape).double().numpy(), in_8_bits(weight.numpy())
    largest = np.abs(truth).max(axis=1, keepdims=True)
    assert (np.abs(found - truth) <= 1e-6 * largest).all()
    assert np.array_equal(found[3:5], weight[3:5].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = pack(weight)
    assert packed.dtype == dtype
    groups = weight.double().view(-1, 64)
    step = (groups.amax(dim=1) - groups.amin(dim=1)) / 255
    error = (unpack(packed, weight.shape).double() - weight.double()).view(-1, 64).abs()
    rounding = groups.abs().amax(dim=1) * torch.finfo(dtype).eps  # of the stored step, over 255 of them, and the value
    assert (error <= (step / 2 + rounding)[:, None]).all()


def packed_toy():
    """A toy, the same in 8 bits, and the same with the values of those 8 bits as ordinary weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval().requires_grad_(False)
    held, truth = copy.deepcopy(whole), copy.deepcopy(whole)
    wanted = lambda module: can_quantize(module, whole.config.vocab_size)  # noqa: E731
    quantize(held, wanted, torch.device("cpu"))
    for module in truth.modules():
        if wanted(module):
            module.weight.data = torch.from_numpy(in_8_bits(module.weight.detach().numpy())).float()
    return whole, held, truth


def test_gradient_is_that_of_the_rounded_weights_of_which_none_is_kept():
    whole, held, truth = packed_toy()
    embeds = torch.randn(2, 10, 64, requires_grad=True)
    outputs, gradients, kept = [], [], []
    for model in (whole, held, truth):
        with Kept() as values:
            logits = model(inputs_embeds=embeds, use_cache=False).logits
        kept.append(values.bytes(model))
        outputs.append(logits.detach())
        gradients.append(torch.autograd.grad(logits.square().sum(), [embeds])[0])
    for of_whole, found, expected in (outputs, gradients):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
        assert not torch.allclose(found, of_whole, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert kept[1] == kept[0]


def test_layers_of_a_base_shrink_and_its_head_and_table_do_not():
    config = ModelConfig(model=str(resolve_location("package:pair/base")), dtype="bfloat16")
    whole = load_frozen(config, "none", torch.device("cpu"))
    held = load_frozen(config, "none", torch.device("cpu"), bits=8)
    shrunk = {
        name: parameter.nbytes / whole.get_parameter(name).nbytes
        for name, parameter in held.named_parameters()
        if parameter.nbytes != whole.get_parameter(name).nbytes
    }
    projections = {name for name, module in whole.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removeprefix("model.").removesuffix(".weight") for name in shrunk} == projections
    assert set(shrunk.values()) == {(8 + 32 / 64) / 16}


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])  # Conv1D; experts in one tensor
def test_a_model_of_which_little_would_shrink_is_refused(family):
    model = make_toy(family)
    with pytest.raises(SoftCoTError, match=r"would hold \d+% of the weights of this one in 8 bits.*backbone.bits=16"):
        check_bits(model, lambda module: can_quantize(module, model.config.vocab_size), "this one")


@pytest.mark.parametrize(
    ("override", "wrong"),
    [
        ("backbone.bits=4", "4 would be bitsandbytes', whose layers"),
        ("backbone.bits=12", "16 or 8, found 12"),
    ],
)
def test_bits_that_cannot_be_are_told_why(override, wrong):
    with pytest.raises(SoftCoTError, match=rf"backbone.bits: .*{wrong}"):
        load_recipe(RECIPE, [override])


def test_bits_go_with_the_partition_of_an_evaluation():
    with pytest.raises(
        SoftCoTError, match=r"evaluation: partition: 8 bits go with the partitions none, zero3 and node"
    ):
        load_recipe(RECIPE, ["backbone.bits=8", "evaluation.partition=tensor"])


def test_outputs_of_another_number_of_bits_are_others(tmp_path):
    keys = set()
    for bits in (16, 8):
        recipe = load_recipe(RECIPE, [f"output_dir={tmp_path}", f"backbone.bits={bits}"])
        for model in (recipe.base, recipe.assistant):
            settings = Decoder(recipe, model, "weights", [2], 512)._settings([], None, Sampling(1), 0)
            keys.add((model is recipe.base, str(settings["quantized"])))
    assert keys == {(True, "{}"), (True, "{'bits': 8}"), (False, "{}")}
