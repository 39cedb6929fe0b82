"""What of states and thoughts varies with the question, against its definitions in plain float64."""

import math
import shlex

import pytest
import torch
from launch import ROOT

from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.anatomy import Anatomy, Parts


def states(questions, slots, width, dtype=torch.float64):
    """A long constant part with two large coordinates, slots that differ, and questions that vary in few directions."""
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(width, generator=generator, dtype=torch.float64)
    constant[3], constant[width // 2] = 46.0, -15.0
    of_slots = 0.5 * torch.randn(slots, width, generator=generator, dtype=torch.float64)
    basis = torch.randn(slots, 3, width, generator=generator, dtype=torch.float64)
    of_questions = torch.randn(questions, slots, 3, generator=generator, dtype=torch.float64)
    varying = (of_questions[:, :, :, None] * basis).sum(dim=2)
    return (constant + of_slots + 0.3 * varying).to(dtype)


def eigenvalue_rank(vectors_NW):
    deviations = vectors_NW - vectors_NW.mean(dim=0)
    values = torch.linalg.svdvals(deviations).square()
    return (values.sum() ** 2 / values.square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_anatomy_is_that_of_its_definitions(dtype):
    given = states(130, 5, 24, dtype)
    found = Anatomy.of(given)
    x = given.double()
    slot_means = x.mean(dim=0)
    deviations = x - slot_means
    assert found.parts.constant_norm == pytest.approx(slot_means.norm(dim=1).square().mean().sqrt().item())
    assert found.parts.varying_norm == pytest.approx(deviations.norm(dim=2).square().mean().sqrt().item())
    total = (x - x.mean(dim=(0, 1))).square().sum()
    assert found.parts.question_share == pytest.approx((deviations.square().sum() / total).item())
    assert found.rank == pytest.approx(eigenvalue_rank(x.flatten(1)))
    assert found.slot_ranks == pytest.approx([eigenvalue_rank(x[:, slot]) for slot in range(5)])
    torch.testing.assert_close(found.rms_P, x.square().mean(dim=(0, 1)).sqrt())
    text = "\n".join(found.lines())
    assert f"{x[..., 3].square().mean().sqrt():.3g} (number 3), " in text
    assert f"median {found.rms_P.median():.3g}" in text


@pytest.mark.parametrize("count", [1, 4, 9])
def test_rank_of_directions_that_vary_alike_is_their_number(count):
    signs = torch.tensor([[1.0 if row >> bit & 1 else -1.0 for bit in range(count)] for row in range(2**count)])
    basis = torch.linalg.qr(torch.randn(20, count, generator=torch.Generator().manual_seed(1)))[0]
    anatomy = Anatomy.of((7 + 0.1 * signs @ basis.T)[:, None])
    assert anatomy.rank == pytest.approx(count, rel=1e-4)
    assert anatomy.slot_ranks == pytest.approx([count], rel=1e-4)


def test_what_does_not_vary_has_no_rank_and_no_share():
    anatomy = Anatomy.of(torch.zeros(3, 2, 8))
    assert (anatomy.rank, anatomy.slot_ranks, anatomy.parts.question_share) == (0, [0, 0], 0)
    between_slots_alone = Anatomy.of(torch.arange(2.0)[None, :, None].expand(3, 2, 8))
    assert (between_slots_alone.rank, between_slots_alone.parts.question_share) == (0, 0)
    assert "variance   none" in anatomy.lines()
    assert "variance   0.0% by question, 100.0% by slot" in between_slots_alone.lines()


def test_states_that_hardly_differ_come_with_a_line_to_copy():
    signs = torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 3, 8)
    *_, line = Anatomy.of(1 + 0.09 * signs).lines()
    assert line.startswith("remedy")
    override = shlex.split(line)[-1]
    assert load_recipe(ROOT / "recipes" / "word_problems.yaml", [override]).thoughts.placeholder == "1"
    assert not any("remedy" in line for line in Anatomy.of(1 + 0.11 * signs).lines())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_not_told_to_be_constant(value):
    given = torch.zeros(3, 2, 8)
    given[1, 0, 4] = value
    anatomy = Anatomy.of(given)
    assert math.isnan(anatomy.parts.varying_norm)
    (line,) = anatomy.lines()
    assert "not finite" in line


def test_parts_of_ranks_add_up_to_those_of_all():
    given = states(31, 3, 10)
    whole, some, rest = Parts.of(given), Parts.of(given[:7]), Parts.of(given[7:])
    both = Parts(3, 10)
    both.totals = some.totals + rest.totals
    for name in ("constant_norm", "varying_norm", "question_share"):
        assert getattr(both, name) == pytest.approx(getattr(whole, name), rel=1e-12)
