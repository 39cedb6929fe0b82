"""DeepSpeed's limits against counts by hand: how far ahead it gathers, and how much of it is there at a time."""

from itertools import pairwise

import pytest
from toy_models import make_config
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from softcot_ds.models.backbone import empty_model
from softcot_ds.models.limits import Gathers, Limits, buffers, derive, most_gathered
from softcot_ds.models.partition import derived_limits, gathers_of, make_layers_leaves, short_limits, with_limits

STAYS = 40
"""Elements of the largest weight that is never let go: all norms here."""
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": STAYS}
BUCKET, LIVE, REUSE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"
D, MLP, V = 32, 48, 96
TABLE = V * D


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    model = empty_model(config)
    make_layers_leaves(model)
    return model


def llama(**settings) -> PreTrainedConfig:
    sizes = {"hidden_size": D, "intermediate_size": MLP, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, vocab_size=V, **settings)


def limits_of(*models: PreTrainedModel, **zero) -> dict[str, int]:
    return derived_limits({"zero_optimization": ZERO3 | zero}, *models)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.numel() > STAYS)


DENSE = D * D + 2 * D * (D // 2) + D * D + 3 * D * MLP


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_is_gathered_ahead_and_the_last_stays_until_the_head_has_run(tied):
    model = model_of(llama(tie_word_embeddings=tied))
    assert limits_of(model) == {BUCKET: DENSE, LIVE: 2 * DENSE, REUSE: TABLE + DENSE}
    assert limits_of(model, stage3_param_persistence_threshold=D - 1)[BUCKET] == DENSE + 2 * D, "norms that come and go"
    gathers = gathers_of(model, STAYS)
    assert (gathers.sums, gathers.table, gathers.head) == ([DENSE] * 3, TABLE, TABLE)


def test_all_experts_of_a_layer_are_gathered():
    config = make_config("qwen3_moe")
    model = model_of(config)
    experts = config.num_experts * (3 * config.moe_intermediate_size + 1) * D  # and their row of the router
    layer = experts + count(model.model.layers[0].self_attn)
    assert layer > 1.5 * count(model.model.layers[0].self_attn)
    assert (limits_of(model)[BUCKET], limits_of(model)[LIVE]) == (layer, 2 * layer)


def test_where_layers_differ_the_largest_and_the_largest_neighbours_decide():
    model = model_of(make_config("lfm2_moe"))
    layers = [count(layer) for layer in model.model.layers]
    assert len(set(layers)) == 3
    neighbours = max(layers[0] + layers[1], layers[1] + layers[2], layers[2] + layers[0])
    assert limits_of(model) == {BUCKET: max(layers), LIVE: neighbours, REUSE: TABLE + min(layers)}


def test_models_without_a_list_of_layers_are_gathered_module_by_module():
    model = model_of(make_config("gpt2"))
    modules = [sum(p.numel() for p in m.parameters(recurse=False) if p.numel() > STAYS) for m in model.modules()]
    rest = [size for size in modules if size and size != TABLE]  # table and head are one weight, and asked for twice
    limits = limits_of(model)
    assert (limits[BUCKET], limits[LIVE]) == (max(rest), max(map(sum, pairwise([*rest, rest[0]]))))


def test_two_models_of_one_step_share_the_limits():
    small, large = model_of(llama()), model_of(make_config("qwen3_moe"))
    assert limits_of(small, large)[BUCKET] == limits_of(large)[BUCKET] > limits_of(small)[BUCKET]
    # Where the one ends, the other's first layer is gathered ahead.
    assert derive([Gathers(((9,),), 0, 5), Gathers(((2,),), 0, 7)]) == Limits(9, 11, 14)


def test_what_a_configuration_sets_stays():
    model = model_of(llama())
    for key in (LIVE, LIVE.removeprefix("stage3_")):  # DeepSpeed takes both names
        zero = with_limits({"zero_optimization": ZERO3 | {key: 7}}, model)["zero_optimization"]
        assert zero.keys() == ZERO3.keys() | {BUCKET, REUSE, key}
        assert zero[key] == 7
    replicated = {"zero_optimization": {"stage": 1}}
    assert with_limits(replicated, model) == replicated


def test_what_a_configuration_sets_against_gathering_ahead_is_found():
    model = model_of(llama())

    def short(**zero):
        return short_limits({"zero_optimization": ZERO3 | zero}, model)

    assert short() == short(stage3_prefetch_bucket_size=DENSE, stage3_max_live_parameters=10**9) == {}
    assert short(stage3_prefetch_bucket_size=DENSE - 1) == {BUCKET: (DENSE - 1, DENSE)}
    assert short(max_live_parameters=0, overlap_comm=False) == {LIVE: (0, 2 * DENSE), "overlap_comm": (False, True)}
    assert short(offload_param={"device": "nvme", "buffer_size": 3000}) == {"buffer_size": (3000, TABLE)}


def test_nvme_has_a_buffer_for_each_weight_that_is_live_or_read():
    model = model_of(llama())
    offload = {"device": "nvme", "nvme_path": "/disk"}
    found = with_limits({"zero_optimization": ZERO3 | {"offload_param": offload}}, model)["zero_optimization"]
    # A layer has seven weights. All of two but the first one, and three of the next: 2 x DENSE + 1,024, and one of
    # 1,536 may go beyond the limit. A layer that is read meanwhile; table and head.
    assert found["offload_param"] == offload | {"buffer_count": 6 + 7 + 3 + 7 + 2, "buffer_size": TABLE}
    own = with_limits({"zero_optimization": ZERO3 | {"offload_param": offload | {"buffer_count": 3}}}, model)
    assert own["zero_optimization"]["offload_param"]["buffer_count"] == 3
    gathers = gathers_of(model, STAYS)
    assert buffers(gathers, derive([gathers]), ranks=5)[1] == 615, "a fifth of 3,072, rounded up"


@pytest.mark.parametrize(
    ("head", "limits", "most"),
    [
        (5, Limits(10, 20, 15), 19 + 6),  # the last weight goes beyond the limit
        (30, Limits(10, 20, 40), 10 + 30),  # the last layer beside the head
        (30, Limits(10, 21, 40), 20 + 30),  # room to ask for the head one layer earlier
        (30, Limits(10, 20, 41), 20 + 30),  # or two layers stay
        (5, Limits(0, 20, 0), 10),  # nothing ahead
        (5, Limits(10, 0, 0), 10),
        (5, Limits(10, 10**9, 10**9), 10**9 + 5),
    ],
)
def test_what_is_gathered_at_most_under_any_limits(head, limits, most):
    model = Gathers(((4, 6),) * 8, 7, head)
    assert most_gathered([model], limits) == most
