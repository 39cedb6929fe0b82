"""The loss of the reference solutions under each condition, without decoding: one pass over prompt and solution.

A solution is what the task makes for training, with the token that ends it, and is the same tokens under every
condition. Its loss tells whether thoughts carry something also where accuracy is at its floor or at its ceiling.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from softcot_ds.data.examples import Example
from softcot_ds.distributed import say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.jobs import Job, Worker
from softcot_ds.files import content_digest
from softcot_ds.methods.trial import load_scorer
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.scoring import Scorer
from softcot_ds.models.shared_prefix import SharedPrefix
from softcot_ds.recipe import Condition


class Losses:
    """The losses that an evaluation asks for, a job for each condition."""

    def __init__(
        self, worker: Worker, posed: Mapping[Condition, Posed], examples: Sequence[Example], context: int
    ) -> None:
        """What is on disk already is found; no model is loaded for it.

        Args:
            context: the longest sequence that the base takes, tokens.

        Raises:
            SoftCoTError: no prompt with its solution fits the context, or see ``Worker.job``.
        """
        self._worker = worker
        self._posed = posed
        self._solutions = [example.target_ids for example in examples]
        self._chosen = [index for index in range(len(examples)) if self._longest(index) <= context]
        if not self._chosen:
            raise SoftCoTError(
                f"no prompt with its solution fits the {context} tokens that {worker.model_config.model} takes: there "
                "are no losses to compare; set evaluation.loss=false"
            )
        if left_out := len(examples) - len(self._chosen):
            say(
                f"losses are compared on {len(self._chosen)} problems: the solutions of {left_out} do not fit the "
                f"{context} tokens of the base under every condition"
            )
        self._scorer: Scorer | None = None
        self._shared: tuple[str, SharedPrefix] | None = None
        self._jobs = {name: self._job(problems) for name, problems in posed.items()}

    @property
    def need_states(self) -> bool:
        """Whether thoughts have to be made of the assistant's states for them."""
        given = {name: problems.thoughts for name, problems in self._posed.items()}
        return any(job.todo and given[name] and given[name].need_states for name, job in self._jobs.items())

    def key(self, condition: Condition) -> str:
        """Of all that decides the losses."""
        return self._jobs[condition].key

    def run(self) -> dict[Condition, list[float | None]]:
        """The loss of each problem's solution, nats; None for those that do not fit. All ranks call it together."""
        found = {name: dict(zip(self._chosen, self._worker.run(job), strict=True)) for name, job in self._jobs.items()}
        if self._scorer is not None:
            self._scorer.read_whole_rows()  # the base decodes with its own layers
        self._scorer = self._shared = None
        return {name: [losses.get(index) for index in range(len(self._solutions))] for name, losses in found.items()}

    def _longest(self, index: int) -> int:
        """Tokens of a problem with its solution, under the condition that makes it longest."""
        prompts = [(problems.prompts[index], problems.thoughts is not None) for problems in self._posed.values()]
        count = self._worker.recipe.thoughts.count
        given = [len(prompt.prefix_ids) + has_room * count + len(prompt.suffix_ids) for prompt, has_room in prompts]
        return max(given) + len(self._solutions[index])

    def _job(self, problems: Posed) -> Job[float]:
        name = f"{problems.name} loss"
        prompts = [problems.prompts[index] for index in self._chosen]
        solutions = [self._solutions[index] for index in self._chosen]

        def work(model: PreTrainedModel, table: CompactTable | None, batch: list[int]) -> list[float]:
            if self._scorer is None:
                self._scorer = load_scorer(model, self._worker.model_config.model)
            if self._shared is None or self._shared[0] != name:
                self._shared = name, self._scorer.read_shared(prompts)
            thoughts = problems.thoughts and problems.thoughts([self._chosen[index] for index in batch])
            asked, wanted = [prompts[index] for index in batch], [solutions[index] for index in batch]
            return self._scorer.losses(asked, thoughts, wanted, self._shared[1], table)

        settings = {"solutions": content_digest(solutions)}
        return self._worker.job(name, prompts, problems.thoughts, settings, work, float, solutions)
