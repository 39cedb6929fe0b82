"""Coconut against a naive float64 version, written here from the paper's description.

The truth takes one example at a time and keeps nothing: for each latent the whole row is run again, without cache, mask
or padding, and its last state after the final norm is put behind it.
"""

import copy
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import run_forked
from launch import ROOT
from safetensors.torch import load_file
from test_step import SHAPE, make_model
from torch import nn

from softcot_ds.adapter import adapter_config
from softcot_ds.coconut_config import CoconutConfig
from softcot_ds.data.batches import collate, global_batches
from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Conditions
from softcot_ds.evaluation.run import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.files import parse_yaml
from softcot_ds.inference import Adapter
from softcot_ds.methods.base import Given
from softcot_ds.methods.coconut import Coconut, CoconutFull
from softcot_ds.models.backbone import load_frozen
from softcot_ds.recipe import load_recipe, parse_recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.tasks import Problem

RECIPE = ROOT / "recipes" / "word_problems.yaml"
ROWS = [([5, 6, 7, 8, 9], [11, 12, 2]), ([15], [13, 14, 16, 17, 18, 2]), ([19, 20, 21], [22, 2])]
"""Prompt and what is to be written."""


def true_loss(model, rows, num_latents: int) -> torch.Tensor:
    """Of what stands behind the prompts, in whatever dtype the model has."""
    embed, decoder = model.base.get_input_embeddings(), model.base.get_decoder()
    loss = 0.0
    for prompt, written in rows:
        row = torch.cat([embed(torch.tensor(prompt)), model.markers[:1]])
        for _ in range(num_latents):
            state = decoder(inputs_embeds=row[None], use_cache=False).last_hidden_state[0, -1]
            row = torch.cat([row, state[None]])
        row = torch.cat([row, model.markers[1:], embed(torch.tensor(written))])
        log_p = model.base(inputs_embeds=row[None], use_cache=False).logits[0].log_softmax(dim=-1)
        first = len(row) - len(written)
        loss -= sum(log_p[first + place - 1, token] for place, token in enumerate(written))
    return loss


def true_loss_and_gradient(model, rows, num_latents: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).double()
    loss = true_loss(model, rows, num_latents)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.trained().items()}


def batch_of(rows, num_latents: int):
    thoughts = AssistantInput("id", [], list(range(num_latents + 2)))
    examples = [Example(Problem("q", "r", "1"), thoughts, prompt, [], written) for prompt, written in rows]
    return collate(examples, pad_id=3)


@pytest.mark.parametrize("num_latents", [0, 1, 4])
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("llama", torch.float64, 1e-6),  # rotary angles are float32 in any dtype
        ("mistral with a sliding window", torch.float64, 1e-6),
        ("gemma3", torch.float64, 1e-6),
        ("llama eager", torch.float32, 1e-4),  # in float64 transformers' own eager masks make NaN of padding
        ("gemma2", torch.float32, 1e-4),
    ],
)
def test_loss_and_gradient_are_those_of_a_naive_float64_version(family, dtype, tolerance, num_latents):
    base = make_model(family).requires_grad_(True)
    model = CoconutFull(base, None, False)
    model.markers = nn.Parameter(torch.randn(2, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1)))
    loss, gradient = true_loss_and_gradient(model, ROWS, num_latents)
    found = model.to(dtype)(batch_of(ROWS, num_latents))
    found.backward()
    assert found.item() == pytest.approx(loss, rel=tolerance)
    for name, parameter in model.trained().items():
        error = (parameter.grad - gradient[name]).norm() / gradient[name].norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_the_stage_of_a_step_depends_on_the_step_alone():
    settings = CoconutConfig(latents_per_step=2, stage_steps=[3, 1, 2])
    stages = [(0, 0), (0, 0), (0, 0), (1, 2), (2, 4), (2, 4), (None, 4), (None, 4)]
    assert [settings.stage(step) for step in range(1, 9)] == stages
    assert [settings.drawn_stage(step) for step in range(1, 9)] == stages


def test_some_steps_are_of_a_stage_so_far_each_as_likely():
    settings = CoconutConfig(latents_per_step=2, stage_steps=[1000, 0, 1000], uniform_prob=0.3)
    assert {settings.drawn_stage(step) for step in range(1, 1001)} == {(0, 0)}
    drawn = Counter(settings.drawn_stage(step) for step in range(1001, 2001))
    assert drawn.keys() == {(0, 0), (2, 4)}, "a stage of no steps is left out"
    assert 110 < drawn[0, 0] < 190
    drawn = Counter(settings.drawn_stage(step) for step in range(2001, 12001))
    assert drawn.keys() == {(0, 0), (2, 4), (None, 4)}
    assert all(900 < drawn[stage] < 1100 for stage in ((0, 0), (2, 4)))
    assert settings.stage(12001) == (None, 4)
    assert settings.drawn_stage(5000) == settings.drawn_stage(5000)


@pytest.mark.distributed
def test_gradient_of_two_ranks_is_that_of_the_naive_float64_version(tmp_path):
    """Of the first global batch of the embedded base under ZeRO-3, in stage 1, with micro-batches of unequal sizes."""
    settings = [
        *("method=coconut_full", "coconut.latents_per_step=2", "coconut.stage_steps=[0,1,1]", "thoughts.count=4"),
        *("task.train_problems=12", "task.validation_problems=2", "task.test_problems=2", "training.steps=1"),
        *("training.warmup_steps=0", "training.global_batch_size=5", "training.micro_batch_size=2"),
    ]
    output = tmp_path / "found.safetensors"
    run_forked(2, "gradient_worker", RECIPE, output, " ".join(settings))
    found = {name.rpartition("/")[2]: value for name, value in load_file(output).items()}
    recipe = load_recipe(RECIPE, settings)
    experiment = Experiment(recipe)
    examples = experiment.splits.train
    (batch,) = islice(global_batches([example.length for example in examples], 5, recipe.seed), 1)
    tokenizer = experiment.base_tokenizer
    rows = []
    for problem in (examples[index].problem for index in batch):
        chat = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        left = f"{problem.reasoning[problem.reasoning.index('second') :]} answer {problem.answer}"
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, left)]
        rows.append((ids[0], [*ids[1], tokenizer.eos_token_id]))
    base = load_frozen(recipe.base, "none", torch.device("cpu"))
    model = CoconutFull.build(Given(recipe, base, None, experiment.widths, examples, [], []))
    loss, gradient = true_loss_and_gradient(model, rows, 2)
    count = sum(len(written) for _, written in rows)
    assert found["losses"].item() == pytest.approx(loss / count, rel=1e-5)
    for name, truth in gradient.items():
        error = (found[name] - truth / count).norm() / (truth / count).norm()
        assert error < 1e-3, f"{name}: {error:.1e}"


SMALL = [
    "backbone.partition=zero3",
    *("task.train_problems=40", "task.validation_problems=4", "task.test_problems=10", "coconut.stage_steps=[1,1,1]"),
    *("coconut.latents_per_step=2", "thoughts.count=6", "training.steps=4", "training.warmup_steps=0"),
    *("training.global_batch_size=6", "training.micro_batch_size=4", "training.save_every=2", "training.log_every=2"),
    *("training.validate_every=4", "evaluation.batch_size=3", "evaluation.max_new_tokens=6", "lora.targets=[q_proj]"),
]


def written(run: Path, condition: str) -> list[dict]:
    """What the only evaluation of a run says of each problem."""
    (folder,) = run.glob("evaluation/*")
    return [json.loads(line) for line in (folder / f"{condition}.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_a_training_goes_on_bit_for_bit_and_its_adapter_thinks_in_evaluation_as_in_training(tmp_path):
    path = ROOT / "recipes/word_problems_coconut.yaml"
    whole, again = (["method=coconut", *SMALL, f"output_dir={tmp_path}/{name}"] for name in ("whole", "again"))
    run_forked(1, "train_worker", path, " ".join(whole))
    run = load_recipe(path, whole).run_dir
    resumed = load_recipe(path, again).run_dir
    shutil.copytree(run / "checkpoints/step-2", resumed / "checkpoints/step-2")
    run_forked(1, "train_worker", path, " ".join(again))
    for name in (Coconut.weights_file, "optimizer.safetensors"):
        saved, found = (load_file(folder / "checkpoints/step-4" / name) for folder in (run, resumed))
        assert saved.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in saved.items())

    conditions = ["learned", "shuffled", "zero", "empty", "none"]
    chosen = f"evaluation.conditions=[{','.join(conditions)}]"
    checkpoint = str(run / "checkpoints/step-4")
    recipe, adapter = recipe_and_adapter(checkpoint, [chosen])
    told = evaluate(recipe, adapter)["conditions"]
    spent = {name: told[name]["spent_per_problem"] for name in conditions}
    rows = {name: written(run, name) for name in conditions}
    two = f"output_dir={tmp_path}/two"
    run_forked(2, "softcot_ds.evaluate", checkpoint, chosen, "evaluation.partition=zero3", two)
    for name in conditions:  # the ranks have unequal shares, and hold the base between them
        of_two = written(load_recipe(path, [*whole, two]).run_dir, name)
        assert [row["loss"] for row in of_two] == pytest.approx([row["loss"] for row in rows[name]], rel=1e-4)
        assert [row["output"] for row in of_two] == [row["output"] for row in rows[name]]

    opened = Adapter(recipe, adapter)
    model = SimpleNamespace(base=opened.base, markers=opened.weights["markers"])
    examples = opened.experiment.splits.test
    thinking = sum(len(example.prefix_ids) + 4 for example in examples) / len(examples)
    for condition, more in {"learned": 6 + thinking, "shuffled": 6 + thinking, "zero": 6, "empty": 2}.items():
        assert spent[condition]["read"] - spent["none"]["read"] == pytest.approx(more)
        assert spent[condition]["assistant_read"] == 0
    answers = opened.answer([example.problem.question for example in examples])
    for example, answer, learned, empty in zip(examples, answers, rows["learned"], rows["empty"], strict=True):
        target = opened.experiment.base_prompts.target_ids(f"answer {example.problem.answer}")
        for row, num_latents in ((learned, 4), (empty, 0)):
            loss = true_loss(model, [(example.prefix_ids, target)], num_latents).item()
            assert row["loss"] == pytest.approx(loss, rel=1e-3)
        assert learned["output"] == answer
    with pytest.raises(SoftCoTError, match="nothing else can follow their prompt"):
        Conditions(opened, examples).of("learned").again(0, begun="answer")
    own = opened.answer([example.problem.question for example in examples], with_thoughts=False)
    assert [row["output"] for row in rows["none"]] == own
    assert len({tuple(row["loss"] for row in of_condition) for of_condition in rows.values()}) == len(conditions)

    # The earlier checkpoint has met stage 1 alone: it is asked what it was trained to write, with as many latents.
    losses_alone = ["evaluation.conditions=[learned]", "evaluation.decode=false", f"output_dir={tmp_path}/early"]
    recipe, adapter = recipe_and_adapter(str(run / "checkpoints/step-2"), losses_alone)
    assert evaluate(recipe, adapter)["num_thoughts"] == 4
    opened = Adapter(recipe, adapter)
    model = SimpleNamespace(base=opened.base, markers=opened.weights["markers"])
    for example, row in zip(opened.experiment.splits.test, written(recipe.run_dir, "learned"), strict=True):
        problem = example.problem
        left = f"{problem.reasoning[problem.reasoning.index('second') :]} answer {problem.answer}"
        asked = (example.prefix_ids, opened.experiment.base_prompts.target_ids(left))
        assert row["loss"] == pytest.approx(true_loss(model, [asked], 2).item(), rel=1e-3)


CURRICULUM = ["method=coconut", "coconut.latents_per_step=2", "coconut.stage_steps=[1,1,1]", "thoughts.count=6"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=coconut"], "coconut: missing; say how many latents a step has"),
        (["coconut.stage_steps=[1,1]"], "a section of method=coconut and coconut_full, and method is softcot"),
        ([*CURRICULUM, "thoughts.count=4"], r"thoughts.count=4: .* come to 4 latents in step 400, .* set it to 6"),
        (
            [*CURRICULUM, "coconut.stage_steps=[1,399,9]"],
            r"thoughts.count=6: .* to 2 latents in step 400, .* set it to 4",
        ),
        ([*CURRICULUM, "training={epochs: 2}"], "epochs is 2, and coconut.stage_steps are steps: .* set steps in"),
        ([*CURRICULUM, "training.activation_checkpointing=true"], "read each latent .* a second time; set it to false"),
        ([*CURRICULUM, "task.targets=own.jsonl"], "task.targets=own.jsonl: .* set task.targets=gold"),
        (["lora.r=8"], "lora: a section of method=lora and coconut, and method is softcot; leave it out"),
        ([*CURRICULUM, "backbone.bits=8"], "backbone.bits=8 is for a base that stays as it is"),
    ],
)
def test_what_the_curriculum_cannot_do_is_said_before_work_starts(settings, message):
    with pytest.raises(SoftCoTError, match=message):
        Experiment(load_recipe(RECIPE, settings)).require_training()


def test_an_evaluation_has_room_for_what_stands_around_latents():
    recipe = load_recipe(RECIPE, [*CURRICULUM, "evaluation.conditions=[learned,empty]", "evaluation.thoughts=2"])
    Coconut.check_evaluation(recipe)
    evaluation = recipe.evaluation.model_copy(update={"thoughts": 1})
    with pytest.raises(SoftCoTError, match=r"evaluation.thoughts=1: two vectors stand around the latents"):
        Coconut.check_evaluation(recipe.model_copy(update={"evaluation": evaluation}))


@pytest.mark.parametrize("strategy", ["tree", "graph"])
def test_a_search_is_refused_which_has_no_place_for_latents(strategy):
    chosen = [f"evaluation.strategy={strategy}", "evaluation.temperature=0.7", "evaluation.conditions=[learned]"]
    with pytest.raises(SoftCoTError, match=f"evaluation.strategy={strategy} puts answers .* set it to single or"):
        Coconut.check_evaluation(load_recipe(RECIPE, [*CURRICULUM, *chosen]))


def test_a_task_without_steps_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"q": "What is {n} + 1?", "a": {n + 1}}}\n' for n in range(9)))
    values = parse_yaml(RECIPE.read_text()) | {
        "task": {
            **{"name": "custom", "train": str(data), "test_from_train": "order", "validation_problems": 1},
            **{"fields": {"question": "q", "answer": "a"}, "answer": "number"},
            "prompts": str(ROOT / "softcot_ds/tasks/word_problems.yaml"),
        }
    }
    with pytest.raises(SoftCoTError, match="those of all 6 training problems of custom are the answer alone"):
        _ = Experiment(parse_recipe(values, CURRICULUM, "recipe")).splits


def test_validation_data_of_its_own_is_the_same_data_in_a_longer_training(tmp_path):
    """Of which the targets are shorter, as its last step leaves out more of the solutions' steps."""
    lines = [
        {"question": f"what is {n} plus 1 ?", "answer": f"first {n} .\nthen 1 more .\n#### {n + 1}"} for n in range(9)
    ]
    for name, chosen in (("train", lines[:5]), ("validation", lines[5:7]), ("test", lines[7:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    data = [f"task.{split}={tmp_path}/{split}.jsonl" for split in ("train", "validation", "test")]
    settings = ["method=coconut", "task.name=gsm8k", *data, "coconut.stage_steps=[1,2,2]", "training.schedule=constant"]
    settings += ["coconut.latents_per_step=2", "thoughts.count=6", "training.warmup_steps=0"]
    path = ROOT / "recipes/word_problems_coconut.yaml"
    short, long = (Experiment(load_recipe(path, [*settings, f"training.steps={steps}"])) for steps in (2, 5))
    targets = [[one.target_ids for one in experiment.splits.validation] for experiment in (short, long)]
    assert len(targets[0][0]) > len(targets[1][0]), "which is why they are no part of it"
    assert adapter_config(short).training_data == adapter_config(long).training_data
