"""Accuracy of an adapter with its controls: ``softcot-ds evaluate RECIPE``, or ``softcot-ds evaluate ADAPTER_DIR``.

Every condition is decoded on the same problems with the same settings; what differs is what stands for the thoughts:

    learned    the projected thoughts of the question
    shuffled   the projected thoughts of another question
    mean       the average of the projected thoughts of all problems
    zero       zero vectors
    none       nothing: the prompt without thoughts
    text       the assistant's words in the prompt (the paper's Assist-CoT)
    static     a learned prompt of free vectors, from the adapter of a projection.kind=static run

Each finished batch is written at once, so an interrupted evaluation goes on where it was. In the run's directory:

    outputs/HASH/              what was decoded; the hash is of all that decides it, by content and never by path
    evaluation/step-N-HASH/    an evaluation: its report, and every prompt, output and verdict by condition
    report.json                the report of the fullest one (report.py)
"""

import hashlib
import json
import random
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from softcot_ds import __version__
from softcot_ds.adapter import AdapterConfig, load_adapter, train_summary
from softcot_ds.agreement import agree
from softcot_ds.backbone import context_length, load_to_run, weights_fingerprint, width
from softcot_ds.command import recipe_command
from softcot_ds.decoding import Output, Sampling, decode, try_decoding
from softcot_ds.distributed import device, from_all_ranks, init_distributed, on_main, rank, say, world_size
from softcot_ds.errors import SoftCoTError
from softcot_ds.examples import Example
from softcot_ds.experiment import Experiment
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.methods.base import Projection, projection_class
from softcot_ds.metrics import flatten
from softcot_ds.partition import quantization
from softcot_ds.progress import Progress
from softcot_ds.prompts import AssistantInput, BasePrompt
from softcot_ds.recipe import Condition, ModelConfig, Recipe
from softcot_ds.report import Record, make_report, table, write_results
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.thought_reader import read_all_thoughts, states_dtype


def evaluate(recipe: Recipe, adapter: Path) -> Record:
    """Evaluate an adapter under the recipe's conditions; writes and returns the report.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models; a condition cannot be met. Said before a
            model is loaded.
    """
    init_distributed(recipe.training.timeout_minutes)
    agree({"the adapter": adapter, **flatten(recipe.model_dump(mode="json"))})
    config = AdapterConfig.load(adapter)
    config.check_models(recipe, assistant=projection_class(config.projection).needs_states)
    if config.projection != recipe.projection.kind:
        raise SoftCoTError(
            f"{adapter} is a {config.projection} projection and projection.kind is {recipe.projection.kind}; "
            f"set it to {config.projection}"
        )
    trained = train_summary(adapter)
    experiment = Experiment(recipe)
    examples = experiment.splits.test
    if not examples:
        raise SoftCoTError("there is no test problem to evaluate on; check task.test and task.max_tokens")
    for note in experiment.splits.notes:
        say(f"data: {note}")
    say(f"evaluating {adapter} on {len(examples)} problems")

    inputs = _Inputs(recipe, experiment, examples, adapter)
    names, limit = recipe.evaluation.conditions, recipe.evaluation.max_new_tokens
    decoder = _Decoder(
        recipe,
        recipe.base,
        config.base.fingerprint,
        experiment.base_prompts.stop_ids,
        context_length(experiment.base_config),
    )
    jobs = {name: decoder.job(name, *inputs.of(name), limit) for name in names if name != "text"}
    if "text" in names:  # last, as it may run the assistant: all the others have been checked then
        inputs.words = _assistant_words(recipe, experiment, examples)
        jobs["text"] = decoder.job("text", *inputs.of("text"), limit)
    if any(job.todo and job.thoughts is not None and job.thoughts.need_states for job in jobs.values()):
        inputs.read_states()  # now, as it may load the assistant: not beside the base
    outputs: dict[str, list[Output]] = {}
    for job in jobs.values():
        if job.key not in outputs:  # of free vectors, learned and shuffled are the same
            outputs[job.key] = decoder.run(job)
    records = {name: _grade(outputs[jobs[name].key], jobs[name], examples, experiment) for name in names}
    report = make_report(recipe, adapter, config, trained, records)
    folder = recipe.run_dir / "evaluation" / f"step-{config.step}-{_evaluation_hash(recipe, jobs, examples)}"
    written = on_main(lambda: write_results(recipe.run_dir, folder, records, report))
    say(f"{table(report)}\n{written}")
    return report


@dataclass(frozen=True)
class _Thoughts:
    """What stands for the thoughts under one condition."""

    of: Callable[[list[int]], torch.Tensor]
    """From indices of B problems to their (B, T, D) thoughts."""
    made_from: Record
    """All that decides them, by content."""
    need_states: bool = False
    """Whether they come from the assistant's states."""

    def __call__(self, indices: list[int]) -> torch.Tensor:
        return self.of(indices)


class _Inputs:
    """Prompts and thoughts of each condition."""

    def __init__(self, recipe: Recipe, experiment: Experiment, examples: Sequence[Example], adapter: Path) -> None:
        self._recipe = recipe
        self._experiment = experiment
        self._examples = examples
        self._projection = load_adapter(adapter, experiment)
        self.words: list[str] = []

    def of(self, condition: Condition) -> tuple[list[BasePrompt], _Thoughts | None]:
        """Raises SoftCoTError when the condition cannot be met. No model is loaded for it, nor states read."""
        prompts = self._experiment.base_prompts
        questions = [example.problem.question for example in self._examples]
        if condition == "none":
            return [prompts.without_thoughts(question) for question in questions], None
        if condition == "text":
            return [prompts.with_words(*pair) for pair in zip(questions, self.words, strict=True)], None
        thoughts: dict[str, Callable[[], _Thoughts]] = {
            "learned": lambda: self._projected(range(len(questions))),
            "shuffled": lambda: self._projected(others([e.assistant for e in self._examples], self._recipe.seed)),
            "mean": self._mean,
            "zero": self._zero,
            "static": self._static,
        }
        return [BasePrompt(example.prefix_ids, example.suffix_ids) for example in self._examples], thoughts[condition]()

    def read_states(self) -> torch.Tensor:
        """(problems, T, P) assistant states, read once; without a cache of them the assistant is loaded for it."""
        return self._hidden

    @cached_property
    def _hidden(self) -> torch.Tensor:
        return read_all_thoughts(self._experiment, self._examples)

    def _projected(self, whose: Sequence[int]) -> _Thoughts:
        """For problem i the thoughts of problem ``whose[i]``."""
        projection = self._projection
        if not projection.needs_states:
            return _repeated(projection)

        @torch.no_grad()
        def of(indices: list[int]) -> torch.Tensor:
            return projection(self._hidden[[whose[index] for index in indices]].float(), len(indices))

        return _Thoughts(of, self._projection_of(whose), need_states=True)

    def _mean(self) -> _Thoughts:
        projection = self._projection
        if not projection.needs_states:
            return _repeated(projection)

        @cache
        @torch.no_grad()
        def mean() -> torch.Tensor:
            if projection.is_affine:
                return projection(self._hidden.float().mean(dim=0, keepdim=True), 1)
            total = sum(projection(some.float(), len(some)).double().sum(dim=0) for some in self._hidden.split(256))
            return (total / len(self._hidden)).float()[None]

        made_from = {"mean of": self._projection_of(range(len(self._examples)))}
        return _Thoughts(lambda indices: mean().expand(len(indices), -1, -1), made_from, need_states=True)

    def _projection_of(self, whose: Sequence[int]) -> Record:
        """What decides the projected thoughts of these problems, in this order. Not whether the states are read from a
        cache or computed now: by that, too, at most rounding differs.
        """
        assistant = self._recipe.assistant
        inputs = [self._examples[index].assistant for index in whose]
        return {
            "projection": self._projection_digest,
            "assistant": self._assistant_fingerprint,
            "dtype": assistant.dtype,
            "attention": assistant.attention,
            "read as": states_dtype(self._recipe),
            "inputs": _digest([[item.token_ids, item.positions] for item in inputs]),
        }

    @cached_property
    def _projection_digest(self) -> str:
        return _weights_digest(self._projection)

    @cached_property
    def _assistant_fingerprint(self) -> str:
        return weights_fingerprint(self._recipe.assistant)

    def _zero(self) -> _Thoughts:
        shape = self._recipe.thoughts.count, width(self._experiment.base_config)
        return _Thoughts(lambda indices: torch.zeros(len(indices), *shape, device=device()), {"zeros": shape})

    def _static(self) -> _Thoughts:
        folder = self._recipe.evaluation.static_adapter
        try:
            config = AdapterConfig.load(folder)
            config.check_models(self._recipe, assistant=False)
            if config.projection != "static":
                raise SoftCoTError(f"{folder} is a {config.projection} projection, not static")
            return _repeated(load_adapter(folder, self._experiment))
        except SoftCoTError as error:
            raise SoftCoTError(f"evaluation.static_adapter: {error}") from error


def _repeated(projection: Projection) -> _Thoughts:
    """The same for every problem: ``learned``, ``shuffled`` and ``mean`` of free vectors are decoded once."""
    made_from = {"free vectors": _weights_digest(projection)}
    return _Thoughts(lambda indices: projection(None, len(indices)).detach(), made_from)


def others(inputs: Sequence[AssistantInput], seed: int) -> list[int]:
    """For each input the index of another one, which is not the same tokens; each is used once.

    Raises:
        SoftCoTError: that is impossible, because more than half of the inputs are the same, as one alone is.
    """
    order = random.Random(seed).sample(range(len(inputs)), len(inputs))
    alike: dict[tuple[int, ...], list[int]] = {}
    for index in order:
        alike.setdefault(tuple(inputs[index].token_ids), []).append(index)
    most = max(len(group) for group in alike.values())
    if 2 * most > len(inputs):
        raise SoftCoTError(
            f"the condition shuffled gives each question another one's thoughts, but {most} of the {len(inputs)} test "
            "problems are the same to the assistant; raise task.test_problems, or leave shuffled out of "
            "evaluation.conditions"
        )
    # A rotation of a random order with like beside like, by more than the likes of any: nobody keeps their own.
    order = [index for group in alike.values() for index in group]
    taken = dict(zip(order, order[most:] + order[:most], strict=True))
    return [taken[index] for index in range(len(inputs))]


class _Job:
    """What is to be decoded under one condition, cut into batches; on disk, what has been.

    A batch is one line of a ``*.part`` file, behind a checksum over it and all that decides the outputs. So what was
    damaged, cut short or written for something else is found, and done again.
    """

    def __init__(
        self, name: str, prompts: Sequence[BasePrompt], thoughts: _Thoughts | None, settings: Record, folder: Path
    ) -> None:
        """Raises SoftCoTError when the folder cannot be written to."""
        self.name = name
        self.prompts = prompts
        self.thoughts = thoughts
        self.max_new_tokens: int = settings["max_new_tokens"]
        # The batches depend on the problems alone, so that the outputs do not depend on the number of ranks or on
        # where an earlier evaluation was interrupted.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].prefix_ids) + len(prompts[i].suffix_ids))
        size = settings["batch_size"]
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.key = _digest(settings)
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


class _Decoder:
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
        self._partition = recipe.evaluation.partition or recipe.backbone.partition

    def job(self, name: str, prompts: Sequence[BasePrompt], thoughts: _Thoughts | None, max_new_tokens: int) -> _Job:
        """Everything that decides the outputs is a setting of the job. What is not: the number of ranks, the partition
        and the kind of processor, which change how a sum is rounded at most; the text of a question or of its answer.

        Raises:
            SoftCoTError: a prompt fills the model's context, the outputs cannot be kept on disk, or another rank would
                decode something else, because it sees other files.
        """
        evaluation = self._recipe.evaluation
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
        sampling = {"temperature": evaluation.temperature, "top_p": evaluation.top_p, "seed": self._recipe.seed}
        settings = {
            "model": self._fingerprint,
            "dtype": self._model_config.dtype,
            "attention": self._model_config.attention,
            "quantized": quantization(self._recipe) if self._partition == "zero3" else {},
            # As the model reads them: wording, chat template, tokenizer and problems are all in there.
            "prompts": _digest([[prompt.prefix_ids, prompt.suffix_ids] for prompt in prompts]),
            "thoughts": thoughts and thoughts.made_from,
            "stop_ids": self._stop_ids,
            "max_new_tokens": max_new_tokens,
            "sampling": sampling if evaluation.temperature else "greedy",
            # It decides the padding, and so the rounding; and what is sampled together.
            "batch_size": evaluation.batch_size,
            # They hold the code that turns all this into tokens.
            "versions": {"softcot_ds": __version__, "transformers": transformers.__version__},
        }
        agree({f"{name}: {key}": value for key, value in settings.items()})
        return _Job(name, prompts, thoughts, settings, self._recipe.run_dir / "outputs")

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = load_to_run(self._model_config, self._recipe, self._partition)
        try_decoding(model)
        return model

    def run(self, job: _Job) -> list[Output]:
        """The outputs of all prompts, in their order, on every rank."""
        if job.done:
            say(f"{job.name}: {len(job.done)} of {len(job.batches)} batches were done before")
        progress = Progress(len(job.todo), "batches")
        fresh = {}
        for start in range(0, len(job.todo), world_size()):
            mine = start + rank() < len(job.todo)
            # Partitioned, a rank without work still takes part: each forward pass needs all ranks.
            if mine or self._partition == "zero3":
                number = job.todo[start + rank() if mine else start]
                outputs = self._decode(job, number)
                if mine:
                    job.write(number, outputs)
                    fresh[number] = outputs
            if line := progress.line(min(start + world_size(), len(job.todo))):
                say(f"{job.name:9} {line}")
        # The other ranks are asked: their files may not be seen yet from here.
        everything = job.done | {number: outputs for part in from_all_ranks(fresh) for number, outputs in part.items()}
        by_index = {
            index: output
            for number, batch in enumerate(job.batches)
            for index, output in zip(batch, everything[number], strict=True)
        }
        return [by_index[index] for index in range(len(job.prompts))]

    def _decode(self, job: _Job, number: int) -> list[Output]:
        evaluation = self._recipe.evaluation
        batch = job.batches[number]
        model, prompts = self._model, [job.prompts[index] for index in batch]
        thoughts = None if job.thoughts is None else job.thoughts(batch)
        sampling = Sampling(job.max_new_tokens, evaluation.temperature, evaluation.top_p)
        torch.manual_seed(batch_seed(self._recipe.seed, number))
        return decode(model, prompts, thoughts, self._stop_ids, sampling)


def batch_seed(seed: int, number: int) -> int:
    """A seed of 64 bits for a batch: the same on any rank, another for every batch, whatever the recipe's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8])


def _assistant_words(recipe: Recipe, experiment: Experiment, examples: Sequence[Example]) -> list[str]:
    """What the assistant answers in words, for the condition text. The assistant is gone when this returns."""
    prompts = experiment.assistant_prompts
    decoder = _Decoder(
        recipe,
        recipe.assistant,
        weights_fingerprint(recipe.assistant),
        prompts.stop_ids,
        context_length(experiment.assistant_config),
    )
    inputs = [BasePrompt(prompts.words_prompt(example.problem.question), []) for example in examples]
    outputs = decoder.run(decoder.job("assistant", inputs, None, recipe.evaluation.text_max_tokens))
    return [experiment.assistant_tokenizer.decode(output.token_ids) for output in outputs]


def _grade(outputs: Sequence[Output], job: _Job, examples: Sequence[Example], experiment: Experiment) -> list[Record]:
    tokenizer, task = experiment.base_tokenizer, experiment.task
    marker = "" if job.thoughts is None else f"[{experiment.recipe.thoughts.count} thoughts]"
    records = []
    for output, prompt, example in zip(outputs, job.prompts, examples, strict=True):
        text = tokenizer.decode(output.token_ids)
        answer = task.extract(text, output.cut)
        records.append(
            {
                "id": example.problem.id,
                "prompt": tokenizer.decode(prompt.prefix_ids) + marker + tokenizer.decode(prompt.suffix_ids),
                "output": text,
                "cut": output.cut,
                "answer": answer,
                "reference": example.problem.answer,
                "correct": task.is_correct(answer, example.problem),
            }
        )
    return records


def _evaluation_hash(recipe: Recipe, jobs: dict[Condition, _Job], examples: Sequence[Example]) -> str:
    """Of all that decides a report, the references too: none is ever overwritten by another."""
    problems = [[example.problem.question, example.problem.answer] for example in examples]
    return _digest([recipe.task.name, {name: job.key for name, job in jobs.items()}, problems])[:8]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _weights_digest(module: nn.Module) -> str:
    """Of the names, shapes and values of its weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


main = recipe_command(
    "evaluate",
    "Accuracy with controls, of a run's newest adapter or of an adapter directory.",
    evaluate,
    recipe_and_adapter,
)

if __name__ == "__main__":
    sys.exit(main())
