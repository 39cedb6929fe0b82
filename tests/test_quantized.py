"""Frozen layers in 8 and 4 bits: what is held, and what is computed with it."""

import copy
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from kept import Kept
from launch import ROOT
from toy_models import make_toy
from transformers import LlamaConfig, LlamaForCausalLM

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.jobs import Worker
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.quantized import FewBits, _bitsandbytes, pack, unpack
from softcot_ds.recipe import ModelConfig, load_recipe
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"


FOUR = pytest.param(
    4,
    marks=pytest.mark.skipif(
        find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed; it comes with softcot-ds[test]"
    ),
)
# QLoRA, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def in_few_bits(weight: np.ndarray, bits: int) -> np.ndarray:
    """What few bits make of a matrix in float32, every 64 weights for themselves.

    8: 256 levels from their smallest to their largest. 4: of their largest absolute value the nearest part in ``NF4``.
    """
    groups = weight.reshape(-1, 64).astype(np.float64)
    if bits == 4:
        largest = np.abs(groups).max(axis=1, keepdims=True)
        parts = groups / np.where(largest == 0, 1, largest)
        return (largest * np.array(NF4)[np.abs(parts[:, :, None] - NF4).argmin(axis=2)]).reshape(weight.shape)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    step = (high - low) / 255
    return (low + np.round((groups - low) / np.where(step == 0, 1, step)) * step).reshape(weight.shape)


@pytest.mark.parametrize("bits", [8, FOUR])
def test_packed_weights_are_those_of_the_levels(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 192, generator=generator) * torch.logspace(-6, 3, 48)[:, None]
    weight[3] = 0.0
    weight[4] = 0.7
    packed = pack(weight, bits)
    assert packed.nbytes == 48 * 192 * bits // 8 + 48 * 192 // 64 * {8: 2, 4: 1}[bits] * 4
    found, truth = unpack(packed, weight.shape, bits).double().numpy(), in_few_bits(weight.numpy(), bits)
    largest = np.abs(truth).max(axis=1, keepdims=True)
    assert (np.abs(found - truth) <= 1e-6 * largest).all()
    assert np.array_equal(found[3:5], weight[3:5].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = pack(weight, 8)
    assert packed.dtype == dtype
    groups = weight.double().view(-1, 64)
    step = (groups.amax(dim=1) - groups.amin(dim=1)) / 255
    error = (unpack(packed, weight.shape, 8).double() - weight.double()).view(-1, 64).abs()
    rounding = groups.abs().amax(dim=1) * torch.finfo(dtype).eps  # of the stored step, over 255 of them, and the value
    assert (error <= (step / 2 + rounding)[:, None]).all()


@pytest.mark.parametrize("bits", [FOUR])
def test_scales_of_4_bits_are_rounded_to_the_models_dtype(bits):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = unpack(pack(weight, bits), weight.shape, bits)
    assert found.dtype == torch.bfloat16
    truth = in_few_bits(weight.float().numpy(), bits)
    assert (np.abs(found.double().numpy() - truth) <= 2**-8 * np.abs(truth)).all()  # a scale of one is exact: its own


def packed_toy(bits):
    """A toy, the same in few bits, and the same with the values of those bits as ordinary weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval().requires_grad_(False)
    held, truth = copy.deepcopy(whole), copy.deepcopy(whole)
    layers = FewBits(bits, whole.config.vocab_size)
    layers.quantize(held, torch.device("cpu"))
    for module in truth.modules():
        if layers.holds(module):
            module.weight.data = torch.from_numpy(in_few_bits(module.weight.detach().numpy(), bits)).float()
    return whole, held, truth


@pytest.mark.parametrize("bits", [8, FOUR])
def test_gradient_is_that_of_the_rounded_weights_of_which_none_is_kept(bits):
    whole, held, truth = packed_toy(bits)
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


@pytest.mark.parametrize(
    ("bits", "part"), [(8, (8 + 32 / 64) / 16), pytest.param(4, (4 + 16 / 64) / 16, marks=FOUR.marks)]
)
def test_layers_of_a_base_shrink_and_its_head_and_table_do_not(bits, part):
    config = ModelConfig(model=str(resolve_location("package:pair/base")), dtype="bfloat16")
    whole = load_frozen(config, "none", torch.device("cpu"))
    held = load_frozen(config, "none", torch.device("cpu"), bits=bits)
    shrunk = {
        name: parameter.nbytes / whole.get_parameter(name).nbytes
        for name, parameter in held.named_parameters()
        if parameter.nbytes != whole.get_parameter(name).nbytes
    }
    projections = {name for name, module in whole.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removeprefix("model.").removesuffix(".weight") for name in shrunk} == projections
    assert set(shrunk.values()) == {part}


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])  # Conv1D; experts in one tensor
def test_a_model_of_which_little_would_shrink_is_refused(family):
    model = make_toy(family)
    with pytest.raises(SoftCoTError, match=r"would hold \d+% of the weights of this one .*backbone.bits=16"):
        FewBits(8, model.config.vocab_size).check(model, "this one", torch.device("cpu"))


def test_4_bits_without_their_library_say_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks what cannot be imported
    _bitsandbytes.cache_clear()
    config = ModelConfig(model=str(resolve_location("package:pair/base")))
    with pytest.raises(SoftCoTError, match=r"bits=4 needs bitsandbytes, .*pip install 'bitsandbytes.*backbone.bits=8"):
        load_frozen(config, "none", torch.device("cpu"), bits=4)


def test_bits_that_cannot_be_are_told():
    with pytest.raises(SoftCoTError, match=r"backbone.bits: .*16, 8 or 4, found 12"):
        load_recipe(RECIPE, ["backbone.bits=12"])


def test_outputs_of_another_number_of_bits_are_others(tmp_path):
    keys = set()
    for bits in (16, 8, 4):
        recipe = load_recipe(RECIPE, [f"output_dir={tmp_path}", f"backbone.bits={bits}"])
        for model in (recipe.base, recipe.assistant):
            settings = Worker(recipe, model, "weights")._settings([], None)
            keys.add((model is recipe.base, str(settings["quantized"])))
    assert keys == {(True, "{}"), (True, "{'bits': 8}"), (True, "{'bits': 4}"), (False, "{}")}
