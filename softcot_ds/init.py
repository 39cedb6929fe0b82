"""``softcot-ds init NAME [FOLDER]``: copy what comes with softcot-ds, to change it.

A name is one that ``softcot-ds recipes`` lists, with its folder and ending or without, or that of another file or
folder that is shipped: slurm, whose scripts ``submit`` then takes from the current directory; ds_configs/zero3.json;
wording such as softcot_ds/tasks/gsm8k.yaml.
"""

import argparse
import difflib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from softcot_ds.command import add_settings, parsed, run_command
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write
from softcot_ds.shipped import FOLDERS, HOME, PACKAGE, settings_named


def copy_shipped(name: str, folder: Path) -> Path:
    """Copy a shipped file or folder into ``folder``, which is made where it is not there.

    Returns:
        The copy, which has the last part of the name.

    Raises:
        SoftCoTError: there is none of this name; something of its name is there already, or cannot be written.
    """
    source = _shipped(name)
    target = folder / source.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            with target.open("xb") as file:
                file.write(source.read_bytes())
    except FileExistsError as error:
        raise SoftCoTError(
            f"{error.filename} is there already, and stays as it is; name another folder: softcot-ds init {name} FOLDER"
        ) from error
    except OSError as error:
        raise cannot_write(target, error, otherwise="name another folder") from error
    return target


def _shipped(name: str) -> Path:
    there = {folder: HOME / folder for folder in FOLDERS}
    for path in (path for folder in list(there.values()) for path in folder.rglob("*") if path.is_file()):
        there[str(path.relative_to(HOME))] = path
    there |= {str(path.relative_to(PACKAGE.parent)): path for path in PACKAGE.glob("*/*.yaml")}
    for asked in (name.rstrip("/"), *map(str, settings_named(name))):
        if asked in there:
            return there[asked]
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    suggested = f"did you mean {near[0]}? " if near else ""
    raise SoftCoTError(
        f"nothing that comes with softcot-ds is called {name!r}; {suggested}softcot-ds recipes lists recipes, and "
        "softcot-ds init --help says what else there is"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds init", description="Copy what comes with softcot-ds, to change it. Nothing is overwritten."
    )
    add_settings(
        parser,
        "name",
        "as softcot-ds recipes lists it; or slurm, ds_configs/zero3.json, softcot_ds/tasks/gsm8k.yaml, ...",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="default: the current one")
    args = parsed(parser, argv)
    return run_command(lambda: print(copy_shipped(args.name, args.folder)))


if __name__ == "__main__":
    sys.exit(main())
