"""What a method that changes the base has it forget: a plain text's loss, and a task that was not trained on, before
and after; and of a base that stays as it is, the hash that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.jobs import Worker
from softcot_ds.evaluation.losses import TextLosses
from softcot_ds.evaluation.report import Record
from softcot_ds.tables import table_lines

_PIECE = 256
"""Tokens that are read together at most, of which the first is given and each other predicted from all before it."""


@dataclass(frozen=True)
class PlainText:
    """A text's loss."""

    name: str
    """Of its file."""
    tokens: int
    """That are predicted."""
    before: float
    """Nats per token under the recipe's base."""
    after: float
    """Under the base as it was trained."""
    key: str
    """Of all that decides these."""


def read_plain_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int, plain: Worker, changed: Worker | None
) -> PlainText:
    """A text's loss before and after. All ranks call it together.

    Args:
        context: the longest sequence that the base takes, tokens.
        plain: asks the recipe's base.
        changed: asks it as it was trained; None where that has not changed it.

    Raises:
        SoftCoTError: it is no UTF-8 text of two tokens at least; or see ``TextLosses``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SoftCoTError(f"evaluation.plain_text: cannot read {path}: {error}") from error
    pieces = _pieces(tokenizer(text, add_special_tokens=False).input_ids, min(_PIECE, context))
    if not pieces:
        raise SoftCoTError(f"evaluation.plain_text: {path} has no two tokens, of which one is predicted from the other")
    prompts = [BasePrompt(piece[:1], []) for piece in pieces]
    posed = {"none": Posed("none", prompts, None, [])}
    if changed is not None:
        posed["learned"] = Posed("learned", prompts, None, [], asked_of=changed)
    losses = TextLosses(plain, posed, [(number, piece[1:]) for number, piece in enumerate(pieces)], "plain text")
    found = losses.of_texts()
    tokens = sum(len(piece) - 1 for piece in pieces)
    before, after = (sum(found[name]) / tokens for name in ("none", "learned" if changed else "none"))
    return PlainText(path.name, tokens, before, after, "+".join(losses.key(name) for name in posed))


def _pieces(ids: Sequence[int], size: int) -> list[list[int]]:
    cut = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [piece for piece in cut if len(piece) > 1]


def forgetting(report: Record, text: PlainText | None, is_changed: bool, fingerprint: str) -> Record:
    """The report's own part on it; empty where nobody asked and nothing is known.

    Args:
        report: of the evaluation.
        is_changed: whether what was trained changes the base.
        fingerprint: of the recipe's base, which is the one that the adapter was trained with.
    """
    found: Record = {}
    if text is not None:
        found["plain_text"] = {"file": text.name, "tokens": text.tokens, "before": text.before, "after": text.after}
    conditions = report["conditions"]
    if is_changed and report["task"] != report["trained_on"] and {"learned", "none"} <= conditions.keys():
        before, after = conditions["none"], conditions["learned"]
        task: Record = {"task": report["task"]}
        if "accuracy" in before:
            task["accuracy"] = {"before": before["accuracy"], "after": after["accuracy"]}
        if "loss" in before:
            task["loss"] = {"before": before["loss"]["per_token"], "after": after["loss"]["per_token"]}
        found["other_task"] = task
    if found and not is_changed:
        found["base_unchanged"] = fingerprint
    return found


def forgetting_lines(found: Record) -> list[str]:
    """For a terminal."""
    if not found:
        return []
    rows = []
    if text := found.get("plain_text"):
        rows.append(_cells(f"{text['file'][:24]}, nats per token", text, ".4f"))
    if task := found.get("other_task"):
        if "accuracy" in task:
            rows.append(_cells(f"{task['task']}, accuracy", task["accuracy"], ".1%"))
        if "loss" in task:
            rows.append(_cells(f"{task['task']}, nats per token", task["loss"], ".4f"))
    lines = ["", *table_lines(["what the base forgets", "before", "after", "change"], rows)]
    if fingerprint := found.get("base_unchanged"):
        lines.append(f"nothing that was trained is in the base: its fingerprint is {fingerprint[:12]}, as before")
    return lines


def _cells(what: str, pair: Record, form: str) -> list[str]:
    before, after = pair["before"], pair["after"]
    return [what, f"{before:{form}}", f"{after:{form}}", f"{after - before:+{form}}"]
