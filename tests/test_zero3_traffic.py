"""What a step moves between ZeRO-3 ranks, counted where DeepSpeed hands it to the network."""

import json
import sys

import pytest
from launch import ROOT, run

pytestmark = pytest.mark.distributed


def test_fast_step_gathers_what_one_pass_gathers_and_reduces_the_projection_alone():
    variants = ["full", "fast", "fast_checkpointed", "two_passes"]
    script = ROOT / "benchmarks" / "zero3_traffic.py"
    done = run([sys.executable, str(script), "--ranks", "2", "--variants", *variants])
    rows = json.loads(done.stdout.splitlines()[-1])["2_ranks"]
    few_bytes = 20_000  # projection's bias, flags and norms; a layer has 1.8 million
    for name in ("full", "fast", "fast_checkpointed"):
        assert rows[name]["gathered"] == pytest.approx(rows[name]["arithmetic"], abs=few_bytes), name
        assert rows[name]["gathers"] == rows["full"]["gathers"], name
    assert rows["two_passes"]["gathered"] > 1.4 * rows["full"]["gathered"]
    for name in variants:
        assert rows[name]["reduced"] == pytest.approx(rows[name]["projection"], abs=100), name
