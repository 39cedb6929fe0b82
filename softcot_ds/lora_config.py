"""The recipe's section for low-rank matrices beside weights of the base (LoRA)."""

from typing import Annotated

from pydantic import Field

from softcot_ds.section import Section
from softcot_ds.values import Count

Name = Annotated[str, Field(pattern=r"^\w+$")]


class LoraConfig(Section):
    """What is trained of the base where its own weights stay as they are; see methods/lora.py."""

    r: Count = 16
    """Rank of the product of two matrices that is added to a weight."""
    alpha: Count = 32
    """What is added is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a layer's inputs that are left out, in training, of what is added."""
    targets: list[Name] = Field(["q_proj", "v_proj"], min_length=1)
    """Names of the linear layers, in all of the base's layers, beside which there are such matrices."""
