"""The recipe's sections for strategies that search: a tree of steps, a graph of operations; and their wording.

A section is named like its strategy, and counts where evaluation.strategy names it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_yaml
from softcot_ds.section import Section
from softcot_ds.values import Count, ExistingFile

_FIELD = re.compile(r"\{(count|words|answers|best)\}")
_OF_TREE = {"propose": {"count"}, "value": {"words"}, "vote": {"answers", "count"}}
_OF_GRAPH = {"score": {"best"}, "aggregate": {"answers", "count"}, "improve": set()}
_WORDING = Path(__file__).parent / "evaluation"


class Wording:
    """What a strategy says to the base: texts with fields in braces; other braces are ordinary text."""

    def __init__(self, path: Path, fields: Mapping[str, set[str]]) -> None:
        """
        Args:
            fields: of each text, those that it must contain; it may contain no others.

        Raises:
            SoftCoTError: with every mistake of the file.
        """
        texts = read_yaml(path)
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise SoftCoTError(f"{path}: a strategy's wording is a mapping of {', '.join(fields)} to texts")
        mistakes = [f"unknown key {key!r}; known: {', '.join(fields)}" for key in texts if key not in fields]
        for key, wanted in fields.items():
            if key not in texts:
                mistakes.append(f"{key}: missing")
                continue
            found = {*_FIELD.findall(texts[key])}
            mistakes += [f"{key}: {{{field}}} is missing" for field in sorted(wanted - found)]
            mistakes += [f"{key}: {{{field}}} has no meaning here" for field in sorted(found - wanted)]
        if mistakes:
            raise SoftCoTError(f"{path}: mistakes in the wording:\n" + "\n".join(f"  - {one}" for one in mistakes))
        self._texts = texts

    def __call__(self, key: str, **fields: str | int) -> str:
        """A text, filled in; in one pass, so that an answer which contains "{count}" stays what it is."""
        return _FIELD.sub(lambda match: str(fields[match.group(1)]), self._texts[key])


def _of(fields: Mapping[str, set[str]]) -> AfterValidator:
    def check(path: Path) -> Path:
        try:
            Wording(path, fields)
        except SoftCoTError as error:
            raise ValueError(str(error)) from error
        return path

    return AfterValidator(check)


class TreeConfig(Section):
    """Tree of Thoughts, breadth first: an answer is written step by step, and of several beginnings the best are gone
    on with."""

    depth: Count = 3
    """Levels of the tree. Each but the last adds a line to the answer, and the last writes it to its end."""
    candidates: Count = 5
    """From each beginning that is kept, so many are made."""
    breadth: Count = 1
    """So many are kept after a step. After the last step it is one: the answer."""
    generate: Literal["sample", "propose"] = "sample"
    """How steps but the last are made. sample: the base goes on with the answer, and the first line is the step.
    propose: it is asked once for several next lines."""
    judge: Literal["vote", "value"] = "vote"
    """How the best are found. vote: the base is shown all beginnings, and names one. value: it is shown one at a time,
    and says a word of ``values``."""
    judgements: Count = 5
    """Votes on the beginnings of a problem, or valuations of each."""
    values: dict[str, float] = Field({"impossible": 0.001, "likely": 1.0, "sure": 20.0})
    """What each word counts. A beginning is worth their sum."""
    step_tokens: Count = 64
    """Longest step but the last, tokens; the last has evaluation.max_new_tokens."""
    judge_tokens: Count = 32
    """Longest judgement, tokens."""
    wording: Annotated[ExistingFile, _of(_OF_TREE)] | None = None
    """A file in the place of softcot_ds/evaluation/tree.yaml."""

    @property
    def words(self) -> Wording:
        """Raises SoftCoTError where the file is not what it was when the recipe was read."""
        return Wording(self.wording or _WORDING / "tree.yaml", _OF_TREE)

    @property
    def samples(self) -> list[str]:
        """Which settings want random numbers, each with its value."""
        numbers = {"candidates": self.candidates, "judgements": self.judgements}
        return [f"{key}={value}" for key, value in numbers.items() if value > 1 and self._draws(key)]

    def _draws(self, key: str) -> bool:
        return key == "judgements" or self.generate == "sample"

    @field_validator("generate")
    @classmethod
    def _there_is_a_step_to_propose(cls, value: str, info: ValidationInfo) -> str:
        if value == "propose" and info.data.get("depth") == 1:
            raise ValueError("propose, and depth is 1: the last step is never proposed; set depth to 2 or more")
        return value

    @field_validator("values")
    @classmethod
    def _values_are_words(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := [word for word in value if not re.fullmatch(r"[^\W\d_]+", word)]:
            raise ValueError(f"{wrong[0]!r} is no single word; a word is read in what the base says")
        if len({word.casefold() for word in value}) < max(2, len(value)):
            raise ValueError(f"{value}: two different words at least, in which capitals make no difference")
        return value


class OperationConfig(Section):
    """One operation on answers."""

    do: Literal["generate", "score", "keep", "aggregate", "improve"]
    """generate: write answers to the problem. score: let the base judge each. keep: the best of them. aggregate: have
    all of them made into one. improve: have each written better."""
    count: Count = 1
    """generate, aggregate: answers that come out. score: judgements of each. keep: how many. improve: of each, how many
    better ones."""
    of: list[Count] | None = None
    """Whose answers it works on: numbers of operations before it, from 1. Default: those of the one before."""


@dataclass(frozen=True)
class Operation:
    """One operation in its place in the graph."""

    do: str
    count: int
    of: tuple[int, ...]
    """Indices of operations."""


_Operations = list[OperationConfig]


class GraphConfig(Section):
    """Graph of Thoughts: whole answers are written, scored, chosen from, merged and improved, as the list says."""

    operations: _Operations = Field(
        [
            OperationConfig(do="generate", count=5),
            OperationConfig(do="score", count=3),
            OperationConfig(do="keep", count=3),
            OperationConfig(do="aggregate", count=3),
            OperationConfig(do="score", count=3),
            OperationConfig(do="keep"),
            OperationConfig(do="improve"),
        ]
    )
    """In this order. What comes out of the last is the answer, so it is one; and what comes out of each other one is
    worked on by a later one."""
    best: Count = 10
    """Scores are whole numbers from 0 to this."""
    judge_tokens: Count = 32
    """Longest judgement, tokens; answers have evaluation.max_new_tokens."""
    wording: Annotated[ExistingFile, _of(_OF_GRAPH)] | None = None
    """A file in the place of softcot_ds/evaluation/graph.yaml."""

    @property
    def words(self) -> Wording:
        """Raises SoftCoTError where the file is not what it was when the recipe was read."""
        return Wording(self.wording or _WORDING / "graph.yaml", _OF_GRAPH)

    @property
    def plan(self) -> list[Operation]:
        """The operations with what each works on."""
        return [
            Operation(one.do, one.count, tuple(_sources(number, one))) for number, one in enumerate(self.operations)
        ]

    @property
    def samples(self) -> list[str]:
        """Which settings want random numbers, each with its value."""
        drawn = [(number, one) for number, one in enumerate(self.operations, 1) if one.do != "keep"]
        found = [f"operation {number} ({one.do}) with count={one.count}" for number, one in drawn if one.count > 1]
        generated = [number for number, one in drawn if one.do == "generate"]
        return found + [f"operation {number} (generate), which is not the first" for number in generated[1:]]

    @field_validator("operations")
    @classmethod
    def _operations_fit_together(cls, value: _Operations) -> _Operations:
        if mistakes := _mistakes(value):
            raise ValueError("\n".join(mistakes))
        return value


def _sources(number: int, operation: OperationConfig) -> list[int]:
    """Indices of the operations that the one of this index works on."""
    if operation.do == "generate":
        return []
    return [number - 1] if operation.of is None else [each - 1 for each in operation.of]


def _mistakes(operations: Sequence[OperationConfig]) -> list[str]:
    """What is wrong with the graph, in words: with how many answers come out of each, and which of them have scores."""
    if not operations:
        return ["empty; begin with {do: generate, count: 5}"]
    mistakes: list[str] = []
    sizes: list[int] = []
    scored: list[bool] = []
    for number, one in enumerate(operations):
        name, sources = f"operation {number + 1} ({one.do})", _sources(number, one)
        if wrong := [source + 1 for source in sources if source >= number]:
            mistakes.append(f"{name} works on operation {wrong[0]}, which is not before it")
        elif len({*sources}) < len(sources):
            mistakes.append(f"{name} works on the same operation twice: of={one.of}")
        elif one.do == "generate" and one.of is not None:
            mistakes.append(f"{name} works on the problem alone; leave `of` out")
        elif one.do != "generate" and (not sources or sources == [-1]):
            mistakes.append(f"{name} has nothing to work on; the first is generate, and `of` names some if it is there")
        sources = [source for source in sources if 0 <= source < number]
        taken = sum(sizes[source] for source in sources)
        if one.do == "keep" and not all(scored[source] for source in sources):
            mistakes.append(f"{name} chooses among answers without a score; let score come before it")
        if one.do == "keep" and taken and one.count > taken:
            mistakes.append(f"{name} keeps {one.count} of {taken}")
        if one.do == "aggregate" and taken == 1:
            mistakes.append(f"{name} has a single answer to work on; that is improve")
        sizes.append({"score": taken, "improve": taken * one.count}.get(one.do, one.count))
        scored.append(one.do == "score" or (one.do == "keep" and all(scored[source] for source in sources)))
    if mistakes:
        return mistakes
    used = {source for number, one in enumerate(operations) for source in _sources(number, one)}
    idle = [number + 1 for number in range(len(operations) - 1) if number not in used]
    mistakes += [f"nothing works on what comes out of operation {number}" for number in idle]
    if sizes[-1] != 1:
        mistakes.append(
            f"{sizes[-1]} answers come out of the last operation, and it is to be one; end with {{do: keep}}"
        )
    return mistakes
