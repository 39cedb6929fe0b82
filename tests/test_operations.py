"""Operations as PyTorch's counter has them, product by product, in passes that are really run."""

import copy

import pytest
import torch
from test_step import FAMILIES, P, make_batch, make_model, make_projection
from torch.utils.flop_counter import FlopCounterMode
from toy_models import make_toy

from softcot_ds.data.prompts import AssistantInput
from softcot_ds.methods.prompt_tuning import StaticThoughts
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.models.operations import Decoder


def examples_of(lengths):
    """Random examples: numbers of tokens of prefix, suffix and target, with three thoughts each. The prefixes begin
    with the same four tokens."""
    generator = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(3, 48, (count,), generator=generator).tolist()

    return [
        ([5, 6, 7, 8, *ids(prefix)], torch.randn(3, P, generator=generator), ids(suffix), ids(target))
        for prefix, suffix, target in lengths
    ]


def counted(step: SoftThoughts, batch) -> int:
    """What PyTorch counts in a forward and backward pass, but for the angles of rotary embeddings."""
    step.embed = None  # the fused kernel is one operation to PyTorch, which does not look into it
    step(batch)  # what a run reads once is read
    with FlopCounterMode(display=False) as counter:
        step(batch).backward()
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_both_steps_are_those_that_pytorch_counts(family):
    # PyTorch does not count its fused attention for CPUs; in eager attention there are only products of matrices.
    model = make_model(family, attn_implementation="eager")
    examples = examples_of([(9, 2, 5), (4, 1, 7), (7, 3, 1)])
    for kind, shared in (("fast", []), ("fast", [5, 6, 7]), ("full", [])):
        step = SoftThoughts(copy.deepcopy(model), make_projection(), None, kind, shared_ids=shared)
        batch = make_batch(examples, torch.float32, num_shared=len(shared))
        assert step.operations(batch) == counted(step, batch), f"{kind}, {len(shared)} shared tokens"


def test_the_fast_step_does_less_and_static_thoughts_take_no_product():
    model = make_model("llama eager")
    examples = examples_of([(30, 2, 5), (28, 1, 7)])
    batch = make_batch(examples, torch.float32)
    fast, full = (SoftThoughts(copy.deepcopy(model), make_projection(), None, kind) for kind in ("fast", "full"))
    assert fast.operations(batch) < 0.75 * full.operations(batch)
    static = SoftThoughts(copy.deepcopy(model), StaticThoughts(torch.randn(3, model.config.hidden_size)), None)
    assert static.operations(batch) == counted(static, batch)


def test_the_assistant_counts_where_it_runs_in_the_step():
    base, assistant = make_model("llama eager"), make_model("qwen2", hidden_size=P, attn_implementation="eager")
    batch = make_batch(examples_of([(9, 2, 5), (4, 1, 7)]), torch.float32)
    batch.assistant = [  # five tokens are shared, four and two more stand before the thoughts
        AssistantInput("a", [5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 0, 0, 14], [9, 10, 11]),
        AssistantInput("b", [5, 6, 7, 8, 9, 15, 16, 0, 0, 0], [7, 8, 9]),
    ]
    step = SoftThoughts(base, make_projection(), assistant, assistant_inputs=batch.assistant)
    from_cache = step.operations(batch)
    assert from_cache == counted(step, batch)
    batch.thoughts = None
    online = counted(step, batch)
    assert step.operations(batch) == online > from_cache


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt2", "mamba", "diffllama", "gemma3n_text"]
)
def test_what_is_not_plain_is_not_counted(family):
    """Experts, attention in a latent space or with two softmaxes, no attention: the formula would be wrong."""
    assert Decoder.of(make_toy(family)) is None


def test_step_of_a_base_that_is_not_counted_says_nothing():
    toy = make_toy("mixtral")
    step = SoftThoughts(toy, StaticThoughts(torch.randn(3, toy.config.hidden_size)))
    assert step.operations(make_batch(examples_of([(9, 2, 5)]), torch.float32)) == 0
