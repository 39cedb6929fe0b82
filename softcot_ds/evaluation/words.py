"""A study's report in words, and as a table for a terminal."""

from collections.abc import Iterator, Sequence

from softcot_ds.evaluation.report import Record
from softcot_ds.tables import table_lines


def study_table(report: Record) -> str:
    """The report for a terminal, of 110 columns at most but for long names."""
    lines: list[str] = []
    header = ["method", "strategy", "accuracy", "95% interval", "loss", "tokens", "seconds"]
    header += [f"{report['reference']} - it", "p (Holm)", ""]
    for task, told in report["tasks"].items():
        seeds = ", ".join(map(str, report["seeds"]))
        lines += [
            f"{task}: {told['num_problems']} problems, seeds {seeds}; the most frequent answer alone: "
            f"{told['most_frequent_answer']:.1%}",
        ]
        of_task = [one for one in report["summaries"] if one["task"] == task]
        lines += table_lines(header, [_cells(report, one) for one in of_task], words=(0, 1, 9))
        lines += [] if all(one["loss_is_comparable"] for one in of_task) else [OTHER_TOKENS]
        lines.append("")
    return "\n".join([*lines, *findings(report)])


def _cells(report: Record, one: Record) -> list[str]:
    accuracy = one["accuracy"] or {}
    ends = accuracy.get("ci95")
    cells = [one["method"], one["strategy"], shown(accuracy.get("mean"), ".1%")]
    cells += ["-" if ends is None else "{:.1%}-{:.1%}".format(*ends), shown_loss(one)]
    cells += [shown(one["tokens_per_problem"], ",.0f"), shown(one["seconds_per_problem"], ",.3f")]
    lead = ["", ""]
    for pair in report["comparisons"]:
        place = pair["of"], pair["metric"], pair["task"], pair["second"], pair.get("strategy")
        if place == ("methods", "accuracy", one["task"], one["method"], one["strategy"]):
            lead = [f"{100 * pair['mean']:+.1f}", shown(pair.get("p_adjusted"), ".2g")]
    papers = ", ".join(f"{paper['accuracy']:.1%} in {paper['source']}" for paper in one.get("published", []))
    return [*cells, *lead, papers]


def what_it_is(report: Record) -> Iterator[str]:
    seeds = report["seeds"]
    for name, task in report["tasks"].items():
        trained = "" if task["trained_on"] == task["task"] else f", with adapters trained on {task['trained_on']}"
        yield (
            f"{name}: {task['num_problems']:,} test problems{trained}; base {task['base']}, assistant "
            f"{task['assistant']}."
        )
    if len(seeds) == 1:
        yield (
            f"One seed ({seeds[0]}). All intervals are of 95% and over problems alone, Wilson's of accuracies, "
            "bootstrap percentiles of all else: what another seed would give may lie outside of them."
        )
    else:
        yield (
            f"{len(seeds)} seeds ({', '.join(map(str, seeds))}). All intervals are of 95%, for other seeds and other "
            "problems: Student's t from crossed random effects."
        )


def findings(report: Record) -> Iterator[str]:
    """What the numbers say of each task, in words: who leads, and which differences of the reference are no chance."""
    for name, task in report["tasks"].items():
        told = [one for one in report["summaries"] if one["task"] == name and one["accuracy"] is not None]
        if not told:
            continue
        best = max(told, key=lambda one: one["accuracy"]["mean"])
        text = f"{name}: the highest accuracy is {best['accuracy']['mean']:.1%}, of {_named(best, 'method')}"
        if best["accuracy"]["mean"] <= task["most_frequent_answer"]:
            text += f", and no more than the {task['most_frequent_answer']:.1%} of the most frequent answer alone"
        place = ("methods", "accuracy", name)
        pairs = [one for one in report["comparisons"] if (one["of"], one["metric"], one["task"]) == place]
        yield f"{text}. {_leads(report['reference'], pairs)}"


def _leads(reference: str, pairs: Sequence[Record]) -> str:
    """Which of the comparisons of a reference are decided, the p value adjusted for their number being below 5%."""
    decided = [one for one in pairs if one.get("p_adjusted", 1) < 0.05]
    sentences = []
    for word, sign in (("above", 1), ("below", -1)):
        named = [
            f"{_named(one, 'second')} by {100 * abs(one['mean']):.1f} points"
            for one in decided
            if one["mean"] * sign > 0
        ]
        sentences += [f"{reference} is {word} {', '.join(named)}."] if named else []
    if len(decided) < len(pairs):
        open_ones = ", ".join(_named(one, "second") for one in pairs if one not in decided)
        sentences.append(f"Whether it is above or below {open_ones} is open (adjusted p of 5% or more).")
    return " ".join(sentences)


def _named(one: Record, key: str) -> str:
    return f"{one[key]} ({one['strategy']})"


def shown(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


OTHER_TOKENS = (
    "* a mean over other tokens than the task's other losses, as of solutions whose steps are not written: not to be "
    "compared with these"
)
"""What a star at a loss says."""


def shown_loss(one: Record) -> str:
    """Of a summary, with a star where ``OTHER_TOKENS`` is to be said of it."""
    if one["loss"] is None:
        return "-"
    return shown(one["loss"]["mean"], ".4f") + ("" if one["loss_is_comparable"] else "*")


def shown_interval(ends: Sequence[float] | None, form: str) -> str:
    """Both ends, or a dash where they are not known."""
    return "-" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"
