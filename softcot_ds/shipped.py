"""What comes with softcot-ds beside its code: recipes, studies, DeepSpeed configurations, batch scripts.

In a checkout these folders lie beside the package, and where a wheel was installed inside of it (setup.py). Their
files have the same names everywhere, such as recipes/word_problems.yaml, and one of that name in the current directory
wins. A recipe or a study may be called without its folder and ending: word_problems is word_problems.yaml of the
current directory, as softcot-ds init copies it there, else recipes/word_problems.yaml, there or of those that are
shipped.
"""

import os
from pathlib import Path

FOLDERS = ("recipes", "studies", "ds_configs", "slurm")
_SETTINGS = ("recipes", "studies")
PACKAGE = Path(__file__).parent
HOME = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent
"""Holds ``FOLDERS``."""


def found(path: Path) -> Path:
    """The file that a path means: that of the current directory, else the one of this name that is shipped. The path
    itself where there is neither."""
    if os.path.lexists(path) or not path.parts or path.is_absolute():
        return path
    if path.parts[0] in FOLDERS:
        meant = [HOME / path]
    else:
        names = settings_named(str(path))
        meant = [Path(f"{path}.yaml"), *names, *(HOME / name for name in names)]
    return next(filter(os.path.isfile, meant), path)


def settings_named(name: str) -> list[Path]:
    """What a recipe or a study of this name would be called in full."""
    return [Path(folder, f"{name}.yaml") for folder in _SETTINGS]


def settings_files() -> list[Path]:
    """The recipes and studies that are shipped, by name: recipes/word_problems.yaml."""
    files = [path for folder in _SETTINGS for path in (HOME / folder).rglob("*.yaml")]
    # What is in a folder of its own comes after what is not.
    return sorted((path.relative_to(HOME) for path in files), key=lambda path: (path.parts[0], len(path.parts), path))
