"""A study: methods by tasks by strategies by seeds in one file, and the cells that they come to.

    name: study                              # everything about it lies in output_dir/name
    recipe: recipes/word_problems.yaml       # what all cells start from
    overrides: {task.test_problems: 500}     # of every cell
    seeds: 41..45                            # or a list
    methods:                                 # each with what makes the recipe its own
      softcot: {}
      prompt_tuning: {method: prompt_tuning, training.learning_rate: 0.3}
    tasks:                                   # by default the recipe's own
      word_problems: {}
      word_choices: {trained_on: word_problems, overrides: {task.name: word_choices}}
    strategies:                              # of evaluation alone: a training serves all of them
      single: {}
      voted: {evaluation.samples: 8, evaluation.temperature: 0.7}
    without:                                 # cells that are left out
      - {method: prompt_tuning, strategy: voted}  # each a name or a list

A cell is an ordinary recipe with overrides, and an ordinary run: NAME-TASK-METHOD-seed41. What all cells do not depend
on is done once: they share a folder of outputs. Needs neither torch nor DeepSpeed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from softcot_ds.cells import Cell, seeds_of
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation_config import Condition
from softcot_ds.files import read_yaml
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.run_dir import load_for_evaluation
from softcot_ds.section import Section
from softcot_ds.settings import WrongSettings, flattened, read_settings, validated
from softcot_ds.shipped import found
from softcot_ds.values import ExistingFile, Folder

_DECIDED = ("name", "seed", "seeds", "output_dir", "evaluation.outputs")
"""What the study itself gives each cell."""


def _seeds(value: Any) -> tuple[int, ...]:
    try:
        return seeds_of(value if isinstance(value, str) else json.dumps(value))
    except SoftCoTError as error:
        raise ValueError(str(error).removeprefix("seeds=")) from error


def _settings(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"a mapping of a recipe's keys to values, found {values!r}")
    flat = flattened(dict(values))
    if decided := [key for key in flat if key in _DECIDED]:
        raise ValueError(f"{decided[0]} is decided by the study; leave it out")
    return flat


Seeds = Annotated[tuple[int, ...], BeforeValidator(_seeds)]
Overrides = Annotated[dict[str, Any], BeforeValidator(_settings)]
"""Values of a recipe by ``section.key``; sections may also be written out."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._]*$", max_length=40)]
"""Of a method, a task or a strategy: without a dash, as these stand between the parts of a run's name."""


class StudyTask(Section):
    """One task of a study."""

    recipe: ExistingFile | None = None
    """What its cells start from. Default: the study's."""
    trained_on: Name | None = None
    """Another task of the study, whose adapters are evaluated here; nothing is trained on this one."""
    overrides: Overrides = Field({})
    """What makes the recipe this task's."""


Names = Annotated[list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""One, or a list."""


class Without(Section):
    """Cells that are left out: of these methods, these tasks, these strategies, or where several of the three are
    named, of all of them at once."""

    method: Names = Field([])
    task: Names = Field([])
    strategy: Names = Field([])

    def leaves_out(self, **cell: str) -> bool:
        """Whether a cell, given as its ``method``, ``task`` and ``strategy``, is one of them."""
        return all(not (named := getattr(self, axis)) or name in named for axis, name in cell.items())


class Study(Section):
    """One study."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=40)
    output_dir: Folder = Path("runs")
    recipe: ExistingFile | None = None
    """What cells start from; a task may have one of its own."""
    overrides: Overrides = Field({})
    """Of every cell. Those of the task, the method and the strategy win over it, in this order."""
    seeds: Seeds = (0,)
    methods: dict[Name, Overrides] = Field(min_length=1)
    """By the names that the report gives them."""
    tasks: dict[Name, StudyTask] = Field({"own": {}}, min_length=1, validate_default=True)  # type: ignore[assignment]
    strategies: dict[Name, Overrides] = Field({"single": {}}, min_length=1)
    """Settings of evaluation. The first one is that to which the others are compared."""
    baselines: list[Literal["none", "placeholder", "text"]] = Field(["none", "text"])
    """Conditions that are methods of their own, as nothing trained has a part in them: none is zero-shot CoT, text
    Assist-CoT, placeholder CoT-Unk. They are told where some method's evaluation has them among its conditions."""
    against: str | None = None
    """The method to which the others, and the baselines, are compared. Default: the first one."""
    without: list[Without] = Field([])

    @model_validator(mode="after")
    def _names_are_known(self) -> "Study":
        wrong = []
        if self.against is not None and self.against not in self.methods:
            wrong.append(f"against: no method {self.against!r}; there are {', '.join(self.methods)}")
        for name in self.methods:
            if name in get_args(Condition):
                wrong.append(f"methods.{name}: a condition of evaluations is called so; take another name")
        for name, task in self.tasks.items():
            wrong += self._wrong_in_task(name, task)
        for name, settings in self.strategies.items():
            others = [key for key in settings if not key.startswith("evaluation.")]
            wrong += [f"strategies.{name}: {key} is none of evaluation's; give it to a method" for key in others]
        for number, left in enumerate(self.without):
            named = {"method": self.methods, "task": self.tasks, "strategy": self.strategies}
            for axis, known in named.items():
                for value in getattr(left, axis):
                    if value not in known:
                        wrong.append(f"without.{number}.{axis}: no {value!r}; there are {', '.join(known)}")
            if left == Without():
                wrong.append(f"without.{number}: leaves all cells out; name a method, a task or a strategy")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def _wrong_in_task(self, name: str, task: StudyTask) -> list[str]:
        if task.trained_on is None:
            if task.recipe is None and self.recipe is None:
                return [f"tasks.{name}.recipe: missing, and the study has none either; name a recipe's file"]
            return []
        wrong = []
        trained = self.tasks.get(task.trained_on)
        if trained is None or trained.trained_on is not None:
            there = ", ".join(name for name, other in self.tasks.items() if other.trained_on is None)
            wrong.append(f"tasks.{name}.trained_on: nothing is trained on {task.trained_on!r}; there are {there}")
        if task.recipe is not None:
            wrong.append(f"tasks.{name}.recipe: the adapters' own counts, those of {task.trained_on}; leave it out")
        for key in task.overrides:
            if not key.startswith(("task.", "evaluation.")):
                wrong.append(f"tasks.{name}.overrides: {key} is neither task's nor evaluation's: nothing is trained")
        return wrong

    @property
    def run_dir(self) -> Path:
        """Where the study's own files are."""
        return self.output_dir / self.name

    @property
    def reference(self) -> str:
        """The method to which the others are compared."""
        return self.against or next(iter(self.methods))

    @property
    def as_recipe(self) -> Recipe:
        """What a batch script, or the doctor, asks of a recipe: that of a cell, with the study's directory."""
        return self.cells[0].recipe.model_copy(update={"name": self.name})

    @cached_property
    def cells(self) -> "tuple[StudyCell, ...]":
        """All of them, by task, method, strategy and seed. Each is checked as a recipe.

        Raises:
            WrongSettings: lists the mistakes of all cells, each once.
        """
        wrong: dict[str, list[StudyCell]] = {}
        cells = []
        for cell in self._unchecked():
            try:
                recipe = load_for_evaluation(cell.source, list(cell.overrides))
            except WrongSettings as error:
                for mistake in error.mistakes:
                    wrong.setdefault(mistake, []).append(cell)
                continue
            cells.append(replace(cell, recipe=recipe))
            if "learned" not in recipe.evaluation.conditions:
                wrong.setdefault("evaluation.conditions: learned is missing, which is the method", []).append(cell)
        if wrong:
            raise WrongSettings(self.name, "study", [f"{text}{self._whose(of)}" for text, of in wrong.items()])
        if not cells:
            raise WrongSettings(self.name, "study", ["without: no cell is left"])
        return tuple(cells)

    @property
    def trainings(self) -> tuple[Cell, ...]:
        """The runs that the cells evaluate, each once, with the recipe that it is trained by."""
        found = {}
        for cell in self.cells:
            of = self._training(self.tasks[cell.task].trained_on or cell.task, cell.method, cell.seed)
            found[cell.recipe.name] = of
        return tuple(replace(of, recipe=load_recipe(of.source, list(of.overrides))) for of in found.values())

    def _unchecked(self) -> "Iterator[StudyCell]":
        for task in self.tasks:
            for method in self.methods:
                for strategy in self.strategies:
                    if any(left.leaves_out(method=method, task=task, strategy=strategy) for left in self.without):
                        continue
                    for seed in self.seeds:
                        source, overrides = self._evaluation(task, method, strategy, seed)
                        yield StudyCell(source, None, overrides, seed, method, task, strategy)  # type: ignore[arg-type]

    def _training(self, task: str, method: str, seed: int) -> Cell:
        """Of a task on which methods are trained; unchecked."""
        settings = self.overrides | self.tasks[task].overrides | self.methods[method]
        return Cell(self._source(task), None, (*_texts(settings), *self._own(task, method, seed)), seed)  # type: ignore[arg-type]

    def _evaluation(self, task: str, method: str, strategy: str, seed: int) -> tuple[str, tuple[str, ...]]:
        """Source and overrides of an evaluation: those of its training, with the strategy's on top. Of another task
        than that which was trained on, data and wording are what that task says."""
        asked, of_strategy = self.tasks[task], self.strategies[strategy]
        if asked.trained_on is None:
            training = self._training(task, method, seed)
            return training.source, (*training.overrides, *_texts(of_strategy))
        of_training = self.tasks[asked.trained_on].overrides | self.methods[method]
        kept = {key: value for key, value in of_training.items() if not key.startswith("task.")}
        settings = self.overrides | kept | asked.overrides | of_strategy
        own = self._own(asked.trained_on, method, seed)
        return self._source(asked.trained_on), (*_texts(settings), *own)

    def _source(self, task: str) -> str:
        return str(self.tasks[task].recipe or self.recipe)

    def _own(self, task: str, method: str, seed: int) -> tuple[str, ...]:
        own = {"name": f"{self.name}-{task}-{method}-seed{seed}", "seed": seed, "output_dir": str(self.output_dir)}
        return tuple(_texts(own | {"evaluation.outputs": str(self.run_dir / "outputs")}))

    def _whose(self, cells: "Sequence[StudyCell]") -> str:
        """Which part of the study makes a mistake, in words: what its cells have in common, and others have not."""
        axes = {"method": self.methods, "task": self.tasks, "strategy": self.strategies}
        named = []
        for axis, known in axes.items():
            values = {getattr(cell, axis) for cell in cells}
            if len(values) < len(known):
                named.append(f"{axis} {', '.join(name for name in known if name in values)}")
        return f" ({'; '.join(named)})" if named else ""


@dataclass(frozen=True)
class StudyCell(Cell):
    """One evaluation of a study."""

    method: str
    task: str
    strategy: str


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study, and check it with all of its cells.

    Args:
        overrides: ``key.sub=value``, which win over the file: ``seeds=41..45``.

    Raises:
        SoftCoTError: the file is missing or no YAML mapping, or something in it is wrong; lists every mistake.
    """
    path = found(Path(path))
    values = read_settings(path, "study")
    study = validated(Study, values, overrides, str(path), "study")
    try:
        _ = study.cells
    except WrongSettings as error:
        raise WrongSettings(str(path), "study", error.mistakes) from error
    return study


def is_study(path: str | Path) -> bool:
    """Whether a file is a study's: no recipe has ``methods``."""
    path = found(Path(path))
    values = read_yaml(path) if path.is_file() else None
    return isinstance(values, dict) and "methods" in values


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """As on a command line."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
