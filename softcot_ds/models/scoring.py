"""How likely a model finds given texts after prompts with thoughts: their losses, without gradient.

Each token of a text is predicted from all before it, the text's own among them (teacher forcing). Where the model fits
the fast step, the tokens that all prompts begin with are read once and the head runs on the predicting positions alone;
elsewhere it is one pass over whole rows, as in the full step.

B rows, I tokens that all of them begin with, S tokens of the longest row without these, N = I + S, T thoughts, K tokens
of all texts, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from softcot_ds.data.batches import pad
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import max_over_ranks
from softcot_ds.models.embedding import CompactTable, device_of
from softcot_ds.models.frozen_prefix import FrozenPrefix, why_unsupported
from softcot_ds.models.loss import token_losses
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.places import at, places_of
from softcot_ds.models.reading import PADDING
from softcot_ds.models.shared_prefix import NO_PREFIX, SharedPrefix, common_prefix

_LOGITS_BYTES = 2**30
"""Logits of one pass, about."""


@dataclass(frozen=True)
class Score:
    """Of a text after its prompt."""

    loss: float
    """Nats: the sum over its tokens, in float64."""
    is_likeliest: bool
    """Whether each of its tokens is the likeliest one: it is what greedy decoding begins with."""


class Scorer:
    """A model that is asked for the losses of texts. Loaded by ``trial.load_scorer``, which tries it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._prefixed = FrozenPrefix(model) if why_unsupported(model) is None else None

    @property
    def is_fast(self) -> bool:
        """Whether it reads shared tokens once, and runs the head on the predicting positions alone."""
        return self._prefixed is not None

    def read_whole_rows(self) -> None:
        """Do without what makes it fast from now on."""
        if self._prefixed is not None:
            self._prefixed.remove()
        self._prefixed = None

    @torch.no_grad()
    def read_shared(self, prompts: Sequence[BasePrompt]) -> SharedPrefix:
        """Run what all prompts begin with: their first tokens but the last, which predicts what comes next.

        All ranks call it together where the model is partitioned.
        """
        ids = common_prefix([prompt.prefix_ids[:-1] for prompt in prompts])
        if self._prefixed is None or not ids:
            return NO_PREFIX
        return self._prefixed.read_shared(torch.tensor(ids, device=device_of(self.model.get_input_embeddings())))

    def scores(
        self,
        prompts: Sequence[BasePrompt],
        thoughts_BTD: torch.Tensor | None,
        texts: Sequence[list[int]],
        shared: SharedPrefix = NO_PREFIX,
        table: CompactTable | None = None,
    ) -> list[Score]:
        """Each text's, after its prompt.

        All ranks call it together where the model is partitioned.

        Args:
            prompts: B prompts ``prefix ; thoughts ; suffix``; not empty.
            thoughts_BTD: in any floating dtype, or None where the prompts have no room for any.
            texts: B rows of tokens.
            shared: of ``read_shared``, of these prompts and perhaps others.
            table: with all tokens of prompts and texts and PADDING, to embed them by; None to ask the model's own.
        """
        groups = self._groups(prompts, texts)
        scores: dict[int, Score] = {}
        for number in range(max_over_ranks(len(groups)) if needs_all_ranks(self.model) else len(groups)):
            # A rank without a group of its own runs along: each forward pass needs all ranks.
            group = groups[min(number, len(groups) - 1)]
            wanted = [texts[index] for index in group]
            given = None if thoughts_BTD is None else thoughts_BTD[group]
            logits_KV = self.logits([prompts[index] for index in group], given, wanted, shared, table)
            targets_K = torch.tensor([token for text in wanted for token in text], device=logits_KV.device)
            lengths = [len(text) for text in wanted]
            losses = token_losses(logits_KV, targets_K).split(lengths)
            likeliest = (logits_KV.argmax(dim=-1) == targets_K).split(lengths)
            for index, losses_K, likeliest_K in zip(group, losses, likeliest, strict=True):
                scores[index] = Score(losses_K.sum().item(), bool(likeliest_K.all()))
        return [scores[index] for index in range(len(prompts))]

    def _groups(self, prompts: Sequence[BasePrompt], texts: Sequence[list[int]]) -> list[list[int]]:
        """Indices of rows that go through the model together, so that their logits do not fill the memory: as many
        prompts may be in a batch as are decoded together, of which each has the logits of one token at a time."""
        most = _LOGITS_BYTES // (self.model.config.get_text_config().vocab_size * self.model.dtype.itemsize)
        groups: list[list[int]] = [[]]
        rows = 0
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            own = len(text) if self.is_fast else len(prompt.prefix_ids) + len(prompt.suffix_ids) + len(text)
            if groups[-1] and rows + own > most:
                groups.append([])
                rows = 0
            groups[-1].append(index)
            rows += own
        return groups

    @torch.no_grad()
    def logits(
        self,
        prompts: Sequence[BasePrompt],
        thoughts_BTD: torch.Tensor | None,
        texts: Sequence[list[int]],
        shared: SharedPrefix,
        table: CompactTable | None = None,
    ) -> torch.Tensor:
        """(K, V) logits of the tokens of ``texts``, one after the other; arguments as of ``scores``."""
        count = 0 if thoughts_BTD is None else thoughts_BTD.shape[1]
        start_B = [len(prompt.prefix_ids) - shared.length for prompt in prompts]
        rows = [
            # A text's last token predicts nothing.
            [*prompt.prefix_ids[shared.length :], *[PADDING] * count, *prompt.suffix_ids, *text[:-1]]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ids_BS, mask_BS = pad(rows, PADDING, side="right")
        width = ids_BS.shape[1]
        at_K = [
            number * width + place
            for number, (row, text) in enumerate(zip(rows, texts, strict=True))
            for place in range(len(row) - len(text), len(row))
        ]
        embedding = self.model.get_input_embeddings()
        device = device_of(embedding)
        mask_BS, at_K = mask_BS.to(device), torch.tensor(at_K, device=device)
        embeds_BSD = embedding(ids_BS.to(device)) if table is None else table(table.number(ids_BS).to(device))
        if thoughts_BTD is not None:
            slots_BT = torch.tensor(start_B, device=device)[:, None] + torch.arange(count, device=device)
            embeds_BSD[torch.arange(len(rows), device=device)[:, None], slots_BT] = thoughts_BTD.to(embeds_BSD)
        with at(self.model, places_of(start_B, count, width)):
            if self._prefixed is None:
                # Padding stands behind the end of each row, where no causal model sees it: nothing is said of it.
                return self.model(inputs_embeds=embeds_BSD, use_cache=False).logits.flatten(0, 1)[at_K]
            mask_BN = torch.cat([mask_BS.new_ones(len(rows), shared.length), mask_BS], dim=1)
            positions_BS = (mask_BN.cumsum(dim=1) - 1)[:, shared.length :]
            given = shared if shared.length else None
            return self._prefixed.logits(embeds_BSD, mask_BN.long(), positions_BS, 0, at_K, given)
