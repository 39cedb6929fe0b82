"""The fused op against float64, on whatever runs it here: a GPU, else eager PyTorch; and always Triton's interpreter.

For the interpreter, test_interpreter.py runs this file again.
"""

import importlib
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETED
from softcot_kernels import reference, thought_embedding
from triton.backends.compiler import GPUTarget

module = importlib.import_module("softcot_kernels.thought_embedding")  # the package exports a function of that name

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIFFERENTIABLE = ("hidden", "weight", "bias")
TUNERS = {"forward": "_FORWARD", "weight_grad": "_WEIGHT_GRAD", "hidden_grad": "_HIDDEN_GRAD"}
CONFIGS = {name: {size: tuner.configs for size, tuner in getattr(module, TUNERS[name]).items()} for name in TUNERS}

compiled_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the interpreter")


def needs_gpu(test):
    return pytest.mark.gpu(
        pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device; none is visible")(test)
    )


@pytest.fixture(scope="module", autouse=True)
def _no_tuning():
    """On a GPU every new shape would be tuned, for minutes in all; one test below takes the configurations in turn."""
    tuners = [(tuner, CONFIGS[name][size]) for name in TUNERS for size, tuner in getattr(module, TUNERS[name]).items()]
    for tuner, configs in tuners:
        tuner.configs = configs[:1]
    yield
    for tuner, configs in tuners:
        tuner.configs = configs


def make_inputs(B, T, P, D, S, V=23, hidden=FP32, weight=None, table=None, slot=True, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return {
        "hidden": normal(B, T, P, dtype=hidden).requires_grad_(),
        "weight": normal(D, P, dtype=weight or hidden).requires_grad_(),
        "bias": normal(D, dtype=weight or hidden).requires_grad_() if bias else None,
        "token_ids": torch.randint(V, (B, S), generator=generator).to(DEVICE),
        "table": normal(V, D, dtype=table or hidden),
        "slot": torch.randint(S + 1, (B,), generator=generator).to(DEVICE) if slot else None,
    }


def zeros(*shape, **options):
    return torch.zeros(*shape, **{"device": DEVICE} | options)


def run(op, inputs, grad=None, dtype=None, **options):
    """Output and gradients of `op` on fresh leaves, by name; `dtype` casts every floating-point input first."""
    inputs = {
        name: x.detach().to(dtype or x.dtype) if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    leaves = {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE if inputs[name] is not None}
    out = op(**inputs, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out) if grad is None else grad.to(out)
    out.backward(grad)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}, grad


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as_eager(inputs):
    got, grad = run(thought_embedding, inputs)
    eager, _ = run(reference.thought_embedding, inputs, grad)
    truth, _ = run(reference.thought_embedding, inputs, grad, dtype=torch.float64)
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        assert value.shape == truth[name].shape, name
        error, eager_error = (relative_error(x[name], truth[name]) for x in (got, eager))
        assert error <= 2 * eager_error + 1e-6, f"{name}: {error:.2e}, eager {eager_error:.2e}"


SHAPES = [  # B, T, P, D, S, and whether the thoughts stand at slots or first
    (2, 5, 33, 57, 11, True),
    (2, 5, 33, 57, 11, False),
    (3, 16, 64, 48, 21, True),
    (1, 1, 1, 1, 1, False),
    (2, 3, 70, 20, 5, True),
    (2, 40, 17, 31, 3, False),
    (2, 3, 16, 16, 0, True),
    (2, 0, 16, 16, 7, True),
]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient_match_float64(shape, dtype):
    *sizes, slot = shape
    assert_as_good_as_eager(make_inputs(*sizes, hidden=dtype, slot=slot))


@pytest.mark.parametrize(
    ("hidden", "weight", "table"),
    [(BF16, FP32, BF16), (BF16, FP32, FP32), (FP32, BF16, BF16), (FP16, FP32, FP16), (BF16, FP16, FP32)],
    ids=str,
)
def test_mixed_dtypes_match_float64(hidden, weight, table):
    inputs = make_inputs(2, 5, 33, 57, 11, hidden=hidden, weight=weight, table=table, bias=weight is FP32)
    assert_as_good_as_eager(inputs)


def test_gradient_of_a_float32_weight_is_not_rounded_to_the_dtype_of_the_product():
    inputs = make_inputs(2, 5, 33, 57, 11, hidden=BF16, weight=FP32, table=BF16)
    got, grad = run(thought_embedding, inputs)
    truth, _ = run(reference.thought_embedding, inputs, grad, dtype=torch.float64)
    assert relative_error(got["weight"], truth["weight"]) < 1e-6
    assert relative_error(got["bias"], truth["bias"]) < 1e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in [(0, 3), (0, 9), (0, 40), (0, 40), (0, 9)])),
    dtype=st.sampled_from([FP32, FP16, BF16]),
    ids_dtype=st.sampled_from([torch.int64, torch.int32]),
    slot=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shape, dtype, ids_dtype, slot, bias, seed):
    inputs = make_inputs(*shape, hidden=dtype, slot=slot, bias=bias, seed=seed)
    inputs |= {name: inputs[name].to(ids_dtype) for name in ("token_ids", "slot") if inputs[name] is not None}
    assert_as_good_as_eager(inputs)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("embed_scale", [1.0, 61.96773353931867])
def test_token_rows_are_exact_and_thoughts_are_not_scaled(dtype, embed_scale):
    inputs = make_inputs(3, 2, 8, 40, 6, hidden=dtype)
    inputs["slot"] = torch.tensor([0, 4, 6], device=DEVICE)
    out = thought_embedding(**inputs, embed_scale=embed_scale)
    scale = torch.tensor(embed_scale).to(DEVICE, dtype)
    plain = thought_embedding(**inputs)
    for b, slot in enumerate([0, 4, 6]):
        tokens = inputs["table"][inputs["token_ids"][b]] * scale
        assert torch.equal(torch.cat([out[b, :slot], out[b, slot + 2 :]]), tokens)
        assert torch.equal(out[b, slot : slot + 2], plain[b, slot : slot + 2])


@compiled_only
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_scaled_tokens_equal_those_of_gemma(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    embedding = Gemma3TextScaledWordEmbedding(23, 40, 0, embed_scale=3840**0.5).to(DEVICE, dtype).requires_grad_(False)
    inputs = make_inputs(2, 1, 8, 40, 6, hidden=dtype, slot=False) | {"table": embedding.weight}
    out = thought_embedding(**inputs, embed_scale=3840**0.5)
    assert torch.equal(out[:, 1:], embedding(inputs["token_ids"]))


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ()], ids=str)
def test_gradients_arrive_only_where_they_are_asked_for(wanted):
    inputs = make_inputs(2, 3, 8, 9, 4)
    for name in DIFFERENTIABLE:
        inputs[name].requires_grad_(name in wanted)
    out = thought_embedding(**inputs)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.square().sum().backward()
    assert tuple(name for name, x in inputs.items() if x.grad is not None) == wanted


def test_the_same_inputs_give_the_same_bits():
    inputs = make_inputs(3, 16, 64, 48, 21, hidden=BF16)
    first, grad = run(thought_embedding, inputs)
    second, _ = run(thought_embedding, inputs, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_do_not_change_the_result():
    inputs = make_inputs(2, 5, 24, 40, 11)
    expected, grad = run(thought_embedding, inputs)

    def spread(x):
        """The same values with gaps between them and the last two dimensions stored the other way round."""
        wide = torch.empty([2 * n for n in x.mT.shape] if x.dim() > 1 else [2 * len(x)], dtype=x.dtype, device=DEVICE)
        view = wide[tuple(slice(None, None, 2) for _ in range(x.dim()))]
        return (view.mT if x.dim() > 1 else view).copy_(x)

    spread_inputs = {name: spread(x.detach()) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in spread_inputs.values())
    leaves = {name: spread_inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    out = thought_embedding(**spread_inputs)
    torch.testing.assert_close(out.detach(), expected["out"])
    out.backward(spread(grad))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name])


def test_a_broadcast_gradient_is_read_in_place():
    inputs = make_inputs(2, 5, 24, 40, 11)
    thought_embedding(**inputs).sum().backward()  # the gradient of a sum has strides of zero
    torch.testing.assert_close(inputs["bias"].grad, torch.full((40,), 10.0, device=DEVICE))


def test_an_empty_batch_has_an_empty_result_and_zero_gradients():
    inputs = make_inputs(0, 5, 24, 40, 11)
    out = thought_embedding(**inputs)
    assert out.shape == (0, 16, 40)
    out.sum().backward()
    assert not inputs["weight"].grad.any()
    assert not inputs["bias"].grad.any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", -1, r"token_ids holds -1, outside 0..22"),
        ("token_ids", 23, r"token_ids holds 23, outside 0..22"),
        ("slot", -1, r"slot holds -1, outside 0..4"),
        ("slot", 5, r"slot holds 5, outside 0..4"),
    ],
)
def test_an_index_out_of_range_is_refused(name, value, message):
    inputs = make_inputs(2, 3, 8, 9, 4)
    inputs[name].view(-1)[-1] = value
    with pytest.raises(IndexError, match=message):
        thought_embedding(**inputs)


def test_the_check_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(module, "_check_range", lambda *_: pytest.fail("checked"))
    thought_embedding(**make_inputs(2, 3, 8, 9, 4), check_ids=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": zeros(3, 8)}, r"hidden has shape \(3, 8\), but needs 3 dimensions"),
        ({"table": zeros(0)}, r"table has shape \(0,\).*ZeRO-3"),
        ({"hidden": zeros(2, 3, 7)}, r"must be Linear\(7, 9\)"),
        ({"table": zeros(23, 10)}, r"must be Linear\(8, 10\)"),
        ({"bias": zeros(8)}, r"bias has 8 elements and weight 9 rows"),
        (
            {"token_ids": zeros(3, 4, dtype=torch.int64)},
            r"batch sizes differ: hidden 2, token_ids 3, slot 2",
        ),
        (
            {"slot": zeros(1, dtype=torch.int64)},
            r"batch sizes differ: hidden 2, token_ids 2, slot 1",
        ),
        ({"token_ids": zeros(2, 4)}, r"token_ids is torch.float32; make it torch.int64"),
        (
            {"weight": zeros(9, 8, dtype=torch.int64)},
            r"weight is torch.int64; make it torch.bfloat16",
        ),
        ({"weight": zeros(9, 8, device="meta")}, r"weight is on meta and table on"),
        (
            {"table": zeros(23, 9, requires_grad=True)},
            r"freeze it with table.requires_grad_\(False\)",
        ),
        ({"hidden": zeros(2, 1, 8).expand(2, 2**30, 8)}, r"would have 2147483656 rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        thought_embedding(**make_inputs(2, 3, 8, 9, 4) | changes)


@pytest.mark.slow
def test_the_operators_are_registered_correctly():
    inputs = make_inputs(2, 3, 8, 9, 4)
    hidden, weight, bias, token_ids, table, slot = inputs.values()
    out = thought_embedding(**inputs)
    torch.library.opcheck(module._thought_embedding, (hidden, weight, bias, token_ids, table, slot, 2.0, True))
    torch.library.opcheck(module._thought_embedding, (hidden, weight, None, token_ids, table, None, 1.0, False))
    grad = torch.randn_like(out)
    torch.library.opcheck(module._weight_grads, (grad, hidden.detach(), slot, FP32, FP32))
    torch.library.opcheck(module._weight_grads, (grad, hidden.detach(), None, FP32, None))
    torch.library.opcheck(module._hidden_grad, (grad, weight.detach(), slot, 3, FP32))


@pytest.mark.slow
def test_torch_compile_keeps_one_graph_over_changing_lengths():
    compiled = torch.compile(thought_embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    for S in (4, 7):
        inputs = make_inputs(2, 3, 8, 9, S)
        expected, grad = run(thought_embedding, inputs)
        got, _ = run(compiled, inputs, grad)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name])


# Compilation to machine code, through the op's own launches, for chips that need not be here.

TARGETS = {  # and the shared memory, in bytes, that one block may have there
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


def stand_in_driver(target):
    """A driver of a GPU that is not here: kernels compile for `target` and load, and a launch does nothing."""
    device = str(target)
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 2**20},
        load_binary=lambda *_: (None, None, 0, 0, 1024),
        unload_module=lambda _: None,
    )
    return SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: target,
        launcher_cls=lambda *_: lambda *_: None,
        utils=utils,
    )


def compile_launches(monkeypatch, target, inputs, every_configuration, **options):
    """Kernels that a forward and a backward pass would launch on `target`: (name, configuration, compiled kernel)."""
    kernels = []

    class Compile:
        def __init__(self, name, size, tuner):
            configs = CONFIGS[name][size]
            self.name, self.kernel, self.configs = name, tuner.fn, configs if every_configuration else configs[:1]

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                for config in self.configs:
                    kernel = self.kernel.warmup(*args, grid=grid, **kwargs, **config.all_kwargs())
                    kernels.append((self.name, config, kernel))

            return launch

    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in_driver(target))
    monkeypatch.setattr(module, "_uses_triton", lambda _: True)
    for name, table in TUNERS.items():
        tuners = getattr(module, table)
        monkeypatch.setattr(module, table, {size: Compile(name, size, tuner) for size, tuner in tuners.items()})
    out = thought_embedding(**inputs, check_ids=False, **options)
    out.backward(torch.zeros_like(out))
    assert {name for name, _, _ in kernels} == set(TUNERS)
    return kernels


def spilled_bytes(kernel, tmp_path):
    """Register spills, as the compiler reports them: ptxas puts them on the stack, LLVM counts registers."""
    if kernel.metadata.target.backend == "hip":
        return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"]))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def assert_fits(kernels, target, shared_limit, tmp_path):
    for name, config, kernel in kernels:
        assert kernel.metadata.target == target
        assert kernel.metadata.shared <= shared_limit, f"{name} {config}: {kernel.metadata.shared} bytes shared"
        assert spilled_bytes(kernel, tmp_path) == 0, f"{name} {config} spills registers"


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("chip", TARGETS)
def test_kernels_compile_without_spills_and_fit_in_shared_memory(monkeypatch, tmp_path, chip):
    target, shared_limit = TARGETS[chip]
    inputs = make_inputs(2, 8, 256, 512, 16, hidden=BF16)
    # Every configuration for the chip that the lists are made for; on the others the first, to keep the test short.
    kernels = compile_launches(monkeypatch, target, inputs, every_configuration=chip == "sm_90")
    assert_fits(kernels, target, shared_limit, tmp_path)


@compiled_only
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 8, 256, 512, 16), {"hidden": FP32}),
        ((2, 8, 256, 512, 16), {"hidden": BF16, "weight": FP32, "table": BF16}),
        ((1, 1, 1, 1, 1), {"hidden": FP16, "slot": False, "bias": False}),
    ],
    ids=["float32", "float32-weight", "ones"],
)
def test_other_launches_compile_too(monkeypatch, tmp_path, shape, options):
    target, shared_limit = TARGETS["sm_90"]
    inputs = make_inputs(*shape, **options)
    kernels = compile_launches(monkeypatch, target, inputs, every_configuration=False, embed_scale=2.0)
    assert_fits(kernels, target, shared_limit, tmp_path)


@compiled_only
def test_tuning_happens_once_per_size_class(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in_driver(TARGETS["sm_90"][0]))
    monkeypatch.setattr(module, "_uses_triton", lambda _: True)
    tuner, timed = module._FORWARD[2], []

    def bench(launch, quantiles):
        timed.append(launch())
        return [1.0, 1.0, 1.0]

    fresh = {"configs": CONFIGS["forward"][2][:2], "cache": {}, "cache_results": False, "do_bench": bench}
    for name, value in fresh.items():
        monkeypatch.setattr(tuner, name, value, raising=False)

    def launch(S):
        thought_embedding(**make_inputs(2, 8, 256, 512, S, hidden=BF16), check_ids=False)
        return len(timed)

    assert launch(S=12) == 2
    assert launch(S=16) == 2, "24 and 32 token rows are one class"
    assert launch(S=17) == 4


# What only a GPU can show.


@needs_gpu
def test_no_host_synchronisation_without_the_check():
    inputs = make_inputs(8, 32, 256, 512, 64, hidden=BF16)
    thought_embedding(**inputs, check_ids=False).sum().backward()  # compiles and tunes, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        thought_embedding(**inputs, check_ids=False).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", TUNERS)
def test_every_configuration_matches_float64(monkeypatch, name, size):
    inputs = make_inputs(4, 33, 250, 520, 70, hidden=BF16 if size == 2 else FP32)
    for config in CONFIGS[name][size]:
        monkeypatch.setattr(getattr(module, TUNERS[name])[size], "configs", [config])
        assert_as_good_as_eager(inputs)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_real_widths_match_float64(dtype):
    assert_as_good_as_eager(make_inputs(8, 32, 2048, 4096, 512, V=1000, hidden=dtype))


@needs_gpu
def test_a_table_of_more_than_two_billion_elements():
    V, D = 2**20 + 3, 2048
    inputs = make_inputs(1, 1, 16, D, 3, slot=False, hidden=BF16)
    inputs["table"] = torch.empty(V, D, device=DEVICE, dtype=BF16)
    inputs["token_ids"] = torch.tensor([[V - 1, 0, V - 2]], device=DEVICE)
    rows = torch.randn(3, D, device=DEVICE, dtype=BF16)
    inputs["table"][inputs["token_ids"][0]] = rows
    assert torch.equal(thought_embedding(**inputs)[0, 1:], rows)


@needs_gpu
def test_inductor_keeps_one_graph():
    inputs = make_inputs(2, 8, 64, 128, 16, hidden=BF16)
    expected, grad = run(thought_embedding, inputs)
    got, _ = run(torch.compile(thought_embedding, fullgraph=True), inputs, grad)
    assert all(torch.equal(got[name], expected[name]) for name in got)
