"""The assistant's states as a projection is trained on them: centred or whitened, by an affine map that is folded into
the adapter's weights.

A state of a trained model is nearly the same for every question: two or three of its coordinates, the same in all
states, are some tens of times as long as all that varies. On such inputs gradient descent moves the constant part of a
thought and next to nothing else. On states without their mean, or on those of equal variance in all directions too, it
need not; and as both are affine maps of the state, what is saved is one weight and one bias on plain states again.

But a prompt is to be learned too, and on states of mean zero the bias alone would learn it: an optimizer of Adam's kind
moves each number by the learning rate, and so a thought's constant part by that, where a mean of P coordinates moves it
by the sum of their sizes. So conditioned states keep a mean: in each coordinate the same, and as large as what varies.

Their terms cancel: with random weights of whitened states of SmolLM2 135M on GSM8K, thoughts from what is saved, in
float32, differ by 6e-5 of what varies in them; from weights rounded to bfloat16, by half of it, the same for all
questions but for 1%. Of centred states it is 2e-5 and a tenth.

The mean is that of all slots: ``center`` leaves each slot what it has of its own, the same for every question, and the
variances of ``whiten`` are of that too. It may be most of them.

T thoughts, P assistant width, D base width.
"""

from dataclasses import dataclass
from typing import Self

import torch

from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.projection import Projection
from softcot_ds.recipe import Recipe

Weights = dict[str, torch.Tensor]

FLOOR = 1e-2
"""Of the mean variance of a direction, what is added to each before it is divided by: directions that have much less
would be amplified, and fitted to the training problems alone. Of SmolLM2's 576 it leaves about 185."""


@dataclass(frozen=True)
class Conditioning:
    """``matrix (state - origin)``. In float32, so that a checkpoint holds it to the bit.

    It is applied to the states, not to the map: that is 2 P operations for each coordinate of a state in place of 2 P
    for each weight, of which there are more than coordinates in a batch.
    """

    origin_P: torch.Tensor
    matrix_PP: torch.Tensor | None = None
    """None for the identity. It can be inverted."""

    @classmethod
    def of(cls, mean_P: torch.Tensor, variances_P: torch.Tensor, directions_PP: torch.Tensor, whiten: bool) -> Self:
        """From the mean of states and their covariance's eigenvalues and eigenvectors (columns), in float64.

        The mean of conditioned states is the root mean square of what varies in them, in each coordinate.

        Args:
            whiten: make of the variance v along an eigenvector v / (v + floor), and leave the axes as they are (ZCA):
                which eigenvectors were found, where several of one variance leave that open, changes nothing.
        """
        if not whiten:
            return cls((mean_P - variances_P.mean().sqrt()).float())
        scale_P = (variances_P + FLOOR * variances_P.mean()).rsqrt()
        matrix_PP = directions_PP * scale_P @ directions_PP.T
        kept = (variances_P * scale_P**2).mean().sqrt()
        kept_P = directions_PP @ (directions_PP.sum(dim=0) / scale_P) * kept  # of it the matrix makes that
        return cls((mean_P - kept_P).float(), matrix_PP.float())

    @classmethod
    def of_tensors(cls, tensors: Weights) -> Self:
        """From ``tensors()``. Raises ValueError on anything else."""
        origin_P, matrix_PP = (tensors.get(name) for name in ("origin", "matrix"))
        width = 0 if origin_P is None else origin_P.numel()
        shapes = {"origin": (width,), "matrix": (width, width)}
        if origin_P is None or any(tuple(value.shape) != shapes.get(name) for name, value in tensors.items()):
            raise ValueError(f"no conditioning: { ({name: tuple(value.shape) for name, value in tensors.items()}) }")
        return cls(origin_P, matrix_PP)

    def tensors(self) -> Weights:
        """By name, in float32."""
        origin = {"origin": self.origin_P}
        return origin if self.matrix_PP is None else origin | {"matrix": self.matrix_PP}

    @classmethod
    def shaped(cls, condition: str, width: int) -> Self | None:
        """One without values, for a plan: of ``projection.condition``, and None for none."""
        if condition == "none":
            return None
        return cls(torch.empty(width), torch.empty(width, width) if condition == "whiten" else None)

    def to(self, device: torch.device) -> Self:
        return type(self)(self.origin_P.to(device), None if self.matrix_PP is None else self.matrix_PP.to(device))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(..., P) states in any floating dtype to conditioned ones, in float32 at least: the origin is subtracted
        from what the states are, before any rounding to the dtype of the projection."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        moved = states.to(dtype) - self.origin_P.to(dtype)
        return moved if self.matrix_PP is None else moved @ self.matrix_PP.to(dtype).T

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def operations(self, num_states: int) -> int:
        """Floating-point operations of the product that conditions so many states, if there is one."""
        return 0 if self.matrix_PP is None else 2 * num_states * self.matrix_PP.numel()

    def fold(self, weights: Weights, entry: tuple[str, str]) -> Weights:
        """The weights, in float64, of the projection of plain states that is ``weights`` of conditioned ones.

        Args:
            entry: the names of the (., P) weight and of the bias that states meet first.
        """
        weight, bias = (weights[name].to(self.origin_P.device, torch.float64) for name in entry)
        if self.matrix_PP is not None:
            weight = weight @ self.matrix_PP.double()
        return weights | dict(zip(entry, (weight, bias - weight @ self.origin_P.double()), strict=True))

    def unfold(self, weights: Weights, entry: tuple[str, str]) -> Weights:
        """The weights, in float64, of the projection of conditioned states that is ``weights`` of plain ones."""
        weight, bias = (weights[name].to(self.origin_P.device, torch.float64) for name in entry)
        bias = bias + weight @ self.origin_P.double()
        if self.matrix_PP is not None:
            weight = torch.linalg.solve(self.matrix_PP.double(), weight, left=False)
        return weights | dict(zip(entry, (weight, bias), strict=True))


def token_sized(
    weights: Weights,
    entry: tuple[str, str],
    conditioning: Conditioning,
    own_PP: torch.Tensor,
    within_PP: torch.Tensor,
    between_TP: torch.Tensor,
    mean_P: torch.Tensor,
    rms: float,
) -> Weights:
    """The weights, in float64, of an affine projection of conditioned states, scaled: the part of its thoughts that
    varies with the question has the root mean square ``rms``, and so has the constant part.

    The slots' own constants would be in the latter, which no bias takes away, and of states they may be many times what
    varies with the question. So the weight is first made one of the states' own parts, as well as these can be told:
    next to blind to what only slots differ in. Where questions differ in nothing else, the constant part stays longer,
    and the mean's is zero.

    Args:
        own_PP: of a state less the mean of all, what is to be taken for what varies with the question, float64.
        within_PP: covariance of the states about the mean of their slot, float64; not zero.
        between_TP: mean of each slot less the mean of all, float64.
        mean_P: of all states, float64.
    """
    weight, bias = (weights[name].double() for name in entry)
    size = rms * len(bias) ** 0.5
    matrix_PP = None if conditioning.matrix_PP is None else conditioning.matrix_PP.double()
    plain = (weight if matrix_PP is None else weight @ matrix_PP) @ own_PP
    plain = plain * (size / (plain @ within_PP * plain).sum().sqrt())
    weight = plain if matrix_PP is None else torch.linalg.solve(matrix_PP, plain, left=False)
    of_slots = (plain @ between_TP.T).square().sum() / len(between_TP)
    constant = (size**2 - of_slots).clamp(min=0).sqrt()  # their mean is zero: beside that of all, squares add up
    of_mean = bias * (constant / bias.norm())
    return weights | dict(zip(entry, (weight, of_mean - weight @ conditioning(mean_P)), strict=True))


def needs_moments(recipe: Recipe, kind: type[Projection] | None) -> bool:
    """Whether a training needs the mean and covariance of the training problems' states before it begins.

    Args:
        kind: the class of the method's projection; None where it has none.
    """
    return kind is not None and kind.needs_states and (recipe.projection.condition != "none" or _is_sized(recipe))


def _is_sized(recipe: Recipe) -> bool:
    """Whether first weights are sized by states; those of a file are what they are."""
    return recipe.projection.init_scale == "auto" and recipe.projection.init_from is None


def check_conditioning(recipe: Recipe, kind: type[Projection]) -> None:
    """Raises SoftCoTError when states cannot be what ``projection.condition`` or ``init_scale`` makes of them."""
    settings = recipe.projection
    if settings.condition != "none" and kind.entry is None:
        why = "has no layer that this could be folded into" if kind.needs_states else "reads no states"
        raise SoftCoTError(
            f"projection.condition={settings.condition}: the projection of method={recipe.method} {why}; set it to none"
        )
    if _is_sized(recipe) and kind.needs_states and not kind.is_affine:
        raise SoftCoTError(
            f"projection.init_scale=auto: how long the thoughts of method={recipe.method} are does not follow "
            "from the covariance of the states; set a number"
        )
    if needs_moments(recipe, kind) and recipe.thoughts.source == "online":
        asked = "init_scale=auto" if settings.condition == "none" else f"condition={settings.condition}"
        raise SoftCoTError(
            f"projection.{asked} needs the states of all training problems before the first step, and thoughts.source "
            "is online; set it to cache, and build that with: softcot-ds cache RECIPE"
        )
