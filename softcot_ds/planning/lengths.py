"""How long the examples of a recipe are: read from its data where that needs no network, else typical numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from softcot_ds.choices import TASKS, chosen
from softcot_ds.data.batches import Batch, collate, token_ids
from softcot_ds.data.examples import Example, Splits
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import planned
from softcot_ds.models.model_files import tokenizer_is_here
from softcot_ds.models.shared_prefix import common_prefix
from softcot_ds.recipe import Recipe
from softcot_ds.tasks import Problem, Task, make_task
from softcot_ds.tasks.gsm8k import GSM8K


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example, the thoughts apart."""

    shared: int
    """What all prefixes begin with, which is read once."""
    prefix: int
    """The rest before the thoughts."""
    suffix: int
    """Of the prompt behind the thoughts."""
    target: int
    """What is supervised."""
    assistant: int
    """What the assistant reads, thoughts included."""

    def batch(self, size: int, thoughts: int) -> Batch:
        """``size`` examples of these lengths, on the CPU."""
        inputs = AssistantInput("", [0] * self.assistant, list(range(self.assistant - thoughts, self.assistant)))
        prefix, suffix, target = ([0] * number for number in (self.shared + self.prefix, self.suffix, self.target))
        return collate([Example(Problem("", "", ""), inputs, prefix, suffix, target)] * size, 0, self.shared)


@dataclass(frozen=True)
class Data:
    """The examples of a recipe."""

    mean: Lengths
    longest: Lengths
    """The longest of each part among the training examples, as what decides the memory: a batch is padded to them."""
    train: int
    validation: int
    test: int
    tokens: int
    """Different tokens in all training and validation examples, whose embeddings each rank keeps."""
    source: str
    """Where these numbers are from, in words."""


def read_data(recipe: Recipe) -> Data:
    """The recipe's own data where models' tokenizers and data lie here, and there is some to train on, else the numbers
    of what is published for its task.

    Raises:
        SoftCoTError: the data lies here and is wrong.
    """
    generated = chosen(TASKS, recipe.task.name).most_generated is not None
    sources = [name for name in (recipe.task.train, recipe.task.validation, recipe.task.test) if name is not None]
    files = generated or all(Path(name).is_file() for name in sources)
    task = make_task(recipe.task)
    if not files or not task.trains or not all(map(tokenizer_is_here, (recipe.base, recipe.assistant))):
        return _typical(task, recipe.thoughts.count)
    return data_of(planned(recipe).splits)


def data_of(splits: Splits) -> Data:
    """The lengths of examples that have been read."""
    shared = len(common_prefix([example.prefix_ids for example in (*splits.train, *splits.validation)]))
    return Data(
        _lengths(splits.train, shared, lambda numbers: round(sum(numbers) / len(numbers))),
        _lengths(splits.train, shared, max),
        len(splits.train),
        len(splits.validation),
        len(splits.test),
        len(token_ids([*splits.train, *splits.validation], 0)),
        f"{len(splits.train):,} training problems of the recipe",
    )


def _lengths(examples: Sequence[Example], shared: int, of: Callable[[list[int]], int]) -> Lengths:
    return Lengths(
        shared,
        of([len(example.prefix_ids) for example in examples]) - shared,
        of([len(example.suffix_ids) for example in examples]),
        of([len(example.target_ids) for example in examples]),
        of([len(example.assistant.token_ids) for example in examples]),
    )


def _typical(task: Task, thoughts: int) -> Data:
    """The sizes of what is published for the task, or GSM8K's."""
    config, own = task.config, task.sizes
    sizes = own or GSM8K.sizes
    available, test = (config.train_problems or sizes.train, config.test_problems or sizes.test)
    if own:
        available, test = min(available, own.train), min(test, own.test)
    if config.test_from_train:
        available, test = available * 4 // 5, available - available * 4 // 5
    validation = config.validation_problems if task.trains else 0
    if config.validation is None:
        train = available - validation if task.trains else 0
    else:
        train, validation = available, min(validation, sizes.validation or validation)
    if task.trains and train < 1:
        raise SoftCoTError(
            f"task.validation_problems is {validation} of {available} training problems; leave some for training"
        )
    mean, longest = (
        Lengths(sizes.instructions, sizes.question[i], 5, sizes.target[i], sizes.assistant[i] + thoughts)
        for i in (0, 1)
    )
    name = config.name if own else "gsm8k"
    source = (
        f"lengths and numbers of problems of {name} as published, as the recipe's data or tokenizers do not lie here"
    )
    return Data(mean, longest, train, validation, test, sizes.tokens, source)
