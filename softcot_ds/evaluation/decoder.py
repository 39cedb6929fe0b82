"""What the base, or the assistant, writes after prompts."""

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedModel

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.jobs import Job, Thoughts, Worker
from softcot_ds.models.decoding import Output, Sampling, decode, portions, try_decoding
from softcot_ds.models.drafting import Drafter
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.server import Server


class Decoder:
    """Decodes prompts as jobs of a worker, whose batches are portions here."""

    def __init__(self, worker: Worker, stop_ids: list[int], context: int, drafter: Drafter | None = None) -> None:
        """
        Args:
            context: the longest sequence that the model takes, tokens.
            drafter: for the model, on a rank that has something to decode.
        """
        self.worker = worker
        self._drafter = drafter
        self._stop_ids = stop_ids
        self._context = context
        self._noted: set[str] = set()

    def job(
        self,
        name: str,
        prompts: Sequence[BasePrompt],
        thoughts: Thoughts | None,
        sampling: Sampling,
        draw: int = 0,
    ) -> Job[Output]:
        """What is to be decoded; see ``Worker.job``.

        Args:
            draw: tells rounds apart that are sampled from the same prompts: each has random numbers of its own.

        Raises:
            SoftCoTError: a prompt fills the model's context.
        """
        self._check_room(name, prompts, thoughts, sampling.max_new_tokens)
        seed = self.worker.recipe.seed
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
        if draw:  # the first keeps the key that it had when there was no other
            drawn["draw"] = draw

        size = self.worker.recipe.evaluation.batch_size

        def work(
            model: PreTrainedModel | Server, table: CompactTable | None, portion: list[int], draws: list[int]
        ) -> list[list[Output]]:
            given = None if thoughts is None else thoughts(portion)
            seeds = [seed_of(seed, index, draw) for index in portion for draw in draws]
            asked, count = [prompts[index] for index in portion], len(draws)
            if isinstance(model, Server):
                outputs = model.decode(asked, given, self._stop_ids, sampling, size, seeds, count)
            else:
                outputs = decode(
                    model, asked, given, self._stop_ids, sampling, table, size, seeds, count, self._drafter
                )
            return [outputs[number::count] for number in range(count)]

        settings = {
            "stop_ids": self._stop_ids,
            "max_new_tokens": sampling.max_new_tokens,
            "sampling": drawn if sampling.temperature else "greedy",
            "portions": len(portions([0] * len(prompts), size)),
        }
        if self._drafter:  # they decide which outputs are sampled, and what is read together: the rounding
            settings["draft"] = self._drafter.identity
        shown = f"{name} (draw {draw + 1})" if draw else name
        return self.worker.job(
            shown,
            prompts,
            thoughts,
            settings,
            work,
            lambda output: Output(**output),
            cut=portions,
            draw=draw,
            prepare=self._prepare,
        )

    def _prepare(self, model: PreTrainedModel) -> None:
        """What is no part of the time that outputs take."""
        try_decoding(model)
        if self._drafter:
            try_decoding(self._drafter.model)

    def _check_room(
        self, name: str, prompts: Sequence[BasePrompt], thoughts: Thoughts | None, max_new_tokens: int
    ) -> None:
        longest = max(len(prompt.prefix_ids) + len(prompt.suffix_ids) for prompt in prompts)
        longest += thoughts.count if thoughts is not None else 0
        room = self._context - longest
        if room < 1:
            raise SoftCoTError(
                f"{name}: the longest prompt has {longest} tokens, which leaves no room for an answer in the "
                f"{self._context} that {self.worker.model_config.model} takes; leave long problems out with "
                "task.max_tokens"
            )
        if room < max_new_tokens and name not in self._noted:
            self._noted.add(name)
            say(f"{name}: the longest prompt leaves room for {room} tokens; its output is cut there")


def seed_of(seed: int, index: int, draw: int = 0) -> int:
    """A seed of 64 bits for a problem: the same on any rank, another for every problem and draw."""
    text = f"{seed}/{index}/{draw}" if draw else f"{seed}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
