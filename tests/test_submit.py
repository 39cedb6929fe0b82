"""Scripts that ``softcot-ds submit`` makes of those in slurm/, without SLURM; test_slurm.py submits them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from softcot_ds import submit
from softcot_ds.cells import NO_GRID, Grid
from softcot_ds.chain import Submission, with_options
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    sizes = ["task.train_problems=20", "task.validation_problems=4", "task.test_problems=4"]
    return load_recipe(
        ROOT / "recipes/word_problems.yaml",
        [*sizes, f"output_dir={tmp_path}/with a space", f"cache.path={tmp_path}/c"],
    )


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (\S+)", script, flags=re.MULTILINE)


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / "slurm").glob("*.sh")], ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_options_replace_those_of_the_script_and_the_rest_stays():
    script = (ROOT / "slurm/train.sbatch").read_text()
    made = with_options(script, ["--nodes=3-4", "--exclusive", "--time=1:00:00"], "# made")
    assert made.startswith("#!/usr/bin/env bash\n# made\n#SBATCH ")
    before, after = options(script), options(made)
    kept = [option for option in before if not option.startswith(("--nodes=", "--time="))]
    assert sorted(after) == sorted([*kept, "--nodes=3-4", "--exclusive", "--time=1:00:00"])
    assert made.partition("SOFTCOT_HOME=")[2] == script.partition("SOFTCOT_HOME=")[2]


@pytest.mark.parametrize("option", ["-p", "gpu", "--nodes 2", "nodes=2"])
def test_options_that_sbatch_would_misread_are_refused(option):
    with pytest.raises(SoftCoTError, match="is no long option of sbatch"):
        with_options((ROOT / "slurm/train.sbatch").read_text(), [option], "# made")


def test_dry_run_shows_all_and_leaves_nothing(recipe, capsys, tmp_path):
    submit.submit(recipe, Submission(["--nodes=2"], tasks_per_node="4", dry_run=True))
    shown = capsys.readouterr().out
    for command in ("cache", "train", "evaluate"):
        assert f"#SBATCH --job-name=demo-{command}\n" in shown
    assert "#SBATCH --ntasks-per-node=4\n" in shown
    assert f"set -- '{tmp_path}/with a space/demo/recipe.yaml'\n" in shown
    assert shown.endswith(recipe.to_yaml())
    assert list(tmp_path.iterdir()) == []


def test_scripts_of_the_current_folder_win_over_those_shipped(recipe, monkeypatch, tmp_path, capsys):
    def home() -> str:
        submit.submit(recipe, Submission(["--nodes=2"], dry_run=True))
        (home,) = set(re.findall(r"^SOFTCOT_HOME=(.*)$", capsys.readouterr().out, flags=re.MULTILINE))
        return home

    monkeypatch.chdir(tmp_path)
    assert home() == str(ROOT)
    (tmp_path / "slurm").mkdir()
    assert home() == str(ROOT), "a folder of that name, but none of scripts"
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", dirs_exist_ok=True)
    assert home() == str(tmp_path)
    (tmp_path / "slurm/train.sbatch").unlink()
    with pytest.raises(SoftCoTError, match=rf"{tmp_path}/slurm/train.sbatch is missing"):
        home()


def test_jobs_are_given_the_steps_that_epochs_come_to(recipe, capsys):
    values = recipe.model_dump(mode="json")
    values["training"] |= {"steps": None, "epochs": 20, "global_batch_size": 8, "micro_batch_size": 8}
    submit.submit(parse_recipe(values, [], "test"), Submission(["--nodes=2"], dry_run=True))
    values["training"] |= {"steps": 40, "epochs": None}
    assert capsys.readouterr().out.endswith(parse_recipe(values, [], "test").to_yaml())


@pytest.mark.parametrize(
    ("options", "gpu", "warned"),
    [
        (["--nodes=2", "--gpus-per-node=4"], None, ""),
        (["--nodes=2-3", "--gpus-per-node=mine:4"], None, ""),
        (["--nodes=2", "--gpus-per-node=l4:4"], None, "warning: this will not fit on L4 GPUs: training"),
        (["--nodes=2", "--gpus-per-node=4"], "l4", "of which it has 22 GiB"),
    ],
)
def test_what_the_gpus_cannot_hold_is_told(recipe, capsys, options, gpu, warned):
    recipe.training.global_batch_size = 400_000
    recipe.training.micro_batch_size = 50_000 if warned else 4
    submit.submit(recipe, Submission(options, dry_run=True, gpu=gpu))
    shown = capsys.readouterr().out
    assert warned in shown
    assert ("warning" in shown) == bool(warned)


def test_without_slurm_it_says_so(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SoftCoTError, match="no sbatch here"):
        submit.submit(recipe, Submission(["--nodes=2"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("squeue", "said"),
    [("echo 'Unable to contact slurm controller' >&2; exit 1", "Unable to contact"), (None, "squeue")],
)
def test_queue_that_does_not_answer_is_not_taken_for_an_empty_one(recipe, monkeypatch, tmp_path, squeue, said):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": "echo 1", "squeue": squeue}.items():
        if text is not None:
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(SoftCoTError, match=rf"squeue does not say .*{said}"):
        submit.submit(recipe, Submission(["--nodes=2"]))
    assert not recipe.run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("refused", [None, 4])
def test_seeds_are_trained_side_by_side_and_evaluated_when_all_are(recipe, monkeypatch, tmp_path, capsys, refused):
    programs = tmp_path / "bin"
    programs.mkdir()
    said = f'echo "$@" >>{tmp_path}/said'
    count = f"$(wc -l <{tmp_path}/said)"
    refuse = f'[ "{count}" != {refused} ] || {{ echo "no such partition" >&2; exit 1; }}' if refused else ""
    for name, text in {"sbatch": f'{said}; {refuse}\necho "{count}"', "squeue": "", "scancel": said}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    grid = Grid.of(["seeds=7..8", "evaluation.thoughts=[4,2]"])
    folder = recipe.run_dir.parent
    asked = [("cache", "demo", ""), ("train", "demo-seed7", "1"), ("train", "demo-seed8", "1")]
    asked += [("evaluate", "demo", "2:3")]
    wanted = [
        f"--parsable --kill-on-invalid-dep=yes {f'--dependency=afterok:{after} ' if after else ''}"
        f"{folder}/{name}/slurm/{command}.sbatch"
        for command, name, after in asked
    ]
    if refused:
        with pytest.raises(SoftCoTError, match="no such partition"):
            submit.submit(recipe, Submission(["--nodes=2"]), grid)
        assert (tmp_path / "said").read_text().splitlines() == [*wanted, "1 2 3"], "what was submitted is cancelled"
        return
    submit.submit(recipe, Submission(["--nodes=2"]), grid)
    assert (tmp_path / "said").read_text().splitlines() == wanted
    assert "train     job 3 (demo-seed8) after job 1\nevaluate  job 4 after job 2, 3\n" in capsys.readouterr().out
    for command, name, _ in asked:
        script = (folder / name / "slurm" / f"{command}.sbatch").read_text()
        (line,) = re.findall(r"^set -- (.*)$", script, re.MULTILINE)
        path, *axes = shlex.split(line)
        assert path == str(folder / name / "recipe.yaml")
        assert Grid.of(axes) == {"evaluate": grid, "cache": grid.of_thoughts}.get(command, NO_GRID)
    for cell in grid.cells(str(folder / "demo" / "recipe.yaml")):
        trained = load_recipe(folder / cell.recipe.name / "recipe.yaml").flat()
        assert trained | {"evaluation.thoughts": cell.recipe.evaluation.thoughts} == cell.recipe.flat()


def test_data_mistakes_are_found_before_anything_is_submitted(recipe, tmp_path):
    recipe.task.validation_problems = 20
    with pytest.raises(SoftCoTError, match=r"task.validation_problems is 20"):
        submit.submit(recipe, Submission(["--nodes=2"]))
    assert list(tmp_path.iterdir()) == []
