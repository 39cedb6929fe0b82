r"""Finding the option that an output chooses among those of its question, as the option's letter: "B".

A letter counts only where something makes it the name of an option; the article "a" and the quantities A and B of a
problem are none. What is written last wins among what is announced; after that, in this order:

1. Announced: ``\boxed{B}``, "the answer is B", "Answer: (B)", "option B is correct", "#### B", "I choose B"; or the
   value of an option in such a place, where only that is written: ``\boxed{125}``.
2. A label that is a whole line, the last or the first: "B", "(B)", "B) 125", "So B.". Lines that list the options are
   none, nor is the label of another option's value.
3. "(B)" or "option B" in a conclusion ("So it is option B"), or the only one that is mentioned at all.
4. The value of one option in the last statement: "Therefore 125 apples are left."

What is denied, supposed ("if the answer is B") or taken back ("B. Wait, ...") does not count. What names two options in
one of these places ("B or C") is no answer, and nothing weaker is looked for.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from string import ascii_uppercase
from typing import Any

from softcot_ds.tasks.answers import extract_number
from softcot_ds.tasks.numerals import numerals, plain
from softcot_ds.tasks.outputs import NEXT_PROBLEM, TAKEN_BACK, after_thinking, boxed_end, boxes, is_supposed

LETTERS = ascii_uppercase

_TWO = "two"
"""In the place of a letter: more than one option is named there."""


@dataclass(frozen=True)
class _Choice:
    start: int
    end: int
    letter: str
    is_closed: bool = False
    """It is complete, whatever follows: in a closed box, or in parentheses."""


def extract_option(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that ``text`` chooses, in upper case, or None.

    Args:
        text: a model's output. What it thinks before it answers (``</think>``) is not searched.
        cut: the output ended at a limit: only an announced letter counts, and none at the very end, which may have been
            the first of a word.
        options: the texts of the options, of A, B, and so on.
    """
    text = after_thinking(text)
    boxed = boxed_end(text)
    if boxed is not None and len(boxed) == 1 and boxed in LETTERS[: len(options)]:
        return boxed
    text = _flat(text)
    known = _Options(options)
    choices = sorted(_announced(text, known), key=lambda choice: (choice.start, choice.end))
    if choices and (following := NEXT_PROBLEM.search(text, choices[0].end)):
        text = text[: following.start()]
        choices = [choice for choice in choices if choice.end <= len(text)]
    if cut:
        choices = [choice for choice in choices if choice.is_closed or choice.end < len(text.rstrip(" .)"))]
        return _letter(choices[-1].letter) if choices else None
    if choices:
        return _letter(choices[-1].letter)
    text = _without_listing(text)
    return _letter(_labelled_line(text, known) or _concluded(text, known) or known.of_statement(text))


def _letter(found: str | None) -> str | None:
    return None if found == _TWO else found


# ------------------------------------------------------------------------------------------------------ plain text

_EMPHASIS = re.compile(r"\*{2,3}|(?<![\w*])[*_]+(?=[\w(\\])|(?<=[\w).:])[*_]+(?![\w*])|\$|\\(?=[(\[)\]])|`|\"|[“”]")


def _flat(text: str) -> str:
    """The text without markup: Markdown's, LaTeX's, quotes."""
    return re.sub("  +", " ", _EMPHASIS.sub("", plain(text.replace("`", '"'))))


@lru_cache(4096)  # a model that repeats itself asks for the same ones again
def value_key(text: str) -> str:
    """The value of an option in a form in which two that look alike are equal: small letters, single spaces, numbers
    without separators and leading zeros, no currency and no full stop."""
    text = _flat(text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)|\brs\.? ?(?=\d)|[$€£₹]|[\\{}]", "", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    text = re.sub(r"\s*([+*/=^<>:,()])\s*|\s+(-)\s+", r"\1\2", text)  # "to -x" keeps its sign
    text = " ".join(text.split()).strip(" .;,")
    return "none" if _NONE.fullmatch(text) else text


_NONE = re.compile(r"none(?: of (?:these|them|the(?:se)? (?:above|others?|options?|choices?)))?")


class _Options:
    """The options of one question: their letters and their values."""

    def __init__(self, options: Sequence[str]) -> None:
        self._options = options
        self.letters = LETTERS[: len(options)]

    @cached_property
    def _values(self) -> dict[str, str]:
        return self._by([value_key(option) for option in self._options])

    @cached_property
    def _numbers(self) -> dict[Fraction, str]:
        return self._by([_only_number(option) for option in self._options])

    def _by(self, keys: Sequence[Any]) -> dict[Any, str]:
        """Letters by what tells their options apart."""
        lettered = zip(keys, self.letters, strict=True)
        return {key: letter for key, letter in lettered if key not in (None, "") and keys.count(key) == 1}

    def of_value(self, text: str) -> str | None:
        """The option whose value ``text`` is, with or without its unit."""
        letter = self._values.get(value_key(text))
        number = None if letter else _only_number(text)
        return letter if number is None else self._numbers.get(number)

    def of_beginning(self, text: str) -> str | None:
        """The option whose value ``text`` is or begins with: the longest one."""
        if letter := self.of_value(text):
            return letter
        key = value_key(text)
        found = [value for value in self._values if re.match(rf"{re.escape(value)}(?![\w/^*+-]|[.,:]\d)", key)]
        return self._values[max(found, key=len)] if found else None

    def allows(self, text: str, letter: str) -> bool:
        """Whether ``text`` may follow the label of an option: its value, a reason, or nothing."""
        own = value_key(self._options[self.letters.index(letter)])
        says_own = own and re.match(rf"{re.escape(own)}(?![\w/^*+-]|[.,:]\d)", value_key(text))
        return bool(_NOTHING_OR_REASON.match(text) or says_own) or self.of_beginning(text) == letter

    def of_statement(self, text: str) -> str | None:
        """The option whose value the last statement gives, where it is one only."""
        number = extract_number(text)
        if number is not None and (letter := self._numbers.get(number)):
            return letter
        last = text.rstrip().rpartition("\n")[2]
        key = value_key(re.split(r"(?<=[.!?]) (?=[A-Z])", last)[-1])
        spans = {}
        for value, letter in self._values.items():
            for match in re.finditer(rf"(?<![\w.√])(?<![\d)][/,:*^+]){re.escape(value)}(?![\w/^]|[.,:]\d)", key):
                # A number is told on the way to the answer, too: it counts where it ends the statement.
                if match.end() == len(key) or _only_number(value) is None:
                    spans[match.span()] = letter
        outer = {
            letter
            for (start, end), letter in spans.items()
            if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans)
        }
        return outer.pop() if len(outer) == 1 else _TWO if outer else None


@lru_cache(4096)
def _only_number(text: str) -> Fraction | None:
    """The value of a text that holds one number, perhaps with a unit; None otherwise."""
    text = plain(text)
    found = list(numerals(text, 0, len(text)))
    if len(found) != 1 or found[0].value is None:
        return None
    rest = text[: found[0].start] + text[found[0].end :]
    return found[0].value if re.fullmatch(r"[\s.,$%€£₹°]*(?:[A-Za-z]{1,12}[\s./]*){0,3}[\s.,%]*", rest) else None


# ------------------------------------------------------------------------------------------------- announced options

_SAYS = re.compile(
    r"""(?<![^\W_]) (?:(?:answer|ans)(?:\ (?:choice|option|letter))?
          | (?:correct|right|best|final|closest|matching|appropriate)\ (?:option|choice|alternative|letter|one))\b
        (?: [\s_')\]]{0,4}(?::|=|→|->|>|-|\.(?=\ ?[A-Z]\b[.)]?\ *$))
          | [^.!?\n:;=]{0,60}?(?<!could\ )(?<!may\ )(?<!might\ )(?<!can\ )(?<!not\ )(?<!n't\ )
            \b(?:is|was|be|equals)\b(?!n't)
          | 's(?=\ ) | (?=\ \(?[A-Z]\)?[.!)]?\ *$) )
        | (?<![^\W_])(?:option|choice|letter)(?:\ (?:that|which)\ [a-z\ ]{1,40})?(?:\ ?:|\ (?:is|should\ be|must\ be)\b)
        | \b(?:choose|chose|select|pick|(?:go|going)\ with|opt\ for|think|guess|i(?:'d|\ would)\ say
             |(?:that|which)\ leaves(?:\ us\ with)?|it's|it\ is|(?:must|has\ to)\ be)
          (?=(?:\ [a-z]{1,12}ly)?\ \(?[A-Z]\)?(?:[.;!]|,(?!\ \(?[A-Z]\b)|\ *$))
        | 答案?(?:是|为|:)
        | \#{4}(?!\#) | <answer>
        | \b(?:choose|chose|select|pick|(?:go|going)\ with|opt\ for|correspond(?:s|ing)?\ to|match(?:es|ing)?
             |points?\ to|leads?\ to|leaves(?:\ us\ with)?|(?:is|so|thus|therefore|hence|it's|be))
          (?=,?\ (?:only\ )?(?:the\ )?(?:option|choice|answer\ choice|letter|answer\ \(?[A-Z]\b))""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|no|cannot|neither|rules? out|ruled out|eliminates?|exclude|wrong|incorrect)|n't)"
    r"(?: [a-z]{1,12}){0,2}[ (]*\Z",
    re.IGNORECASE,
)
# "Check each option: (A) ...", "We ask which answer is right. A ...", "The next option is B": none is chosen there yet.
_ASKED = re.compile(
    r"\b(?:each|every|which|what|first|second|third|next|other|another|given)"
    r"(?: (?:of|the|correct|right|answer)){0,3} \Z",
    re.IGNORECASE,
)
_FILLERS = re.compile(
    r"""(?: [\s:=\-—>('\[{#.,]
          | \b(?:the|correct|right|final|best|[a-z]{1,12}ly|therefore|thus|so|hence|then|most|indeed|also|our|my
              |option|choice|letter|answer|alternative|is|be|it)\b
          | \bnot\ \(?[A-Za-z]\)?,?\ but(?:\ rather)?\b ){0,40}""",
    re.VERBOSE | re.IGNORECASE,
)
_LETTER = re.compile(r"([A-Za-z])(?![^\W_]|'[a-z]| ?(?:[=+*^÷≤≥]|<(?!/))|/[A-Za-z]|-[A-Z]\b)")
_ARTICLE = re.compile(r" +(?!because|since|as\b|which|with\b|and\b|or\b|for\b|due\b|is\b|by\b|\()[\w\"]")
_SECOND = re.compile(
    r"[).\]]* ?(?:,|/|&|or|and|,? or|,? and) ?(?:option |either )?\(?([A-Za-z])\)?(?=[\s.,;)}\]]|$)(?! [a-z])"
)
_AFFIRMED = re.compile(
    r"""(?: \b(?:option|choice|answer|statement|only|alternative)\ \(?(?P<named>[A-Za-z])\b\)?
          | (?<!\w)\((?P<enclosed>[A-Za-z])\)
          | (?<![\w'(/*+=-])(?<![\w)]\ [+*/=-]\ )(?P<bare>(?-i:[A-Z]))(?=\)?\ (?:is|must)\ |\)\ ) )
        (?P<value>[):,]?\ ?(?:[^.!?\n;]|\.(?=\d)){0,60}?)
        (?:\b(?:is|must\ be|would\ be|seems|appears|has\ to\ be|are)\b(?P<what>[^.,!?\n;]{0,30})
          | \b(?P<does>satisfies|matches|works|fits|holds)\b
          | (?:\ ?[:—]|\ -)\ (?P<verdict>correct|right|yes)\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_RIGHT = re.compile(r"\b(?<!in)(?<!not )(?:correct|right|true|best|answer|closest)\b", re.IGNORECASE)
_WRONG = re.compile(r"\b(?:not|never|incorrect|wrong|false|neither|too|closer|impossible|no)\b|n't\b", re.IGNORECASE)


def _announced(text: str, known: _Options) -> Iterator[_Choice]:
    for start, stop in boxes(text):
        if letter := _named_at(text[:stop], start, known) or known.of_value(text[start:stop]):
            is_closed = text[stop : stop + 1] == "}"
            yield _Choice(start, stop + is_closed, letter, is_closed)
    listed = _listed(text)
    for mark in _SAYS.finditer(text):
        before = text[max(0, mark.start() - 40) : mark.start()]
        start = _FILLERS.match(text, mark.end()).end()
        opens_list = "\n" in text[mark.end() : start] and text.count("\n", 0, start) in listed
        if _is_denied(text, mark.start()) or _ASKED.search(before) or opens_list:
            continue
        stop = min(_sentence_end(text, start), start + 120)
        value = text[mark.end() : stop].lstrip(" :=\n")
        letter = _named_at(text, start, known) or known.of_beginning(text[start:stop]) or known.of_beginning(value)
        if letter and not TAKEN_BACK.match(text, start + 1) and not text.startswith("\\boxed", start):
            yield _Choice(start, start + 1, letter, text[start - 1 : start + 2] == f"({text[start]})")
    for match in _AFFIRMED.finditer(text):
        letter = match["named"] or match["enclosed"] or match["bare"]
        if letter.upper() not in known.letters or (letter == "a" and not match["enclosed"]):
            continue
        said = match["value"] + (match["what"] or "")
        affirmed = match["does"] or match["verdict"] or _RIGHT.search(match["what"])
        denied = _WRONG.search(said) or _is_denied(text, match.start())
        if affirmed and not denied and not re.search(r"\boption\b|\([A-Z]\)", said, re.IGNORECASE):
            yield _Choice(match.start(), match.end(), letter.upper())


def _is_denied(text: str, position: int) -> bool:
    return bool(_DENIED.search(text[max(0, position - 40) : position])) or is_supposed(text, position)


def _named_at(text: str, start: int, known: _Options) -> str | None:
    """The letter that stands at a position, after words that say nothing; _TWO where another one follows it."""
    match = _LETTER.match(text, _FILLERS.match(text, start).end())
    if match is None or match[1].upper() not in known.letters:
        return None
    letter, enclosed = match[1], text[match.start() - 1 : match.start()] in ("(", "[", "{") and match.start() > 0
    if letter in "aA" and not enclosed and _ARTICLE.match(text, match.end()):
        return None
    other = _SECOND.match(text, match.end())
    if other and other[1].upper() in known.letters and other[1].upper() != letter.upper():
        return _TWO
    return letter.upper()


def _sentence_end(text: str, start: int) -> int:
    end = re.search(r"[.!?;](?=\s|$)|\n|</", text[start:])
    return start + end.start() if end else len(text)


# ------------------------------------------------------------------------------------------------ lines and mentions

_LABEL = r"[\s>#-]*(?:(?:so|thus|therefore|hence|ans|answer|option|choice|final answer)\b[\s,:-]*)*"
_LABEL_LINE = re.compile(
    rf"{_LABEL}(?:\((?P<enclosed>[A-Za-z])\)|(?P<bare>[A-Za-z])(?:[).:\]}},]|(?= *$)|(?= *[-—] )))(?P<rest>.*)",
    re.IGNORECASE,
)
_LISTED = re.compile(r"[^\w(]*\(?(?P<letter>[A-Za-z])[).:\]] *\S")
_NOTHING_OR_REASON = re.compile(r"[\s.:,\])}-]*(?:because|since|as|explanation|\Z)", re.IGNORECASE)
_ENDS_IN = re.compile(r"(?:[>=→.]|\d\)?) ?\(?(?P<letter>[A-Z])\)?\.?$")


def _without_listing(text: str) -> str:
    listed = _listed(text)
    return "\n".join(line for number, line in enumerate(text.split("\n")) if number not in listed)


def _listed(text: str) -> set[int]:
    """The lines, from 0, that list the options: each with the letter after that of the line before, from A."""
    listed, run = set(), []
    for number, line in enumerate(text.split("\n")):
        match = _LISTED.match(line)
        letter = match["letter"].upper() if match else ""
        if letter and letter == LETTERS[len(run) % len(LETTERS)]:
            run.append(number)
        elif line.strip():
            run = [number] if letter == "A" else []
        if len(run) > 1:
            listed.update(run)
    return listed


def _labelled_line(text: str, known: _Options) -> str | None:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in lines[-1:] + lines[:1]:
        match = _LABEL_LINE.fullmatch(line)
        letter = (match["enclosed"] or match["bare"]).upper() if match else ""
        if letter and letter in known.letters and known.allows(match["rest"], letter):
            return letter
    ending = _ENDS_IN.search(lines[-1]) if lines else None
    return ending["letter"] if ending and ending["letter"] in known.letters else None


_MENTION = re.compile(
    r"(?<!\w)\((?P<enclosed>[A-Za-z])\)|\b(?:option|choice|answer) \(?(?P<named>[A-Za-z])\b\)?", re.IGNORECASE
)
_CONCLUDES = re.compile(r"\b(?:so|thus|therefore|hence|conclu\w+|finally|overall|must be)\b", re.IGNORECASE)
_DENIED_AFTER = re.compile(r"[^.!?\n;]{0,40}?(?:\b(?:not|incorrect|wrong|false|too|impossible)\b|n't\b)", re.IGNORECASE)


def _concluded(text: str, known: _Options) -> str | None:
    mentioned, concluded = set(), None
    for sentence in re.split(r"(?<=[.!?;])\s|\n", text):
        found = set()
        for match in _MENTION.finditer(sentence):
            letter = match["enclosed"] or match["named"]
            denied = _is_denied(sentence, match.start()) or _DENIED_AFTER.match(sentence, match.end())
            if letter.upper() in known.letters and not denied and not (letter == "a" and not match["enclosed"]):
                found.add(letter.upper())
        mentioned |= found
        if found and _CONCLUDES.search(sentence):
            concluded = found
    chosen = concluded or mentioned
    return None if not chosen else chosen.pop() if len(chosen) == 1 else _TWO
