"""From the outputs of an evaluation to its report: accuracies, intervals, paired tests, and whose report it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softcot_ds.adapter import AdapterConfig
from softcot_ds.evaluation.statistics import compare, wilson_interval
from softcot_ds.files import cannot_write, write_atomically
from softcot_ds.recipe import Recipe

Record = dict[str, Any]


def make_report(
    recipe: Recipe, adapter: Path, config: AdapterConfig, trained: Record, records: Mapping[str, list[Record]]
) -> Record:
    """Accuracies with 95% Wilson intervals, and learned against each control (McNemar's exact test).

    Args:
        trained: how the adapter was trained, as its checkpoint says.
        records: by condition, one per problem.
    """
    verdicts = {name: {record["id"]: record["correct"] for record in rows} for name, rows in records.items()}
    conditions = {}
    for name, rows in records.items():
        correct = sum(record["correct"] for record in rows)
        conditions[name] = {
            "accuracy": correct / len(rows),
            "ci95": wilson_interval(correct, len(rows)),
            "correct": correct,
            "unparsed": sum(record["answer"] is None for record in rows),
            "cut": sum(record["cut"] for record in rows),
            "by_rule": {rule: _by_rule(rule, rows) for rule in rows[0]["by_rule"]},
        }
    learned = verdicts.get("learned")
    comparisons = {
        f"learned-{name}": compare(learned, other)
        for name, other in verdicts.items()
        if learned is not None and name != "learned"
    }
    evaluation = recipe.evaluation
    return {
        "task": recipe.task.name,
        "trained_on": config.task,
        "metric_rule": recipe.task.metric_rule,
        "num_problems": len(next(iter(records.values()))),
        "seeds": [recipe.seed],
        "assistant": recipe.assistant.model,
        "base": recipe.base.model,
        "num_thoughts": config.num_thoughts,
        "adapter": str(adapter),
        "step": config.step,
        "max_new_tokens": evaluation.max_new_tokens,
        "temperature": evaluation.temperature,
        **evaluation.other_strategy,
        "train": trained,
        "conditions": conditions,
        "comparisons": comparisons,
    }


def _by_rule(rule: str, rows: list[Record]) -> Record:
    found = [record["by_rule"][rule] for record in rows]
    correct = sum(one["correct"] for one in found)
    unparsed = sum(one["answer"] is None for one in found)
    return {"accuracy": correct / len(rows), "correct": correct, "unparsed": unparsed}


def table(report: Record) -> str:
    """The report for a terminal."""
    first = next(iter(report["conditions"].values()))
    others = [rule for rule in first["by_rule"] if rule != report["metric_rule"]]
    lines = [
        f"{report['task']}: {report['num_problems']} problems, adapter {report['adapter']}"
        + (f" (trained on {report['trained_on']})" if report["trained_on"] != report["task"] else "")
        + (f", strategy {report['strategy']}" if "strategy" in report else ""),
        f"{'condition':<12}{'accuracy':>9}{'95% interval':>17}{'unparsed':>10}{'cut':>7}{'learned - it':>14}"
        f"{'p (McNemar)':>13}" + "".join(f"{f'by {rule}':>14}" for rule in others),
    ]
    for name, row in report["conditions"].items():
        low, high = row["ci95"]
        line = f"{name:<12}{row['accuracy']:>9.1%}{f'{low:.1%} - {high:.1%}':>17}{row['unparsed']:>10}{row['cut']:>7}"
        comparison = report["comparisons"].get(f"learned-{name}")
        if comparison:
            line += f"{100 * comparison['difference']:>+13.1f} {comparison['p_value']:>13.2g}"
        elif others:
            line += " " * 27
        lines.append(line + "".join(f"{row['by_rule'][rule]['accuracy']:>14.1%}" for rule in others))
    if any(row["cut"] for row in report["conditions"].values()):
        lines.append(f"cut: outputs that ended at evaluation.max_new_tokens={report['max_new_tokens']}")
    return "\n".join(lines)


def write_results(run_dir: Path, folder: Path, records: Mapping[str, list[Record]], report: Record) -> str:
    """Write records and report into the evaluation's own ``folder``; the report also as the run's, unless that one says
    more (a quick check does not replace it) or this one is of another task. Returns a sentence about where they are.

    Raises:
        SoftCoTError: they cannot be written.
    """
    of_the_run = run_dir / "report.json"
    text = json.dumps(report, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in records.items():
            write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomically(folder / "report.json", text)
        if report["task"] != report["trained_on"]:
            return f"results: {folder}; {of_the_run} is for the run's own task, {report['trained_on']}"
        more = what_it_says_more(_read_report(of_the_run), report)
        if not more:
            write_atomically(of_the_run, text)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if more:
        return (
            f"results: {folder}. {of_the_run} stays as it is: {'; '.join(more)}. Remove it to let the next evaluation "
            "take its place"
        )
    return f"results: {folder}, and {of_the_run}"


def what_it_says_more(old: Any, new: Record) -> list[str]:
    """What a run's report ``old`` says that ``new`` does not, in words; nothing when ``old`` is no report."""
    if not isinstance(old, dict) or not isinstance(old.get("conditions"), dict):
        return []
    rules = [report.get("metric_rule", "ours") for report in (old, new)]
    if rules[0] != rules[1]:
        return [f"its answers were found by the rule {rules[0]}, those of this one by {rules[1]}"]
    if old.get("strategy") != new.get("strategy"):
        return [f"its strategy is {old.get('strategy', 'single')}, that of this one {new.get('strategy', 'single')}"]
    missing = [name for name in old["conditions"] if name not in new["conditions"]]
    more = [f"it has conditions that this one lacks ({', '.join(missing)})"] if missing else []
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
