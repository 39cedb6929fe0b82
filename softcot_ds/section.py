"""What a section of the recipe is."""

from pydantic import BaseModel, ConfigDict

FREE = "may change between the attempts of one run"
"""Marks a setting that decides where and how fast, not what is computed: a resumed run may have another value of it.
What it names, such as a file, is compared by content where that matters."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, fields have no aliases.

    A field that must fit another of its section is checked by a validator of its own, after the other. Unlike one for
    the whole section, it also runs where something else is wrong: all mistakes are reported together. YAML has types:
    true is no number, and "12" and 12.0 are no integers.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # softcot-ds schema: an editor shows them
    )
