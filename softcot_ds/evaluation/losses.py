"""The losses of given texts under each condition, without decoding: one pass over prompt and text.

The reference solutions are what the task makes for training, with the token that ends them, and are the same tokens
under every condition. Their loss tells whether thoughts carry something also where accuracy is at its floor or at its
ceiling.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from transformers import PreTrainedModel

from softcot_ds.data.examples import Example
from softcot_ds.distributed import say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.jobs import Job, Worker
from softcot_ds.evaluation_config import Condition
from softcot_ds.files import content_digest
from softcot_ds.methods.trial import load_scorer
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.scoring import Scorer
from softcot_ds.models.shared_prefix import SharedPrefix


class TextLosses:
    """How likely the base finds given texts after the problems' prompts, a job for each condition."""

    def __init__(
        self, worker: Worker, posed: Mapping[Condition, Posed], texts: Sequence[tuple[int, list[int]]], what: str
    ) -> None:
        """What is on disk already is found; no model is loaded for it.

        Args:
            texts: the index of a problem, and tokens; several of a problem, or none.
            what: the texts are, for messages.

        Raises:
            SoftCoTError: see ``Worker.job``.
        """
        self._worker = worker
        self._posed = posed
        self._texts = texts
        self._scorer: Scorer | None = None
        self._shared: tuple[str, SharedPrefix] | None = None
        self._jobs = {name: [self._job(chain, what) for chain in problems.chains] for name, problems in posed.items()}

    @property
    def need_states(self) -> bool:
        """Whether thoughts have to be made of the assistant's states for them."""
        given = {name: problems.thoughts for name, problems in self._posed.items()}
        return any(
            given[name] and given[name].need_states and any(job.todo for job in jobs)
            for name, jobs in self._jobs.items()
        )

    def key(self, condition: Condition) -> str:
        """Of all that decides the losses."""
        return "+".join(job.key for job in self._jobs[condition])

    def of_texts(self) -> dict[Condition, list[float]]:
        """The loss of each text, nats: the sum over its tokens, and of several chains their mean. All ranks call it
        together.

        Raises:
            SoftCoTError: on every rank, when one is not finite: no mean could be taken of it, and no JSON holds it.
        """
        found, asked = {}, self._worker
        for name, jobs in self._jobs.items():
            if (worker := self._asked_of(self._posed[name])) is not asked:
                self._let_go()  # another model takes the place of what it reads with
            found[name] = [fmean(of_chains) for of_chains in zip(*map(worker.run, jobs), strict=True)]
            asked = worker
        for name, losses in found.items():
            for (index, _), loss in zip(self._texts, losses, strict=True):
                if not math.isfinite(loss):
                    model = self._worker.model_config
                    raise SoftCoTError(
                        f"{self._jobs[name][0].name} of problem {index + 1}: {model.model} in {model.dtype} gives "
                        f"{loss}. Set base.dtype=float32; if it stays so, weights of the base or of the adapter are "
                        "damaged"
                    )
        self._let_go()
        return found

    def _let_go(self) -> None:
        if self._scorer is not None:
            self._scorer.read_whole_rows()  # the base decodes with its own layers
        self._scorer = self._shared = None

    def _asked_of(self, problems: Posed) -> Worker:
        return problems.asked_of or self._worker

    def _job(self, problems: Posed, what: str) -> Job[float]:
        name = f"{problems.name} {what}"
        prompts = [problems.prompts[index] for index, _ in self._texts]
        texts = [text for _, text in self._texts]

        def work(
            model: PreTrainedModel, table: CompactTable | None, batch: list[int], _draws: list[int]
        ) -> list[list[float]]:
            if self._scorer is None:
                self._scorer = load_scorer(model, self._worker.model_config.model)
            if self._shared is None or self._shared[0] != name:
                self._shared = name, self._scorer.read_shared(prompts)
            thoughts = problems.thoughts and problems.thoughts([self._texts[row][0] for row in batch])
            asked, wanted = [prompts[row] for row in batch], [texts[row] for row in batch]
            scores = self._scorer.scores(asked, thoughts, wanted, self._shared[1], table)
            return [[score.loss for score in scores]]

        settings = {"texts": content_digest(texts)}
        return self._asked_of(problems).job(name, prompts, problems.thoughts, settings, work, float, texts)


def longest_prompts(posed: Mapping[Condition, Posed]) -> list[int]:
    """Tokens of each problem's prompt under the condition that makes it longest, its thoughts among them."""
    of_conditions = [
        [len(prompt.prefix_ids) + problems.num_thoughts + len(prompt.suffix_ids) for prompt in problems.prompts]
        for problems in posed.values()
    ]
    return [max(lengths) for lengths in zip(*of_conditions, strict=True)]


class Losses(TextLosses):
    """The losses of the reference solutions."""

    def __init__(
        self, worker: Worker, posed: Mapping[Condition, Posed], examples: Sequence[Example], context: int
    ) -> None:
        """
        Args:
            context: the longest sequence that the base takes, tokens.

        Raises:
            SoftCoTError: no prompt with its solution fits the context, or see ``Worker.job``.
        """
        lengths = longest_prompts(posed)
        fitting = [
            (index, example.target_ids)
            for index, example in enumerate(examples)
            if lengths[index] + len(example.target_ids) <= context
        ]
        if not fitting:
            raise SoftCoTError(
                f"no prompt with its solution fits the {context} tokens that {worker.model_config.model} takes: there "
                "are no losses to compare; set evaluation.loss=false"
            )
        if left_out := len(examples) - len(fitting):
            say(
                f"losses are compared on {len(fitting)} problems: the solutions of {left_out} do not fit the "
                f"{context} tokens of the base under every condition"
            )
        self._num_problems = len(examples)
        super().__init__(worker, posed, fitting, "loss")

    def run(self) -> dict[Condition, list[float | None]]:
        """The loss of each problem's solution, nats; None for those that do not fit. All ranks call it together."""
        indices = [index for index, _ in self._texts]
        found = {name: dict(zip(indices, losses, strict=True)) for name, losses in self.of_texts().items()}
        return {name: [losses.get(index) for index in range(self._num_problems)] for name, losses in found.items()}
