"""Several evaluations in one command, each a cell: an ordinary recipe with overrides, and an ordinary run.

    seeds=41..45                   or seeds=[41,42]: a run for each, called NAME-seed41 and so on
    evaluation.thoughts=[1,2,4]    an evaluation with each number of thoughts

Needs neither torch nor DeepSpeed: mistakes are said before any work starts.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import parse_yaml
from softcot_ds.recipe import Recipe, parse_recipe
from softcot_ds.run_dir import adapter_folder, load_for_evaluation

_MOST = 1000
"""Values of an axis: a range that is a slip of the keyboard is no week of work."""


@dataclass(frozen=True)
class Cell:
    """One evaluation of several."""

    source: str
    """A recipe's file, or an adapter directory."""
    recipe: Recipe
    overrides: tuple[str, ...]
    """What makes the source's recipe this cell's."""
    seed: int | None
    """That of the cell's own run; None where all cells are of the recipe's run, or of the adapter that was named."""


@dataclass(frozen=True)
class Grid:
    """What a command's overrides ask for."""

    seeds: tuple[int, ...]
    """Empty where the recipe's own seed, or the adapter, is meant."""
    thoughts: tuple[int, ...]
    """Numbers of thoughts, in the order given; empty where the recipe says how many."""
    plain: tuple[str, ...]
    """The other overrides: with them the recipe is one that every command takes."""

    @classmethod
    def of(cls, overrides: Sequence[str]) -> "Grid":
        """Raises SoftCoTError for seeds or numbers of thoughts that are none, or stand there twice."""
        found: dict[str, tuple[int, ...]] = {"seeds": (), "evaluation.thoughts": ()}
        plain = []
        for override in overrides:
            key, equals, text = override.partition("=")
            if key in found and equals:
                found[key] = seeds_of(text) if key == "seeds" else _counts(text)
            if key not in found or not equals or not found[key]:
                plain.append(override)
        if found["seeds"] and (own := [text for text in plain if text.startswith("seed=")]):
            raise SoftCoTError(f"{own[-1]} beside seeds: leave one of the two out; seeds takes a single one, too")
        return cls(found["seeds"], found["evaluation.thoughts"], tuple(plain))

    def __bool__(self) -> bool:
        return bool(self.seeds or self.thoughts)

    @property
    def axes(self) -> tuple[str, ...]:
        """As overrides again."""
        found = {"seeds": self.seeds, "evaluation.thoughts": self.thoughts}
        return tuple(f"{key}={json.dumps(values)}" for key, values in found.items() if values)

    @property
    def of_thoughts(self) -> "Grid":
        """The same without seeds: of what is one for all of them."""
        return replace(self, seeds=())

    @property
    def of_seeds(self) -> "Grid":
        """The same without numbers of thoughts: of what is trained, whose recipe stays with its run."""
        return replace(self, thoughts=())

    def runs(self, whole: Recipe) -> list[Recipe]:
        """The runs that are trained, from the recipe that all have in common: itself where there are no seeds."""
        return [_with(whole, self._own(whole, seed)) for seed in self.seeds] or [whole]

    def counts(self, whole: Recipe) -> list[Recipe]:
        """One recipe for each number of thoughts in evaluation."""
        return [_with(whole, self._own(whole, None, count)) for count in self.thoughts] or [whole]

    def recipe(self, source: str) -> Recipe:
        """The recipe that the cells have in common: the run of its name keeps what is of all of them.

        Args:
            source: a recipe, or an adapter directory.

        Raises:
            SoftCoTError: the recipe is wrong; there are seeds, and an adapter is of one.
        """
        if self.seeds and adapter_folder(source) is not None:
            raise SoftCoTError(
                f"{source} is no recipe, and an adapter's is of one seed; seeds is for a recipe, whose runs it names"
            )
        return load_for_evaluation(source, list(self.plain))

    def cells(self, source: str) -> list[Cell]:
        """All cells, by seed and then by number of thoughts. Each is checked as a recipe.

        What is decoded goes into one folder, so that seeds share what does not depend on them. Raises SoftCoTError; see
        ``recipe``.
        """
        whole, cells = self.recipe(source), []
        for seed in self.seeds or (None,):
            for count in self.thoughts or (None,):
                overrides = (*self.plain, *self._own(whole, seed, count))
                cells.append(Cell(source, load_for_evaluation(source, list(overrides)), overrides, seed))
        return cells

    def _own(self, whole: Recipe, seed: int | None, count: int | None = None) -> list[str]:
        """The overrides that make a recipe that all cells have in common one cell's."""
        own = []
        if seed is not None:
            outputs = json.dumps(str(whole.evaluation.outputs or whole.run_dir / "outputs"), ensure_ascii=False)
            own = [f"name={whole.name}-seed{seed}", f"seed={seed}", f"evaluation.outputs={outputs}"]
        return own if count is None else [*own, f"evaluation.thoughts={json.dumps(count)}"]


NO_GRID = Grid((), (), ())
"""One evaluation, by the recipe as it is."""


def _with(whole: Recipe, own: list[str]) -> Recipe:
    return parse_recipe(whole.model_dump(mode="json"), own, whole.name)


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds that ``41..45``, ``[41, 42]`` or ``41`` names. Raises SoftCoTError for what is none."""
    if ends := re.fullmatch(r"(\d{1,20})\.\.(\d{1,20})", text.strip()):
        first, last = map(int, ends.groups())
        if first > last:
            raise SoftCoTError(f"seeds={text} ends before it begins; write seeds={last}..{first}")
        if last - first >= _MOST:
            raise SoftCoTError(f"seeds={text} are {last - first + 1:,} runs; name {_MOST:,} at most")
        return tuple(range(first, last + 1))
    values = _list("seeds", text) or (_value("seeds", text),)
    if wrong := [value for value in values if type(value) is not int or not 0 <= value < 2**64]:
        raise SoftCoTError(
            f"seeds={text}: {wrong[0]!r} is no seed, a whole number from 0 on; write the first and the last, as in "
            "seeds=41..45, or a list, as in seeds=[41,42]"
        )
    return values


def _counts(text: str) -> tuple[int, ...]:
    values = _list("evaluation.thoughts", text)
    if wrong := [value for value in values if type(value) is not int or value < 1]:
        raise SoftCoTError(
            f"evaluation.thoughts={text}: {json.dumps(wrong[0], default=str)} is no number of thoughts, a whole one "
            "from 1 on; write out each, as in evaluation.thoughts=[1,4], also that which was trained with"
        )
    return values


def _list(key: str, text: str) -> tuple[Any, ...]:
    """The values of a list; none where ``text`` is another value."""
    values = _value(key, text)
    if not isinstance(values, list):
        return ()
    if not values:
        raise SoftCoTError(f"{key}=[] is empty; name at least one value, or leave it out")
    if len(values) > _MOST:
        raise SoftCoTError(f"{key} has {len(values):,} values; name {_MOST:,} at most")
    if repeated := [value for value in values if values.count(value) > 1]:
        raise SoftCoTError(f"{key}={text}: {repeated[0]!r} stands there more than once; name each once")
    return tuple(values)


def _value(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise SoftCoTError(f"{key}={text} is not a YAML value: {error}") from error
