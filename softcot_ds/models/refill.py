"""Decoding in which prompts that wait take the place of outputs that have ended.

transformers' ``generate`` goes on with a batch until its longest output ends, and its continuous batching takes tokens
alone. So the loop is our own, over transformers' cache: when some rows have ended, the keys and values of the others
are put beside those of new prompts, padded on the left. It fits models whose cache is keys and values of every token;
``decoding.py`` tries each. Layers with a sliding window keep all of them: the mask has the window.

B prompts read together, R rows, S tokens of the longest row, V vocabulary.
"""

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softcot_ds.distributed import max_over_ranks
from softcot_ds.models.backbone import context_length
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.reading import LookUp, Reading, embedding_by

_MAY_BE_IDLE = 6
"""Rows that have ended go when they are one in so many: a change costs about as much as a token."""
_NOTHING, _PASS, _TABLE = range(3)
"""What a rank needs the others for: nothing more, a pass, or a pass in which the token table is gathered."""
_ROOM = 32
"""Tokens for which there is room when keys and values are put together."""


@dataclass
class Writing:
    """One output on its way."""

    number: int
    """Of its prompt."""
    limit: int
    """It is cut after so many tokens."""
    token_ids: list[int] = field(default_factory=list)
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

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], length: int) -> None:
        """Of rows behind one another, (rows, heads, tokens, width) each, padded on the left to so many tokens."""
        super().__init__()
        self._wholes = [_with_room(parts, length) for parts in (keys, values)]
        self.dtype, self.device = keys[0].dtype, keys[0].device
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
    whole = first.new_zeros(sum(map(len, parts)), first.shape[1], length + _ROOM, first.shape[3])
    start = 0
    for part in parts:
        whole[start : start + len(part), :, length - part.shape[2] : length] = part
        start += len(part)
    return whole


class Rows:
    """What the model keeps of rows that are decoded together: keys and values, padded on the left to one length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._takes = inspect.signature(model.forward).parameters
        self._most = context_length(model.config)
        self._cache = DynamicCache()
        self._lengths_R = torch.zeros(0, dtype=torch.int64)
        self.others_look_up = False
        """Whether another rank needs the token table in this pass, which is then gathered on all."""

    @property
    def are_full(self) -> bool:
        """Whether one has gone on beyond its end, to the end of the context."""
        return self._cache.get_seq_length() >= self._most

    def read(self, reading: Reading, keep: Sequence[int] = ()) -> torch.Tensor:
        """Read prompts, whose rows come behind those that are kept. Returns the (B, V) logits after each prompt."""
        fresh = DynamicCache()
        logits_BV = self._read(reading, fresh)
        self.keep(keep, fresh, reading.mask_BS.sum(dim=1))
        return logits_BV

    def write(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Read one token more of each row. Returns the (R, V) logits after it."""
        self._lengths_R = self._lengths_R + 1
        length = self._cache.get_seq_length() + 1
        mask_RS = (torch.arange(length) >= length - self._lengths_R[:, None]).long()
        with (
            self._model._optimize_model_for_decode(),  # as generate does: experts on a GPU, one token of each row
            embedding_by(self._model, lambda ids, look_up: look_up(ids)),
        ):
            return self._run(self._cache, tokens_R[:, None], mask_RS)

    def run_along(self, reading: Reading) -> None:
        """A pass for the others' sake: all ranks that hold a model's weights between them run at the same time."""
        self._read(reading, DynamicCache())

    def _read(self, reading: Reading, cache: DynamicCache) -> torch.Tensor:
        def embed(ids_BS: torch.Tensor, look_up: LookUp) -> torch.Tensor:
            if self.others_look_up and reading.known_BSD is not None:
                look_up(ids_BS[:1, :1])
            return reading.embed(ids_BS, look_up)

        with embedding_by(self._model, embed):
            return self._run(cache, reading.ids_BS, reading.mask_BS)

    def keep(
        self, rows: Sequence[int], fresh: DynamicCache | None = None, lengths_B: torch.Tensor | None = None
    ) -> None:
        """Keep these rows and no others, and put fresh ones behind them. All are as long as the longest of them."""
        old, kept_R = self._cache, self._lengths_R[list(rows)]
        kept = int(kept_R.max()) if rows else 0
        length = max(kept, 0 if fresh is None else fresh.get_seq_length())
        self._cache = DynamicCache()
        self._lengths_R = kept_R if lengths_B is None else torch.cat([kept_R, lengths_B])
        for number in range(len(old if fresh is None else fresh)):
            parts = []
            if rows:
                layer = old.layers[number]
                picked = torch.tensor(rows, device=layer.keys.device)
                parts = [[whole[:, :, whole.shape[2] - kept :][picked] for whole in (layer.keys, layer.values)]]
                old.layers[number] = None  # there are never two whole caches
            if fresh is not None:
                parts.append([fresh.layers[number].keys, fresh.layers[number].values])
            self._cache.layers.append(_Layer(*zip(*parts, strict=True), length))

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


@torch.no_grad()
def decode_refilled(
    model: PreTrainedModel,
    outputs: Sequence[Writing],
    reading: Callable[[list[int]], Reading],
    choose: Callable[[torch.Tensor, list[int], list[int]], torch.Tensor],
    stops: set[int],
    batch_size: int,
    progress: Callable[[int], object],
    nothing: Reading,
) -> None:
    """Write all outputs, begun in their order, as many at a time as ``batch_size``.

    What runs together depends on the outputs alone. All ranks call it together where the model is partitioned: each
    takes as many passes as the one that has most to do.

    Args:
        reading: the prompts of outputs of these numbers.
        choose: see ``Chooser``.
        progress: is told how many have ended.
        nothing: any prompt, for passes in which this rank has nothing to do.
    """
    rows, waiting, running = Rows(model), deque(outputs), list[Writing]()
    together = needs_all_ranks(model)
    while True:
        ended, fresh, keep = sum(output.ended for output in running), list[Writing](), list[int]()
        if not running or ended >= max(1, len(running) // _MAY_BE_IDLE) or rows.are_full:
            keep = [row for row, output in enumerate(running) if not output.ended]
            fresh = [waiting.popleft() for _ in range(min(batch_size - len(keep), len(waiting)))]
            running = [*(running[row] for row in keep), *fresh]
            if keep and not fresh:
                rows.keep(keep)
        read = reading([output.number for output in fresh]) if fresh else nothing
        needs = _NOTHING if not running else _PASS if fresh and read.known_BSD is not None else _TABLE
        most = max_over_ranks(needs) if together else needs
        if most == _NOTHING:
            return
        rows.others_look_up = together and most == _TABLE
        if not running:
            rows.run_along(read)
            continue
        asked = fresh or running
        logits = rows.read(read, keep) if fresh else rows.write(torch.tensor([output.last for output in running]))
        numbers, positions = [output.number for output in asked], [output.position for output in asked]
        for output, token in zip(asked, choose(logits, numbers, positions).tolist(), strict=True):
            output.add(token, stops)
        progress(sum(output.ended for output in outputs))
