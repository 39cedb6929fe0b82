"""A study: which cells a file comes to, what is done for them and how often, and what an interruption changes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from adapters import make_adapter, make_checkpoint
from forked import run_forked
from launch import ROOT

from softcot_ds import doctor, slurm
from softcot_ds import study as command
from softcot_ds.errors import Interrupted, SoftCoTError
from softcot_ds.evaluation import grid, jobs
from softcot_ds.evaluation.grid import Evaluated
from softcot_ds.evaluation.report import Scores
from softcot_ds.evaluation.statistics import holm, over_seeds
from softcot_ds.evaluation.study import make_study_report
from softcot_ds.evaluation.study_page import learning_curve, write_page
from softcot_ds.evaluation.words import study_table
from softcot_ds.files import dump_yaml
from softcot_ds.recipe import load_recipe
from softcot_ds.study_config import load_study

SMALL = {
    "thoughts.source": "online",
    "projection": {"condition": "none", "init_scale": 0.27},
    "task": {"train_problems": 8, "validation_problems": 0, "test_problems": 12},
    "training": {"steps": 1, "warmup_steps": 0, "global_batch_size": 8, "micro_batch_size": 8},
    "evaluation": {"conditions": ["learned", "shuffled", "none"], "max_new_tokens": 4},
}
STUDY = {
    "recipe": "recipes/word_problems.yaml",
    "overrides": SMALL,
    "seeds": "5..6",
    "methods": {"softcot": {}, "tuned": {"method": "prompt_tuning", "training": {"learning_rate": 0.3}}},
    "strategies": {"greedy": {}, "sampled": {"evaluation": {"temperature": 1.0, "conditions": ["learned", "none"]}}},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a study's file, with what is to be different in it, and gives its path."""
    monkeypatch.chdir(ROOT)

    def write(**changed):
        path = tmp_path / "study.yaml"
        path.write_text(dump_yaml(STUDY | {"output_dir": str(tmp_path / "runs")} | changed))
        return str(path)

    return write


def test_cells_are_ordinary_recipes_that_differ_in_what_the_study_says(written, tmp_path):
    study = load_study(written())
    whole = study.cells[0].recipe
    assert len(study.cells) == 2 * 2 * 2
    for cell in study.cells:
        recipe = cell.recipe
        assert recipe.name == f"study-own-{cell.method}-seed{cell.seed}"
        assert (recipe.seed, recipe.output_dir) == (cell.seed, tmp_path / "runs")
        assert recipe.evaluation.outputs == tmp_path / "runs" / "study" / "outputs"
        assert recipe.method == {"softcot": "softcot", "tuned": "prompt_tuning"}[cell.method]
        assert recipe.training.learning_rate == {"softcot": 1e-3, "tuned": 0.3}[cell.method]
        assert recipe.evaluation.temperature == {"greedy": 0, "sampled": 1}[cell.strategy]
        changed = {key for key, value in recipe.flat().items() if value != whole.flat()[key]}
        assert changed <= {"name", "seed", "method", "training.learning_rate"} | {
            f"evaluation.{key}" for key in ("temperature", "conditions")
        }
    trained = [cell.recipe for cell in study.trainings]
    assert [one.name for one in trained] == list(dict.fromkeys(cell.recipe.name for cell in study.cells))
    assert {one.evaluation.temperature for one in trained} == {0}, "a strategy changes nothing of a training"


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_studies_that_are_shipped_are_right(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_study(path).trainings


def test_a_task_that_nothing_is_trained_on_takes_adapters_of_another(written):
    tasks = {
        "first": {"overrides": {"task.train_problems": 16, "task.validation_problems": 8}},
        "second": {"trained_on": "first", "overrides": {"task.name": "word_choices", "task.test_problems": 5}},
    }
    study = load_study(written(tasks=tasks, without=[{"method": "tuned", "task": "second"}]))
    told = {(cell.method, cell.task): cell.recipe for cell in study.cells}
    assert set(told) == {("softcot", "first"), ("tuned", "first"), ("softcot", "second")}
    some = load_study(written(tasks=tasks, without=[{"task": ["second"], "method": ["tuned", "softcot"]}]))
    assert {cell.task for cell in some.cells} == {"first"}
    other = told["softcot", "second"]
    assert other.name == "study-first-softcot-seed6"
    assert (other.task.name, other.task.train_problems, other.task.test_problems) == ("word_choices", 8, 5)
    assert {cell.recipe.task.train_problems for cell in study.trainings} == {16}


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({"methds": {}}, ["methds: unknown key; did you mean methods?"]),
        ({"methods": {}}, ["methods: dictionary should have at least 1 item"]),
        ({"methods": ["softcot"]}, ["methods: a mapping of keys to values, found ['softcot']"]),
        ({"methods": {"a-b": {}}}, ["methods.a-b"]),
        ({"methods": {"none": {}}}, ["methods.none: a condition of evaluations is called so"]),
        ({"methods": {"a": {"seed": 3}}}, ["methods.a: seed is decided by the study; leave it out"]),
        ({"methods": {"a": 3}}, ["methods.a: a mapping of a recipe's keys to values, found 3"]),
        ({"recipe": None}, ["tasks.own.recipe: missing, and the study has none either"]),
        ({"recipe": "recipes/nothing.yaml"}, ["recipe: no such file: "]),
        ({"seeds": "9..5"}, ["seeds: 9..5 ends before it begins; write seeds=5..9"]),
        ({"strategies": {"a": {"training.steps": 3}}}, ["strategies.a: training.steps is none of evaluation's"]),
        ({"against": "tunde"}, ["against: no method 'tunde'; there are softcot, tuned"]),
        ({"without": [{"strategy": "greddy"}]}, ["without.0.strategy: no 'greddy'; there are greedy, sampled"]),
        ({"without": [{}]}, ["without.0: leaves all cells out"]),
        ({"without": [{"task": "own"}]}, ["without: no cell is left"]),
        ({"tasks": {"a": {"trained_on": "b"}, "c": {}}}, ["a.trained_on: nothing is trained on 'b'; there are c"]),
        (
            {"tasks": {"a": {}, "b": {"trained_on": "a", "overrides": {"training.steps": 1}}}},
            ["tasks.b.overrides: training.steps is neither task's nor evaluation's: nothing is trained"],
        ),
        (
            {"methods": {"a": {"training.stepz": 3}, "b": {"base.dtype": "x"}}, "strategies": {"s": {}, "t": {
                "evaluation.samples": 2}}},
            [
                "training.stepz: unknown key; did you mean training.step? (method a)",
                "base.dtype: input should be 'float32', 'bfloat16' or 'float16', found 'x' (method b)",
                "evaluation.samples: 2, and evaluation.temperature is 0, at which all samples are the same",
                "such as 0.7 (strategy t)",
            ],
        ),
        (
            {"strategies": {"s": {}, "t": {"evaluation.conditions": ["none"]}}},
            ["evaluation.conditions: learned is missing, which is the method (strategy t)"],
        ),
    ],
)  # fmt: skip
def test_all_mistakes_are_said_at_once_with_whose_they_are(written, changed, messages):
    with pytest.raises(SoftCoTError) as error:
        load_study(written(**changed))
    for message in messages:
        assert message in str(error.value)
    assert str(error.value).count("\n  - ") == len([text for text in messages if not text.startswith("such as")])


def test_the_command_says_what_is_wrong_before_any_work(written, tmp_path, capfd):
    assert command.main([written(), "overrides.training.stepz=1"]) == 2
    assert "1 mistake in the study:\n  - training.stepz: unknown key" in capfd.readouterr().err
    assert command.main([str(tmp_path / "none.yaml")]) == 2
    assert "no such study" in capfd.readouterr().err
    lora = {"methods": {"softcot": {}, "low": {"method": "lora"}}, "seeds": [5]}
    for options in ([], ["--submit", "--nodes=2"]):
        assert command.main([written(**lora), *options]) == 2
        assert "conditions: shuffled: method=lora makes no thoughts" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


class Runner:
    """In the place of trainings, which only write adapters; a signal may end the one of a number."""

    def __init__(self):
        self.ran = []
        self.interrupted_at = None

    def __call__(self, name, cell):
        self.ran.append((name, cell.recipe.name))
        if len(self.ran) == self.interrupted_at:
            raise Interrupted(15)
        folder = cell.recipe.run_dir / "checkpoints" / "step-1"
        if name == "train" and not folder.exists():
            make_adapter(folder, cell.recipe, step=1)


@pytest.fixture
def runner(monkeypatch):
    runner = Runner()
    monkeypatch.setattr(command, "run_apart", runner)
    return runner


def check_cells(report):
    """Each method's and each baseline's are there once, with what their own reports say."""
    cells = {(cell["method"], cell["strategy"], cell["seed"]): cell for cell in report["cells"]}
    assert len(cells) == len(report["cells"]) == 3 * 2
    for (method, _, _), cell in cells.items():
        own = json.loads(Path(cell["report"]).read_text())["conditions"]["none" if method == "none" else "learned"]
        for key in ("accuracy", "ci95", "tokens_per_problem", "seconds_per_problem"):
            assert cell[key] == own[key]
        assert cell["loss"] == own["loss"]["per_token"]
        assert ("run" in cell) == (method != "none")
    assert cells["none", "greedy", 5]["report"] == cells["softcot", "greedy", 5]["report"]


@pytest.mark.slow
def test_each_run_is_trained_once_and_an_interrupted_study_ends_as_an_undisturbed_one(
    written, tmp_path, runner, scribe, monkeypatch
):
    path = written(seeds=[5])
    monkeypatch.setattr(jobs, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # no two take the same seconds
    assert command.main([path, f"output_dir={tmp_path}/whole"]) == 0
    assert runner.ran == [("train", "study-own-softcot-seed5"), ("train", "study-own-tuned-seed5")]
    asked = list((tmp_path / "whole/study/outputs").iterdir())

    runner.ran, runner.interrupted_at = [], 2
    assert command.main([path]) == 143
    assert not (tmp_path / "runs/study/study.json").exists()
    runner.ran, runner.interrupted_at = [], None
    evaluated, calls = grid.evaluated, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Interrupted(15)
        return evaluated(*arguments)

    monkeypatch.setattr(grid, "evaluated", stop)
    assert command.main([path]) == 143
    assert command.main([path]) == 0
    assert len(list((tmp_path / "runs/study/outputs").iterdir())) == len(asked)
    first, second = (
        (tmp_path / folder / "study" / name).read_text().replace(str(tmp_path / folder), "")
        for name in ("study.json",)
        for folder in ("whole", "runs")
    )
    assert first == second
    check_cells(json.loads((tmp_path / "runs/study/study.json").read_text()))
    pages = [(tmp_path / folder / "study/study.html").read_text() for folder in ("whole", "runs")]
    assert pages[0] == pages[1]


def test_what_several_runs_have_in_common_of_a_cache_is_built_once(written, runner, scribe, monkeypatch, tmp_path):
    methods = {"softcot": {}, "other": {"training.learning_rate": 0.1}, "few": {"thoughts.count": 2}, "tuned": {
        "method": "prompt_tuning"}}  # fmt: skip
    monkeypatch.setattr(runner, "interrupted_at", 3)
    overrides = {**SMALL, "thoughts.source": "cache", "cache.path": str(tmp_path / "cache")}
    # The runs of a task that is evaluated alone are those of another, and the cache is that one's.
    tasks = {"own": {}, "other": {"trained_on": "own", "overrides": {"task.test_problems": 5}}}
    assert command.main([written(methods=methods, overrides=overrides, tasks=tasks)]) == 143
    built = [("cache", "study-own-softcot-seed5"), ("cache", "study-own-few-seed5")]
    assert runner.ran == [*built, ("train", "study-own-softcot-seed5")]


RIGHT = {
    ("softcot", 5): [1, 1, 0, 1, 1, 1],
    ("softcot", 6): [1, 1, 1, 1, 1, 0],
    ("tuned", 5): [0, 1, 0, 0, 0, 1],
    ("tuned", 6): [0, 1, 0, 0, 1, 0],
    "none": [0, 0, 1, 0, 0, 0],
}
TOKENS = [4, 10, 7, 5, 3, 8]


def told(cell, folder):
    """An evaluation of a cell, made up: right and wrong as above, losses of 1 nat less where it is right."""
    of = {"learned": RIGHT[cell.method, cell.seed], "none": RIGHT["none"]}
    losses = {name: [5.0 + count - right for right, count in zip(of[name], TOKENS, strict=True)] for name in of}
    conditions = {
        name: {
            "accuracy": sum(right) / 6,
            "ci95": (0.1, 0.9),
            "loss": {"per_token": sum(losses[name]) / sum(TOKENS), "tokens": sum(TOKENS)},
            "tokens_per_problem": 10.0 * (1 + len(cell.strategy) + (name == "none")),
            "seconds_per_problem": 0.5,
        }
        for name, right in of.items()
    }
    report = {"task": "gsm8k", "trained_on": "gsm8k", "num_problems": 6, "assistant": "a/b", "train": {"steps": 1}}
    report |= {"base": "x/Llama-3.1-8B-Instruct", "adapter": "there", "step": 1, "conditions": conditions}
    ids = list("abcdef")
    scores = {name: Scores(ids, list(map(float, of[name])), [], losses[name], TOKENS) for name in of}
    (folder / "learned.jsonl").write_text("".join(json.dumps({"reference": str(n // 4)}) + "\n" for n in range(6)))
    return Evaluated(cell.seed, str(folder / "run"), folder, report, scores)


def test_over_the_seeds_means_and_differences_are_those_of_the_problems_own_numbers(written, tmp_path):
    study = load_study(written())
    report = make_study_report(study, [(cell, told(cell, tmp_path)) for cell in study.cells])
    assert report["tasks"]["own"]["most_frequent_answer"] == pytest.approx(4 / 6)
    found = {(one["method"], one["strategy"]): one for one in report["summaries"]}
    assert set(found) == {(m, s) for m in ("softcot", "tuned", "none") for s in ("greedy", "sampled")}
    tables = {method: np.array([RIGHT[method, seed] for seed in (5, 6)], float) for method in ("softcot", "tuned")}
    tables["none"] = np.array([RIGHT["none"]] * 2, float)
    for (method, strategy), one in found.items():
        assert one["num_seeds"] == 2
        assert one["accuracy"]["mean"] == pytest.approx(tables[method].mean())
        assert one["loss"]["mean"] == pytest.approx((6 * 5 + sum(TOKENS) - tables[method].sum() / 2) / sum(TOKENS))
        assert one["tokens_per_problem"] == 10.0 * (1 + len(strategy) + (method == "none"))
        # Papers sample one chain; ours is one where it is decoded greedily, too.
        percent = {"softcot": 0.8103, "none": 0.7961}.get(method)
        assert [paper["accuracy"] for paper in one.get("published", [])] == pytest.approx([percent] if percent else [])
    pairs = {
        (one["of"], one["metric"], one["first"], one["second"], one.get("strategy") or one["method"]): one
        for one in report["comparisons"]
    }
    assert len(pairs) == len(report["comparisons"]) == 2 * 2 + 2 + 3, "methods twice; their losses once; strategies"
    apart = pairs["methods", "accuracy", "softcot", "tuned", "sampled"]
    wanted = over_seeds(tables["softcot"] - tables["tuned"])
    assert (apart["mean"], apart["p_value"]) == pytest.approx((wanted["mean"], wanted["p_value"]))
    losses = pairs["methods", "loss", "softcot", "none", "greedy"]
    assert losses["mean"] == pytest.approx(-(tables["softcot"].sum() / 2 - 1) / sum(TOKENS))
    for kind, metric, count in (("methods", "accuracy", 4), ("methods", "loss", 2), ("strategies", "accuracy", 3)):
        family = [one for key, one in pairs.items() if key[:2] == (kind, metric)]
        assert {one["adjusted_for"] for one in family} == {count}
        assert [one["p_adjusted"] for one in family] == holm([one["p_value"] for one in family])


def test_a_baseline_is_of_a_method_that_is_asked_once_where_there_is_one(written, tmp_path):
    methods = {"softcot": {"method": "softcot_pp"}, "tuned": {}}
    study = load_study(written(seeds=[5], strategies={"greedy": {}}, methods=methods))
    for name in methods:
        (tmp_path / name).mkdir()
    report = make_study_report(study, [(cell, told(cell, tmp_path / cell.method)) for cell in study.cells])
    reports = {cell["method"]: cell["report"] for cell in report["cells"]}
    assert reports == {
        name: str(tmp_path / of / "report.json")
        for name, of in (("softcot", "softcot"), ("tuned", "tuned"), ("none", "tuned"))
    }


@pytest.mark.slow
def test_a_loss_of_other_tokens_is_marked_where_losses_stand_side_by_side(written, tmp_path):
    """One of answers alone is small whatever the method can do."""
    methods = {"softcot": {}, "tuned": {"method": "lora", "evaluation.conditions": ["learned", "none"]}}
    study = load_study(written(seeds=[5], strategies={"greedy": {}}, methods=methods))
    found = [(cell, told(cell, tmp_path)) for cell in study.cells]
    assert "*" not in study_table(make_study_report(study, found))
    found[1][1].report["conditions"]["learned"]["loss"] |= {"per_token": 0.1234, "tokens": 7}
    report = make_study_report(study, found)
    lines = study_table(report).splitlines()
    assert [line.split()[0] for line in lines if "*" in line] == ["tuned", "*"]
    assert "0.1234* " in next(line for line in lines if line.startswith("tuned"))
    shown = write_page(tmp_path, report).read_text()
    assert "<td>0.1234*</td>" in shown
    assert "<p>* a mean over other tokens" in shown


def test_of_one_seed_verdicts_are_compared_by_mcnemars_test(written, tmp_path):
    study = load_study(written(seeds=[5], strategies={"greedy": {}}))
    report = make_study_report(study, [(cell, told(cell, tmp_path)) for cell in study.cells])
    found = {(one["metric"], one["second"]): one for one in report["comparisons"]}
    # Of six problems softcot has three right that tuned has not, and five and none against one.
    assert found["accuracy", "tuned"]["p_value"] == pytest.approx(0.25)
    assert found["accuracy", "none"]["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert found["accuracy", "none"]["mean"] == pytest.approx(4 / 6)
    assert found["accuracy", "none"]["p_adjusted"] == pytest.approx(2 * 2 * (1 + 6) / 2**6)
    assert {one["accuracy"]["ci95"] for one in report["summaries"]} == {(0.1, 0.9)}


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself_and_leaves_out_plots_without_numbers(written, tmp_path):
    study = load_study(written())
    found = [(cell, told(cell, tmp_path)) for cell in study.cells]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/losses.jsonl").write_text("".join(f'{{"step": {n}, "loss": {9 / n}}}\n' for n in range(1, 130)))
    report = make_study_report(study, found) | {"study": "<b>"}
    page = write_page(tmp_path, report).read_text()
    assert page == write_page(tmp_path, report).read_text()
    elsewhere = {text for text in re.findall(r"""(?:src|href)=["']?([^"'> ]+)|url\(([^)]+)\)""", page)}
    assert all(text.startswith("#") for pair in elsewhere for text in pair if text)
    assert not re.search("<script|<link|@import", page)
    assert "<title>&lt;b&gt;</title>" in page
    assert page.count("<svg") == 5
    for text in ("Accuracy against tokens", "Learning curves", "tuned", "CoT-Unk", "81.0% (SoftCoT, arXiv:2502.12134)"):
        assert text in page
    for cell, one in found:
        if cell.method == "tuned":
            one.report["forgetting"] = {"plain_text": {"file": "x.txt", "tokens": 9, "before": 2.0, "after": 2.5}}
    report = make_study_report(study, found)
    page = write_page(tmp_path, report).read_text()
    assert page.count("<svg") == 6
    assert "Forgetting" in page
    for one in (*report["summaries"], *report["cells"]):
        one |= {"tokens_per_problem": None, "seconds_per_problem": None, "loss": None}
        one.pop("controls", None)
        one.pop("forgetting", None)
    (tmp_path / "run/losses.jsonl").unlink()
    page = write_page(tmp_path, report).read_text()
    assert page.count("<svg") == 2, "accuracies and differences"
    assert "Learning curves" not in page


def test_a_learning_curve_is_of_means_of_stretches(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": {step}.5}}\n' for step in range(1, 121)))
    steps, losses = learning_curve(path)
    assert losses == [2 * n + 2.0 for n in range(60)]
    assert len(steps) == 60
    assert learning_curve(tmp_path / "none.jsonl") == ([], [])


@pytest.mark.slow
def test_what_is_left_to_do_is_submitted_and_the_study_waits_for_it(written, tmp_path, monkeypatch, capsys):
    programs = tmp_path / "bin"
    programs.mkdir()
    said = f'echo "$@" >>{tmp_path}/said; wc -l <{tmp_path}/said'
    for name, text in {"sbatch": said, "squeue": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    overrides = {**SMALL, "thoughts.source": "cache", "cache.path": str(tmp_path / "cache")}
    path = written(overrides=overrides)
    study = load_study(path)
    done = study.trainings[0].recipe
    make_checkpoint(done, step=1)
    assert command.main([path, "--submit", "--nodes=2"]) == 0
    runs = tmp_path / "runs"
    wanted = [("", "study/slurm/cache-1")]
    wanted += [("1", f"study-own-{name}/slurm/train") for name in ("softcot-seed6", "tuned-seed5", "tuned-seed6")]
    wanted += [("2:3:4", "study/slurm/study")]
    asked = [
        f"--parsable --kill-on-invalid-dep=yes {after and f'--dependency=afterok:{after} '}{runs}/{script}.sbatch"
        for after, script in wanted
    ]
    assert (tmp_path / "said").read_text().splitlines() == asked
    assert f"train     done to step 1 in {done.run_dir}: no job" in capsys.readouterr().out
    again = load_study(runs / "study" / "study.yaml")
    assert again.cells == study.cells
    for cell in study.trainings[1:]:
        assert load_recipe(cell.recipe.run_dir / "recipe.yaml") == cell.recipe
    script = (runs / "study/slurm/study.sbatch").read_text()
    assert f"set -- {runs}/study/study.yaml\n" in script
    assert "run_ranks softcot_ds.study" in script
    for load in (slurm._load, lambda *arguments: doctor._load(*arguments)[0]):
        assert load(str(runs / "study" / "study.yaml"), []).run_dir == runs / "study"


@pytest.mark.distributed
def test_a_cache_is_built_and_a_run_trained_in_processes_of_their_own(written, tmp_path):
    overrides = {**SMALL, "thoughts.source": "cache", "cache.path": str(tmp_path / "cache")}
    evaluation = {"evaluation": {"conditions": ["learned", "none"], "decode": False}}
    path = written(methods={"softcot": {}}, seeds=[5], strategies={"losses": evaluation}, overrides=overrides)
    done = run_forked(1, "softcot_ds.study", path)
    assert "study-own-softcot-seed5: 8 training" in done.stdout
    report = json.loads((tmp_path / "runs/study/study.json").read_text())
    learned, none = report["cells"]
    assert learned["adapter"] == str(tmp_path / "runs/study-own-softcot-seed5/checkpoints/step-1")
    assert learned["accuracy"] is None
    assert learned["loss"] != none["loss"]
    assert [one["metric"] for one in report["comparisons"]] == ["loss"]
    assert (tmp_path / "runs/study/study.html").read_text().count("<svg") == 2, "losses and the learning curve"


def test_options_of_submission_want_submit(written, capsys):
    for arguments, message in ((["--submit"], "--submit wants --nodes"), (["--nodes=2"], "are for --submit")):
        with pytest.raises(SystemExit):
            command.main([written(), *arguments])
        assert message in capsys.readouterr().err
