"""The steps that train takes on two ranks, against float64, and what disturbs them (loop_worker.py)."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from forked import run_forked
from launch import ONLINE, ROOT, deepspeed_command, run
from runs import losses, scalars
from safetensors.torch import load_file, save_file
from test_softcot_pp import true_contrast
from torch.func import functional_call
from toy_models import make_random_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from softcot_ds.cache import main as build_cache
from softcot_ds.data.batches import global_batches
from softcot_ds.data.examples import Example
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import method_class
from softcot_ds.methods.lora import Lora
from softcot_ds.methods.soft_thoughts import new_projection
from softcot_ds.models.quantized import pack, unpack
from softcot_ds.recipe import load_recipe
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=96", "task.validation_problems=9", "task.test_problems=8", *ONLINE]
pytestmark = pytest.mark.distributed


TRAINING = [
    "task.train_problems=24",  # an epoch is two batches and a rest
    "task.validation_problems=3",
    "task.test_problems=4",
    *ONLINE,
    "training.global_batch_size=10",  # micro-batches of 2, 3, 2 and 3 examples, on two ranks
    "training.micro_batch_size=3",
    "training.steps=4",
    "training.learning_rate=0.01",
    "training.warmup_steps=2",
    "training.schedule=linear",
    "training.min_lr_ratio=0.1",
    "training.betas=[0.8,0.95]",
    "training.weight_decay=0.3",
    "training.log_every=1",
    "training.save_every=1",
    "training.keep_checkpoints=9",
    "training.validate_every=99",
    "evaluation.max_new_tokens=2",
]
CHAINS = [
    "method=softcot_pp",
    "chains.count=3",
    "chains.initial=tokens",
    "chains.tokens=['<|thought|>',',','?']",
    "chains.contrastive=3000",
    "training.schedule=constant",
    "training.warmup_steps=0",
    "seed=5",
]
RATES = [0.005, 0.01, 0.01, 0.0055]
"""The learning rate of each step of TRAINING, by hand: half the peak, the peak twice, then half of the way down."""
CLIP = 0.1
"""Between the norms of the first two gradients of TRAINING and those of the next two."""


class Naive:
    """The task in float64, each example alone, one pass with gradient; nothing of the package's step or optimizer."""

    def __init__(self, recipe) -> None:
        self.recipe = recipe
        load = AutoModelForCausalLM.from_pretrained
        self.base = load(resolve_location(recipe.base.model), dtype=torch.float64).eval()
        self.assistant = load(resolve_location(recipe.assistant.model), dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_location(recipe.base.model))
        self.examples = Experiment(recipe).splits.train

    def batches(self):
        return global_batches(
            [e.length for e in self.examples], self.recipe.training.global_batch_size, self.recipe.seed
        )

    def loss_and_gradient(self, weights: dict[str, torch.Tensor], batch: list[int]) -> tuple[float, dict]:
        """Mean cross entropy over all supervised tokens of a global batch, and its gradient."""
        weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        total, count = 0.0, 0
        for index in batch:
            example = self.examples[index]
            total = total + self.loss_of(example, self.thoughts_of(example.assistant.token_ids, example, weights))
            count += len(example.target_ids)
        return self.with_gradient(total / count, weights)

    @staticmethod
    def with_gradient(loss: torch.Tensor, weights: dict[str, torch.Tensor]) -> tuple[float, dict]:
        loss.backward()
        return loss.item(), {name: value.grad for name, value in weights.items()}

    def thoughts_of(self, ids: list[int], example: Example, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.assistant.model(torch.tensor([ids])).last_hidden_state[0, example.assistant.positions]
        return hidden @ weights["weight"].T + weights["bias"]

    def loss_of(self, example: Example, thoughts: torch.Tensor) -> torch.Tensor:
        """Cross entropy summed over the supervised tokens."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{example.problem.question}\nplan :\nTHOUGHTS"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        left, right = (self.tokenizer(t, add_special_tokens=False).input_ids for t in prompt.split("THOUGHTS"))
        answer = f"{example.problem.reasoning} answer {example.problem.answer}"
        target = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        assert target == example.target_ids
        table = self.base.get_input_embeddings().weight
        embeds = torch.cat([table[left], thoughts, table[right + target]])
        logits = self.base(inputs_embeds=embeds[None]).logits[0]
        predictions = logits[-len(target) - 1 : -1].log_softmax(-1)
        return -predictions[torch.arange(len(target)), target].sum()

    def adamw(
        self,
        weights: dict[str, torch.Tensor],
        rates: list[float],
        skipped: tuple[int, ...] = (),
        clipping: float = CLIP,
    ) -> "Course":
        """AdamW (arXiv:1711.05101, algorithm 2) with the recipe's settings, after clipping the gradient's norm."""
        training = self.recipe.training
        beta1, beta2 = training.betas
        weights = {name: value.double() for name, value in weights.items()}
        first = {name: torch.zeros_like(value) for name, value in weights.items()}
        second = {name: torch.zeros_like(value) for name, value in weights.items()}
        course = Course([], [], [])
        updates = 0
        for step, (rate, batch) in enumerate(zip(rates, self.batches(), strict=False), 1):
            loss, gradient = self.loss_and_gradient(weights, batch)
            norm = torch.cat([value.flatten() for value in gradient.values()]).norm().item()
            # torch.nn.utils.clip_grad_norm_ and DeepSpeed both add this to the norm.
            scale = min(1.0, clipping / (norm + 1e-6)) if clipping else 1.0
            if step not in skipped:
                updates += 1
                for name in weights:
                    g = gradient[name] * scale
                    first[name] = beta1 * first[name] + (1 - beta1) * g
                    second[name] = beta2 * second[name] + (1 - beta2) * g**2
                    mean, variance = first[name] / (1 - beta1**updates), second[name] / (1 - beta2**updates)
                    decayed = weights[name] * (1 - rate * training.weight_decay)
                    weights[name] = decayed - rate * mean / (variance.sqrt() + 1e-8)
            course.losses.append(loss)
            course.norms.append(norm)
            course.states.append(
                weights
                | {f"exp_avg.{name}": value for name, value in first.items()}
                | {f"exp_avg_sq.{name}": value for name, value in second.items()}
            )
            weights, first, second = dict(weights), dict(first), dict(second)
        return course


class NaiveChains(Naive):
    """The same for SoftCoT++ as CHAINS has it, a chain at a time."""

    step = 0

    def loss_and_gradient(self, weights: dict[str, torch.Tensor], batch: list[int]) -> tuple[float, dict]:
        self.step += 1
        weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        language, contrast = 0.0, 0.0
        for index in batch:
            example = self.examples[index]
            ids, places = example.assistant.token_ids, example.assistant.positions
            chains = []
            for token in self.tokenizer.convert_tokens_to_ids(["<|thought|>", ",", "?"]):
                of_chain = [token if place in places else id for place, id in enumerate(ids)]
                chains.append(self.thoughts_of(of_chain, example, weights))
            language = language + sum(self.loss_of(example, thoughts) for thoughts in chains)
            contrast = contrast + true_contrast(chains, f"5/{self.step}/{example.problem.id}")
        tokens = sum(len(self.examples[index].target_ids) for index in batch)
        return self.with_gradient(language / tokens + 3000 * contrast / len(batch), weights)


@dataclass
class Course:
    """What a training goes through, step by step."""

    losses: list[float]
    norms: list[float]
    """Of the gradient before it is clipped."""
    states: list[dict[str, torch.Tensor]]
    """Weights and moments after the step, by their names in a checkpoint."""


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory):
    return make_random_pair(tmp_path_factory.mktemp("pair"))


def first_loss_and_gradient(recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the recipe's first global batch at its first weights."""
    naive = Naive(recipe)
    if (bits := recipe.backbone.bits) < 16:
        for module in naive.base.get_decoder().modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = unpack(pack(module.weight.float(), bits), module.weight.shape, bits).double()
    kind = method_class(recipe.method).projection_class
    projection = new_projection(kind, recipe, Experiment(recipe).widths, naive.base)
    weights = {name: value.detach().double() for name, value in projection.named_parameters()}
    return naive.loss_and_gradient(weights, next(naive.batches()))


def run_worker(output: Path, variants: list[str]) -> str:
    """gradient_worker.py on two ranks; its losses and gradients of each variant go to ``output``. What it prints."""
    return run_forked(2, "gradient_worker", RECIPE, output, *variants).stdout


def test_two_ranks_give_the_gradient_of_one_big_batch_in_float64(tmp_path, random_pair):
    batch = ["training.global_batch_size=10", "training.micro_batch_size=3", "training.warmup_steps=0"]
    common = " ".join([*SMALL, *random_pair, *batch])
    variants = [
        f"{common} training.step={step} backbone.partition={partition} training.activation_checkpointing={recompute} "
        f"training.steps={steps}"
        for step, partition, recompute, steps in (
            ("fast", "zero3", "false", 20),
            ("fast", "zero3", "true", 1),
            ("fast", "none", "false", 1),
            ("fast", "tensor", "false", 1),
            ("full", "zero3", "false", 20),
            ("fast", "none", "false", "1 lookup"),
            ("fast", "zero3", "false", "3 lookup"),
            ("fast", "zero3", "false", "1 apart"),
            ("fast", "zero3", "false", "5 training.micro_batch_tokens=300"),
            ("fast", "none", "false", "1 backbone.bits=8"),
            ("fast", "zero3", "false", "1 backbone.bits=8"),
            ("full", "zero3", "true", "1 backbone.resident_gib=0.0015 backbone.bits=8"),
            # bitsandbytes comes with softcot-ds[test].
            *[("fast", "zero3", "false", "1 backbone.bits=4")] * (find_spec("bitsandbytes") is not None),
        )
    ]
    output = tmp_path / "gradients.safetensors"
    run_worker(output, variants)
    truth_in = cache(
        lambda bits: first_loss_and_gradient(load_recipe(RECIPE, [*common.split(), f"backbone.bits={bits}"]))
    )
    found = load_file(output)
    for variant in variants:
        loss, gradient = truth_in(next((bits for bits in (8, 4) if variant.endswith(f"bits={bits}")), 16))
        assert found[f"{variant}/losses"][0].item() == pytest.approx(loss, rel=1e-6), variant
        for name, truth in gradient.items():
            error = (found[f"{variant}/{name}"] - truth).norm() / truth.norm()
            assert error < 1e-5, f"{variant}: {name} differs by {error:.1e}"

    # What the ranks gather leaves nothing behind, and is the same whenever it is gathered.
    split, recomputed, whole, _, full, whole_lookup, lookup, apart, budget, whole_in_8, split_in_8, *_ = variants
    for name in gradient:
        assert torch.equal(found[f"{split}/{name}"], found[f"{recomputed}/{name}"]), name
    assert found[f"{split}/kept"] <= found[f"{whole}/kept"]
    assert torch.equal(found[f"{whole_in_8}/losses"], found[f"{split_in_8}/losses"])
    assert found[f"{split_in_8}/kept"] <= found[f"{split}/kept"]

    # The compact table changes no bit of what the base's own module gives.
    for variant, truth in ((whole, whole_lookup), (split, lookup), (apart, lookup)):
        assert found[f"{variant}/fuses_embedding"] == (variant != apart)
        steps = min(len(found[f"{name}/losses"]) for name in (variant, truth))
        assert torch.equal(found[f"{variant}/losses"][:steps], found[f"{truth}/losses"][:steps]), variant
    # The fused backward pass has an order of adding up of its own.
    assert all(torch.equal(found[f"{apart}/{name}"], found[f"{lookup}/{name}"]) for name in gradient)

    # Twenty steps of both give one curve.
    curve = found[f"{split}/losses"]
    assert curve[-1] < curve[0]
    torch.testing.assert_close(curve, found[f"{full}/losses"], rtol=1e-6, atol=0)
    # However the global batches are cut.
    assert found[f"{split}/micro_batches"].tolist() == [2] * 20
    assert found[f"{budget}/micro_batches"].tolist() == [2, 1, 1, 1, 2]
    torch.testing.assert_close(curve[:5], found[f"{budget}/losses"], rtol=1e-6, atol=0)


def true_of_base(naive: Naive, weights: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """The first global batch's loss, and its gradient with respect to weights of the base, or of what is added to it:
    2 B A, as PEFT names them."""
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    parameters = dict(naive.base.named_parameters()) | {k: v for k, v in weights.items() if ".lora_" not in k}
    for name in weights:
        layer, is_first, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
        if is_first:
            product = weights[name.replace("lora_A", "lora_B")] @ weights[name]
            parameters[f"{layer}.weight"] = parameters[f"{layer}.weight"] + 2 * product
    total, count = 0.0, 0
    for index in next(naive.batches()):
        problem = naive.examples[index].problem
        asked = [{"role": "user", "content": problem.question}]
        prompt = naive.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        texts = prompt, f"{problem.reasoning} answer {problem.answer}"
        ids, target = (naive.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        target = [*target, naive.tokenizer.eos_token_id]
        logits = functional_call(naive.base, parameters, (torch.tensor([ids + target]),)).logits[0]
        total = total - logits[-len(target) - 1 : -1].log_softmax(-1)[torch.arange(len(target)), target].sum()
        count += len(target)
    (total / count).backward()
    return (total / count).item(), {name: value.grad for name, value in weights.items()}


def test_two_ranks_give_the_gradient_of_a_base_that_is_trained_in_float64(tmp_path, random_pair):
    batch = ["training.global_batch_size=10", "training.micro_batch_size=3"]
    common = [*SMALL, *random_pair, *batch, "training.steps=1", "training.warmup_steps=0"]
    recipe = load_recipe(RECIPE, [*common, "method=lora"])
    model = Lora(AutoModelForCausalLM.from_pretrained(recipe.base.model), recipe, False)
    generator = torch.Generator().manual_seed(0)
    started = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in model.trained().items()}
    save_file(started, tmp_path / "start.safetensors")
    variants = {
        f"{' '.join(common)} {settings}": weights
        for settings, weights in (
            (f"method=lora backbone.partition=zero3 from:{tmp_path}/start.safetensors", started),
            (f"method=lora backbone.partition=node backbone.group_size=1 from:{tmp_path}/start.safetensors", started),
            ("method=full backbone.partition=zero3 training.activation_checkpointing=true", None),
            ("method=full backbone.partition=none", None),
        )
    }
    run_worker(tmp_path / "gradients.safetensors", list(variants))
    found, naive = load_file(tmp_path / "gradients.safetensors"), Naive(recipe)
    for variant, weights in variants.items():
        loss, gradient = true_of_base(naive, weights or {n: p.detach() for n, p in naive.base.named_parameters()})
        assert found[f"{variant}/losses"][0].item() == pytest.approx(loss, rel=1e-6), variant
        for name, truth in gradient.items():
            error = (found[f"{variant}/{name}"] - truth).norm() / truth.norm()
            assert error < 1e-5, f"{variant}: {name} differs by {error:.1e}"


def test_training_from_the_cache_gives_the_curve_of_training_online(tmp_path):
    """Online the assistant is partitioned, and its batches are others than the builder's, which hold one row each.

    The learning rate is small because Adam's first steps amplify rounding: at the recipe's own, these curves differ by
    7e-5. An error of 1e-4 in the thoughts shows as 8e-6 here.
    """
    common = [*SMALL, "training.steps=12", "training.learning_rate=1e-6", "training.warmup_steps=0"]
    cached = [*common, "thoughts.source=cache", f"cache.path={tmp_path / 'cache'}", "cache.tokens_per_batch=1"]
    assert build_cache([str(RECIPE), *cached]) == 0
    # Two models, each read by each rank, all of whose parts are offloaded.
    offloaded = f"backbone.deepspeed={ROOT}/ds_configs/zero3_cpu_offload.json"
    within = ["backbone.partition=node", "backbone.group_size=1", offloaded]
    resident = ["backbone.partition=zero3", "backbone.resident_gib=0.0015"]
    zero3 = ["backbone.partition=zero3"]
    variants = [
        " ".join(overrides)
        for overrides in ([*common, *zero3], [*cached, *zero3], [*common, *within], [*cached, *resident])
    ]
    output = tmp_path / "losses.safetensors"
    printed = run_worker(output, variants)
    found = load_file(output)
    online, from_cache, *same = (found[f"{variant}/losses"] for variant in variants)
    torch.testing.assert_close(from_cache, online, rtol=1e-6, atol=0)
    assert torch.equal(same[0], online), "however the weights are held: bit for bit"
    assert torch.equal(same[1], from_cache)
    assert printed.count(" of the base held whole on each rank") == 1


def test_fused_kernels_give_the_gradient_in_float64_where_each_rank_has_a_part(tmp_path, random_pair):
    """They run in Triton's interpreter, slowly, so in one step on small batches."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed; it comes with softcot-ds[test]")
    batch = ["training.global_batch_size=4", "training.micro_batch_size=2", "training.warmup_steps=0"]
    # Norms and the like are of each token: they would take minutes. tests/test_fused_layers.py has them on toys.
    common = " ".join([*SMALL, *random_pair, *batch, "training.steps=1", "backbone.use_liger_kernel=false"])
    output = tmp_path / "gradients.safetensors"
    variants = [f"{common} backbone.partition={partition}" for partition in ("zero3", "tensor")]
    worker = deepspeed_command(2, "gradient_worker", RECIPE, output, *variants)
    run(worker, TRITON_INTERPRET="1")  # read when Triton is imported
    found = load_file(output)
    loss, gradient = first_loss_and_gradient(load_recipe(RECIPE, common.split()))
    for partition in ("zero3", "tensor"):
        variant = f"{common} backbone.partition={partition}"
        assert found[f"{variant}/fuses_loss"] == (partition != "tensor"), "a slice of a head gives part of the logits"
        assert found[f"{variant}/fuses_embedding"]
        assert found[f"{variant}/losses"][0].item() == pytest.approx(loss, rel=1e-6)
        for name, truth in gradient.items():
            assert (found[f"{variant}/{name}"] - truth).norm() < 1e-5 * truth.norm(), name


@pytest.fixture(scope="module")
def trainings(tmp_path_factory, random_pair):
    """Several trainings by ``train`` on two ranks: their folder, what they start from, what they print."""
    folder = tmp_path_factory.mktemp("trainings")
    torch.manual_seed(1)
    start = {"weight": torch.randn(192, 128) * 0.05, "bias": torch.randn(192) * 0.05}
    save_file(start, folder / "start.safetensors")
    common = [*TRAINING, *random_pair, f"output_dir={folder}", f"projection.init_from={folder}/start.safetensors"]
    clipped, free = f"training.gradient_clipping={CLIP}", "training.gradient_clipping=0"
    zero3, whole, bf16 = "backbone.partition=zero3", "backbone.partition=none", "base.dtype=bfloat16"
    stop = ["training.validate_every=1", "training.save_every=99"]
    variants = {
        "clipped-zero3": [clipped, zero3, "training.validate_every=2", "evaluation.max_new_tokens=6"],
        "clipped-none": [clipped, whole, "training.steps=null", "training.epochs=2"],
        "clipped-bf16": [clipped, whole, bf16],
        "free-zero3": [free, zero3],
        "free-none": [free, whole],
        "nan-zero3": [clipped, zero3, "training.steps=9"],
        "nan-none": [clipped, whole, "training.steps=9"],
        "nan-bf16": [clipped, whole, bf16, "training.steps=9"],
        "inf-zero3": [clipped, zero3, "training.log_every=4", "training.save_every=2"],
        "inf-none": [clipped, whole, "training.log_every=4", "training.save_every=2"],
        "crash": [clipped, zero3, "training.validate_every=2", "evaluation.max_new_tokens=6"],
        "crash-on": [clipped, zero3, "training.validate_every=2", "evaluation.max_new_tokens=6", "name=crash"],
        "stop": [clipped, whole, *stop],
        "stop-last": [clipped, whole, *stop, "training.steps=2", "training.warmup_steps=1"],
        "stop-last-on": [clipped, whole, *stop, "training.steps=2", "training.warmup_steps=1", "name=stop-last"],
        "stop-last-done": [clipped, whole, *stop, "training.steps=2", "training.warmup_steps=1", "name=stop-last"],
        "chains": [free, zero3, *CHAINS, "training.steps=2"],
        "chains-on": [free, zero3, *CHAINS, "training.steps=3", "name=chains"],
        "chains-whole": [free, zero3, *CHAINS, "training.steps=3"],
        "hang": [clipped, whole, "training.step_timeout_minutes=0.1"],
    }
    arguments = [text for name, special in variants.items() for text in (name, " ".join([*common, *special]))]
    done = run_forked(2, "loop_worker", RECIPE, *arguments)
    return folder, start, done.stdout


@pytest.fixture(scope="module")
def naive(random_pair):
    return Naive(load_recipe(RECIPE, [*TRAINING, *random_pair, f"training.gradient_clipping={CLIP}"]))


@pytest.fixture(scope="module")
def courses(trainings, naive):
    """What the trainings should have gone through, in float64."""
    _, start, _ = trainings
    return {"clipped": naive.adamw(start, RATES), "free": naive.adamw(start, RATES, clipping=0.0)}


def state_after(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    return load_file(folder / "projection.safetensors") | load_file(folder / "optimizer.safetensors")


def error(found: torch.Tensor, truth: torch.Tensor, start: torch.Tensor | float = 0.0) -> float:
    """How far a tensor is from the truth, relative to what has become of it since the start."""
    return ((found - truth).norm() / (truth - start).norm()).item()


@pytest.mark.parametrize("partition", ["zero3", "none"])
@pytest.mark.parametrize("clipping", ["clipped", "free"])
def test_train_takes_the_steps_of_adamw_in_float64(trainings, courses, clipping, partition):
    """float32 is seen to be 5e-7 away from it in the moments. Adam's first steps divide small gradients by their own
    size, rounding included, so that the weights are 3e-5 away."""
    folder, start, _ = trainings
    run_dir, course = folder / f"{clipping}-{partition}", courses[clipping]
    assert list(losses(run_dir).values()) == pytest.approx(course.losses, rel=1e-6)
    for step, truth in enumerate(course.states, 1):
        for name, found in state_after(run_dir, step).items():
            bound = 1e-4 if name in start else 5e-6
            assert error(found, truth[name], start.get(name, 0.0)) < bound, f"{name} after step {step}"
    norms = list(scalars(run_dir, "optimizer/gradient_norm").values())
    assert norms == pytest.approx(course.norms, rel=1e-5), "before clipping"
    assert norms[0] > norms[1] > CLIP > norms[2] > norms[3]
    assert list(scalars(run_dir, "optimizer/learning_rate").values()) == pytest.approx(RATES)


def test_chains_take_the_steps_of_adamw_on_both_losses_in_float64(trainings, random_pair):
    folder, start, _ = trainings
    naive = NaiveChains(load_recipe(RECIPE, [*TRAINING, *random_pair, *CHAINS]))
    course = naive.adamw(start, [0.01, 0.01], clipping=0.0)
    run_dir = folder / "chains-whole"
    assert list(losses(run_dir).values())[:2] == pytest.approx(course.losses, rel=1e-6)
    for step, truth in enumerate(course.states, 1):
        for name, found in state_after(run_dir, step).items():
            bound = 1e-4 if name in start else 5e-6
            assert error(found, truth[name], start.get(name, 0.0)) < bound, f"{name} after step {step}"
    both = [scalars(run_dir, f"loss/{name}") for name in ("train", "language_model", "contrastive")]
    for whole, *parts in zip(*(curve.values() for curve in both), strict=True):
        assert whole == pytest.approx(sum(parts), rel=1e-6)
        assert min(parts) > 0.5


def test_chains_go_on_to_the_bit_of_a_run_that_nobody_disturbed(trainings):
    folder, _, output = trainings
    assert f"resuming from {folder}/chains/checkpoints/step-2" in output
    for file in ("projection.safetensors", "optimizer.safetensors"):
        one, other = (folder / name / "checkpoints/step-3" / file for name in ("chains", "chains-whole"))
        assert one.read_bytes() == other.read_bytes()


def test_epochs_are_so_many_steps_and_told(trainings):
    folder, _, output = trainings
    recipe = load_recipe(folder / "clipped-none/recipe.yaml")
    assert (recipe.training.epochs, recipe.training.steps) == (None, 4)
    assert "\n2 epochs of 21 training problems: 4 steps\n" in output
    assert "\nstep 4  epoch 2.00  loss " in output


def test_bfloat16_clips_the_gradient_and_shows_its_norm_before(trainings, courses):
    folder, _, _ = trainings
    norms = list(scalars(folder / "clipped-bf16", "optimizer/gradient_norm").values())
    assert norms == pytest.approx(courses["clipped"].norms, rel=0.05)
    moments = state_after(folder / "clipped-bf16", 1)
    mean = torch.cat([moments[f"exp_avg.{name}"].flatten() for name in ("weight", "bias")])
    assert mean.norm().item() == pytest.approx((1 - 0.8) * CLIP, rel=1e-4)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def exit_codes(output: str, variant: str) -> dict[int, int]:
    """Of the ranks, as the command would give them."""
    return {int(rank): int(code) for rank, code in re.findall(rf"{variant}: rank (\d) exits with (\d+)", output)}


@pytest.mark.parametrize("variant", ["nan-zero3", "nan-none", "nan-bf16"])
def test_steps_whose_gradient_is_not_finite_are_skipped_said_counted_and_end_the_run(trainings, naive, variant):
    """Of one micro-batch on one rank, in the steps 2, 4, 5 and 6; the loss is finite."""
    folder, start, output = trainings
    run_dir = folder / variant
    states = {step: state_after(run_dir, step) for step in range(1, 6)}
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    assert same(states[3], states[4])
    assert same(states[3], states[5])
    assert not (run_dir / "checkpoints/step-6").exists()
    if "bf16" not in variant:
        truth = naive.adamw(start, [0.005, 0.01, 0.01], skipped=(2,)).states[-1]
        for name, found in states[3].items():
            assert error(found, truth[name], start.get(name, 0.0)) < (1e-4 if name in start else 5e-6), name
    records = list(map(json.loads, (run_dir / "losses.jsonl").read_text().splitlines()))
    assert [record["step"] for record in records if record.get("skipped")] == [2, 4, 5, 6]
    assert scalars(run_dir, "optimizer/skipped_steps") == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3, 6: 4}
    batches = [", ".join(naive.examples[index].problem.id for index in batch) for batch in islice(naive.batches(), 6)]
    for step in (2, 4, 5):
        assert f"not finite at step {step}, whose global batch holds the problems {batches[step - 1]}: skip" in output
    end = f"{variant} ended after step 6: error: the gradient was not finite in 3 steps in a row, the last of them "
    assert end + f"step 6, whose global batch holds the problems {batches[5]}. The last good checkpoint is " in output
    assert f"{run_dir}/checkpoints/step-5;" in output
    assert exit_codes(output, variant) == {0: 2, 1: 2}


@pytest.mark.parametrize("variant", ["inf-zero3", "inf-none"])
def test_loss_that_is_not_finite_ends_the_run_before_the_optimizer_moves(trainings, naive, variant):
    """On one rank, in step 3; its gradient is finite. Nothing is to be logged or saved before step 4."""
    folder, _, output = trainings
    *_, batch = islice(naive.batches(), 3)
    problems = ", ".join(naive.examples[index].problem.id for index in batch)
    end = f"{variant} ended after step 3: error: the loss is inf at step 3, whose global batch holds the problems "
    assert end + f"{problems}. The last good checkpoint is {folder / variant}/checkpoints/step-2;" in output
    assert [path.name for path in (folder / variant / "checkpoints").iterdir()] == ["step-2"]
    assert exit_codes(output, variant) == {0: 2, 1: 2}


def test_validation_gathers_ahead_and_does_not_keep_the_next_step_from_it(trainings):
    """Of four passes before each of two validations, the first three tell DeepSpeed what comes next."""
    _, _, output = trainings
    counts = json.loads(re.search(r"clipped-zero3: rank 0 exits with 0; ahead: (.*)", output)[1])
    shares = {kind: [there / (there + away) for k, there, away in counts if k == kind] for kind, *_ in counts}
    assert shares["train"][:3] == [0, 0, 0]
    # But for what the pass asks for first, where the one before it has left none of that.
    assert min(shares["train"][3:5]) > 0.8
    assert shares["train"][5:] == [1, 1, 1]
    assert len(shares["validate"]) == 4, "two each time, with the thoughts of another question too"
    assert min(shares["validate"][2:]) > 0.6, shares
    assert min(shares["decode"]) > 0.7, "two of six passes tell what comes next"


def test_checkpoint_comes_before_the_validation_that_fails(trainings):
    folder, _, output = trainings
    assert "crash ended after step 2: no samples today" in output
    assert (folder / "crash/checkpoints/step-2/COMPLETE").exists()


def test_a_validation_that_failed_is_made_up_for_when_the_run_goes_on(trainings):
    """To what an undisturbed run has, bit for bit, and so are the steps after it."""
    folder, _, _ = trainings
    for name in ("validation.jsonl", "losses.jsonl"):
        assert (folder / "crash" / name).read_text() == (folder / "clipped-zero3" / name).read_text()
    assert scalars(folder / "crash", "loss/validation").keys() == {2, 4}


def test_run_that_is_being_stopped_saves_and_does_not_validate(trainings):
    folder, _, output = trainings
    assert "stop ended after step 2: stopped by SIGUSR1 after step 2" in output
    assert [path.name for path in (folder / "stop/checkpoints").iterdir()] == ["step-2"]
    assert scalars(folder / "stop", "loss/validation").keys() == {1}
    assert exit_codes(output, "stop") == {0: 138, 1: 138}


def test_run_that_is_being_stopped_in_its_last_step_saves_and_does_not_validate(trainings):
    folder, _, output = trainings
    assert exit_codes(output, "stop-last") == {0: 0, 1: 0}
    assert (folder / "stop-last/checkpoints/step-2/COMPLETE").exists()
    on, done = output.partition("stop-last: rank 0 exits")[2].split("stop-last-on: rank 0 exits")
    assert "step 2  validation loss" in on, "made up for"
    assert "stop-last: trained to step 2 before" in done
    assert scalars(folder / "stop-last", "loss/validation").keys() == {1, 2}


def test_run_begins_when_every_rank_listens_to_signals(trainings):
    """Rank 1 begins to listen half a second late."""
    _, _, output = trainings
    listens, begins = (float(re.search(rf"{said} ([\d.]+)", output)[1]) for said in ("listens from", "begins at"))
    assert listens < begins


def test_rank_that_hangs_in_a_step_is_given_up_after_the_timeout_of_a_step(trainings):
    """Six seconds."""
    _, _, output = trainings
    assert 5.5 < float(re.search(r"rank 0 waited ([\d.]+) s", output)[1]) < 13
    assert "hang ended after step 4: error: another rank has died, or has not answered in time" in output
    assert exit_codes(output, "hang")[0] == 3


def test_checkpoint_may_take_longer_than_a_step_and_is_no_part_of_its_time(trainings):
    """Seven seconds, after step 2."""
    folder, _, _ = trainings
    assert (folder / "hang/checkpoints/step-3/COMPLETE").exists()
    samples_per_second = scalars(folder / "hang", "throughput/samples_per_second")
    assert 10 / samples_per_second[3] < 6
