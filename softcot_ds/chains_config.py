"""The recipe's section for several sets of thoughts of one question, the chains of SoftCoT++."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from softcot_ds.section import Section
from softcot_ds.values import Count


class ChainsConfig(Section):
    """method=softcot_pp: what stands at the assistant's placeholders in each chain, and what keeps the chains apart."""

    count: Count = 10
    """K, the sets of thoughts of a question. Each is read by the base alone: the step takes about K suffixes, and
    evaluation K answers, of which the majority counts."""
    initial: Literal["tokens", "random", "file", "learned"] = "random"
    """The assistant's input at all placeholders of a chain. tokens: the embedding of a token. random: drawn from
    chains.seed, as long as those of tokens. file: the ``embedding`` of projection.init_from."""
    tokens: list[str] = Field([])
    """initial=tokens: one for each chain, each exactly one token of the assistant. The paper takes special ones that
    say nothing, of Llama 3 ``<|reserved_special_token_3|>`` and the nine after it."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """initial=random: runs that differ in the recipe's seed alone share a cache."""
    contrastive: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of the loss that keeps the thoughts of a question's chains apart; 0 leaves it out."""

    @field_validator("initial")
    @classmethod
    def _states_are_constants(cls, value: str) -> str:
        if value == "learned":
            raise ValueError(
                "learned is not implemented: in every step the assistant would run forward and backward for each "
                "chain, about three times the work of its cache, and no cache could be read; set it to tokens or random"
            )
        return value

    @field_validator("tokens")
    @classmethod
    def _one_for_each_chain(cls, value: list[str], info: ValidationInfo) -> list[str]:
        initial, count = info.data.get("initial"), info.data.get("count")
        if initial == "tokens" and count is not None and len(value) != count:
            raise ValueError(f"{len(value)} tokens for chains.count={count}; name one for each chain")
        if initial in ("random", "file") and value:
            raise ValueError(f"named, and chains.initial is {initial}; leave them out, or set chains.initial=tokens")
        if repeated := sorted({text for text in value if value.count(text) > 1}):
            raise ValueError(f"{', '.join(map(repr, repeated))} twice: two chains would have the same thoughts")
        return value
