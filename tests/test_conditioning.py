"""Conditioned states: what they are over the training's states, and that an adapter of plain states is the same map."""

from types import SimpleNamespace

import pytest
import torch
from launch import ROOT
from test_moments import massive

from softcot_ds import choices
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import method_class
from softcot_ds.methods.conditioning import FLOOR, Conditioning, token_sized
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.embedding import token_rms
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.moments import Moments, RunningMoments
from softcot_ds.training.start import Start

RECIPE = ROOT / "recipes" / "word_problems.yaml"
ENTRY = "weight", "bias"
CONDITIONS = ["center", "whiten"]


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """(N, T, P) float64, in whose values there is a coordinate of thousands of deviations."""
    return massive(200).double()


@pytest.fixture(scope="module")
def moments(states) -> Moments:
    running = RunningMoments(*states.shape[1:])
    running.add(states)
    return running.moments()


def conditioning(moments: Moments, condition: str) -> Conditioning:
    return Conditioning.of(moments.mean_P, moments.variances_P, moments.directions_PP, condition == "whiten")


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (7, 5), "bias": (7,), "later": (2, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_folding_is_exact(states, moments, condition):
    """In float64, of the float32 values that a training has; relative to the terms that are summed."""
    made, weights = conditioning(moments, condition), random_weights()
    want = made(states) @ weights["weight"].double().T + weights["bias"]
    folded = made.fold(weights, ENTRY)
    found = states @ folded["weight"].T + folded["bias"]
    largest = (states.abs() @ folded["weight"].abs().T).max()
    assert (found - want).abs().max() <= 1e-15 * largest
    assert folded["later"] is weights["later"]
    back = made.unfold(folded, ENTRY)
    for name in ENTRY:
        torch.testing.assert_close(back[name], weights[name].double(), rtol=1e-9, atol=1e-9)


def test_conditioned_states_keep_a_mean_as_large_as_what_varies(states, moments):
    """In every coordinate, so that one step of the optimizer moves both parts of a thought alike."""
    flat = states.flatten(0, 1)
    for condition in CONDITIONS:
        found = conditioning(moments, condition)(states).flatten(0, 1)
        size = (found - found.mean(dim=0)).square().mean().sqrt()
        torch.testing.assert_close(found.mean(dim=0), size.expand(5), rtol=0, atol=2e-4)  # 4000 in float32
        if condition == "center":
            torch.testing.assert_close(found - size, flat - flat.mean(dim=0), rtol=0, atol=4e-4)


def test_whitened_states_are_alike_in_all_directions(states, moments):
    whitened = conditioning(moments, "whiten")(states).flatten(0, 1)
    variances = moments.variances_P
    want = variances / (variances + FLOOR * variances.mean())
    along = whitened @ moments.directions_PP
    torch.testing.assert_close(torch.cov(along.T, correction=0), torch.diag(want), rtol=0, atol=1e-5)
    assert variances[0] > 9 * variances[-1], "or there is nothing to whiten"


def test_the_mean_goes_before_anything_is_rounded():
    """In bfloat16 a state of 4000.5 is 4000, and so is its mean."""
    made = Conditioning(torch.tensor([4000.0]))
    assert made(torch.tensor([[4000.5]])).item() == 0.5
    assert made(torch.tensor([[4016.0]], dtype=torch.bfloat16)).item() == 16
    assert made(torch.tensor([[1.0]], dtype=torch.float64)).dtype == torch.float64


def test_a_direction_without_variance_is_no_division_by_zero():
    made = Conditioning.of(torch.zeros(2).double(), torch.tensor([1.0, 0.0]).double(), torch.eye(2).double(), True)
    assert made.matrix_PP.isfinite().all()


def test_whitening_does_not_depend_on_which_eigenvectors_were_found():
    """Of three states in five dimensions, or of two variances that are the same, they are any of a subspace."""
    turn, basis = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (3, 5))
    variances = torch.tensor([2.0, 1, 0, 0, 0]).double()
    other = torch.cat([basis[:, :2], basis[:, 2:] @ turn], dim=1)
    found, want = (Conditioning.of(torch.zeros(5), variances, vectors, True) for vectors in (other, basis))
    torch.testing.assert_close(found.matrix_PP, want.matrix_PP, rtol=0, atol=1e-5)


@pytest.mark.parametrize("between_slots", [0.0, 0.1])
def test_states_that_are_the_same_for_all_problems_are_refused(between_slots):
    row = torch.tensor([0.1, 46, -0.3, 1e-3]).bfloat16() + between_slots * torch.arange(3)[:, None]
    running = RunningMoments(3, 4)
    for some in row.bfloat16().expand(50, 3, 4).split(7):
        running.add(some)
    reader = SimpleNamespace(moments=lambda _: running.moments())
    experiment = SimpleNamespace(recipe=load_recipe(RECIPE, ["projection.condition=center"]))
    with pytest.raises(SoftCoTError, match=r"states of all 50 training problems are the same: .*condition=none"):
        Start.anew(experiment, reader, range(50))


@pytest.mark.parametrize("condition", ["none", *CONDITIONS])
def test_thoughts_begin_as_long_as_tokens_in_what_varies_and_in_what_is_constant(states, moments, condition):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(5000, 7)  # more than are embedded at a time
    rms = embedding.weight.square().mean().sqrt().item()
    assert token_rms(embedding, 5000) == pytest.approx(rms, rel=1e-6)

    made = None if condition == "none" else conditioning(moments, condition)
    projection = LinearProjection(5, 7).double()
    base = SimpleNamespace(get_input_embeddings=lambda: embedding, config=SimpleNamespace(vocab_size=5000))
    base.config.get_text_config = lambda: base.config
    model = SimpleNamespace(
        base=base, trained=lambda: dict(projection.named_parameters()), projection_class=LinearProjection
    )
    Start(None, made, moments).put_into(model)
    thoughts = projection(made(states) if made else states).detach()
    means = thoughts.mean(dim=0)
    assert means.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-3)
    assert (thoughts - means).square().mean().sqrt().item() == pytest.approx(rms, rel=1e-3)


def sized(states: torch.Tensor, condition: str) -> tuple[dict[str, torch.Tensor], float, float]:
    """Weights for states, with what they make of these' mean; and the lengths of the constant and of the varying part
    of their thoughts, where a token's is 1, by their definitions."""
    running = RunningMoments(*states.shape[1:])
    running.add(states)
    found = running.moments()
    made, weights = conditioning(found, condition), random_weights()
    weights["weight"] = weights["weight"][:, : states.shape[-1]]
    made_of = token_sized(weights, ENTRY, made, found.own_PP, found.within_PP, found.between_TP, found.mean_P, 7**-0.5)
    thoughts = made(states) @ made_of["weight"].T + made_of["bias"]
    means = thoughts.mean(dim=0)
    lengths = (part.square().sum(dim=-1).mean().sqrt().item() for part in (means, thoughts - means))
    of_mean = thoughts.mean(dim=(0, 1))
    return made_of | {"of the mean": of_mean}, *lengths


@pytest.mark.parametrize("condition", CONDITIONS)
def test_slots_whose_own_constants_are_fifty_times_what_varies_begin_no_longer(states, condition):
    """In two of five directions, in which questions differ, too."""
    apart = states.mean(dim=(0, 1)) + states - states.mean(dim=0)
    apart += 50 * apart.std(dim=0).norm(dim=-1).mean() * torch.eye(3, 5)
    assert sized(apart, condition)[1:] == pytest.approx((1, 1), rel=1e-3)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_where_questions_differ_in_what_slots_differ_in_alone_the_mean_adds_nothing(states, condition):
    apart = states[..., :2] + 50 * torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    weights, constant, varying = sized(apart, condition)
    assert varying == pytest.approx(1, rel=1e-3)
    assert constant > 10
    assert weights["of the mean"].abs().max() < 1e-4 * constant


@pytest.mark.parametrize("condition", CONDITIONS)
def test_where_slots_do_not_differ_first_weights_are_those_that_were_drawn_but_for_their_size(states, condition):
    weights, *_ = sized(states - states.mean(dim=0), condition)
    for name, drawn in (("weight", "weight"), ("of the mean", "bias")):
        ratio = weights[name] / random_weights()[drawn]
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["projection.condition=whiten"], ""),
        (["method=prompt_tuning", "projection.init_scale=auto", "thoughts.source=online"], ""),
        (["thoughts.source=online"], ""),
        (["projection.init_scale=auto", f"projection.init_from={RECIPE}", "thoughts.source=online"], ""),
        (
            ["method=prompt_tuning", "projection.condition=center"],
            "method=prompt_tuning reads no states; set it",
        ),
        (
            ["projection.condition=whiten", "thoughts.source=online"],
            "condition=whiten needs the states of all training",
        ),
        (["projection.init_scale=auto", "thoughts.source=online"], "init_scale=auto needs .* softcot-ds cache RECIPE"),
        (
            ["method=deep", "projection.condition=center"],
            "method=deep has no layer that this could be folded",
        ),
        (["method=deep", "projection.init_scale=auto"], "long the thoughts of method=deep are"),
    ],
)
def test_what_cannot_be_conditioned_is_refused_with_what_to_do(monkeypatch, overrides, said):
    monkeypatch.setitem(choices.METHODS, "deep", f"{__name__}:ByDeep")
    recipe = load_recipe(RECIPE, ["projection.condition=none", "projection.init_scale=1.0", *overrides])
    if not said:
        method_class(recipe.method).check(recipe)
        return
    with pytest.raises(SoftCoTError, match=said):
        method_class(recipe.method).check(recipe)


class Deep(LinearProjection):
    is_affine = False
    entry = None


class ByDeep(SoftThoughts):
    projection_class = Deep


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"origin": torch.tensor(1.0)},
        {"matrix": torch.eye(2)},
        {"origin": torch.zeros(2), "matrix": torch.eye(3)},
        {"other": torch.eye(2)},
    ],
)
def test_what_is_no_conditioning_is_refused(tensors):
    with pytest.raises(ValueError, match="no conditioning"):
        Conditioning.of_tensors(tensors)
