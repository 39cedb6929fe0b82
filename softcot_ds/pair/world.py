"""Word problems that separate knowing what words mean from knowing how to calculate.

A person starts with some things and two or three events follow, one sentence each:

    question   tom has 23 coins . first tom snags 5 . second tom sketches 9 . third tom halves them .
               how many coins now ?
    plan       do add skip halve .
    reasoning  first 23 + 5 = 28 second skip 9 third 28 / 2 = 14 answer 14

The ordinals tie a step of the reasoning to its sentence; without them so small a base loses count of the events.

The same problem can be asked in two ways more: as a choice among four numbers, of which the base writes one, or as a
claim, answered by yes or no. What is offered stands in front of the story. There the assistant, which never saw any
such line, still writes its plan (for 91 of 100 problems; behind the story, where it expects to begin, for none).

Three of the five operations (`add`, `take`, `skip`) share one sentence frame with a number, the other two
(`double`, `halve`) share one without. So syntax does not give the operation away: one has to know the verb.

Every operation has common and rare verbs. That is where the two models differ:

- the base calculates, and has seen *common* verbs only in problems with a solution. Rare verbs are familiar words
  to it (it reads stories that contain them), but it never saw what they do to a number;
- the assistant knows all verbs and writes plans, and has never seen a calculation.

What the base lacks on a problem with a rare verb is what the assistant knows. That, and nothing else, is what soft
thoughts can carry over.

Splits. A problem's split is a hash of its *signature*: the start number, and operation and number of each event. The
two models are trained on documents of the train split only, like the projection. A test problem is therefore a new
combination of numbers and operations, told with known verbs, names and things. It does not test new verbs.
"""

import random
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Split = Literal["train", "validation", "test"]
Signature = tuple[int, tuple[tuple[str, int], ...]]
"""Start number, and operation and number of each event: what the split is decided by."""


def split_of(signature: Signature) -> Split:
    """10% of all signatures are test, 5% validation. The hash is the same on every machine, unlike Python's own."""
    bucket = zlib.crc32(repr(signature).encode()) % 20
    return {0: "test", 1: "test", 2: "validation"}.get(bucket, "train")


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Operation:
    """What an event does to the count, and the verbs that say so."""

    name: str
    symbol: str
    """As written in the reasoning; empty for `skip`, which does not calculate."""
    has_number: bool
    """Whether the sentence carries a number: "tom buys 5 ." or "tom doubles them ."."""
    weight: float
    """How often it is drawn."""
    common: tuple[str, ...]
    """Verbs the base has seen in solved problems."""
    rare: tuple[str, ...]
    """Verbs the base has seen in stories only."""

    def apply(self, count: int, number: int) -> int:
        """The count after the event; `number` is 2 for `double` and `halve`."""
        match self.symbol:
            case "+":
                return count + number
            case "-":
                return count - number
            case "x":
                return count * number
            case "/":
                return count // number
        return count


OPERATIONS = (
    Operation(
        "add",
        "+",
        True,
        0.3,
        words("buys finds gets receives collects earns wins picks gathers gains grabs takes borrows makes steals"),
        words("inherits snags pockets acquires scoops hoards"),
    ),
    Operation(
        "take",
        "-",
        True,
        0.3,
        words("sells loses gives eats drops breaks throws uses hands burns trades wastes ruins sends pays"),
        words("donates misplaces squanders forfeits discards shreds"),
    ),
    Operation(
        "skip",
        "",
        True,
        0.2,
        words(
            "counts sees draws admires paints watches smells describes cleans sorts imagines likes shows names holds"
        ),
        words("sketches praises inspects ponders mentions adores"),
    ),
    Operation("double", "x", False, 0.1, ("doubles", "twins", "clones", "repeats"), ("duplicates", "mirrors")),
    Operation("halve", "/", False, 0.1, ("halves", "splits", "shares", "cuts"), ("bisects", "cleaves")),
)

NAMES = words("tom ann bob eva sam mia leo zoe max ivy dan lily ben ruth carl nora hugo jane paul rosa")
ITEMS = words(
    "apples coins books cards shells stones pens cups stamps balls plums eggs hats kites nuts beads toys figs"
)
ORDINALS = ("first", "second", "third")
SYLLABLES = words("bla wug fro zim dax gor pli nar tob kes vu mib sha lor quo ren")

MAX_COUNT = 99
"""Counts stay within 1 to 99: two digits, so that a 2M model can learn to calculate in minutes."""
MAX_EVENTS = len(ORDINALS)
OPTION_LETTERS = "ABCD"


@dataclass(frozen=True)
class Event:
    """One sentence: an operation, its number, and the verb that tells it."""

    operation: Operation
    number: int
    verb: str

    @property
    def is_rare(self) -> bool:
        return self.verb in self.operation.rare


@dataclass(frozen=True)
class WordProblem:
    """A story with a question, and the ways it can be answered."""

    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def story(self) -> str:
        """The events without the question."""
        sentences = [f"{self.name} has {self.start} {self.item} ."]
        for ordinal, event in zip(ORDINALS, self.events, strict=False):
            object_ = event.number if event.operation.has_number else "them"
            sentences.append(f"{ordinal} {self.name} {event.verb} {object_} .")
        return " ".join(sentences)

    @property
    def question(self) -> str:
        return f"{self.story} how many {self.item} now ?"

    @property
    def operations(self) -> list[str]:
        return [event.operation.name for event in self.events]

    @property
    def plan(self) -> str:
        """One word per event and no number: what the assistant knows.

        It opens with "do" because a language model's state at a token predicts the *next* one: with a constant
        first word, the state at the first placeholder is the one that predicts the first operation.
        """
        return f"do {' '.join(self.operations)} ."

    @property
    def counts(self) -> list[int]:
        """The count at the start and after each event."""
        counts = [self.start]
        for event in self.events:
            counts.append(event.operation.apply(counts[-1], event.number))
        return counts

    @property
    def steps(self) -> str:
        """One step per event."""
        steps = []
        for ordinal, event, before, after in zip(ORDINALS, self.events, self.counts, self.counts[1:], strict=False):
            symbol = event.operation.symbol
            step = f"{before} {symbol} {event.number} = {after}" if symbol else f"skip {event.number}"
            steps.append(f"{ordinal} {step}")
        return " ".join(steps)

    @property
    def reasoning(self) -> str:
        """The steps, then the answer: what the base writes."""
        return f"{self.steps} answer {self.answer}"

    @property
    def answer(self) -> int:
        return self.counts[-1]

    @property
    def num_rare(self) -> int:
        """Events told with a verb the base never saw solved."""
        return sum(event.is_rare for event in self.events)

    @property
    def signature(self) -> Signature:
        return self.start, tuple((event.operation.name, event.number) for event in self.events)

    @property
    def misreadings(self) -> list[int]:
        """The wrong counts that one comes to who takes one verb for another, ascending."""
        found = set()
        for place, event in enumerate(self.events):
            for other in OPERATIONS:
                # A sentence with a number is misread as another with one.
                if other is event.operation or other.has_number != event.operation.has_number:
                    continue
                events = (*self.events[:place], replace(event, operation=other), *self.events[place + 1 :])
                found.add(replace(self, events=events).answer)
        return sorted(count for count in found if self.may_be_offered(count))

    def may_be_offered(self, count: int) -> bool:
        """Whether a number can stand beside the answer. It ends in another digit, so that one is enough to compare."""
        return 0 < count <= MAX_COUNT and count % 10 != self.answer % 10


@dataclass(frozen=True)
class Choice:
    """A word problem with numbers to choose from. All about it follows from the problem."""

    problem: WordProblem

    @cached_property
    def options(self) -> tuple[int, ...]:
        """Of A to D: the answer at a place that is drawn, and wrong ones, no two the same."""
        rng = random.Random(f"options {self.problem.question}")
        wrong = self.problem.misreadings
        near = [self.problem.answer + way * step for step in range(1, 10) for way in (1, -1)]
        more = [count for count in near if self.problem.may_be_offered(count) and count not in wrong]
        needed = len(OPTION_LETTERS) - 1
        wrong = rng.sample(wrong, needed) if len(wrong) >= needed else wrong + rng.sample(more, needed - len(wrong))
        options = [self.problem.answer, *wrong]
        rng.shuffle(options)
        return tuple(options)

    @property
    def question(self) -> str:
        lines = [f"({letter}) {count}" for letter, count in zip(OPTION_LETTERS, self.options, strict=True)]
        return "\n".join([*lines, self.problem.question])

    @property
    def answer(self) -> str:
        """A letter."""
        return OPTION_LETTERS[self.options.index(self.problem.answer)]


@dataclass(frozen=True)
class Claim:
    """A word problem with a number that may be its answer. All about it follows from the problem."""

    problem: WordProblem

    @cached_property
    def count(self) -> int:
        """The number that is claimed: in half of all problems the answer, else a wrong one."""
        rng = random.Random(f"claim {self.problem.question}")
        if rng.random() < 0.5:
            return self.problem.answer
        return rng.choice([count for count in Choice(self.problem).options if count != self.problem.answer])

    @property
    def question(self) -> str:
        return f"(yes or no) {self.count}\n{self.problem.question}"

    @property
    def answer(self) -> str:
        """yes or no."""
        return "yes" if self.count == self.problem.answer else "no"

    @property
    def steps(self) -> str:
        """Those of the problem, then the comparison."""
        return f"{self.problem.steps} now {self.problem.answer} {self.count} {self.answer}"


def made_up_verb(rng: random.Random) -> str:
    """A word without a meaning: beside it, only a plan tells what happens."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))) + "s"


def draw_problem(rng: random.Random, split: Split, rare_rate: float, made_up_rate: float = 0.0) -> WordProblem:
    """One random problem of a split.

    Args:
        rng: source of all randomness.
        split: problems of other splits are drawn again.
        rare_rate: chance, per event, of a rare verb instead of a common one.
        made_up_rate: chance, per event, of a made-up verb instead of either.
    """
    weights = [operation.weight for operation in OPERATIONS]
    while True:
        start = count = rng.randint(4, 60)
        events = []
        for operation in rng.choices(OPERATIONS, weights, k=rng.randint(2, MAX_EVENTS)):
            number = rng.randint(2, 20) if operation.has_number else 2
            verb = rng.choice(operation.rare if rng.random() < rare_rate else operation.common)
            if rng.random() < made_up_rate:
                verb = made_up_verb(rng)
            if operation.symbol == "/" and count % 2:
                break  # no fractions
            count = operation.apply(count, number)
            if not 0 < count <= MAX_COUNT:
                break
            events.append(Event(operation, number, verb))
        else:
            problem = WordProblem(rng.choice(NAMES), rng.choice(ITEMS), start, tuple(events))
            if split_of(problem.signature) == split:
                return problem


TASK_RARE_RATE = 0.5
"""Chance of a rare verb per event in the problems of the task: four problems in five have at least one."""


def generate(split: Split, count: int, seed: int) -> list[WordProblem]:
    """`count` problems of a split, no two with the same signature; the same for the same arguments.

    Problems of different splits never share a signature, whatever the seeds: the split is a function of it.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; it must be train, validation or test")
    rng = random.Random(f"{split}-{seed}")
    problems: dict[Signature, WordProblem] = {}
    while len(problems) < count:
        problem = draw_problem(rng, split, TASK_RARE_RATE)
        problems.setdefault(problem.signature, problem)
    return list(problems.values())


# ------------------------------------------------------------------------------------- what the models are trained on


@dataclass(frozen=True)
class Document:
    """One training text: a turn of a user and a reply, either of which may be missing."""

    user: str | None
    reply: str | None


ASSISTANT_INSTRUCTION = "make a plan ."
PLAN_MARKER = "plan :"


def assistant_document(rng: random.Random) -> Document:
    """Question, then plan, with all verbs. The assistant reads nothing else, so it never sees a calculation."""
    problem = draw_problem(rng, "train", rare_rate=0.5)
    return Document(f"{ASSISTANT_INSTRUCTION}\n{problem.question}", problem.plan)


def base_document(rng: random.Random) -> Document:
    """A text for the base, of one of four kinds. No rare verb stands in any problem with a solution."""
    kind = rng.choices((_drill, _story, _solved, _solved_with_plan), (0.15, 0.10, 0.25, 0.50))[0]
    return kind(rng)


def _drill(rng: random.Random) -> Document:
    """Bare calculations: two-digit arithmetic takes more practice than the problems alone give."""
    steps = []
    while len(steps) < 6:
        operation = rng.choice([operation for operation in OPERATIONS if operation.symbol])
        before, number = rng.randint(1, MAX_COUNT), rng.randint(2, 20) if operation.has_number else 2
        after = operation.apply(before, number)
        if 0 < after <= MAX_COUNT and (operation.symbol != "/" or before % 2 == 0):
            steps.append(f"{before} {operation.symbol} {number} = {after}")
    return Document(None, " ; ".join(steps))


def _story(rng: random.Random) -> Document:
    """Events without question or solution, all verbs: makes rare verbs familiar words of unknown effect."""
    return Document(draw_problem(rng, "train", rare_rate=0.5).story, None)


def _solved(rng: random.Random) -> Document:
    """A question and its solution, common verbs: reading verbs without help."""
    problem = draw_problem(rng, "train", rare_rate=0.0)
    return Document(problem.question, problem.reasoning)


def _solved_with_plan(rng: random.Random) -> Document:
    """A question, a plan in words, and the solution; half the verbs are made up.

    Made-up verbs make the plan worth reading. Its layout varies, with or without "do" and with up to four dots behind,
    because soft thoughts have a fixed count: the base must take unused slots for padding.
    """
    problem = draw_problem(rng, "train", rare_rate=0.0, made_up_rate=0.5)
    lead, dots = rng.choice(([], ["do"])), ["."] * rng.randint(0, 4)
    plan = " ".join([*lead, *problem.operations, *dots])
    return Document(f"{problem.question}\n{PLAN_MARKER}\n{plan}", problem.reasoning)
