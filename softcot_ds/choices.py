"""What a recipe can name, and the class behind each name: the only lists.

To add one: a module, and a line here. The module is imported when it is chosen.
"""

import importlib
from collections.abc import Callable
from typing import Any

PROJECTIONS = {
    "linear": "softcot_ds.methods.softcot:LinearProjection",
    "static": "softcot_ds.methods.prompt_tuning:StaticThoughts",
}
"""``projection.kind``: a ``methods.base.Projection``."""


def one_of(choices: dict[str, str]) -> Callable[[str], str]:
    """A validator of names. It raises ValueError for any other."""

    def check(name: str) -> str:
        if name not in choices:
            raise ValueError(f"Input should be {' or '.join(map(repr, choices))}")
        return name

    return check


def chosen(choices: dict[str, str], name: str) -> Any:
    """The class of a name."""
    module, _, attribute = choices[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
