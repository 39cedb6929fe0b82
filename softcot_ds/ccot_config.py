"""The recipe's section for Compressed CoT: how short contemplation is, and what is trained for it."""

from pydantic import Field

from softcot_ds.lora_config import LoraConfig
from softcot_ds.section import Section
from softcot_ds.values import Count, CountOrZero


class CompressedCoTConfig(Section):
    """Few states of the base in the place of a whole chain of thought; see methods/compressed_cot.py."""

    ratio: float = Field(gt=0, le=1)
    """A chain of m tokens becomes ceil(ratio m) contemplation tokens, of which there are one less than thoughts.count
    at most."""
    ccot_steps: CountOrZero
    """Optimizer steps in which contemplation is trained; then, to the end of the training, answers are. 0: answers
    alone, a control."""
    layer: Count | None = None
    """Whose states are the inputs of the next contemplation token, from 1 on. Default: the one in the middle."""
    ccot: LoraConfig = LoraConfig(r=128, alpha=256)
    """What makes contemplation tokens."""
    decode: LoraConfig = LoraConfig(r=64, alpha=128)
    """What answers, beside that."""
    train_upper: bool = True
    """Whether the matrices of ``ccot`` above ``layer`` are trained on with answers."""
