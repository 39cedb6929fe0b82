"""Where in its rows a pass is: before the thoughts, among them or behind them.

A model may have weights that are others at each of these places (methods/compressed_cot.py), and must be told in each
pass; of all other models nothing is kept.

B rows, S positions of a pass, T thoughts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

BEFORE, AMONG, BEHIND = range(3)
"""The last thought, which tells what is written, is BEHIND with all that follows."""


@dataclass
class Places:
    """Of the pass under way."""

    of_pass: int | torch.Tensor = BEFORE
    """One of the three for all positions, or (B, S) int64."""

    def reached(self, place: int, like: torch.Tensor) -> torch.Tensor:
        """1 at positions at which the pass has come so far, else 0: what ``like``, (..., width) for B times S positions
        in their order, can be multiplied by, in its dtype."""
        if isinstance(self.of_pass, int):
            return like.new_tensor(float(self.of_pass >= place))
        return (self.of_pass.to(like.device) >= place).to(like.dtype).reshape(*like.shape[:-1], 1)


_places: WeakKeyDictionary[PreTrainedModel, Places] = WeakKeyDictionary()
"""Of the models that want to be told."""


def places_in(model: PreTrainedModel) -> Places:
    """What the model is told from now on; BEFORE where nothing is said."""
    return _places.setdefault(model, Places())


def places_of(starts: Sequence[int] | torch.Tensor, count: int, length: int) -> torch.Tensor:
    """(B, S) int64 places of rows whose thoughts begin at these positions.

    Args:
        count: T; with 0 all positions are BEFORE.
        length: S.
    """
    past_BS = torch.arange(length) - torch.as_tensor(starts)[:, None]
    if not count:
        return torch.full_like(past_BS, BEFORE)
    return (past_BS >= 0).long() * AMONG + (past_BS >= count - 1).long() * (BEHIND - AMONG)


@contextmanager
def at(model: PreTrainedModel, places: int | torch.Tensor) -> Iterator[None]:
    """Tells the model where the passes inside are. See ``Places.of_pass``."""
    told = _places.get(model)
    if told is None:
        yield
        return
    before, told.of_pass = told.of_pass, places
    try:
        yield
    finally:
        told.of_pass = before
