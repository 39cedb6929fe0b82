"""Rows that are decoded together: what each has written, and what the model keeps of them.

Keys and values of every token and nothing else, padded on the left to one length, so that each row looks as if it had
been read alone. Layers with a sliding window keep all of them: the mask has the window. Rows come and go, read one
token more or several, and take back what they were not to have read.

B prompts read together, I tokens that all prompts begin with, R rows, N tokens that each reads, S tokens of the longest
row, V vocabulary.
"""

import inspect
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softcot_ds.models.backbone import cache_name, context_length
from softcot_ds.models.places import BEHIND, at
from softcot_ds.models.reading import LookUp, Reading, embedding_by

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
    passes: int = 0
    """Of the model, until it had ended."""
    drafted: int = 0
    """Tokens that were drafted for these passes."""
    accepted: int = 0
    """Tokens of the output, the stop token among them, that were drafted."""

    @property
    def position(self) -> int:
        """Of the next token; of the last one when it has ended."""
        return min(len(self.token_ids), self.limit - 1)

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return 0 if self.ended else self.limit - len(self.token_ids)

    def hear(self, tokens: Sequence[int], drafted: int, stops: set[int]) -> None:
        """What came of a pass: the drafts that were accepted, of so many, and the model's own token."""
        if not self.ended:
            self.passes += 1
            self.drafted += drafted
        for token in tokens[:-1]:
            self.accepted += not self.ended
            self.add(token, stops)
        self.add(tokens[-1], stops)

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

    def move(self, rows: torch.Tensor, places_RS: torch.Tensor, length: int) -> None:
        """Let all rows end after so many tokens; of some rows, those that stood in these places stand there then."""
        if len(rows):
            for whole in self._wholes:
                moved_RSHW = whole[rows[:, None], :, places_RS]
                whole[rows, :, :length] = moved_RSHW.transpose(1, 2)
        self._show(length)

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
        self._cache_name = cache_name(model.forward)
        self._most = context_length(model.config)
        self._rows, self._shared, self._held = _Kept(), _Kept(), _Kept()
        self.others_look_up = False
        """Whether another rank needs the token table in this pass, which is then gathered on all."""

    @property
    def shared(self) -> int:
        """I: how many tokens that all prompts begin with have been read."""
        return self._shared.cache.get_seq_length()

    @property
    def length(self) -> int:
        """S: tokens of the longest row."""
        return self._rows.cache.get_seq_length()

    @property
    def lengths_R(self) -> torch.Tensor:
        """Tokens of each row, int64 on the CPU."""
        return self._rows.lengths_R

    @property
    def room(self) -> int:
        """Tokens that the context has room for behind the longest row, which may have gone on beyond its end."""
        return self._most - self.length

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
        begun = [kept.logits_RV[rows] for kept, rows in parts if kept.logits_RV is not None]
        self._rows = self._together(parts)
        return torch.cat(begun) if begun else torch.empty(0, 0)

    def write(self, tokens_RN: torch.Tensor) -> torch.Tensor:
        """Read N tokens more of each row. Returns the (R, N, V) logits after each of them."""
        count = tokens_RN.shape[1]
        self._rows.lengths_R = self._rows.lengths_R + count
        length = self.length + count
        mask_RS = (torch.arange(length) >= length - self._rows.lengths_R[:, None]).long()
        with (
            self._model._optimize_model_for_decode(),  # as generate does: experts on a GPU, few tokens of each row
            embedding_by(self._model, lambda ids, look_up: look_up(ids)),
            at(self._model, BEHIND),
        ):
            return self._run(self._rows.cache, tokens_RN, mask_RS, count)

    def cut(self, lengths_R: torch.Tensor) -> None:
        """Take back what was read last: each row keeps its first tokens, so many (int64, on the CPU)."""
        dropped_R, length = self._rows.lengths_R - lengths_R, int(lengths_R.max())
        # What stays of a row ended at another place than where all rows end now.
        moved_R = length - (self.length - dropped_R)
        rows = moved_R.nonzero()[:, 0]
        places_RS = (torch.arange(length) - moved_R[rows, None]).clamp(min=0)
        self._rows.lengths_R = lengths_R
        for layer in self._rows.cache.layers:
            layer.move(rows.to(layer.device), places_RS.to(layer.device), length)

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
        with embedding_by(self._model, embed), at(self._model, reading.places_BS):
            read.logits_RV = self._run(read.cache, reading.ids_BS, reading.mask_BN, 1)[:, -1]
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

    def _run(self, cache: DynamicCache, ids_RN: torch.Tensor, mask_RS: torch.Tensor, count: int) -> torch.Tensor:
        """Logits after the last tokens, so many of each row."""
        device = self._model.get_input_embeddings().weight.device
        inputs = {"input_ids": ids_RN.to(device), self._cache_name: cache, "use_cache": True}
        if not mask_RS.all():  # attention without a mask is faster
            inputs["attention_mask"] = mask_RS.to(device)
        if "position_ids" in self._takes:
            # No padding, and no row that goes on beyond its end, asks for a place that the model does not have.
            positions_RS = (mask_RS.cumsum(dim=1) - 1).clamp(min=0, max=self._most - 1)
            inputs["position_ids"] = positions_RS[:, -ids_RN.shape[1] :].to(device)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = count
        return self._model(**inputs).logits[:, -count:]
