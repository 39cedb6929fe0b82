"""The recipe's section for Coconut: how many latents, and the stages of its curriculum."""

from typing import NamedTuple

from pydantic import Field

from softcot_ds.section import Section
from softcot_ds.values import CountOrZero


class Stage(NamedTuple):
    """Where the curriculum stands."""

    skipped: int | None
    """How many of a solution's first steps are left out; None for all."""
    latents: int
    """n, the same for all problems, however many steps they have: nobody tells the base how many a question takes."""


class CoconutConfig(Section):
    """Steps of a solution that are thought instead of written; see methods/coconut.py."""

    latents_per_step: CountOrZero = 2
    """c, latents for each step that is left out. 0: the same curriculum without any, a control."""
    stage_steps: list[CountOrZero] = Field(min_length=2)
    """Optimizer steps of stage 0, in which whole solutions are written, of stage 1, in which the first step is left
    out, and so on; 0 leaves a stage out. Then, to the end of the training, all steps are left out, with the latents of
    the last of these: where training.steps is no more than their sum, steps are written to the end. What is evaluated
    is the stage that the training has got to."""

    def stage(self, step: int) -> Stage:
        """The stage of an optimizer step, from 1 on. It depends on nothing else: a run that goes on finds it again."""
        last = 0
        for number, steps in enumerate(self.stage_steps):
            last += steps
            if step <= last:
                return Stage(number, number * self.latents_per_step)
        return Stage(None, number * self.latents_per_step)
