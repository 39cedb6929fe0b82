"""Where problems come from, what the base is trained to write, how its answers are graded.

base.py           what a task is
answers.py        how an answer is found in a text
numerals.py       reading numbers in the notations of text
records.py        records of a data set, from a file or from the hub
gsm8k.py          grade-school mathematics
word_problems.py  the generated problems of the embedded pair
"""

from softcot_ds.choices import TASKS, chosen
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.base import Problem, Task

__all__ = ["Problem", "Task", "make_task"]


def make_task(config: TaskConfig) -> Task:
    """The task that a recipe names."""
    return chosen(TASKS, config.name)(config)
