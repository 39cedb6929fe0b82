r"""Finding the yes or no that an output answers: "yes" or "no".

Only a statement counts, not the word in "no evidence", "there is no way" or an aside. In this order:

1. Announced: ``\boxed{Yes}``, "the answer is no", "Answer: yes", "#### no", also "true" and "false". The last.
2. Concluded: "So no, it would not float.", "Therefore, yes." The last.
3. A line that is the word alone: "**No**". The last.
4. The word that opens the output: "Yes, because ...", unless the output takes it back ("No, wait ...").
5. The last statement that begins with the word and answers no question that the output asks itself.

What is denied, supposed ("if the answer is yes") or taken back ("Yes. Wait, ...") does not count.
"yes or no", and "it depends", are no answer.
"""

import re
from collections.abc import Iterator, Sequence

from softcot_ds.tasks.numerals import plain
from softcot_ds.tasks.outputs import NEXT_PROBLEM, TAKEN_BACK, after_thinking, boxed_end, boxes, is_supposed

_EMPHASIS = re.compile(r"\*+|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)|\$|\\(?=[(\[)\]])|\"|[“”]")
# The word as a statement: not "no one", "no longer", "yes or no".
_WORD = r"""(?P<word>yes|no)\b(?![\w-])
    (?= ['\s)\]}*]* (?: [.,;:!—)\]}]|\ -\ |$|\n|<
        |\ (?:because|since|as|for|it|they|he|she|this|that|there|if|you|we|the|due|sir|i)\b ) )
    (?! ['\s,]*(?:/|or\b|and\b)\ *'?(?:yes|no)\b )"""
_ALONE = re.compile(
    rf"[\s>#-]{{0,20}}(?:answer\b)?['\s(\[:]{{0,20}}{_WORD.replace('yes|no', 'yes|no|true|false', 1)}['\s)\].!:,]*",
    re.VERBOSE | re.IGNORECASE,
)
_SAYS = re.compile(
    r"""(?<![^\W_]) (?:answer|ans|verdict|conclusion)\b
          (?: [\s_')\]]{0,4}(?::|=|→|->|>|\ -)
            | [^.!?\n:;=]{0,80}?(?<!could\ )(?<!may\ )(?<!might\ )(?<!not\ )(?<!n't\ )
              \b(?:is|was|be|seems)\b(?!n't|\ not\b)
            | \ to\b[^\n]{1,200}?\?['\s]{0,3}(?:is|would\ be)\b(?!n't|\ not\b) )
        | \#{4}(?!\#) | <answer>""",
    re.VERBOSE | re.IGNORECASE,
)
_SAID = re.compile(
    r"""(?:[\s:=—>('\[{#.,-]|\b(?:the|correct|right|final|best|clearly|simply|therefore|thus|so|most|likely|probably
          |definitely|definite|certainly|almost|very|safe|indeed|also|answer|is|be|a|an|would|should|it|that|to|this|question|statement|resounding)\b){0,40}
        (?P<word>yes|no|true|false)\b(?![\w-]) (?!\ (?:one|longer|more|way|evidence|clear|definitive|such|doubt)\b)
        (?!['\s,]*(?:/|or\b|and\b)\ *'?(?:yes|no|true|false)\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_CONCLUDES = re.compile(
    rf"""\b(?:so|thus|therefore|hence|overall|finally|consequently|accordingly|in\ (?:conclusion|summary|short)
          |to\ conclude|to\ sum\ up|which\ means|as\ a\ result|(?:that|it)(?:'s|\ is)(?:\ a)?|i(?:'d|\ would)\ say)\b
        [\s,:']*
        (?:(?:the\ answer|it|i(?:'d|\ would)\ say|this|that|is|(?:would|must)\ be|a|clearly|then)\b[\s,:']*){{0,5}}
        {_WORD}
        | \b(?:so|thus|therefore|hence|overall|consequently|in\ conclusion)\b
          [^.!?;\n]{{0,160}},\ {_WORD.replace("word", "last")}
        (?=['\s)\]}}*]*[.!]?\ *$)""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_STATEMENT = re.compile(
    rf"(?:^|(?<=[.!?;:])\s)[\s>#-]{{0,20}}(?:\d+[.)]\ +)?(?:well|hmm|oh|actually|ok)?[\s,'(]{{0,20}}{_WORD}",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_BOTH = re.compile(
    r"""[^.!?\n]{0,80}\b(?:and|or|but|otherwise|else)\b[^.!?\n]{0,80}?
        \b(?P<other>yes|no)\b(?='?\s*(?:[.,;!?)]|$)|\ (?:to|for)\b)""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_VALUES = {"yes": "yes", "true": "yes", "no": "no", "false": "no", "both": None}


def extract_yes_no(text: str, cut: bool = False, options: Sequence[str] = ()) -> str | None:
    """The "yes" or "no" that ``text`` answers, or None.

    Args:
        text: a model's output. What it thinks before it answers (``</think>``) is not searched.
        cut: the output ended at a limit: only an announced answer counts, and none at the very end, where "no" may have
            been the beginning of "not".
        options: none; for the other kinds of answer.
    """
    if (boxed := boxed_end(after_thinking(text))) in ("yes", "no"):
        return boxed
    text = _EMPHASIS.sub("", plain(after_thinking(text).replace("`", '"')))
    announced = sorted(_announced(text))
    if announced and (following := NEXT_PROBLEM.search(text, announced[0][0])):
        text = text[: following.start()]
        announced = [one for one in announced if one[0] <= len(text)]
    if cut:
        announced = [one for one in announced if one[0] < len(text.rstrip(" .'")) or text[one[0] - 1 : one[0]] == "}"]
        return _VALUES[announced[-1][1]] if announced else None
    if announced:
        return _VALUES[announced[-1][1]]
    concluded = [match for match in _CONCLUDES.finditer(text) if not is_supposed(text, match.start())]
    if concluded := [match for match in concluded if not TAKEN_BACK.match(text, match.end())]:
        return (concluded[-1]["word"] or concluded[-1]["last"]).lower()
    if alone := [match for line in text.split("\n") if (match := _ALONE.fullmatch(line))]:
        return _VALUES[alone[-1]["word"].lower()]
    statements = [match for match in _STATEMENT.finditer(text) if not TAKEN_BACK.match(text, match.end())]
    if statements and not re.search(r"\w", text[: statements[0].start("word")]):
        return statements[0]["word"].lower()
    own = [match for match in statements if not text[: match.start("word")].rstrip(" '(\n").endswith("?")]
    replies = own or (statements if len(statements) == 1 else [])
    return replies[-1]["word"].lower() if replies else None


def _announced(text: str) -> Iterator[tuple[int, str]]:
    """The ends of what announces an answer, with the word."""
    for start, stop in boxes(text):
        if (match := _SAID.match(text, start, stop)) and re.fullmatch(r"[^\w]*", text[match.end() : stop]):
            yield stop + (text[stop : stop + 1] == "}"), match["word"].lower()
    for mark in _SAYS.finditer(text):
        match = _SAID.match(text, mark.end())
        if not match or "\n\n\n" in match[0] or TAKEN_BACK.match(text, match.end()) or is_supposed(text, mark.start()):
            continue
        word, both = match["word"].lower(), _BOTH.match(text, match.end())
        yield match.end(), word if not both or both["other"].lower() == _VALUES[word] else "both"
