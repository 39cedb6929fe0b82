"""Tables in a log file or on a terminal: as wide as what is in them."""

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table

_GAP = 2


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = (0,)) -> list[str]:
    """The header's line, and one for each row, without colours: the same wherever it is printed.

    Args:
        rows: their cells; what a row lacks at its end stays empty.
        words: the columns that hold words, and begin at the left; numbers end at the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wide enough for any: what does not fit would be cut. Names may have brackets in them that are no markup.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as text:
        console.print(table)
    return [line.rstrip() for line in text.get().splitlines()]
