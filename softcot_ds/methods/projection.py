"""What every projection is: from the assistant's states to thoughts for the base model; and reading one's weights.

B batch, T thoughts, P assistant width, D base width.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.errors import SoftCoTError
from softcot_ds.models.embedding import CompactTable
from softcot_ds.recipe import Recipe


class Projection(nn.Module, ABC):
    """Makes the thoughts. A subclass says how; nothing else in the package knows which one it is.

    What it is trained to is in its parameters alone: checkpoints hold no buffers.
    """

    needs_states: ClassVar[bool] = True
    """Whether the thoughts depend on the question, by the assistant's states."""
    is_per_thought: ClassVar[bool] = False
    """Whether each thought is made of its own state, and all alike: one that was trained makes any number of them."""
    is_affine: ClassVar[bool] = False
    """Whether the projection of a mean state is the mean of the projections."""
    entry: ClassVar[tuple[str, str] | None] = None
    """The names of the (., P) weight and of the bias that states meet first, and nothing else meets: an affine map of
    the states can be folded into these (conditioning.py). An affine projection has no others."""

    @classmethod
    @abstractmethod
    def create(cls, recipe: Recipe, assistant_width: int, base: PreTrainedModel, base_width: int) -> Self:
        """A new one in float32, initialized from torch's random numbers, which are the same on every rank."""

    @classmethod
    @abstractmethod
    def empty(cls, recipe: Recipe, assistant_width: int, base_width: int) -> Self:
        """One in float32 whose weights are to be loaded."""

    @abstractmethod
    def forward(self, hidden_BTP: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """(B, T, D) thoughts in the parameters' dtype.

        Args:
            hidden_BTP: assistant states in any floating dtype; None where ``needs_states`` is False.
            batch_size: B.
        """

    def fused_with(self, table: CompactTable) -> nn.Module | None:
        """One module for thoughts and token embeddings, (B, T, P) states, (B, S) rows of ``table`` and (B) slots to
        (B, S+T, D). None where there is none: thoughts and tokens then go one by one.
        """
        return None

    def operations(self, batch_size: int, num_thoughts: int) -> int:
        """Floating-point operations of the products that ``forward`` and its weights' gradients take, if there are any:
        two for each pair of factors."""
        return 0


def load_projection(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a projection, float32: a ``.safetensors`` file of ours, or a ``projection.bin`` state dict of the
    original implementation, which holds ``weight`` and ``bias``.

    Raises:
        SoftCoTError: the file is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # an EOFError says nothing
        raise SoftCoTError(f"{path}: damaged or no projection: {reason}") from error
    except Exception as error:
        # torch.load raises pickle.UnpicklingError for code in a pickle, and a KeyError or worse for random bytes.
        raise SoftCoTError(
            f"{path}: not a plain state dict: {type(error).__name__}; refused to run what it holds"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise SoftCoTError(f"{path}: expected tensors by name, found {type(weights).__name__}")
    return {str(name): value.float() for name, value in weights.items()}


def check_fits(weights: dict[str, torch.Tensor], module: nn.Module, path: Path) -> None:
    """Raises SoftCoTError when loaded weights are not those of ``module``, by name or shape."""
    want = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if want != found:
        raise SoftCoTError(f"{path}: the tensors {found} do not fit these models, which need {want}")
