"""Decoding in which prompts that wait take the place of outputs that have ended.

transformers' ``generate`` goes on with a batch until its longest output ends, and its continuous batching takes tokens
alone. So the loop is our own, over transformers' cache: when some rows have ended, the keys and values of the others
are put beside those of new prompts (rows.py). It fits models whose cache is keys and values of every token;
``decoding.py`` tries each.

Nothing is read twice: what all prompts begin with is read once and stands in every row, and a prompt of several outputs
is read once for all of them, whenever they begin. Prompts are read a batch at a time and held until there are rows for
them. Each row looks as if it had been read alone.

Where there is a model that drafts, its rows change with these, and a pass reads what it has drafted (drafting.py).

R rows, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from transformers import PreTrainedModel

from softcot_ds.distributed import max_over_ranks
from softcot_ds.models.drafting import DraftRows
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.reading import PADDING, Prompts, Reading
from softcot_ds.models.rows import Rows, Writing
from softcot_ds.models.sampling import Chooser, Drafts, no_drafts

_NOTHING, _PASS, _TABLE = range(3)
"""What a rank needs the others for: nothing more, a pass, or a pass in which the token table is gathered."""


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


class _Work:
    """Outputs being written by a model, and perhaps by one that drafts."""

    def __init__(
        self,
        model: PreTrainedModel,
        written: _Outputs,
        choose: Chooser,
        stops: set[int],
        progress: Callable[[int], object],
        draft_rows: DraftRows | None,
    ) -> None:
        self.rows = Rows(model)
        self._written, self._choose, self._stops, self._progress = written, choose, stops, progress
        self._draft_rows = draft_rows

    def begin(
        self,
        keep: Sequence[int],
        fresh: Sequence[Writing],
        picked: Sequence[int],
        numbers: Sequence[int] = (),
        reading: Reading | None = None,
    ) -> None:
        """Keep these rows; behind them come others.

        Args:
            fresh: outputs that begin, whose prompts are held in the places ``picked``.
            numbers: of the prompts of ``reading``, for more outputs that begin.
        """
        then, picked_then = self._written.take() if numbers else ([], [])
        hold = self._written.want_held
        logits_RV = self.rows.begin(keep, picked, reading, picked_then, hold)
        if self._draft_rows:
            self._draft_rows.begin(keep, picked, numbers, picked_then, hold)
        if begun := [*fresh, *then]:
            self._hear(begun, logits_RV[:, None], no_drafts(len(begun)))

    def write(self) -> None:
        """One pass over all rows."""
        running, rows = self._written.running, self.rows
        drafts = self._draft_rows.draft(running, rows.room - 1) if self._draft_rows else no_drafts(len(running))
        last_R1 = torch.tensor([[output.last] for output in running], device=drafts.tokens_RN.device)
        before_R = rows.lengths_R
        accepted = self._hear(running, rows.write(torch.cat([last_R1, drafts.tokens_RN], dim=1)), drafts)
        if drafts.tokens_RN.shape[1]:
            rows.cut(before_R + 1 + torch.tensor(accepted))

    def _hear(self, some: Sequence[Writing], logits_RMV: torch.Tensor, drafts: Drafts) -> list[int]:
        """How many drafts of each are accepted."""
        numbers, positions = [output.number for output in some], [output.position for output in some]
        heard = self._choose.accept(logits_RMV, drafts, numbers, positions)
        for output, tokens, drafted in zip(some, heard, drafts.counts, strict=True):
            output.hear(tokens, drafted, self._stops)
        self._progress(self._written.ended)
        return [len(tokens) - 1 for tokens in heard]


@torch.no_grad()
def decode_refilled(
    model: PreTrainedModel,
    outputs: Sequence[Writing],
    prompts: Prompts,
    choose: Chooser,
    stops: set[int],
    batch_size: int,
    progress: Callable[[int], object],
    draft_rows: DraftRows | None = None,
) -> None:
    """Write all outputs, begun in their order, as many at a time as ``batch_size``. Those of a prompt are neighbours.

    What runs together depends on the outputs alone. All ranks call it together where the model is partitioned: each
    takes as many passes as the one that has most to do.

    Args:
        progress: is told how many have ended.
        draft_rows: of a model that drafts, and has read nothing yet.
    """
    written = _Outputs(outputs, batch_size)
    work = _Work(model, written, choose, stops, progress, draft_rows)
    rows, together = work.rows, needs_all_ranks(model)
    nothing = prompts.read_tokens([PADDING])
    reads = _TABLE if prompts.table is None else _PASS

    def a_pass_is_needed(needs: int) -> bool:
        """By any rank."""
        most = max_over_ranks(needs) if together else needs
        rows.others_look_up = together and most == _TABLE
        return most != _NOTHING

    if a_pass_is_needed(reads if prompts.shared else _NOTHING):
        if prompts.shared:
            rows.read_shared(prompts.read_tokens(prompts.shared))
        else:
            rows.run_along(nothing)
    while True:
        reading = None
        if written.is_time() or rows.room <= 0:
            keep = written.drop_ended()
            fresh, picked = written.take()
            if numbers := written.to_read():
                reading = prompts.read(numbers, rows.shared)
            elif keep or fresh:
                work.begin(keep, fresh, picked)
        if not a_pass_is_needed(reads if reading else _TABLE if written.running else _NOTHING):
            return
        if reading:
            work.begin(keep, fresh, picked, numbers, reading)
        elif written.running:
            work.write()
        else:
            rows.run_along(nothing)
