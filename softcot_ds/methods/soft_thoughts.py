"""The training step: from a batch to the loss, with only the work that the projection's gradient needs.

B batch, I shared prefix tokens, L other prefix tokens, T thoughts, R suffix and target tokens, S = L + T + R,
N = I + S, K supervised tokens, C chains, P assistant width, D base width, V vocabulary.

``step="fast"`` reads the tokens that all prefixes begin with once, runs the rest of the prefix without gradient
(models/frozen_prefix.py) and the head on the K positions alone. ``"full"`` is the naive step, an oracle and the way of
models that the fast one does not fit: one pass over the whole sequence with gradient, logits everywhere. Loss and
gradient of both are the same. What a model must do for either is tried on its own weights (trial.py).
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.data.batches import Batch
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.distributed import device, is_main
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Given, Method
from softcot_ds.methods.conditioning import Conditioning, Weights, check_conditioning
from softcot_ds.methods.full_step import checkpoint_layers, full_logits
from softcot_ds.methods.initial import InitialEmbeddings, Thinker
from softcot_ds.methods.projection import Projection
from softcot_ds.models.assistant import check_length
from softcot_ds.models.backbone import vocabulary
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.frozen_prefix import FrozenPrefix, why_unsupported
from softcot_ds.models.loss import cross_entropy, token_losses
from softcot_ds.models.operations import Decoder
from softcot_ds.models.shared_prefix import SharedPrefix, common_prefix
from softcot_ds.recipe import Recipe


class SoftThoughts(Method):
    """The frozen base and the trained projection; the frozen assistant too, when thoughts are computed online.

    A method of this kind names its ``projection_class``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.needs_states = cls.projection_class.needs_states

    def __init__(
        self,
        base: PreTrainedModel,
        projection: Projection,
        assistant: PreTrainedModel | None = None,
        step: Literal["fast", "full"] = "fast",
        activation_checkpointing: bool = False,
        shared_ids: Sequence[int] = (),
        tokens: Iterable[int] | None = None,
        assistant_inputs: Sequence[AssistantInput] = (),
        conditioning: Conditioning | None = None,
        initial: InitialEmbeddings | None = None,
    ) -> None:
        """
        Args:
            shared_ids: tokens that every prefix begins with. Batches must leave out the first ``num_shared``.
            tokens: all that batches may hold, padding too; default: the whole vocabulary. Batches must name them by
                ``number``.
            assistant_inputs: all that the assistant may be given; it reads what they begin with once. Those that a
                cache is built from, so that thoughts are the same, bit for bit, as the cache's in the same batch.
            conditioning: what the projection is given in place of plain states.
            initial: what the assistant reads at placeholders, where a question has several sets of thoughts.
        """
        super().__init__(base, assistant)
        self.projection = projection
        self.conditioning = conditioning  # no buffers, which DeepSpeed would round to the dtype of the parameters
        # The base's own table may be partitioned: in every pass it would be gathered whole, 1 GB for Llama 3.1 8B, for
        # the few of its rows that the data holds, and no kernel could read it in place.
        self.table = CompactTable.of(
            base.get_input_embeddings(), range(vocabulary(base.config)) if tokens is None else tokens
        )
        self.embed = projection.fused_with(self.table) if self.table is not None else None
        self._shared: SharedPrefix | None = None
        self._shared_ids = tuple(shared_ids)
        self._assistant_inputs = assistant_inputs
        self.initial = initial
        self._thinker: Thinker | None = None
        self._decoders = [Decoder.of(model) for model in (base, assistant) if model is not None]
        self._checkpointing = activation_checkpointing
        self.prefixed: FrozenPrefix | None = None
        reason = why_unsupported(base) if step == "fast" else None
        if step == "fast" and reason is None:
            self.prefixed = FrozenPrefix(base, activation_checkpointing)
        else:
            self.use_full_step(reason)

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_conditioning(recipe, cls.projection_class)

    @classmethod
    def own_settings(cls, recipe: Recipe) -> dict[str, Any]:
        """What ``__init__`` takes of the recipe beside what all methods of this kind take."""
        return {}

    @classmethod
    def build(cls, given: Given) -> Self:
        recipe = given.recipe
        return cls(
            given.base,
            new_projection(cls.projection_class, recipe, given.widths, given.base),
            given.assistant,
            recipe.training.step,
            recipe.training.activation_checkpointing,
            common_prefix([example.prefix_ids for example in given.examples]),
            given.tokens,
            given.assistant_inputs,
            given.conditioning,
            **cls.own_settings(recipe),
        )

    @classmethod
    def num_trained(cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel) -> int:
        with torch.device("meta"):
            projection = cls.projection_class.empty(recipe, *widths)
        return sum(parameter.numel() for parameter in projection.parameters())

    @classmethod
    def shaped(
        cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel, checkpointing: bool, num_shared: int
    ) -> Self:
        with torch.device("meta"):
            projection = cls.projection_class.empty(recipe, *widths).to(base.dtype)
            conditioning = Conditioning.shaped(recipe.projection.condition, widths[0])
        settings = recipe.training.step, checkpointing, [0] * num_shared
        own = cls.own_settings(recipe)
        step = cls(base, projection, None, *settings, tokens=[0], conditioning=conditioning, **own)
        step.embed = None  # no values, no kernel
        return step

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.projection.named_parameters())

    def settled(self) -> Self:
        self.projection.to(device=device(), dtype=self.base.dtype)
        return self

    def adapter_weights(self, weights: Weights) -> Weights:
        """Those of a projection of plain states: what conditions the states is folded into them."""
        if self.conditioning is None:
            return weights
        folded = self.conditioning.fold(weights, self.projection.entry)
        return {name: value.float().cpu().contiguous() for name, value in folded.items()}

    def use_full_step(self, reason: str | None) -> None:
        """Run the full step from now on; ``reason`` is said: what keeps this base from the fast one."""
        if reason is not None and is_main():
            warnings.warn(f"{type(self.base).__name__} runs the full step: {reason}", stacklevel=3)
        if self.prefixed is not None:
            self.prefixed.remove()
        self.prefixed = None
        self._shared_ids = ()
        if self._checkpointing:
            checkpoint_layers(self.base)

    @property
    def num_shared(self) -> int:
        """I, how many of the shared tokens are read once. 0 where each batch reads them: in the full step, say."""
        return len(self._shared_ids)

    def number(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Tokens, int64 on the CPU, as batches must name them. Raises SoftCoTError for one that is not among
        ``tokens``."""
        return token_ids if self.table is None else self.table.number(token_ids)

    def train(self, mode: bool = True) -> Self:
        """Only the projection is ever in training mode: the frozen models have no dropout."""
        self.training = mode
        self.projection.train(mode)
        return self

    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """Cross entropy summed over the supervised tokens of the batch, in nats.

        A scalar in float32 (float64 for a float64 base). It is a sum because the mean is over the global batch, whose
        token count the caller knows.

        Args:
            per_token: give (K,) float64, the loss of each supervised token, instead; without gradient, as all their
                logits are held at once.

        Raises:
            SoftCoTError: an example is longer than the base's context.
        """
        self._read_shared(batch)
        return self._language_loss(batch, self._embeds(batch, self._given(batch)), per_token)

    def _read_shared(self, batch: Batch) -> None:
        """What is read once, in the first pass: not earlier, as then a model's split weights can be gathered;
        and before all else, so that later passes go the way that this one goes on.

        Raises:
            SoftCoTError: an example is longer than the base's context.
        """
        check_length(batch.longest, self.base)
        if self._shared is None and self._shared_ids:
            ids = torch.tensor(self._shared_ids, device=batch.suffix_ids.device)
            self._shared = self.prefixed.read_shared(ids)

    def _language_loss(self, batch: Batch, embeds_BSD: torch.Tensor, per_token: bool, chains: int = 1) -> torch.Tensor:
        """See ``forward``.

        Args:
            embeds_BSD: of ``_embeds``.
            chains: how many rows, one after another, have their prefix in common.
        """
        prefix_length = batch.prefix_ids.shape[1]
        loss_of = token_losses if per_token else cross_entropy
        if self.prefixed is None:
            logits_KV = full_logits(self.base, embeds_BSD, batch.prefix_mask, batch.predict_at, batch.longest)
            return loss_of(logits_KV, batch.targets)
        num_thoughts = embeds_BSD.shape[1] - prefix_length - batch.suffix_ids.shape[1]
        mask_BN, positions_BS = mask_and_positions(batch.prefix_mask, num_thoughts, batch.suffix_mask, self.num_shared)
        inputs = embeds_BSD, mask_BN, positions_BS, prefix_length, batch.predict_at
        if per_token:
            return token_losses(self.prefixed.logits(*inputs, self._shared, chains), batch.targets)
        return self.prefixed.loss(*inputs, batch.targets, self._shared, chains)

    def operations(self, batch: Batch) -> int:
        """Floating-point operations of the forward and backward pass over a batch, padding included; 0 where they are
        not known. What a run reads once and what activation checkpointing computes again do not count."""
        if None in self._decoders:
            return 0
        base, *assistant = self._decoders
        batch_size, prefix_length = batch.prefix_ids.shape
        num_thoughts, rows = len(batch.assistant[0].positions), batch_size * self.chains
        total = self.projection.operations(rows, num_thoughts)
        if self.conditioning is not None:
            total += self.conditioning.operations(rows * num_thoughts)
        if self.prefixed is None:
            total += base.train(rows, batch.longest, batch.longest) + base.train_head(rows * batch.longest)
        else:
            before, rest = self.num_shared + prefix_length, num_thoughts + batch.suffix_ids.shape[1]
            total += base.run(batch_size, prefix_length, before) + base.train(rows, rest, before + rest)
            total += base.train_head(len(batch.targets) * self.chains)
        if assistant and batch.thoughts is None:
            keys = max(item.positions[-1] + 1 for item in batch.assistant)
            skipped = self._thinker.prefix.length if self._thinker else 0
            total += assistant[0].run(rows, keys - skipped, keys)
        return total

    def thoughts(self, batch: Batch) -> torch.Tensor:
        """(B, T, D) projected thoughts, or (B, C, T, D) of C chains."""
        return self.projection(self._given(batch), len(batch.suffix_ids))

    def _given(self, batch: Batch) -> torch.Tensor | None:
        """What the projection is given: the assistant's states, (B, T, P) or (B, C, T, P), conditioned if they are to
        be; None where it needs none."""
        if not self.projection.needs_states:
            return None
        states = self._states(batch)
        return states if self.conditioning is None else self.conditioning(states)

    def _states(self, batch: Batch) -> torch.Tensor:
        """Assistant states, from the batch or from the assistant."""
        if batch.thoughts is not None:
            return batch.thoughts
        if self._thinker is None:  # in the first pass, as above
            self._thinker = Thinker.of(self.assistant, self._assistant_inputs, self.initial)
        return self._thinker(batch.assistant).to(batch.suffix_ids.device)

    def _embeds(self, batch: Batch, given_BTP: torch.Tensor | None) -> torch.Tensor:
        """(B, S, D) embeddings of the whole sequence, but for the shared tokens.

        The prefix is padded on the left and the suffix on the right, so that real tokens are adjacent.

        Args:
            given_BTP: of ``_given``, one set of thoughts for each row.
        """
        batch_size, prefix_length = batch.prefix_ids.shape
        numbers = torch.cat([batch.prefix_ids, batch.suffix_ids], dim=1)
        if self.embed is not None:
            slot_B = torch.full((batch_size,), prefix_length, dtype=torch.int64, device=numbers.device)
            return self.embed(given_BTP, numbers, slot_B)
        thoughts_BTD = self.projection(given_BTP, batch_size)  # first: a partitioned table is gathered meanwhile
        look_up = self.base.get_input_embeddings() if self.table is None else self.table
        prefix_BLD, suffix_BRD = look_up(numbers).tensor_split([prefix_length], dim=1)
        return torch.cat([prefix_BLD, thoughts_BTD.to(prefix_BLD.dtype), suffix_BRD], dim=1)


def new_projection(
    kind: type[Projection], recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel
) -> Projection:
    """A new projection in float32, initialized from the recipe's seed: the same on every rank.

    Raises:
        SoftCoTError: it has state that no checkpoint would hold.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(recipe.seed)
    projection = kind.create(recipe, widths[0], base, widths[1])
    torch.set_rng_state(generator_state)
    if lost := sorted(projection.state_dict().keys() - dict(projection.named_parameters()).keys()):
        raise SoftCoTError(
            f"method={recipe.method}: checkpoints hold parameters, and {', '.join(lost)} would be lost; make "
            "parameters of these buffers, or register them with persistent=False"
        )
    return projection


def mask_and_positions(
    prefix_mask_BL: torch.Tensor, num_thoughts: int, suffix_mask_BR: torch.Tensor, num_shared: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask (B, N), 0 on padding, and the positions (B, S) of a batch, int64."""
    batch_size = len(prefix_mask_BL)
    shared_BI = prefix_mask_BL.new_ones(batch_size, num_shared)
    thoughts_BT = prefix_mask_BL.new_ones(batch_size, num_thoughts)
    mask_BN = torch.cat([shared_BI, prefix_mask_BL, thoughts_BT, suffix_mask_BR], dim=1)
    positions_BS = (mask_BN.cumsum(dim=1) - 1).clamp(min=0)[:, num_shared:]
    return mask_BN.long(), positions_BS
