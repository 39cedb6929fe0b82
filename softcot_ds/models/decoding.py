"""Decoding: prompts with thoughts in, tokens out.

transformers' ``generate`` is given tokens alone, with any token where the thoughts go, and what the embedding module
makes of it is replaced by the thought. So each family reads tokens in its own way (scales, positions, several kinds of
cache), and those whose ``generate`` refuses embeddings decode like all others. Nor need it make anything of a prompt
whose tokens are in a table: a partitioned module's weights are gathered for generated tokens alone.

Prompts are padded on the left where the model hides padding, which a trial on its real weights tells. Where it does not
(recurrent models that ignore the mask), they are decoded one by one.

B batch, S tokens of the longest prompt, T thoughts, D base width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import max_over_ranks
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.backbone import context_length, load_to_run
from softcot_ds.models.embedding import CompactTable, whole_embedding
from softcot_ds.models.partition import is_on_its_way, needs_all_ranks
from softcot_ds.recipe import EvaluationConfig, ModelConfig, Partition, Recipe

PADDING = 0
"""A token that every model has; it stands for thoughts and padding."""
_TRIAL_LENGTHS = (4, 40)
"""Tokens of the trial's two prompts: far apart, so that padding which is not hidden shows."""
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
"""Relative error of logits that counts as equal; 0.1 in half precision, where a batch alone changes hundredths."""

_batches: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""What the trial of each model said."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0

    @classmethod
    def of(cls, settings: EvaluationConfig) -> Self:
        """As the recipe says it for the base's answers."""
        return cls(settings.max_new_tokens, settings.temperature, settings.top_p)


@dataclass(frozen=True)
class Output:
    """What the model wrote after one prompt."""

    token_ids: list[int]
    """Without the stop token."""
    cut: bool
    """It ended at ``max_new_tokens``, not at a stop token."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[BasePrompt],
    thoughts_BTD: torch.Tensor | None,
    stop_ids: list[int],
    sampling: Sampling,
    table: CompactTable | None = None,
) -> list[Output]:
    """Continue a batch of prompts, up to the end of the model's context. What comes out of each is what does alone.

    All ranks call it together where the model is partitioned: it goes on until every one is done.

    Args:
        prompts: B prompts ``prefix ; thoughts ; suffix``.
        thoughts_BTD: in any floating dtype, or None to decode without any.
        stop_ids: tokens that end an output.
        table: with all tokens of the prompts and PADDING, on every rank, to embed them by; None to ask the model's own.

    Returns:
        The output of each prompt.

    Raises:
        SoftCoTError: the model cannot continue such prompts (see ``try_decoding``), its context has no room, or the
            table lacks a token.
    """
    num_thoughts = 0 if thoughts_BTD is None else thoughts_BTD.shape[1]
    lengths = [len(prompt.prefix_ids) + num_thoughts + len(prompt.suffix_ids) for prompt in prompts]
    room = context_length(model.config) - max(lengths)
    if room < 1:
        raise SoftCoTError(
            f"a prompt of {max(lengths)} tokens does not fit {type(model).__name__}, whose context has "
            f"{context_length(model.config)} tokens; ask something shorter"
        )
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    groups = [list(range(len(prompts)))]
    if not try_decoding(model):
        groups = [[index] for index in range(len(prompts))]
    outputs: dict[int, Output] = {}
    for number in range(max_over_ranks(len(groups)) if needs_all_ranks(model) else len(groups)):
        # A rank without a group of its own runs along: each forward pass needs all ranks.
        group = groups[min(number, len(groups) - 1)]
        made = _generate(
            model,
            [prompts[index] for index in group],
            None if thoughts_BTD is None else thoughts_BTD[group],
            stop_ids,
            sampling,
            table,
        )
        for index, row in zip(group, made.sequences.tolist(), strict=True):
            outputs.setdefault(index, _until_stop(row[max(lengths[index] for index in group) :], set(stop_ids)))
    return [outputs[index] for index in range(len(prompts))]


def _until_stop(row: list[int], stops: set[int]) -> Output:
    end = next((i for i, token in enumerate(row) if token in stops), None)
    return Output(row[:end], cut=end is None)


def load_to_decode(
    config: ModelConfig, recipe: Recipe, partition: Partition, spare_of: Callable[[int], float]
) -> PreTrainedModel:
    """One of the recipe's models, loaded and tried. All ranks call it together.

    Args:
        spare_of: see ``partition.keep_layers``.

    Raises:
        SoftCoTError: it cannot be loaded, or cannot decode with thoughts in its prompt.
    """
    model = load_to_run(config, recipe, partition, spare_of)
    try_decoding(model)
    return model


@torch.no_grad()
def try_decoding(model: PreTrainedModel) -> bool:
    """Decode two short prompts of unequal length, with thoughts, and compare the logits with passes of each alone.

    A pass alone is one over all embeddings without padding or cache, as in training. Tried once for each model.

    Returns:
        Whether prompts may be decoded together.

    Raises:
        SoftCoTError: not even a prompt alone decodes to what the pass says.
    """
    if model not in _batches:
        try:
            _batches[model] = _trial(model)
        except SoftCoTError:
            raise
        except Exception as error:  # whatever a family's code raises when it is used in a way that it does not know
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SoftCoTError(f"{type(model).__name__} cannot decode with thoughts in its prompt: {reason}") from error
    return _batches[model]


def _trial(model: PreTrainedModel) -> bool:
    embed = model.get_input_embeddings()
    ids = _ordinary_tokens(model, max(_TRIAL_LENGTHS)).to(embed.weight.device)
    # Two tokens before the thoughts and one after; thoughts that are no token's embedding.
    prompts = [BasePrompt(ids[: n - 3].tolist(), ids[n - 1 : n].tolist()) for n in _TRIAL_LENGTHS]
    tokens_1SD = embed(ids[None])
    thoughts_BTD = (tokens_1SD[:, 0:4] - tokens_1SD[:, 4:8]).reshape(2, 2, -1)
    stop_id = int(ids[0])

    def errors(rows: list[int]) -> list[float]:
        picked = [prompts[row] for row in rows]
        made = _generate(model, picked, thoughts_BTD[rows], [stop_id], Sampling(2), logits=True)
        found_BNV = torch.stack(made.logits, dim=1)
        first_B = made.sequences[:, -2]
        return [
            _error(found_NV, _logits_alone(model, prompt, thoughts_BTD[row], int(first)))
            for found_NV, prompt, row, first in zip(found_BNV, picked, rows, first_B, strict=True)
        ]

    tolerance = _TOLERANCE.get(model.dtype, 0.1)
    with suppress(Exception):  # some families' code takes no more than one row
        if max(errors([0, 1])) <= tolerance:
            return True
    worst = max(errors([0]) + errors([1]))
    if not math.isfinite(worst):
        raise SoftCoTError(f"{type(model).__name__}: its logits are not finite; are its weights damaged?")
    if worst > tolerance:
        raise SoftCoTError(
            f"{type(model).__name__} cannot decode with thoughts in its prompt: its generation differs from a pass "
            f"over the same embeddings (logits by {worst:.1e}, relative; {tolerance:.0e} is allowed); use another model"
        )
    return False


def _logits_alone(model: PreTrainedModel, prompt: BasePrompt, thoughts_TD: torch.Tensor, first: int) -> torch.Tensor:
    """(2, V) logits after a prompt, and after the token ``first`` that follows it."""
    ids = torch.tensor([[*prompt.prefix_ids, *prompt.suffix_ids, first]], device=thoughts_TD.device)
    prefix_1LD, rest_1RD = model.get_input_embeddings()(ids).tensor_split([len(prompt.prefix_ids)], dim=1)
    embeds_1SD = torch.cat([prefix_1LD, thoughts_TD[None].to(prefix_1LD.dtype), rest_1RD], dim=1)
    return model(inputs_embeds=embeds_1SD, use_cache=False).logits[0, -2:]


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    found, true = found.double().to(true.device), true.double()
    shown = ~(true <= -1e4)  # some families mask entries of their vocabulary; a NaN stays
    spread = (true[shown] - true[shown].mean()).norm()
    return float((found - true)[shown].norm() / spread.clamp(min=torch.finfo(spread.dtype).tiny))  # all may be equal


def _ordinary_tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Tokens that no setting of the model names: not those of images, say."""
    config = model.config.get_text_config()
    named = {id for values in (model.config.to_dict(), config.to_dict()) for id in values.values() if type(id) is int}
    order = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor(([token for token in order if token not in named] * count)[:count])


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[BasePrompt],
    thoughts_BTD: torch.Tensor | None,
    stop_ids: list[int],
    sampling: Sampling,
    table: CompactTable | None = None,
    logits: bool = False,
) -> GenerateOutput:
    """One call of ``generate``: sequences (B, S + new tokens), padded on the left, and each new token's logits."""
    num_thoughts = 0 if thoughts_BTD is None else thoughts_BTD.shape[1]
    rows = [[*prompt.prefix_ids, *[PADDING] * num_thoughts, *prompt.suffix_ids] for prompt in prompts]
    longest = max(len(row) for row in rows)
    skipped_B = torch.tensor([longest - len(row) for row in rows])
    ids_BS = torch.tensor([[PADDING] * (longest - len(row)) + row for row in rows])
    mask_BS = (torch.arange(longest) >= skipped_B[:, None]).long()
    starts_B = skipped_B + torch.tensor([len(prompt.prefix_ids) for prompt in prompts])
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    # What a model brings along (Qwen2.5: a repetition penalty) would apply wherever nothing is said below.
    model.generation_config = GenerationConfig()
    device = model.get_input_embeddings().weight.device
    with _embedded(model, ids_BS, starts_B, thoughts_BTD, table):
        return model.generate(
            ids_BS.to(device),
            attention_mask=mask_BS.to(device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(sampled),
            **sampled,
            eos_token_id=stop_ids,
            pad_token_id=PADDING,
            synced_gpus=needs_all_ranks(model),
            return_dict_in_generate=True,
            output_logits=logits,
        )


@contextmanager
def _embedded(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    starts_B: torch.Tensor,
    thoughts_BTD: torch.Tensor | None,
    table: CompactTable | None,
) -> Iterator[None]:
    """Has the embedding module give the thoughts out from ``starts_B`` on, whenever it reads the whole prompt, and the
    prompt's tokens as ``table`` has them."""
    embedding = model.get_input_embeddings()
    longest = ids_BS.shape[1]
    known_BSD = None if table is None else table(table.number(ids_BS).to(table.rows_KD.device))
    rows_B1 = torch.arange(len(starts_B))[:, None]
    slots_BT = starts_B[:, None] + torch.arange(0 if thoughts_BTD is None else thoughts_BTD.shape[1])
    calls = 0

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        if is_on_its_way(*embedding.parameters()):  # under limits of a file, far higher than the model needs
            return embedding._call_impl(ids)
        with whole_embedding(embedding) as embed:
            return embed(ids)

    def read(ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        length = ids.shape[1]
        # Not in the first pass alone: some families keep no cache, or begin it anew when it reaches a length.
        if length < longest or (length == 1 and calls > 1):
            return look_up(ids)
        if known_BSD is None:
            embeds_BSD = look_up(ids).clone()
        else:
            written = [look_up(ids[:, longest:])] if length > longest else []
            embeds_BSD = torch.cat([known_BSD, *written], dim=1)
        if thoughts_BTD is not None:
            embeds_BSD[rows_B1, slots_BT] = thoughts_BTD.to(embeds_BSD)
        return embeds_BSD

    # In the place of a call with its hooks, by which a partitioned module is gathered. In every pass: DeepSpeed would
    # find that the prompt's has another order than those that follow.
    embedding._compiled_call_impl = read
    try:
        yield
    finally:
        embedding._compiled_call_impl = None
