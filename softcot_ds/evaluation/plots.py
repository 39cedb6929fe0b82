"""The plots of a study's page: one small figure of each task. They depend on nothing but the report."""

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from softcot_ds.evaluation.drawing import COLOURS, GREYS, MARKERS, figure, legend, name_groups, places_of, point
from softcot_ds.evaluation.report import Record

_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and losses of a training."""


class Plots:
    """The plots of one report. Each gives the SVG of a figure, or None where the report has no numbers for it."""

    def __init__(self, report: Record) -> None:
        self._report = report
        trained = [cell["method"] for cell in report["cells"] if "run" in cell]
        colours, greys = itertools.cycle(COLOURS), itertools.cycle(GREYS)
        self._colour = {name: next(colours if name in trained else greys) for name in report["methods"]}
        self._marker = dict(zip(report["strategies"], itertools.cycle(MARKERS), strict=False))
        self._dash = dict(zip(report["methods"], itertools.cycle(_DASHES), strict=False))

    def accuracy(self, task: str) -> str | None:
        """Methods below each other, with intervals; the strategies of one beside each other."""
        rows = [one for one in self._of(task) if one["accuracy"] is not None]
        return rows and figure(len(rows), lambda axes: self._draw_accuracy(axes, task, rows))

    def differences(self, task: str) -> str | None:
        """The reference less each other method, with intervals."""
        rows = [
            one
            for one in self._report["comparisons"]
            if (one["of"], one["metric"], one["task"]) == ("methods", "accuracy", task)
        ]
        return rows and figure(len(rows), lambda axes: self._draw_differences(axes, rows))

    def losses(self, task: str) -> str | None:
        """What stands for the thoughts, and the loss of the solutions then, by method."""
        rows = _losses_by_condition(self._report, task)
        return rows and figure(len(rows), lambda axes: self._draw_losses(axes, rows))

    def tokens(self, task: str) -> str | None:
        """Accuracy against what is spent for it."""
        rows = [one for one in self._of(task) if one["accuracy"] is not None and one["tokens_per_problem"]]
        return rows and figure(14, lambda axes: self._draw_tokens(axes, rows))

    def forgetting(self, task: str) -> str | None:
        """What became of losses that a method was not trained on, by method: of a plain text, and of another task."""
        rows = _forgotten(self._report, task)
        return rows and figure(len(rows), lambda axes: self._draw_forgetting(axes, rows))

    def curves(self, curves: Sequence[tuple[str, Curve]]) -> str | None:
        """Training losses by step, each the mean of a stretch of steps.

        Args:
            curves: with the method of each.
        """
        return curves and figure(14, lambda axes: self._draw_curves(axes, curves))

    def _of(self, task: str) -> list[Record]:
        return [one for one in self._report["summaries"] if one["task"] == task]

    def _draw_accuracy(self, axes: Axes, task: str, rows: Sequence[Record]) -> None:
        places = list(places_of([row["method"] for row in rows]))
        for row, place in zip(rows, places, strict=True):
            point(axes, row["accuracy"], place, self._colour[row["method"]], self._marker[row["strategy"]], 100)
            for paper in row.get("published", []):
                axes.plot(100 * paper["accuracy"], place, marker="|", markersize=11, color="black", zorder=4)
        name_groups(axes, [row["method"] for row in rows], places)
        floor = 100 * self._report["tasks"][task]["most_frequent_answer"]
        label = f"always the most frequent answer, {floor:.0f}%"
        lines = [axes.axvline(floor, color="black", linestyle=":", linewidth=1, label=label)]
        if any("published" in row for row in rows):
            lines.append(Line2D([], [], marker="|", markersize=11, linestyle="", color="black", label="in a paper"))
        axes.set(xlim=(0, 100), xlabel="accuracy, %")
        legend(axes, [*self._markers([row["strategy"] for row in rows]), *lines])

    def _draw_differences(self, axes: Axes, rows: Sequence[Record]) -> None:
        places = list(places_of([row["second"] for row in rows]))
        for row, place in zip(rows, places, strict=True):
            point(axes, row, place, self._colour[row["second"]], self._marker[row["strategy"]], 100)
        name_groups(axes, [row["second"] for row in rows], places)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"points of accuracy by which {rows[0]['first']} is better")
        legend(axes, self._markers([row["strategy"] for row in rows]))

    def _draw_losses(self, axes: Axes, rows: Sequence[tuple[str, str, float]]) -> None:
        places = list(places_of([condition for condition, *_ in rows]))
        for (_, method, loss), place in zip(rows, places, strict=True):
            axes.plot(loss, place, "o", color=self._colour[method])
        name_groups(axes, [condition for condition, *_ in rows], places)
        axes.set_xlim(left=0)
        axes.set_xlabel("loss of the reference solutions, nats per token (lower is better)")
        legend(axes, self._handles([method for _, method, _ in rows]))

    def _draw_tokens(self, axes: Axes, rows: Sequence[Record]) -> None:
        for row in rows:
            colour, marker = self._colour[row["method"]], self._marker[row["strategy"]]
            point(axes, row["accuracy"], row["tokens_per_problem"], colour, marker, 100, upright=True)
        spent = [row["tokens_per_problem"] for row in rows]
        if max(spent) > 5 * min(spent):
            axes.set_xscale("log")
        axes.set(ylim=(0, 100), ylabel="accuracy, %", xlabel="tokens read and written for a problem")
        methods = self._handles([row["method"] for row in rows])
        strategies = self._markers([row["strategy"] for row in rows])
        legend(axes, [*methods, *strategies])

    def _draw_forgetting(self, axes: Axes, rows: Sequence[tuple[str, str, float]]) -> None:
        places = list(places_of([method for method, *_ in rows]))
        markers = dict(zip(dict.fromkeys(what for _, what, _ in rows), MARKERS, strict=False))
        for (method, what, change), place in zip(rows, places, strict=True):
            axes.plot(change, place, markers[what], color=self._colour[method])
        name_groups(axes, [method for method, *_ in rows], places)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel("loss after training less before, nats per token")
        settings: dict[str, Any] = {"color": "black", "fillstyle": "none", "linestyle": ""}
        legend(axes, [Line2D([], [], marker=marker, label=what, **settings) for what, marker in markers.items()])

    def _draw_curves(self, axes: Axes, curves: Sequence[tuple[str, Curve]]) -> None:
        for method, (steps, losses) in curves:
            axes.plot(steps, losses, color=self._colour[method], linestyle=self._dash[method], linewidth=1.4)
        axes.set_yscale("log")
        axes.set(xlabel="optimizer steps", ylabel="training loss, nats per token")
        names = dict.fromkeys(method for method, _ in curves)
        legend(axes, [Line2D([], [], color=self._colour[m], linestyle=self._dash[m], label=m) for m in names])

    def _handles(self, methods: Sequence[str]) -> list[Line2D]:
        settings: dict[str, Any] = {"marker": "o", "linestyle": ""}
        return [Line2D([], [], color=self._colour[name], label=name, **settings) for name in dict.fromkeys(methods)]

    def _markers(self, strategies: Sequence[str]) -> list[Line2D]:
        settings: dict[str, Any] = {"color": "black", "fillstyle": "none", "linestyle": ""}
        return [Line2D([], [], marker=self._marker[name], label=name, **settings) for name in dict.fromkeys(strategies)]


def _losses_by_condition(report: Record, task: str) -> list[tuple[str, str, float]]:
    """Condition, method and the mean over the seeds of its loss, by condition and method: of the first strategy, as it
    decides nothing of a loss. A condition that has nothing to do with the method stands there once, as a baseline; and
    losses of other tokens than those of most cells, as of solutions whose steps are not written, not at all."""
    found: dict[tuple[str, str], list[float]] = {}
    cells = [cell for cell in report["cells"] if (cell["task"], cell["strategy"]) == (task, report["strategies"][0])]
    baselines = {cell["method"] for cell in cells if "run" not in cell}
    tokens = report["tasks"][task]["solution_tokens"]
    for cell in (cell for cell in cells if cell["solution_tokens"] == tokens):
        told = {"learned" if "run" in cell else cell["method"]: cell["loss"]}
        told |= {name: one["loss"] for name, one in cell.get("controls", {}).items() if name not in baselines}
        for condition, loss in told.items():
            if loss is not None:
                found.setdefault((condition, cell["method"]), []).append(loss)
    conditions = list(dict.fromkeys(condition for condition, _ in found))
    ordered = sorted(found, key=lambda pair: (conditions.index(pair[0]), report["methods"].index(pair[1])))
    return [(*pair, sum(found[pair]) / len(found[pair])) for pair in ordered]


def _forgotten(report: Record, task: str) -> list[tuple[str, str, float]]:
    """Method, what is not to be forgotten, and the mean over the seeds of the change of its loss, by method."""
    found: dict[tuple[str, str], list[float]] = {}
    for cell in report["cells"]:
        if (cell["task"], cell["strategy"]) == (task, report["strategies"][0]):
            told = cell.get("forgetting", {})
            pairs = {"a plain text": told.get("plain_text"), "this task": told.get("other_task", {}).get("loss")}
            for what, pair in pairs.items():
                if pair:
                    found.setdefault((cell["method"], what), []).append(pair["after"] - pair["before"])
    return [(*key, sum(changes) / len(changes)) for key, changes in found.items()]
