"""Answers read from the probabilities of the options, without decoding: ``evaluation.read=options``.

After the prompt stands what the base is trained to write before an answer, with no reasoning: "The answer is" and so
on. The option that is likeliest to follow is the answer, by the sum over its tokens; one pass for each option.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import BasePrompts
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.jobs import Worker
from softcot_ds.evaluation.losses import TextLosses, longest_prompts
from softcot_ds.evaluation.spent import Spent, tokens_read
from softcot_ds.evaluation.strategies import Answer, Reply
from softcot_ds.evaluation_config import Condition
from softcot_ds.experiment import Experiment
from softcot_ds.files import content_digest

Written = dict[str, str]
"""By option of one problem, in its canonical form, the text in which it is the answer.

In an order of the problem's own: of equally likely ones, of which there are many where logits have 16 bits, the first
is the answer, and that shall not be A, or yes, more often than another.
"""


def written_options(experiment: Experiment, examples: Sequence[Example]) -> list[Written]:
    """What is to be read, of each problem. Raises SoftCoTError when one has no options."""
    task = experiment.task
    found = []
    for problem in (example.problem for example in examples):
        options = task.kind.options(problem.options)
        if not options:
            raise SoftCoTError(
                f"evaluation.read=options: the task {task.config.name} has problems without options to choose from, "
                f"such as {problem.question[:60]!r}; set evaluation.read=text"
            )
        found.append(
            {
                option: task.target(replace(problem, reasoning="", answer=option))
                for option in sorted(options, key=lambda option: content_digest([problem.id, option]))
            }
        )
    return found


class Options(TextLosses):
    """How likely each option of each problem is."""

    def __init__(
        self,
        worker: Worker,
        posed: Mapping[Condition, Posed],
        written: Sequence[Written],
        base_prompts: BasePrompts,
        context: int,
    ) -> None:
        """
        Args:
            written: of each problem.
            context: the longest sequence that the base takes, tokens.

        Raises:
            SoftCoTError: options do not fit the context, or are the same to the base; or see ``Worker.job``.
        """
        self._written = written
        texts: list[tuple[int, list[int]]] = []
        for index, options in enumerate(written):
            ids = without_common_end([base_prompts.target_ids(text) for text in options.values()])
            if len(set(map(tuple, ids))) < len(ids):
                raise SoftCoTError(
                    f"the tokenizer of {worker.model_config.model} does not tell the options "
                    f"{', '.join(sorted(options))} apart; set evaluation.read=text"
                )
            texts += [(index, text) for text in ids]
        lengths = longest_prompts(posed)
        longest = max(lengths[index] + len(text) for index, text in texts)
        if longest > context:
            raise SoftCoTError(
                f"the longest prompt with an option has {longest} tokens, and {worker.model_config.model} takes "
                f"{context}; leave long problems out with task.max_tokens"
            )
        super().__init__(worker, posed, texts, "options")

    def spent(self, condition: Condition) -> Spent:
        """What the answers cost: each option is read behind its prompt, in every chain."""
        problems, jobs = self._posed[condition], self._jobs[condition]
        prompts = [problems.prompts[index] for index, _ in self._texts]
        read = tokens_read(prompts, problems.num_thoughts, [range(len(prompts))])
        read += sum(len(text) for _, text in self._texts)
        return Spent(len(jobs) * read, 0, sum(job.seconds for job in jobs))

    def run(self) -> dict[Condition, list[Answer]]:
        """The likeliest option of each problem (of equal ones the first). All ranks call it together."""
        found = {}
        for name, losses in self.of_texts().items():
            rest = iter(losses)
            found[name] = [_likeliest({option: next(rest) for option in one}, one) for one in self._written]
        return found


def _likeliest(losses: Mapping[str, float], written: Written) -> Answer:
    best = min(losses, key=losses.__getitem__)
    # What stands before the options is the same, so its loss cancels out.
    weights = {option: math.exp(losses[best] - loss) for option, loss in losses.items()}
    shares = {option: weights[option] / sum(weights.values()) for option in sorted(weights)}
    return Answer(best, Reply(written[best], cut=False), {"options": shares})


def without_common_end(texts: Sequence[list[int]]) -> list[list[int]]:
    """Texts of tokens without what all of them end in, such as a bracket and the end of the turn."""
    shortest = min(map(len, texts))
    same = 0
    while same < shortest - 1 and len({text[-1 - same] for text in texts}) == 1:
        same += 1
    return [text[: len(text) - same] for text in texts]
