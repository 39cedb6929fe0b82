"""Mean and covariance of the assistant's states over the training problems: computed once, kept beside the cache.

The file is ``moments-<digest of the rows>.safetensors`` in the cache's folder: other rows have another file.

B rows, T thoughts, P assistant width.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from softcot_ds.distributed import agreed, device, on_main, rank, say, sum_over_ranks, world_size
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import write_atomically
from softcot_ds.thoughts.manifest import disk_error
from softcot_ds.thoughts.store import ThoughtStore

_FORMAT = "softcot-ds moments 1"
_CHUNK_BYTES = 64 << 20
"""Of rows that are looked at together."""


@dataclass(frozen=True)
class Moments:
    """Of rows of T states each, float64 on the CPU. Variances are of the rows that there are, divided by their number.

    The covariance is over rows and slots together, about the one mean of all; by its eigenvalues and eigenvectors.
    """

    mean_TP: torch.Tensor
    """Of each slot."""
    variances_P: torch.Tensor
    """Eigenvalues, the largest first; none is negative."""
    directions_PP: torch.Tensor
    """The eigenvector of each, a column."""

    @property
    def mean_P(self) -> torch.Tensor:
        return self.mean_TP.mean(dim=0)

    @property
    def between_TP(self) -> torch.Tensor:
        """Each slot's mean less that of all."""
        return self.mean_TP - self.mean_P

    @property
    def within_PP(self) -> torch.Tensor:
        """The covariance less what of it is between the slots: of what varies with the question."""
        whole_PP = self.directions_PP * self.variances_P @ self.directions_PP.T
        return whole_PP - self.between_TP.T @ self.between_TP / len(self.mean_TP)

    @property
    def own_PP(self) -> torch.Tensor:
        """The map that makes of a state less the mean of all what is nearest, by least squares, to the state less the
        mean of its slot: Wiener's filter. In directions in which slots differ much more than questions it is next to
        zero, which takes away little of what varies: of SmolLM2-135M's states nine tenths of that lie in the seven in
        which eight slots differ, and 97% of it is kept, of the slots' own variance 0.3%."""
        known_P = self.variances_P > torch.finfo(torch.float64).eps * len(self.variances_P) * self.variances_P[0]
        inverse_P = torch.where(known_P, 1 / self.variances_P, 0)
        slots_TP = self.between_TP @ self.directions_PP * inverse_P @ self.directions_PP.T
        return torch.eye(len(inverse_P), dtype=torch.float64) - self.between_TP.T @ slots_TP / len(slots_TP)

    @property
    def varies(self) -> bool:
        """Whether anything varies with the question, beyond the rounding of float64."""
        return bool(self.within_PP.trace() > 1e-12 * self.variances_P.sum())


class RunningMoments:
    """Of rows that come some at a time, and on any rank; by the pairwise updates of Chan, Golub and LeVeque (1979),
    which subtract no large sums from each other: a mean may be thousands of deviations long."""

    def __init__(self, num_thoughts: int, width: int, device: torch.device | str = "cpu") -> None:
        """Holds a (P, P) matrix in float64 on ``device``."""
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean_TP = torch.zeros(num_thoughts, width, dtype=torch.float64, device=device)
        self.scatter_PP = torch.zeros(width, width, dtype=torch.float64, device=device)
        """Sum of (state - its slot's mean) (state - its slot's mean)^T over rows and slots."""

    def add(self, states_BTP: torch.Tensor) -> None:
        """``states_BTP``: in any floating dtype, on any device; of K chains K T states each, T of the first before T of
        the second."""
        states_BTP = states_BTP.to(self.mean_TP)
        mean_TP = states_BTP.mean(dim=0)
        deviations = (states_BTP - mean_TP).flatten(0, 1)
        self.scatter_PP += deviations.T @ deviations
        count, more = self.count, len(states_BTP)
        delta_TP = mean_TP - self.mean_TP
        self.scatter_PP += delta_TP.T @ delta_TP * (count * more / (count + more))
        self.mean_TP += delta_TP * (more / (count + more))
        self.count = count + more

    def over_ranks(self) -> Self:
        """Those of all ranks' rows together, on every rank; all call it."""
        own_count, own_mean = self.count.clone(), self.mean_TP.clone()
        self.count = sum_over_ranks(self.count)
        self.mean_TP = sum_over_ranks(own_mean * own_count) / self.count
        delta_TP = own_mean - self.mean_TP
        self.scatter_PP = sum_over_ranks(self.scatter_PP + own_count * (delta_TP.T @ delta_TP))
        return self

    def moments(self) -> Moments:
        """Raises SoftCoTError when a state is not finite."""
        between_TP = self.mean_TP - self.mean_TP.mean(dim=0)
        num_thoughts = len(between_TP)
        covariance_PP = (self.scatter_PP / self.count + between_TP.T @ between_TP) / num_thoughts
        if not covariance_PP.isfinite().all():
            raise SoftCoTError("states of the assistant are not finite; see softcot-ds doctor RECIPE")
        variances_P, directions_PP = torch.linalg.eigh(covariance_PP)
        largest_first = variances_P.flip(0).clamp(min=0), directions_PP.flip(1).contiguous()
        return Moments(self.mean_TP.cpu(), *(part.cpu() for part in largest_first))


def moments_of(store: ThoughtStore, keys: Sequence[bytes]) -> Moments:
    """Of these rows of a cache, each as often as it is named; all ranks call it, and each reads its share.

    They are read from their file beside the cache if it is there and whole, and else computed, and kept there where
    that can be written.

    Raises:
        SoftCoTError: on every rank, when a row is missing or damaged, or a state is not finite.
    """
    digest = hashlib.sha256(b"".join([store.identity.digest.encode(), *sorted(keys)])).hexdigest()
    path = store.folder / f"moments-{digest[:32]}.safetensors"
    if (found := on_main(lambda: _read(path, digest))) is not None:
        return found
    say(f"mean and covariance of the states of {len(keys):,} training problems")
    *slots, width = store.identity.row_shape
    running = RunningMoments(math.prod(slots), width, device())
    failure = None
    try:
        for rows in _chunks(store, keys[rank() :: world_size()]):
            running.add(rows.flatten(1, -2).to(device()))
    except SoftCoTError as error:
        failure = str(error)
    if (failure := agreed(failure)) is not None:
        raise SoftCoTError(failure)
    running.over_ranks()

    def finish() -> Moments:
        moments = running.moments()
        _write(path, digest, moments)
        return moments

    return on_main(finish)


def _chunks(store: ThoughtStore, keys: Sequence[bytes]) -> Iterable[torch.Tensor]:
    """(B, T, P) or (B, K, T, P) some at a time."""
    size = max(1, _CHUNK_BYTES // store.identity.row_bytes)
    for start in range(0, len(keys), size):
        yield store.read(keys[start : start + size])


def _read(path: Path, digest: str) -> Moments | None:
    """None where there is no such file, or it is not what was written: what it holds can be computed again."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = [file.get_tensor(name) for name in Moments.__dataclass_fields__]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        say(f"{path} cannot be read: {error}; computing it anew")
        return None
    if metadata != _metadata(digest, tensors):
        say(f"{path} is damaged: its checksum differs; computing it anew")
        return None
    return Moments(*tensors)


def _write(path: Path, digest: str, moments: Moments) -> None:
    tensors = {name: getattr(moments, name).contiguous() for name in Moments.__dataclass_fields__}
    try:
        write_atomically(path, save(tensors, _metadata(digest, tensors.values())))
    except OSError as error:
        say(f"{disk_error(path.parent, error)}. Mean and covariance are not kept: each run computes them anew")


def _metadata(digest: str, tensors: Iterable[torch.Tensor]) -> dict[str, str]:
    checksum = xxhash.xxh3_128()
    for tensor in tensors:
        checksum.update(tensor.numpy().data)
    return {"format": _FORMAT, "rows": digest, "checksum": checksum.hexdigest()}
