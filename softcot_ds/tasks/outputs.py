"""What an output is made of, whatever kind of answer it gives: thinking, boxes, answers that are only supposed or are
taken back, and what comes after the answer."""

import re
from collections.abc import Iterator

_THOUGHT = re.compile(r"\A.*?</think(?:ing)?>", re.DOTALL)
NEXT_PROBLEM = re.compile(
    r"""<\|[^|<>\n]{1,40}\|>|</s>|<(?:eos|end_of_turn|start_of_turn)>|\[/?INST\]
        |^[#*\s>]{0,8}(?:next\ |new\ |another\ )?(?:problem|question|exercise|example|instruction|input
            |user|human|student|teacher|q)(?:(?:\ ?\#?\d{1,4})?\**\ ?[:.]|\ ?\#?\d{1,4}\**\ ?$)
        |^[^\n.:]{0,30}\b(?:another|next|new|similar)\ (?:problem|question|example|exercise)\b""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
"""Where a model that has answered goes on with another problem or another turn."""
TAKEN_BACK = re.compile(
    r"""[^.!?\n]{0,40}(?:\?|\.\.\.)\ ?(?:no|actually)\b
        | (?: [\s,.!*)'—]{1,6} | [^.!?\n]{0,40}[.!?\n—][\s*]{0,5} ) (?:oh,?\ |but\ |no,?\ ){0,2}
          (?:wait\b|hmm|hold\ on|scratch\ that|sorry,)
        | [^.!?\n]{0,40}[.!?\n—][\s*]{0,5}(?:but\ |no,?\ ){0,2}
          (?:actually|correction|that(?:'s|\ is)\ (?:wrong|incorrect|not\ right))\b""",
    re.VERBOSE | re.IGNORECASE,
)
"""What may follow an answer that is no longer meant: "The answer is 18. Wait, she eats two more." """
_SUPPOSED = re.compile(
    r"""(?: \b(?:whether|if|unless|suppose|assum(?:e|ing)|let(?:'s|\ us)\ say)\b
          | [\w,'")]\s(?:because(?!\ of)|since|(?:even\ |al)?though|whereas)\b
          | \b(?:might|may|could|some|many|people)(?:\ [a-z]{1,12})?\ (?:say|think|argue|guess|answer)\b | \bthought\b )
        [^,.;:!?\n]{0,60}\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed ?\{")
_BRACE = re.compile(r"[{}]")


def after_thinking(text: str) -> str:
    """What stands after ``</think>``, where a model thinks before it answers."""
    return _THOUGHT.sub("", text, count=1)


def boxed_end(text: str) -> str | None:
    """The content of a box that ends a text in which no other problem begins: all that we train on ends so, and looking
    further, at fifty times the cost, would find the same."""
    match = _BOXED_END.search(text)
    return match[1] if match and not NEXT_PROBLEM.search(text) else None


_BOXED_END = re.compile(r"\\boxed\{(\w{1,9})\}[\s.$]{0,20}\Z")


def is_supposed(text: str, position: int) -> bool:
    """Whether what begins at a position is only supposed, a reason for what stands before it, or what others say: "If
    the answer is B, then", "no, because the answer to the first part is yes"."""
    return bool(_SUPPOSED.search(text[max(0, position - 100) : position]))


def boxes(text: str) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes are that stand in no other box; an open last one ends with the text."""
    position = 0
    for match in _BOX.finditer(text):
        if match.start() < position:
            continue
        depth, start = 1, match.end()
        for brace in _BRACE.finditer(text, start):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                position = brace.end()
                break
        else:
            position = len(text)
        yield start, position - (depth == 0)
