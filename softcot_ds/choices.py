"""What a recipe can name, and the class or function behind each name: the only lists.

To add one: a module, and a line here. The module is imported when it is chosen.
"""

import importlib
from collections.abc import Callable
from typing import Any

from pydantic_core import PydanticKnownError

from softcot_ds.errors import SoftCoTError

METHODS = {
    "softcot": "softcot_ds.methods.softcot:SoftCoT",
    "softcot_pp": "softcot_ds.methods.softcot_pp:SoftCoTPlusPlus",
    "prompt_tuning": "softcot_ds.methods.prompt_tuning:PromptTuning",
    "lora": "softcot_ds.methods.lora:Lora",
    "full": "softcot_ds.methods.full:Full",
    "coconut": "softcot_ds.methods.coconut:Coconut",
    "coconut_full": "softcot_ds.methods.coconut:CoconutFull",
    "compressed_cot": "softcot_ds.methods.compressed_cot:CompressedCoT",
}
"""``method``: a ``methods.base.Method``."""
METHOD_OF_KIND = {"linear": "softcot", "static": "prompt_tuning"}
"""What an older recipe or adapter calls ``projection.kind``."""
TASKS = {
    "gsm8k": "softcot_ds.tasks.gsm8k:GSM8K",
    "asdiv_aug": "softcot_ds.tasks.asdiv_aug:ASDivAug",
    "aqua": "softcot_ds.tasks.aqua:AQuA",
    "strategy_qa": "softcot_ds.tasks.strategy_qa:StrategyQA",
    "date_understanding": "softcot_ds.tasks.date_understanding:DateUnderstanding",
    "custom": "softcot_ds.tasks.custom:Custom",
    "word_problems": "softcot_ds.tasks.word_problems:WordProblems",
    "word_choices": "softcot_ds.tasks.word_problems:WordChoices",
    "word_claims": "softcot_ds.tasks.word_problems:WordClaims",
}
"""``task.name``: a ``tasks.base.Task``. Its wording is the file beside its module, of the same name: NAME.yaml."""
STRATEGIES = {
    "single": "softcot_ds.evaluation.strategies:single",
    "self_consistency": "softcot_ds.evaluation.strategies:single",
    "tree": "softcot_ds.evaluation.tree:tree",
    "graph": "softcot_ds.evaluation.graph:graph",
}
"""``evaluation.strategy``: a function like ``strategies.single``."""


def one_of(choices: dict[str, str]) -> Callable[[str], str]:
    """A validator of names. Any other is a mistake as of a ``Literal``, with what would be right."""

    def check(name: str) -> str:
        if name not in choices:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, choices))})
        return name

    return check


def chosen(choices: dict[str, str], name: str) -> Any:
    """The class or function of a name.

    Raises:
        SoftCoTError: the name's line leads nowhere.
    """
    entry = choices[name]
    module, _, attribute = entry.partition(":")
    if not attribute:
        raise _leads_nowhere(name, f"{entry!r} is not MODULE:NAME")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        raise _leads_nowhere(name, f"no module {error.name!r}") from error
    except AttributeError as error:
        if error.name != attribute:
            raise
        raise _leads_nowhere(name, f"no {attribute!r} in the module {module}") from error


def _leads_nowhere(name: str, why: str) -> SoftCoTError:
    return SoftCoTError(f"choices.py: {why}; mend the line of {name!r}")
