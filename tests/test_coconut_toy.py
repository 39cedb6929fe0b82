"""The toy of benchmarks/coconut.py is what its text says: nothing that is asked of it has been trained on."""

import json
import sys
from itertools import pairwise

from launch import ROOT

from softcot_ds.experiment import Experiment
from softcot_ds.recipe import load_recipe

sys.path.append(str(ROOT / "benchmarks"))


def test_questions_of_the_test_are_not_trained_on_and_a_step_is_one_token(tmp_path):
    from coconut import MOVES, STATES, STEPS, TEST, make_recipe

    recipe = load_recipe(str(make_recipe(tmp_path)), ["task.train_problems=50", "task.test_problems=2"])
    rows = [[*map(json.loads, (tmp_path / f"{part}.jsonl").open())] for part in ("train", "test")]
    questions = [[row["question"] for row in part] for part in rows]
    assert len(questions[1]) == TEST
    assert len({*questions[0], *questions[1]}) == len(questions[0]) + TEST == STATES * len(MOVES) ** STEPS

    after = {}
    for row in rows[0]:
        states = [row["question"][0], *row["steps"]]
        for (state, new), move in zip(pairwise(states), row["question"][1:], strict=True):
            assert after.setdefault((move, state), new) == new
        assert row["answer"] == states[-1]
    assert all({after[move, str(state)] for state in range(STATES)} == set("01234") for move in MOVES)

    experiment = Experiment(recipe)
    lengths = [len(experiment.example_at(experiment.splits.train[0], step).target_ids) for step in (1, None)]
    assert lengths[0] - lengths[1] == STEPS
