"""The plots of a study's page: one small figure of each task, as wide as a phone held upright, in SVG.

Colours are Okabe and Ito's, which people with any common colour blindness tell apart; a marker, a dash or the order
says the same a second time. Figures depend on nothing but the report: the same one gives the same bytes.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from softcot_ds.evaluation.report import Record

_WIDTH = 4.7
"""Inches, of 96 CSS pixels each."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A3B00")
_GREYS = ("#555555", "#111111", "#8C8C8C", "#B0B0B0")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "study",
    "svg.fonttype": "path",  # drawn letters look the same everywhere, and need no font
}
Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and losses of a training."""


class Plots:
    """The plots of one report. Each gives the SVG of a figure, or None where the report has no numbers for it."""

    def __init__(self, report: Record) -> None:
        self._report = report
        trained = [cell["method"] for cell in report["cells"] if "run" in cell]
        colours, greys = itertools.cycle(_COLOURS), itertools.cycle(_GREYS)
        self._colour = {name: next(colours if name in trained else greys) for name in report["methods"]}
        self._marker = dict(zip(report["strategies"], itertools.cycle(_MARKERS), strict=False))
        self._dash = dict(zip(report["methods"], itertools.cycle(_DASHES), strict=False))

    def accuracy(self, task: str) -> str | None:
        """Methods below each other, with intervals; the strategies of one beside each other."""
        rows = [one for one in self._of(task) if one["accuracy"] is not None]
        return rows and _figure(len(rows), lambda axes: self._draw_accuracy(axes, task, rows))

    def differences(self, task: str) -> str | None:
        """The reference less each other method, with intervals."""
        rows = [
            one
            for one in self._report["comparisons"]
            if (one["of"], one["metric"], one["task"]) == ("methods", "accuracy", task)
        ]
        return rows and _figure(len(rows), lambda axes: self._draw_differences(axes, rows))

    def losses(self, task: str) -> str | None:
        """What stands for the thoughts, and the loss of the solutions then, by method."""
        rows = _losses_by_condition(self._report, task)
        return rows and _figure(len(rows), lambda axes: self._draw_losses(axes, rows))

    def tokens(self, task: str) -> str | None:
        """Accuracy against what is spent for it."""
        rows = [one for one in self._of(task) if one["accuracy"] is not None and one["tokens_per_problem"]]
        return rows and _figure(14, lambda axes: self._draw_tokens(axes, rows))

    def forgetting(self, task: str) -> str | None:
        """What became of losses that a method was not trained on, by method: of a plain text, and of another task."""
        rows = _forgotten(self._report, task)
        return rows and _figure(len(rows), lambda axes: self._draw_forgetting(axes, rows))

    def curves(self, curves: Sequence[tuple[str, Curve]]) -> str | None:
        """Training losses by step, each the mean of a stretch of steps.

        Args:
            curves: with the method of each.
        """
        return curves and _figure(14, lambda axes: self._draw_curves(axes, curves))

    def _of(self, task: str) -> list[Record]:
        return [one for one in self._report["summaries"] if one["task"] == task]

    def _draw_accuracy(self, axes: Axes, task: str, rows: Sequence[Record]) -> None:
        places = list(_places([row["method"] for row in rows]))
        for row, place in zip(rows, places, strict=True):
            _point(axes, row["accuracy"], place, self._colour[row["method"]], self._marker[row["strategy"]], 100)
            for paper in row.get("published", []):
                axes.plot(100 * paper["accuracy"], place, marker="|", markersize=11, color="black", zorder=4)
        _name_groups(axes, [row["method"] for row in rows], places)
        floor = 100 * self._report["tasks"][task]["most_frequent_answer"]
        label = f"always the most frequent answer, {floor:.0f}%"
        lines = [axes.axvline(floor, color="black", linestyle=":", linewidth=1, label=label)]
        if any("published" in row for row in rows):
            lines.append(Line2D([], [], marker="|", markersize=11, linestyle="", color="black", label="in a paper"))
        axes.set(xlim=(0, 100), xlabel="accuracy, %")
        _legend(axes, [*self._markers([row["strategy"] for row in rows]), *lines])

    def _draw_differences(self, axes: Axes, rows: Sequence[Record]) -> None:
        places = list(_places([row["second"] for row in rows]))
        for row, place in zip(rows, places, strict=True):
            _point(axes, row, place, self._colour[row["second"]], self._marker[row["strategy"]], 100)
        _name_groups(axes, [row["second"] for row in rows], places)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"points of accuracy by which {rows[0]['first']} is better")
        _legend(axes, self._markers([row["strategy"] for row in rows]))

    def _draw_losses(self, axes: Axes, rows: Sequence[tuple[str, str, float]]) -> None:
        places = list(_places([condition for condition, *_ in rows]))
        for (_, method, loss), place in zip(rows, places, strict=True):
            axes.plot(loss, place, "o", color=self._colour[method])
        _name_groups(axes, [condition for condition, *_ in rows], places)
        axes.set_xlim(left=0)
        axes.set_xlabel("loss of the reference solutions, nats per token (lower is better)")
        _legend(axes, self._handles([method for _, method, _ in rows]))

    def _draw_tokens(self, axes: Axes, rows: Sequence[Record]) -> None:
        for row in rows:
            colour, marker = self._colour[row["method"]], self._marker[row["strategy"]]
            _point(axes, row["accuracy"], row["tokens_per_problem"], colour, marker, 100, upright=True)
        spent = [row["tokens_per_problem"] for row in rows]
        if max(spent) > 5 * min(spent):
            axes.set_xscale("log")
        axes.set(ylim=(0, 100), ylabel="accuracy, %", xlabel="tokens read and written for a problem")
        methods = self._handles([row["method"] for row in rows])
        strategies = self._markers([row["strategy"] for row in rows])
        _legend(axes, [*methods, *strategies])

    def _draw_forgetting(self, axes: Axes, rows: Sequence[tuple[str, str, float]]) -> None:
        places = list(_places([method for method, *_ in rows]))
        markers = dict(zip(dict.fromkeys(what for _, what, _ in rows), _MARKERS, strict=False))
        for (method, what, change), place in zip(rows, places, strict=True):
            axes.plot(change, place, markers[what], color=self._colour[method])
        _name_groups(axes, [method for method, *_ in rows], places)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel("loss after training less before, nats per token")
        settings: dict[str, Any] = {"color": "black", "fillstyle": "none", "linestyle": ""}
        _legend(axes, [Line2D([], [], marker=marker, label=what, **settings) for what, marker in markers.items()])

    def _draw_curves(self, axes: Axes, curves: Sequence[tuple[str, Curve]]) -> None:
        for method, (steps, losses) in curves:
            axes.plot(steps, losses, color=self._colour[method], linestyle=self._dash[method], linewidth=1.4)
        axes.set_yscale("log")
        axes.set(xlabel="optimizer steps", ylabel="training loss, nats per token")
        names = dict.fromkeys(method for method, _ in curves)
        _legend(axes, [Line2D([], [], color=self._colour[m], linestyle=self._dash[m], label=m) for m in names])

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
    tokens = Counter(cell["solution_tokens"] for cell in cells).most_common(1)
    for cell in (cell for cell in cells if cell["solution_tokens"] == tokens[0][0]):
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


def _figure(num_rows: int, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH, 1.3 + 0.2 * num_rows), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its size is the page's to choose, by the viewBox.
    return re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink">', svg
    )


def _point(
    axes: Axes, found: Record, place: float, colour: str, marker: str, factor: float, upright: bool = False
) -> None:
    """A mean with its interval, where there is one."""
    mean, ends = factor * found["mean"], found.get("ci95")
    bar = None if ends is None else [[max(0.0, mean - factor * ends[0])], [max(0.0, factor * ends[1] - mean)]]
    settings: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 5.5, "capsize": 2, "linewidth": 1.2}
    if upright:
        axes.errorbar(place, mean, yerr=bar, **settings)
    else:
        axes.errorbar(mean, place, xerr=bar, **settings)


def _places(names: Sequence[str]) -> Iterator[float]:
    """Heights of rows from the top down; rows of one name lie closer together than others."""
    place = 0.0
    for before, name in zip([None, *names], names, strict=False):
        place -= 1.0 if name == before else 1.6
        yield place


def _name_groups(axes: Axes, names: Sequence[str], places: Sequence[float]) -> None:
    """Each name in the middle of its rows."""
    of_name: dict[str, list[float]] = {}
    for name, place in zip(names, places, strict=True):
        of_name.setdefault(name, []).append(place)
    axes.set_yticks([sum(some) / len(some) for some in of_name.values()], list(of_name))
    axes.set_ylim(min(places) - 0.8, max(places) + 0.8)
    axes.grid(visible=False, axis="y")


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.figure.legend(handles=list(handles), loc="outside lower center", ncols=2, handletextpad=0.4, columnspacing=1.2)
