"""Decoding in which prompts that wait take the place of outputs that have ended.

transformers' ``generate`` goes on with a batch until its longest output ends, and its continuous batching takes tokens
alone. So the loop is our own, over transformers' cache: when some rows have ended, the keys and values of the others
are put beside those of new prompts, padded on the left. It fits models whose cache is keys and values of every token;
``decoding.py`` tries each. Layers with a sliding window keep all of them: the mask has the window.

Nothing is read twice: what all prompts begin with is read once and stands in every row, and a prompt of several outputs
is read once for all of them, whenever they begin. Prompts are read a batch at a time and held until there are rows for
them. Each row looks as if it had been read alone.

B prompts read together, I tokens that all prompts begin with, R rows, S tokens of the longest row, V vocabulary.
"""

import inspect
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softcot_ds.distributed import max_over_ranks
from softcot_ds.models.backbone import context_length
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.reading import PADDING, LookUp, Prompts, Reading, embedding_by

_NOTHING, _PASS, _TABLE = range(3)
"""What a rank needs the others for: nothing more, a pass, or a pass in which the token table is gathered."""
ROOM = 32
"""Tokens for which there is room when keys and values are put together."""


@dataclass
class Writing:
    """One output on its way."""

    number: int
    """Its own."""
    prompt: int
    """The number of its prompt."""
    limit: int
    """It is cut after so many tokens."""
    token_ids: array = field(default_factory=lambda: array("i"))
    """Without the stop token."""
    cut: bool = False
    ended: bool = False
    last: int = 0
    """What the model reads next, whether or not it belongs to the output."""

    @property
    def position(self) -> int:
        """Of the next token; of the last one when it has ended."""
        return min(len(self.token_ids), self.limit - 1)

    def add(self, token: int, stops: set[int]) -> None:
        self.last = token
        if self.ended:
            return
        if token in stops:
            self.ended = True
        else:
            self.token_ids.append(token)
            self.cut = self.ended = len(self.token_ids) == self.limit


class _Layer(DynamicLayer):
    """Keys and values with room for more tokens; transformers' own copies all of them for each."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Of rows behind one another, (rows, heads, tokens, width) each, padded on the left to so many tokens."""
        super().__init__()
        self._wholes = [_with_room(states, length) for states in zip(*parts, strict=True)]
        self.dtype, self.device = self._wholes[0].dtype, self._wholes[0].device
        self.is_initialized = True
        self._show(length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._wholes[0].shape[2]:
            self._wholes = [_with_room([states], start) for states in (self.keys, self.values)]
        for whole, states in zip(self._wholes, (key_states, value_states), strict=True):
            whole[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._wholes)


def _with_room(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    first = parts[0]
    whole = first.new_empty(sum(map(len, parts)), first.shape[1], length + ROOM, first.shape[3])
    start = 0
    for part in parts:
        rows, begin = whole[start : start + len(part)], length - part.shape[2]
        rows[:, :, :begin] = 0  # the mask hides it, but zero times NaN is NaN
        rows[:, :, begin:length] = part
        start += len(part)
    return whole


@dataclass
class _Kept:
    """Keys and values of rows, padded on the left to one length."""

    lengths_R: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Tokens of each, int64 on the CPU."""
    cache: DynamicCache = field(default_factory=DynamicCache)
    logits_RV: torch.Tensor | None = None
    """After each, where it is a prompt that was read."""

    def layer(self, number: int, rows: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some rows in one layer, of the last tokens alone."""
        layer = self.cache.layers[number]
        last = [states[:, :, states.shape[2] - length :] for states in (layer.keys, layer.values)]
        keys, values = (states if list(rows) == [*range(len(states))] else states[list(rows)] for states in last)
        return keys, values


class Rows:
    """What the model keeps of rows that are decoded together: keys and values, padded on the left to one length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        self._most = context_length(model.config)
        self._rows, self._shared, self._held = _Kept(), _Kept(), _Kept()
        self.others_look_up = False
        """Whether another rank needs the token table in this pass, which is then gathered on all."""

    @property
    def shared(self) -> int:
        """I: how many tokens that all prompts begin with have been read."""
        return self._shared.cache.get_seq_length()

    @property
    def are_full(self) -> bool:
        """Whether one has gone on beyond its end, to the end of the context."""
        return self._rows.cache.get_seq_length() >= self._most

    def read_shared(self, reading: Reading) -> None:
        """Read what all prompts begin with, in one row. Those that are read from now on come without it."""
        self._shared = self._read(reading)

    def begin(
        self,
        keep: Sequence[int],
        picked: Sequence[int] = (),
        reading: Reading | None = None,
        picked_then: Sequence[int] = (),
        hold: bool = False,
    ) -> torch.Tensor:
        """Keep these rows and no others; behind them come new ones, each after a prompt.

        Args:
            picked: the prompts of new rows, by their places among those that are held.
            reading: prompts that are read now, and held in the place of those.
            picked_then: the prompts of the rows behind, by their places among these.
            hold: whether prompts are wanted again.

        Returns:
            (new rows, V) logits after the prompt of each.
        """
        parts = [(self._rows, list(keep)), (self._held, list(picked))]
        if reading is not None:
            self._held = self._read(reading)
            parts.append((self._held, list(picked_then)))
        parts = [(kept, rows) for kept, rows in parts if rows]
        if not hold:
            self._held = _Kept()
        self._rows = self._together(parts)
        return torch.cat([kept.logits_RV[rows] for kept, rows in parts if kept.logits_RV is not None])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows and no others."""
        self._rows = self._together([(self._rows, list(rows))])

    def write(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Read one token more of each row. Returns the (R, V) logits after it."""
        self._rows.lengths_R = self._rows.lengths_R + 1
        length = self._rows.cache.get_seq_length() + 1
        mask_RS = (torch.arange(length) >= length - self._rows.lengths_R[:, None]).long()
        with (
            self._model._optimize_model_for_decode(),  # as generate does: experts on a GPU, one token of each row
            embedding_by(self._model, lambda ids, look_up: look_up(ids)),
        ):
            return self._run(self._rows.cache, tokens_R[:, None], mask_RS)

    def run_along(self, reading: Reading) -> None:
        """A pass for the others' sake: all ranks that hold a model's weights between them run at the same time."""
        self._read(reading)

    def _read(self, reading: Reading) -> _Kept:
        """Prompts whose first tokens, where they come without them, are the shared ones."""

        def embed(ids_BS: torch.Tensor, look_up: LookUp) -> torch.Tensor:
            if self.others_look_up and reading.known_BSD is not None:
                look_up(ids_BS[:1, :1])
            return reading.embed(ids_BS, look_up)

        read = _Kept(reading.mask_BN.sum(dim=1))
        skipped = reading.mask_BN.shape[1] - reading.ids_BS.shape[1]
        if skipped:
            # Padding stands in front of them: in each row they are moved by its own, and the last fall off, which are
            # among the row's own tokens then.
            padding_B = reading.mask_BN.shape[1] - read.lengths_R
            places_BI = (torch.arange(skipped) - padding_B[:, None]).clamp(min=0)
            for number, layer in enumerate(self._shared.cache.layers):
                places = places_BI.to(layer.keys.device)
                moved = [states[0][:, places].transpose(0, 1) for states in (layer.keys, layer.values)]
                read.cache.update(*moved, number)
        with embedding_by(self._model, embed):
            read.logits_RV = self._run(read.cache, reading.ids_BS, reading.mask_BN)
        return read

    def _together(self, parts: Sequence[tuple[_Kept, list[int]]]) -> _Kept:
        """Some rows of each, behind one another. All are as long as the longest of them."""
        together = _Kept(torch.cat([kept.lengths_R[rows] for kept, rows in parts]))
        longest = [int(kept.lengths_R[rows].max()) for kept, rows in parts]
        for number in range(len(parts[0][0].cache)):
            states = [kept.layer(number, rows, length) for (kept, rows), length in zip(parts, longest, strict=True)]
            if parts[0][0] is self._rows:
                self._rows.cache.layers[number] = None  # there are never two whole caches
            together.cache.layers.append(_Layer(states, max(longest)))
        return together

    def _run(self, cache: DynamicCache, ids_RN: torch.Tensor, mask_RS: torch.Tensor) -> torch.Tensor:
        device = self._model.get_input_embeddings().weight.device
        inputs = {"input_ids": ids_RN.to(device), "past_key_values": cache, "use_cache": True}
        if not mask_RS.all():  # attention without a mask is faster
            inputs["attention_mask"] = mask_RS.to(device)
        if "position_ids" in self._takes:
            # No padding, and no row that goes on beyond its end, asks for a place that the model does not have.
            positions_RS = (mask_RS.cumsum(dim=1) - 1).clamp(min=0, max=self._most - 1)
            inputs["position_ids"] = positions_RS[:, -ids_RN.shape[1] :].to(device)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        return self._model(**inputs).logits[:, -1]


class _Outputs:
    """Those that wait, and those that are being written, a row each."""

    def __init__(self, outputs: Sequence[Writing], batch_size: int) -> None:
        self._count, self._batch_size = len(outputs), batch_size
        self._waiting = deque(outputs)
        self.running: list[Writing] = []
        self._idle = 0
        self._held: dict[int, int] = {}
        """Places of prompts among those that were read last, by their numbers."""

    @property
    def ended(self) -> int:
        """How many are done."""
        return self._count - len(self._waiting) - sum(not output.ended for output in self.running)

    @property
    def want_held(self) -> bool:
        """Whether prompts that were read last are wanted again."""
        return bool(self._waiting) and self._waiting[0].prompt in self._held

    def is_time(self) -> bool:
        """Whether rows should change; asked before each pass. A change copies all keys and values, which takes about
        half as long as a pass: it comes when rows that have ended have been run for as much as that."""
        ended = sum(output.ended for output in self.running)
        self._idle += ended
        return ended == len(self.running) or 2 * self._idle >= len(self.running)

    def drop_ended(self) -> list[int]:
        """Make room. Returns the rows of the others."""
        self._idle = 0
        rows = [row for row, output in enumerate(self.running) if not output.ended]
        self.running = [self.running[row] for row in rows]
        return rows

    def take(self) -> tuple[list[Writing], list[int]]:
        """Outputs that begin in rows that are free, and the places of their prompts, which have been read."""
        fresh: list[Writing] = []
        while self.want_held and len(self.running) < self._batch_size:
            fresh.append(self._waiting.popleft())
            self.running.append(fresh[-1])
        return fresh, [self._held[output.prompt] for output in fresh]

    def to_read(self) -> list[int]:
        """Prompts to be read for rows that are free still, and, as many as a batch together, for those to come."""
        if not self._waiting or len(self.running) == self._batch_size:
            return []
        prompts = islice(dict.fromkeys(output.prompt for output in self._waiting), self._batch_size)
        self._held = {prompt: place for place, prompt in enumerate(prompts)}
        return list(self._held)


@torch.no_grad()
def decode_refilled(
    model: PreTrainedModel,
    outputs: Sequence[Writing],
    prompts: Prompts,
    choose: Callable[[torch.Tensor, list[int], list[int]], torch.Tensor],
    stops: set[int],
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    """Write all outputs, begun in their order, as many at a time as ``batch_size``. Those of a prompt are neighbours.

    What runs together depends on the outputs alone. All ranks call it together where the model is partitioned: each
    takes as many passes as the one that has most to do.

    Args:
        choose: see ``Chooser``.
        progress: is told how many have ended.
    """
    rows, written = Rows(model), _Outputs(outputs, batch_size)
    together = needs_all_ranks(model)
    nothing = prompts.read_tokens([PADDING])
    reads = _TABLE if prompts.table is None else _PASS

    def a_pass_is_needed(needs: int) -> bool:
        """By any rank."""
        most = max_over_ranks(needs) if together else needs
        rows.others_look_up = together and most == _TABLE
        return most != _NOTHING

    def hear(some: Sequence[Writing], logits_RV: torch.Tensor) -> None:
        numbers, positions = [output.number for output in some], [output.position for output in some]
        for output, token in zip(some, choose(logits_RV, numbers, positions).tolist(), strict=True):
            output.add(token, stops)
        progress(written.ended)

    if a_pass_is_needed(reads if prompts.shared else _NOTHING):
        if prompts.shared:
            rows.read_shared(prompts.read_tokens(prompts.shared))
        else:
            rows.run_along(nothing)
    while True:
        keep, fresh, reading = [], [], None
        if written.is_time() or rows.are_full:
            keep = written.drop_ended()
            fresh, picked = written.take()
            if numbers := written.to_read():
                reading = prompts.read(numbers, rows.shared)
            elif fresh:
                hear(fresh, rows.begin(keep, picked, hold=written.want_held))
            elif keep:
                rows.keep(keep)
        if not a_pass_is_needed(reads if reading else _TABLE if written.running else _NOTHING):
            return
        if reading:
            then, picked_then = written.take()
            hear([*fresh, *then], rows.begin(keep, picked, reading, picked_then, written.want_held))
        elif written.running:
            hear(written.running, rows.write(torch.tensor([output.last for output in written.running])))
        else:
            rows.run_along(nothing)
