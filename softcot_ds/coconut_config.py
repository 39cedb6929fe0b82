"""The recipe's section for Coconut: how many latents, and the stages of its curriculum."""

from pydantic import Field

from softcot_ds.section import Section
from softcot_ds.values import CountOrZero


class CoconutConfig(Section):
    """Steps of a solution that are thought instead of written; see methods/coconut.py."""

    latents_per_step: CountOrZero = 2
    """c, latents for each step that is left out. 0: the same curriculum without any, a control."""
    stage_steps: list[CountOrZero] = Field(min_length=2)
    """Optimizer steps of stage 0, in which whole solutions are written, of stage 1, in which the first step is left
    out, and so on; 0 leaves a stage out. Then, to the end of the training, all steps are left out, with the latents of
    the last of these."""

    @property
    def most_latents(self) -> int:
        """Of the last stage, and of evaluation."""
        return (len(self.stage_steps) - 1) * self.latents_per_step
