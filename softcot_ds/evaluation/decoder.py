"""Decoding prompts in fixed batches over the ranks, and keeping what was decoded: ``outputs/HASH/`` of a run.

The hash is of all that decides the outputs, by content and never by path. Each finished batch is written at once, so an
interrupted evaluation goes on where it was.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from softcot_ds import __version__
from softcot_ds.agreement import agree
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import from_all_ranks, on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.report import Record
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.models.backbone import partition_that_fits
from softcot_ds.models.decoding import PADDING, Output, Sampling, decode, load_to_decode
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.partition import data_ranks, quantization
from softcot_ds.planning.fit import spare_to_decode
from softcot_ds.progress import Progress
from softcot_ds.recipe import SPLIT, ModelConfig, Partition, Recipe


@dataclass(frozen=True)
class Thoughts:
    """What stands for the thoughts under one condition."""

    of: Callable[[list[int]], torch.Tensor]
    """From indices of B problems to their (B, T, D) thoughts."""
    made_from: Record
    """All that decides them, by content."""
    need_states: bool = False
    """Whether they come from the assistant's states."""

    def __call__(self, indices: list[int]) -> torch.Tensor:
        return self.of(indices)


class Job:
    """What is to be decoded in one round, cut into batches; on disk, what has been.

    A batch is one line of a ``*.part`` file, behind a checksum over it and all that decides the outputs. So what was
    damaged, cut short or written for something else is found, and done again.
    """

    outputs: list[Output] | None = None
    """Of all prompts, in their order, once all are done."""

    def __init__(
        self,
        name: str,
        prompts: Sequence[BasePrompt],
        thoughts: Thoughts | None,
        sampling: Sampling,
        draw: int,
        settings: Record,
        folder: Path,
    ) -> None:
        """Raises SoftCoTError when the folder cannot be written to."""
        self.name = name
        self.prompts = prompts
        self.thoughts = thoughts
        self.sampling = sampling
        self.draw = draw
        # The batches depend on the problems alone, so that the outputs do not depend on the number of ranks or on
        # where an earlier evaluation was interrupted.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].prefix_ids) + len(prompts[i].suffix_ids))
        size = settings["batch_size"]
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.key = content_digest(settings)
        self._folder = folder / self.key[:16]
        self._part = self._folder / f"{uuid.uuid4().hex}.part"
        self.done: dict[int, list[Output]] = on_main(lambda: self._open(settings))
        self.todo = [number for number in range(len(self.batches)) if number not in self.done]

    def write(self, number: int, outputs: Sequence[Output]) -> None:
        """Add a batch in one write. Raises SoftCoTError when the disk is full."""
        line = json.dumps({"batch": number, "outputs": [asdict(output) for output in outputs]}).encode()
        try:
            with self._part.open("ab") as file:
                file.write(self._checksum(line) + b" " + line + b"\n")
        except OSError as error:
            raise cannot_write(self._part, error, kept="finished batches are kept") from error

    def _open(self, settings: Record) -> dict[int, list[Output]]:
        """Outputs by batch, from every process that ever worked on this."""
        done = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / "settings.json", json.dumps(settings, indent=2) + "\n")
            for path in sorted(self._folder.glob("*.part")):
                for line in path.read_bytes().split(b"\n"):
                    checksum, _, content = line.partition(b" ")
                    if checksum == self._checksum(content):
                        record = json.loads(content)
                        done[record["batch"]] = [Output(**output) for output in record["outputs"]]
        except OSError as error:
            raise SoftCoTError(
                f"cannot keep outputs in {self._folder}: {error}; see to it, or set output_dir"
            ) from error
        return done

    def _checksum(self, content: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + content).hexdigest().encode()


class Decoder:
    """Decodes problems in fixed batches over the ranks. The model is loaded when there is something to decode."""

    def __init__(
        self, recipe: Recipe, model_config: ModelConfig, fingerprint: str, stop_ids: list[int], context: int
    ) -> None:
        """``context`` is the longest sequence that the model takes, tokens."""
        self._recipe = recipe
        self._model_config = model_config
        self._fingerprint = fingerprint
        self._stop_ids = stop_ids
        self._context = context
        self._jobs: dict[str, Job] = {}

    def job(
        self,
        name: str,
        prompts: Sequence[BasePrompt],
        thoughts: Thoughts | None,
        sampling: Sampling,
        draw: int = 0,
    ) -> Job:
        """What is to be decoded; the same job for what was asked before, under whatever name.

        Everything that decides the outputs is a setting of the job. What is not: the number of ranks, the partition
        and the kind of processor, which change how a sum is rounded at most; the text of a question or of its answer.

        Args:
            name: for messages.
            draw: tells rounds apart that are sampled from the same prompts: each has random numbers of its own.

        Raises:
            SoftCoTError: a prompt fills the model's context, the outputs cannot be kept on disk, or another rank would
                decode something else, because it sees other files.
        """
        settings = self._settings(prompts, thoughts, sampling, draw)
        key = content_digest(settings)
        if key not in self._jobs:
            self._check_room(name, prompts, thoughts, sampling.max_new_tokens)
            agree({f"{name}: {key}": value for key, value in settings.items()})
            folder = self._recipe.run_dir / "outputs"
            self._jobs[key] = Job(name, prompts, thoughts, sampling, draw, settings, folder)
        return self._jobs[key]

    def _check_room(
        self, name: str, prompts: Sequence[BasePrompt], thoughts: Thoughts | None, max_new_tokens: int
    ) -> None:
        longest = max(len(prompt.prefix_ids) + len(prompt.suffix_ids) for prompt in prompts)
        longest += self._recipe.thoughts.count if thoughts is not None else 0
        room = self._context - longest
        if room < 1:
            raise SoftCoTError(
                f"{name}: the longest prompt has {longest} tokens, which leaves no room for an answer in the "
                f"{self._context} that {self._model_config.model} takes; leave long problems out with task.max_tokens"
            )
        if room < max_new_tokens:
            say(f"{name}: the longest prompt leaves room for {room} tokens; its output is cut there")

    def _settings(
        self, prompts: Sequence[BasePrompt], thoughts: Thoughts | None, sampling: Sampling, draw: int
    ) -> Record:
        """JSON values, which the key of a job is the hash of."""
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": self._recipe.seed}
        if draw:  # the first keeps the key that it had when there was no other
            drawn["draw"] = draw
        return {
            "model": self._fingerprint,
            "dtype": self._model_config.dtype,
            "attention": self._model_config.attention,
            "quantized": self._quantized(),
            # As the model reads them: wording, chat template, tokenizer and problems are all in there.
            "prompts": content_digest([[prompt.prefix_ids, prompt.suffix_ids] for prompt in prompts]),
            "thoughts": thoughts and thoughts.made_from,
            "stop_ids": self._stop_ids,
            "max_new_tokens": sampling.max_new_tokens,
            "sampling": drawn if sampling.temperature else "greedy",
            # It decides the padding, and so the rounding; and what is sampled together.
            "batch_size": self._recipe.evaluation.batch_size,
            # They hold the code that turns all this into tokens.
            "versions": {"softcot_ds": __version__, "transformers": transformers.__version__},
        }

    @property
    def _wanted(self) -> Partition:
        return self._recipe.evaluation.partition or self._recipe.backbone.partition

    @cached_property
    def _partition(self) -> Partition:
        bits = self._recipe.bits_of(self._model_config)
        return partition_that_fits(self._model_config, self._wanted, self._recipe.backbone.group_size, bits)

    def _quantized(self) -> Record:
        """How the weights differ from those in the model's files: mostly not at all."""
        bits = self._recipe.bits_of(self._model_config)
        return (quantization(self._recipe) if self._wanted in SPLIT else {}) | ({} if bits == 16 else {"bits": bits})

    @cached_property
    def _model(self) -> PreTrainedModel:
        spare_of = partial(spare_to_decode, self._recipe, self._partition)
        return load_to_decode(self._model_config, self._recipe, self._partition, spare_of)

    def run(self, job: Job) -> list[Output]:
        """The outputs of all prompts, in their order, on every rank."""
        if job.outputs is not None:
            return job.outputs
        if job.done:
            say(f"{job.name}: {len(job.done)} of {len(job.batches)} batches were done before")
        fresh = self._decode_rest(job) if job.todo else {}
        # The other ranks are asked: their files may not be seen yet from here.
        everything = job.done | {number: outputs for part in from_all_ranks(fresh) for number, outputs in part.items()}
        by_index = {
            index: output
            for number, batch in enumerate(job.batches)
            for index, output in zip(batch, everything[number], strict=True)
        }
        job.outputs = [by_index[index] for index in range(len(job.prompts))]
        return job.outputs

    def _decode_rest(self, job: Job) -> dict[int, list[Output]]:
        """Outputs by batch, of those that this rank has written."""
        ranks = data_ranks(self._partition, self._recipe.backbone.group_size)
        table = None
        if self._partition != "none":  # ranks that hold the model together load it together, also without a batch
            tokens = {PADDING}.union(*(prompt.prefix_ids + prompt.suffix_ids for prompt in job.prompts))
            table = CompactTable.of(self._model.get_input_embeddings(), tokens)
        progress = Progress(len(job.todo), "batches")
        fresh = {}
        for start in range(0, len(job.todo), ranks.count):
            mine = start + ranks.number < len(job.todo)
            # Partitioned, a rank without work still takes part: each forward pass needs other ranks.
            if mine or self._partition in SPLIT:
                number = job.todo[start + ranks.number if mine else start]
                outputs = self._decode(job, number, table)
                if mine and ranks.is_first:
                    job.write(number, outputs)
                    fresh[number] = outputs
            if line := progress.line(min(start + ranks.count, len(job.todo))):
                say(f"{job.name:9} {line}")
        return fresh

    def _decode(self, job: Job, number: int, table: CompactTable | None) -> list[Output]:
        batch = job.batches[number]
        model, prompts = self._model, [job.prompts[index] for index in batch]
        thoughts = None if job.thoughts is None else job.thoughts(batch)
        torch.manual_seed(batch_seed(self._recipe.seed, number, job.draw))
        return decode(model, prompts, thoughts, self._stop_ids, job.sampling, table)


def batch_seed(seed: int, number: int, draw: int = 0) -> int:
    """A seed of 64 bits for a batch: the same on any rank, another for every batch and draw, whatever the recipe's."""
    text = f"{seed}/{number}/{draw}" if draw else f"{seed}/{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def content_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
