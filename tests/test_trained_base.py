"""Methods that train the base: their loss and gradient in float64, and what others read of what they save."""

import copy

import pytest
import torch
from adapters import make_adapter
from evaluations import make_recipe, records
from launch import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from test_operations import counted
from test_step import draw_examples, make_batch, make_model
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

import softcot_ds
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.forgetting import PlainText, forgetting, forgetting_lines
from softcot_ds.evaluation.run import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.inference import Adapter
from softcot_ds.methods.base import method_class
from softcot_ds.methods.full import Full
from softcot_ds.methods.lora import Lora
from softcot_ds.recipe import load_recipe
from softcot_ds.training.batches import seed_draws
from softcot_ds.values import resolve_location

BASE = resolve_location("package:pair/base")
RECIPE = ROOT / "recipes" / "word_problems.yaml"


def recipe_of(*overrides: str):
    return load_recipe(RECIPE, ["evaluation.conditions=[learned,none]", *overrides])


LORA = recipe_of("method=lora", "lora.r=3", "lora.alpha=12", "lora.targets=[q_proj,down_proj]")
FULL = recipe_of("method=full")
UNEVEN = [(9, 3, 5), (1, 1, 4), (1, 2, 1), (12, 1, 7)]
"""Tokens of prefix, suffix and target: something of the prompt stands before each target."""
METHODS = {"lora": (Lora, LORA), "full": (Full, FULL)}


def trained(name: str, model, checkpointing: bool = False):
    """The method around a copy of a model, as after some steps: what is added to it is not zero."""
    kind, recipe = METHODS[name]
    method = kind(copy.deepcopy(model), recipe, checkpointing)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in method.trained().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return method


def true_loss_and_gradient(model, name: str, weights: dict, examples) -> tuple[float, dict]:
    """In float64, each example alone, with the very weights that are meant: W + alpha / r B A, or all of them."""
    model = copy.deepcopy(model).double()
    weights = {key: value.detach().double().requires_grad_() for key, value in weights.items()}
    parameters = dict(model.named_parameters())
    if name == "full":
        parameters = weights
    else:
        for key in weights:
            layer, is_first, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
            if is_first:
                product = weights[key.replace("lora_A", "lora_B")] @ weights[key]
                parameters[f"{layer}.weight"] = parameters[f"{layer}.weight"] + 4 * product
    total = 0.0
    for prefix, _, suffix, target in examples:
        logits = functional_call(model, parameters, (torch.tensor([prefix + suffix + target]),)).logits[0]
        predictions = logits[-len(target) - 1 : -1].double().log_softmax(-1)
        total = total - predictions[torch.arange(len(target)), target].sum()
    total.backward()
    return total.item(), {key: value.grad for key, value in weights.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), ("qwen2", True), ("gemma2", False)])
def test_loss_and_gradient_are_those_of_each_example_alone_in_float64(name, family, checkpointing):
    model = make_model(family)
    examples = draw_examples(UNEVEN, thoughts=0)
    method = trained(name, model, checkpointing)
    method.train()
    loss = method(make_batch(examples, torch.float32))
    loss.backward()
    truth, gradient = true_loss_and_gradient(model, name, method.trained(), examples)
    assert loss.item() == pytest.approx(truth, rel=2e-6)
    assert gradient.keys() == method.trained().keys()
    for key, parameter in method.trained().items():
        error = (parameter.grad - gradient[key]).norm() / gradient[key].norm()
        assert error < 2e-5, f"{key}: {error:.1e}"
    assert all(p.requires_grad == (p.grad is not None) for p in method.base.parameters())
    by_token = method(make_batch(examples, torch.float32), per_token=True)
    assert by_token.sum().item() == pytest.approx(truth, rel=2e-6)
    assert by_token.dtype == torch.float64


@pytest.mark.parametrize("name", METHODS)
def test_operations_are_those_that_pytorch_counts(name):
    method = trained(name, make_model("llama eager"))
    batch = make_batch(draw_examples(UNEVEN, thoughts=0), torch.float32)
    if name == "lora":  # then the first layer's input wants a gradient as the others' do, with products of its own
        method.base.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
    assert method.operations(batch) == counted(method, batch)


def saved(name: str, folder):
    """A method around the embedded base, and its adapter directory as far as others read it."""
    kind, _ = METHODS[name]
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval().requires_grad_(False)
    method = trained(name, model)
    method.write_adapter(folder, {key: value.detach().clone() for key, value in method.trained().items()})
    return method, kind


def test_a_missing_file_of_an_adapter_is_named(tmp_path):
    recipe = recipe_of("method=lora", f"output_dir={tmp_path}", "evaluation.partition=none")
    folder = make_adapter(tmp_path / "adapter", recipe)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(SoftCoTError, match=r"adapter_config.json is damaged: No such file"):
        _ = Adapter(recipe, folder).change


IDS = torch.arange(5, 45)[None]


def test_peft_reads_a_lora_adapter_as_its_own(tmp_path):
    method, _ = saved("lora", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    before = plain(IDS).logits
    model = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    assert torch.equal(model(IDS).logits, method.base(IDS).logits)
    assert not torch.allclose(model(IDS).logits, before, atol=0.1)


def test_transformers_reads_a_trained_base_as_its_own(tmp_path):
    method, _ = saved("full", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(model(IDS).logits, method.base(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(BASE).get_vocab()
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE).chat_template


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_makes_of_the_base_what_was_trained(tmp_path, name):
    method, kind = saved(name, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval().requires_grad_(False)
    weights = load_file(tmp_path / kind.weights_file)
    kind.apply_adapter(base, tmp_path, weights)
    assert torch.equal(base(IDS).logits, method.base(IDS).logits)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    del weights[next(iter(weights))]
    fresh = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with pytest.raises(SoftCoTError, match=r"weights are not those of this base: 1 differ, '.*' first: missing there"):
        kind.apply_adapter(fresh, tmp_path, weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_evaluation_compares_the_base_as_it_was_trained_with_the_recipes_own(tmp_path, name):
    """Losses and answers by transformers and PEFT alone, from the adapter's files."""
    settings = [f"output_dir={tmp_path}", f"method={name}", "evaluation.conditions=[learned,none]"]
    (tmp_path / "plain.txt").write_text("tom has 3 apples . ann has 4 coins . " * 20)
    recipe = make_recipe(tmp_path, *settings, f"evaluation.plain_text={tmp_path}/plain.txt")
    folder = make_adapter(tmp_path / "adapter", recipe)
    report = evaluate(recipe, folder)
    found, told = report["conditions"], report["forgetting"]["plain_text"]
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    models = {"none": plain}
    if name == "lora":
        again = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        models["learned"] = PeftModel.from_pretrained(again, str(folder)).eval()
    else:
        models["learned"] = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    experiment = Experiment(recipe)
    tokenizer, examples = experiment.base_tokenizer, experiment.splits.test
    for condition, model in models.items():
        losses = []
        for example in examples:
            asked = [{"role": "user", "content": example.problem.question}]
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            target = torch.tensor(example.target_ids)
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *example.target_ids]])).logits[0, len(ids) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum").item())
        assert found[condition]["loss"]["per_problem"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert abs(found["learned"]["loss"]["per_problem"] - found["none"]["loss"]["per_problem"]) > 0.05
    ids = tokenizer((tmp_path / "plain.txt").read_text(), add_special_tokens=False).input_ids
    for when, model in (("before", models["none"]), ("after", models["learned"])):
        nats = 0.0
        for start in range(0, len(ids), 256):
            piece = torch.tensor([ids[start : start + 256]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits.double(), piece[0, 1:], reduction="sum").item()
        assert told[when] == pytest.approx(nats / told["tokens"], rel=1e-5)
    assert told["tokens"] == len(ids) - -(-len(ids) // 256)
    for condition, model in models.items():
        first = records(recipe, condition)[0]
        ids = tokenizer(first["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
        written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written).startswith(first["output"]), condition

    adapter = softcot_ds.load(folder)
    question = examples[0].problem.question
    assert adapter.answer([question]) == [records(recipe, "learned")[0]["output"]]
    assert adapter.answer([question], with_thoughts=False) == [records(recipe, "none")[0]["output"]]
    with pytest.raises(SoftCoTError, match=f"is of method={name}, which has no thoughts"):
        adapter.thoughts([question])
    with pytest.raises(SoftCoTError, match=rf"conditions: mean, zero: method={name} makes no thoughts that this could"):
        evaluate(make_recipe(tmp_path, *settings[:2], "evaluation.conditions=[learned,mean,zero]"), folder)


def test_what_is_forgotten_is_told_before_and_after():
    before, after = ({"accuracy": a, "loss": {"per_token": n}} for a, n in ((0.5, 1.0), (0.25, 1.5)))
    report = {"task": "aqua", "trained_on": "gsm8k", "conditions": {"none": before, "learned": after}}
    text = PlainText("book.txt", 10, 2.0, 2.25, "key")
    lines = forgetting_lines(forgetting(report, text, True, "f" * 64))
    assert [line.split()[-3:] for line in lines[2:]] == [
        ["2.0000", "2.2500", "+0.2500"],
        ["50.0%", "25.0%", "-25.0%"],
        ["1.0000", "1.5000", "+0.5000"],
    ]
    assert not forgetting(report | {"trained_on": "aqua"}, None, True, "f")
    frozen = forgetting(report, PlainText("book.txt", 10, 2.0, 2.0, "key"), False, "f" * 64)
    assert frozen.keys() == {"plain_text", "base_unchanged"}
    assert "its fingerprint is ffffffffffff, as before" in forgetting_lines(frozen)[-1]
    assert not forgetting_lines({})


def test_dropout_is_drawn_in_training_alone_and_as_often_as_asked_for():
    recipe = recipe_of("method=lora", "lora.dropout=0.5")
    method = Lora(make_model("llama"), recipe, False)
    for parameter in method.trained().values():
        parameter.data.fill_(0.1)
    batch = make_batch(draw_examples(UNEVEN, thoughts=0), torch.float32)

    def loss(step: int, micro_batch: int) -> float:
        seed_draws(0, step, micro_batch)
        return method(batch).item()

    method.train()
    assert loss(1, 0) == loss(1, 0)
    assert len({loss(1, 0), loss(1, 1), loss(2, 0)}) == 3
    method.train(False)
    assert loss(1, 0) == loss(2, 0)
    assert not any(module.training for module in method.base.modules())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=lora", "backbone.partition=tensor"], "partition=tensor, in slices, and method=lora changes whole"),
        (["method=lora", "backbone.bits=8"], "backbone.bits=8 is for a base that stays as it is, and method=lora"),
        (["method=full", "backbone.resident_gib=1"], "resident_gib=1 is for a base that stays as it is"),
        (["method=full", "backbone.partition=node"], "partition=node sums no gradients over nodes, and method=full"),
        (["method=lora", f"projection.init_from={RECIPE}"], "method=lora has no projection that could start from it"),
        (["method=lora", "backbone.partition=node"], ""),
    ],
)
def test_what_a_method_that_changes_the_base_cannot_do_is_refused(overrides, said):
    recipe = recipe_of(*overrides)
    if not said:
        method_class(recipe.method).check(recipe)
        return
    with pytest.raises(SoftCoTError, match=said):
        method_class(recipe.method).check(recipe)


def test_layers_that_the_base_has_not_are_named():
    recipe = recipe_of("method=lora", "lora.targets=[q_proj,query]")
    with pytest.raises(SoftCoTError, match=r"no linear layers called query; it has down_proj, gate_proj, k_proj, o_pr"):
        Lora(make_model("llama"), recipe, False)
    with pytest.raises(SoftCoTError, match="no linear layers called query"):
        Lora.num_trained(recipe, (1, 1), make_model("llama"))
    fits = recipe_of("method=lora", "lora.r=3", "lora.targets=[k_proj,up_proj]")
    method = Lora(make_model("llama"), fits, False)
    assert Lora.num_trained(fits, (1, 1), make_model("llama")) == sum(p.numel() for p in method.trained().values())
