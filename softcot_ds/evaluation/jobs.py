"""Work of an evaluation, cut into fixed batches, done over the ranks and kept on disk: ``outputs/HASH/`` of a run.

The hash is of all that decides the results, by content and never by path. Each finished batch is written at once, so an
interrupted evaluation goes on where it was.
"""

import hashlib
import json
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import fsum
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers
from transformers import PreTrainedModel

from softcot_ds import __version__
from softcot_ds.agreement import agree
from softcot_ds.backbone_config import SPLIT, Partition
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import from_all_ranks, is_main, on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.report import Record
from softcot_ds.files import cannot_write, content_digest, write_atomically
from softcot_ds.models.backbone import Change, load_to_run, partition_that_fits
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.partition import data_ranks, quantization
from softcot_ds.models.reading import PADDING
from softcot_ds.models.server import Server
from softcot_ds.planning.fit import spare_to_decode
from softcot_ds.progress import Progress
from softcot_ds.recipe import ModelConfig, Recipe

Result = TypeVar("Result")
Work = Callable[[PreTrainedModel, CompactTable | None, list[int], list[int]], list[list[Result]]]
"""From the model, or the server that has it, a table to embed prompts by (None to ask the model), the indices of a
batch's prompts and the draws that are wanted, to the results of each draw, which are dataclasses or JSON values."""
Prepare = Callable[[PreTrainedModel], object]
Cut = Callable[[Sequence[int], int], list[list[int]]]
"""From rows' lengths and ``evaluation.batch_size`` to the indices of each batch. It depends on nothing else, so that
results do not depend on the number of ranks or on where an earlier evaluation was interrupted."""


def neighbours(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows that are alike in length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Thoughts:
    """What stands for the thoughts under one condition."""

    of: Callable[[list[int]], torch.Tensor]
    """From indices of B problems to their (B, T, D) thoughts."""
    count: int
    """T."""
    made_from: Record
    """All that decides them, by content."""
    need_states: bool = False
    """Whether they come from the assistant's states."""
    reads: int = 0
    """Tokens and latents of all problems that the base reads for them, before it reads the prompts with them."""

    def __call__(self, indices: list[int]) -> torch.Tensor:
        return self.of(indices)

    def picked(self, problems: Sequence[int]) -> "Thoughts":
        """For prompts of these problems, in this order, of which one may have several or none."""
        made_from = {"of problems": content_digest(list(problems)), "among": self.made_from}
        return replace(self, of=lambda indices: self.of([problems[index] for index in indices]), made_from=made_from)


class Job(Generic[Result]):
    """What is to be done with some prompts, cut into batches; on disk, what has been.

    A batch is one line of the ``*.batches`` file of the process that did it, behind a checksum over it and all that
    decides the results. So what was damaged, cut short or written for something else is found, and done again.
    """

    results: list[Result] | None = None
    """Of all prompts, in their order, once all are done."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Sequence[int]],
        settings: Record,
        folder: Path,
        work: Work[Result],
        read: Callable[[Any], Result],
        cut: Cut,
        draw: int = 0,
        prepare: Prepare = lambda model: None,
    ) -> None:
        """
        Args:
            name: for messages.
            rows: the tokens of each prompt, and those that are read after it.
            settings: all that decides the results, JSON values.
            read: from a result as JSON has it to the result.
            draw: which of several that are drawn at random; what they are drawn by is among the settings.
            prepare: what is to be done with the model before a batch, and is no part of what this takes.

        Raises:
            SoftCoTError: the folder cannot be written to.
        """
        self.name = name
        self.draw = draw
        self.work = work
        self.prepare = prepare
        self.tokens = {PADDING}.union(*rows)
        self.batches = cut([len(row) for row in rows], settings["batch_size"])
        self.key = content_digest(settings)
        self._read = read
        self._folder = folder / self.key[:16]
        self._file = self._folder / f"{uuid.uuid4().hex}.batches"
        self.done: dict[int, list[Result]] = {}
        self.took: dict[int, float] = {}
        """Seconds of each batch that is done: of a rank, or of all that worked on it together."""
        for number, results, seconds in on_main(lambda: self._open(settings)):
            self.add(number, results, seconds)
        self.todo = [number for number in range(len(self.batches)) if number not in self.done]

    @property
    def seconds(self) -> float:
        """Of all batches that are done."""
        return fsum(self.took.values())

    def add(self, number: int, results: list[Result], seconds: float) -> None:
        """A batch that is done."""
        self.done[number], self.took[number] = results, seconds

    def write(self, number: int, results: Sequence[Result], seconds: float) -> None:
        """Add a batch to the files in one write. Raises SoftCoTError when the disk is full."""
        line = json.dumps({"batch": number, "seconds": seconds, "outputs": list(results)}, default=_as_json).encode()
        try:
            with self._file.open("ab") as file:
                file.write(self._checksum(line) + b" " + line + b"\n")
        except OSError as error:
            raise cannot_write(self._file, error, kept="finished batches are kept") from error

    def _open(self, settings: Record) -> list[tuple[int, list[Result], float]]:
        """Batches with their results and seconds, from every process that ever worked on this."""
        done = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / "settings.json", json.dumps(settings, indent=2) + "\n")
            for path in sorted([*self._folder.glob("*.batches"), *self._folder.glob("*.part")]):  # of older versions
                for line in path.read_bytes().split(b"\n"):
                    checksum, _, content = line.partition(b" ")
                    if checksum == self._checksum(content):
                        record = json.loads(content)
                        if "seconds" in record:  # older versions kept none: done again, they are known
                            results = [self._read(value) for value in record["outputs"]]
                            done.append((record["batch"], results, record["seconds"]))
        except OSError as error:
            raise SoftCoTError(
                f"cannot keep outputs in {self._folder}: {error}; see to it, or set output_dir"
            ) from error
        return done

    def _checksum(self, content: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + content).hexdigest().encode()


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, array) else asdict(value)


class Loaded:
    """The model that was loaded last: evaluations of one command, of adapters of one base, load it once."""

    def __init__(self) -> None:
        self._key: Record | None = None
        self._model: PreTrainedModel | None = None

    def model(self, key: Record, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model of this key; another one is let go before it is loaded."""
        if key != self._key:
            self.release()
            self._model = load()
            self._key = key
        return self._model

    def release(self) -> None:
        """Let the model go."""
        self._key = self._model = None


class Worker:
    """Does jobs with one of the recipe's models, over the ranks. It is loaded when there is something to do."""

    def __init__(
        self,
        recipe: Recipe,
        model_config: ModelConfig,
        fingerprint: str,
        loaded: Loaded | None = None,
        change: Change | None = None,
        server: Server | None = None,
    ) -> None:
        """
        Args:
            loaded: what other workers, before or after this one, have loaded or may use.
            change: what makes another model of it.
            server: who has the model, in the place of this process; None where it is loaded here.
        """
        self.server = server
        self._change = change
        self.recipe = recipe
        self.model_config = model_config
        self._fingerprint = fingerprint
        self._loaded = loaded or Loaded()
        self._jobs: dict[str, Job] = {}

    def job(
        self,
        name: str,
        prompts: Sequence[BasePrompt],
        thoughts: Thoughts | None,
        settings: Record,
        work: Work[Result],
        read: Callable[[Any], Result],
        texts: Sequence[list[int]] | None = None,
        cut: Cut = neighbours,
        draw: int = 0,
        prepare: Prepare = lambda model: None,
    ) -> Job[Result]:
        """What is to be done; the same job for what was wanted before, under whatever name.

        Everything that decides the results is a setting of the job. What is not: the number of ranks, the partition,
        the kind of processor and the draws that are made together, which change how a sum is rounded at most; the text
        of a question.

        Args:
            settings: what decides the results beside model, prompts and thoughts, JSON values.
            texts: tokens that are read after each prompt; None where there are none.

        The others are those of ``Job``.

        Raises:
            SoftCoTError: the results cannot be kept on disk, or another rank would do something else, because it sees
                other files.
        """
        settings = self._settings(prompts, thoughts) | settings
        key = content_digest(settings)
        if key not in self._jobs:
            agree({f"{name}: {key}": value for key, value in settings.items()})
            rows = [
                [*prompt.prefix_ids, *prompt.suffix_ids, *text]
                for prompt, text in zip(prompts, texts or [[]] * len(prompts), strict=True)
            ]
            folder = self.recipe.evaluation.outputs or self.recipe.run_dir / "outputs"
            self._jobs[key] = Job(name, rows, settings, folder, work, read, cut, draw, prepare)
        return self._jobs[key]

    def _settings(self, prompts: Sequence[BasePrompt], thoughts: Thoughts | None) -> Record:
        """JSON values, of which with those of the kind of job its key is the hash."""
        return {
            **self._weights(),
            # As the model reads them: wording, chat template, tokenizer and problems are all in there.
            "prompts": content_digest([[prompt.prefix_ids, prompt.suffix_ids] for prompt in prompts]),
            "thoughts": thoughts and thoughts.made_from,
            # It decides what runs together and the padding, and so the rounding.
            "batch_size": self.recipe.evaluation.batch_size,
            # They hold the code that turns all this into tokens.
            "versions": {"softcot_ds": __version__, "transformers": transformers.__version__},
        }

    @property
    def _wanted(self) -> Partition:
        return self.recipe.evaluation.partition or self.recipe.backbone.partition

    @cached_property
    def _partition(self) -> Partition:
        if self.server:
            return "none"
        bits = self.recipe.bits_of(self.model_config)
        return partition_that_fits(self.model_config, self._wanted, self.recipe.backbone.group_size, bits)

    def _weights(self) -> Record:
        """What decides the model's results, but for rounding."""
        if self.server:
            served = {"vllm": self.server.version, "context": self.server.context}
            return {"model": self._fingerprint, "served by": served}
        return {
            "model": self._fingerprint,
            "dtype": self.model_config.dtype,
            "attention": self.model_config.attention,
            "quantized": self._quantized(),
        } | ({"changed by": self._change.made_from} if self._change else {})

    def _quantized(self) -> Record:
        """How the weights differ from those in the model's files: mostly not at all."""
        bits = self.recipe.bits_of(self.model_config)
        return (quantization(self.recipe) if self._wanted in SPLIT else {}) | ({} if bits == 16 else {"bits": bits})

    @property
    def model(self) -> PreTrainedModel:
        """It, loaded. All ranks call it together. Raises SoftCoTError when it cannot be."""
        spare_of = partial(spare_to_decode, self.recipe, self._partition)
        held = {"partition": self._partition, "group_size": self.recipe.backbone.group_size}
        return self._loaded.model(
            self._weights() | held,
            lambda: load_to_run(self.model_config, self.recipe, self._partition, spare_of, self._change),
        )

    def run(self, job: Job[Result], *others: Job[Result]) -> list[Result]:
        """The results of all prompts, in their order, on every rank.

        Args:
            others: the same of other draws, which are wanted next and done along with it.
        """
        if job.results is not None:
            return job.results
        jobs = {each.key: each for each in (job, *others) if each.results is None}
        for each in jobs.values():
            if each.done:
                say(f"{each.name}: {len(each.done)} of {len(each.batches)} batches were done before")
        fresh = self._do_rest(list(jobs.values()))
        # The other ranks are asked: their files may not be seen yet from here.
        for part in from_all_ranks(fresh):
            for key, *batch in part:
                jobs[key].add(*batch)
        for each in jobs.values():
            by_index = {
                index: result
                for number, batch in enumerate(each.batches)
                for index, result in zip(batch, each.done[number], strict=True)
            }
            each.results = [by_index[index] for index in range(len(by_index))]
        return job.results

    def _do_rest(self, jobs: Sequence[Job[Result]]) -> list[tuple[str, int, list[Result], float]]:
        """What this rank has done of the jobs, which are the same but for the draw: key, batch, results, and seconds,
        of which each draw has its part."""
        first = jobs[0]
        todo = sorted({number for job in jobs for number in job.todo})
        fresh: list[tuple[str, int, list[Result], float]] = []
        if not todo:
            return fresh
        ranks = data_ranks(self._partition, self.recipe.backbone.group_size)
        table = None
        if self._partition != "none":  # ranks that hold the model together load it together, also without a batch
            table = CompactTable.of(self.model.get_input_embeddings(), first.tokens)
        name = first.name if len(jobs) == 1 else f"{first.name} and {len(jobs) - 1} draws more"
        progress = Progress(len(todo), "batch", several="batches", name=name, speaks=is_main())
        for start in range(0, len(todo), ranks.count):
            mine = start + ranks.number < len(todo)
            # Partitioned, a rank without work still takes part: each forward pass needs other ranks.
            if mine or self._partition in SPLIT:
                number = todo[start + ranks.number if mine else start]
                wanted = [job for job in jobs if number in job.todo]
                model: Any = self.server or self.model
                if not self.server:
                    first.prepare(model)
                started = time.perf_counter()
                of_draws = first.work(model, table, first.batches[number], [job.draw for job in wanted])
                seconds = (time.perf_counter() - started) * ranks.alike / len(wanted)
                for job, results in zip(wanted, of_draws, strict=True):
                    if mine and ranks.is_first:
                        job.write(number, results, seconds)
                        fresh.append((job.key, number, results, seconds))
            progress.show(min(start + ranks.count, len(todo)))
        return fresh
