"""Layers that liger-kernel computes, against the naive float64 computation of test_step.py.

Its kernels are Triton's: without a GPU test_interpreter.py runs this file again.
"""

import copy
import importlib
import json
import multiprocessing
import os

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, complete, runs_triton
from kept import Kept
from launch import ROOT, free_port
from softcot_kernels import reference
from test_step import TOLERANCES, check, draw_examples, make_batch, make_model, make_projection, true_loss_and_gradient
from torch.utils.flop_counter import FlopCounterMode
from toy_models import make_config, make_toy
from transformers.models.llama import modeling_llama

from softcot_ds.distributed import device, from_all_ranks, init_distributed, shut_down
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.models import fused_layers, toy
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.fused_layers import fuse_layers
from softcot_ds.models.partition import hook_partitioned, plain_config
from softcot_ds.models.toy import said
from softcot_ds.recipe import ModelConfig

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed; it comes with softcot-ds[test]")

if INTERPRETED:
    complete()


@pytest.fixture(autouse=True, scope="module")
def _on_this_device():
    with pytest.MonkeyPatch.context() as patch:
        for module in (fused_layers, toy):
            patch.setattr(module, "device", lambda: DEVICE)
        yield


@pytest.fixture(scope="module")
def llamas():
    """A model, the same with the kernels, and what has been said of them."""
    model = make_model("llama").to(DEVICE)
    fused = copy.deepcopy(model)
    return model, fused, fuse_layers(fused)


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="here they run")
def test_nothing_is_done_where_they_do_not_run():
    model = make_model("llama")
    assert fuse_layers(model) is None
    assert not any("forward" in vars(module) for module in model.modules())


@runs_triton
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_loss_and_gradient_match_examples_run_alone(family, llamas):
    examples = draw_examples([(2, 1, 1), (1, 0, 1)], thoughts=1, shared=1)
    if family == "llama":
        model, fused, line = llamas
        fused, parts = copy.deepcopy(fused), "3 SwiGLUs, 7 norms, 3 rotary embeddings"
    else:  # norms with an offset, and GELU
        model = make_model(family).to(DEVICE)
        fused, parts = copy.deepcopy(model), "7 norms, 3 rotary embeddings"
        line = fuse_layers(fused)
    assert line == f"liger-kernel computes {parts} of the base"
    truth = true_loss_and_gradient(model.cpu(), make_projection(), examples)
    step = SoftThoughts(fused, make_projection(), None, "fast", family == "llama", examples[0][0][:1]).to(DEVICE)
    batch = make_batch(examples, torch.float32, num_shared=1).to(DEVICE)
    with FlopCounterMode(display=False) as counter:  # which follows gradients through the modules, and may stumble
        loss = step(batch) / sum(len(target) for *_, target in examples)
        loss.backward()
    assert counter.get_total_flops() > 0
    gradient = torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad]).cpu()
    check((loss.item(), gradient), truth, *TOLERANCES[torch.float32])
    assert all(parameter.grad is None for parameter in step.base.parameters())


@runs_triton
def test_one_model_is_changed_and_no_other(llamas):
    _, fused, _ = llamas
    other = make_model("llama").to(DEVICE)
    embeds = torch.randn(1, 3, 16, device=DEVICE)
    logits = [either(inputs_embeds=embeds, use_cache=False).logits for either in (other, fused)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*logits), "another order of sums: it is another kernel"
    for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "apply_rotary_pos_emb"):
        part = getattr(modeling_llama, name)
        assert getattr(part, "forward", part).__module__ == modeling_llama.__name__
        assert getattr(part, "forward", part).__globals__["apply_rotary_pos_emb"].__module__ == modeling_llama.__name__


@runs_triton
def test_less_is_kept_for_the_backward_pass(llamas):
    tokens, layers, width, inner = 4, 3, 16, 24
    embeds = torch.randn(1, tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    held = []
    for either in llamas[:2]:
        either = copy.deepcopy(either).to(DEVICE, torch.bfloat16)
        with Kept() as kept:
            logits = either(inputs_embeds=embeds, use_cache=False).logits
        held.append(kept.bytes(either))
        del logits
    # A norm keeps what it reads, not that in float32; a SwiGLU what it multiplies, not what comes between.
    assert held[0] - held[1] >= 2 * tokens * layers * (2 * width + inner)


@runs_triton
def test_the_same_is_generated_token_by_token(llamas):
    ids = torch.tensor([[7, 3]], device=DEVICE)
    written = [
        either.to(DEVICE).generate(
            ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for either in llamas[:2]
    ]
    assert torch.equal(*(output.sequences for output in written))
    torch.testing.assert_close(*(torch.stack(output.logits) for output in written), rtol=1e-4, atol=1e-5)


@runs_triton
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("opt", "no norm, rotary embedding or SwiGLU of opt is one of its kind"),
        ("llama", "a small llama with its kernels computes something else"),
    ],
)
def test_a_model_that_they_do_not_fit_is_left_as_it_is_with_the_reason(family, reason, monkeypatch):
    model = make_toy(family).to(DEVICE)
    monkeypatch.setattr(fused_layers, "_closest", lambda *_: None)
    if family == "llama":  # as where the rotation is another than the kernel's, and norms too
        wrong = ("norm", lambda norm, x: x * norm.weight)
        monkeypatch.setattr(fused_layers, "_closest", lambda module, _: wrong if "Norm" in str(type(module)) else None)
    assert fuse_layers(model) == f"liger-kernel computes no layers of the base: {reason}"
    assert not any("forward" in vars(module) for module in model.modules())


@runs_triton
def test_rotations_that_the_kernel_does_not_know_keep_their_own():
    model = make_toy("cohere").to(DEVICE)  # its pairs are neighbours
    expected = said(model)
    assert fuse_layers(model) == "liger-kernel computes 3 SwiGLUs of the base"
    assert toy.says_the_same(said(model), expected)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the benchmark itself is run")
def test_the_benchmark_of_the_step_counts_and_times_it_with_the_kernels_and_without(tmp_path, monkeypatch):
    """It stumbled on a GPU three times: here all of it is run, a few tokens long."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("train_step")
    for name in ("thought_embedding", "weight_grads"):  # what takes the kernels' place on a CPU
        monkeypatch.delattr(reference, name)
    lengths = {"shared_prefix": 1, "prefix": [3, 4], "suffix": [1, 1], "target": [2, 1], "assistant": [4, 5]}
    (tmp_path / "lengths.json").write_text(json.dumps(lengths))
    short = {"LENGTHS": tmp_path / "lengths.json", "NUM_THOUGHTS": 2, "SIZES": (2,)}
    for name, value in (short | {"MICRO_BATCH": 1, "GLOBAL_BATCH": 2, "NUM_BATCHES": 1}).items():
        monkeypatch.setattr(benchmark, name, value)
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    models = tuple(benchmark.make_llama(tiny | {"vocab_size": 96}, DEVICE) for _ in range(2))

    runs, names = {}, ("fast", "full", benchmark.LIGER)
    variants = benchmark.make_variants(models, names)
    sizes = benchmark.make_sizes(models)
    for variant in (*variants.values(), *sizes.values()):
        variant.count()
    for _ in benchmark.measure(variants, DEVICE, 1, benchmark.Budget(None), runs):
        found = benchmark.summarize(variants, runs, peak=1e12)
    assert found["mfu"].keys() == set(names)
    assert all(0 < value < 1 for value in found["mfu"].values())
    fast, full, fused = (variants[name].gradient for name in names)
    assert (full - fast).norm() < 1e-5 * fast.norm()
    assert 0 < (fused - fast).norm() < 1e-5 * fast.norm()
    assert len(benchmark.steps(variants, runs)) == len(names)
    ingredients = benchmark.make_variants(models, benchmark.INGREDIENTS)
    del ingredients["prefix_for_nothing"]  # other examples
    for name, variant in ingredients.items():
        variant.count()
        assert (variant.gradient - fast).norm() < 1e-5 * fast.norm(), name


def on_two_ranks(rank: int, port: str, folder: str, answers) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    init_distributed(5)
    fused_layers._why_not = lambda *_: None  # each takes its seconds
    found = {}
    for partition, bits in (("zero3", 8), ("tensor", 16)):
        settings = plain_config("float32")
        model = load_frozen(ModelConfig(model=folder, dtype="float32"), partition, device(), settings, None, bits)
        line = fuse_layers(model)
        if partition == "zero3":
            hook_partitioned(model, settings)
        found[partition] = line, [tensor.numpy() for tensor in said(model)]
    if rank == 0:
        answers.put(found)
    from_all_ranks(None)
    shut_down()


@pytest.mark.distributed
@pytest.mark.skipif(not INTERPRETED, reason="two ranks on CPUs")
def test_ranks_that_hold_parts_of_a_model_compute_the_same(tmp_path):
    shape = {"intermediate_size": 128, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    toy.make_toy(toy.toy_config(make_config("qwen3"), 2, **shape)).save_pretrained(tmp_path)
    config = ModelConfig(model=str(tmp_path), dtype="float32")
    whole = {bits: said(load_frozen(config, "none", DEVICE, bits=bits)) for bits in (8, 16)}
    fork, port = multiprocessing.get_context("fork"), free_port()
    answers = fork.Queue()
    ranks = [fork.Process(target=on_two_ranks, args=(rank, port, str(tmp_path), answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = answers.get(timeout=120)
    for process in ranks:
        process.join()
    # In slices, the norms of queries and keys stay as transformers has them there.
    for partition, bits, norms in (("zero3", 8, 5), ("tensor", 16, 3)):
        line, values = found[partition]
        assert line == f"liger-kernel computes 1 SwiGLU, {norms} norms, 1 rotary embedding of the base"
        for value, truth in zip(values, whole[bits], strict=True):
            assert (torch.tensor(value) - truth).norm() < 5e-6 * truth.norm(), partition
