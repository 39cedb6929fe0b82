"""The only trained part: what turns the assistant's states into thoughts for the base model.

B batch, T thoughts, P assistant width, D base width.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from softcot_kernels import thought_embedding
from torch import nn

from softcot_ds.errors import SoftCoTError


class LinearProjection(nn.Module):
    """``W h + b``, the projection of SoftCoT (arXiv:2502.12134, section 3.3)."""

    def __init__(self, assistant_width: int, base_width: int, init_scale: float = 1.0) -> None:
        super().__init__()
        linear = nn.Linear(assistant_width, base_width)
        self.weight = nn.Parameter(linear.weight.detach() * init_scale)  # (D, P)
        self.bias = nn.Parameter(linear.bias.detach() * init_scale)  # (D)

    def forward(self, hidden_BTP: torch.Tensor) -> torch.Tensor:
        """(B, T, P) assistant states to (B, T, D) thoughts, in the parameters' dtype."""
        return nn.functional.linear(hidden_BTP.to(self.weight.dtype), self.weight, self.bias)


class ThoughtEmbedding(nn.Module):
    """The base's input embeddings: tokens looked up, thoughts projected, both written by one fused kernel."""

    def __init__(self, projection: LinearProjection, embedding: nn.Module, scale: float = 1.0) -> None:
        """``scale`` multiplies the rows of the embedding's table and never thoughts: ``embedding.table_scale``."""
        super().__init__()
        self.projection = projection
        # In a list, so that it stays a parameter of the base and does not become one of this module too.
        self._table = [embedding.weight]
        self._scale = scale

    def forward(self, hidden_BTP: torch.Tensor, token_ids: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """(B, S+T, D) embeddings in the table's dtype; the thoughts of row b stand after its first ``slot[b]`` tokens.

        Args:
            token_ids: (B, S) int64.
            slot: (B,) int64.
        """
        (table,) = self._table
        return thought_embedding(
            hidden_BTP.to(table.dtype),
            self.projection.weight,
            self.projection.bias,
            token_ids,
            table,
            slot,
            embed_scale=self._scale,
            check_ids=False,  # they come from the base's own tokenizer
        )


class StaticThoughts(nn.Module):
    """T free vectors, the same for every question: prompt tuning (arXiv:2104.08691), the baseline."""

    def __init__(self, init_TD: torch.Tensor) -> None:
        """``init_TD``: (T, D) start values; embeddings of real tokens converge better than noise."""
        super().__init__()
        self.weight = nn.Parameter(init_TD.detach().clone())

    def forward(self, batch_size: int) -> torch.Tensor:
        """(B, T, D) thoughts."""
        return self.weight.expand(batch_size, -1, -1)


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
    if set(weights) not in ({"weight", "bias"}, {"weight"}):
        raise SoftCoTError(f"{path}: expected the tensors weight and bias, found {sorted(map(str, weights))}")
    return {name: value.float() for name, value in weights.items()}


def check_fits(weights: dict[str, torch.Tensor], module: nn.Module, path: Path) -> None:
    """Raises SoftCoTError when loaded weights are not those of ``module``, by name or shape."""
    want = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if want != found:
        raise SoftCoTError(f"{path}: the tensors {found} do not fit these models, which need {want}")
