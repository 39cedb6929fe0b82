"""Whether a model does what training and thoughts take for granted, tried on its loaded weights before work starts.

Two short rows of unequal length go through the very code that the work will run, and must come out as each row alone;
embeddings of tokens must do what the tokens' ids do. So no list of families says which models fit: one that ignores
masks, needs ids beside embeddings or looks ahead shows it here, one that takes or returns something else fails here.
Whether the gradient is right is asked ahead, of a toy: see ``why_gradient_wrong``.

N tokens, S tokens of a row, T thoughts, D base width, V vocabulary.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from softcot_ds.data.batches import pad
from softcot_ds.data.prompts import AssistantInput, BasePrompt
from softcot_ds.distributed import agreed, says_nothing
from softcot_ds.distributed import device as own_device
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.full_step import full_logits
from softcot_ds.methods.soft_thoughts import mask_and_positions
from softcot_ds.models.assistant import compute_thoughts, decoder_of, load_to_think, read_shared, states_layer
from softcot_ds.models.backbone import layers_in_few_bits, load_config, load_frozen, weight_bytes
from softcot_ds.models.decoding import try_decoding
from softcot_ds.models.embedding import device_of
from softcot_ds.models.frozen_prefix import FrozenPrefix
from softcot_ds.models.loss import cross_entropy
from softcot_ds.models.model_files import is_here
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.places import at, places_of
from softcot_ds.models.scoring import Scorer
from softcot_ds.models.toy import VOCABULARY, make_toy, toy_config
from softcot_ds.recipe import ModelConfig, Recipe

Role = Literal["base", "assistant"]

SMALL_BYTES = 2 * 10**9
"""A model of no more weights than this is loaded just to be tried."""
_NOT_FINITE = "what it makes of ordinary tokens is not finite: its weights may be damaged, fetch or save them again"
_OF_A_TOY = "a small model made from its configuration shows that "
_DIRECTIONS, _STEP = 16, 5e-4
"""In which the thoughts are moved, and how far, in parts of their length: further bends, nearer drowns in rounding."""
_GRADIENT_TOLERANCE = 1e-2
_DRAWS = 3
"""Pairs of rows that the fast step is tried with, until one comes out right: a fault shows with every pair."""
_SHARED, _THOUGHTS = 2, 2
_LENGTHS = ((9, 5), (2, 3))
"""Tokens of each row before and after the thoughts; the first ones, which are shared, are among them."""


def check_model(model: PreTrainedModel, role: Role, name: str, layer: int | None = None) -> None:
    """Raises SoftCoTError on all ranks when ``why_unsuitable`` has a reason on one; to be called by all together.

    Args:
        name: what the recipe calls the model.
        layer: after which it ends, where that is not its last.
    """
    reason = agreed(why_unsuitable(model, role))
    if reason is not None:
        raise _unsuitable(name, model.config.model_type, role, reason, layer)


def load_assistant(recipe: Recipe) -> PreTrainedModel:
    """The assistant, whole on this process's device, and tried. All ranks call it together.

    Raises:
        SoftCoTError: it cannot be loaded, or cannot be an assistant.
    """
    assistant = load_to_think(recipe, "none", own_device())
    check_model(assistant, "assistant", recipe.assistant.model, states_layer(recipe))
    return assistant


def load_scorer(model: PreTrainedModel, name: str) -> Scorer:
    """A loaded model, tried, that tells losses. All ranks call it together where it is partitioned.

    Args:
        name: what the recipe calls the model.

    Raises:
        SoftCoTError: its losses would not be those of each row alone.
    """
    scorer = Scorer(model)
    reason = _why_not_scored(scorer)
    if reason is not None and scorer.is_fast:
        scorer.read_whole_rows()
        reason = _why_not_scored(scorer)
    if reason is not None:
        raise SoftCoTError(
            f"{name} cannot tell the losses of solutions: {reason}. Set evaluation.loss=false and evaluation.read=text"
        )
    return scorer


def check_ahead(config: ModelConfig, role: Role, bits: int = 16) -> None:
    """Raises SoftCoTError when ``why_unsuitable_ahead`` has a reason; nothing where that cannot be told ahead."""
    try:
        reason = why_unsuitable_ahead(config, role, bits)
    except Untried:
        return
    if reason is not None:
        raise _unsuitable(config.model, load_config(config).model_type, role, reason)


def _unsuitable(name: str, model_type: str, role: Role, reason: str, layer: int | None = None) -> SoftCoTError:
    whole = "" if layer is None else f"Set thoughts.layer=-1: that it ends after layer {layer} may be the cause. Or "
    return SoftCoTError(
        f"{name} (model type {model_type!r}) cannot be the {role}: {reason}. {whole}{'name' if whole else 'Name'} "
        f"another model in {role}.model; where it is the model's code that fails, {role}.attention: eager may help"
    )


class Untried(Exception):
    """Whether a model fits shows only when it is loaded; says why."""


def why_unsuitable_ahead(config: ModelConfig, role: Role, bits: int = 16) -> str | None:
    """Why a model that is not loaded yet cannot be the base, decoding included, or the assistant; None when it can.

    Asked of the model itself where it is here and small; else of a toy made from its configuration, in a second or two.
    Of a toy alone it is asked whether the base's gradient is right. On one process, on the CPU.

    Args:
        bits: of a weight of its linear layers, as ``load_frozen`` takes them.

    Raises:
        Untried: no toy can be made, or it does not do what every causal model does.
        SoftCoTError: the model's files are not what they should be, or it cannot be held in so few bits.
    """
    small = is_here(config) and weight_bytes(config) <= SMALL_BYTES and "flash" not in config.attention
    model = load_frozen(config, "none", torch.device("cpu"), bits=bits) if small else _toy(config, role, bits)
    reason = why_unsuitable(model, role)
    if reason is None and role == "base":
        try:
            try_decoding(model)
        except SoftCoTError as error:
            reason = str(error)
    if reason is not None:
        return reason if small else _OF_A_TOY + reason
    if role == "base":
        with suppress(Untried):
            toy = _toy(config, role, bits) if small else model
            if (reason := _reason(lambda: why_gradient_wrong(toy))) is not None:
                return _OF_A_TOY + reason + ("" if bits == 16 else f" (with backbone.bits={bits})")
    return None


def _toy(config: ModelConfig, role: Role, bits: int) -> PreTrainedModel:
    settings = load_config(config)
    layers = layers_in_few_bits(config, bits, torch.device("cpu")) if bits < 16 else None
    try:
        # Of one that is so much wider all layers can be held in few bits.
        toy = make_toy(toy_config(settings, 1 if layers is None else 4))
        if layers is not None:
            replace(layers, vocabulary=VOCABULARY).quantize(toy, torch.device("cpu"))
        ids = _tensor(_rows(toy)[0], toy)[None]
        with torch.no_grad():
            finite = toy(input_ids=ids, use_cache=False).logits.isfinite().all()
        if role == "base":
            toy.generation_config = GenerationConfig()
            toy.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    except SoftCoTError:
        raise
    except Exception as error:  # each family has its own
        raise Untried(f"no small model can be made from its configuration: {_first_line(error)}") from error
    if not finite:
        raise Untried("a small model made from its configuration gives no finite numbers")
    return toy


def why_unsuitable(model: PreTrainedModel, role: Role) -> str | None:
    """Why a loaded model, in evaluation mode, cannot be the base of training or the assistant; None when it can.

    It costs a few forward passes of two short rows, for the base one backward pass too. A partitioned model must be in
    DeepSpeed's hands; all ranks call this together.
    """
    return _reason(lambda: (_try_base if role == "base" else _try_assistant)(model))


def why_gradient_wrong(toy: PreTrainedModel) -> str | None:
    """Why the gradient of a toy base is not to be trusted; None where it is what moving the thoughts does to the loss.

    That a gradient arrives says little: what the residual stream carries past a layer hides a layer that passes none.
    Along a few random directions, as an error across the thoughts' gradient is along some of them; the median of them,
    because a step may send a token to another expert. Where half a step says something else, nothing is said. In
    float32, on a model made for it: of a real one in 16 bits, rounding would be most of what is seen.
    """
    ids, first = _tensor(_rows(toy)[0], toy), _LENGTHS[0][0]
    thoughts = slice(first, first + _THOUGHTS)

    def losses(embeds: torch.Tensor) -> torch.Tensor:
        logits = toy(inputs_embeds=embeds.clone(), use_cache=False).logits[:, first:-1].double()
        targets = ids[first + 1 :].expand(len(embeds), -1)
        return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(dim=1)

    with torch.no_grad():
        embeds = toy.get_input_embeddings()(ids[None])
        _put_thoughts(embeds, first)
        steps = torch.randn(_DIRECTIONS, *embeds[0, thoughts].shape, generator=torch.Generator().manual_seed(0))
        steps *= _STEP * embeds[:, thoughts].norm() / steps.norm(dim=(1, 2), keepdim=True)
        steps = torch.cat([steps, steps / 2])
        moved = embeds.repeat(2 * len(steps), 1, 1)
        moved[:, thoughts] += torch.cat([steps, -steps])
        ahead, back = losses(moved).chunk(2)
    with torch.enable_grad():
        embeds.requires_grad_()
        (gradient,) = torch.autograd.grad(losses(embeds).sum(), [embeds])
    found, _ = (gradient[:, thoughts].double() * steps).sum(dim=(1, 2)).chunk(2)
    truth, half = ((ahead - back) / 2).chunk(2)
    error, doubt = ((other - truth).abs().median() / truth.abs().median() for other in (found, 2 * half))
    if error <= max(_GRADIENT_TOLERANCE, 2 * doubt):
        return None
    return (
        f"the gradient that reaches the thoughts is {error:.0%} off from what moving them does to the loss: some of "
        "its layers pass back none, or a wrong one"
    )


def why_not_fast(model: PreTrainedModel, prefixed: FrozenPrefix) -> str | None:
    """Why the fast step cannot be taken with a base that the full step suits; None when both give the same.

    All ranks call it together, and have the same answer. Where rounding alone differs by too much, it does so for some
    rows: of SmolLM2 135M in bfloat16, for 2 pairs of rows in 24 (by 0.40 and 0.47, where most differ by 0.1 or less).
    """
    reason = None
    for draw in range(_DRAWS):
        reason = agreed(_reason(partial(_try_fast, model, prefixed, draw)))
        if reason is None:
            break
    return reason


def _why_not_scored(scorer: Scorer) -> str | None:
    reason = _reason(lambda: _try_scorer(scorer))
    return agreed(reason) if needs_all_ranks(scorer.model) else reason


def _reason(trial: Callable[[], str | None]) -> str | None:
    try:
        return trial()
    except Exception as error:
        if says_nothing(error):
            raise
        return f"a trial with a few tokens ended in {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _try_base(model: PreTrainedModel) -> str | None:
    rows = _rows(model)
    ids = _tensor(rows[0], model)[None]
    with torch.no_grad():
        embedded = [model.get_input_embeddings()(_tensor(row, model)[None]) for row in rows]
        said = _logits(model, input_ids=ids)
        if not said.isfinite().all():
            return _NOT_FINITE
        if _differ(model, _logits(model, inputs_embeds=embedded[0]), said):
            if _differ(model, _logits(model, input_ids=ids), said):
                return "it does not give the same twice for the same tokens"
            return "it needs token ids beside embeddings, and thoughts are embeddings alone"
        alone = []
        for embeds, (prefix, _) in zip(embedded, _LENGTHS, strict=True):
            _put_thoughts(embeds, prefix)
            alone.append(_logits(model, inputs_embeds=embeds)[prefix:])
    logits, gradient = _full(model, rows)
    if _differ(model, logits, torch.cat(alone)):
        half = len(rows[0]) // 2
        with torch.no_grad():
            part = _logits(model, input_ids=ids[:, :half])
        if _differ(model, part, said[:half]):
            return "it is not causal: what comes later changes what it makes of earlier tokens"
        return "rows in a batch come out other than each row alone"
    if not gradient.isfinite().all() or not gradient.any():
        return "no gradient reaches the thoughts"
    return None


def _logits(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """(S, V) of one row."""
    copies = {name: value.clone() for name, value in inputs.items()}  # some families scale what they are given in place
    return model(**copies, use_cache=False).logits[0]


def _put_thoughts(embeds: torch.Tensor, first: int) -> None:
    """Put what is no token's embedding, but of their size, in the place of some (., S, D) from ``first`` on."""
    tokens, next_ones = (embeds[:, start : start + _THOUGHTS].clone() for start in (first, first + 1))
    embeds[:, first : first + _THOUGHTS] = (tokens - next_ones) / 2**0.5


def _try_fast(model: PreTrainedModel, prefixed: FrozenPrefix, draw: int) -> str | None:
    rows = _rows(model, draw)
    logits, gradient = _full(model, rows)
    shared = prefixed.read_shared(_tensor(rows[0][:_SHARED], model))
    found, found_gradient = _with_gradient(
        model,
        rows,
        _SHARED,
        lambda embeds, prefix_mask, suffix_mask, at: prefixed.logits(
            embeds,
            *mask_and_positions(prefix_mask, _THOUGHTS, suffix_mask, _SHARED),
            prefix_mask.shape[1],
            at,
            shared,
        ),
    )
    if _differ(model, found, logits) or _differ(model, found_gradient, gradient, passes=2):
        return "a trial of the fast one gave another result"
    return None


def _full(model: PreTrainedModel, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return _with_gradient(
        model,
        rows,
        0,
        lambda embeds, prefix_mask, _, at: full_logits(model, embeds, prefix_mask, at, max(map(len, rows))),
    )


def _with_gradient(
    model: PreTrainedModel, rows: list[list[int]], num_shared: int, run: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) from the first thought of each row on, and a gradient (2 T, D) with respect to the thoughts."""
    parts = [(row[num_shared:prefix], row[prefix:]) for row, (prefix, _) in zip(rows, _LENGTHS, strict=True)]
    prefix_ids, prefix_mask = pad([before for before, _ in parts], rows[0][0], side="left")
    rest_ids, rest_mask = pad([rest for _, rest in parts], rows[0][0], side="right")
    device = device_of(model.get_input_embeddings())
    prefix_mask, rest_mask, rest_ids = prefix_mask.to(device), rest_mask.to(device), rest_ids.to(device)
    first = prefix_mask.shape[1]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.cat([prefix_ids.to(device), rest_ids], dim=1))
        _put_thoughts(embeds, first)
    with torch.enable_grad():
        embeds = embeds.detach().requires_grad_()
        logits = run(embeds, prefix_mask, rest_mask[:, _THOUGHTS:], rest_mask.flatten().nonzero()[:, 0])
        loss = cross_entropy(logits, rest_ids[rest_mask])
        # Not backward(): DeepSpeed would take what the engine's parameters get for a part of the first step.
        (gradient,) = torch.autograd.grad(loss, [embeds])
    return logits.detach(), gradient[:, first : first + _THOUGHTS].flatten(0, 1)


@torch.no_grad()
def _try_scorer(scorer: Scorer) -> str | None:
    model = scorer.model
    prompts, texts, thoughts, alone = [], [], [], []
    for row, (prefix, _) in zip(_rows(model), _LENGTHS, strict=True):
        embeds = model.get_input_embeddings()(_tensor(row, model)[None])
        _put_thoughts(embeds, prefix)
        rest = prefix + _THOUGHTS
        prompts.append(BasePrompt(row[:prefix], []))
        texts.append(row[rest:])
        thoughts.append(embeds[0, prefix:rest])
        with at(model, places_of([prefix], _THOUGHTS, embeds.shape[1])):
            alone.append(_logits(model, inputs_embeds=embeds)[rest - 1 : -1])
    found = scorer.logits(prompts, torch.stack(thoughts), texts, scorer.read_shared(prompts))
    return "rows in a batch come out other than each row alone" if _differ(model, found, torch.cat(alone)) else None


@torch.no_grad()
def _try_assistant(model: PreTrainedModel) -> str | None:
    inputs = [
        AssistantInput(str(index), row, list(range(prefix, prefix + _THOUGHTS)))
        for index, (row, (prefix, _)) in enumerate(zip(_rows(model), _LENGTHS, strict=True))
    ]
    decoder = decoder_of(model)
    alone = [
        decoder(input_ids=_tensor(item.token_ids, model)[None], use_cache=False).last_hidden_state[0] for item in inputs
    ]
    states_width, width = alone[0].shape[-1], model.get_input_embeddings()(_tensor([0], model)[None]).shape[-1]
    if states_width != width:
        return f"its states are {states_width} wide, and its token embeddings {width}"
    truth = torch.cat([states[item.positions] for states, item in zip(alone, inputs, strict=True)])
    if not truth.isfinite().all():
        return _NOT_FINITE
    if _differ(model, compute_thoughts(model, inputs).flatten(0, 1), truth):
        return "its states at the placeholders depend on what stands after them, or on the other rows of a batch"
    if _differ(model, compute_thoughts(model, inputs, read_shared(model, inputs)).flatten(0, 1), truth):
        return "its states change when it reads what all inputs begin with once for all"
    return None


def _rows(model: PreTrainedModel, draw: int = 0) -> list[list[int]]:
    """Two rows of ordinary tokens: images, sounds and the like have theirs at the ends of a vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    drawn = random.Random(draw)
    longest = max(map(sum, _LENGTHS)) + _THOUGHTS
    first, second = ([drawn.randrange(vocabulary // 4, vocabulary // 2) for _ in range(longest)] for _ in range(2))
    return [
        (first[:_SHARED] + row[_SHARED:])[: prefix + _THOUGHTS + rest]
        for row, (prefix, rest) in zip((first, second), _LENGTHS, strict=True)
    ]


def _tensor(ids: list[int], model: PreTrainedModel) -> torch.Tensor:
    return torch.tensor(ids, device=device_of(model.get_input_embeddings()))


def _differ(model: PreTrainedModel, found: torch.Tensor, truth: torch.Tensor, passes: int = 1) -> bool:
    """Whether rows (N, .) differ by more than rounding, and by more than a constant, which logits may have in common.

    A fault changes a row as a whole, rounding its last digits: the border lies at a third of the digits, 0.2 in
    bfloat16. Met there were 0.05 (trained, 30 layers) to 0.14 (random, 126 layers) for the gradient, which went through
    the layers twice (``passes``), half of that for logits. The mean over the rows, because in 16 bits a token that
    stands between two experts may now and then go to the other.
    """
    shown = ~(truth <= -1e4)  # some families mask entries of their vocabulary; a NaN stays
    found, truth = (rows.double().where(shown, 0) for rows in (found, truth))
    found, truth = (rows - rows.mean(dim=-1, keepdim=True) for rows in (found, truth))
    errors = (found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=torch.finfo(truth.dtype).tiny)  # may be 0
    precision = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))  # some parts stay in float32
    return not errors.mean() <= passes * precision ** (1 / 3)  # nor if it is NaN
