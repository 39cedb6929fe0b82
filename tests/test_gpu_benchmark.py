"""``make gpu`` loses nothing: parts that fail, hang or find no time left, and a machine without a GPU."""

import importlib
import json
import sys

import pytest
import torch
from launch import ROOT

HANGS = "import json, sys, time; json.dump({'rows': [1]}, open(sys.argv[1], 'w')); time.sleep(60)"
FAILS = "import sys; print('what went wrong'); sys.exit(3)"
WORKS = "import json, sys; json.dump({'speedup': 2.0, 'python': 'as below'}, open(sys.argv[1], 'w'))"
TESTS = """<testsuites><testsuite>
<testcase classname="a" name="x" time="2.5"/>
<testcase classname="a" name="y"><failure/></testcase>
<testcase classname="a" name="z"><skipped/></testcase>
</testsuite></testsuites>"""
WRITES_XML = f"import sys; open(sys.argv[1], 'w').write({TESTS!r})"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu")
    for name in ("_LEAST_SECONDS", "_GRACE_SECONDS"):
        monkeypatch.setattr(module, name, 0.3)
    return module


@pytest.mark.distributed
def test_every_part_is_kept_whatever_becomes_of_the_others(gpu, tmp_path, monkeypatch):
    programs = {"hangs": HANGS, "fails": FAILS, "works": WORKS, "tests": WRITES_XML}
    shares = {"hangs": 0.005}  # of five minutes, 1.5 s
    parts = {
        name: gpu.Part((sys.executable, "-c", text, "{out}"), shares.get(name, 1)) for name, text in programs.items()
    }
    monkeypatch.setattr(gpu, "describe", lambda: {"python": "3"})
    result, out = {"python": "3"}, tmp_path / "result.json"
    gpu.run_all(parts | {"late": gpu.Part(("none",), 0.0001)}, 5, result, out)
    found = json.loads(out.read_text())
    assert found["python"] == "3"
    hangs, fails, works, tests, late = found["parts"].values()
    assert hangs["rows"] == [1]
    assert "had" in hangs["stopped"]
    assert hangs["exit"] != 0
    assert fails["exit"] == 3
    assert fails["output_ends"] == "what went wrong\n"
    assert {key: works[key] for key in works if key != "seconds"} == {"exit": 0, "speedup": 2.0}
    assert tests["tests"] == {"passed": 1, "failure": 1, "skipped": 1}
    assert tests["failed"] == ["a::y"]
    assert tests["slowest"] == {"a::x": 2.5, "a::y": 0, "a::z": 0}
    assert "left_out" in late
    assert list(tmp_path.iterdir()) == [out]


def test_without_a_gpu_it_says_so_and_that_is_no_failure(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "result.json")])
    gpu.main()
    *said, last = capsys.readouterr().out.splitlines()
    assert said == ["No GPU is visible to PyTorch: nothing is measured. On a machine with one: make gpu"]
    assert json.loads(last)["gpu"] is None
    assert not any(tmp_path.iterdir())


def test_files_are_named_after_the_gpu(gpu):
    assert gpu.default_out("NVIDIA H100 80GB HBM3").name == "gpu-h100-80gb-hbm3.json"
