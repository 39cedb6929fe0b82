"""What the plots of all pages have in common: figures in SVG, as wide as a phone held upright, points with intervals.

Colours are Okabe and Ito's, which people with any common colour blindness tell apart; a marker, a dash or the order
says the same a second time. Figures depend on nothing but their numbers: the same ones give the same bytes.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Record = Mapping[str, Any]
_WIDTH = 4.7
"""Inches, of 96 CSS pixels each."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A3B00")
GREYS = ("#555555", "#111111", "#8C8C8C", "#B0B0B0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "page",
    "svg.fonttype": "path",  # drawn letters look the same everywhere, and need no font
}


def figure(num_rows: int, draw: Callable[[Axes], None]) -> str:
    """The SVG of what ``draw`` puts on axes that are high enough for so many rows."""
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    svg = _drawn(num_rows, draw, format="svg", metadata=metadata).decode()
    svg = svg[svg.index("<svg") :]
    # Its size is the page's to choose, by the viewBox.
    return re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink">', svg
    )


def picture(num_rows: int, draw: Callable[[Axes], None]) -> bytes:
    """The same as a PNG, for what shows no SVG."""
    return _drawn(num_rows, draw, format="png", dpi=150, metadata={"Software": None})


def _drawn(num_rows: int, draw: Callable[[Axes], None], **settings: Any) -> bytes:
    with matplotlib.rc_context(_STYLE):
        sheet = Figure((_WIDTH, 1.3 + 0.2 * num_rows), layout="constrained")
        draw(sheet.add_subplot())
        file = io.BytesIO()
        sheet.savefig(file, **settings)
    return file.getvalue()


def by_condition(points: Mapping[str, Record], factor: float, label: str, floor: float | None = None) -> str:
    """The SVG of an evaluation's conditions below each other; see ``conditions``."""
    return figure(len(points), conditions(points, factor, label, floor))


def conditions(
    points: Mapping[str, Record], factor: float, label: str, floor: float | None = None
) -> Callable[[Axes], None]:
    """What draws the conditions of an evaluation below each other, ``learned`` in colour, from 0 on.

    Args:
        points: by condition its ``mean`` and ``ci95``.
        factor: by which both are multiplied: 100 for a share, whose axis ends at 100%.
        floor: a dotted line, as multiplied.
    """

    def draw(axes: Axes) -> None:
        places = list(places_of(list(points)))
        for (name, found), place in zip(points.items(), places, strict=True):
            point(axes, found, place, COLOURS[0] if name == "learned" else GREYS[0], "o", factor)
        name_groups(axes, list(points), places)
        axes.set_xlim(left=0)
        if factor == 100:
            axes.set_xlim(right=100)
        if floor is not None:
            axes.axvline(floor, color="black", linestyle=":", linewidth=1)
        axes.set_xlabel(label)

    return draw


def point(
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


def places_of(names: Sequence[str]) -> Iterator[float]:
    """Heights of rows from the top down; rows of one name lie closer together than others."""
    place = 0.0
    for before, name in zip([None, *names], names, strict=False):
        place -= 1.0 if name == before else 1.6
        yield place


def name_groups(axes: Axes, names: Sequence[str], places: Sequence[float]) -> None:
    """Each name in the middle of its rows."""
    of_name: dict[str, list[float]] = {}
    for name, place in zip(names, places, strict=True):
        of_name.setdefault(name, []).append(place)
    axes.set_yticks([sum(some) / len(some) for some in of_name.values()], list(of_name))
    axes.set_ylim(min(places) - 0.8, max(places) + 0.8)
    axes.grid(visible=False, axis="y")


def legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.figure.legend(handles=list(handles), loc="outside lower center", ncols=2, handletextpad=0.4, columnspacing=1.2)
