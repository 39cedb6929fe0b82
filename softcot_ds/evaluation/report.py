"""From what an evaluation found to its report: accuracies, losses, intervals, paired tests, and whose report it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softcot_ds.adapter import AdapterConfig
from softcot_ds.data.targets import OwnShare
from softcot_ds.evaluation.board import write_points
from softcot_ds.evaluation.statistics import (
    compare,
    compare_losses,
    compare_scores,
    mean_interval,
    per_token,
    wilson_interval,
)
from softcot_ds.evaluation.votes import over_problems
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.recipe import Recipe
from softcot_ds.tables import table_lines

Record = dict[str, Any]


def make_report(
    recipe: Recipe,
    adapter: Path,
    config: AdapterConfig,
    trained: Record,
    records: Mapping[str, list[Record]],
    costs: Mapping[str, Record],
) -> Record:
    """Accuracies with 95% Wilson intervals and what they cost, losses with bootstrap intervals, and learned against
    each control on the same problems: McNemar's exact test of the accuracies, a permutation test and a bootstrap
    interval of the losses, and so of accuracies and majorities where each problem has several samples.

    Args:
        trained: how the adapter was trained, as its checkpoint says.
        records: by condition, one per problem: with what was decoded, with the loss of the solution, or with both.
        costs: by condition, see ``spent.per_problem``; none where no answers were asked for.
    """
    conditions: dict[str, Record] = {name: {} for name in records}
    controls = [name for name in records if name != "learned"] if "learned" in records else []
    comparisons: dict[str, Record] = {f"learned-{name}": {} for name in controls}
    evaluation = recipe.evaluation
    if evaluation.decode:
        for name, rows in records.items():
            conditions[name] |= _accuracy(rows, recipe.task.metric_rule, recipe.seed, evaluation.votes) | costs[name]
        for name in controls:
            comparisons[f"learned-{name}"] |= _compare(records["learned"], records[name], recipe.seed, evaluation.votes)
    if evaluation.loss:
        losses, tokens = _losses(records)
        for name, values in losses.items():
            conditions[name]["loss"] = {
                "per_token": sum(values) / sum(tokens),
                "ci95": mean_interval(per_token(np.array([values]), tokens)[0], recipe.seed),
                "per_problem": sum(values) / len(tokens),
                "tokens": sum(tokens),
                "num_problems": len(tokens),
            }
        for name in controls:
            found = compare_losses(losses["learned"], losses[name], tokens, recipe.seed)
            comparisons[f"learned-{name}"]["loss"] = found
    return {
        "task": recipe.task.name,
        "trained_on": config.task,
        "metric_rule": recipe.task.metric_rule,
        "num_problems": len(next(iter(records.values()))),
        "seeds": [recipe.seed],
        "assistant": recipe.assistant.model,
        "base": recipe.base.model,
        "num_thoughts": recipe.trained_to(config.step).in_evaluation.thoughts.count,
        "trained_num_thoughts": config.num_thoughts,
        "adapter": str(adapter),
        "step": config.step,
        "max_new_tokens": evaluation.max_new_tokens,
        "temperature": evaluation.temperature,
        **_beside_defaults(recipe),
        "train": trained,
        "conditions": conditions,
        "comparisons": comparisons,
    }


def _beside_defaults(recipe: Recipe) -> Record:
    """How answers were reached, where that is not by one reply to each problem: reports of the default say nothing."""
    evaluation = recipe.evaluation
    return {
        **({"samples": recipe.answers} if evaluation.decode and recipe.answers > 1 else {}),
        **({"chains": recipe.chains.count} if recipe.chains else {}),
        **({"read": evaluation.read} if evaluation.decode and evaluation.read != "text" else {}),
        **evaluation.other_strategy,
        **({"votes": True} if evaluation.votes else {}),
    }


@dataclass(frozen=True)
class Scores:
    """What each problem came to under one condition: a number of each, or none where it was not asked for."""

    ids: list[str]
    accuracy: list[float]
    """The share of its samples that is right; the score of their majority where they vote."""
    majority: list[float]
    """The score of the majority of several samples."""
    loss: list[float]
    """Nats of the solution, of the problems whose solutions fit."""
    tokens: list[int]
    """Of the same solutions."""


def scores(records: Mapping[Any, list[Record]], votes: bool = False) -> dict[Any, Scores]:
    """By condition what a report is made of, problem by problem. For ``records`` see ``make_report``, for ``votes``
    ``EvaluationConfig.votes``."""
    some = next(iter(records.values()))[0]
    losses, tokens = _losses(records) if "loss" in some else ({}, [])
    return {
        name: Scores(
            [row["id"] for row in rows],
            _of_problems(rows, votes) if "output" in some or "samples" in some else [],
            [row["majority"] for row in rows] if "samples" in some else [],
            losses.get(name, []),
            tokens,
        )
        for name, rows in records.items()
    }


def _by_rule(rule: str, rows: list[Record], votes: bool) -> Record:
    problems = [[sample["by_rule"][rule] for sample in samples_of(record)] for record in rows]
    found = [one for problem in problems for one in problem]
    correct = sum(one["correct"] for one in found)
    unparsed = sum(one["answer"] is None for one in found)
    counted = {"accuracy": correct / len(found), "correct": correct, "unparsed": unparsed}
    if len(found) == len(rows):
        return counted
    counted |= over_problems(problems)
    return counted | ({"accuracy": counted["majority"][str(len(problems[0]))]} if votes else {})


def samples_of(record: Record) -> list[Record]:
    """What was decoded for a problem: one sample, or several."""
    return record.get("samples", [record])


def _of_problems(rows: list[Record], votes: bool) -> list[float]:
    """What the accuracy is the mean of: of each problem the share of its samples that is right, or the score of their
    majority."""
    if votes:
        return [record["majority"] for record in rows]
    return [sum(sample["correct"] for sample in samples_of(record)) / len(samples_of(record)) for record in rows]


def _accuracy(rows: list[Record], rule: str, seed: int, votes: bool) -> Record:
    by_rule = {name: _by_rule(name, rows, votes) for name in samples_of(rows[0])[0]["by_rule"]}
    samples = [sample for record in rows for sample in samples_of(record)]
    found = by_rule[rule] | {"cut": sum(sample["cut"] for sample in samples)}
    if "judgements" in samples[0]:
        asked, unread = (sum(sample[key] for sample in samples) for key in ("judgements", "unread_judgements"))
        found["judgements"] = {"asked": asked, "unread": unread, "unread_share": unread / asked if asked else 0.0}
    if "samples" in rows[0]:
        found["ci95"] = mean_interval(_of_problems(rows, votes), seed)
        found["majority_ci95"] = mean_interval(_of_problems(rows, votes=True), seed)
    else:
        found["ci95"] = wilson_interval(found["correct"], len(rows))
    return found | {"by_rule": by_rule}


def _compare(learned: list[Record], other: list[Record], seed: int, votes: bool) -> Record:
    if "samples" not in learned[0]:
        first, second = ({record["id"]: record["correct"] for record in rows} for rows in (learned, other))
        return compare(first, second)
    assert [record["id"] for record in learned] == [record["id"] for record in other]
    answers, majorities = (
        compare_scores(_of_problems(learned, voted), _of_problems(other, voted), seed) for voted in (votes, True)
    )
    return answers | {"majority": majorities}


def _losses(records: Mapping[str, list[Record]]) -> tuple[dict[str, list[float]], list[int]]:
    """By condition the loss of each solution that fits, and their numbers of tokens: the same under all conditions."""
    solutions = {
        name: [(row["id"], row["solution_tokens"]) for row in rows if row["loss"] is not None]
        for name, rows in records.items()
    }
    first, *others = solutions.values()
    assert all(other == first for other in others), "losses are of the same solutions under every condition"
    losses = {name: [row["loss"] for row in rows if row["loss"] is not None] for name, rows in records.items()}
    return losses, [tokens for _, tokens in first]


def table(report: Record) -> str:
    """The report for a terminal, of 100 columns at most but for the adapter's path."""
    rows = list(report["conditions"].values())
    title = f"{report['task']}: {report['num_problems']} problems, adapter {report['adapter']}"
    title += f" (trained on {report['trained_on']})" if report["trained_on"] != report["task"] else ""
    title += f", answers read from the {report['read']}" if "read" in report else ""
    if report["num_thoughts"] != report["trained_num_thoughts"]:
        title += f", {report['num_thoughts']} thoughts (trained with {report['trained_num_thoughts']})"
    lines = [title + (f", strategy {report['strategy']}" if "strategy" in report else "")]
    if own := report["train"].get("own_targets"):
        lines.append(f"trained on {OwnShare(**own).words()}")
    if "accuracy" in rows[0]:
        lines += _accuracy_lines(report) + _spent_lines(report) + _draft_lines(report)
    if "samples" in report:
        lines += _vote_lines(report)
    if any(row.get("cut") for row in rows):
        lines.append(f"cut: outputs that ended at evaluation.max_new_tokens={report['max_new_tokens']}")
    if "loss" in rows[0]:
        lines += ["", *_loss_lines(report)] if "accuracy" in rows[0] else _loss_lines(report)
    return "\n".join(lines)


def _accuracy_lines(report: Record) -> list[str]:
    outputs = report["num_problems"] * report.get("samples", 1)
    test = "p (permutation)" if "samples" in report else "p (McNemar)"
    rows = []
    for name, row in report["conditions"].items():
        cells = [name, f"{row['accuracy']:.1%}", _interval(row["ci95"]), f"{row['tokens_per_problem']:.1f}"]
        cells += [f"{row['seconds_per_problem']:.2g}"]
        cells += [f"{row['unparsed'] / outputs:.1%}", f"{row['cut'] / outputs:.1%}"]
        if found := report["comparisons"].get(f"learned-{name}"):
            cells += [f"{100 * found['difference']:+.1f}", f"{found['p_value']:.2g}"]
        rows.append(cells)
    header = ["condition", "accuracy", "95% interval", "tokens", "seconds", "unparsed", "cut", "learned - it", test]
    return table_lines(header, rows)


def _spent_lines(report: Record) -> list[str]:
    first = next(iter(report["conditions"].values()))
    others = [rule for rule in first["by_rule"] if rule != report["metric_rule"]]
    header = ["condition", "read", "written", "assistant reads", "writes", "seconds"]
    header += [f"by {rule}" for rule in others] + (["judged", "unread"] if "judgements" in first else [])
    rows = []
    for name, row in report["conditions"].items():
        spent = row["spent_per_problem"]
        cells = [name, *(f"{spent[what]:.1f}" for what in ("read", "written", "assistant_read", "assistant_written"))]
        cells += [f"{spent['assistant_seconds']:.2g}" if "assistant_seconds" in spent else "-"]
        cells += [f"{row['by_rule'][rule]['accuracy']:.1%}" for rule in others]
        if judged := row.get("judgements"):
            cells += [f"{judged['asked'] / report['num_problems']:.1f}", f"{judged['unread_share']:.1%}"]
        rows.append(cells)
    what = "tokens and seconds are what the base spends on an answer; of them, and beside them:"
    return ["", what, *table_lines(header, rows)]


def _draft_lines(report: Record) -> list[str]:
    found = {name: row["drafts"] for name, row in report["conditions"].items() if "drafts" in row}
    if not found:
        return []
    count = next(iter(found.values()))["tokens"]
    rows = []
    for name, row in found.items():
        accepted = "none drafted" if row["accepted"] is None else f"{row['accepted']:.1%}"
        rows.append([name, f"{row['tokens_per_pass']:.2f}", accepted])
    header = ["condition", "tokens of a pass", "drafts accepted"]
    return ["", f"the assistant drafts {count} tokens for each pass of the base:", *table_lines(header, rows)]


def _vote_lines(report: Record) -> list[str]:
    most, chains = str(report["samples"]), report.get("chains", 1)
    drawn = f"{most} samples of each" if chains == 1 else f"{report['samples'] // chains} of each of {chains} chains"
    accuracy = "that of their majority" if report.get("votes") else "the mean over them"
    lines = [
        "",
        f"{drawn} at temperature {report['temperature']:g}: accuracy is {accuracy}, sd that of one sample's;",
        f"majority is of all {most}, and a tie counts as the share of the tied answers that is right",
    ]
    rows = []
    for name, row in report["conditions"].items():
        cells = [name, f"{row['accuracy_sd']:.1%}", f"{row['majority'][most]:.1%}", _interval(row["majority_ci95"])]
        cells += [f"{row['ties'][most]:.1%}", f"{row['pass_at_k'][most]:.1%}"]
        if found := report["comparisons"].get(f"learned-{name}", {}).get("majority"):
            cells += [f"{100 * found['difference']:+.1f}", f"{found['p_value']:.2g}"]
        rows.append(cells)
    header = ["condition", "sd", "majority", "95% interval", "ties", f"pass@{most}", "learned - it", "p (permutation)"]
    return [*lines, *table_lines(header, rows)]


def _interval(ends: tuple[float, float] | None) -> str:
    return "{:.1%} - {:.1%}".format(*ends) if ends else "one problem"


def _loss_lines(report: Record) -> list[str]:
    losses = {name: row["loss"] for name, row in report["conditions"].items()}
    first = next(iter(losses.values()))
    what = (
        f"loss of the solutions in nats (lower is better): {first['num_problems']} problems, {first['tokens']} tokens"
    )
    rows = []
    for name, row in losses.items():
        cells = [name, f"{row['per_token']:.4f}", f"{row['per_problem']:.3f}"]
        if found := report["comparisons"].get(f"learned-{name}", {}).get("loss"):
            interval = "{:+.4f} to {:+.4f}".format(*found["ci95"]) if found["ci95"] else "one problem"
            cells += [f"{found['per_token']:+.4f}", interval, f"{found['p_value']:.2g}"]
        rows.append(cells)
    header = ["condition", "per token", "per problem", "learned - it", "95% interval", "p (permutation)"]
    return [what, *table_lines(header, rows)]


def write_results(run_dir: Path, folder: Path, records: Mapping[str, list[Record]], report: Record, page: str) -> str:
    """Write records and report, which also comes as a page, into the evaluation's own ``folder``; the report also as
    the run's, unless that one says more (a quick check does not replace it) or this one is of another task. Returns a
    sentence about where they are.

    Raises:
        SoftCoTError: they cannot be written.
    """
    of_the_run = run_dir / "report.json"
    text = json.dumps(report, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in records.items():
            write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomically(folder / "report.html", page)
        write_atomically(folder / "report.json", text)
        if report["task"] != report["trained_on"]:
            return f"results: {folder}; {of_the_run} is for the run's own task, {report['trained_on']}"
        more = what_it_says_more(_read_report(of_the_run), report)
        if not more:
            write_atomically(of_the_run.with_suffix(".html"), page)
            write_atomically(of_the_run, text)
            write_points(run_dir, report)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if more:
        return (
            f"results: {folder}. {of_the_run} stays as it is: {'; '.join(more)}. Remove it to let the next evaluation "
            "take its place"
        )
    return f"results: {folder}, and {of_the_run}; to look at: {of_the_run.with_suffix('.html')}"


def what_it_says_more(old: Any, new: Record) -> list[str]:
    """What a run's report ``old`` says that ``new`` does not, in words; nothing when ``old`` is no report."""
    if not isinstance(old, dict) or not isinstance(old.get("conditions"), dict):
        return []
    rules = [report.get("metric_rule", "ours") for report in (old, new)]
    if rules[0] != rules[1]:
        return [f"its answers were found by the rule {rules[0]}, those of this one by {rules[1]}"]
    if old.get("strategy") != new.get("strategy"):
        return [f"its strategy is {old.get('strategy', 'single')}, that of this one {new.get('strategy', 'single')}"]
    if old.get("read") != new.get("read"):
        return [f"its answers are read from the {old.get('read', 'text')}, here from the {new.get('read', 'text')}"]
    counts = [report.get("num_thoughts") for report in (old, new)]
    if isinstance(counts[0], int) and counts[0] != counts[1]:
        return ["it is of {} thoughts, this one of {}".format(*counts)]
    if "forgetting" in old and "forgetting" not in new:
        return ["it tells what the base forgets, and this one does not"]
    missing = [name for name in old["conditions"] if name not in new["conditions"]]
    more = [f"it has conditions that this one lacks ({', '.join(missing)})"] if missing else []
    for key, words in {"accuracy": "accuracies", "loss": "losses"}.items():
        has = [
            any(key in row for row in report["conditions"].values() if isinstance(row, dict)) for report in (old, new)
        ]
        if has == [True, False]:
            more.append(f"it has {words}, this one has none")
    more_samples = [report.get("samples", 1) for report in (old, new)]
    if isinstance(more_samples[0], int) and more_samples[0] > more_samples[1]:
        more.append("it has {} samples of each problem, this one {}".format(*more_samples))
    for key, words in {
        "num_problems": "it is on {} problems, this one on {}",
        "step": "it is of step {}, this one of step {}",
        "max_new_tokens": "its outputs may have {} tokens, those of this one {}",
    }.items():
        if isinstance(old.get(key), int) and old[key] > new[key]:
            more.append(words.format(old[key], new[key]))
    return more


def _read_report(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
