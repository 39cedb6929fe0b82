"""Finding the number that a model meant, and comparing it exactly."""

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"""(?:(?P<sign>[-+\u2212])(?P<gap>[ \t]*))?(?:[$€£¥]\s*(?P<inner_sign>[-\u2212])?)?
        (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))
        (?P<decimals>\.\d+)?
        (?:\s*/\s*(?P<denominator>[1-9]\d*)|[ ](?P<part>\d+)/(?P<parts>[1-9]\d*))?""",
    re.VERBOSE,
)
_LONGEST = 1000
"""Characters of a number. A model that repeats itself writes longer ones, which Python refuses to convert."""
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
# Four hashes announce an answer when a number is next; otherwise they are a heading ("#### Step 2: add").
_MARKER = re.compile(r"####(?=[^\w\n]*\d)|(?:final\s+)?answer\**\s*(?:is\b|:|=)[\s:*]*", re.IGNORECASE)
_MAY_GO_ON = re.compile(r"[\d.,/]+\Z")
_END_OF_SENTENCE = re.compile(r"[.!?;](?:\s|$)|\n")


def extract_number(text: str, cut: bool = False) -> Fraction | None:
    r"""The number that ``text`` gives as its answer, or None when there is none.

    Looked for in this order: the last ``\boxed{...}``; the sentence after the last ``####``, ``answer is`` or
    ``answer:``; the last number of the text. Of an equation the right side counts (``x = 4``, ``3 + 4 = 7``). A
    percentage counts as its figure (``50%`` is 50), a currency sign is ignored, commas between groups of three digits
    are thousands separators.

    Of a text that was ``cut`` at a limit only an announced answer counts, and no number that may have gone on.
    """
    if cut:
        text = _MAY_GO_ON.sub("", text)
    boxed = _last_boxed(text)
    if boxed is not None:
        numbers = _stated(boxed)
        return numbers[0] if numbers else None
    markers = list(_MARKER.finditer(text))
    if markers:
        numbers = _stated(_END_OF_SENTENCE.split(text[markers[-1].end() :], maxsplit=1)[0])
        if numbers:
            return numbers[0]
    numbers = [] if cut else _numbers(text)
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, braces nested to any depth."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start + len("\\boxed{") : end]
        start = text.rfind("\\boxed{", 0, start)
    return None


def _stated(text: str) -> list[Fraction | None]:
    """The numbers after the last equals sign; all of them when none stands there."""
    return _numbers(text.rpartition("=")[2]) or _numbers(text)


def _numbers(text: str) -> list[Fraction | None]:
    """All numbers, None for one that is too long to be an answer."""
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
    # "12\frac{1}{2}" is twelve and a half.
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    numbers: list[Fraction | None] = []
    for match in _NUMBER.finditer(text):
        if len(match[0]) > _LONGEST:
            numbers.append(None)
            continue
        value = Fraction((match["whole"].replace(",", "") or "0") + (match["decimals"] or ""))
        if match["denominator"]:
            value /= int(match["denominator"])
        if match["parts"]:
            value += Fraction(int(match["part"]), int(match["parts"]))
        negative = match["sign"] in ("-", "\u2212") and _is_sign(text[: match.start()], match["gap"])
        numbers.append(-value if negative or match["inner_sign"] else value)
    return numbers


def _is_sign(before: str, gap: str) -> bool:
    """Whether a minus is a sign: no operator ("7 - 3"), hyphen ("covid-19"), dash or bullet of a list.

    Args:
        before: the text before the minus.
        gap: what stands between the minus and its number.
    """
    spaces = before[len(before.rstrip()) :]
    last = before.rstrip()[-1:]
    if "\n" in spaces:
        return not gap
    if last.isdigit() or last in (")", "]", "}", "%"):
        return False
    return (bool(spaces) and not gap) or not (last.isalpha() or last == "-")
