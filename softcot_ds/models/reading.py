"""Prompts as a model reads them: padded on the left, with thoughts where they belong.

The model is given tokens alone, with any token where the thoughts go, and what its embedding module makes of it is
replaced by the thought. So each family reads tokens in its own way (scales, positions, several kinds of cache). Nor
need the module make anything of a prompt whose tokens are in a table: it is gathered for generated tokens alone.

B batch, I tokens that all prompts begin with where these have been read before, S of the longest prompt behind them,
T thoughts, D base width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from transformers import PreTrainedModel

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.models.embedding import CompactTable, whole_embedding
from softcot_ds.models.partition import is_on_its_way
from softcot_ds.models.places import places_of
from softcot_ds.models.shared_prefix import common_prefix

PADDING = 0
"""A token that every model has; it stands for thoughts and padding."""

LookUp = Callable[[torch.Tensor], torch.Tensor]
"""Embeddings of tokens, by the model's own module."""


@dataclass(frozen=True)
class Reading:
    """Prompts that are read together."""

    ids_BS: torch.Tensor
    """PADDING where thoughts and padding stand."""
    mask_BN: torch.Tensor
    """1 but where padding stands, N = I + S: each row is padded in front of the tokens that all begin with."""
    starts_B: torch.Tensor
    """Where in S the thoughts begin. Like the others int64, on the CPU."""
    thoughts_BTD: torch.Tensor | None
    """In any floating dtype, on any device."""
    known_BSD: torch.Tensor | None
    """The tokens' embeddings, where they are known without the model's own module."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[BasePrompt],
        thoughts_BTD: torch.Tensor | None,
        table: CompactTable | None = None,
        shared: int = 0,
    ) -> Self:
        """
        Args:
            shared: I; every prompt has more tokens than these.

        Raises:
            SoftCoTError: the table lacks a token.
        """
        num_thoughts = 0 if thoughts_BTD is None else thoughts_BTD.shape[1]
        rows = [[*prompt.prefix_ids, *[PADDING] * num_thoughts, *prompt.suffix_ids] for prompt in prompts]
        longest = max(map(len, rows))
        skipped_B = torch.tensor([longest - len(row) for row in rows])
        ids_BS = torch.tensor([[PADDING] * (longest - len(row)) + row for row in rows])[:, shared:]
        mask_BN = (torch.arange(longest) >= skipped_B[:, None]).long()
        starts_B = skipped_B + torch.tensor([len(prompt.prefix_ids) for prompt in prompts]) - shared
        known_BSD = None if table is None else table(table.number(ids_BS).to(table.rows_KD.device))
        return cls(ids_BS, mask_BN, starts_B, thoughts_BTD, known_BSD)

    @property
    def places_BS(self) -> torch.Tensor:
        """int64, see ``places_of``."""
        count = 0 if self.thoughts_BTD is None else self.thoughts_BTD.shape[1]
        return places_of(self.starts_B, count, self.ids_BS.shape[1])

    def embed(self, ids_BN: torch.Tensor, look_up: LookUp) -> torch.Tensor:
        """(B, N, D) embeddings of the prompts, and of what else comes behind them in ``ids_BN``."""
        longest = self.ids_BS.shape[1]
        if self.known_BSD is None:
            embeds_BND = look_up(ids_BN).clone()
        else:
            written = [look_up(ids_BN[:, longest:])] if ids_BN.shape[1] > longest else []
            embeds_BND = torch.cat([self.known_BSD, *written], dim=1)
        if self.thoughts_BTD is not None:
            slots_BT = self.starts_B[:, None] + torch.arange(self.thoughts_BTD.shape[1])
            embeds_BND[torch.arange(len(slots_BT))[:, None], slots_BT] = self.thoughts_BTD.to(embeds_BND)
        return embeds_BND

    def by_generate(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Has the embedding module give the prompts' embeddings out, whenever ``generate`` reads them whole."""
        calls = 0

        def embed(ids_BN: torch.Tensor, look_up: LookUp) -> torch.Tensor:
            nonlocal calls
            calls += 1
            length = ids_BN.shape[1]
            # Not in the first pass alone: some families keep no cache, or begin it anew when it reaches a length.
            if length < self.ids_BS.shape[1] or (length == 1 and calls > 1):
                return look_up(ids_BN)
            return self.embed(ids_BN, look_up)

        return embedding_by(model, embed)


def read_once(prompts: Sequence[BasePrompt], with_thoughts: bool) -> list[int]:
    """What all prompts begin with, to be read once: I tokens. None where there is one prompt, or none."""
    if len(prompts) < 2:
        return []
    # Each has a token or a thought behind them, which tells what comes next.
    return common_prefix([p.prefix_ids if with_thoughts or p.suffix_ids else p.prefix_ids[:-1] for p in prompts])


@dataclass(frozen=True)
class Prompts:
    """What is to be continued: prompts by their numbers."""

    prompts: Sequence[BasePrompt]
    thoughts_BTD: torch.Tensor | None
    table: CompactTable | None = None
    """Of all their tokens and PADDING; None to ask the model's own module."""

    @cached_property
    def shared(self) -> list[int]:
        """See ``read_once``."""
        return read_once(self.prompts, self.thoughts_BTD is not None)

    def read(self, numbers: Sequence[int], shared: int = 0) -> Reading:
        """Those of these numbers, without the first tokens that were read before."""
        thoughts_BTD = None if self.thoughts_BTD is None else self.thoughts_BTD[list(numbers)]
        return Reading.of([self.prompts[number] for number in numbers], thoughts_BTD, self.table, shared)

    def read_tokens(self, ids: list[int]) -> Reading:
        """Tokens alone, of those in the table."""
        return Reading.of([BasePrompt(ids, [])], None, self.table)


@contextmanager
def embedding_by(model: PreTrainedModel, embed: Callable[[torch.Tensor, LookUp], torch.Tensor]) -> Iterator[None]:
    """Has the embedding module give out what ``embed`` makes of tokens; it is given a way to ask the module itself.

    Where that is partitioned, all ranks ask it in the same passes.
    """
    embedding = model.get_input_embeddings()

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        if is_on_its_way(*embedding.parameters()):  # under limits of a file, far higher than the model needs
            return embedding._call_impl(ids)
        with whole_embedding(embedding) as whole:
            return whole(ids)

    # In the place of a call with its hooks, by which a partitioned module is gathered. In every pass: DeepSpeed would
    # find that the prompt's has another order than those that follow.
    embedding._compiled_call_impl = lambda ids: embed(ids, look_up)
    try:
        yield
    finally:
        embedding._compiled_call_impl = None
