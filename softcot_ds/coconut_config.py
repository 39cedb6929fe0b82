"""The recipe's section for Coconut: how many latents, and the stages of its curriculum."""

import random
from itertools import accumulate
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

    uniform_prob: float = Field(default=0.0, ge=0, le=1)
    """With this probability an optimizer step is one of any stage so far, each as likely, so that what was learned is
    not lost. The published code's analysis has 0.3, its other trainings 0."""

    def stage(self, step: int) -> Stage:
        """The stage that an optimizer step, from 1 on, has got to."""
        return self._stage(self._number(step))

    def drawn_stage(self, step: int) -> Stage:
        """The stage that is trained in an optimizer step, that or an earlier one, by ``uniform_prob``. It depends on
        the step alone: a run that goes on finds it again."""
        number, draw = self._number(step), random.Random(step)
        if draw.random() < self.uniform_prob:
            number = draw.choice([*(i for i in range(number) if self.stage_steps[i]), number])
        return self._stage(number)

    def _number(self, step: int) -> int:
        for number, last in enumerate(accumulate(self.stage_steps)):
            if step <= last:
                return number
        return len(self.stage_steps)

    def _stage(self, number: int) -> Stage:
        if number < len(self.stage_steps):
            return Stage(number, number * self.latents_per_step)
        return Stage(None, (number - 1) * self.latents_per_step)
