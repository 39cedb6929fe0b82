"""What a step moves between ZeRO-3 ranks, counted where DeepSpeed hands it to the network."""

import json
import sys

import pytest
import torch
from launch import ROOT, run

pytestmark = pytest.mark.distributed


VARIANTS = ["full", "fast", "fast_checkpointed", "two_passes"]


@pytest.fixture(scope="module")
def found():
    script = ROOT / "benchmarks" / "zero3_traffic.py"
    chosen = ["--ranks", "2", "--variants", *VARIANTS, "--sizes", "8b", "--partitions", "zero3", "node", "tensor"]
    return json.loads(run([sys.executable, str(script), *chosen]).stdout.splitlines()[-1])


def test_fast_step_gathers_what_one_pass_gathers_before_it_is_asked_for_and_reduces_the_projection_alone(found):
    rows = found["2_ranks"]
    few_bytes = 20_000  # projection's bias, flags and norms; a layer has 1.8 million
    for name in ("full", "fast", "fast_checkpointed"):
        assert rows[name]["gathered"] == pytest.approx(rows[name]["arithmetic"], abs=few_bytes), name
        assert rows[name]["gathers"] == rows["full"]["gathers"], name
    assert rows["two_passes"]["gathered"] > 1.4 * rows["full"]["gathered"]
    for name in VARIANTS:
        assert rows[name]["reduced"] == pytest.approx(rows[name]["projection"], abs=100), name
    ahead, before = found["gathered_ahead"]["8b"], found["gathered_ahead_before"]["8b"]
    assert ahead["forward"] == ahead["backward"] == 1
    assert max(before["forward"], before["backward"]) < 0.7, "limits of a smaller model's layers do not do it"
    # The head, as large as 2.4 layers, beside the last layer; nothing of it is gathered in vain.
    assert 3.4 < ahead["most_layers"] <= ahead["expected_layers"] < 3.5
    assert before["most_layers"] <= before["expected_layers"]


def test_nothing_of_the_frozen_weights_crosses_nodes_that_hold_them_within(found):
    zero3, node, tensor = found["partitions"].values()
    assert node["frozen_bytes_between_nodes"] == node["loaded_bytes_between_nodes"] == 0
    assert zero3["frozen_bytes_between_nodes"] == zero3["frozen_bytes_within_nodes"] + node["frozen_bytes_within_nodes"]
    assert node["losses"] == zero3["losses"]
    assert node["trained"] == zero3["trained"]
    assert tensor["frozen_bytes_between_nodes"] == tensor["frozen_bytes_within_nodes"] == 0
    assert torch.tensor(tensor["losses"]).sum(dim=0).tolist() == pytest.approx(
        torch.tensor(zero3["losses"]).sum(dim=0).tolist(), rel=1e-5
    )
    assert tensor["activations_bytes_within_nodes"] > 0 == node["activations_bytes_within_nodes"]
    few_bytes = 10_000  # biases, and the norm of the gradient
    projection = 4 * 192 * 128
    for row in (zero3, node):  # gathered forward and backward, and its gradient
        assert row["trained_bytes_between_nodes"] == pytest.approx(3 * projection, abs=few_bytes)
