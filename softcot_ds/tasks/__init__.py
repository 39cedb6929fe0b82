"""Where problems come from, what the base is trained to write, how its answers are graded.

base.py           what a task is
kinds.py          kinds of answers, and the rules by which each is found
answers.py        how a number is found in a text
options.py        how the letter of an option is found
yes_no.py         how a yes or no is found
outputs.py        what they share: boxes, what is not meant, where an output ends
numerals.py       reading numbers in the notations of text
records.py        records of a data set, from a file or from the hub

The tasks, each with its wording beside it: gsm8k, asdiv_aug, aqua, strategy_qa, date_understanding; custom, which a
recipe describes; word_problems, word_choices and word_claims, the generated problems of the embedded pair, asked for
the number, as a choice and as a claim (all three in word_problems.py).
"""

from softcot_ds.choices import TASKS, chosen
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig
from softcot_ds.tasks.base import Problem, Task

__all__ = ["Problem", "Task", "make_task"]


def make_task(config: TaskConfig) -> Task:
    """The task that a recipe names. Raises SoftCoTError when it has no such rule as task.metric_rule."""
    task = chosen(TASKS, config.name)(config)
    if config.metric_rule not in task.kind.rules:
        raise SoftCoTError(f"task.metric_rule: the reference has no rule for the answers of {config.name}; set ours")
    return task
