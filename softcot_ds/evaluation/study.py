"""The report of a study: every cell, what its seeds say together, paired tests between methods and between strategies,
and what the papers report beside it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from softcot_ds.evaluation.grid import Evaluated, by_metric, over_cells
from softcot_ds.evaluation.report import Record, Scores
from softcot_ds.evaluation.statistics import compare, compare_losses, compare_scores, holm, mean_interval
from softcot_ds.files import parse_json, read_yaml, write_in_folder
from softcot_ds.study_config import Study, StudyCell

METRICS = ("accuracy", "loss")
_COST = ("tokens_per_problem", "seconds_per_problem")


@dataclass(frozen=True)
class _Told:
    """What one cell, or a baseline beside it, came to."""

    row: Record
    scores: Scores


_Group = tuple[str, str, str]
"""Task, method and strategy: what seeds have in common."""


def make_study_report(study: Study, found: Sequence[tuple[StudyCell, Evaluated]]) -> Record:
    """A row of every cell; a summary of each task, method and strategy over the seeds (``over_seeds``; of a single seed
    the intervals are over problems alone); and comparisons on the same problems, seed by seed: of the study's reference
    with every other method, and of the first strategy with every other, accuracies and losses each.

    The p values of all comparisons of one kind and metric are adjusted together (``holm``).

    Args:
        found: all cells of the study, in its order.
    """
    groups: dict[_Group, list[_Told]] = {}
    for group, told in _told(study, found):
        groups.setdefault(group, []).append(told)
    tasks: dict[str, Record] = {}
    for cell, one in found:
        if cell.task not in tasks:
            tasks[cell.task] = _task(cell, one)
    for name, task in tasks.items():
        task["solution_tokens"] = _of_most([one.row for of, some in groups.items() for one in some if of[0] == name])
    kinds = {cell.method: cell.recipe.method for cell, _ in found}
    plain = {cell.strategy for cell, _ in found if _is_one_chain(cell)}
    summaries = [_summary(group, told) for group, told in groups.items()]
    for one in summaries:
        one["loss_is_comparable"] = one["solution_tokens"] in (None, tasks[one["task"]]["solution_tokens"])
        # The papers' numbers are of single chains.
        papers = _published(tasks[one["task"]], kinds.get(one["method"], one["method"]))
        one |= {"published": papers} if papers and one["strategy"] in plain else {}
    return {
        "study": study.name,
        "seeds": list(study.seeds),
        "tasks": tasks,
        "methods": list(dict.fromkeys(method for _, method, _ in groups)),
        "strategies": list(dict.fromkeys(strategy for *_, strategy in groups)),
        "reference": study.reference,
        "cells": [told.row for some in groups.values() for told in some],
        "summaries": summaries,
        "comparisons": _comparisons(study, groups),
    }


@cache
def _papers() -> Record:
    return read_yaml(Path(__file__).with_name("published.yaml"))


def _published(told: Record, kind: str) -> list[Record]:
    """What papers report for a task's base and a kind of method, shares of 1, each with its ``source``."""
    papers, found = _papers(), []
    for paper in papers["papers"]:
        if paper["base"].lower() == told["base"].rpartition("/")[2].lower() and told["task"] in papers["tasks"]:
            percent = paper["accuracy"].get(kind, {})
            value = percent[papers["tasks"].index(told["task"])] if percent else None
            found += [] if value is None else [{"accuracy": value / 100, "source": paper["source"]}]
    return found


def _is_one_chain(cell: StudyCell) -> bool:
    return cell.recipe.evaluation.strategy == "single" and cell.recipe.evaluation.samples == 1


def _answers_otherwise(cell: StudyCell) -> bool:
    recipe = cell.recipe
    return bool(recipe.chains or recipe.coconut or recipe.compressed_cot)


def _told(study: Study, found: Sequence[tuple[StudyCell, Evaluated]]) -> Iterator[tuple[_Group, _Told]]:
    """Every cell's method; behind those of a task the baselines, which have nothing to do with it: each from the first
    method that was evaluated beside it. Those come last that answer by several chains, as then it does so too, or leave
    out steps of solutions, whose losses are others."""
    for task in study.tasks:
        of_task = [(cell, one) for cell, one in found if cell.task == task]
        for cell, one in of_task:
            yield (task, cell.method, cell.strategy), _Told(_row(cell, one, "learned"), one.scores["learned"])
        beside = sorted(of_task, key=lambda pair: _answers_otherwise(pair[0]))
        for baseline in study.baselines:
            seen = set()
            for cell, one in beside:
                if baseline in one.scores and (cell.strategy, cell.seed) not in seen:
                    seen.add((cell.strategy, cell.seed))
                    yield (task, baseline, cell.strategy), _Told(_row(cell, one, baseline), one.scores[baseline])


def _task(cell: StudyCell, one: Evaluated) -> Record:
    """What all cells of a task have in common, and what the most frequent answer alone would get."""
    lines = (one.folder / "learned.jsonl").read_bytes().splitlines()
    references = Counter(parse_json(line)["reference"] for line in lines)
    return {
        "task": one.report["task"],
        "trained_on": one.report["trained_on"],
        "num_problems": one.report["num_problems"],
        "most_frequent_answer": max(references.values()) / references.total(),
        "assistant": one.report["assistant"],
        "base": one.report["base"],
    }


def _of_most(rows: Sequence[Record]) -> int | None:
    """How many tokens the losses of most rows are means over; None without any."""
    counted = Counter(row["solution_tokens"] for row in rows if row["solution_tokens"] is not None)
    return counted.most_common(1)[0][0] if counted else None


def _row(cell: StudyCell, one: Evaluated, condition: str) -> Record:
    """One cell: under ``learned``, which is the method, or another condition, which is a baseline."""
    report, of = one.report, one.report["conditions"][condition]
    row = {
        "method": cell.method if condition == "learned" else condition,
        "task": cell.task,
        "strategy": cell.strategy,
        "seed": cell.seed,
        "accuracy": of.get("accuracy"),
        "ci95": of.get("ci95"),
        "loss": of["loss"]["per_token"] if "loss" in of else None,
        "solution_tokens": of["loss"]["tokens"] if "loss" in of else None,
        **{key: of.get(key) for key in _COST},
        "unparsed": of.get("unparsed"),
        "report": str(one.folder / "report.json"),
    }
    if condition != "learned":
        return row
    others = {name: _control(told) for name, told in report["conditions"].items() if name != "learned"}
    row |= {"run": one.run, "adapter": report["adapter"], "step": report["step"], "train": report["train"]}
    row |= {"controls": others} if others else {}
    return row | ({"forgetting": report["forgetting"]} if report.get("forgetting") else {})


def _control(told: Record) -> Record:
    return {"accuracy": told.get("accuracy"), "loss": told["loss"]["per_token"] if "loss" in told else None}


def _summary(group: _Group, told: Sequence[_Told]) -> Record:
    task, method, strategy = group
    tables = by_metric([one.scores for one in told])
    summary: Record = {"task": task, "method": method, "strategy": strategy, "num_seeds": len(told)}
    summary["solution_tokens"] = _of_most([one.row for one in told])
    for metric in METRICS:
        if metric not in tables:
            summary[metric] = None
        elif len(told) > 1:
            summary[metric] = over_cells(tables[metric], metric)
        else:
            row = told[0].row
            ends = row["ci95"] if metric == "accuracy" else mean_interval(tables[metric][0], row["seed"])
            summary[metric] = {"mean": row[metric], "ci95": ends}
    for key in _COST:
        values = [one.row[key] for one in told]
        summary[key] = None if None in values else float(np.mean(values))
    return summary


def _comparisons(study: Study, groups: Mapping[_Group, Sequence[_Told]]) -> list[Record]:
    first_strategy = next(iter(study.strategies))
    found = []
    for task, method, strategy in groups:
        if method != study.reference and (task, study.reference, strategy) in groups:
            pair = (task, study.reference, strategy), (task, method, strategy)
            # A loss has nothing to do with the strategy: it is compared once.
            metrics = METRICS if strategy == first_strategy else METRICS[:1]
            found += _compared("methods", pair, groups, metrics)
        if strategy != first_strategy and (task, method, first_strategy) in groups:
            pair = (task, method, first_strategy), (task, method, strategy)
            found += _compared("strategies", pair, groups, METRICS[:1])
    for kind in ("methods", "strategies"):
        for metric in METRICS:
            family = [
                one for one in found if (one["of"], one["metric"]) == (kind, metric) and one["p_value"] is not None
            ]
            for one, adjusted in zip(family, holm([one["p_value"] for one in family]), strict=True):
                one |= {"p_adjusted": adjusted, "adjusted_for": len(family)}
    return sorted(found, key=lambda one: (one["of"], one["metric"]))


def _compared(
    kind: str, pair: tuple[_Group, _Group], groups: Mapping[_Group, Sequence[_Told]], metrics: Sequence[str]
) -> Iterator[Record]:
    """The first of a pair less the second, on the same problems and, where there are several, of the same seeds."""
    (task, first, strategy), (_, second, other_strategy) = pair
    told = [groups[one] for one in pair]
    for metric in metrics:
        scores = [[one.scores for one in some] for some in told]
        if not all(getattr(one, metric) for some in scores for one in some):
            continue
        named = {"of": kind, "metric": metric, "task": task}
        named |= {"first": first, "second": second, "strategy": strategy}
        if kind == "strategies":
            named |= {"first": strategy, "second": other_strategy, "method": first}
            del named["strategy"]
        if _same_problems(scores, metric):
            yield named | _difference(scores, metric, told[0][0].row["seed"])


def _same_problems(scores: Sequence[Sequence[Scores]], metric: str) -> bool:
    """Losses are of the solutions that fit: with more thoughts in the prompt, one may fit no more."""
    keys = {(tuple(one.ids), tuple(one.tokens) if metric == "loss" else ()) for some in scores for one in some}
    return len(keys) == 1 and len({len(some) for some in scores}) == 1


def _difference(scores: Sequence[Sequence[Scores]], metric: str, seed: int) -> Record:
    """``mean``, ``ci95`` and ``p_value``."""
    if len(scores[0]) > 1:
        first, second = (by_metric(some)[metric] for some in scores)
        found = over_cells(first - second, metric, -1.0)
        return {key: found[key] for key in ("mean", "ci95", "p_value")}
    first, second = (some[0] for some in scores)
    if metric == "loss":
        found = compare_losses(first.loss, second.loss, first.tokens, seed)
        return {"mean": found["per_token"], "ci95": found["ci95"], "p_value": found["p_value"]}
    found = compare_scores(first.accuracy, second.accuracy, seed)
    if {*first.accuracy, *second.accuracy} <= {0, 1}:  # McNemar's test, as in the report of one evaluation
        verdicts = (dict(zip(one.ids, map(bool, one.accuracy), strict=True)) for one in (first, second))
        found |= {"p_value": compare(*verdicts)["p_value"]}
    return {"mean": found["difference"], "ci95": found["ci95"], "p_value": found["p_value"]}


def write_study_report(run_dir: Path, report: Record) -> Path:
    """Write ``study.json``. Raises SoftCoTError when it cannot be written."""
    return write_in_folder(run_dir / "study.json", json.dumps(report, indent=2) + "\n")
