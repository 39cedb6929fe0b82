"""An evaluation's page: what is on it, and that texts of models are no more than text there."""

import io
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from evaluations import EVERY, recipe_in
from PIL import Image
from scribe import no_figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softcot_ds.evaluation import report_page as report_page_module
from softcot_ds.evaluation.report import write_results
from softcot_ds.evaluation.report_page import report_page
from softcot_ds.evaluation.run import evaluate
from softcot_ds.evaluation_config import STANDS_FOR, Condition

SCRIPT = """</pre><script>alert(1)</script><img src=x onerror=alert(2)>'" onload="alert(3) &lt;b>"""


@dataclass
class Problem:
    letters: list[str]
    texts: list[str] = field(default_factory=list)
    """Blocks of text as a reader sees them: the question, then each output."""
    heads: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = [("", ())]
        self.addresses: list[str] = []
        self.problems: list[Problem] = []
        self.buttons: dict[str, str] = {}
        self._button: str | None = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        given = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if given.get("class") == "problem":
            self.problems.append(Problem(given["data-v"].split()))
        elif tag == "pre" and self.problems:
            self.problems[-1].texts.append("")
        elif tag == "h3":
            self.problems[-1].heads.append("")
        elif tag == "button":
            self._button = given["value"]

    def handle_data(self, data):
        tag = self.tags[-1][0]
        if tag == "button" and self._button is not None:
            self.buttons[data], self._button = self._button, None
        elif self.problems and tag == "pre":
            self.problems[-1].texts[-1] += data
        elif self.problems and tag == "h3":
            self.problems[-1].heads[-1] += data

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}", ()))


def read(folder: Path) -> tuple[dict, dict, list[str]]:
    """Report and records of the only evaluation in a run's directory, and the questions."""
    (path,) = folder.glob("demo/evaluation/*/report.json")
    report = json.loads(path.read_text())
    records = {
        name: [json.loads(line) for line in (path.parent / f"{name}.jsonl").read_text().splitlines()]
        for name in report["conditions"]
    }
    return report, records, [json.loads(line)["question"] for line in (folder / "test.jsonl").read_text().splitlines()]


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report_page_module, "drawn", no_figure)


def test_page_has_every_output_and_finds_what_only_learned_gets_right_or_wrong(first_evaluation):
    _, records, questions = read(first_evaluation)
    text = (first_evaluation / "demo/report.html").read_text()
    (of_the_evaluation,) = first_evaluation.glob("demo/evaluation/*/report.html")
    assert text == of_the_evaluation.read_text()
    page = Page(text)
    assert not [address for address in page.addresses if not address.startswith("#")], "it is whole without a network"
    assert "default-src 'none'" in text
    assert [problem.texts for problem in page.problems] == [
        [question, *(records[name][number]["output"] for name in EVERY)] for number, question in enumerate(questions)
    ]
    word = records["learned"][0]["nearest_tokens"][0][0]
    assert text.count(escape(f"tokens nearest to the thoughts, and cosines: {word!r} 0.50, {word!r} 0.50")) == 7
    assert STANDS_FOR.keys() == set(get_args(Condition))
    kinds = Counter()
    for number, problem in enumerate(page.problems):
        for name, letters, head in zip(EVERY, problem.letters, problem.heads, strict=True):
            of = records[name][number]
            kinds[letters] += 1
            assert set(letters) == {
                "r" if of["correct"] else "n", *("u" * (of["answer"] is None)), *("c" * of["cut"])
            }  # fmt: skip
            verdict = "right" if of["correct"] else "unparsed" if of["answer"] is None else "wrong"
            assert head == f"{name}: {verdict}" + ", cut" * of["cut"]
    assert {"r", "n", "nuc"} <= kinds.keys()
    assert page.buttons[f"all ({len(questions)})"] == ""


def test_figures_are_on_the_page(first_evaluation):
    page = report_page(*read(first_evaluation))
    assert page.count("<svg viewBox") == 2
    assert (
        re.sub("<svg.*?</svg>\n?", no_figure(), page, flags=re.DOTALL)
        == (first_evaluation / "demo/report.html").read_text()
    )


@pytest.mark.parametrize(("word", "learned"), [("right", True), ("wrong", False)])
def test_buttons_name_verdicts_that_only_learned_has(first_evaluation, no_figures, word, learned):
    report, records, questions = read(first_evaluation)
    for number, name in ((2, "learned"), (5, "learned"), (3, "none")):
        for condition in records:
            records[condition][number] |= {"correct": (condition == name) == learned, "answer": "1"}
    page = Page(report_page(report, records, questions))
    wanted = next(value for words, value in page.buttons.items() if words.startswith(f"only learned {word} ("))
    rows = zip(*([of["correct"] for of in rows] for rows in records.values()), strict=True)
    truth = [own is learned and set(others) == {not learned} for own, *others in rows]
    assert [truth[number] for number in (2, 5, 3)] == [True, True, False]
    pairs = [zip(wanted.split(), problem.letters, strict=True) for problem in page.problems]
    assert [all(letter in letters for letter, letters in pair) for pair in pairs] == truth
    assert page.buttons[f"only learned {word} ({sum(truth)})"] == wanted


def test_what_models_write_is_text_and_nothing_else(first_evaluation, no_figures):
    report, records, questions = read(first_evaluation)
    harmless, hostile = (
        Page(
            report_page(
                report | {"adapter": text, "base": text},
                {name: [row | {"output": text, "answer": text} for row in rows] for name, rows in records.items()},
                [text] * len(questions),
            )
        )
        for text in ("x" * len(SCRIPT), SCRIPT)
    )
    assert hostile.tags == harmless.tags
    assert hostile.addresses == harmless.addresses
    assert {text for problem in hostile.problems for text in problem.texts} == {SCRIPT}


def test_of_a_long_output_the_middle_is_left_out(first_evaluation, no_figures):
    report, records, questions = read(first_evaluation)
    short = len(report_page(report, records, questions))
    records["learned"][0]["output"] = "begin " + "&" * 100_000 + " answer 7"
    page = report_page(report, records, questions)
    shown = Page(page).problems[0].texts[1]
    assert shown.startswith("begin &")
    assert shown.endswith("& answer 7")
    assert "97,615 characters left out" in shown
    assert len(page) - short < 5 * 2400 + 200


def test_losses_alone_have_no_verdicts_and_samples_have_votes(first_evaluation, tmp_path, scribe):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy", ignore=shutil.ignore_patterns("demo"))
    few = "evaluation.conditions=[learned,none]"
    evaluate(recipe_in(folder, few, "evaluation.decode=false"), folder / "adapter")
    page = (folder / "demo/report.html").read_text()
    assert "<form" not in page
    assert "<script" not in page
    assert page.count("<svg") == 1
    _, records, _ = read(folder)
    assert page.count("nats</p>") == 14
    assert f"loss {records['learned'][3]['loss']:.4f} nats" in page

    shutil.rmtree(folder / "demo")
    sampled = ["evaluation.samples=3", "evaluation.temperature=0.7", "evaluation.loss=false"]
    evaluate(recipe_in(folder, few, *sampled), folder / "adapter")
    page = Page(text := (folder / "demo/report.html").read_text())
    _, records, _ = read(folder)
    for number, problem in enumerate(page.problems):
        of = records["none"][number]
        assert problem.texts[2] == of["samples"][0]["output"]
        assert problem.letters[1].startswith("r" if of["majority"] == 1 else "n")
        assert f"{sum(sample['correct'] for sample in of['samples'])} of 3 samples right; votes" in text


def test_page_of_another_task_leaves_the_runs_own(first_evaluation, tmp_path):
    report, records, _ = read(first_evaluation)
    write_results(tmp_path, tmp_path / "one", records, report, "own")
    write_results(tmp_path, tmp_path / "two", records, report | {"trained_on": "another"}, "another task's")
    write_results(tmp_path, tmp_path / "three", records, report | {"num_problems": 3}, "quick check's")
    assert (tmp_path / "report.html").read_text() == "own"
    # TensorBoard has the numbers of the run's own, too, and those of a later evaluation in their place.
    for learned in (report["conditions"]["learned"]["accuracy"], 0.75):
        report["conditions"]["learned"]["accuracy"] = learned
        write_results(tmp_path, tmp_path / "four", records, report, "own")
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        for tag, value in (
            ("accuracy/learned", learned),
            ("test_loss/none", report["conditions"]["none"]["loss"]["per_token"]),
        ):
            assert [(event.step, event.value) for event in events.Scalars(tag)] == [(0, pytest.approx(value))]
        for tag in ("conditions/accuracy", "conditions/test_loss"):
            (image,) = events.Images(tag)
            assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)
    assert [(tmp_path / name / "report.html").read_text()[:3] for name in ("one", "two", "three")] == [
        "own",
        "ano",
        "qui",
    ]
