"""Several evaluations in one command: what a command line asks for, and which recipes it comes to."""

import json

import pytest
from launch import ROOT

from softcot_ds import cache, doctor, evaluate, slurm, train
from softcot_ds.cells import Grid
from softcot_ds.errors import SoftCoTError
from softcot_ds.thoughts.reader import cached, open_cache

RECIPE = "recipes/word_problems.yaml"


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("overrides", "seeds", "thoughts", "plain"),
    [
        (["seed=3", "evaluation.thoughts=4"], (), (), ("seed=3", "evaluation.thoughts=4")),
        (["seeds=41..45", "name=x"], (41, 42, 43, 44, 45), (), ("name=x",)),
        (["seeds=[7, 3]"], (7, 3), (), ()),
        (["seeds=7"], (7,), (), ()),
        (["seeds=3..3"], (3,), (), ()),
        (["evaluation.thoughts=[4, 1]", "seeds=[0]"], (0,), (4, 1), ()),
        (["seeds=1..9", "seeds=[2]", "evaluation.thoughts=[1,2]", "evaluation.thoughts=3"], (2,), (), None),
    ],
)
def test_axes_are_taken_out_of_the_overrides_and_the_last_word_wins(overrides, seeds, thoughts, plain):
    grid = Grid.of(overrides)
    assert (grid.seeds, grid.thoughts) == (seeds, thoughts)
    assert bool(grid) == bool(seeds or thoughts)
    assert grid.plain == (("evaluation.thoughts=3",) if plain is None else plain)
    assert Grid.of([*grid.plain, *grid.axes]) == grid, "what a batch script hands on"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=45..41", "seeds=45..41 ends before it begins; write seeds=41..45"),
        ("seeds=0..99999999999", "seeds=0..99999999999 are 100,000,000,000 runs; name 1,000 at most"),
        ("seeds=a..b", "seeds=a..b: 'a..b' is no seed, a whole number from 0 on; write the first and the last, as in "),
        ("seeds=-1..3", "seeds=-1..3: '-1..3' is no seed"),
        ("seeds=-1", "seeds=-1: -1 is no seed"),
        ("seeds=[1, 2.5]", "2.5 is no seed"),
        ("seeds=[true]", "True is no seed"),
        ("seeds=[18446744073709551616]", "18446744073709551616 is no seed"),
        ("seeds=", "None is no seed"),
        ("seeds=[]", r"seeds=\[\] is empty; name at least one value, or leave it out"),
        ("seeds=[4, 2, 4]", "4 stands there more than once; name each once"),
        ("seeds=[1", "seeds=.1 is not a YAML value"),
        ("evaluation.thoughts=[]", r"evaluation.thoughts=\[\] is empty"),
        ("evaluation.thoughts=[2, 2]", "2 stands there more than once"),
        (
            "evaluation.thoughts=[null, 1]",
            "null is no number of thoughts, a whole one from 1 on; write",
        ),
        ("evaluation.thoughts=[1, true]", "more than once"),
        ("evaluation.thoughts=[2, 1.0]", "1.0 is no number of thoughts"),
    ],
)
def test_wrong_axes_are_refused_with_what_to_write(override, message):
    with pytest.raises(SoftCoTError, match=message):
        Grid.of([override])


def test_a_seed_beside_seeds_is_refused():
    with pytest.raises(SoftCoTError, match="seed=3 beside seeds: leave one of the two out"):
        Grid.of(["seed=3", "seeds=1..2"])


def test_cells_are_ordinary_recipes_of_runs_of_their_own_that_share_outputs(tmp_path):
    grid = Grid.of([f"output_dir={tmp_path}", "seeds=41..42", "evaluation.thoughts=[4,2]", "training.steps=50"])
    whole, cells = grid.recipe(RECIPE), grid.cells(RECIPE)
    assert (whole.name, whole.seed, whole.evaluation.thoughts) == ("demo", 0, None)
    assert [(cell.seed, cell.recipe.name, cell.recipe.evaluation.thoughts) for cell in cells] == [
        (41, "demo-seed41", 4),
        (41, "demo-seed41", 2),
        (42, "demo-seed42", 4),
        (42, "demo-seed42", 2),
    ]
    for cell in cells:
        changed = {key for key, value in cell.recipe.flat().items() if value != whole.flat()[key]}
        assert changed == {"name", "seed", "evaluation.outputs", "evaluation.thoughts"}
        assert cell.recipe.seed == cell.seed
        assert cell.recipe.evaluation.outputs == tmp_path / "demo" / "outputs"
    runs = grid.runs(whole)
    assert [run.run_dir for run in runs] == [tmp_path / "demo-seed41", tmp_path / "demo-seed42"]
    assert [run.flat() | {"evaluation.thoughts": 4} for run in runs] == [cell.recipe.flat() for cell in cells[::2]]
    assert [recipe.evaluation.thoughts for recipe in grid.counts(whole)] == [4, 2]
    assert Grid.of([]).runs(whole) == Grid.of([]).counts(whole) == [whole]
    own = Grid.of([f"evaluation.outputs={tmp_path}/kept", "seeds=[1]"]).cells(RECIPE)
    assert own[0].recipe.evaluation.outputs == tmp_path / "kept"
    (alone, _) = Grid.of(["evaluation.thoughts=[1,2]"]).cells(RECIPE)
    assert (alone.seed, alone.recipe.name, alone.recipe.evaluation.outputs) == (None, "demo", None)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (evaluate, ["seeds=5..1"], "seeds=5..1 ends before it begins; write seeds=1..5"),
        (
            evaluate,
            ["seeds=1..2", "evaluation.thoughts=[4,0]"],
            "thoughts=[4,0]: 0 is no number of thoughts",
        ),
        (evaluate, ["seeds=1..2", "training.stepz=3"], "training.stepz: unknown key; did you mean training.step"),
        (train, ["seeds=1..2"], "seeds: only on the command line of evaluate, cache or submit; a run has one seed"),
        (train, ["seed=41..45"], "seed: input should be a valid integer, found '41..45'; several are seeds=41..45 or"),
        (evaluate, ["seed=[41,42]"], "seed: input should be a valid integer, found [41, 42]; several are seeds="),
        (
            train,
            ["evaluation.thoughts=[1,2]"],
            "evaluation.thoughts: a list only on the command line of",
        ),
    ],
)
def test_mistakes_are_said_before_work_begins(capfd, command, arguments, message):
    assert command.main([RECIPE, *arguments]) == 2
    assert message in capfd.readouterr().err


def test_an_adapter_is_of_one_seed(tmp_path):
    with pytest.raises(SoftCoTError, match="is no recipe, and an adapter's is of one seed; seeds is for a recipe"):
        Grid.of(["seeds=1..2"]).recipe(str(tmp_path))


def test_yaml_reads_the_shared_folder_as_it_is_written(tmp_path):
    folder = tmp_path / "a: b # c 'd' \"e\""
    (cell,) = Grid.of([f"output_dir={json.dumps(str(folder))}", "seeds=1"]).cells(RECIPE)
    assert cell.recipe.evaluation.outputs == folder / "demo" / "outputs"


def test_batch_scripts_ask_with_the_arguments_of_their_command():
    for load in (slurm._load, lambda *arguments: doctor._load(*arguments)[0]):
        recipe = load(RECIPE, ["seeds=1..2", "evaluation.thoughts=[1,2]", "name=x"])
        assert (recipe.name, recipe.seed, recipe.evaluation.thoughts) == ("x", 0, None)


@pytest.mark.slow
def test_the_cache_of_several_counts_is_what_their_evaluations_read(tmp_path):
    sizes = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=6", f"cache.path={tmp_path}"]
    overrides = [*sizes, "seeds=1..2", "evaluation.thoughts=[2,4,3]"]
    assert cache.main([RECIPE, *overrides]) == 0
    found = []
    for cell in Grid.of(overrides).cells(RECIPE):
        found.append([of.thoughts.count for of, inputs in cached(cell.recipe) if open_cache(of, inputs)])
    assert found == [[4, 2], [4], [4, 3]] * 2
