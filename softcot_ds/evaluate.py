"""Accuracy of an adapter with its controls: ``softcot-ds evaluate RECIPE``, or ``softcot-ds evaluate ADAPTER_DIR``.

Every condition is decoded on the same problems with the same settings; what differs is what stands for the thoughts:

    learned    the projected thoughts of the question
    shuffled   the projected thoughts of another question
    mean       the average of the projected thoughts of all problems
    zero       zero vectors
    none       nothing: the prompt without thoughts
    text       the assistant's words in the prompt (the paper's Assist-CoT)
    static     a learned prompt of free vectors, from the adapter of a projection.kind=static run

Each finished batch is written at once, so an interrupted evaluation goes on where it was.
"""

import hashlib
import json
import random
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softcot_ds.backbone import load_frozen
from softcot_ds.checkpoint import AdapterConfig, load_adapter, train_summary
from softcot_ds.cli import recipe_command
from softcot_ds.data import Example
from softcot_ds.decoding import Sampling, decode
from softcot_ds.distributed import barrier, device, init_distributed, on_main, rank, say, world_size
from softcot_ds.engine import decoding_config, hook_partitioned
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.files import write_atomically
from softcot_ds.progress import Progress
from softcot_ds.prompts import BasePrompt
from softcot_ds.recipe import Condition, ModelConfig, Recipe
from softcot_ds.statistics import compare, wilson_interval
from softcot_ds.thought_reader import read_all_thoughts

Record = dict[str, Any]
ThoughtsOf = Callable[[list[int]], torch.Tensor]
"""From indices of B problems to their (B, T, D) thoughts."""


def evaluate(recipe: Recipe, adapter: Path) -> dict[str, Any]:
    """Evaluate an adapter under the recipe's conditions; writes and returns the report.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models.
    """
    init_distributed(recipe.training.timeout_minutes)
    config = AdapterConfig.load(adapter)
    config.check_models(recipe)
    experiment = Experiment(recipe)
    examples = experiment.splits.test
    if not examples:
        raise SoftCoTError("there is no test problem to evaluate on; check task.test and task.max_tokens")
    folder = on_main(lambda: _results_folder(recipe, adapter, config, experiment))
    for note in experiment.splits.notes:
        say(f"data: {note}")
    say(f"evaluating {adapter} on {len(examples)} problems; each output goes to {folder}")

    inputs = _Inputs(recipe, experiment, examples, adapter)
    if "text" in recipe.evaluation.conditions:
        inputs.words = _assistant_words(recipe, experiment, examples, folder)
    decoder = _Decoder.load(recipe, recipe.base, experiment.base_tokenizer, experiment.base_prompts.stop_ids, folder)
    records = {}
    for condition in dict.fromkeys(recipe.evaluation.conditions):
        prompts, thoughts = inputs.of(condition)
        outputs = decoder.run(condition, prompts, thoughts, recipe.evaluation.max_new_tokens)
        records[condition] = _grade(outputs, prompts, examples, experiment)
    report = make_report(recipe, adapter, config, records)
    on_main(lambda: _write(recipe, folder, records, report))
    say(table(report))
    return report


class _Inputs:
    """Prompts and thoughts of each condition."""

    def __init__(self, recipe: Recipe, experiment: Experiment, examples: Sequence[Example], adapter: Path) -> None:
        self._recipe = recipe
        self._experiment = experiment
        self._examples = examples
        self._projection = load_adapter(adapter, experiment)
        self._hidden = read_all_thoughts(experiment, examples)
        self.words: list[str] = []

    def of(self, condition: Condition) -> tuple[list[BasePrompt], ThoughtsOf | None]:
        prompts = self._experiment.base_prompts
        questions = [example.problem.question for example in self._examples]
        if condition == "none":
            return [prompts.without_thoughts(question) for question in questions], None
        if condition == "text":
            return [prompts.with_words(*pair) for pair in zip(questions, self.words, strict=True)], None
        thoughts: dict[str, Callable[[], ThoughtsOf]] = {
            "learned": lambda: self._project,
            "shuffled": self._shuffled,
            "mean": self._mean,
            "zero": lambda: lambda indices: torch.zeros_like(self._project(indices)),
            "static": self._static,
        }
        return [BasePrompt(example.prefix_ids, example.suffix_ids) for example in self._examples], thoughts[condition]()

    @torch.no_grad()
    def _project(self, indices: list[int]) -> torch.Tensor:
        if self._hidden is None:
            return self._projection(len(indices))
        return self._projection(self._hidden[indices].float())

    def _mean(self) -> ThoughtsOf:
        if self._hidden is None:
            return self._project
        # The projection is affine: the mean of the projected states is the projection of the mean state.
        with torch.no_grad():
            mean = self._projection(self._hidden.float().mean(dim=0, keepdim=True))
        return lambda indices: mean.expand(len(indices), -1, -1)

    def _shuffled(self) -> ThoughtsOf:
        # A rotation of a random order: nobody keeps their own thoughts.
        order = random.Random(self._recipe.seed).sample(range(len(self._examples)), len(self._examples))
        other = dict(zip(order, order[1:] + order[:1], strict=True))
        return lambda indices: self._project([other[index] for index in indices])

    def _static(self) -> ThoughtsOf:
        folder = self._recipe.evaluation.static_adapter
        if folder is None:
            return self._project
        config = AdapterConfig.load(folder)
        config.check_models(self._recipe, assistant=False)
        if config.projection != "static":
            raise SoftCoTError(f"evaluation.static_adapter {folder} is a {config.projection} projection, not static")
        projection = load_adapter(folder, self._experiment)
        return lambda indices: projection(len(indices)).detach()


class _Decoder:
    """Decodes problems in fixed batches over the ranks, and remembers on disk which are done."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        recipe: Recipe,
        folder: Path,
        partitioned: bool,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._recipe = recipe
        self._folder = folder
        self._partitioned = partitioned

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        model_config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        folder: Path,
    ) -> "_Decoder":
        partition = recipe.evaluation.partition or recipe.backbone.partition
        config = decoding_config(recipe) if partition == "zero3" else None
        model = load_frozen(model_config, partition, device(), config)
        if config is not None:
            hook_partitioned(model, config)
        return cls(model, tokenizer, stop_ids, recipe, folder, partition == "zero3")

    def run(
        self, name: str, prompts: Sequence[BasePrompt], thoughts: ThoughtsOf | None, max_new_tokens: int
    ) -> list[str]:
        """The outputs of all prompts, in their order, on every rank."""
        size = self._recipe.evaluation.batch_size
        # The batches depend on the problems alone, so that the outputs do not depend on the number of ranks or on
        # where an earlier evaluation was interrupted.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].prefix_ids) + len(prompts[i].suffix_ids))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        done = on_main(lambda: self._finished(name))
        todo = [number for number in range(len(batches)) if number not in done]
        if done:
            say(f"{name}: {len(done)} of {len(batches)} batches were done before")
        progress = Progress(len(todo), "batches")
        part = self._folder / f"{name}.{uuid.uuid4().hex}.part"
        for start in range(0, len(todo), world_size()):
            mine = todo[start + rank()] if start + rank() < len(todo) else None
            # Partitioned, a rank without work still takes part: each forward pass needs all ranks.
            if mine is not None or self._partitioned:
                number = todo[start] if mine is None else mine
                outputs = self._decode(number, batches[number], prompts, thoughts, max_new_tokens)
                if mine is not None:
                    _append_line(part, {"batch": number, "outputs": dict(zip(batches[number], outputs, strict=True))})
            if todo and (line := progress.line(min(start + world_size(), len(todo)))):
                say(f"{name:9} {line}")
        barrier()  # before reading what the other ranks wrote
        finished = on_main(lambda: self._finished(name))
        outputs_by_index = {int(index): text for batch in finished.values() for index, text in batch.items()}
        return [outputs_by_index[index] for index in range(len(prompts))]

    def _decode(
        self,
        number: int,
        batch: list[int],
        prompts: Sequence[BasePrompt],
        thoughts: ThoughtsOf | None,
        max_new_tokens: int,
    ) -> list[str]:
        evaluation = self._recipe.evaluation
        torch.manual_seed(self._recipe.seed * 1_000_003 + number)  # sampled decoding: the same on any rank
        outputs = decode(
            self._model,
            [prompts[index] for index in batch],
            None if thoughts is None else thoughts(batch),
            self._stop_ids,
            Sampling(max_new_tokens, evaluation.temperature, evaluation.top_p),
            synced=self._partitioned and world_size() > 1,
        )
        return [self._tokenizer.decode(output.token_ids) for output in outputs]

    def _finished(self, name: str) -> dict[int, dict[str, str]]:
        """Outputs by batch, from every process that ever worked on this condition."""
        finished = {}
        for path in sorted(self._folder.glob(f"{name}.*.part")):
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # the process was killed while it wrote its last line: that batch is done again
                finished[record["batch"]] = record["outputs"]
        return finished


def _append_line(path: Path, record: Record) -> None:
    """Add one line in one write; raises SoftCoTError when the disk is full."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise SoftCoTError(f"cannot write {path}: {error}; make room and run the same command again") from error


def _assistant_words(recipe: Recipe, experiment: Experiment, examples: Sequence[Example], folder: Path) -> list[str]:
    """What the assistant answers in words, for the condition text. The assistant is gone when this returns."""
    prompts = experiment.assistant_prompts
    decoder = _Decoder.load(recipe, recipe.assistant, experiment.assistant_tokenizer, prompts.stop_ids, folder)
    inputs = [BasePrompt(prompts.words_prompt(example.problem.question), []) for example in examples]
    return decoder.run("assistant", inputs, None, recipe.evaluation.text_max_tokens)


def _grade(
    outputs: Sequence[str], prompts: Sequence[BasePrompt], examples: Sequence[Example], experiment: Experiment
) -> list[Record]:
    tokenizer, task = experiment.base_tokenizer, experiment.task
    records = []
    for output, prompt, example in zip(outputs, prompts, examples, strict=True):
        answer = task.extract(output)
        thoughts = f"[{len(example.assistant.positions)} thoughts]" if prompt.suffix_ids else ""
        records.append(
            {
                "id": example.problem.id,
                "prompt": tokenizer.decode(prompt.prefix_ids) + thoughts + tokenizer.decode(prompt.suffix_ids),
                "output": output,
                "answer": answer,
                "reference": example.problem.answer,
                "correct": task.is_correct(answer, example.problem),
            }
        )
    return records


def make_report(
    recipe: Recipe, adapter: Path, config: AdapterConfig, records: dict[str, list[Record]]
) -> dict[str, Any]:
    """Accuracies with 95% Wilson intervals, and learned against each control (McNemar's exact test)."""
    verdicts = {name: {record["id"]: record["correct"] for record in rows} for name, rows in records.items()}
    conditions = {}
    for name, rows in records.items():
        correct = sum(record["correct"] for record in rows)
        conditions[name] = {
            "accuracy": correct / len(rows),
            "ci95": wilson_interval(correct, len(rows)),
            "correct": correct,
            "unparsed": sum(record["answer"] is None for record in rows),
        }
    learned = verdicts.get("learned")
    comparisons = {
        f"learned-{name}": compare(learned, other)
        for name, other in verdicts.items()
        if learned is not None and name != "learned"
    }
    return {
        "task": recipe.task.name,
        "num_problems": len(next(iter(records.values()))),
        "seeds": [recipe.seed],
        "assistant": config.assistant.model,
        "base": config.base.model,
        "num_thoughts": config.num_thoughts,
        "adapter": str(adapter),
        "train": train_summary(adapter),
        "conditions": conditions,
        "comparisons": comparisons,
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['task']}: {report['num_problems']} problems, adapter {report['adapter']}",
        f"{'condition':<10}{'accuracy':>9}{'95% interval':>17}{'unparsed':>10}{'learned - it':>14}{'p (McNemar)':>13}",
    ]
    for name, row in report["conditions"].items():
        low, high = row["ci95"]
        line = f"{name:<10}{row['accuracy']:>9.1%}{f'{low:.1%} - {high:.1%}':>17}{row['unparsed']:>10}"
        comparison = report["comparisons"].get(f"learned-{name}")
        if comparison:
            line += f"{100 * comparison['difference']:>+13.1f} {comparison['p_value']:>13.2g}"
        lines.append(line)
    return "\n".join(lines)


def _results_folder(recipe: Recipe, adapter: Path, config: AdapterConfig, experiment: Experiment) -> Path:
    """A folder of its own for each adapter, set of problems and way of decoding: nothing is mixed or overwritten."""
    problems = "".join(example.problem.id for example in experiment.splits.test)
    settings = {
        "adapter": hashlib.sha256((adapter / "projection.safetensors").read_bytes()).hexdigest(),
        "problems": hashlib.sha256(problems.encode()).hexdigest(),
        "wording": hashlib.sha256(experiment.task.prompt_file.read_bytes()).hexdigest(),
        "seed": recipe.seed,
        "models": recipe.model_dump(mode="json", include={"assistant", "base", "thoughts"}),
        "decoding": recipe.evaluation.model_dump(mode="json", exclude={"conditions", "partition"}),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = recipe.run_dir / "evaluation" / f"step-{config.step}-{digest[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise SoftCoTError(f"cannot write to {folder}: {error}") from error
    return folder


def _write(recipe: Recipe, folder: Path, records: dict[str, list[Record]], report: dict[str, Any]) -> None:
    try:
        for name, rows in records.items():
            write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for path in (folder / "report.json", recipe.run_dir / "report.json"):
            write_atomically(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise SoftCoTError(f"cannot write the results to {folder}: {error}; run the same command again") from error


main = recipe_command(
    "evaluate", "Accuracy with controls, of a run's newest adapter or of an adapter directory.", evaluate, adapter=True
)

if __name__ == "__main__":
    sys.exit(main())
