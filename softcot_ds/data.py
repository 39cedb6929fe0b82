"""From problems to examples, and from examples to batches.

Which examples make up a global batch depends on the seed alone, never on the number of ranks: a run that resumes on
another number of ranks continues the same curve.
"""

import hashlib
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from softcot_ds.errors import SoftCoTError
from softcot_ds.prompts import AssistantInput, AssistantPrompts, BasePrompts
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks import Problem, Task

IGNORE = -100
"""Label of a position without supervision, as PyTorch's cross entropy ignores it."""


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

    @property
    def length(self) -> int:
        """Positions in the base model, thoughts included."""
        return len(self.prefix_ids) + len(self.assistant.positions) + len(self.suffix_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Splits:
    """Examples for training, for validation (cut from the training data) and for test; no question is in two."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    notes: list[str]
    """What was left out, and why; to be printed."""

    def assistant_inputs(self) -> list[AssistantInput]:
        return [example.assistant for example in (*self.train, *self.validation, *self.test)]


@dataclass(frozen=True)
class ContextLimits:
    """Longest sequence of each model, tokens."""

    assistant: int
    base: int


def load_splits(
    task: Task, config: TaskConfig, base: BasePrompts, assistant: AssistantPrompts, limits: ContextLimits
) -> Splits:
    """Read the task's data, cut the validation set, tokenize.

    Raises:
        SoftCoTError: malformed data, too few problems, or sequences longer than a model's context while
            task.max_tokens does not say that such problems are to be left out.
    """
    if assistant.count >= min(limits.assistant, limits.base):
        raise SoftCoTError(
            f"thoughts.count {assistant.count} does not fit the context of {limits.assistant} tokens (assistant) "
            f"and {limits.base} tokens (base); take fewer thoughts"
        )
    problems, notes = _split_problems(task, config)
    splits = {}
    for name, chosen in problems.items():
        examples = [
            Example(
                problem,
                assistant.thoughts_input(problem.id, problem.question),
                prompt.prefix_ids,
                prompt.suffix_ids,
                base.target_ids(task.target(problem)),
            )
            for problem in chosen
            for prompt in [base.with_thoughts(problem.question)]
        ]
        splits[name], note = _leave_out_long(examples, name, config.max_tokens, limits)
        notes += note
    if not splits["train"]:
        raise SoftCoTError("no training problem is left; " + ("; ".join(notes) or "the data is empty"))
    return Splits(**splits, notes=notes)


def _split_problems(task: Task, config: TaskConfig) -> tuple[dict[str, list[Problem]], list[str]]:
    notes = []
    test = _without_repeats(task.read("test"))
    test_questions = {_normalized(problem.question) for problem in test}
    train = _without_repeats(task.read("train"))
    kept = [problem for problem in train if _normalized(problem.question) not in test_questions]
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept)} training problems are in the test data too; left out")
    if config.validation_problems >= len(kept):
        raise SoftCoTError(
            f"task.validation_problems is {config.validation_problems}, but there are only {len(kept)} training "
            "problems to cut them from"
        )
    # By content, not by position: reordering or adding data moves no old problem from one side to the other.
    by_hash = sorted(kept, key=lambda problem: hashlib.sha256(b"validation" + problem.question.encode()).digest())
    validation = by_hash[: config.validation_problems]
    in_validation = {problem.id for problem in validation}
    train = [problem for problem in kept if problem.id not in in_validation]
    return {
        "train": train[: config.train_problems],
        "validation": validation,
        "test": test[: config.test_problems],
    }, notes


def _normalized(question: str) -> str:
    return " ".join(question.split()).lower()


def _without_repeats(problems: list[Problem]) -> list[Problem]:
    return list({_normalized(problem.question): problem for problem in reversed(problems)}.values())[::-1]


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


def digest(examples: Sequence[Example]) -> str:
    """A hash of what the models read and what is supervised, of each example in its order: equal for equal data."""
    content = hashlib.sha256()
    for example in examples:
        given = example.assistant
        for ids in (given.token_ids, given.positions, example.prefix_ids, example.suffix_ids, example.target_ids):
            content.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return content.hexdigest()


def global_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless global batches: lists of ``batch_size`` indices of examples, lengths alike within a batch.

    Each epoch is a new permutation. Windows of 50 batches are sorted by length, cut into batches and the batches
    shuffled, so that a batch holds little padding while the order stays random. What does not fill a batch at the end
    of an epoch, the permutation's last, is left for other epochs' permutations to bring up.
    """
    if len(lengths) < batch_size:
        raise SoftCoTError(
            f"training.global_batch_size {batch_size} is larger than the {len(lengths)} training problems; "
            "lower it or add data"
        )
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/{epoch}")
        # Cut before sorting: the longest examples would be left out otherwise, of few problems in every epoch.
        order = rng.sample(range(len(lengths)), len(lengths) // batch_size * batch_size)
        batches = []
        for start in range(0, len(order), 50 * batch_size):
            window = sorted(order[start : start + 50 * batch_size], key=lambda index: lengths[index])
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        yield from batches
        epoch += 1


def order_by_prefix(batch: list[int], examples: Sequence[Example]) -> list[int]:
    """A global batch in the order of its examples' prefixes.

    It holds examples of one length, so neighbours are then alike in both parts, and so in what each is padded to.
    """
    return sorted(batch, key=lambda index: len(examples[index].prefix_ids))


def micro_batches(batch: list[int], rank: int, world_size: int, accumulation: int) -> list[list[int]]:
    """This rank's ``accumulation`` micro-batches of a global batch; over all ranks each index comes once.

    Sizes differ by one at most, and neighbours in length stay together. Requires
    ``len(batch) >= world_size * accumulation``: an empty micro-batch would leave a rank out of a collective call.
    """
    parts = world_size * accumulation
    bounds = [len(batch) * part // parts for part in range(parts + 1)]
    mine = range(rank, parts, world_size)
    return [batch[bounds[part] : bounds[part + 1]] for part in mine]


@dataclass
class Batch:
    """Examples as padded tensors. B examples, prefix padded left to L, suffix and target padded right to R.

    The prefix may lack tokens that all examples share. Between prefix and suffix stand T thoughts. K tokens are
    supervised.
    """

    prefix_ids: torch.Tensor
    """(B, L) int64."""
    prefix_mask: torch.Tensor
    """(B, L) bool, False on padding."""
    suffix_ids: torch.Tensor
    """(B, R) int64, the rest of the prompt and the target."""
    suffix_mask: torch.Tensor
    """(B, R) bool, False on padding."""
    predict_at: torch.Tensor
    """(K,) int64: positions that predict a supervised token, in the flattened (B, T+R) thoughts and suffix."""
    targets: torch.Tensor
    """(K,) int64: the supervised tokens."""
    assistant: list[AssistantInput]
    """What the assistant reads for each example."""
    longest: int
    """Positions of the longest example, shared tokens and thoughts included."""
    thoughts: torch.Tensor | None = None
    """(B, T, P) the assistant's states, or None when there are none to read (online, static)."""

    @property
    def num_tokens(self) -> int:
        """Base tokens without padding, thoughts and shared tokens; call it before the batch moves to a GPU."""
        return int(self.prefix_mask.sum() + self.suffix_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(
            **{name: change(value) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}
        )


def shared_prefix(examples: Sequence[Example]) -> list[int]:
    """The longest run of tokens that every example's prefix begins with: the instruction."""
    # In lexicographic order, all stand between the first and the last, and so begin with what both begin with.
    first, last = (choose(example.prefix_ids for example in examples) for choose in (min, max))
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]


def collate(examples: Sequence[Example], pad_id: int, num_shared: int = 0) -> Batch:
    """Pad examples into a batch (on the CPU, without thoughts), without the first ``num_shared`` tokens of each."""
    prefix_ids, prefix_mask = pad([e.prefix_ids[num_shared:] for e in examples], pad_id, side="left")
    suffix_ids, suffix_mask = pad([e.suffix_ids + e.target_ids for e in examples], pad_id, side="right")
    num_thoughts = len(examples[0].assistant.positions)
    width = num_thoughts + suffix_ids.shape[1]
    predict_at = [
        # The token before the target's first predicts it: the last of the prompt, or the last thought.
        row * width + num_thoughts + len(example.suffix_ids) - 1 + offset
        for row, example in enumerate(examples)
        for offset in range(len(example.target_ids))
    ]
    return Batch(
        prefix_ids,
        prefix_mask,
        suffix_ids,
        suffix_mask,
        torch.tensor(predict_at, dtype=torch.int64),
        torch.tensor([token for example in examples for token in example.target_ids], dtype=torch.int64),
        [example.assistant for example in examples],
        max(example.length for example in examples),
    )


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as an (B, longest) int64 tensor and its bool mask, False on padding."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.int64)
        mask[index, columns] = True
    return ids, mask
