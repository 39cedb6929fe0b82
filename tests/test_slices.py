"""Models of which each rank of a group holds a slice, against whole ones: four ranks in two groups."""

import json
import re

import pytest
from forked import run_forked
from launch import ONLINE, ROOT
from runs import losses
from safetensors.torch import load_file
from toy_models import make_random_pair

RECIPE = ROOT / "recipes" / "word_problems.yaml"
STEPS = 3
SETTINGS = [
    "task.train_problems=24",
    "task.validation_problems=5",
    "task.test_problems=5",
    *ONLINE,
    f"training.steps={STEPS}",
    "training.warmup_steps=0",
    "training.learning_rate=1e-4",  # Adam's first steps amplify rounding
    "training.global_batch_size=9",
    "training.micro_batch_size=2",
    "training.log_every=1",
    "evaluation.conditions=[learned,none]",
    "evaluation.batch_size=2",
    "evaluation.max_new_tokens=8",
    "evaluation.temperature=0.7",
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which the four ranks of slices_worker.py have worked, what they found, and what they printed."""
    folder = tmp_path_factory.mktemp("slices")
    settings = [*make_random_pair(folder), *SETTINGS, f"output_dir={folder / 'runs'}"]
    done = run_forked(4, "slices_worker", folder, RECIPE, *settings)
    return folder, json.loads((folder / "results.json").read_text()), done.stdout


def test_ranks_of_a_group_work_on_the_same_part_and_one_of_them_writes(done):
    assert done[1]["ranks"] == [[0, 2, 2, True], [0, 2, 2, False], [1, 2, 2, True], [1, 2, 2, False]]


def test_slices_compute_what_the_whole_does_and_each_rank_holds_its_share(done):
    for found in done[1]["toys"]:
        assert found.keys() == {"llama", "qwen2", "qwen3", "qwen3_moe", "phi3"}
        for name, (logits, gradient, held, _) in found.items():
            assert logits < 5e-6, name
            assert gradient < 5e-6, name
            assert 0.49 < held < 0.53, name  # norms are whole on each


def test_slices_in_8_bits_compute_what_the_whole_in_8_bits_does(done):
    for found in done[1]["in_8_bits"]:
        logits, gradient = found["errors"]
        assert max(logits, gradient) < 5e-6
        assert 0.49 < found["held"] < 0.53
        assert found["split"] > 3 * 7
        assert found["unmarked"] == [], "DeepSpeed would give all ranks those of the first"
        assert found["wide"] is None
        assert (
            found["narrow"] == "2 ranks cannot hold their slices of model.layers.0.self_attn.o_proj (rowwise) in 8 bits"
        )


def test_ranks_add_up_twice_a_layer_in_each_pass_and_twice_on_the_way_back(done):
    for found in done[1]["toys"]:
        # Three layers; a pass without gradient, one with it, and its backward pass.
        sums = {name: found[name][-1] for name in ("llama", "qwen2", "qwen3")}
        assert sums == dict.fromkeys(sums, 3 * (2 + 2 + 2))


def test_rank_0_tells_how_far_loading_is_in_the_same_form_however_weights_are_held(done):
    folder, results, printed = done
    expected = []
    for partition in ("none", "zero3", "node", "tensor"):
        expected += [f"loading by {partition}", *(f"{n}/{results['weights']}" for n in range(1, results["weights"]))]
    rate = r"[\d,]+\.\d/s, \d+s left"
    lines = re.findall(rf"^(loading by \w+)$|^{folder}/qwen3: (\S+) weights \({rate}\)$", printed, re.M)
    assert ["".join(line) for line in lines] == expected
    assert printed.count(" weights (") == len(expected) - 4, "what is loaded in a moment gets no line"


def test_a_model_that_cannot_be_held_in_slices_is_told_with_the_reason(done):
    _, results, printed = done
    reasons = {
        "opt": "transformers has no plan for slices of opt",
        "llama": "2 ranks do not divide its attention heads, 3",
        "qwen3": "2 ranks do not divide its key value heads, 1",
        "mistral": "2 ranks do not divide model.layers.0.mlp.gate_proj.weight of (47, 32)",
        "gpt_oss": "transformers' plan leaves 98% of gpt_oss on each of 2 ranks",
        "hrm_text": "transformers' plan for slices of hrm_text computes something else",  # it agrees with itself
    }
    assert results["unfit"] == reasons
    assert results["settled"] == "node"
    assert printed.count(f"/opt is held as by partition=node, not tensor: {reasons['opt']}") == 1


def test_training_in_slices_gives_the_losses_and_weights_of_whole_models(done):
    folder, _, printed = done
    none, tensor = (folder / "runs" / name for name in ("none", "tensor"))
    assert list(losses(none)) == list(range(1, STEPS + 1))
    assert losses(tensor) == pytest.approx(losses(none), rel=1e-5)
    for file in ("projection", "optimizer"):
        want, found = (load_file(run / f"checkpoints/step-{STEPS}/{file}.safetensors") for run in (none, tensor))
        for name, value in want.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
    validation = re.findall(r"validation loss (\S+), (\S+) ± (\S+) with another question's", printed)
    assert len(validation) == 2
    want, found = ([*map(float, values)] for values in validation)
    assert found == pytest.approx(want, abs=2e-4)  # as printed
    per_rank = [line for line in printed.splitlines() if line.startswith("per rank and step")]
    assert [line.split()[4] for line in per_rank] == ["2", "3"], "two groups take the batches of four ranks"


def test_evaluation_in_slices_writes_the_outputs_of_whole_models(done):
    folder, _, _ = done
    none, tensor = (next((folder / f"runs/{name}/evaluation").iterdir()) for name in ("none", "tensor"))
    for condition in ("learned", "none"):
        want, found = (
            [json.loads(line) for line in (run / f"{condition}.jsonl").read_text().splitlines()]
            for run in (none, tensor)
        )
        assert len(want) == 5
        losses = [[record.pop("loss") for record in records] for records in (found, want)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), condition
        near, cosines = [], []
        for records in (found, want):
            told = [token for record in records for token in record.pop("nearest_tokens", [])]
            near.append([token for token, _ in told])
            cosines.append([cosine for _, cosine in told])
        assert near[0] == near[1], condition
        assert cosines[0] == pytest.approx(cosines[1], abs=1e-5), condition
        assert found == want, condition
    parts = [path.read_text().splitlines() for path in (folder / "runs/tensor/outputs").glob("*/*.batches")]
    assert sum(map(len, parts)) == 2 * (1 + 3) + 3, "each portion, and each batch of losses or nearest tokens, once"
