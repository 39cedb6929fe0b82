"""Reading numbers in text as a person does: digits, words, fractions, powers, in the notations of many countries.

Which of a text's numbers is its answer is another question: answers.py.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 1000
"""Digits of a number. A model that repeats itself writes longer ones, which Python refuses to convert."""


@dataclass(frozen=True)
class Numeral:
    """A number as it stands in a plain text (see ``plain``)."""

    start: int
    end: int
    value: Fraction | None
    """None for figures that are not one number: a range, a ratio, a time, a date, division by zero, endless digits."""
    in_words: bool


# ------------------------------------------------------------------------------------------------------ plain text

_CHARACTERS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # fullwidth forms, digits and signs among them
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")  # without width
    | dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000\t\v\f\r", " ")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u2015\ufe58", "—")
    | dict.fromkeys("\u2044\u2215", "/")
    | dict.fromkeys("\u00d7\u00b7\u2715\u2716\u22c5\u2219", "*")
    | dict.fromkeys("\u2018\u2019\u02bc\u2032\u0060\u00b4", "'")
    | dict.fromkeys("⇒⟹⟶➔➜", "→")
    | {"\u066b": ".", "\u066c": ","}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_NOTATIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\f(?:rame)?box\b", r"\\boxed"),
        (r"\\(?:text|math|operatorname)[a-z]{0,9} ?\{([^{}]{0,200})\}", r" \1 "),
        (r"\\(?:left|right|displaystyle|bigg?|Bigg?|!)(?![a-z])", ""),
        (r"\{\\?([, ]),?\}", r"\1"),
        (r"\\\\", "\n"),
        (r"\\([$%#&_'])", r"\1"),
        (r"\^ ?\{?\\circ\}?", ""),
        (r"\\times(?![a-z])|\\cdot(?![a-z])", "*"),
        (r"\\div(?![a-z])", "÷"),
        (r"\\(?:approx|equiv|simeq)(?![a-z])", "≈"),
        (r"\\(?:to|implies|(?:long)?(?:r|R)ightarrow)(?![a-z])", "→"),
        (r"\\[()\[\],;:> ]|\\q?quad(?![a-z])|~", " "),
        (r"(\d?)\\[cdt]?frac ?(?:\{([^{}]{1,60})\}|(\d)) ?(?:\{([^{}]{1,60})\}|(\d))", r"\1 \2\3/\4\5"),
        (r"(####[^\w\n]{0,4}\d{1,3}), (?=\d{3}\b)", r"\1,"),  # a tic of Llama 2
        (r"- (?=[\d.]{1,60}/\d)", "-"),
        (r"\b(is|are|equals)(?=\d)", r"\1 "),
        (r"(\d) dollars? and (\d\d) cents\b", r"\1.\2 dollars"),
        (r"(\d) (?:hours?|feet|foot|pounds?)(?:,? and)? (\d{1,2}) (?=minutes?|inch|ounces?)", r"\1:\2 "),
        (r"(?<!from )(?<!by )(?<!from [$€£])(?<![\w,.$€£])([$€£]?\d[\d,.]{0,20}) to (?=[$€£]?\d)", r"\1-"),
        (r"(\b(?:between|either) [$€£]?\d[\d,.]{0,20}) (?:and|or) (?=[$€£]?\d)", r"\1-"),
    )
]


def plain(text: str) -> str:
    """The text in plain characters: one kind of digit width, dash and space; LaTeX and Unicode fractions as 1/2.

    Two texts that look alike become the same. Positions differ from those of the original text.
    """
    text = re.sub(r"<<[^<>\n]{0,200}>>", "", text)  # GSM8K's notes for a calculator
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"(\d?)([\u00bc-\u00be\u2150-\u215e])", _vulgar_fraction, text).translate(_CHARACTERS)
    for pattern, replacement in _NOTATIONS:
        text = pattern.sub(replacement, text)
    return re.sub("  +", " ", text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    return (match[1] and match[1] + " ") + unicodedata.normalize("NFKD", match[2]).replace("\u2044", "/")


# --------------------------------------------------------------------------------------------------------- grammar

_UNITS = dict(zip("zero one two three four five six seven eight nine".split(), range(10), strict=True))
_TEENS = dict(
    zip(
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
        range(10, 20),
        strict=True,
    )
)
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12} | {
    "lakh": 10**5,
    "crore": 10**7,
}
_LETTER_SCALES = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}


def _any(words: dict[str, int]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_SMALL = rf"(?:{_any(_TENS)}(?:[- ]{_any(_UNITS)})?|{_any(_TEENS)}|{_any(_UNITS)})\b"
_BELOW_1000 = rf"(?:(?:{_SMALL}|a)[- ]hundred\b(?:(?:[- ]and)?[- ]{_SMALL})?|{_SMALL})"
_BIG = rf"(?:{_BELOW_1000}|a)[- ](?:thousand|million|billion|trillion|lakh|crore)\b"
_PART = rf"(?:(?:{_any(_UNITS)}|a)[- ])?{_any(_PARTS)}(?:s|(?<=hal)ves)?\b"
_WORDS = rf"""
    (?:{_BIG}(?:(?:,|[ ]and)?[ ]{_BIG}){{0,4}}(?:(?:,|[ ]and|,[ ]and)?[ ]{_BELOW_1000})?|{_BELOW_1000})
    (?![- ](?:{_any(_PARTS)})s?\b)(?:[ ]and[ ]{_PART})?
    | a(?=[- ]dozen\b)
    | (?P<fraction> (?:{_any(_UNITS)}|a)[- ]half\b | half\b | {_any(_UNITS)}[- ]{_any(_PARTS)}s?\b
        | a[- ]{_any(_PARTS)}(?=[- ]of\b) )
"""
# What the words before are multiplied by: "two dozen", "half a million", "two and a half thousand". Figures are not: in
# "3 dozen" the dozen is a unit, mostly the one that was asked for.
_MULTIPLE = rf"""
    (?(fraction)(?:[- ]of)?(?:[- ]an?)?)[- ](?P<multiple>dozen|{_any(_SCALES)})s?\b(?P<half_more>[ ]and[ ]a[ ]half\b)?
"""
# The last alternative takes whole what is no number in any notation: 10-15, 3:30, 7/4/2023, 1,2,3, 1.2.3.
_DIGITS = r"""
    (?:
      (?:
        (?P<whole> \d{1,2}(?:,\d{2})+,\d{3}
                 | [1-9]\d{0,2}(?:(?P<separator>[,'_\ ]|,\ (?=0))\d{3})(?:(?P=separator)\d{3})*
                 | [1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?!\.?\d)|(?:\.\d{3})+(?=,\d{1,2}(?!\d)))
                 | \d+ | (?<![\w.)])(?=\.\d)
        )
        (?P<decimals> \.\d+ | (?<=(?<!\d)0),\d+ | (?<!\d,\d{3}),(?:\d{1,2}|\d{4,}) )?
        (?: \ ?[x*]\ ?10(?:\^\{?|\*\*)(?P<power_of_ten>[-+]?\d+)\}? | [eE](?P<exponent>[-+]?\d+)
          | (?:\ ?\^\ ?\{?|\*\*|\ \*\*\ )(?P<power>\d+)\}? )?
        (?: \ ?/\ ?(?P<denominator>\d+(?:\.\d+)?)
          | (?:\ and)?\ (?P<part>\d+)/(?P<parts>\d+)
          | \ and\ (?:a|one)[- ](?P<word_part>half|third|quarter)\b )?
        (?P<scales> (?:[- ](?i:SCALES)s?\b){1,2} | [kK]\b | (?(currency)\ ?(?:m|M|B|mn|bn)\b|(?!)) )?
      )
      (?! [.,:/'\-]?\d | \^ )
    | \d+(?:[.,:/'\-]\d+)*
    )
""".replace("SCALES", "|".join(_SCALES))
_SYMBOLS = "".join(chr(code) for code in range(0x20D0) if unicodedata.category(chr(code)) == "Sc")
_NUMERAL = re.compile(
    rf"""
    (?: (?P<sign>[-+—]|\b(?i:minus|negative)\b)(?P<gap>\ {{0,3}})(?:\*\*)? )?
    (?P<currency>
        (?:\b[A-Z]{{1,3}})?[{_SYMBOLS}]{{1,2}}\ {{0,3}} | \b(?:Rs\.?|USD|EUR|GBP|INR|CAD|AUD|JPY|CNY)\ {{0,2}} )?
    (?P<inner_sign>[-—])?
    (?: (?(currency)|(?<![A-Za-z\d^])(?<!\^\{{)){_DIGITS}(?:st|nd|rd|th)? | \b(?i:(?P<words>{_WORDS})(?:{_MULTIPLE})?) )
    """,
    re.VERBOSE,
)


def numerals(text: str, start: int, end: int) -> Iterator[Numeral]:
    """All numbers between two positions of a plain text, in order."""
    for match in _NUMERAL.finditer(text, start, end):
        start, value = match.start(), _value(match, text)
        sign = match["sign"]
        if sign and not _is_sign(text[max(0, start - 40) : start], "" if sign.isalpha() else match["gap"]):
            start, sign = match.end("gap"), None
        if value is not None and ((sign or "+") != "+" or match["inner_sign"]):
            value = -value
        yield Numeral(start, match.end(), value, match["words"] is not None)


def _value(match: re.Match[str], text: str) -> Fraction | None:
    """The number without its sign."""
    if match["words"]:
        count = _value_of_words(match["words"].lower()) + Fraction(bool(match["half_more"]), 2)
        return count * ({"dozen": 12} | _SCALES).get((match["multiple"] or "").lower(), 1)
    exponent = match["exponent"] or match["power_of_ten"] or match["power"] or "0"
    if match["whole"] is None or len(match[0]) > _LONGEST or abs(int(exponent)) > _LONGEST:
        return None
    value = Fraction(f"{re.sub(r'[^0-9]', '', _ascii(match['whole'])) or 0}.{(match['decimals'] or '.0')[1:]}")
    if match["power"]:
        value = value ** int(exponent) if int(exponent) * len(match[0]) <= _LONGEST else None
    elif exponent != "0":
        value *= Fraction(10) ** int(exponent)
    if value is None:
        return None
    # "$126/7 days" is a rate, not a seventh of it.
    if match["denominator"] and not (match["currency"] and re.match(" ?[A-Za-z]", text[match.end() :][:2])):
        if not Fraction(match["denominator"]):
            return None
        value /= Fraction(match["denominator"])
    if match["parts"]:
        if not int(match["part"]) < int(match["parts"]) or value.denominator > 1:
            return None
        value += Fraction(int(match["part"]), int(match["parts"]))
    if match["word_part"]:
        value += Fraction(1, _PARTS[match["word_part"]])
    for scale in re.findall("[a-z]+", (match["scales"] or "").lower()):
        value *= _SCALES.get(scale) or _SCALES.get(scale[:-1]) or _LETTER_SCALES[scale]
    return value


def _ascii(digits: str) -> str:
    return "".join(str(int(c)) if c.isdecimal() else c for c in digits)


def _value_of_words(words: str) -> Fraction:
    """ "two hundred and five" is 205, "one and three quarters" is 7/4."""
    words, part = _split_part(words)
    total, current = 0, 0
    for word in re.findall("[a-z]+", words):
        if word in _SCALES and _SCALES[word] > 100:
            total, current = total + current * _SCALES[word], 0
        elif word == "hundred":
            current *= 100
        elif word == "a":
            current = 1
        else:
            current += _UNITS.get(word) or _TEENS.get(word) or _TENS.get(word) or 0
    return total + current + part


def _split_part(words: str) -> tuple[str, Fraction]:
    """What is whole in "two and a half" or "three quarters", and the fraction at its end."""
    match = re.search(rf"(?:\band )?(?:\b(?P<count>{_any(_UNITS)}|a)[- ])?(?P<part>{_any(_PARTS)}|halve)s?$", words)
    if match is None:
        return words, Fraction(0)
    return words[: match.start()], Fraction(_UNITS.get(match["count"], 1), _PARTS.get(match["part"], 2))


def _is_sign(before: str, gap: str) -> bool:
    """Whether a dash is a sign: no operator ("7 - 3"), hyphen ("covid-19"), punctuation or bullet of a list.

    Args:
        before: the text before the dash.
        gap: what stands between the dash and its number.
    """
    spaces = before[len(before.rstrip()) :]
    last = before.rstrip()[-1:]
    if "\n" in spaces:
        return not gap
    if last.isdigit() or last in (")", "]", "}", "%", "-"):
        return False
    if gap:
        return last in ("", "#", "=", "(", "{", "[", "+", "÷", "≈", "→", "*")
    return bool(spaces) or not last.isalpha()
