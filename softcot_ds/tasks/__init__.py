"""Tasks: where problems come from, what the base is trained to write, how its answers are graded."""

from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.base import Problem, Task
from softcot_ds.tasks.gsm8k import GSM8K
from softcot_ds.tasks.word_problems import WordProblems

__all__ = ["Problem", "Task", "make_task"]


def make_task(config: TaskConfig) -> Task:
    """The task that a recipe names."""
    return {"gsm8k": GSM8K, "word_problems": WordProblems}[config.name](config)
