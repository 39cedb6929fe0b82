"""Decoding: prompts with thoughts in, tokens out.

A trial on a model's real weights tells in which way it decodes: *refilled*, where prompts that wait take the place of
outputs that have ended (refill.py); *in batches*, each by transformers' ``generate`` until its last output ends, where
the model keeps something else than keys and values of every token; *one by one*, where it does not hide padding, as
recurrent models that ignore the mask.

B prompts, S tokens of the longest, T thoughts, V vocabulary, D base width.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from softcot_ds.backbone_config import Partition
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import any_rank, max_over_ranks, says_nothing
from softcot_ds.errors import SoftCoTError
from softcot_ds.models.backbone import Change, context_length, keeps_keys_and_values, load_to_run, vocabulary
from softcot_ds.models.drafting import Drafter, DraftRows
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.models.places import at, places_of
from softcot_ds.models.reading import PADDING, Prompts, Reading
from softcot_ds.models.refill import decode_refilled
from softcot_ds.models.rows import Rows, Writing
from softcot_ds.models.sampling import Chooser, Sampling
from softcot_ds.recipe import ModelConfig, Recipe

Way = Literal["refilled", "in batches", "one by one"]

_TRIAL_LENGTHS = (4, 40)
"""Tokens of the trial's two prompts: far apart, so that padding which is not hidden shows."""
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
"""Relative error of logits that counts as equal; 0.1 in half precision, where a batch alone changes hundredths."""

_PORTION = 2
"""A portion is at least so many times ``batch_size``. With more, less of it is its end, but more ranks are idle: with
GSM8K's lengths 1,319 problems in batches of 32 take 5,000 passes in 16 portions and 4,000 in one, and 16 ranks 370 at a
time. More ranks would gain little: 32 portions take 315 each, and the longest output alone 282."""

_ways: WeakKeyDictionary[PreTrainedModel, Way] = WeakKeyDictionary()
"""What the trial of each model said."""


@dataclass(frozen=True)
class Output:
    """What the model wrote after one prompt."""

    token_ids: array
    """Without the stop token; of any tokens when it is made. Four bytes each: an evaluation keeps all it decodes."""
    cut: bool
    """It ended at ``max_new_tokens`` or at the end of the context, not at a stop token."""
    passes: int = field(default=0, compare=False)
    """Of the model over it, the reading of its prompt among them; 0 where nobody has counted."""
    drafted: int = field(default=0, compare=False)
    """Tokens that another model had drafted for these passes."""
    accepted: int = field(default=0, compare=False)
    """Tokens that came of drafts, the stop token among them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", array("i", self.token_ids))


def portions(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Prompts, by their lengths, cut into what a rank decodes at a time, ``batch_size`` outputs of it together: the
    indices of each portion's.

    Their number is a power of two, as that of ranks mostly is, and lengths are the same in all, so that ranks are done
    at the same time.
    """
    count = 1
    while len(lengths) >= 2 * count * _PORTION * batch_size:
        count *= 2
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [longest_first[start::count] for start in range(count)]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[BasePrompt],
    thoughts_BTD: torch.Tensor | None,
    stop_ids: list[int],
    sampling: Sampling,
    table: CompactTable | None = None,
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
    samples: int = 1,
    drafter: Drafter | None = None,
    progress: Callable[[int], object] = lambda ended: None,
) -> list[Output]:
    """Continue prompts, up to the end of the model's context. What comes out of each is what does alone.

    What all prompts begin with is read once, and each prompt once for all its samples, where the model allows it.

    But for rounding: half precision rounds the same prompt otherwise in other company, and two tokens that are as good
    as equally likely may then change places. The same call gives the same, and what runs together depends on its
    arguments alone.

    All ranks call it together where the model is partitioned, also those that have no prompts: it goes on until every
    one is done.

    Args:
        prompts: B prompts ``prefix ; thoughts ; suffix``. The longest come first, as their outputs tend to be long.
        thoughts_BTD: in any floating dtype, or None to decode without any.
        stop_ids: tokens that end an output.
        table: with all tokens of the prompts and PADDING, on every rank, to embed them by; None to ask the model's own.
        batch_size: how many outputs are written at a time; all by default.
        seeds: of each output's random numbers; drawn from torch's where they are not given.
        samples: outputs of each prompt.
        drafter: writes tokens ahead, and saves passes. Greedily, outputs are the same without it, but for rounding;
            sampled ones are others of the same distribution.
        progress: is told how many outputs have ended, now and then.

    Returns:
        The outputs: all of the first prompt, then of the next.

    Raises:
        SoftCoTError: the model cannot continue such prompts (see ``try_decoding``), or drafts cannot be taken back; its
            context has no room, or the table lacks a token.
    """
    num_thoughts = 0 if thoughts_BTD is None else thoughts_BTD.shape[1]
    outputs = _begin(model, prompts, num_thoughts, sampling.max_new_tokens, samples)
    if seeds is None:
        seeds = torch.randint(2**62, (len(outputs),)).tolist() if sampling.temperature else [0] * len(outputs)
    way, size = try_decoding(model), batch_size or max(1, len(outputs))
    asked, choose = Prompts(prompts, thoughts_BTD, table), Chooser(sampling, seeds)
    draft_rows = None if drafter is None else _rows_to_draft(model, drafter, asked, choose)
    if way == "refilled":
        decode_refilled(model, outputs, asked, choose, set(stop_ids), size, progress, draft_rows)
    else:
        _decode_in_batches(model, outputs, asked, choose, stop_ids, 1 if way == "one by one" else size, progress)
    return [
        Output(output.token_ids, output.cut, output.passes, output.drafted, output.accepted)
        for output in sorted(outputs, key=lambda output: output.number)
    ]


def _rows_to_draft(model: PreTrainedModel, drafter: Drafter, prompts: Prompts, choose: Chooser) -> DraftRows:
    """Raises SoftCoTError where one of the two models cannot take tokens back."""
    for each in (model, drafter.model):
        if (way := try_decoding(each)) != "refilled":
            raise SoftCoTError(
                f"{type(each).__name__} cannot take back drafts that are not accepted: a trial shows that it is to be "
                f"decoded {way}, as it keeps something else than keys and values, or takes padding for tokens; set "
                "evaluation.draft=0, or take another model"
            )
    return DraftRows(drafter.model, drafter.count, prompts, choose, vocabulary(model.config))


def _begin(
    model: PreTrainedModel, prompts: Sequence[BasePrompt], num_thoughts: int, max_new_tokens: int, samples: int
) -> list[Writing]:
    """The outputs of each prompt, those of the longest first. Raises SoftCoTError where the context has no room for
    one."""
    context = context_length(model.config)
    lengths = [len(prompt.prefix_ids) + num_thoughts + len(prompt.suffix_ids) for prompt in prompts]
    if max(lengths, default=0) >= context:
        raise SoftCoTError(
            f"a prompt of {max(lengths)} tokens does not fit {type(model).__name__}, whose context has {context} "
            "tokens; ask something shorter"
        )
    return [
        Writing(prompt * samples + sample, prompt, min(max_new_tokens, context - lengths[prompt]))
        for prompt in sorted(range(len(prompts)), key=lambda prompt: -lengths[prompt])
        for sample in range(samples)
    ]


def _decode_in_batches(
    model: PreTrainedModel,
    outputs: Sequence[Writing],
    prompts: Prompts,
    choose: Chooser,
    stop_ids: list[int],
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    """The same as ``decode_refilled``, one batch after the other. All of a batch may write as much: where the context
    cuts a longer prompt's output, those of shorter ones would be cut with it, or go on beyond its end."""
    alike = [list(some) for _, some in groupby(outputs, key=lambda output: output.limit)]
    batches = [some[start : start + batch_size] for some in alike for start in range(0, len(some), batch_size)]
    for number in range(max_over_ranks(len(batches)) if needs_all_ranks(model) else len(batches)):
        if number >= len(batches):  # it runs along: each forward pass needs all ranks
            _generate(model, prompts.read_tokens([PADDING]), stop_ids, 1)
            continue
        batch = batches[number]
        numbers = [output.number for output in batch]
        read = prompts.read([output.prompt for output in batch])
        length = read.ids_BS.shape[1]
        made = _generate(model, read, stop_ids, batch[0].limit, choose=_Choice(choose, numbers, length))
        for output, row in zip(batch, made.sequences[:, length:].tolist(), strict=True):
            for token in row:
                output.add(token, set(stop_ids))
        progress(sum(output.ended for output in outputs))


def load_to_decode(
    config: ModelConfig,
    recipe: Recipe,
    partition: Partition,
    spare_of: Callable[[int], float],
    change: Change | None = None,
) -> PreTrainedModel:
    """One of the recipe's models, loaded and tried. All ranks call it together.

    Args:
        spare_of: see ``partition.keep_layers``.
        change: what is to be made of it.

    Raises:
        SoftCoTError: it cannot be loaded, or cannot decode with thoughts in its prompt.
    """
    model = load_to_run(config, recipe, partition, spare_of, change)
    try_decoding(model)
    return model


@torch.no_grad()
def try_decoding(model: PreTrainedModel) -> Way:
    """Decode two short prompts of unequal length, with thoughts, and compare the logits with passes of each alone.

    A pass alone is one over all embeddings without padding or cache, as in training. Tried once for each model.

    Returns:
        The fastest way that says the same.

    Raises:
        SoftCoTError: not even a prompt alone decodes to what the pass says.
    """
    if model not in _ways:
        try:
            _ways[model] = _trial(model)
        except SoftCoTError:
            raise
        except Exception as error:  # whatever a family's code raises when it is used in a way that it does not know
            if says_nothing(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SoftCoTError(f"{type(model).__name__} cannot decode with thoughts in its prompt: {reason}") from error
    return _ways[model]


def _trial(model: PreTrainedModel) -> Way:
    embed = model.get_input_embeddings()
    lengths = [min(length, context_length(model.config) - 3) for length in _TRIAL_LENGTHS]  # three tokens follow
    ids = _ordinary_tokens(model, max(8, *lengths)).to(embed.weight.device)
    # Two tokens before the thoughts and one after; thoughts that are no token's embedding.
    prompts = [BasePrompt(ids[: n - 3].tolist(), ids[n - 1 : n].tolist()) for n in lengths]
    tokens_1SD = embed(ids[None])
    thoughts_BTD = (tokens_1SD[:, 0:4] - tokens_1SD[:, 4:8]).reshape(2, 2, -1)

    asked = Prompts(prompts, thoughts_BTD)

    def error(said: list[_Said]) -> float:
        found = [(each.row, each.tokens, torch.stack(each.logits)) for each in said]
        return max(
            _error(logits_NV, _logits_alone(model, prompts[row], thoughts_BTD[row], tokens))
            for row, tokens, logits_NV in found
        )

    tolerance = _TOLERANCE.get(model.dtype, 0.1)
    stop_ids = [int(ids[0])]

    def fits(said: Callable[[], list[_Said]]) -> bool:
        try:
            fit = error(said()) <= tolerance
        except Exception as failure:  # some families' code keeps no cache at all, or takes no more than one row
            if says_nothing(failure):
                raise
            fit = False
        # Near the tolerance ranks may judge otherwise, and those that hold the model together go the same way.
        return not any_rank(not fit) if needs_all_ranks(model) else fit

    if keeps_keys_and_values(model.config) and fits(lambda: _say_refilled(model, asked)):
        return "refilled"
    if fits(lambda: _say(model, asked, [0, 1], stop_ids)):
        return "in batches"
    worst = error(_say(model, asked, [0], stop_ids) + _say(model, asked, [1], stop_ids))
    if not math.isfinite(worst):
        raise SoftCoTError(f"{type(model).__name__}: its logits are not finite; are its weights damaged?")
    if worst > tolerance:
        raise SoftCoTError(
            f"{type(model).__name__} cannot decode with thoughts in its prompt: its generation differs from a pass "
            f"over the same embeddings (logits by {worst:.1e}, relative; {tolerance:.0e} is allowed); use another model"
        )
    return "one by one"


@dataclass
class _Said:
    """What a model says after one of the trial's prompts."""

    row: int
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    """(V,) each: after the prompt, and after every token but the last."""

    def add(self, logits_V: torch.Tensor, token: int | None = None) -> None:
        """``token``: what is written instead of the likeliest."""
        self.logits.append(logits_V)
        self.tokens.append(int(logits_V.argmax()) if token is None else token)


def _say_refilled(model: PreTrainedModel, prompts: Prompts) -> list[_Said]:
    """Two rows of unequal length are read together, then three tokens more of each, of which they keep one and two; one
    goes, and another joins that is read behind shared tokens; the longer one goes, which makes the cache shorter."""
    rows, gone, first, second = Rows(model), _Said(0), _Said(1), _Said(0)

    def hear(said: list[_Said], logits_RV: torch.Tensor) -> None:
        for each, logits_V in zip(said, logits_RV, strict=True):
            each.add(logits_V)

    def write(said: list[_Said], *drafts: int) -> torch.Tensor:
        return rows.write(torch.tensor([[each.tokens[-1], *drafts] for each in said]))

    rows.read_shared(prompts.read_tokens(prompts.shared))
    hear([gone, first], rows.begin([], [], prompts.read([0, 1], rows.shared), [0, 1]))
    begun_R, drafts = rows.lengths_R, prompts.prompts[1].prefix_ids[:2]
    of_gone, of_first = write([gone, first], *drafts)
    gone.add(of_gone[0])
    first.add(of_first[0], drafts[0])
    first.add(of_first[1])
    rows.cut(begun_R + torch.tensor([1, 2]))
    hear([second], rows.begin([1], [], prompts.read([0], rows.shared), [0]))
    hear([first, second], write([first, second])[:, 0])
    rows.begin([1])
    hear([second], write([second])[:, 0])
    return [gone, first, second]


def _say(model: PreTrainedModel, prompts: Prompts, rows: list[int], stop_ids: list[int]) -> list[_Said]:
    said = [_Said(row) for row in rows]
    made = _generate(model, prompts.read(rows), stop_ids, 2, logits=True)
    for logits_RV in made.logits:
        for each, logits_V in zip(said, logits_RV, strict=True):
            each.add(logits_V)
    return said


def _logits_alone(
    model: PreTrainedModel, prompt: BasePrompt, thoughts_TD: torch.Tensor, tokens: list[int]
) -> torch.Tensor:
    """(N, V) logits after a prompt and after each of N tokens behind it, but not the last."""
    ids = torch.tensor([[*prompt.prefix_ids, *prompt.suffix_ids, *tokens[:-1]]], device=thoughts_TD.device)
    prefix_1LD, rest_1RD = model.get_input_embeddings()(ids).tensor_split([len(prompt.prefix_ids)], dim=1)
    embeds_1SD = torch.cat([prefix_1LD, thoughts_TD[None].to(prefix_1LD.dtype), rest_1RD], dim=1)
    with at(model, places_of([len(prompt.prefix_ids)], len(thoughts_TD), embeds_1SD.shape[1])):
        return model(inputs_embeds=embeds_1SD, use_cache=False).logits[0, -len(tokens) :]


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
    reading: Reading,
    stop_ids: list[int],
    max_new_tokens: int,
    logits: bool = False,
    choose: LogitsProcessor | None = None,
) -> GenerateOutput:
    """One call of ``generate``: sequences (B, S + new tokens), padded on the left, and each new token's logits."""
    # What a model brings along (Qwen2.5: a repetition penalty) would apply wherever nothing is said below.
    model.generation_config = GenerationConfig()
    device = model.get_input_embeddings().weight.device
    with reading.by_generate(model):
        return model.generate(
            reading.ids_BS.to(device),
            attention_mask=reading.mask_BN.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([choose] if choose else []),
            eos_token_id=stop_ids,
            pad_token_id=PADDING,
            synced_gpus=needs_all_ranks(model),
            return_dict_in_generate=True,
            output_logits=logits,
        )


class _Choice(LogitsProcessor):
    """Leaves ``generate`` no choice but that of a Chooser."""

    def __init__(self, choose: Chooser, numbers: list[int], prompt_length: int) -> None:
        self._choose = choose
        self._numbers = numbers
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = [input_ids.shape[1] - self._prompt_length] * len(self._numbers)
        chosen_B = self._choose(scores, self._numbers, written)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)
