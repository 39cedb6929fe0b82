"""Drafts: the assistant, which is there anyway, writes a few tokens ahead, and the base reads them all in one pass.

What comes out is what the base writes by itself (see ``sampling.Chooser.accept``), whatever the drafts are; they decide
how many passes it takes. So the assistant is given a prompt in words, the base's own without its thoughts. Its rows are
those of the base, in the same order, and it has its own keys and values of them.

R rows, N drafts of each, V vocabulary of the base, W tokens that both models know.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import device as own_device
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.backbone import context_length, keeps_keys_and_values, load_frozen, weights_fingerprint
from softcot_ds.models.reading import PADDING, Prompts
from softcot_ds.models.rows import Rows, Writing
from softcot_ds.models.sampling import Chooser, Drafts, no_drafts
from softcot_ds.recipe import Recipe


class Drafter:
    """The recipe's assistant, as it drafts. Loaded when it first does, whole on each rank that does."""

    def __init__(self, recipe: Recipe) -> None:
        self._config = recipe.assistant
        self.count = recipe.evaluation.draft
        """N, at most."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self | None:
        """None where nothing is to be drafted."""
        return cls(recipe) if recipe.evaluation.draft else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the drafts, by content. JSON values."""
        config = self._config
        weights = {"model": weights_fingerprint(config), "dtype": config.dtype, "attention": config.attention}
        return {"tokens": self.count, **weights}

    @cached_property
    def model(self) -> PreTrainedModel:
        """With all of its layers, whichever one thoughts are of. Raises SoftCoTError when it cannot be loaded."""
        return load_frozen(self._config, "none", own_device())


def check_drafting(
    recipe: Recipe,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    configs: tuple[PreTrainedConfig, PreTrainedConfig],
) -> None:
    """Raises SoftCoTError where the assistant cannot draft for the base: both need the same tokens, and caches that can
    be cut back.

    Args:
        tokenizers, configs: of the assistant and of the base.
    """
    asked, off = f"evaluation.draft={recipe.evaluation.draft}", "or set evaluation.draft=0"
    names = recipe.assistant.model, recipe.base.model
    for name, config in zip(names, configs, strict=True):
        if not keeps_keys_and_values(config):
            raise SoftCoTError(
                f"{asked}: {name} ({config.model_type}) keeps something else than keys and values of every token, and "
                f"cannot take back tokens that are not accepted; take another model, {off}"
            )
    ids, others = (tokenizer.get_vocab() for tokenizer in tokenizers)
    tokens, other_tokens = ({number: token for token, number in known.items()} for known in (ids, others))
    both = sorted(tokens.keys() & other_tokens.keys())
    if differ := [number for number in both if tokens[number] != other_tokens[number]]:
        raise SoftCoTError(
            f"{asked}: drafts are handed over as tokens, and the tokenizers of {' and '.join(names)} differ in "
            f"{len(differ):,} of the {len(both):,} that both know: {differ[0]} is {tokens[differ[0]]!r} to one and "
            f"{other_tokens[differ[0]]!r} to the other; take an assistant with the base's tokens, {off}"
        )


class DraftRows:
    """The rows of the model that drafts: those of the base, in the same order."""

    def __init__(self, model: PreTrainedModel, count: int, prompts: Prompts, choose: Chooser, vocabulary: int) -> None:
        """
        Args:
            count: N, at most.
            prompts: the base's.
            choose: from V of the base as from W here.
            vocabulary: V.
        """
        self._count, self._choose, self._vocabulary = count, choose, vocabulary
        self._rows = Rows(model)
        self._longest = context_length(model.config) - count
        """A text after which there is room for drafts."""
        self._known = model.get_input_embeddings().weight.shape[0]
        texts = [[*prompt.prefix_ids, *prompt.suffix_ids][-self._longest :] for prompt in prompts.prompts]
        self._texts = [self._readable(ids) or [PADDING] for ids in texts]
        self._prompts = Prompts([BasePrompt(ids, []) for ids in self._texts], None)
        if shared := self._prompts.shared:
            self._rows.read_shared(self._prompts.read_tokens(shared))

    def begin(
        self, keep: Sequence[int], picked: Sequence[int], numbers: Sequence[int], picked_then: Sequence[int], hold: bool
    ) -> None:
        """See ``Rows.begin``. ``numbers``: of the prompts that are read now."""
        reading = self._prompts.read(numbers, self._rows.shared) if numbers else None
        self._rows.begin(keep, picked, reading, picked_then, hold)

    def draft(self, outputs: Sequence[Writing], room: int) -> Drafts:
        """What may come next in each output.

        Args:
            room: tokens that the base can read beside the last ones.
        """
        lengths = [len(self._texts[output.prompt]) + len(output.token_ids) for output in outputs]
        # Behind the drafts that are accepted comes a token of the base's own.
        most = max(0, min(self._count, room, max(output.left for output in outputs) - 1))
        counts = [
            min(most, max(0, output.left - 1)) if length <= self._longest else 0
            for output, length in zip(outputs, lengths, strict=True)
        ]
        # All but the last two tokens of a text have been read, whatever was accepted. A row for which nothing can be
        # drafted stays as long as it is: its output has ended, or its text has grown too long.
        read = [max(2, min(length, self._longest)) - 2 for length in lengths]
        self._rows.cut(torch.tensor(read))
        logits_RW = self._rows.write(torch.tensor([self._end(output) for output in outputs]))[:, -1]
        numbers, tokens, chances = [output.number for output in outputs], [], []
        for place in range(most):
            if place:
                logits_RW = self._rows.write(tokens[-1][:, None])[:, -1]
            places = [output.position + place for output in outputs]
            drawn_R, chances_RW = self._choose.draft(logits_RW[:, : self._vocabulary], numbers, places)
            tokens.append(drawn_R)
            chances.append(chances_RW)
        if not tokens:
            return no_drafts(len(outputs))
        return Drafts(torch.stack(tokens, 1), counts, None if chances[0] is None else torch.stack(chances, 1))

    def _end(self, output: Writing) -> list[int]:
        """The last two tokens of the text that an output is part of."""
        return [PADDING, *self._texts[output.prompt][-2:], *self._readable(output.token_ids[-2:])][-2:]

    def _readable(self, ids: Sequence[int]) -> list[int]:
        """Something stands for tokens that the base alone knows."""
        return [token if token < self._known else PADDING for token in ids]
