"""``softcot-ds recipes``: the recipes and studies that come with softcot-ds, a line each.

By these names every command takes them, in any folder.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from softcot_ds.command import parsed, run_command
from softcot_ds.shipped import HOME, settings_files


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds recipes", description="The recipes and studies that come with softcot-ds."
    )
    parsed(parser, argv)
    return run_command(_list)


def _list() -> None:
    names = settings_files()
    width = max(len(str(name)) for name in names)
    for name in names:
        print(f"{name!s:{width}}  {_first_sentence(HOME / name)}")


def _first_sentence(path: Path) -> str:
    """Of the comment that a file begins with."""
    comment = re.match(r"(#.*\n)*", path.read_text())
    words = re.sub(r"^# ?", "", comment[0] if comment else "", flags=re.MULTILINE).split()
    return textwrap.shorten(re.split(r"(?<=[.?]) ", " ".join(words))[0], 100, placeholder=" ...")


if __name__ == "__main__":
    sys.exit(main())
