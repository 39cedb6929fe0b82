"""What stands at the assistant's placeholders in each of a question's chains: the initial embeddings of SoftCoT++.

They are the same for every question and are not trained, so that the states of all chains are constants, which a cache
holds. A file of the original implementation has them beside the projection, as ``embedding``.

K chains, P assistant width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from softcot_ds.data.chat import ChatFormat
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.projection import load_projection
from softcot_ds.models.assistant import compute_thoughts, read_shared
from softcot_ds.models.backbone import load_config, load_tokenizer, vocabulary, width
from softcot_ds.models.embedding import device_of, token_rms, whole_embedding
from softcot_ds.models.shared_prefix import SharedPrefix
from softcot_ds.recipe import Recipe

EMBEDDING = "embedding"
"""Their name beside the weights of a projection."""


@dataclass(frozen=True)
class InitialEmbeddings:
    """Of a recipe's K chains: of tokens, drawn from a seed, or vectors. One of the three is not None."""

    count: int
    """K."""
    token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    rows_KP: torch.Tensor | None = None
    """Float32, on the CPU."""

    @cached_property
    def identity(self) -> str:
        """What decides them, besides the assistant."""
        if self.token_ids is not None:
            return f"tokens {' '.join(map(str, self.token_ids))}"
        if self.seed is not None:
            return f"{self.count} random of seed {self.seed}"
        return f"vectors {hashlib.sha256(self.rows_KP.numpy().tobytes()).hexdigest()}"

    @torch.no_grad()
    def of(self, assistant: PreTrainedModel) -> torch.Tensor:
        """(K, P) in the dtype of the assistant's tokens, on their device. All ranks that hold it call it together."""
        embedding = assistant.get_input_embeddings()
        ids_K = torch.tensor(self.token_ids or (0,) * self.count, device=device_of(embedding))
        with whole_embedding(embedding) as embed:
            rows_KP = embed(ids_K[None])[0].clone()
        if self.rows_KP is not None:
            return self.rows_KP.to(rows_KP)
        if self.seed is not None:
            rms = token_rms(embedding, vocabulary(assistant.config))
            drawn_KP = torch.randn(rows_KP.shape, generator=torch.Generator().manual_seed(self.seed))
            return (rms * drawn_KP).to(rows_KP)
        return rows_KP


def projection_weights(path: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Those of ``load_projection``, without the initial embeddings that the file may hold.

    Raises:
        SoftCoTError: the file is damaged; or it holds initial embeddings, and the recipe has others.
    """
    weights = load_projection(path)
    rows_KP = weights.pop(EMBEDDING, None)
    if rows_KP is not None and (recipe.chains is None or recipe.chains.initial != "file"):
        raise SoftCoTError(
            f"{path} is of SoftCoT++: beside a projection it holds {len(rows_KP)} initial embeddings of the assistant. "
            f"Set method=softcot_pp, chains.initial=file and chains.count={len(rows_KP)} to use both"
        )
    return weights


@dataclass(frozen=True)
class Thinker:
    """An assistant that has read what all its inputs begin with, and what it reads at placeholders."""

    assistant: PreTrainedModel
    prefix: SharedPrefix
    initial_KP: torch.Tensor | None

    @classmethod
    def of(
        cls, assistant: PreTrainedModel, inputs: Sequence[AssistantInput], initial: InitialEmbeddings | None
    ) -> "Thinker":
        """All ranks that hold the assistant together call it together.

        Args:
            inputs: all that it may be given; none where they are not known.
        """
        return cls(assistant, read_shared(assistant, inputs), initial and initial.of(assistant))

    def __call__(self, inputs: Sequence[AssistantInput]) -> torch.Tensor:
        """(B, T, P) states, or (B, K, T, P): see ``compute_thoughts``."""
        return compute_thoughts(self.assistant, inputs, self.prefix, self.initial_KP)


def initial_embeddings(recipe: Recipe) -> InitialEmbeddings | None:
    """None where a question has one set of thoughts.

    Raises:
        SoftCoTError: ``chains.tokens`` names what is no token of the assistant, or the file of
            ``projection.init_from`` has no such embeddings.
    """
    chains = recipe.chains
    if chains is None:
        return None
    if chains.initial == "random":
        return InitialEmbeddings(chains.count, seed=chains.seed)
    if chains.initial == "tokens":
        return InitialEmbeddings(chains.count, token_ids=_token_ids(recipe, chains.tokens))
    return InitialEmbeddings(chains.count, rows_KP=_of_file(recipe, chains.count))


def _token_ids(recipe: Recipe, texts: list[str]) -> tuple[int, ...]:
    assistant = recipe.assistant
    chat = ChatFormat(load_tokenizer(assistant), assistant.template_kwargs, assistant.model)
    ids = tuple(chat.one_token(text, "chains.tokens") for text in texts)
    rows = vocabulary(load_config(assistant))
    if (largest := max(ids)) >= rows:
        raise SoftCoTError(
            f"chains.tokens: {texts[ids.index(largest)]!r} is token {largest}, but {assistant.model} has embeddings "
            f"for {rows} tokens only; name another"
        )
    return ids


def _of_file(recipe: Recipe, count: int) -> torch.Tensor:
    path = recipe.projection.init_from
    if path is None:
        raise SoftCoTError(
            "chains.initial=file: projection.init_from names no file; name one with initial embeddings, such as a "
            "projection.bin of SoftCoT++, or set chains.initial to tokens or random"
        )
    rows_KP = load_projection(path).get(EMBEDDING)
    if rows_KP is None:
        raise SoftCoTError(
            f"chains.initial=file: {path} holds a projection and no tensor {EMBEDDING!r}; set chains.initial to tokens "
            "or random"
        )
    wanted = count, width(load_config(recipe.assistant))
    if tuple(rows_KP.shape) != wanted:
        raise SoftCoTError(
            f"{path}: {EMBEDDING!r} has the shape {tuple(rows_KP.shape)}, and chains.count={count} with this assistant "
            f"wants {wanted}; set chains.count to the first number, and assistant.model to the one it was trained with"
        )
    return rows_KP
