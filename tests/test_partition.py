"""What autograd keeps of weights that come and go."""

import pytest
import torch
from kept import Kept
from toy_models import make_toy

from softcot_ds.models.partition import comes_and_goes, keep_weights_by_name

BATCH, TOKENS = 2, 10


def run(model, embeds):
    """The logits, and what is held for the backward pass."""
    with Kept() as kept:
        logits = model(inputs_embeds=embeds, use_cache=False).logits
    return logits, kept


def gradient(logits, embeds):
    return torch.autograd.grad(logits.square().sum(), [embeds])[0]


def by_hand(config) -> int:
    """Bytes that a Llama's forward pass holds in float32: what frozen weights multiply is no part of it."""
    layer = 6 * config.hidden_size  # queries, keys, values, what attention gives, and what both norms read
    layer += 3 * config.intermediate_size  # gate, its SiLU, up
    layer += config.num_attention_heads + 2  # attention's sum for each head, the norms' roots
    rotary = 2 * config.head_dim // BATCH  # cosine and sine, the same for all rows
    rest = rotary + 1 + config.vocab_size  # and the last norm's root, and the logits
    return 4 * BATCH * TOKENS * (config.num_hidden_layers * layer + rest)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])  # nn.Linear, Conv1D, slices of all experts' weights
def test_no_values_of_weights_stay_until_the_backward_pass_whose_gradient_is_the_same(family):
    model = make_toy(family)
    embeds = torch.randn(BATCH, TOKENS, model.config.hidden_size, requires_grad=True)
    logits, kept = run(model, embeds)
    held, truth = kept.bytes(model), gradient(logits, embeds)
    if family == "llama":
        assert held == by_hand(model.config)
    del logits

    keep_weights_by_name(model)
    # Marked as DeepSpeed marks them, which takes their values after a pass, and brings them back for the next.
    values = [parameter.detach().clone() for parameter in model.parameters()]
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_persist, parameter.ds_zero_partition_world_size = number, False, 2
    logits, kept = run(model, embeds)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert kept.bytes(model) == held
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = value
    assert torch.equal(gradient(logits, embeds), truth)


@pytest.mark.parametrize(("ranks", "place", "comes"), [(1, None, False), (2, None, True), (1, "nvme", True)])
def test_a_whole_weight_that_lies_in_a_buffer_for_reading_comes_and_goes(ranks, place, comes):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.ds_id, weight.ds_persist, weight.ds_zero_partition_world_size = 0, False, ranks
    weight.ds_tensor = torch.zeros(3)
    weight.ds_tensor.final_location = place
    assert comes_and_goes(weight) == comes
