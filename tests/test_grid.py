"""One report of several evaluations: its numbers from the problems' own, and its table."""

import json
import statistics
from html import escape
from pathlib import Path

import numpy as np
import pytest

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.grid import Evaluated, grid_table, make_grid_report, write_grid_report
from softcot_ds.evaluation.report import Scores
from softcot_ds.evaluation.statistics import over_seeds

TOKENS = [4, 10, 7, 5]
RIGHT = {
    (41, "learned"): [1, 1, 0, 1],
    (42, "learned"): [1, 1, 1, 1],
    (43, "learned"): [0, 1, 0, 1],
    **{(seed, "none"): [0, 1, 0, 0] for seed in (41, 42, 43)},
}
NATS = {key: [1.0 + 0.5 * key[0] / 41 - 0.25 * right for right in values] for key, values in RIGHT.items()}


def evaluated(seed, thoughts=4, metrics=("accuracy", "loss")):
    names = ("learned", "none")
    conditions = {
        name: {
            "accuracy": statistics.fmean(RIGHT[seed, name]),
            "ci95": (0.1, 0.9),
            "loss": {"per_token": sum(NATS[seed, name]) / sum(TOKENS)},
        }
        for name in names
    }
    compared = {"difference": 0.5, "p_value": 0.25, "loss": {"per_token": -0.125, "ci95": (-0.25, 0.0), "p_value": 0.5}}
    report = {
        "task": "gsm8k",
        "metric_rule": "ours",
        "num_problems": 4,
        "num_thoughts": thoughts,
        "assistant": "small",
        "base": "large",
        "temperature": 0.0,
        "adapter": f"runs/demo-seed{seed}/checkpoints/step-9",
        "step": 9,
        "conditions": {name: {key: row[key] for key in (*metrics, "ci95")} for name, row in conditions.items()},
        "comparisons": {"learned-none": compared},
    }
    scores = {
        name: Scores(
            ["a", "b", "c", "d"],
            list(map(float, RIGHT[seed, name])) if "accuracy" in metrics else [],
            [],
            NATS[seed, name] if "loss" in metrics else [],
            TOKENS if "loss" in metrics else [],
        )
        for name in names
    }
    return Evaluated(
        seed, f"runs/demo-seed{seed}", Path(f"runs/demo-seed{seed}/evaluation/step-9-{thoughts}"), report, scores
    )


def test_over_seeds_every_condition_has_the_mean_of_all_and_the_pair_its_difference():
    report = make_grid_report([evaluated(seed) for seed in (41, 42, 43)])
    assert (report["seeds"], report["thoughts"], report["num_problems"]) == ([41, 42, 43], [4], 4)
    assert [(cell["seed"], cell["conditions"]["learned"]["accuracy"]) for cell in report["cells"]] == [
        (41, 0.75),
        (42, 1.0),
        (43, 0.5),
    ]
    assert report["cells"][1]["report"] == "runs/demo-seed42/evaluation/step-9-4/report.json"
    (summary,) = report["summaries"]
    learned, none = (summary["conditions"][name] for name in ("learned", "none"))
    assert learned["accuracy"]["mean"] == pytest.approx(0.75)
    assert learned["accuracy"]["seeds_sd"] == pytest.approx(0.25)
    assert none["accuracy"]["seeds_sd"] == none["accuracy"]["standard_error"]["seeds"] == 0
    table = np.array([RIGHT[seed, "learned"] for seed in (41, 42, 43)], float)
    assert learned["accuracy"] == over_seeds(table) | {"ci95": (over_seeds(table)["ci95"][0], 1.0)}, "never above 1"
    apart = over_seeds(table - [0, 1, 0, 0])
    assert summary["comparisons"]["learned-none"]["accuracy"] == apart | {"ci95": (apart["ci95"][0], 1.0)}
    for name, found in (("learned", learned), ("none", none)):
        of_seeds = [sum(NATS[seed, name]) / sum(TOKENS) for seed in (41, 42, 43)]
        assert found["loss"]["mean"] == pytest.approx(statistics.fmean(of_seeds))
        assert found["loss"]["seeds_sd"] == pytest.approx(statistics.stdev(of_seeds))
    apart = summary["comparisons"]["learned-none"]["loss"]["mean"]
    assert apart == pytest.approx(learned["loss"]["mean"] - none["loss"]["mean"])


def test_where_every_answer_is_right_the_interval_is_of_the_problems():
    cells = [evaluated(41), evaluated(42)]
    for cell in cells:
        cell.scores["learned"].accuracy[:] = [1.0] * 4
        cell.scores["none"].accuracy[:] = [0.0] * 4
    report = make_grid_report(cells)
    conditions = report["summaries"][0]["conditions"]
    pair = report["summaries"][0]["comparisons"]["learned-none"]["accuracy"]
    assert (pair["mean"], pair["ci95"], pair["p_value"]) == (1.0, None, 0.125), "McNemar's of 4 in 4"
    # Wilson's of 4 in 4: from 1 / (1 + z^2 / 4) on.
    assert conditions["learned"]["accuracy"]["ci95"] == pytest.approx((0.5101, 1), abs=1e-4)
    assert conditions["none"]["accuracy"]["ci95"] == pytest.approx((0, 0.4899), abs=1e-4)


def test_one_problem_is_reported_without_what_it_does_not_tell():
    cells = [evaluated(seed) for seed in (41, 42)]
    for cell in cells:
        for name, of in cell.scores.items():
            cell.scores[name] = Scores(of.ids[:1], of.accuracy[:1], [], of.loss[:1], of.tokens[:1])
    report = make_grid_report(cells)
    json.dumps(report, allow_nan=False)
    pair = report["summaries"][0]["comparisons"]["learned-none"]["loss"]
    assert (pair["mean"], pair["ci95"], pair["p_value"]) == (pytest.approx(-0.25 / TOKENS[0]), None, None)
    assert max(map(len, grid_table(report).splitlines())) <= 100


def test_of_one_seed_and_several_counts_there_is_what_each_report_says():
    report = make_grid_report([evaluated(41, 4), evaluated(41, 2)])
    assert [summary["num_thoughts"] for summary in report["summaries"]] == report["thoughts"] == [4, 2]
    for summary in report["summaries"]:
        assert summary["num_seeds"] == 1
        assert summary["conditions"]["learned"]["accuracy"] == {"mean": 0.75, "ci95": (0.1, 0.9)}
        assert summary["comparisons"]["learned-none"] == {
            "accuracy": {"mean": 0.5, "ci95": None, "p_value": 0.25},
            "loss": {"mean": -0.125, "ci95": (-0.25, 0.0), "p_value": 0.5},
        }
    lines = grid_table(report).splitlines()
    assert sum(line.startswith(("4 learned", "2 learned")) for line in lines) == 4, "accuracy and loss"
    assert not any("se is" in line for line in lines)


def test_the_page_has_a_plot_of_each_metric_and_number_of_thoughts(tmp_path):
    report = make_grid_report([evaluated(seed, count) for count in (4, 2) for seed in (41, 42)])
    page = write_grid_report(tmp_path, report).with_suffix(".html").read_text()
    assert page.count("<svg") == 2 * 2
    assert "runs/demo-seed42/evaluation/step-9-2/report.html" in page
    assert escape(grid_table(report)) in page


def test_seeds_of_other_problems_are_no_grid():
    other = evaluated(42)
    other.scores["none"].ids[0] = "z"
    with pytest.raises(AssertionError, match="the same problems"):
        make_grid_report([evaluated(41), other])


@pytest.mark.parametrize("metrics", [("accuracy",), ("loss",), ("accuracy", "loss")])
def test_the_table_fits_a_terminal_and_shows_every_seed(metrics):
    cells = [evaluated(seed, count, metrics) for count in (4, 2) for seed in (41, 42, 43)]
    lines = grid_table(make_grid_report(cells)).splitlines()
    assert max(map(len, lines)) <= 100
    for seed in (41, 42, 43):
        assert sum(line.split()[:2] == [str(seed), "2"] for line in lines) == len(metrics)
    if "accuracy" in metrics:
        (line,) = (line for line in lines if line.startswith("4 learned") and "%" in line)
        assert line.split()[2] == "75.0%"
        (line,) = (line for line in lines if line.startswith("4 none") and "%" in line)
        assert "+50.0" in line


def test_the_report_is_written_whole_or_the_folder_is_named(tmp_path):
    report = make_grid_report([evaluated(41), evaluated(42)])
    path = write_grid_report(tmp_path / "demo", report)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    (tmp_path / "file").touch()
    with pytest.raises(SoftCoTError, match="cannot write"):
        write_grid_report(tmp_path / "file", report)
