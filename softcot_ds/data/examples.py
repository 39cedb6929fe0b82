"""From problems to examples: the splits of a task's data, as tokens."""

import hashlib
import random
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softcot_ds.data.prompts import AssistantInput, AssistantPrompts, BasePrompts
from softcot_ds.data.targets import REMEDY, OwnShare, OwnTargets
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TargetsConfig, TaskConfig
from softcot_ds.tasks import Problem, Task

_NEARER = 0.1
"""A share of problems that is no chance: 0.005 of GSM8K's validation problems are so near, 0.66 of AQuA's where they
are cut from FLAN's copy of its training data, and none of either one's test problems."""


@dataclass(frozen=True)
class Example:
    """One problem as tokens: ``prefix ; thoughts ; suffix ; target``, of which only the target is supervised."""

    problem: Problem
    assistant: AssistantInput
    prefix_ids: list[int]
    suffix_ids: list[int]
    """The rest of the prompt after the thoughts."""
    target_ids: list[int]
    """Reasoning, answer and end of turn."""
    num_reasoning: int = 0
    """Tokens of the worked solution before those with which the answer alone ends, too; 0 where no method asks."""

    @property
    def length(self) -> int:
        """Positions in the base model, thoughts included."""
        return len(self.prefix_ids) + len(self.assistant.positions) + len(self.suffix_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Splits:
    """Examples for training, for validation and for test; no question is in two."""

    train: list[Example]
    """One of each question; of own targets several, or none."""
    validation: list[Example]
    test: list[Example]
    notes: list[str]
    """What was left out, and why; to be printed."""
    own: OwnShare | None = None
    """How much of the training data the base wrote itself; None where that is not wanted."""
    data: str = ""
    """A hash of the training data, and of validation data of its own; what is cut from the former changes with it."""

    def assistant_inputs(self) -> list[AssistantInput]:
        return [example.assistant for example in (*self.train, *self.validation, *self.test)]


@dataclass(frozen=True)
class ContextLimits:
    """Longest sequence of each model, tokens."""

    assistant: int
    base: int


def make_example(problem: Problem, target: str, base: BasePrompts, assistant: AssistantPrompts) -> Example:
    """A problem as tokens; ``target`` is what the base is to write."""
    prompt = base.with_thoughts(problem.question)
    return Example(
        problem,
        assistant.thoughts_input(problem.id, problem.question),
        prompt.prefix_ids,
        prompt.suffix_ids,
        base.target_ids(target),
    )


MakeExample = Callable[[Problem, str, BasePrompts, AssistantPrompts], Example]


def example_without_assistant(problem: Problem, target: str, base: BasePrompts, num_thoughts: int) -> Example:
    """A problem that no assistant reads: thoughts, where there are some, stand behind the prompt that has no room for
    any."""
    prompt = base.without_thoughts(problem.question).prefix_ids
    # What comes first of a target is predicted by the last thought, or else by a token that is no part of the prefix.
    before = len(prompt) - (num_thoughts == 0)
    nobody = AssistantInput(problem.id, [], list(range(num_thoughts)))
    return Example(problem, nobody, prompt[:before], prompt[before:], base.target_ids(target))


def load_splits(
    task: Task,
    config: TaskConfig,
    targets: TargetsConfig,
    base: BasePrompts,
    assistant: AssistantPrompts,
    limits: ContextLimits,
    make: MakeExample = make_example,
) -> Splits:
    """Read the task's data, cut the validation set, tokenize.

    Args:
        make: from a problem and what the base is to write to an example.

    Raises:
        SoftCoTError: malformed data, too few problems, or sequences longer than a model's context while
            task.max_tokens does not say that such problems are to be left out.
    """
    if assistant.count >= min(limits.assistant, limits.base):
        raise SoftCoTError(
            f"{assistant.count} thoughts do not fit the context of {limits.assistant} tokens (assistant) and "
            f"{limits.base} tokens (base); take fewer: thoughts.count, or evaluation.thoughts"
        )
    problems, notes = _split_problems(task, config)
    notes = [*dict.fromkeys(task.notes), *notes]
    splits = {}
    for name, chosen in problems.items():
        examples = [make(problem, task.target(problem), base, assistant) for problem in chosen]
        splits[name], note = _leave_out_long(examples, name, config.max_tokens, limits)
        notes += note
    own = None
    if config.targets_file is not None and task.trains:
        # In the place of the data's own, of problems that fit with those: which problems are trained on is the same.
        splits["train"], own = _with_own_targets(splits["train"], config.targets_file, targets, task, base)
        splits["train"], note = _leave_out_long(splits["train"], "train", config.max_tokens, limits)
        notes += [own.words(), *note]
    if not splits["train"] and task.trains:
        raise SoftCoTError("no training problem is left; " + ("; ".join(notes) or "the data is empty"))
    data = digest([*splits["train"], *(splits["validation"] if config.validation else [])])
    return Splits(**splits, notes=notes, own=own, data=data)


def _split_problems(task: Task, config: TaskConfig) -> tuple[dict[str, list[Problem]], list[str]]:
    test, notes = _without_repeats(task.read("test"), "test")
    if not task.trains:
        return {"train": [], "validation": [], "test": test[: config.test_problems]}, notes
    train, repeated = _without_repeats(task.read("train"), "training")
    train, known = _without(train, "training", test, "test")
    notes += [*repeated, *known]
    if config.validation is None or not config.validation_problems:
        train, validation = _cut(train, config.validation_problems)
    elif task.validation_stayed:
        validation = []
    else:
        validation, repeated = _without_repeats(task.read("validation"), "validation")
        validation, known = _without(validation, "validation", test, "test")
        train, known_too = _without(train, "training", validation, "validation")
        notes += [*repeated, *known, *known_too]
        if not validation:
            raise SoftCoTError(
                f"task.validation: {config.validation} has no problem that the test data has not; name others, or "
                "set task.validation_problems=0"
            )
        validation = validation[: config.validation_problems]
    train, test = train[: config.train_problems], test[: config.test_problems]
    notes += _how_near(train, validation, test)
    return {"train": train, "validation": validation, "test": test}, notes


def _without(
    problems: list[Problem], split: str, others: list[Problem], other_split: str
) -> tuple[list[Problem], list[str]]:
    """The problems whose question is none of the others', and what is to be said of those."""
    questions = {_normalized(problem.question) for problem in others}
    kept = [problem for problem in problems if _normalized(problem.question) not in questions]
    if len(kept) == len(problems):
        return kept, []
    return kept, [f"{len(problems) - len(kept)} {split} problems are in the {other_split} data too; left out"]


def _cut(train: list[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """Training problems, and ``count`` of them that are taken away for validation.

    Raises:
        SoftCoTError: none would be left.
    """
    if count >= len(train):
        raise SoftCoTError(
            f"task.validation_problems is {count}, but there are only {len(train)} training problems to cut them from"
        )
    # By content, not by position: reordering or adding data moves no old problem from one side to the other.
    by_hash = sorted(train, key=lambda problem: hashlib.sha256(b"validation" + problem.question.encode()).digest())
    validation = by_hash[:count]
    ids = {problem.id for problem in validation}
    return [problem for problem in train if problem.id not in ids], validation


def _how_near(train: list[Problem], validation: list[Problem], test: list[Problem]) -> list[str]:
    """What is to be said where validation problems are training problems with other numbers, and test problems are not,
    as where a data set was made larger in that way: what a model remembers then passes for what it can do."""
    if not validation or not test:
        return []
    known = {_without_numbers(problem.question) for problem in train}
    near, near_test = (
        sum(_without_numbers(problem.question) in known for problem in problems) for problems in (validation, test)
    )
    if near / len(validation) <= near_test / len(test) + _NEARER:
        return []
    return [
        f"{near} of {len(validation)} validation problems are training problems with other numbers, of test problems "
        f"{near_test} of {len(test)}: validation will look better than it is; name other problems in task.validation"
    ]


def _without_numbers(question: str) -> str:
    return re.sub(r"\d[\d,.]*", "#", _normalized(question))


def _with_own_targets(
    examples: list[Example], path: Path, settings: TargetsConfig, task: Task, base: BasePrompts
) -> tuple[list[Example], OwnShare]:
    """Raises SoftCoTError when the file is not that of these problems and their answers, or damaged."""
    own = OwnTargets.read(path)
    by_id = {one.id: one.solutions for one in own.problems}
    found: list[Example] = []
    solved = solutions = 0
    for example in examples:
        problem = example.problem
        if problem.id not in by_id:
            raise SoftCoTError(
                f"{path} is of other problems: it lacks {problem.id} ({problem.question[:60]!r}); {REMEDY}"
            )
        texts = by_id[problem.id]
        if wrong := [text for text in texts if not task.solves(text, problem)]:
            raise SoftCoTError(
                f"{path}: a solution of {problem.id} does not give the answer {problem.answer!r}; it ends with "
                f"{wrong[0][-60:]!r}; {REMEDY}"
            )
        found += [replace(example, target_ids=base.target_ids(text)) for text in texts]
        if not texts and settings.otherwise == "gold":
            found.append(example)
        solved, solutions = solved + bool(texts), solutions + len(texts)
    share = OwnShare(len(examples), solved, solutions, settings.otherwise, own.condition, own.base, own.fingerprint)
    return found, share


def _normalized(question: str) -> str:
    return " ".join(question.split()).lower()


def _without_repeats(problems: list[Problem], split: str) -> tuple[list[Problem], list[str]]:
    """The first problem of each question, and what is to be said of the others."""
    first = {_normalized(problem.question): problem for problem in reversed(problems)}
    kept = list(first.values())[::-1]
    if len(kept) == len(problems):
        return kept, []
    chosen = {id(problem) for problem in kept}
    repeats = [problem for problem in problems if id(problem) not in chosen]
    others = sum(problem.answer != first[_normalized(problem.question)].answer for problem in repeats)
    return kept, [
        f"{len(repeats)} of {len(problems)} {split} problems ask what an earlier one asks, {others} of them with "
        f"another answer; left out, such as {repeats[0].question[:60]!r}"
    ]


def _leave_out_long(
    examples: list[Example], split: str, max_tokens: int | None, limits: ContextLimits
) -> tuple[list[Example], list[str]]:
    base_limit = min(limits.base, max_tokens or limits.base)
    # A test problem is judged by its prompt alone: leaving out those with long solutions would leave out the hard ones.
    lengths = [e.length - len(e.target_ids) if split == "test" else e.length for e in examples]
    short = [
        example
        for example, length in zip(examples, lengths, strict=True)
        if length <= base_limit and len(example.assistant.token_ids) <= limits.assistant
    ]
    if len(short) == len(examples):
        return examples, []
    longest = max(lengths)
    longest_assistant = max(len(example.assistant.token_ids) for example in examples)
    found = (
        f"{len(examples) - len(short)} of {len(examples)} {split} problems are too long: up to {longest} of "
        f"{base_limit} base tokens, up to {longest_assistant} of {limits.assistant} assistant tokens"
    )
    if max_tokens is None:
        raise SoftCoTError(f"{found}; set task.max_tokens={base_limit} to leave them out, or use a longer context")
    return short, [f"{found}; left out"]


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
            f"not each question can have another one's thoughts: {most} of the {len(inputs)} problems are the same to "
            "the assistant"
        )
    # A rotation of a random order with like beside like, by more than the likes of any: nobody keeps their own.
    order = [index for group in alike.values() for index in group]
    taken = dict(zip(order, order[most:] + order[:most], strict=True))
    return [taken[index] for index in range(len(inputs))]


def digest(examples: Sequence[Example]) -> str:
    """A hash of what the models read and what is supervised, of each example in its order: equal for equal data."""
    content = hashlib.sha256()
    for example in examples:
        given = example.assistant
        for ids in (given.token_ids, given.positions, example.prefix_ids, example.suffix_ids, example.target_ids):
            content.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return content.hexdigest()
