r"""Finding the number that an output gives as its answer.

Two questions are kept apart. *Reading* a number in its notation is numerals.py. *Where* the answer stands is here, a
question of position and of what announces it:

1. ``#### 18``: the first one; what a model writes after it is a remark or another problem.
2. ``\boxed{18}``, "the answer is 18", "Answer: 18", ``<answer>18``: the last one. A boxed step of a solution that goes
   on is none, "Answer:" may open a solution, and what is supposed or taken back does not count.
3. What all the rest only explains: "26 students: 14 girls and 12 boys", "54. Each of the 6 boxes holds 9."
4. The last statement that holds a number and is neither a question nor a remark ("This assumes 7 days a week.").
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, pairwise

from softcot_ds.tasks.numerals import Numeral, numerals, plain
from softcot_ds.tasks.outputs import NEXT_PROBLEM, TAKEN_BACK, after_thinking, boxes, is_supposed


@dataclass(frozen=True)
class _Reading:
    """A number with the calculation it ends: "9 eggs * $2 = $18" is one reading, of value 18."""

    start: int
    end: int
    value: Fraction | None
    """None where a person reads no single number: a range, a time, a calculation without its result."""
    is_equation: bool
    is_aside: bool
    """Told in passing: "after 5 days", "each of the 3 boxes"."""
    in_words: bool
    is_trailing: bool = False
    """Told in passing after an equation, or as a reason."""
    is_box: bool = False


def extract_number(text: str, cut: bool = False) -> Fraction | None:
    r"""The number that ``text`` gives as its answer, or None when there is none.

    Of an equation the result counts (``x = 4``, ``3 + 4 = 7``). A percentage counts as its figure (``50%`` is 50),
    currencies and units are ignored. What a model thinks before it answers (``</think>``) is not searched.

    Args:
        text: a model's output.
        cut: the output ended at a limit. Its last number may be anything, so only an answer that was announced
            counts, and not one at the very end, which may have gone on.
    """
    text = after_thinking(plain(text))
    items = _items(text)
    hashes = _after_hashes(text, items, cut)
    if hashes and not NEXT_PROBLEM.search(text, 0, hashes.start):
        return hashes.value  # the common case; what follows would find the same, at ten times the cost
    readings = _readings(text, items, 0, len(text))
    announced = list(_announcements(text, items, readings))
    end = _end_of_first_output(text, readings, [hashes, *announced] if hashes else announced)
    if hashes and hashes.end <= end:
        return hashes.value
    statements = _statements(text[:end], readings)
    announced = [one for one in announced if one.end <= end and not (cut and _may_go_on(text, one))]
    answer = _last_announced(text, announced, statements)
    if answer is None and not cut:
        answer = _explained(text[:end], statements) or _concluded(text, statements)
    return None if answer is None else answer.value


# ----------------------------------------------------------------------------------------------- readings of numbers

# What may stand between the numbers of one calculation: "9 eggs * ($2", "= 13 eggs", "→ x =".
_UNIT = r"(?:\ ?[A-Za-z%°/'.$€£^{}\d-]{1,20}){0,4}"
_OPERATOR = re.compile(rf"{_UNIT}[)\]}}*]*\ ?(?:[-+*÷/*^]|\b[xX]\b|\b(?:plus|minus|times)\b)\ ?[(\[{{$]*", re.VERBOSE)
_EQUALS = re.compile(rf"{_UNIT}[)\]}}*]*\ ?[.]*(?:=|≈|→|[-=]>)[^\n,;]{{0,40}}", re.VERBOSE)
_ASIDE = re.compile(
    r"""(?: \b(?:in|per|every|each|at|on|above|within|during|than|from|since|over|by|for|until|the|these|those|this
            |that|his|(?<!ing\ )her|their|all|another|other|(?<!him\ )(?<!her\ )(?<!left\ )with)
          | \bout\ of(?:\ [a-z]{1,12}){0,4} | \bof\ wh(?:ich|om)
          | (?:\b(?:that|who)|(?<!,)\ which)(?:\ each)?\ (?:are|have|cost|weigh|hold|contain|seat|need|measure|sell|pay)
          | \b(?:each|all|both)\ of\ (?:which|whom)\ [a-z]{1,12}
          | \b(?:if|after|before|when|not)(?:\ [a-z]{1,12}){0,2} | \d\ of
          | \b(?:(?:the|his|her|their|its)|at\ an?)\ (?!total|sum|answer|final)[a-z]{1,15}(?:\ [a-z]{1,15})?\ of
          | (?<!has)(?<!have)(?<!needs)(?<!need)\ to\ (?!about|only|almost|nearly|exactly|over|around)[a-z]{1,15} )
        (?:\ [a-z]{1,12}ing)?(?:\ (?:the|these|those|his|her|their|about|only|all|a))?\ \**\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_NEXT_CLAUSE = r"so|thus|then|therefore|hence|which"
_REASON_GOES_ON = re.compile(rf"(?:(?!\b(?:{_NEXT_CLAUSE})\b)[^.;:!?=\n]){{0,120}}", re.IGNORECASE)
# "It takes 459 / 51 = 9 minutes to blink 459 times.": an equation is what its clause is about.
_SAME_CLAUSE = re.compile(rf"(?:(?!\b(?:{_NEXT_CLAUSE}|and(?! \Z))\b)[^,.;:!?()=\n]){{0,120}}", re.IGNORECASE)
_REASON = re.compile(r"[^.;:!?\n]{0,120}\b(?:because|(?<!and )since)\b[^,.;:!?\n]{0,120}", re.IGNORECASE)
_RESTATED = re.compile(r"(?:(?<=\bwhich is )|(?<=\bor ))[\d.]{1,9} ?(?:%|percent) of\b")
_PARENTHESIS = re.compile(r"\([^()\n]*\Z")
_ASIDE_BY_NEXT = re.compile(
    r"-[a-z]| (?:[a-z]{1,20} ){0,2}(?:(?:more|less|fewer|[a-z]{1,12}er) than|of (?:them|these|those|which))\b"
)
_LABEL = re.compile(r"\b(?:step|part|question|problem|example|case|section|phase|stage|method)s? #?$", re.IGNORECASE)
_ITEM = re.compile(r"^[ >#]{0,8}(?:\*\*)?(\d{1,2})[.)](?= *\S)(?!\d)", re.MULTILINE)


def _readings(text: str, items: set[int], start: int, end: int) -> list[_Reading]:
    """What is read between two positions."""
    chains: list[list[Numeral]] = []
    for numeral in _counted(text, items, start, end):
        if chains and _joint(text[chains[-1][-1].end : numeral.start]):
            chains[-1].append(numeral)
        else:
            chains.append([numeral])
    readings = [_reading(text, chain) for chain in chains]
    is_reason = False
    for index in range(1, len(readings)):
        one, other = readings[index - 1], readings[index]
        gap = text[one.end : other.start]
        goes_on = is_reason and not other.is_equation and _REASON_GOES_ON.fullmatch(gap)
        is_reason = bool(goes_on or _REASON.fullmatch(gap))
        follows = (one.is_equation or one.is_trailing) and not other.is_equation
        if is_reason or (follows and _SAME_CLAUSE.fullmatch(gap)):
            readings[index] = replace(other, is_aside=True, is_trailing=True)
    return readings


def _items(text: str) -> set[int]:
    """Where the numbers of a numbered list stand."""
    items, last = set(), 0
    for match in _ITEM.finditer(text):
        if int(match[1]) in (1, last + 1):
            last = int(match[1])
            items.add(match.start(1))
    return items


def _counted(text: str, items: set[int], start: int, end: int) -> Iterator[Numeral]:
    """The numbers of a text without those that only number its steps and items."""
    for numeral in numerals(text, start, end):
        if numeral.start not in items and not _LABEL.search(text[max(0, numeral.start - 40) : numeral.start]):
            yield numeral


def _joint(gap: str) -> str:
    """What joins two numbers into one calculation: an operator, an equals sign, or nothing ("")."""
    if len(gap) > 80 or "\n" in gap:
        return ""
    if _OPERATOR.fullmatch(gap):
        return "operator"
    return "equals" if _EQUALS.fullmatch(gap) else ""


def _reading(text: str, chain: list[Numeral]) -> _Reading:
    """The last number of a chain that is a whole side of it: of "16 - 7 = 9" and of "9 = 16 - 7" the 9."""
    joints = [_joint(text[a.end : b.start]) for a, b in pairwise(chain)]
    bounds = ["equals", *joints, "equals"]
    sides = [n.value for n, around in zip(chain, pairwise(bounds), strict=True) if around == ("equals", "equals")]
    values = [value for value in sides if value is not None]
    before, after = text[max(0, chain[0].start - 60) : chain[0].start], text[chain[0].end : chain[0].end + 60]
    in_passing = _ASIDE.search(before[-40:]) or _ASIDE_BY_NEXT.match(after) or _RESTATED.match(text, chain[0].start)
    enclosed = _PARENTHESIS.search(before) and ")" not in text[chain[0].start : chain[-1].end]
    is_aside = bool(enclosed or (in_passing and len(chain) == 1))
    in_words = all(numeral.in_words for numeral in chain)
    value = values[-1] if values else None
    return _Reading(chain[0].start, chain[-1].end, value, "equals" in joints, is_aside, in_words)


# ---------------------------------------------------------------------------------------------- announced answers

_HASHES = re.compile(r"####(?!#)[^\S\n]*\**")
_VISIBLE = re.compile(r"\S")
_ANSWER = re.compile(
    r"""(?P<final>final[\ _])?
        (?: (?:(?<![^\W_])(?:answer|ans|respuesta|réponse|resposta|risposta|antwort|ответ)\b
              | (?m:^)(?:a|[*_#>\ ]{0,6}result)(?=:))
            (?: [\s*_"'`)\]>]{0,6}(?P<colon>:|(?<=>)|\n) | [\s*_"'`)]{0,6}(?:=|→|->)
              | [^.!?\n:;=]{0,60}?\b(?:is|was|(?:will|would|should|must)\ be|equals|comes\ to|es|est|ist|é|è)(?![a-z]) )
          | 答案?(?:是|为|:) )""",
    re.VERBOSE | re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(r"\bis (?:the|my|our) (?:final |correct )?answer\b", re.IGNORECASE)
_FILLERS = re.compile(
    r"""(?:[\W_]|\b(?:the|final|answer|is|total|of|a|an|about|approximately|approx|roughly|around|exactly|simply|just|only
        |therefore|thus|then|so|equal|equals|to|now|at|least|most|no|number|us|usd|eur|rs|inr|x|y|n|boxed)\b)*""",
    re.VERBOSE | re.IGNORECASE,
)


def _after_hashes(text: str, items: set[int], cut: bool) -> _Reading | None:
    """The first complete number that follows ``####`` at once, on its line or alone on the next."""
    marks = [mark.span() for mark in _HASHES.finditer(text)]
    for (_, start), (following, _) in pairwise([*marks, (len(text), 0)]):
        for reading in _readings(text, items, start, min(_line_end(text, start), following))[:1]:
            if _follows(text, start, reading) and not (cut and _may_go_on(text, reading)):
                return reading
    return None


def _announcements(text: str, items: set[int], readings: list[_Reading]) -> Iterator[_Reading]:
    """What is announced otherwise."""
    for mark in _HASHES.finditer(text):
        # A sentence ("#### Janet makes $18 a day.") or "#### Total: 18", no heading ("#### Cost of 3 apples").
        stop = _line_end(text, mark.end())
        within = readings[_index(readings, mark.end()) : _index(readings, stop)]
        is_sentence = text[mark.end() : stop].rstrip(" *").endswith((".", "!"))
        if within and (is_sentence or ":" in text[within[0].start - 3 : within[0].start]):
            yield _chosen(within) if is_sentence else within[0]
    last_equation = max((reading.end for reading in readings if reading.is_equation), default=0)
    for start, stop in boxes(text):
        for reading in _readings(text, items, start, stop)[:1] or [_Reading(start, stop, None, False, False, False)]:
            yield replace(reading, end=stop, is_box=True)
    for mark in _ANSWER.finditer(text):
        for reading in readings[(index := _index(readings, mark.end())) : index + 1]:
            may_open = mark["colon"] and not mark["final"] and last_equation > reading.start
            opens = may_open and _opens_solution(text, readings, index)
            meant = not TAKEN_BACK.match(text, reading.end) and not is_supposed(text, mark.start())
            if meant and not opens and _follows(text, mark.end(), reading):
                yield reading
    for mark in _IS_THE_ANSWER.finditer(text):
        index = _index(readings, mark.start()) - 1
        if index >= 0 and re.fullmatch(r"[^.!?\n]{0,20}", text[readings[index].end : mark.start()][:40]):
            yield readings[index]


def _follows(text: str, position: int, reading: _Reading) -> bool:
    """Whether nothing but words that say nothing stands between a position and a number."""
    return reading.start - position <= 80 and bool(_FILLERS.fullmatch(text, position, reading.start))


def _line_end(text: str, position: int) -> int:
    """The end of the line, or of the next one when nothing more stands on this."""
    first = _VISIBLE.search(text, position)
    end = text.find("\n", first.start() if first else position)
    return end if end >= 0 else len(text)


def _index(readings: list[_Reading], position: int) -> int:
    """Of the first number at or after a position."""
    return bisect_left(readings, position, key=lambda reading: reading.start)


def _opens_solution(text: str, readings: list[_Reading], index: int) -> bool:
    """Whether a number after "Answer:" begins a worked solution, and is not the answer ("18 dollars per day.")."""
    first = readings[index]
    end = _END.search(text, first.end)
    stop = end.start() if end else len(text)
    said = [reading for reading in readings[index + 1 : _index(readings, stop)] if not reading.is_aside]
    rest = text[first.end : min(stop, first.end + 200)]
    return first.is_equation or bool(said) or len(re.findall(r"[^\W\d]+", rest)) > 4 or bool(_VERB.search(rest))


def _end_of_first_output(text: str, readings: list[_Reading], announced: list[_Reading]) -> int:
    """Where a model that has answered goes on with another problem or another turn; else where the text ends."""
    ends = [reading.end for reading in readings if reading.is_equation] + [one.end for one in announced]
    ends += [reading.end for reading in readings[:1] if _follows(text, 0, reading)]
    match = NEXT_PROBLEM.search(text, min(ends, default=len(text)))
    return match.start() if match else len(text)


def _may_go_on(text: str, reading: _Reading) -> bool:
    """Whether a number stands at the very end of a text, where the next token may have been another digit."""
    return reading.end >= (len(text) if reading.is_box else len(text.rstrip(" .,:/'*-")))


def _last_announced(text: str, announced: list[_Reading], statements: list["_Statement"]) -> _Reading | None:
    # A box is a step of the solution when an equation follows it.
    steps = (r.start for s in statements if s.counts for r in s.readings if r.is_equation)
    last_step = max(steps, default=0)
    finals = sorted((one for one in announced if not one.is_box or one.end > last_step), key=lambda one: one.start)
    # A loop that was cut: "The answer is 18. The answer is 1"; a box that was never closed.
    while len(finals) > 1 and _may_go_on(text, finals[-1]):
        first, last = (text[one.start : one.end] for one in finals[-2:])
        if not finals[-1].is_box and not first.startswith(last):
            break
        finals.pop()
    return finals[-1] if finals else None


# ------------------------------------------------------------------------------------------------ the last statement

_END = re.compile(
    r"""(?<!\b(?:Rs|No|vs|Mr|Ms|Dr))(?<!\bMrs)(?<!approx)(?<!\b[ap]\.m)[.!?;](?=[\s"')\]*$]|$) | 。 | \n""", re.VERBOSE
)
_REMARK = re.compile(
    r"""[(\[](?![^()\n]{0,80}\)\ *[^\s.]) | [*_#>\-\s]{0,6}
        (?:please|note|n\.?b\.|p\.?s\.|disclaimer|let\ me\ know|i?\ ?hope|feel\ free|thank|confidence|assum
          |i\ (?:used|did|checked)|if\ you(?:\ (?:have|need|want|would)|')
          |(?:let(?:'s|\ us)\ |to\ |we\ can\ |you\ can\ )?(?:double[- ])?(?:check|verify)|verification|explanation
          |this\ (?:assum|answer|solution|calculation|response|is\ (?:correct|because|based|assuming)))""",
    re.VERBOSE | re.IGNORECASE,
)
_VERB = re.compile(r"\b(?:is|are|was|were|be|has|have|had|can|will|do|does|did)\b")
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*|<b>([^<\n]{1,80})</b>")


@dataclass(frozen=True)
class _Statement:
    line: int
    counts: bool
    """False for questions and remarks."""
    readings: list[_Reading]


def _statements(text: str, readings: list[_Reading]) -> list[_Statement]:
    statements, start, line, remark = [], 0, 0, False
    for match in (*_END.finditer(text), None):
        end = match.start() if match else len(text)
        # A remark is about something, so the first statement is none.
        remark = remark or bool(statements and _REMARK.match(text[start : start + 120].lstrip(" ")))
        within = readings[_index(readings, start) : _index(readings, end)]
        statements.append(_Statement(line, not remark and not (match and match[0] == "?"), within))
        if match:
            start = match.end()
            if match[0] == "\n":
                line, remark = line + 1, False
    return statements


_PARTS_FOLLOW = re.compile(r"[^.!?\n]{0,80}?(?:[:;]|\b(?:consisting|made up|including|of which)\b|\n\s{0,8}[-*•])")
# With a unit the number stands alone in its paragraph: "16 eggs. She eats 3." begins a solution.
_SENTENCE_FOLLOWS = re.compile(
    r"(?:(?: ?[A-Za-z%°]{1,12}){1,4}[^\w(\n]{0,4}\n)?[^\w(]{0,3}[.!:;*\n][^\w(]{0,5}[A-Z][a-z']{0,15} [a-z]+ "
)
_CONCLUDES = re.compile(r"\b(?:so|thus|therefore|hence|now|left|remains?|total|altogether|in all)\b", re.IGNORECASE)


def _explained(text: str, statements: list[_Statement]) -> _Reading | None:
    """The answer that the rest of a text only explains: a total before its parts, or a bare number that opens it."""
    readings = [reading for statement in statements if statement.counts for reading in statement.readings]
    conclusion = max((match.end() for match in _CONCLUDES.finditer(text)), default=0)
    rest = Fraction(0)
    for reading in reversed(readings):
        if reading.value is None or reading.is_equation:
            return None
        parts = _PARTS_FOLLOW.match(text, reading.end)
        if reading.value == rest and parts and parts.end() > conclusion:
            return reading
        rest += reading.value
    opens = readings and not re.search(r"\w", text[: readings[0].start]) and readings[0].end > conclusion
    return readings[0] if opens and _SENTENCE_FOLLOWS.match(text, readings[0].end) else None


def _concluded(text: str, statements: list[_Statement]) -> _Reading | None:
    """What the last statement says; of its line, what is in bold print."""
    bold = [match.span() for match in _BOLD.finditer(text)]
    for _, group in groupby(reversed([s for s in statements if s.counts]), key=lambda statement: statement.line):
        line = [[r for r in statement.readings if not (r.in_words and r.is_aside)] for statement in group]
        for candidates in ([r for readings in line for r in readings if _within(bold, r)], *line):
            chosen = _chosen(candidates)
            if chosen:
                return chosen
    return None


def _within(spans: list[tuple[int, int]], reading: _Reading) -> bool:
    index = bisect_left(spans, reading.start, key=lambda span: span[1])
    return index < len(spans) and spans[index][0] <= reading.start and reading.end <= spans[index][1]


def _chosen(readings: list[_Reading]) -> _Reading | None:
    """The number of one statement that it is about: the last that is not told in passing, figures before words."""
    main = [reading for reading in readings if not reading.is_aside]
    figures = [reading for reading in main if not reading.in_words]
    return next((group[-1] for group in (figures, main, readings) if group), None)
