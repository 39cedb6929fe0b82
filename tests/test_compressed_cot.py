"""Compressed CoT against a naive float64 version, written here from the paper's description.

The truth takes one example and one token at a time. It has a model for each kind of place, with what the matrices add
put into its weights: the prompt is read by the base, contemplation tokens by the base with ``ccot``, the rest by the
base with both, and each goes on with the keys and values that the one before has left.
"""

import copy
import json
import math
from itertools import islice

import pytest
import torch
from forked import run_forked
from launch import ROOT
from safetensors.torch import load_file, save_file
from test_coconut import written
from test_step import make_model
from torch.func import functional_call
from transformers import DynamicCache

from softcot_ds.data.batches import collate, global_batches
from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.run import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.inference import Adapter
from softcot_ds.methods.base import Given
from softcot_ds.methods.compressed_cot import CompressedCoT, chosen_places
from softcot_ds.models.backbone import cache_name, load_frozen
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.tasks import Problem

RECIPE = ROOT / "recipes" / "word_problems.yaml"
CCOT = [
    *("method=compressed_cot", "thoughts.count=5", "compressed_cot.ratio=0.4", "compressed_cot.ccot_steps=1"),
    *("compressed_cot.ccot.r=4", "compressed_cot.ccot.alpha=8", "compressed_cot.ccot.targets=[q_proj,down_proj]"),
    *("compressed_cot.decode.r=3", "compressed_cot.decode.alpha=12", "compressed_cot.decode.targets=[v_proj,q_proj]"),
    *("training.steps=2", "training.warmup_steps=0"),
]
ROWS = [
    ([5, 6, 7, 8, 9], [21, 22, 23, 24, 25, 26, 27], [11, 12, 2]),
    ([15], [31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42], [13, 14, 16, 2]),
    ([19, 20, 21], [], [22, 2]),
]
"""Prompt, chain and answer."""


def settings_of(recipe):
    return {name: getattr(recipe.compressed_cot, name) for name in ("ccot", "decode")}


class Truth:
    """The models of all places, and what is trained of them: float64, by the names in checkpoints."""

    def __init__(self, base, recipe, trained: dict[str, torch.Tensor], layer: int):
        self.recipe, self.layer = recipe, layer
        self.base = copy.deepcopy(base).double().requires_grad_(False)
        self.trained = {name: value.detach().double().requires_grad_() for name, value in trained.items()}
        self.over, self.stop = self.trained["over"], self.trained["stop"]
        self.layers = self.base.get_decoder().layers
        plain = dict(self.base.named_parameters())
        ccot = self._added(plain, "ccot")
        self.weights = {"prompt": plain, "contemplation": ccot, "answer": self._added(ccot, "decode")}

    def _added(self, weights, name):
        settings, found = settings_of(self.recipe)[name], dict(weights)
        for key, first in self.trained.items():
            if key.startswith(f"{name}.") and ".lora_A." in key:
                second = self.trained[key.replace("lora_A", "lora_B")]
                layer = key.removeprefix(f"{name}.base_model.model.").replace(".lora_A", "")
                found[layer] = found[layer] + settings.alpha / settings.r * second @ first
        return found

    def read(self, place: str, row, cache: DynamicCache):
        """States after each layer, the last state after the norm, and logits of each of a row's embeddings."""
        found, states = [], []

        def hear(_module, _inputs, output):
            states.append((output if torch.is_tensor(output) else output[0])[0, 0])

        modules = [*self.layers, self.base.get_decoder().norm]
        hooks = [module.register_forward_hook(hear) for module in modules]
        for embedding in row:
            given = {"inputs_embeds": embedding[None, None], cache_name(self.base.forward): cache, "use_cache": True}
            logits = functional_call(self.base, self.weights[place], (), given).logits[0, 0]
            found.append((states[:-1], states[-1], logits))
            states.clear()
        for hook in hooks:
            hook.remove()
        return found

    def embed(self, ids):
        return self.base.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))

    def end_loss(self, last_states) -> torch.Tensor:
        """Mean over a contemplation's tokens, of which the last is to be told."""
        scores = [state.detach() @ self.stop[:-1] + self.stop[-1] for state in last_states]
        signs = [-1] * (len(scores) - 1) + [1]
        return sum((1 + (-sign * score).exp()).log() for sign, score in zip(signs, scores, strict=True)) / len(scores)

    def places(self, chain) -> list[int]:
        count = min(self.recipe.thoughts.count - 1, max(1, math.ceil(self.recipe.compressed_cot.ratio * len(chain))))
        return [math.floor((number + 1) * len(chain) / count) - 1 for number in range(count)]

    def first_stage(self, rows) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Of each layer, and of the ends: sums over problems."""
        hidden, end = [0.0] * len(self.layers), 0.0
        for prompt, chain, _ in rows:
            read = self.read("prompt", self.embed([*prompt, *chain]), DynamicCache())
            teacher = [read[len(prompt) + place][0] for place in self.places(chain)]
            cache = DynamicCache()
            begun = self.read("prompt", self.embed(prompt), cache)[-1][0]
            inputs = [states[self.layer - 1].detach() for states in [begun, *teacher[:-1]]]
            found = self.read("contemplation", inputs, cache)
            for wanted, (states, _, _) in zip(teacher, found, strict=True):
                for number, (state, truth) in enumerate(zip(states, wanted, strict=True)):
                    variance = ((truth - truth.mean()) ** 2).mean()
                    hidden[number] += ((state - truth) ** 2).mean() / variance / len(teacher) / len(self.layers)
            end += self.end_loss([last for _, last, _ in found])
        return hidden, end

    def contemplation(self, prompt, cache, length=None):
        """The inputs of contemplation tokens, one after the other, and their last states."""
        states = self.read("prompt", self.embed(prompt), cache)[-1][0]
        inputs, last_states, most = [], [], self.recipe.thoughts.count - 1
        while len(inputs) < (most if length is None else length):
            inputs.append(states[self.layer - 1])
            states, last, _ = self.read("contemplation", inputs[-1:], cache)[0]
            last_states.append(last)
            if length is None and last @ self.stop[:-1] + self.stop[-1] > 0:
                break
        return inputs, last_states

    def answered(self, prompt, answer, length=None) -> tuple[torch.Tensor, list]:
        """The loss of an answer, and last states of contemplation tokens."""
        cache = DynamicCache()
        inputs, last_states = self.contemplation(prompt, cache, length)
        rest = self.recipe.thoughts.count - len(inputs)
        self.read("contemplation", [self.over[0]] * (rest - 1), cache)
        read = self.read("answer", [self.over[0], *self.embed(answer[:-1])], cache)
        loss = -sum(logits.log_softmax(-1)[token] for (_, _, logits), token in zip(read, answer, strict=True))
        return loss, last_states

    def written(self, prompt, stops, most: int) -> list[int]:
        """What is answered, a token at a time, each the likeliest."""
        tokens: list[int] = []
        while len(tokens) < most:
            cache = DynamicCache()
            inputs, _ = self.contemplation(prompt, cache)
            self.read("contemplation", [self.over[0]] * (self.recipe.thoughts.count - len(inputs) - 1), cache)
            logits = self.read("answer", [self.over[0], *self.embed(tokens)], cache)[-1][2]
            if int(logits.argmax()) in stops:
                break
            tokens.append(int(logits.argmax()))
        return tokens

    def second_stage(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        answers = [self.answered(prompt, answer, len(self.places(chain))) for prompt, chain, answer in rows]
        return sum(loss for loss, _ in answers), sum(self.end_loss(states) for _, states in answers)


def number_of(name: str) -> int | None:
    """The layer that a matrix stands in."""
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def true_losses_and_gradient(truth: Truth, stage: int, rows, sizes=(1, 1)):
    """Losses in the order of the method's, and the gradient of their sum; each a mean over tokens and problems."""
    tokens, problems = sizes
    zero = {name: torch.zeros_like(value) for name, value in truth.trained.items()}
    if stage == 1:
        hidden, end = truth.first_stage(rows)
        end.div(problems).backward(retain_graph=True)
        gradient = zero | {"stop": truth.stop.grad}
        for layer, loss in enumerate(hidden):  # each moves its own layer and nothing else
            own = [name for name in zero if number_of(name) == layer and name.startswith("ccot.")]
            found = torch.autograd.grad(loss / problems, [truth.trained[name] for name in own], retain_graph=True)
            gradient |= dict(zip(own, found, strict=True))
        return [0.0, sum(hidden).item() / problems, end.item() / problems], gradient
    loss, end = truth.second_stage(rows)
    (loss / tokens + end / problems).backward()
    lowest = truth.layer if truth.recipe.compressed_cot.train_upper else len(truth.layers)
    held = [name for name in zero if name.startswith("ccot.") and number_of(name) < lowest]
    gradient = {name: value.grad for name, value in truth.trained.items()} | {name: zero[name] for name in held}
    return [loss.item() / tokens, 0.0, end.item() / problems], gradient


def drawn(method: CompressedCoT) -> CompressedCoT:
    """As after some steps: nothing is zero."""
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in method.trained().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return method


def batch_of(rows, stage: int, thoughts: int):
    examples = []
    for prompt, chain, answer in rows:
        room = AssistantInput("id", [], list(range(thoughts if stage == 2 else 0)))
        target = answer if stage == 2 else [*chain, *answer]
        examples.append(Example(Problem("q", "r", "1"), room, prompt, [], target, len(chain)))
    return collate(examples, pad_id=3)


def check_gradient(found, truth, tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name  # of zero, zero


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", []),
        ("mistral with a sliding window", ["compressed_cot.layer=2"]),
        ("llama", ["compressed_cot.train_upper=false"]),
        ("qwen3", ["compressed_cot.layer=3", "thoughts.count=3"]),
    ],
)
def test_losses_and_gradient_are_those_of_a_naive_float64_version(family, more, stage):
    base, recipe = make_model(family), load_recipe(RECIPE, [*CCOT, *more])
    plain = copy.deepcopy(base)
    method = drawn(CompressedCoT(base, recipe, torch.randn(1, base.config.hidden_size)))
    truth = Truth(plain, recipe, method.trained(), recipe.compressed_cot.layer or 1)
    losses, gradient = true_losses_and_gradient(truth, stage, ROWS)
    found = method.double()(batch_of(ROWS, stage, recipe.thoughts.count))
    found.sum().backward()
    assert found.tolist() == pytest.approx(losses, rel=1e-6)
    check_gradient({name: parameter.grad for name, parameter in method.trained().items()}, gradient, 1e-5)
    if stage == 2:
        by_token = method(batch_of(ROWS, stage, recipe.thoughts.count), per_token=True)
        own = [truth.answered(prompt, answer)[0].item() for prompt, _, answer in ROWS]
        assert [part.sum().item() for part in by_token.split([3, 4, 2])] == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "ratio", "most", "places"),
    [
        (10, 0.3, 9, [2, 5, 9]),
        (30, 0.1, 9, [9, 19, 29]),  # in floating point a little more than three
        (31, 0.1, 9, [6, 14, 22, 30]),
        (7, 1.0, 9, [0, 1, 2, 3, 4, 5, 6]),
        (7, 1.0, 3, [1, 3, 6]),
        (0, 0.5, 9, [-1]),
    ],
)
def test_chosen_tokens_are_evenly_spaced_and_end_with_the_last(length, ratio, most, places):
    assert chosen_places(length, ratio, most) == places


@pytest.mark.distributed
def test_gradient_of_two_ranks_is_that_of_the_naive_float64_version(tmp_path):
    """Of the first global batch of the embedded base under ZeRO-3, in each stage, with unequal micro-batches."""
    settings = [
        *(*CCOT, "task.train_problems=12", "task.validation_problems=2", "task.test_problems=2"),
        *("training.global_batch_size=5", "training.micro_batch_size=2"),
    ]
    stages = {1: [*settings, "compressed_cot.ccot_steps=1"], 2: [*settings, "compressed_cot.ccot_steps=0"]}
    base = load_frozen(load_recipe(RECIPE, settings).base, "none", torch.device("cpu"))
    given = Given(load_recipe(RECIPE, settings), copy.deepcopy(base), None, (0, 0), [], [], [])
    first = CompressedCoT.build(given)
    start = tmp_path / "start.safetensors"
    save_file({name: value.detach().clone() for name, value in drawn(first).trained().items()}, start)
    output = tmp_path / "found.safetensors"
    run_forked(2, "gradient_worker", RECIPE, output, *(f"{' '.join(stages[stage])} from:{start}" for stage in stages))
    found = load_file(output)
    experiment = Experiment(given.recipe)
    examples, tokenizer = experiment.splits.train, experiment.base_tokenizer
    (batch,) = islice(global_batches([example.length for example in examples], 5, given.recipe.seed), 1)
    rows = []
    for problem in (examples[index].problem for index in batch):
        chat = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts = prompt, f"{problem.reasoning} answer", f"answer {problem.answer}"
        prompt_ids, chain, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        rows.append((prompt_ids, chain, [*answer, tokenizer.eos_token_id]))
    for stage, overrides in stages.items():
        truth = Truth(base, given.recipe, load_file(start), layer=2)
        sizes = sum(len(answer) for _, _, answer in rows), len(rows)
        losses, gradient = true_losses_and_gradient(truth, stage, rows, sizes)
        variant = f"{' '.join(overrides)} from:{start}"
        if stage == 2:  # means over tokens: in the first stage none of these is a loss
            assert found[f"{variant}/losses"][0].item() == pytest.approx(sum(losses), rel=1e-5)
        check_gradient({name: found[f"{variant}/{name}"] for name in gradient}, gradient, 1e-3)


SMALL = [
    *("backbone.partition=zero3", "task.train_problems=40", "task.validation_problems=4", "task.test_problems=6"),
    *("thoughts.count=5", "compressed_cot.ratio=0.2", "compressed_cot.ccot_steps=1", "compressed_cot.layer=1"),
    *("training.warmup_steps=0", "training.global_batch_size=6", "training.micro_batch_size=4", "training.log_every=2"),
    *("training.save_every=1", "training.keep_checkpoints=9", "training.validate_every=9", "evaluation.batch_size=4"),
    *("evaluation.max_new_tokens=6", "compressed_cot.ccot.r=4", "compressed_cot.ccot.dropout=0.1"),
    *("compressed_cot.ccot.targets=[q_proj,v_proj]", "compressed_cot.decode.targets=[q_proj,up_proj]"),
]


@pytest.mark.distributed
def test_a_training_goes_on_bit_for_bit_and_its_adapter_thinks_in_evaluation_as_in_training(tmp_path):
    path = ROOT / "recipes/word_problems_compressed_cot.yaml"
    whole, part = ([*SMALL, f"output_dir={tmp_path}/{name}"] for name in ("whole", "part"))
    runs = [[*whole, "training.steps=3"], [*part, "training.steps=2"], [*part, "training.steps=3"]]
    run_forked(1, "train_worker", *(argument for run in runs for argument in (path, " ".join(run))))
    at_step = {
        step: load_file(load_recipe(path, whole).run_dir / f"checkpoints/step-{step}/{CompressedCoT.weights_file}")
        for step in (1, 2, 3)
    }
    for name in (CompressedCoT.weights_file, "optimizer.safetensors"):
        saved, found = (
            load_file(load_recipe(path, one).run_dir / "checkpoints/step-3" / name) for one in (whole, part)
        )
        assert saved.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in saved.items())
    for name, value in at_step[3].items():  # what is held in a stage stays as it is, to the bit
        answers = name.startswith("decode.") or name == "over"
        assert torch.equal(value, at_step[1][name]) == (name.startswith("ccot.") and number_of(name) < 1)
        assert not answers or (at_step[1][name].count_nonzero() == 0) == (".lora_B." in name)

    chosen = "evaluation.conditions=[learned,shuffled,empty,none]"
    checkpoint = load_recipe(path, whole).run_dir / "checkpoints/step-3"
    recipe, adapter = recipe_and_adapter(str(checkpoint), [chosen])
    evaluate(recipe, adapter)
    rows = {name: written(recipe.run_dir, name) for name in ("learned", "shuffled", "empty", "none")}
    two = f"output_dir={tmp_path}/two"
    run_forked(
        2, "softcot_ds.evaluate", checkpoint, "evaluation.conditions=[learned]", "evaluation.partition=zero3", two
    )
    of_two = written(load_recipe(path, [*whole, two]).run_dir, "learned")
    assert [row["loss"] for row in of_two] == pytest.approx([row["loss"] for row in rows["learned"]], rel=1e-4)
    assert [row["output"] for row in of_two] == [row["output"] for row in rows["learned"]]

    opened = Adapter(recipe, adapter)
    examples = opened.experiment.splits.test
    truth = Truth(opened.own_base, recipe, load_file(checkpoint / CompressedCoT.weights_file), layer=1)
    answers = opened.answer([example.problem.question for example in examples])
    for example, answer, learned, empty in zip(examples, answers, rows["learned"], rows["empty"], strict=True):
        target = opened.experiment.base_prompts.target_ids(f"answer {example.problem.answer}")
        with torch.no_grad():
            assert learned["loss"] == pytest.approx(truth.answered(example.prefix_ids, target)[0].item(), rel=1e-3)
            assert (
                learned["output"]
                == answer
                == opened.experiment.base_tokenizer.decode(
                    truth.written(example.prefix_ids, opened.experiment.base_prompts.stop_ids, 6)
                )
            )
            truth.recipe = recipe.model_copy(update={"thoughts": recipe.thoughts.model_copy(update={"count": 1})})
            assert empty["loss"] == pytest.approx(truth.answered(example.prefix_ids, target)[0].item(), rel=1e-3)
            truth.recipe = recipe
    own = opened.answer([example.problem.question for example in examples], with_thoughts=False)
    assert [row["output"] for row in rows["none"]] == own
    assert len({tuple(row["loss"] for row in of_condition) for of_condition in rows.values()}) == len(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=compressed_cot"], "compressed_cot: missing; say what part of a chain contemplation is as long as"),
        (["compressed_cot={ratio: 0.1, ccot_steps: 1}"], "a section of method=compressed_cot, and method is softcot"),
        ([*CCOT, "compressed_cot.ratio=1.5"], "compressed_cot.ratio: .*less than or equal to 1"),
        (
            [*CCOT, "thoughts.count=1"],
            "thoughts.count=1: the last is the vector that ends contemplation",
        ),
        ([*CCOT, "compressed_cot.ccot_steps=2"], "ccot_steps=2 leaves none of the 2 steps of the training to answers"),
        ([*CCOT, "training.weight_decay=0.1"], "weight_decay=0.1 would shrink what method=compressed_cot holds"),
        ([*CCOT, "training.activation_checkpointing=true"], "read each latent .* a second time; set it to false"),
        ([*CCOT, "task.targets=own.jsonl"], "task.targets=own.jsonl: .* set task.targets=gold"),
        ([*CCOT, "backbone.partition=tensor"], "partition=tensor, in slices, and method=compressed_cot changes whole"),
    ],
)
def test_what_it_cannot_do_is_said_before_work_starts(settings, message):
    with pytest.raises(SoftCoTError, match=message):
        Experiment(load_recipe(RECIPE, settings)).require_training()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("compressed_cot.layer=4", "compressed_cot.layer=4: LlamaForCausalLM has 3 layers; name one of these"),
        ("compressed_cot.decode.targets=[query]", "compressed_cot.decode.targets: .* no linear layers called query"),
    ],
)
def test_layers_that_the_base_has_not_are_named(setting, message):
    with pytest.raises(SoftCoTError, match=message):
        CompressedCoT(make_model("llama"), load_recipe(RECIPE, [*CCOT, setting]), torch.zeros(1, 16))


def test_a_search_is_refused_which_has_no_place_for_contemplation():
    chosen = ["evaluation.strategy=tree", "evaluation.temperature=0.7", "evaluation.conditions=[learned]"]
    with pytest.raises(SoftCoTError, match=r"evaluation.strategy=tree puts answers .* set it to single or"):
        CompressedCoT.check_evaluation(load_recipe(RECIPE, [*CCOT, *chosen]))


def test_damaged_settings_of_an_adapter_are_named(tmp_path):
    (tmp_path / "compressed_cot.json").write_text(json.dumps({"ratio": 2}))
    with pytest.raises(SoftCoTError, match=r"compressed_cot.json is damaged: ratio: Input .* use another"):
        CompressedCoT.apply_adapter(make_model("llama"), tmp_path, {})
