"""Ranks that a command starts itself. What they run is a script in the place of Python, which takes no time."""

import os
import signal
import stat
import threading
import time
from types import SimpleNamespace

import pytest

from softcot_ds import launch
from softcot_ds.command import recipe_command, run_command
from softcot_ds.errors import SoftCoTError

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Has ranks run a shell script, in the folder of the test, on a machine that has so many GPUs."""

    def become(script: str, gpus: int = 0) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        program = tmp_path / "python"
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(launch, "sys", SimpleNamespace(executable=str(program)))
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    return become


def test_each_rank_is_told_who_it_is_and_what_to_run(ranks, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    ranks('echo "$LOCAL_RANK/$WORLD_SIZE/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS $@" > $RANK')
    launch.launch("train", ["recipe.yaml", "name=a b"], 3)
    lines = [(tmp_path / str(rank)).read_text().split(maxsplit=2) for rank in range(3)]
    assert [place for place, _, _ in lines] == ["0/3/3", "1/3/3", "2/3/3"]
    assert len({where for _, where, _ in lines}) == 1
    assert {rest for _, _, rest in lines} == {"2 -m softcot_ds.train recipe.yaml name=a b\n"}


def test_others_end_when_one_fails_and_its_code_is_that_of_the_command(ranks):
    ranks("[ $RANK = 1 ] && exit 2\nexec sleep 60")
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        launch.launch("train", [], 3)
    assert ended.value.code == 2
    assert time.monotonic() - began < 30


def test_a_killed_rank_is_named(ranks, capfd):
    ranks("[ $RANK = 1 ] && kill -9 $$\nexec sleep 60")
    assert run_command(lambda: launch.launch("train", [], 2)) == 3
    assert "rank 1 was killed by SIGKILL, as the system does when memory runs out. The same" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals_that_only_the_command_has_reach_the_ranks_which_have_the_last_word(ranks, capfd, monkeypatch, number):
    monkeypatch.setattr(launch, "_PATIENCE_S", 0.1)
    ranks(f'trap "echo rank $RANK saves; exit {128 + number}" {number}\n> ready$RANK\nwhile true; do sleep 0.05; done')

    def send() -> None:
        while not (os.path.exists("ready0") and os.path.exists("ready1")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: launch.launch("train", [], 2))
    assert ended.value.code == 128 + number
    out, err = capfd.readouterr()
    assert "saves" in out
    assert err == ""


@pytest.mark.parametrize(
    ("gpus", "environment", "message"),
    [
        (
            1,
            {"CUDA_VISIBLE_DEVICES": "3"},
            "--gpus 2, and this machine has 1 GPU in CUDA_VISIBLE_DEVICES=3; write --gp",
        ),
        (4, {"RANK": "0"}, r"a launcher has done so already \(RANK=0\): leave one of the two out"),
        (4, {"SLURM_STEP_NUM_TASKS": "2"}, r"a launcher has done so already \(SLURM_STEP_NUM_TASKS=2\)"),
    ],
)
def test_what_there_are_no_gpus_for_or_a_launcher_does_is_refused(ranks, monkeypatch, gpus, environment, message):
    ranks("echo started; exit 1", gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SoftCoTError, match=message):
        launch.launch("train", [], 2)


def test_a_command_checks_its_recipe_and_starts_its_ranks(monkeypatch, capfd):
    started, worked = [], []
    monkeypatch.setattr("softcot_ds.command.launch", lambda *arguments: started.append(arguments))
    main = recipe_command("train", "Train.", worked.append)
    recipe = "recipes/gsm8k_llama_8b.yaml"
    assert main([recipe, "--gpus", "2", "seed=4"]) == 0
    assert (started, worked) == ([("train", [recipe, "seed=4"], 2)], [])
    assert main([recipe, "--gpus=2", "seed=x"]) == 2
    assert "1 mistake in the recipe" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([recipe, "--gpus=0"])
    assert "argument --gpus: a number from 1 on, found '0'" in capfd.readouterr().err
    assert len(started) == 1
