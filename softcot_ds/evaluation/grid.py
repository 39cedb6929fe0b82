"""One report of several evaluations: over seeds, with both sources of variance, and by number of thoughts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from softcot_ds.evaluation.document import document, figure
from softcot_ds.evaluation.drawing import by_condition
from softcot_ds.evaluation.jobs import Loaded
from softcot_ds.evaluation.report import Record, Scores
from softcot_ds.evaluation.run import evaluated
from softcot_ds.evaluation.statistics import over_seeds, per_token, wilson_interval
from softcot_ds.files import write_in_folder
from softcot_ds.recipe import Recipe
from softcot_ds.tables import table_lines

_METRICS = ("accuracy", "majority", "loss")


@dataclass(frozen=True)
class Evaluated:
    """One cell: an evaluation, and of which run it is."""

    seed: int
    run: str
    """The run's directory."""
    folder: Path
    """Where its own report is."""
    report: Record
    scores: Mapping[Any, Scores]


def evaluate_all(chosen: Sequence[tuple[Recipe, Path]]) -> list[Evaluated]:
    """Evaluate recipes with their adapters one after the other; a base that several have in common is loaded once.

    All ranks call it. Raises SoftCoTError; see ``evaluated``.
    """
    loaded, found = Loaded(), []
    for recipe, adapter in chosen:
        one = evaluated(recipe, adapter, loaded)
        found.append(Evaluated(recipe.seed, str(recipe.run_dir), one.folder, one.report, one.scores))
    return found


def make_grid_report(cells: Sequence[Evaluated]) -> Record:
    """A row of every cell; and for each number of thoughts what all seeds say together, see ``over_seeds``: accuracies
    (and majorities, where there are samples) and losses per token of each condition, and learned against each control,
    problem by problem and seed by seed. Of a single seed that is what its own report says, over problems alone.

    Args:
        cells: of the same problems under the same conditions, at least one.
    """
    by_thoughts: dict[int, list[Evaluated]] = {}
    for cell in cells:
        by_thoughts.setdefault(cell.report["num_thoughts"], []).append(cell)
    first = cells[0].report
    return {
        "task": first["task"],
        "metric_rule": first["metric_rule"],
        "num_problems": first["num_problems"],
        "seeds": sorted({cell.seed for cell in cells}),
        "thoughts": list(by_thoughts),
        "assistant": first["assistant"],
        "base": first["base"],
        "temperature": first["temperature"],
        "samples": first.get("samples", 1),
        "cells": [_row(cell) for cell in cells],
        "summaries": [
            {"num_thoughts": count, **(_summary(some) if len(some) > 1 else _alone(some[0].report))}
            for count, some in by_thoughts.items()
        ],
    }


def _row(cell: Evaluated) -> Record:
    report = cell.report
    told = {"step": report["step"], "adapter": report["adapter"], "report": str(cell.folder / "report.json")}
    row = {"seed": cell.seed, "num_thoughts": report["num_thoughts"], "run": cell.run, **told}
    return row | {"conditions": {name: _values(of, report) for name, of in report["conditions"].items()}}


def _values(condition: Record, report: Record) -> Record:
    """A condition's numbers in a cell: those that a summary takes the mean of."""
    values = {"accuracy": condition["accuracy"]} if "accuracy" in condition else {}
    if "majority" in condition:
        values["majority"] = condition["majority"][str(report["samples"])]
    if "loss" in condition:
        values["loss"] = condition["loss"]["per_token"]
    return values


def _summary(cells: Sequence[Evaluated]) -> Record:
    tables = {name: by_metric([cell.scores[name] for cell in cells]) for name in cells[0].scores}
    pairs = [name for name in tables if name != "learned"] if "learned" in tables else []
    return {
        "num_seeds": len(cells),
        "conditions": {
            name: {key: over_cells(of, key) for key, of in of_metrics.items()} for name, of_metrics in tables.items()
        },
        "comparisons": {
            f"learned-{name}": {
                key: over_cells(apart, key, -1.0)
                for key, apart in ((key, of - tables[name][key]) for key, of in tables["learned"].items())
            }
            for name in pairs
        },
    }


def over_cells(values: np.ndarray, metric: str, least: float = 0.0) -> Record:
    """``over_seeds`` of a metric. Of one that lies between ``least`` and 1 (-1 for a difference) the interval does too,
    and where all is right, or all is wrong, what is known is known from the problems alone: it is Wilson's of them."""
    found = over_seeds(values)
    if metric == "loss":
        return found
    if found["ci95"] is not None:
        low, high = found["ci95"]
        found["ci95"] = max(low, least), min(high, 1.0)
    elif least == 0 and found["mean"] in (0, 1):
        num_problems = values.shape[1]
        found["ci95"] = wilson_interval(num_problems * int(found["mean"]), num_problems)
    return found


def by_metric(of_seeds: Sequence[Scores]) -> dict[str, np.ndarray]:
    """By metric (seeds, problems) float64; none of what was not asked for."""
    first = of_seeds[0]
    assert all((one.ids, one.tokens) == (first.ids, first.tokens) for one in of_seeds), (
        "all seeds have the same problems"
    )
    tables = {key: np.array([getattr(one, key) for one in of_seeds], float) for key in _METRICS if getattr(first, key)}
    return tables | ({"loss": per_token(tables["loss"], first.tokens)} if "loss" in tables else {})


def _alone(report: Record) -> Record:
    """What a report of one seed says, in the form of a summary: intervals are over problems, p values as there."""
    conditions, comparisons = {}, {}
    for name, row in report["conditions"].items():
        values = _values(row, report)
        ends = {
            "accuracy": row.get("ci95"),
            "majority": row.get("majority_ci95"),
            "loss": row.get("loss", {}).get("ci95"),
        }
        conditions[name] = {key: {"mean": value, "ci95": ends.get(key)} for key, value in values.items()}
    for pair, found in report["comparisons"].items():
        compared = {"accuracy": found, "majority": found.get("majority"), "loss": found.get("loss")}
        comparisons[pair] = {
            key: {
                "mean": one["per_token" if key == "loss" else "difference"],
                "ci95": one.get("ci95"),
                "p_value": one["p_value"],
            }
            for key, one in compared.items()
            if one is not None and "p_value" in one
        }
    return {"num_seeds": 1, "conditions": conditions, "comparisons": comparisons}


def grid_table(report: Record) -> str:
    """The report for a terminal, of 100 columns at most but for paths and long lists."""
    seeds, thoughts = report["seeds"], report["thoughts"]
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    lines = [f"{report['task']}: {report['num_problems']} problems, {named}, thoughts {', '.join(map(str, thoughts))}"]
    if len(seeds) > 1:
        lines += [
            "intervals are for other seeds and other problems: se is the mean's standard error that comes from",
            "either (seed, prob.), sd the standard deviation between the seeds",
        ]
    some = report["summaries"][0]["conditions"]
    for metric in (name for name in _METRICS if name in next(iter(some.values()))):
        lines += ["", *_summary_lines(report, metric), "", *_cell_lines(report, metric)]
    return "\n".join(lines)


def _summary_lines(report: Record, metric: str) -> list[str]:
    rows = []
    for summary in report["summaries"]:
        count = f"{summary['num_thoughts']} " if len(report["summaries"]) > 1 else ""
        for name, row in summary["conditions"].items():
            found = row[metric]
            cells = [count + name, _shown(found["mean"], metric), _interval(found["ci95"], metric)]
            cells += ["-" if value is None else _shown(value, metric) for value in _sources(found)]
            if pair := summary["comparisons"].get(f"learned-{name}", {}).get(metric):
                cells += [_difference(pair, metric), "-" if pair["p_value"] is None else f"{pair['p_value']:.2g}"]
            rows.append(cells)
    of = "loss per token" if metric == "loss" else metric
    header = [of, "mean", "95% interval", "sd", "se seed", "se prob", "learned - it, 95% interval", "p"]
    return table_lines(header, rows)


def _sources(found: Record) -> list[float | None]:
    """Deviation between seeds, and the standard errors from seeds and from problems."""
    errors = found.get("standard_error", {})
    return [found.get("seeds_sd"), errors.get("seeds"), errors.get("problems")]


def _cell_lines(report: Record, metric: str) -> list[str]:
    names = list(report["cells"][0]["conditions"])
    rows = []
    for cell in report["cells"]:
        values = (_shown(cell["conditions"][name][metric], metric) for name in names)
        rows.append([str(cell["seed"]), str(cell["num_thoughts"]), *values])
    return table_lines(["seed", "thoughts", *names], rows, words=(0, 1))


def _shown(value: float, metric: str) -> str:
    return f"{value:.4f}" if metric == "loss" else f"{value:.1%}"


def _interval(ends: Sequence[float] | None, metric: str) -> str:
    return " - ".join(_shown(end, metric) for end in ends) if ends else "-"


def _difference(pair: Record, metric: str) -> str:
    values = [pair["mean"], *(pair["ci95"] or [])]
    texts = [f"{value:+.4f}" if metric == "loss" else f"{100 * value:+.1f}" for value in values]
    return f"{texts[0]}  " + (" to ".join(texts[1:]) if texts[1:] else "-")


def grid_page(report: Record) -> str:
    """The report as a page: for each number of thoughts a plot of each metric, by condition; and the table."""
    labels = {"accuracy": "accuracy, %", "majority": "accuracy of the majority, %"}
    figures = []
    for summary in report["summaries"]:
        conditions = summary["conditions"]
        for metric in next(iter(conditions.values())):
            points = {name: of[metric] for name, of in conditions.items()}
            label = labels.get(metric, "loss of the solutions, nats per token")
            svg = by_condition(points, 100 if metric in labels else 1, label)
            figures.append(figure(f"{metric.capitalize()}, {summary['num_thoughts']} thoughts", "by condition", svg))
    seeds = ", ".join(map(str, report["seeds"]))
    told = (
        f"Base {report['base']}, assistant {report['assistant']}; seeds {seeds}. Each run's own page has its outputs:"
    )
    pages = [Path(cell["report"]).with_suffix(".html") for cell in report["cells"]]
    body = [
        f"<p>{escape(told)}</p>",
        "<ul>" + "".join(f"<li>{escape(str(path))}</li>" for path in pages) + "</ul>",
        f'<div class="plots">{"".join(figures)}</div>',
        f'<pre class="wide">{escape(grid_table(report))}</pre>',
    ]
    return document(f"{report['task']}: {report['num_problems']:,} problems, {len(report['cells'])} runs", body)


def write_grid_report(run_dir: Path, report: Record) -> Path:
    """Write it, and its page, as the newest of the runs of this name; every cell has its own besides. Raises
    SoftCoTError when they cannot be written."""
    write_in_folder(run_dir / "grid.html", grid_page(report))
    return write_in_folder(run_dir / "grid.json", json.dumps(report, indent=2) + "\n")
