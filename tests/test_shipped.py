"""What comes beside the code is found in any folder, from a checkout and from a wheel."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch import ROOT

from softcot_ds import cli
from softcot_ds.files import read_yaml
from softcot_ds.recipe import load_recipe
from softcot_ds.schema import recipe_schema
from softcot_ds.settings import WrongSettings
from softcot_ds.shipped import FOLDERS, found

RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_file_of_the_current_folder_wins_over_the_one_shipped():
    name = Path("recipes/word_problems.yaml")
    assert found(name) == ROOT / name
    assert load_recipe(name, ["name=other"]).name == "other"
    name.parent.mkdir()
    name.write_text("name: mine\n")
    assert found(name) == name
    with pytest.raises(WrongSettings, match="task: missing"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("word_problems", "recipes/word_problems.yaml"),
        ("paper/aqua_llama_8b", "recipes/paper/aqua_llama_8b.yaml"),
        ("embedded_pair", "studies/embedded_pair.yaml"),
    ],
)
def test_folder_and_ending_may_be_left_out_where_nothing_here_has_that_name(name, meant):
    assert found(Path(name)) == ROOT / meant
    Path(name).mkdir(parents=True)
    assert found(Path(name)) == Path(name)


@pytest.mark.parametrize("name", ["word_problems", "paper/aqua_llama_8b", "mine"])
def test_a_name_without_folder_and_ending_means_what_lies_here_before_what_is_shipped(name):
    for there in (Path("recipes", f"{name}.yaml"), Path(f"{name}.yaml")):
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()
        assert found(Path(name)) == there


def test_the_copy_of_init_is_what_its_name_means(capsys):
    assert cli.main(["init", "word_problems"]) == 0
    Path("word_problems.yaml").write_text("name: mine\nmistake: 1\n")
    assert cli.main(["plan", "word_problems"]) == 2
    assert "error: word_problems.yaml: 4 mistakes in the recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        ("train", "embedded_pair", "is a study, and a recipe is"),
        ("study", "word_problems", "is a recipe, and a study is"),
    ],
)
def test_a_study_is_no_recipe_and_a_recipe_no_study(command, name, said, capsys):
    assert cli.main([command, name]) == 2
    assert f"{name}.yaml {said} wanted here; softcot-ds recipes lists both" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["setup.py", "recipes/nothing.yaml", "recipes", "", "recipes/../setup.py/x", "a\0b"])
def test_nothing_else_is_looked_for_elsewhere(name):
    assert found(Path(name)) == Path(name)


def test_settings_that_name_a_shipped_file_have_it():
    named = "ds_configs/zero3_cpu_offload.json"
    recipe = load_recipe(RECIPES[0], ["backbone.partition=zero3", f"backbone.deepspeed={named}"])
    assert recipe.backbone.deepspeed == ROOT / named
    assert load_recipe("recipes/word_problems.yaml").backbone.deepspeed_path() == ROOT / "ds_configs/zero3.json"


def test_recipes_are_listed_a_line_each(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    studies = [str(path.relative_to(ROOT)) for path in (ROOT / "studies").glob("*.yaml")]
    assert sorted(line.split()[0] for line in lines) == sorted([*RECIPES, *studies])
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


@pytest.mark.parametrize(
    ("name", "copied"),
    [
        ("recipes/word_problems.yaml", "recipes/word_problems.yaml"),
        ("paper/aqua_llama_8b", "recipes/paper/aqua_llama_8b.yaml"),
        ("embedded_pair", "studies/embedded_pair.yaml"),
        ("slurm/", "slurm"),
        ("softcot_ds/tasks/gsm8k.yaml", "softcot_ds/tasks/gsm8k.yaml"),
    ],
)
def test_init_copies_what_is_shipped_and_overwrites_nothing(name, copied, tmp_path, capsys):
    def content(path):
        return {file.relative_to(path): file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}

    assert cli.main(["init", name, "a/b"]) == 0
    target = tmp_path / "a/b" / os.path.basename(copied)
    assert capsys.readouterr().out == f"{target.relative_to(tmp_path)}\n"
    assert content(target) == content(ROOT / copied) != {}
    mine = target if target.is_file() else target / "environment.sh"
    mine.write_text("mine")
    assert cli.main(["init", name, "a/b"]) == 2
    assert "is there already, and stays as it is" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["word_problem"], "is called 'word_problem'; did you mean recipes/word_problems.yaml?"),
        (["setup.py"], "is called 'setup.py'"),
        (["slurm", "a file/b"], "cannot write to a file/b"),
    ],
)
def test_init_says_what_is_wrong(arguments, said, tmp_path, capsys):
    (tmp_path / "a file").touch()
    assert cli.main(["init", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_the_schema_takes_every_recipe_and_refuses_what_commands_refuse(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in RECIPES:
        values = load_recipe(name).model_dump(mode="json")
        validator.validate(values)
        validator.validate(read_yaml(ROOT / name))
    for key, wrong in {"learning_rat": 1.0, "steps": "12", "schedule": "cosin", "betas": [0.9], "epochs": 0}.items():
        with pytest.raises(WrongSettings):
            load_recipe(RECIPES[0], [f"training.{key}={json.dumps(wrong)}"])
        assert not validator.is_valid(values | {"training": {key: wrong}}), key
    for right in (
        {"method": "lora"},
        {"evaluation": {"strategy": "speculative"}},
        {"projection": {"init_scale": "auto"}},
    ):
        assert validator.is_valid(values | right)
    for wrong in ({"method": "lor"}, {"evaluation": {"strategy": "speculativ"}}, {"projection": {"init_scale": "aut"}}):
        assert not validator.is_valid(values | wrong)


def test_the_schema_explains_the_keys():
    sections = recipe_schema()["$defs"]
    assert sections["TrainingConfig"]["properties"]["log_every"]["description"].startswith("Steps between two points")


IN_AN_EMPTY_FOLDER = """
import sys
from pathlib import Path
import softcot_ds
from softcot_ds import cli
from softcot_ds.chain import Job, Submission
from softcot_ds.recipe import load_recipe
from softcot_ds.study_config import load_study

site = Path(sys.argv[1])
assert site in Path(softcot_ds.__file__).parents
for name in sys.argv[2:]:
    assert site in load_recipe(name).backbone.deepspeed_path().parents
study = load_study("studies/embedded_pair.yaml")
assert len(study.cells) > 1
(script,) = Submission(["--nodes=2"]).scripts([Job.of("train", study.cells[0].recipe)]).values()
home = Path(script.split("SOFTCOT_HOME=")[1].splitlines()[0])
assert site in home.parents and (home / "slurm/environment.sh").is_file()
assert cli.main(["recipes"]) == cli.main(["init", "word_problems"]) == 0
assert not {"torch", "deepspeed"} & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_wheel_has_all_that_is_shipped_and_finds_it(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    places = {name: place for name in listed.stdout.splitlines() if (place := place_in_wheel(name)) is not None}
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    for name in [*places, "setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)  # as pip does
    there = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert {name for name in there if ".dist-info/" not in name} == set(places.values())
    assert all((site / place).read_bytes() == (ROOT / name).read_bytes() for name, place in places.items())
    empty.mkdir()
    command = [sys.executable, "-c", IN_AN_EMPTY_FOLDER, site, *RECIPES]
    subprocess.run(command, cwd=empty, env=os.environ | {"PYTHONPATH": str(site)}, check=True)
    assert (empty / "word_problems.yaml").read_bytes() == (ROOT / "recipes/word_problems.yaml").read_bytes()


def place_in_wheel(name: str) -> str | None:
    """Where a file of the checkout is to be; None for what is not to be in it."""
    top = name.partition("/")[0]
    if top in FOLDERS:
        return f"softcot_ds/share/{name}"
    if top in ("softcot_ds", "kernels"):
        return None if name.endswith(".md") else name.removeprefix("kernels/")
    return None
