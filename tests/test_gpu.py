"""What only a GPU can show: step, decoding, cache and training are a CPU's, and what is measured is the GPU's."""

import copy
import gzip
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from launch import ROOT, run
from runs import losses, scalars
from test_decoding import make_model as make_decoding_model
from test_quantized import FOUR
from test_step import TOLERANCES, UNEVEN, check, draw_examples, make_batch, make_model, make_projection
from test_step import true_loss_and_gradient as true_step
from test_thought_embedding import _no_tuning  # noqa: F401, a fixture: nothing is tuned here either
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softcot_ds.data.prompts import AssistantInput, BasePrompt
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.models.assistant import compute_thoughts, read_shared
from softcot_ds.models.decoding import Sampling, decode, try_decoding
from softcot_ds.models.quantized import pack, unpack
from softcot_ds.training.metrics import PhaseTimer, peak_memory_gib
from softcot_ds.values import resolve_location

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
RECIPE = ROOT / "recipes" / "word_problems.yaml"
GPU = torch.device("cuda")
FIRST_GPU = {
    "DS_ACCELERATOR": "cuda",
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
}
NO_GPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

# What takes longest comes first: with several workers (pytest -n 12 --dist worksteal) the rest is done meanwhile.


def test_a_run_on_a_gpu_resumes_and_has_the_losses_of_one_on_the_cpu(tmp_path):
    """Cache, training under ZeRO-3, resumption and evaluation, alone on one GPU; the CPU reads the same cache."""
    common = [
        *(
            "task.train_problems=96",
            "task.validation_problems=6",
            "task.test_problems=8",
            f"cache.path={tmp_path}/cache",
        ),
        *(
            "training.schedule=constant",
            "training.warmup_steps=2",
            # At the rate of the recipe the pair amplifies rounding: an H200 and a CPU were 0.15% apart by step 6.
            "training.learning_rate=1e-5",
            "training.save_every=3",
            "training.validate_every=3",
            "training.log_every=1",
        ),
        "evaluation.conditions=[learned,zero]",
    ]

    def call(module: str, environment: dict[str, str], *overrides: str) -> None:
        run([sys.executable, "-m", f"softcot_ds.{module}", str(RECIPE), *common, *overrides], **environment)

    gpu, cpu = f"output_dir={tmp_path}/gpu", f"output_dir={tmp_path}/cpu"
    call("cache", FIRST_GPU)
    with ThreadPoolExecutor(1) as beside:
        on_cpu = beside.submit(call, "train", NO_GPU, cpu, "training.steps=6")
        call("train", FIRST_GPU, gpu, "training.steps=3", "training.profile_steps=[2,3]")
        call("train", FIRST_GPU, gpu, "training.steps=6")
        call("evaluate", FIRST_GPU, gpu, "training.steps=6")
        on_cpu.result()

    run_dir = tmp_path / "gpu/demo"
    found, expected = losses(run_dir), losses(tmp_path / "cpu/demo")
    assert found.keys() == expected.keys() == set(range(1, 7))
    assert found == pytest.approx(expected, rel=1e-4)
    assert scalars(run_dir, "loss/validation") == pytest.approx(
        scalars(tmp_path / "cpu/demo", "loss/validation"), rel=1e-4
    )
    assert 0 < scalars(run_dir, "memory/peak_gib")[6] < 8
    assert all(scalars(run_dir, f"step_time_ms/{name}")[6] > 0 for name in ("data", "forward", "backward", "optimizer"))
    (trace,) = (run_dir / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert {"forward", "backward"} <= {event["name"] for event in events if event.get("cat") == "user_annotation"}
    report = json.loads((run_dir / "report.json").read_text())
    assert report["conditions"].keys() == {"learned", "zero"}


@pytest.mark.parametrize("partition", ["none", "zero3"])
def test_training_holds_what_it_expects(tmp_path, partition):
    config = AutoConfig.for_model(
        "llama", vocab_size=768, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(resolve_location("package:pair/base")).save_pretrained(tmp_path / "base")
    # What DeepSpeed keeps for gradients on their way is not expected, and as large for a toy as for a real model.
    name = {"none": "replicated", "zero3": "zero3"}[partition]
    settings = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = 100_000
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    overrides = [f"backbone.partition={partition}", f"backbone.deepspeed={tmp_path}/ds.json", "base.dtype=bfloat16"]
    worker = [sys.executable, str(ROOT / "tests/memory_worker.py"), str(RECIPE), f"{tmp_path}/peak"]
    run([*worker, f"base.model={tmp_path}/base", *overrides], **FIRST_GPU)
    measured = json.loads((tmp_path / "peak.0").read_text())
    expected = sum(measured["expected"].values())
    workspaces, tuner = measured["fixed"]["workspaces"], measured["fixed"]["tuner"]
    for stage, peak in measured["peaks"].items():
        fixed = workspaces + tuner if stage == "first_step" else workspaces
        assert peak < 1.5 * expected + fixed, (stage, measured)
    assert expected < measured["peak"], measured


def loss_and_gradient(step: SoftThoughts, examples, dtype) -> tuple[float, torch.Tensor]:
    """On the GPU, from page-locked memory."""
    step = step.to(GPU)
    batch = make_batch(examples, dtype, num_shared=step.num_shared).pin_memory().to(GPU)
    loss = step(batch) / sum(len(target) for *_, target in examples)
    loss.backward()
    return loss.item(), torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad]).cpu()


FAMILIES = ["llama", "qwen3", "mistral with a sliding window", "gemma3"]
STEPS = [("full", 0, {}), ("fast", 0, {}), ("fast", 6, {}), ("fast", 6, {"activation_checkpointing": True})]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_match_examples_run_alone(family):
    model, examples = make_model(family), draw_examples(UNEVEN, thoughts=3, shared=6)
    truth = true_step(model, make_projection(), examples)
    for kind, num_shared, options in STEPS:
        ids = examples[0][0][:num_shared]
        step = SoftThoughts(copy.deepcopy(model), make_projection(), None, kind, shared_ids=ids, **options)
        check(loss_and_gradient(step, examples, torch.float32), truth, *TOLERANCES[torch.float32])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_fast_step_is_as_near_to_the_truth_as_the_full_one(family):
    model, projection = make_model(family).bfloat16(), make_projection().bfloat16()
    lengths = [(9, 3, 5), (30, 2, 14), (1, 0, 1), (12, 0, 27)] * 2
    examples = [(p, h.bfloat16().float(), s, t) for p, h, s, t in draw_examples(lengths, thoughts=3, shared=6)]
    loss, gradient = true_step(model, projection, examples)
    errors = []
    for kind, num_shared, options in STEPS:
        ids = examples[0][0][:num_shared]
        step = SoftThoughts(copy.deepcopy(model), copy.deepcopy(projection), None, kind, shared_ids=ids, **options)
        found = loss_and_gradient(step, examples, torch.bfloat16)
        error = ((found[1].double() - gradient).norm() / gradient.norm()).item()
        errors.append((abs(found[0] - loss) / loss, error))
    (full_loss, full), *fast = errors
    assert full < 0.1, "rounding, not another result"
    for fast_loss, error in fast:
        assert error <= 2 * full, errors
        assert fast_loss <= 2 * full_loss + 1e-3, errors


def test_a_batch_without_prefixes_is_copied_from_page_locked_memory():
    batch = make_batch(draw_examples([(0, 2, 3), (0, 0, 1)], thoughts=2), torch.bfloat16)
    assert batch.prefix_ids.numel() == 0
    pinned = batch.pin_memory()
    assert pinned.thoughts.is_pinned()
    assert pinned.suffix_ids.is_pinned()
    moved = pinned.to(GPU)
    for name, value in vars(batch).items():
        found = getattr(moved, name)
        assert torch.equal(found.cpu(), value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_prompts_are_decoded_as_on_the_cpu(family):
    model = make_decoding_model(family, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = [BasePrompt(list(range(3, 3 + n)), [7] * (n % 3)) for n in (1, 9, 4, 23)]
    thoughts = torch.randn(len(prompts), 3, 16, generator=generator)
    expected = decode(model, prompts, thoughts, [2], Sampling(12))
    on_gpu = copy.deepcopy(model).to(GPU)
    assert try_decoding(on_gpu)
    assert decode(on_gpu, prompts, thoughts.to(GPU), [2], Sampling(12)) == expected
    sampled = decode(on_gpu.bfloat16(), prompts, thoughts.to(GPU), [2], Sampling(12, temperature=1.0, top_p=0.9))
    assert all(0 <= token < 40 for output in sampled for token in output.token_ids)


def test_thoughts_are_those_of_the_cpu():
    model = make_model("llama")
    generator = torch.Generator().manual_seed(0)
    rows = [[5, 6, 7, *torch.randint(3, 48, (n,), generator=generator).tolist(), 9, 9] for n in (1, 12, 5)]
    inputs = [AssistantInput(str(len(row)), row, [len(row) - 2, len(row) - 1]) for row in rows]
    expected = compute_thoughts(model, inputs)
    model = model.to(GPU)
    found = compute_thoughts(model, inputs, read_shared(model, inputs))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, FOUR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_bits_hold_the_weights_that_they_hold_on_the_cpu(bits, dtype):
    weight = torch.randn(256, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = unpack(pack(weight.to(GPU), bits), weight.shape, bits)
    truth = unpack(pack(weight, bits), weight.shape, bits)
    assert found.dtype == dtype
    off = (found.cpu() - truth).abs() > 2 * torch.finfo(dtype).eps * weight.abs().max()
    assert off.float().mean() < 1e-3  # what lies halfway between two levels may go either way


def test_phases_are_timed_where_the_work_is_done():
    timer = PhaseTimer(GPU)
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with timer.phase("work"):
        torch.cuda._sleep(100_000_000)  # cycles: at least 50 ms below 2 GHz
    with timer.phase("nothing"):
        pass
    issued = time.perf_counter() - began
    seconds = timer.read()
    assert seconds["work"] > 0.03
    assert issued < seconds["work"] / 2, "it waits for nothing"
    assert seconds["nothing"] < seconds["work"] / 10
    assert timer.read() == {}


def test_peak_memory_is_the_gpus():
    before = peak_memory_gib(GPU)
    held = torch.empty(int((before + 1) * 2**30), dtype=torch.uint8, device=GPU)
    assert before + 1 <= peak_memory_gib(GPU) < 2 * before + 1.01
    del held
    assert peak_memory_gib(GPU) >= before + 1, "it is the most so far"
