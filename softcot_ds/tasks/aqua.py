"""AQuA, algebra with five options (Ling et al., arXiv:1705.04146)."""

from collections.abc import Mapping

from softcot_ds.errors import SoftCoTError
from softcot_ds.tasks.base import DataTask, Problem, Sizes, boxed, with_options, without_labels
from softcot_ds.tasks.kinds import KINDS
from softcot_ds.tasks.options import LETTERS
from softcot_ds.tasks.records import Record, Types


class AQuA(DataTask):
    """Records with ``question``, ``options`` ("A)125", ...), ``rationale`` and ``correct``, a letter."""

    published = "deepmind/aqua_rat"
    subset = "raw"
    # Lengths and tokens are those of its other splits.
    sizes = Sizes(97_467, 254, 80, (102, 245), (87, 334), (169, 312), 20_000, validation=254)
    required: Mapping[str, Types] = {"question": str, "options": list, "rationale": str, "correct": str}
    kind = KINDS["option"]

    def problem(self, record: Record) -> Problem:
        options = tuple(without_labels(record["options"]) or ())
        if not options:
            raise SoftCoTError(f"'options' are not labelled 'A)', 'B)' and so on; found {record['options']}")
        correct = record["correct"].strip()
        if len(correct) != 1 or correct not in LETTERS[: len(options)]:
            raise SoftCoTError(f"'correct' is {correct!r}, which is none of the options' letters")
        if not (question := record["question"].strip()):
            raise SoftCoTError("'question' is empty")
        return Problem(with_options(question, options), record["rationale"].strip(), correct, options)

    def target(self, problem: Problem) -> str:
        return boxed(problem.reasoning, problem.answer)
