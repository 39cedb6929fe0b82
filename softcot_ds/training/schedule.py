"""The learning rate of each step."""

import math

from softcot_ds.recipe import TrainingConfig


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 1); above zero in every step.

    With W warm-up steps of S in all: ``step / W`` of the peak up to step W. Then the schedule, of which step n has done
    ``(n - 1 - W) / (S - W)``: the peak at step W + 1, and min_lr_ratio of it at step S + 1, which is no more taken.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    shape = {"cosine": math.cos(math.pi / 2 * done) ** 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
