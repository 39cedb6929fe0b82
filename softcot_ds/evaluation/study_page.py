"""A study's report as one page: plots, tables, and what they say in words. It needs nothing but itself: no network, no
script."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from softcot_ds.evaluation.document import document, figure, table
from softcot_ds.evaluation.plots import Curve, Plots
from softcot_ds.evaluation.report import Record
from softcot_ds.evaluation.words import OTHER_TOKENS, findings, shown, shown_interval, shown_loss, what_it_is
from softcot_ds.files import parse_json, write_in_folder

_POINTS = 60
"""Of a learning curve: each is the mean of a stretch of steps."""


def write_page(run_dir: Path, report: Record) -> Path:
    """Write a study's page beside its report; the learning curves are read from its runs.

    Raises:
        SoftCoTError: it cannot be written.
    """
    curves: dict[str, list[tuple[str, Curve]]] = {}
    for cell in report["cells"]:
        task = report["tasks"][cell["task"]]
        if "run" in cell and cell["strategy"] == report["strategies"][0] and task["task"] == task["trained_on"]:
            curve = learning_curve(Path(cell["run"]) / "losses.jsonl")
            curves.setdefault(cell["task"], []).extend([(cell["method"], curve)] if curve[0] else [])
    return write_in_folder(run_dir / "study.html", page(report, curves))


def learning_curve(path: Path) -> Curve:
    """Losses of a run, each the mean of a stretch of steps, at its middle; none where the file does not tell."""
    try:
        rows = [parse_json(line) for line in path.read_bytes().splitlines()]
        losses = {int(row["step"]): float(row["loss"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return [], []
    length = math.ceil(len(losses) / _POINTS) or 1
    steps, values = list(losses), list(losses.values())
    stretches = range(0, len(steps), length)
    return (
        [round(fmean(steps[start : start + length])) for start in stretches],
        [fmean(values[start : start + length]) for start in stretches],
    )


def page(report: Record, curves: Mapping[str, Sequence[tuple[str, Curve]]]) -> str:
    """The page.

    Args:
        curves: by task the method and learning curve of each run that was trained on it.
    """
    plots = Plots(report)
    drawn = [
        ("Accuracy", _OF_ACCURACY, plots.accuracy),
        ("Differences", _OF_DIFFERENCES, plots.differences),
        ("Loss by what stands for the thoughts", _OF_LOSSES, plots.losses),
        ("Accuracy against tokens spent", _OF_TOKENS, plots.tokens),
        ("Forgetting", _OF_FORGETTING, plots.forgetting),
        ("Learning curves", _OF_CURVES, lambda task: plots.curves(curves.get(task, []))),
    ]
    sections = []
    for title, words, draw in drawn:
        figures = [(task, svg) for task in report["tasks"] if (svg := draw(task))]
        if figures:  # what there are no numbers for is left out
            shown = "".join(figure(task, title, svg) for task, svg in figures)
            sections.append(f'<h2>{title}</h2>\n<p>{words}</p>\n<div class="plots">{shown}</div>')
    comparable = all(one["loss_is_comparable"] for one in report["summaries"])
    body = [
        *(f"<p>{escape(line)}</p>" for line in (*what_it_is(report), *findings(report))),
        *sections,
        "<h2>All means</h2>",
        table(_MEANS, _TEXTS, [_mean_cells(one) for one in report["summaries"]]),
        *([] if comparable else [f"<p>{escape(OTHER_TOKENS)}.</p>"]),
        "<h2>All comparisons</h2>",
        f"<p>{_OF_COMPARISONS}</p>",
        table(_PAIRS, _TEXTS, [_pair_cells(one) for one in report["comparisons"]]),
    ]
    return document(report["study"], body)


_OF_ACCURACY = (
    "The share of test problems that are answered right, with 95% intervals; a marker for each strategy. Grey methods "
    "train nothing: none is zero-shot CoT, text the assistant's words (Assist-CoT), placeholder CoT-Unk. Dotted is "
    "what always giving the most frequent answer would get; a black bar is what a paper reports for the same models."
)
_OF_DIFFERENCES = (
    "On the same problems, with 95% intervals that are not adjusted for their number: right of the line the first "
    "method is better, left of it the other."
)
_OF_LOSSES = (
    "How many nats the base needs for the tokens of the reference solutions when something else stands for the "
    "thoughts: where another question's thoughts (shuffled) do as well as its own (learned), they carry nothing of it. "
    "Losses of other tokens, as of solutions whose steps a method does not write, are left out."
)
_OF_TOKENS = "Tokens, thoughts among them, that the base reads and writes for one problem; intervals as above."
_OF_FORGETTING = (
    "What training did to losses of what was not trained on: right of the line the base has become worse at it. "
    "Methods that leave the base as it is stand on the line."
)
_OF_CURVES = (
    "What each method minimises, each point the mean of a stretch of steps; a line for each seed. Where a method adds "
    "a term of its own, as SoftCoT++ does, its height says nothing beside others'."
)
_OF_COMPARISONS = (
    "The first less the second: points of accuracy, or nats per token. p is two-sided: of one seed that of McNemar's "
    "exact test of verdicts on the same problems, of the permutation test of shares and losses; of several seeds that "
    "of Student's t over crossed seeds and problems. Adjusted p values are "
    "Holm's, over all comparisons of one kind (methods, or strategies) and one metric."
)


_MEANS = ("task", "method", "strategy", "seeds", "accuracy", "95%", "loss", "95%", "tokens", "seconds", "published")
_PAIRS = ("of", "task", "first", "second", "with", "metric", "difference", "95%", "p", "adjusted p", "of how many")
_TEXTS = {"task", "method", "strategy", "of", "first", "second", "with", "metric"}


def _mean_cells(one: Record) -> list[str]:
    accuracy, loss = one["accuracy"] or {}, one["loss"] or {}
    papers = ", ".join(f"{paper['accuracy']:.1%} ({paper['source']})" for paper in one.get("published", []))
    return [
        *(one["task"], one["method"], one["strategy"], str(one["num_seeds"])),
        *(shown(accuracy.get("mean"), ".1%"), shown_interval(accuracy.get("ci95"), ".1%")),
        *(shown_loss(one), shown_interval(loss.get("ci95"), ".4f")),
        *(shown(one["tokens_per_problem"], ",.1f"), shown(one["seconds_per_problem"], ",.3f"), papers),
    ]


def _pair_cells(one: Record) -> list[str]:
    points = one["metric"] == "accuracy"
    factor, form = (100, "+.1f") if points else (1, "+.4f")
    ends = None if one["ci95"] is None else [factor * end for end in one["ci95"]]
    return [
        *(one["of"], one["task"], one["first"], one["second"]),
        *(one.get("strategy") or one["method"], one["metric"], f"{factor * one['mean']:{form}}"),
        *(shown_interval(ends, form), shown(one["p_value"], ".2g"), shown(one.get("p_adjusted"), ".2g")),
        str(one.get("adjusted_for", "")),
    ]
