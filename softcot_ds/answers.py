"""Finding the number that a model meant, and comparing it exactly."""

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"""(?P<sign>[-+\u2212]?)\s*[$€£¥]?\s*(?P<sign2>[-\u2212]?)
        (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))
        (?P<decimals>\.\d+)?
        (?:\s*/\s*(?P<denominator>[1-9]\d*))?""",
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MARKER = re.compile(r"####\s*|(?:final\s+)?answer\s*(?:is|:|=)\s*", re.IGNORECASE)


def extract_number(text: str) -> Fraction | None:
    r"""The number that ``text`` gives as its answer, or None when there is none.

    Looked for in this order: the last ``\boxed{...}``; what follows the last ``####``, ``answer is`` or ``answer:``;
    the last number of the text. A percentage counts as its figure (``50%`` is 50), a currency sign is ignored, commas
    between groups of three digits are thousands separators.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        numbers = _numbers(boxed)
        return numbers[-1] if numbers else None
    markers = list(_MARKER.finditer(text))
    if markers:
        numbers = _numbers(text[markers[-1].end() :])
        if numbers:
            return numbers[0]
    numbers = _numbers(text)
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


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    numbers = []
    for match in _NUMBER.finditer(text):
        value = Fraction((match["whole"].replace(",", "") or "0") + (match["decimals"] or ""))
        if match["denominator"]:
            value /= int(match["denominator"])
        # A minus between two operands ("7-3", "7 - 3 = 4") is an operator, not a sign.
        before = text[: match.start()].rstrip()
        is_sign = not (before and (before[-1].isalnum() or before[-1] in ")%"))
        negative = (match["sign"] in ("-", "\u2212") and is_sign) or bool(match["sign2"])
        numbers.append(-value if negative else value)
    return numbers
