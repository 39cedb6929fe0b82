"""``softcot-ds plan``: sizes against published ones, work against what a real step does, the command's two forms."""

import heapq
import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import plan_worker
import pytest
import torch
from forked import run_forked
from launch import ROOT
from test_step import make_model
from transformers import AutoConfig, AutoTokenizer

from softcot_ds import plan
from softcot_ds.command import EXIT_MISTAKE
from softcot_ds.data.chat import ChatFormat
from softcot_ds.data.examples import Splits, make_example
from softcot_ds.data.prompts import AssistantPrompts, BasePrompts, PromptFile
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.decoding import portions
from softcot_ds.planning import fit, search
from softcot_ds.planning.fit import why_too_large
from softcot_ds.planning.hardware import Cluster, load_hardware
from softcot_ds.planning.jobs import decoding, decoding_memory, jobs, passes
from softcot_ds.planning.lengths import Data, Lengths, data_of, read_data
from softcot_ds.planning.report import Plan, as_json, as_text, make_plan, scale
from softcot_ds.planning.search import Planner, Way
from softcot_ds.planning.shapes import Shape, find_config, meta_model, shallow, sliced_elements
from softcot_ds.planning.work import StepOnMeta
from softcot_ds.recipe import ModelConfig, TaskConfig, load_recipe
from softcot_ds.tasks import make_task

RECIPES = ROOT / "recipes"
PUBLISHED = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B-Instruct": 405_853_388_800,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
}
"""Parameters as the hub counts them in the models' files."""
LENGTHS = Lengths(shared=3, prefix=6, suffix=2, target=5, assistant=9)


def h100s(nodes: int, per_node: int = 8) -> Cluster:
    table = load_hardware()
    return Cluster(table.gpu("h100"), table.reached, nodes, per_node, 400)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_shapes_have_the_published_number_of_weights(name):
    assert Shape.of(find_config(ModelConfig(model=name))).total == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "settings", "problems"),
    [
        ("paper/aqua_llama_8b", [], (97_467, 0, 254)),
        ("paper/aqua_llama_8b", ["task.train_problems=500", "task.validation_problems=100"], (500, 100, 254)),
        ("paper/aqua_llama_8b", ["task.validation_problems=256"], (97_467, 254, 254)),
        ("paper/gsm8k_llama_8b", ["task.train_problems=500", "task.validation_problems=100"], (400, 100, 1319)),
        ("paper/strategy_qa_llama_8b", ["task.test_from_train=order"], (1648, 0, 413)),
        ("paper/aqua_llama_8b", ["task.name=date_understanding"], (0, 0, 250)),
        ("gsm8k_llama_70b", ["task.test_problems=2000"], (7217, 256, 1319)),
    ],
)
def test_without_its_data_a_recipe_is_planned_by_what_is_published_of_its_own_task(name, settings, problems):
    recipe = load_recipe(RECIPES / f"{name}.yaml", settings)
    data = read_data(recipe)
    assert (data.train, data.validation, data.test) == problems
    assert f" of {recipe.task.name} as published" in data.source


def test_more_validation_than_there_is_published_is_refused():
    recipe = load_recipe(RECIPES / "paper/strategy_qa_llama_8b.yaml", ["task.validation_problems=2061"])
    with pytest.raises(SoftCoTError, match="validation_problems is 2061 of 2061 training problems; leave some"):
        read_data(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "number"),
    [
        ("gsm8k", "gsm8k/test.jsonl", "test"),
        ("aqua", "aqua/test.json", "test"),
        ("strategy_qa", "strategyqa/eladsegal_train.json", "train"),
        ("date_understanding", "date_understanding/bbh_date_understanding.json", "test"),
    ],
)
def test_sizes_of_tasks_are_those_of_their_data(shared_data, name, file, number):
    task = make_task(TaskConfig.model_validate({"name": name, "test": str(shared_data / file)}))
    chat = ChatFormat(AutoTokenizer.from_pretrained(shared_data / "qwen2.5_tokenizer"), {}, "qwen")
    prompts = PromptFile.load(task.prompt_file)
    base, assistant = BasePrompts(chat, prompts), AssistantPrompts(chat, prompts, 4, None)
    problems = task.read("test")
    assert len(problems) == getattr(task.sizes, number)
    examples = [make_example(problem, task.target(problem), base, assistant) for problem in problems]
    found = data_of(Splits(examples, [], [], []))
    sizes = task.sizes
    assert (found.mean.shared, found.mean.suffix) == (sizes.instructions, 5)
    for part, (mean, most) in {"prefix": sizes.question, "target": sizes.target}.items():
        assert getattr(found.mean, part) == pytest.approx(mean, rel=0.05)
        assert getattr(found.longest, part) == pytest.approx(most, rel=0.3)
    assert found.mean.assistant - 4 == pytest.approx(sizes.assistant[0], rel=0.05)
    assert found.longest.assistant - 4 == pytest.approx(sizes.assistant[1], rel=0.3)


def test_layers_with_heads_of_another_width_keep_more_of_a_token():
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 256, "head_dim": 32}
    config = AutoConfig.for_model(
        "gemma4_text",
        **sizes,
        num_key_value_heads=2,
        global_head_dim=64,
        layer_types=kinds,
        hidden_size_per_layer_input=0,
    )
    shape = Shape.of(config)
    assert shape.keys_values == 2 * 2 * (32 + 64 + 32 + 64)
    assert shape.heads == 2
    assert shallow(config, 2).per_layer_config[1].head_dim == 64


def test_a_model_without_attention_heads_is_said_to_be_beyond_planning():
    config = AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=256)
    with pytest.raises(SoftCoTError, match="MambaForCausalLM cannot be planned: its configuration tells no attention"):
        Shape.of(config)


def test_a_token_meets_the_experts_that_it_is_sent_to():
    shape = Shape.of(find_config(ModelConfig(model="Qwen/Qwen3-30B-A3B")))
    assert shape.met(1) + shape.head + shape.table == pytest.approx(3.35e9, rel=0.01), "A3B: 3.3 billion, published"
    assert shape.met(1) < shape.met(8) < shape.met(1000) == pytest.approx(sum(shape.layers))


@pytest.mark.parametrize(("name", "slices"), [("meta-llama/Llama-3.3-70B-Instruct", 8), ("Qwen/Qwen3-30B-A3B", 4)])
def test_slices_of_all_ranks_are_the_model(name, slices):
    config = find_config(ModelConfig(model=name))
    whole = Shape.of(config)
    model = meta_model(config, torch.bfloat16)
    assert sliced_elements(model, 1) == whole.total
    assert sliced_elements(model, slices) == pytest.approx(whole.total / slices, rel=0.005), "norms are whole"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_operations_are_those_of_the_step(family):
    """``SoftThoughts.operations`` is what PyTorch counts in real steps (test_operations.py)."""
    model = make_model(family, num_hidden_layers=5, attn_implementation="eager")
    recipe = load_recipe(RECIPES / "word_problems.yaml", ["thoughts.count=3", "base.attention=eager"])
    planned = StepOnMeta(recipe, model.config, Shape.of(model.config).layers, 16).work(LENGTHS, 7, False)
    step = SoftThoughts(model, LinearProjection(16, model.config.hidden_size), shared_ids=[5, 6, 7])
    batch = LENGTHS.batch(7, 3)
    assert planned.flops == pytest.approx(step.operations(batch), rel=0.01), "the angles of rotary embeddings are more"


def test_activations_are_those_that_a_real_step_keeps():
    model = make_model("llama", num_hidden_layers=12, hidden_size=128, intermediate_size=320)
    recipe = load_recipe(RECIPES / "word_problems.yaml", ["thoughts.count=3"])
    planned = StepOnMeta(recipe, model.config, Shape.of(model.config).layers, 16).work(LENGTHS, 8, False)
    step = SoftThoughts(model, LinearProjection(16, 128), shared_ids=[5, 6, 7])
    step.embed = None
    batch = LENGTHS.batch(8, 3)
    batch.thoughts = torch.randn(8, 3, 16)
    step(batch)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*step.parameters(), *step.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step(batch)
    assert loss.requires_grad
    assert planned.activations + planned.loss == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.slow
def test_the_prefix_is_run_without_gradient_and_layers_that_are_computed_again_leave_little():
    recipe = load_recipe(RECIPES / "gsm8k_llama_8b.yaml")
    config = find_config(recipe.base)
    step = StepOnMeta(recipe, config, Shape.of(config).layers, 2048)
    lengths = Lengths(54, 66, 5, 91, 152)
    kept, again = (step.work(lengths, 4, checkpointing) for checkpointing in (False, True))
    assert again.activations < 0.1 * kept.activations
    # Thoughts, rest of the prompt and target are run forward once more, but for a layer's last product, a good quarter
    # of its weights, whose result nobody needs.
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    more = 1 - 4096 * 14336 / layer
    assert again.flops / kept.flops == pytest.approx((66 + (2 + more) * 128) / (66 + 2 * 128), rel=0.02)
    longer = step.work(Lengths(54, 660, 5, 91, 152), 4, False)
    assert longer.activations < 2.5 * kept.activations, "of the prefix only keys and values are kept"


def gsm8k(name: str, *overrides: str) -> Planner:
    recipe = load_recipe(RECIPES / f"{name}.yaml", list(overrides))
    return Planner(recipe, read_data(recipe))


@pytest.fixture(scope="module")
def small_plan() -> Plan:
    """8B on one node."""
    return Plan(gsm8k("gsm8k_llama_8b"), h100s(1))


@pytest.mark.slow
def test_what_fits_on_every_gpu_is_held_by_every_gpu(small_plan):
    best = small_plan.best
    assert (best.way.partition, best.way.group_size, best.fits) == ("none", 1, True)
    assert best.memory["held"] == pytest.approx(2 * PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"])
    assert best.memory["gathered"] == 0
    assert small_plan.planner.held("zero3", 8, 16) == pytest.approx(best.memory["held"] / 8, rel=0.001)


@pytest.mark.slow
def test_an_8b_and_its_assistant_online_share_a_gpu_of_24_gb_in_4_bits():
    table = load_hardware()
    a10 = Cluster(table.gpu("a10"), table.reached, 1, 1, 50)
    planner, memory = gsm8k("gsm8k_llama_8b", "thoughts.source=online"), {}
    for bits in (16, 4):
        planner.recipe.backbone.bits = bits
        choice = planner.choice(planner.own_way(a10), a10)
        assert choice.fits == (bits == 4)
        assert choice.memory["assistant"] == 2 * PUBLISHED["meta-llama/Llama-3.2-1B-Instruct"]
        memory[bits] = choice.memory["held"]
    ends = 2 * 128_256 * 4096 + 65 * 4096  # table, head, norms
    whole = PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"]
    assert memory == pytest.approx({16: 2 * whole, 4: 2 * ends + (whole - ends) * 4.25 / 8}, rel=1e-3)


@pytest.mark.slow
def test_choices_are_in_order(small_plan):
    assert all(choice.fits for choice in small_plan.choices)
    bits = [choice.way.bits for choice in small_plan.choices]
    assert bits == sorted(bits, reverse=True), "fewer bits are another model"
    assert {*bits} == {16, 8, 4}
    fitting = [choice.seconds for choice in small_plan.choices if choice.way.bits == 16]
    assert max(fitting[:1]) <= search._AS_FAST * min(fitting)
    late = [seconds for seconds in fitting if seconds > search._AS_FAST * min(fitting)]
    assert late == sorted(late)
    for choice in small_plan.choices:
        way = choice.way
        assert 8 * way.micro_batch * way.accumulation >= 32 * (way.group_size if way.partition == "tensor" else 1)


@pytest.mark.slow
def test_json_has_the_keys_that_scripts_read(small_plan):
    found = json.loads(json.dumps(as_json(small_plan, scale(small_plan))))
    keys = "partition bits micro_batch memory_gib between_nodes_gb within_nodes_gb step_seconds bound_by fits"
    for choice in [*found["choices"], found["best"]]:
        assert set(keys.split()) <= set(choice)
        assert choice["memory_gib"] == pytest.approx(sum(choice["memory"].values()))
    assert found["best"] == found["choices"][0]
    assert [row["gpus"] for row in found["scaling"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    efficiencies = [row["efficiency"] for row in found["scaling"]]
    assert efficiencies[0] == 1
    assert all(later <= 1.03 * earlier for earlier, later in pairwise(efficiencies))


@pytest.mark.slow
def test_the_table_is_for_people(small_plan):
    text = as_text(small_plan, scale(small_plan))
    assert max(map(len, text.splitlines())) <= 120
    assert "none         16  4x1" in text
    assert "  backbone:\n    partition: none\n" in text


@pytest.fixture(scope="module")
def large() -> Planner:
    return gsm8k("gsm8k_llama_70b")


@pytest.mark.slow
def test_70b_by_node_sends_no_weight_between_nodes(large):
    choices = large.choices(h100s(4))
    assert not any(choice.fits for choice in choices if (choice.way.partition, choice.way.bits) == ("none", 16))
    weights = 2 * PUBLISHED["meta-llama/Llama-3.3-70B-Instruct"]
    for choice in (choice for choice in choices if choice.way.bits == 16):
        way = replace(choice.way, resident=0)
        moved = large.choice(way, h100s(4))
        if way.partition == "zero3" or (way.partition == "node" and way.group_size > 8):
            assert 1.9 * weights < moved.between / way.accumulation < 2 * weights
        elif way.partition == "node":
            assert choice.between < 0.01 * weights * way.accumulation
            assert 1.9 * weights < moved.within / way.accumulation < 2 * weights


@pytest.mark.slow
def test_spare_memory_is_filled_with_layers_that_are_not_gathered(large):
    node = next(c for c in large.choices(h100s(4)) if (c.way.partition, c.way.group_size) == ("node", 8))
    assert 0.9 * h100s(4).room < node.bytes < 0.96 * h100s(4).room
    bare = large.choice(replace(node.way, resident=0), h100s(4))
    layer = 2 * large.shape.layers[0]
    assert node.bytes - bare.bytes == pytest.approx(node.way.resident * layer * 7 / 8, rel=0.01)
    assert bare.within - node.within == pytest.approx(2 * node.way.resident * layer * node.way.accumulation, rel=0.01)
    small = replace(h100s(4), gpu=h100s(4).gpu.model_copy(update={"memory_gib": 50}))
    assert large.own_way(small).resident < large.own_way(h100s(4)).resident == node.way.resident
    large.recipe.backbone.resident_gib = 20.0
    try:
        named = large.own_way(h100s(4)).resident
    finally:
        large.recipe.backbone.resident_gib = None
    assert named == 20 * 2**30 // (layer * 7 / 8)


@pytest.mark.slow
def test_a_slow_network_is_what_bounds_zero3(large):
    fast, slow = (
        {choice.way: choice for choice in large.choices(cluster)}
        for cluster in (h100s(4), Cluster(**{**vars(h100s(4)), "network_gbps": 12.5}))
    )
    zero3 = next(way for way in slow if way.partition == "zero3")
    node = next(way for way in slow if way.partition == "node" and way.group_size == 8)
    assert slow[zero3].bound_by == "between nodes"
    assert slow[zero3].seconds > 10 * fast[zero3].seconds
    assert slow[node].seconds < 1.1 * fast[node].seconds


@pytest.mark.slow
def test_a_global_batch_that_does_not_feed_the_ranks_is_told():
    planner = gsm8k("gsm8k_llama_8b")
    with pytest.raises(SoftCoTError, match=r"training.global_batch_size 32 does not feed 512 ranks; raise it"):
        planner.choices(h100s(64))


@pytest.mark.slow
def test_own_data_is_read_where_it_lies_here():
    recipe = load_recipe(RECIPES / "word_problems.yaml", ["task.train_problems=50", "task.validation_problems=10"])
    data = read_data(recipe)
    assert (data.train, data.validation, data.test) == (40, 10, 1000)
    assert data.source == "40 training problems of the recipe"
    assert data.mean.target < data.longest.target < 100
    assert data.mean.shared == data.longest.shared > 0


def test_the_command_says_what_is_wrong(capsys):
    recipe = str(RECIPES / "gsm8k_llama_8b.yaml")
    for arguments, said in (
        (["--gpu", "h1000"], "no GPU 'h1000' in the hardware table; it has b200"),
        (["--hardware", "no/such.yaml"], "no/such.yaml"),
        (["training.step=3"], "1 mistake in the recipe"),
        (["base.model=some/unknown"], "config.json of some/unknown is not in"),
        (["--hardware", str(RECIPES / "gsm8k_llama_8b.yaml")], "a hardware table has the mappings gpus and reached"),
        (["assistant.model=some/unknown"], "hf download some/unknown config.json"),
    ):
        assert plan.main([recipe, *arguments]) == EXIT_MISTAKE
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error


@pytest.mark.parametrize("nodes", ["0", "-1", "x"])
def test_numbers_of_nodes_are_numbers(nodes, capsys):
    with pytest.raises(SystemExit):
        plan.main(["r.yaml", f"--nodes={nodes}"])
    assert "is no number from 1 to 100,000" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "x"])
def test_a_network_has_a_rate(rate, capsys):
    with pytest.raises(SystemExit):
        plan.main(["r.yaml", f"--network={rate}"])
    assert "is no number of Gb/s above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_one_object_for_scripts(capsys):
    arguments = ["--nodes", "2", "--gpus-per-node", "4", "--gpu", "a100", "--network", "100", "--json"]
    assert plan.main([str(RECIPES / "gsm8k_llama_8b.yaml"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"]["network_gbps"] == 100
    assert (found["gpus"]["nodes"], found["gpus"]["per_node"]) == (2, 4)
    assert found["best"]["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in sorted(RECIPES.glob("*.yaml")) if "Planned for" in path.read_text()])
def test_a_recipe_is_next_to_the_best_on_the_hardware_that_its_comment_names(path):
    nodes, gpus = re.search(r"Planned for\s+(?:# )?(\d+) nodes? with (\d+) H100", path.read_text()).groups()
    cluster = h100s(int(nodes), int(gpus))
    recipe = load_recipe(path)
    planned = Plan(Planner(recipe, read_data(recipe)), cluster)
    own = planned.planner.choice(planned.planner.own_way(cluster), cluster)
    assert own.fits
    assert own.seconds < 1.2 * planned.best.seconds
    assert own.between < 0.01 * own.within or own.way.group_size > 8, "no weight crosses nodes that need not"
    assert why_too_large(recipe, cluster) == ""
    found = next(
        way
        for way in planned.decodings
        if (way.partition, way.batch_size) == (recipe.evaluation.partition, recipe.evaluation.batch_size)
    )
    assert found.seconds < 2.5 * planned.evaluation.seconds
    hours = jobs(planned.planner, cluster, own, found)
    assert hours.validation < hours.training / 3
    training = recipe.training.model_copy(update={"steps": None, "epochs": 3})
    epochs = Planner(recipe.model_copy(update={"training": training}), planned.planner.data)
    steps = 3 * (planned.planner.data.train // training.global_batch_size)
    longer = jobs(epochs, cluster, own, found)
    taken = [found.training - found.validation for found in (hours, longer)]
    assert taken[1] == pytest.approx(taken[0] * steps / recipe.training.steps)


@pytest.mark.parametrize(("problems", "samples", "streams"), [(300, 1, 1), (300, 1, 8), (40, 8, 2), (10, 1, 1)])
def test_decoding_takes_the_passes_of_rows_that_make_room_for_others(problems, samples, streams):
    rows, longest = 8, 60
    data = SimpleNamespace(mean=SimpleNamespace(target=20))
    lengths = [random.Random(number).choice([5, 10, 15, 20, 25, 45]) for number in range(problems * samples)]
    lengths[::10] = [5 if number % 3 else longest for number in range(len(lengths[::10]))]
    ranks = [0] * streams
    for number, portion in enumerate(portions([0] * problems, rows)):
        busy = [0] * rows  # until when each row writes
        for length in (lengths[problem * samples + draw] for problem in portion for draw in range(samples)):
            heapq.heapreplace(busy, busy[0] + length)
        ranks[number % streams] += max(busy)
    planner = SimpleNamespace(data=data, new_tokens=longest)
    # In the plan the longest output is the last of every portion.
    assert max(ranks) <= passes(planner, problems, samples, rows, streams) < 1.4 * max(ranks)


@pytest.mark.slow
def test_a_job_takes_what_the_recipe_asks_of_it(tmp_path):
    def planned(*overrides):
        planner = gsm8k("gsm8k_llama_8b", *overrides)
        cluster = h100s(1)
        way = planner.own_way(cluster)
        found = decoding(planner, cluster, planner.own_holding(cluster, "none"), 16)
        return jobs(planner, cluster, planner.choice(way, cluster), found)

    plain, twice = planned(), planned("evaluation.samples=2", "evaluation.temperature=1")
    alone, losses = planned("evaluation.loss=false"), planned("evaluation.decode=false")
    assert plain.evaluation == pytest.approx(alone.evaluation + losses.evaluation)
    assert 1.3 < (twice.evaluation - losses.evaluation) / alone.evaluation < 2, "the longest output ends once"
    assert losses.evaluation < alone.evaluation / 10
    own = [planned(f"task.targets={tmp_path}/own.jsonl", f"targets.samples={samples}") for samples in (1, 4)]
    assert plain.targets == 0 < 4 * own[0].targets == pytest.approx(own[1].targets)


@pytest.mark.slow
def test_layers_that_stay_are_as_many_as_training_leaves_room_for(monkeypatch):
    """What a run asks, against what the plan says of the same recipe: a rank that has its share of the base."""
    monkeypatch.setattr(fit, "world_size", lambda: 8)
    kept = []
    for size, memory_gib in ((2, 1.861), (8, 1.861), (2, 1.859)):
        overrides = [f"training.micro_batch_size={size}", "backbone.partition=zero3", "training.global_batch_size=64"]
        data = ["task.train_problems=40", "task.validation_problems=10"]
        recipe = load_recipe(RECIPES / "word_problems.yaml", [*overrides, *data])
        splits = Experiment(recipe).splits
        planner = Planner(recipe, data_of(splits))
        cluster = replace(h100s(1), gpu=h100s(1).gpu.model_copy(update={"memory_gib": memory_gib}))
        way = planner.own_way(cluster)
        free = (cluster.room - planner.held("zero3", 8, 16)) / cluster.reached.room
        spare = fit.spare_to_train(recipe, splits, free)
        assert planner.resident_bytes(way) <= spare < planner.resident_bytes(replace(way, resident=way.resident + 1))
        kept.append(way.resident)
    assert kept[1] < kept[0], "a larger micro-batch"
    assert kept[2] < kept[0], "a smaller GPU"


@pytest.mark.slow
def test_slices_have_their_16_bits_while_they_are_loaded():
    recipe = load_recipe(RECIPES / "gsm8k_llama_405b.yaml", ["training.global_batch_size=32"])
    planner = Planner(recipe, read_data(recipe))
    way = Way("tensor", 8, 8, True, 0, 1, 32)
    assert sum(planner.memory(way, 8).values()) == planner.held("tensor", 8, 16)
    assert decoding_memory(planner, way) == planner.held("tensor", 8, 16)
    assert not planner.choice(way, h100s(1)).fits
    packed = replace(way, partition="node")
    assert sum(planner.memory(packed, 8).values()) < planner.held("node", 8, 16)


def test_an_assistant_that_drafts_is_whole_beside_the_base():
    """Llama 3.2 1B in bfloat16, with 16 layers of 8 heads of 64; 128,256 tokens; a batch of 16."""
    rows, tokens = 16, 128_256
    found = {}
    for draft in (0, 1, 5):
        planner = gsm8k("gsm8k_llama_8b", "evaluation.max_new_tokens=256", f"evaluation.draft={draft}")
        found[draft] = decoding_memory(planner, Way("tensor", 8, 16, False, 0, rows, 1))
    per_token = 2 * 2 * 16 * 8 * 64 * rows
    texts = per_token * (256 + planner.prompt)
    one = found[1] - found[0]
    assert 0 < one - 2 * 1_235_814_400 - texts < 2 * per_token * planner.prompt + 10 * 4 * rows * tokens
    assert (found[5] - found[1]) / 4 == 5 * 4 * rows * tokens, "logits of a draft, and what it was drawn from"


def test_a_task_without_training_data_is_evaluated_with_layers_that_stay():
    changes = ["task.name=date_understanding", "task.train=null", "task.validation_problems=0", "task.test=a/b"]
    recipe = load_recipe(RECIPES / "gsm8k_llama_8b.yaml", changes)
    assert fit.spare_to_decode(recipe, "zero3", 60e9) > 0
    with pytest.raises(SoftCoTError, match="there is no training data for date_understanding"):
        make_plan(recipe, h100s(1))


@pytest.mark.distributed
def test_ranks_hold_and_move_what_was_planned(tmp_path):
    """Three shapes, each held in every way: many layers of a small vocabulary, whose table is the head; a vocabulary
    that is most of the model; experts, in bfloat16."""
    jobs = [f"{name}:{partition}:16" for name in plan_worker.SHAPES for partition in search.PARTITIONS]
    jobs += [f"deep:{partition}:8" for partition in search.PARTITIONS]
    run_forked(plan_worker.RANKS, "plan_worker", tmp_path, *jobs)
    lengths, table = plan_worker.LENGTHS, load_hardware()
    for job, measured in json.loads((tmp_path / "results.json").read_text()).items():
        recipe = plan_worker.recipe_of(tmp_path, job)
        tokens = plan_worker.SHAPES[job.partition(":")[0]]["vocab_size"]
        planner = Planner(recipe, Data(lengths, lengths, 100, 10, 10, tokens, "made up"))
        partition, bits = recipe.backbone.partition, recipe.backbone.bits
        way = Way(partition, 1 if partition == "none" else 2, bits, False, 0, plan_worker.BATCH, 1)
        choice = planner.choice(way, Cluster(table.gpu("h100"), table.reached, 1, 2, 400))
        assert choice.bytes == pytest.approx(measured["peak"], rel=0.1), job
        between = sum(choice.memory[part] for part in ("held", "tokens", "optimizer"))
        assert between == pytest.approx(measured["between"], rel=0.1), job
        assert choice.within == pytest.approx(measured["moved"], rel=0.02), job
        assert choice.between == 0
        if job in plan_worker.DECODED:
            new_tokens = recipe.evaluation.max_new_tokens
            decoded = partition, way.group_size, plan_worker.ROWS, planner.prompt, new_tokens
            for name, wait in (("decoding", False), ("decoding more", True)):
                needed = planner.decoding_bytes(*decoded, others_wait=wait)
                assert needed == pytest.approx(measured[name], rel=0.1), (job, name)
