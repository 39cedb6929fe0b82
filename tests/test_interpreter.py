"""Kernels where there is no GPU: Triton's interpreter runs them."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from launch import ROOT

FILES = ["test_thought_embedding.py"]
if find_spec("liger_kernel"):
    FILES += ["test_fused_layers.py", "test_loss.py"]


@pytest.mark.distributed
def test_every_claim_about_kernels_holds_in_the_interpreter():
    """Triton decides on it when it is imported: in a process of its own, which runs these files again."""
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *FILES]
    variables = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT / "tests", env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    for name in FILES:
        assert f"PASSED {name}::" in process.stdout
