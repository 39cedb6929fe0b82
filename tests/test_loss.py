"""Cross entropy fused with the head, against the naive float64 computation of test_step.py.

liger-kernel's kernels are Triton's: without a GPU test_interpreter.py runs this file again.
"""

import copy

import pytest
import torch
from interpreter import DEVICE, runs_triton
from test_step import (
    FAMILIES,
    TOLERANCES,
    UNEVEN,
    check,
    draw_examples,
    make_batch,
    make_model,
    make_projection,
    true_loss_and_gradient,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import GraniteConfig

from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.models import loss as loss_module
from softcot_ds.models.loss import IGNORE

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed; it comes with softcot-ds[test]")


@runs_triton
@pytest.mark.parametrize(
    ("family", "changes", "fused"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("gemma", {}, True),
        ("gemma3", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("gemma2", {"final_logit_softcapping": 2.0}, False),
        ("gemma3", {"final_logit_softcapping": 2.0}, False),
        ("granite", {"logits_scaling": 4.0}, False),
    ],
)
def test_loss_and_gradient_match_examples_run_alone(family, changes, fused, monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", (GraniteConfig, {}))
    model = make_model(family, **changes)
    examples = draw_examples(UNEVEN, thoughts=3, shared=6)
    truth = true_loss_and_gradient(model, make_projection(), examples)
    step = SoftThoughts(copy.deepcopy(model), make_projection(), shared_ids=examples[0][0][:6]).to(DEVICE)
    batch = make_batch(examples, torch.float32, num_shared=6).to(DEVICE)
    loss = step(batch) / sum(len(target) for *_, target in examples)
    assert step.prefixed.fuses_loss == fused
    loss.backward()
    gradient = torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad]).cpu()
    check((loss.item(), gradient), truth, *TOLERANCES[torch.float32])
    # Between the passes the model works as before: it gives logits.
    ids = torch.tensor([[3, 4, 5]])
    found = step.base(ids.to(DEVICE)).logits.cpu()
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


@runs_triton
@pytest.mark.parametrize("at_a_time", [1, 3, 7, 100])
def test_any_number_of_rows_at_a_time_gives_the_same(at_a_time, monkeypatch):
    torch.manual_seed(0)
    states, weight = torch.randn(13, 8, device=DEVICE), torch.randn(40, 8, device=DEVICE)
    targets = torch.randint(0, 40, (13,), device=DEVICE)
    targets[4] = IGNORE
    truth = states.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(truth @ weight.double().T, targets, reduction="sum")
    (0.3 * expected).backward()
    monkeypatch.setattr(loss_module, "_LOGITS_BYTES", at_a_time * 40 * 4)
    states.requires_grad_()
    loss = loss_module.fused_cross_entropy(states, weight, targets)
    (0.3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (states.grad - truth.grad).norm() < 1e-6 * truth.grad.norm()


@runs_triton
def test_targets_that_count_nothing_give_no_loss():
    examples = draw_examples(UNEVEN, thoughts=3)
    step = SoftThoughts(make_model("llama"), make_projection()).to(DEVICE)
    batch = make_batch(examples, torch.float32).to(DEVICE)
    batch.targets.fill_(IGNORE)
    with torch.no_grad():
        assert step(batch).item() == 0
    assert step.prefixed.fuses_loss


@runs_triton
def test_operations_of_a_step_can_be_counted():
    """PyTorch's counter follows the modules that tensors with a gradient reach, and fails at views made without one."""
    step = SoftThoughts(make_model("llama"), make_projection()).to(DEVICE)
    batch = make_batch(draw_examples(UNEVEN, thoughts=3), torch.float32).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        step(batch).backward()
    assert counter.get_total_flops() > 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU")
def test_logits_never_exist():
    """16,384 supervised tokens and 64,000 words: 4.2 GB of logits in float32, or half of that in bfloat16."""
    states = torch.randn(16384, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64000, 64, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, 64000, (16384,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_module.fused_cross_entropy(states, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.5e9  # logits of 0.27 GB at a time, and what a product needs
