"""Ranks that differ do not train; processes that do not know of each other neither."""

import os
from pathlib import Path

import pytest
from forked import run_forked
from launch import ROOT, environment

from softcot_ds import agreement
from softcot_ds.agreement import agree
from softcot_ds.distributed import init_distributed
from softcot_ds.errors import SoftCoTError
from softcot_ds.lock import sole_owner

RECIPE = ROOT / "recipes" / "word_problems.yaml"


def ranks_saying(monkeypatch, *facts: dict) -> None:
    """As many ranks as facts, two on each node."""
    everyone = [agreement._Rank(number, f"node{number // 2}", said) for number, said in enumerate(facts)]
    monkeypatch.setattr(agreement, "from_all_ranks", lambda _: everyone)


def test_what_differs_is_named_with_who_has_which(monkeypatch):
    ranks_saying(
        monkeypatch, *3 * [{"seed": 0, "torch": "2.13"}], {"seed": 1, "torch": "2.13"}, {"seed": 0, "torch": "9"}
    )
    with pytest.raises(SoftCoTError) as refused:
        agree({})
    assert "  - seed: 0 on node0, rank 2 (node1), node2; 1 on rank 3 (node1)" in str(refused.value)
    assert "  - torch: 2.13 on node0, node1; 9 on node2" in str(refused.value)


def test_rank_that_has_not_looked_agrees_with_those_that_have(monkeypatch):
    ranks_saying(monkeypatch, {"weights": "a"}, {}, {"weights": "a"}, {})
    agree({})
    ranks_saying(monkeypatch, {"weights": "a"}, {}, {"weights": "b"}, {})
    with pytest.raises(SoftCoTError, match=r"weights: a on node0; b on node1"):
        agree({})


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    run_forked(2, "agreement_worker", folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("recipe", ["training.learning_rate: 0.001 on rank 0 (", "; 0.5 on rank 1 (", "seed: 0 on rank 0 ("]),
        ("code", ["the code of softcot-ds: ", "other on rank 1 ("]),
        ("data", ["the training data: ", "on rank 1 ("]),
        ("never", ["step-10/optimizer.safetensors: ", "No such file or directory on rank 1 ("]),
        ("other", ["step-10/optimizer.safetensors: ", "on rank 1 ("]),
    ],
)
def test_ranks_that_differ_are_all_told_the_same(begun, case, said):
    first, second = ((begun / f"{case}.{rank}").read_text() for rank in (0, 1))
    assert first == second
    for text in ["the ranks do not agree", *said]:
        assert text in first
    assert first.count("  - ") == {"recipe": 2, "never": 6}.get(case, 1 if case != "data" else first.count("data: "))
    assert not (begun / case / "demo/recipe.yaml").exists(), "the run's directory is as it was"


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "step"), [("same", "None"), ("older", "step-10"), ("late", "step-10")])
def test_rank_0_chooses_for_all_and_what_shows_late_is_waited_for(begun, case, step):
    for rank in (0, 1):
        assert (begun / f"{case}.{rank}").read_text().endswith(step)


@pytest.mark.parametrize(
    "env", [{"SLURM_STEP_NUM_TASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}, {"SLURM_PROCID": "1"}]
)
def test_one_of_several_processes_that_torch_does_not_know_is_refused(monkeypatch, env):
    for name in [name for name in os.environ if name not in environment()]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (text,) = (f"{name}={value}" for name, value in env.items())
    with pytest.raises(SoftCoTError, match=f"{text}, but this process knows of no others.*deepspeed --module"):
        init_distributed(1)


@pytest.mark.distributed
def test_second_training_in_a_directory_is_refused(tmp_path):
    arguments = [RECIPE, f"output_dir={tmp_path}", "training.timeout_minutes=0.1"]
    with sole_owner(tmp_path / "demo/train.lock", "training", print):
        done = run_forked(1, "softcot_ds.train", *arguments, check=False)
    assert done.returncode == 2
    assert "another training (" in done.stdout
    assert f"process {os.getpid()}, since" in done.stdout
    assert "Traceback" not in done.stdout
    assert os.listdir(tmp_path / "demo") == ["train.lock"]
