"""What a model's tokens look like to it: asked of its embedding module, whatever that does with its table.

K tokens, N vectors, D base width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from softcot_ds.distributed import any_rank
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.partition import gathered

_ROWS = 4096
"""Tokens that are embedded at a time."""
_ROW_ELEMENTS = 2**22
"""Elements of the token table that are compared with vectors together: 16 MiB in float32."""


@contextmanager
def whole_embedding(embedding: nn.Module) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """What embeds tokens, (..., ids) to (..., ids, D), its weights gathered once for all calls within the context.

    All ranks enter it together. Unlike a call of the module it may be used before DeepSpeed has the model.
    """
    with gathered(*embedding.parameters()):
        yield embedding.forward  # without the hooks, which would let the weights go after each call


@torch.no_grad()
def token_rms(embedding: nn.Module, vocabulary: int) -> float:
    """The root mean square of a coordinate of a token's embedding, over all tokens. All ranks call it together."""
    total = 0.0
    with whole_embedding(embedding) as embed:
        for ids in torch.arange(vocabulary, device=device_of(embedding)).split(_ROWS):
            total += (rows_KD := embed(ids[None])[0]).double().square().sum().item()
    return (total / (vocabulary * rows_KD.shape[1])) ** 0.5


def device_of(embedding: nn.Module) -> torch.device:
    """Where token ids must be for this module."""
    return next(embedding.parameters()).device


@dataclass(frozen=True)
class Nearest:
    """The tokens that vectors are nearest to in direction."""

    ids_N: torch.Tensor
    """int64, on the vectors' device."""
    cosines_N: torch.Tensor
    """float32, of each vector to that token's embedding."""
    token_norm: float
    """The mean length of an embedding, over all tokens."""

    @classmethod
    @torch.no_grad()
    def to(cls, vectors_ND: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor], vocabulary: int) -> Self:
        """Of all tokens, some at a time: a float32 copy of a large vocabulary's table may not fit beside the model.

        Args:
            vectors_ND: float32.
            embed: (1, tokens) ids to (1, tokens, D) embeddings of any floating dtype.
            vocabulary: number of tokens.
        """
        directions = nn.functional.normalize(vectors_ND)
        cosines_N = torch.full_like(directions[:, 0], -torch.inf)
        ids_N = torch.zeros_like(cosines_N, dtype=torch.long)
        total = torch.zeros((), dtype=torch.float64, device=directions.device)
        ids = torch.arange(vocabulary, device=directions.device)
        for some in ids.split(max(1, _ROW_ELEMENTS // vectors_ND.shape[1])):
            rows = embed(some[None])[0].float()
            norms = rows.norm(dim=1)
            total += norms.double().sum()
            # A row of zeros has no direction: cosine 0.
            found = (directions @ rows.T / norms.clamp(min=1e-12)).max(dim=1)
            ids_N = torch.where(found.values > cosines_N, some[found.indices], ids_N)
            cosines_N = torch.maximum(cosines_N, found.values)
        return cls(ids_N, cosines_N, total.item() / vocabulary)


class CompactTable(nn.Module):
    """Embeddings of the tokens that occur in a run, whole on every rank, however the model's own table is held.

    They are what the model's embedding module gives out: scaled, normed, or whatever else it makes of a token. Batches
    name a token by its row (``number``).
    """

    rows_KD: torch.Tensor

    def __init__(self, ids_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        """
        Args:
            ids_K: int64 on the CPU, ascending, each once.
            rows_KD: the embedding of each.
        """
        super().__init__()
        self._ids_K = ids_K
        # No parameter, which DeepSpeed would partition, and nothing for a checkpoint.
        self.register_buffer("rows_KD", rows_KD, persistent=False)

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: nn.Module, tokens: Iterable[int]) -> Self | None:
        """Of these tokens. All ranks call it together with the same ones: the module's weights are gathered once.

        No list of families says for which modules this works: each token is embedded twice, in other company.

        Returns:
            None where a token's embedding depends on its place or on others, to the last bit: no table has it then.
        """
        ids_K, parts, differs = torch.tensor(sorted(set(tokens))), [], False
        with whole_embedding(embedding) as embed:
            for ids in ids_K.to(device_of(embedding)).split(_ROWS):
                parts.append(embed(ids[None])[0])
                alone = embed(ids.flip(0)[:, None])[:, 0].flip(0)
                # On the meta device (planning/work.py) there is nothing to compare.
                differs = differs or not (alone.is_meta or torch.equal(parts[-1], alone))
        return None if any_rank(differs) else cls(ids_K, torch.cat(parts))

    def number(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of tokens, int64 on the CPU as ``ids`` are.

        Raises:
            SoftCoTError: the table was made without one of them.
        """
        numbers = torch.searchsorted(self._ids_K, ids.contiguous()).clamp(max=len(self._ids_K) - 1)
        if len(absent := ids[self._ids_K[numbers] != ids]):
            raise SoftCoTError(
                f"token {absent[0].item()} is not among the {len(self._ids_K)} whose embeddings are held for batches; "
                "name it in SoftCoT's tokens"
            )
        return numbers

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """(..., D) embeddings of tokens, given by their rows."""
        return nn.functional.embedding(numbers, self.rows_KD)
