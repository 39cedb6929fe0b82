"""Checkpoints on disk: which are kept, and what is said of damaged ones. No process is started."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from adapters import make_checkpoint
from launch import ROOT
from safetensors.torch import load_file, save_file

from softcot_ds.adapter import AdapterConfig, adapter_config, load_adapter
from softcot_ds.card import is_edited
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.files import dump_yaml, parse_yaml
from softcot_ds.methods.conditioning import Conditioning
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.recipe import Recipe, fixed_settings, load_recipe
from softcot_ds.run_dir import MARKER, checkpoints, latest_checkpoint, load_for_evaluation, recipe_and_adapter
from softcot_ds.training import checkpoint, resume
from softcot_ds.training.checkpoint import FILES, read_training_state, save_checkpoint
from softcot_ds.training.resume import refuse_other_run

RECIPE = ROOT / "recipes" / "word_problems.yaml"


def empty_checkpoints(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / f"checkpoints/step-{step}").mkdir(parents=True)
        (run_dir / f"checkpoints/step-{step}" / MARKER).touch()


def test_old_checkpoint_that_cannot_be_removed_is_a_warning_and_looks_whole_to_nobody(tmp_path, monkeypatch, capsys):
    def busy(path: Path) -> None:
        if path.name == "step-2":
            raise OSError(39, "Directory not empty", str(path))  # what NFS says while somebody reads a file in it
        remove(path)

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", busy)
    empty_checkpoints(tmp_path, 2, 4, 10, 20)
    checkpoint._prune(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-10", "step-20"]
    assert not (tmp_path / "checkpoints/step-4").exists()
    assert "step-2 cannot be removed" in capsys.readouterr().out


def test_the_checkpoint_of_the_least_validation_loss_stays(tmp_path):
    empty_checkpoints(tmp_path, 2, 4, 10, 20, 30)
    checkpoint._prune(tmp_path, keep=2, best=4)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-20", "step-30"]
    checkpoint._prune(tmp_path, keep=2, best=30)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-20", "step-30"]


class Projecting(SoftThoughts):
    """A method as far as a checkpoint asks: without models."""

    projection_class = LinearProjection

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.projection = LinearProjection(3, 2)


@pytest.fixture
def engine(monkeypatch) -> SimpleNamespace:
    """A DeepSpeed engine as far as a checkpoint asks: a projection, and AdamW's moments in ``state`` by their names."""
    module = Projecting()
    projection = module.projection
    names = {id(p): name for name, p in projection.named_parameters()}
    state = {f"{m}.{name}": p.detach() ** 2 for name, p in projection.named_parameters() for m in checkpoint._MOMENTS}
    monkeypatch.setattr(checkpoint, "safe_get_full_fp32_param", torch.Tensor.detach)
    monkeypatch.setattr(
        checkpoint, "safe_get_full_optimizer_state", lambda p, moment: state[f"{moment}.{names[id(p)]}"]
    )
    inner = SimpleNamespace(state={0: {"step": torch.tensor(60.0)}})
    return SimpleNamespace(
        module=module,
        state=state,
        optimizer=SimpleNamespace(optimizer=inner),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wrong", ["weight", "bias", "exp_avg.weight", "exp_avg_sq.bias"])
def test_values_that_are_not_finite_are_never_saved(saved, engine, wrong, value):
    """One of them, the last, among good ones. The run is left as it was, and can be saved once it is finite."""
    recipe, older = saved
    experiment = Experiment(recipe)
    before = {path.name: path.read_bytes() for path in older.iterdir()}

    def save() -> Path:
        config = adapter_config(experiment).at_step(60)
        return save_checkpoint(engine, recipe, config, experiment.task.prompt_file, {"steps": 60})

    tensor = engine.state[wrong] if "." in wrong else getattr(engine.module.projection, wrong).detach()
    good, tensor.view(-1)[-1] = tensor.view(-1)[-1].item(), value
    with pytest.raises(
        SoftCoTError, match=r"not finite after step 60: not saved\. The newest checkpoint is step-50; lower"
    ):
        save()
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert [path.name for path in older.parent.iterdir()] == ["step-50"]

    tensor.view(-1)[-1] = good
    weights, moments, trainer, conditioning = read_training_state(save())
    assert all(torch.equal(weights[name], p) for name, p in engine.module.projection.named_parameters())
    assert all(torch.equal(moments[name], engine.state[name]) for name in engine.state)
    assert trainer.optimizer_steps == 60
    assert conditioning is None


def test_a_checkpoint_has_a_card_and_its_own_copies_of_chat_templates(saved, engine, tmp_path):
    recipe, _ = saved
    template = tmp_path / "chat.jinja"
    template.write_text(text := (ROOT / "softcot_ds/pair/base/chat_template.jinja").read_text() + "{# mine #}")
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"chat_template": template})})
    experiment = Experiment(recipe)
    config = adapter_config(experiment).at_step(60)
    folder = save_checkpoint(engine, recipe, config, experiment.task.prompt_file, {"steps": 60})
    assert not is_edited((folder / "README.md").read_text())
    template.unlink()
    opened = load_for_evaluation(str(folder), [])
    assert opened.base.chat_template.read_text() == text
    assert opened.assistant.chat_template is None
    config.check_models(Experiment(opened))
    assert not config.other_templates(Experiment(opened))


@pytest.mark.parametrize("matrix", [None, torch.tensor([[3.0, 0, 1], [0, 0.25, 0], [0, 2, 1]])])
def test_a_checkpoint_holds_the_weights_as_they_are_trained_and_those_of_plain_states(saved, engine, matrix):
    recipe, _ = saved
    experiment, projection = Experiment(recipe), engine.module.projection
    engine.module.conditioning = Conditioning(torch.tensor([40.0, 0.5, -1.0]), matrix)
    folder = save_checkpoint(
        engine, recipe, adapter_config(experiment).at_step(60), experiment.task.prompt_file, {"steps": 60}
    )
    state = read_training_state(folder)
    assert all(torch.equal(state.weights[name], p) for name, p in projection.named_parameters())
    assert state.moments.keys() == engine.state.keys()
    want = engine.module.conditioning.tensors()
    assert state.conditioning.tensors().keys() == want.keys()
    assert all(torch.equal(state.conditioning.tensors()[name], value) for name, value in want.items())
    adapter, plain = load_file(folder / "projection.safetensors"), torch.tensor([41.0, 0.75, -3.0])
    conditioned = engine.module.conditioning(plain)
    torch.testing.assert_close(adapter["weight"] @ plain + adapter["bias"], projection(conditioned), rtol=0, atol=2e-5)

    path = folder / "optimizer.safetensors"
    whole = load_file(path)
    for wrong, said in (
        (whole | {"conditioning.matrix": torch.zeros(3, 2)}, "no conditioning"),
        ({name: value for name, value in whole.items() if name != "trained.bias"}, "not those of projection"),
        ({name: value for name, value in whole.items() if not name.startswith("conditioning")}, "not those of"),
        (whole | {"conditioning.other": torch.zeros(3)}, "no conditioning"),
    ):
        save_file(wrong, path)
        with pytest.raises(SoftCoTError, match=rf"optimizer.safetensors is damaged: .*{said}"):
            read_training_state(folder)


SMALL = ["task.train_problems=12", "task.validation_problems=1", "task.test_problems=1", "training.steps=100"]
FREE_SETTINGS = {
    "task.prompts",
    "task.metric_rule",
    "task.test_problems",
    "task.targets",
    "thoughts.source",
    "cache.path",
    "cache.shard_mib",
    "cache.tokens_per_batch",
    "cache.partition",
    "projection.init_from",
    "training.step",
    "training.micro_batch_size",
    "training.micro_batch_tokens",
    "training.activation_checkpointing",
    "training.log_every",
    "training.profile_steps",
    "training.validate_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.timeout_minutes",
    "training.step_timeout_minutes",
    "training.max_restarts",
    "output_dir",
    "trackers",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Recipe:
    """The recipe of a run with a checkpoint of step 50."""
    recipe = load_recipe(RECIPE, [*SMALL, f"output_dir={tmp_path_factory.mktemp('run')}"])
    make_checkpoint(recipe, 50)
    return recipe


@pytest.fixture
def saved(original, tmp_path) -> tuple[Recipe, Path]:
    """A copy of it, to be damaged."""
    shutil.copytree(original.run_dir, tmp_path / "demo")
    return original.model_copy(update={"output_dir": tmp_path}), tmp_path / "demo/checkpoints/step-50"


def refusal(recipe: Recipe, folder: Path, experiment: Experiment | None = None) -> str:
    """What is said of a run that would go on from ``folder``; empty where it may."""
    try:
        refuse_other_run(experiment or Experiment(recipe), folder)
    except SoftCoTError as error:
        return str(error)
    return ""


def test_every_setting_is_compared_but_the_free_ones():
    recipe = load_recipe(RECIPE, SMALL)
    whole = recipe.model_dump(mode="json")
    every = {key for key in recipe.flat() if key.partition(".")[0] not in ("backbone", "evaluation", "targets")}
    every = {key.replace("template_kwargs.date_string", "template_kwargs") for key in every}
    assert fixed_settings(whole).keys() == (every - FREE_SETTINGS) | {"backbone.bits"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.save_every=7", "evaluation.top_p=0.5", "backbone.partition=none", "training.step=full"], ""),
        (["training.steps=1000"], "training.steps is 100 there and 1000 here, and the linear schedule depends on it"),
        (
            ["training.steps=1000", "training.betas=[0.8,0.9]"],
            "training.betas is [0.9, 0.999] there and [0.8, 0.9] here",
        ),
        (["cache.dtype=bfloat16"], "cache.dtype is None there and 'bfloat16' here"),
        (["base.template_kwargs={date_string: today}"], "base.template_kwargs is {'date_string': '26 Jul 2024'} there"),
        (["seed=1"], "seed is 0 there and 1 here"),
    ],
)
def test_run_goes_on_with_its_own_settings(saved, overrides, said):
    recipe, folder = saved
    changed = load_recipe(RECIPE, [*SMALL, f"output_dir={recipe.output_dir}", *overrides])
    assert said in (found := refusal(changed, folder))
    assert bool(said) == bool(found)


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on(tmp_path):
    """Also of sections that may be left out."""
    chains = ["method=softcot_pp", "chains={count: 2, initial: random}", "projection.condition=none"]
    recipe = load_recipe(RECIPE, [*SMALL, f"output_dir={tmp_path}", *chains, "projection.init_scale=0.27"])
    folder = make_checkpoint(recipe, 50)
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    for section, key in (("chains", "contrastive"), ("training", "betas")):
        del saved[section][key]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(saved))
    assert not refusal(recipe, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(saved | {"chains": saved["chains"] | {"contrastive": 0.5}}))
    assert "chains.contrastive is 0.5 there and " in refusal(recipe, folder)


def test_what_a_method_takes_no_notice_of_may_change(tmp_path):
    overrides = [*SMALL, f"output_dir={tmp_path}", "method=lora"]
    folder = make_checkpoint(load_recipe(RECIPE, overrides), 50)
    other = ["projection={condition: whiten, init_scale: 0.5}"]
    assert not refusal(load_recipe(RECIPE, [*overrides, *other]), folder)
    assert "lora.r is 16 there and 4 here" in refusal(load_recipe(RECIPE, [*overrides, *other, "lora.r=4"]), folder)


def test_constant_schedule_takes_more_steps(tmp_path):
    overrides = [*SMALL, f"output_dir={tmp_path}", "training.schedule=constant"]
    folder = make_checkpoint(load_recipe(RECIPE, overrides), 50)
    assert not refusal(load_recipe(RECIPE, [*overrides, "training.steps=1000"]), folder)
    assert "warmup_steps" in refusal(load_recipe(RECIPE, [*overrides, "training.warmup_steps=1"]), folder)


def test_data_and_templates_are_compared_by_content(tmp_path):
    template, data = tmp_path / "template.jinja", tmp_path / "train.jsonl"
    shutil.copy(ROOT / "softcot_ds/pair/base/chat_template.jinja", template)
    lines = [json.dumps({"question": f"what is {i} plus 1 ?", "answer": f"#### {i + 1}"}) for i in range(12)]
    data.write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "what is 90 plus 1 ?", "answer": "#### 91"}))
    files = [f"task.train={data}", f"task.test={tmp_path}/test.jsonl", f"base.chat_template={template}"]
    sizes = ["task.train_problems=null", "task.test_problems=null", "task.validation_problems=1"]
    recipe = load_recipe(RECIPE, ["task.name=gsm8k", *files, *sizes, f"output_dir={tmp_path}"])
    folder = make_checkpoint(recipe, 50)
    assert not refusal(recipe, folder)

    data.write_text("\n".join(lines[::-1]))
    other_data = "the training or validation data there is other data than now"
    assert other_data in refusal(recipe, folder), "another order"
    data.write_text("\n".join(lines))
    (own := tmp_path / "validation.jsonl").write_text(lines[0])
    files.append(f"task.validation={own}")
    validated = load_recipe(RECIPE, ["task.name=gsm8k", *files, *sizes, f"output_dir={tmp_path}", "name=other"])
    other = make_checkpoint(validated, 50)
    assert not refusal(validated, other)
    own.write_text(lines[0].replace("plus", "and"))
    assert other_data in refusal(validated, other)
    template.write_text("{# other #}" + template.read_text())
    assert "the chat template of base there is another one than now" in refusal(recipe, folder)
    assert "training data" not in refusal(recipe, folder), "of which the template is the cause"


def test_template_of_another_kind_is_warned_of_and_an_old_adapter_says_nothing(saved, capsys):
    recipe, folder = saved
    experiment = Experiment(recipe)
    load_adapter(folder, experiment)
    assert not capsys.readouterr().err
    values = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(values | {"chat_templates": {"base": "0", "assistant": "0"}}))
    load_adapter(folder, experiment)
    assert "the chat template of base is not the one that" in capsys.readouterr().err
    for name in ("chat_templates", "training_data"):
        del values[name]
    (folder / "adapter.json").write_text(json.dumps(values))
    load_adapter(folder, experiment)
    assert "of an older version" in capsys.readouterr().err
    assert not refusal(recipe, folder, experiment)
    assert "not compared" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "kind"), [("softcot", "linear"), ("prompt_tuning", "static")])
def test_what_was_saved_before_methods_had_names_is_read_and_gone_on_from(tmp_path, method, kind):
    recipe = load_recipe(RECIPE, [*SMALL, f"output_dir={tmp_path}", f"method={method}"])
    folder = make_checkpoint(recipe, 50)
    adapter, written = (folder / name for name in ("adapter.json", "recipe.yaml"))
    values, settings = json.loads(adapter.read_text()), parse_yaml(written.read_text())
    del values["method"], settings["method"]
    adapter.write_text(json.dumps(values | {"projection": kind}))
    written.write_text(dump_yaml(settings | {"projection": {**settings["projection"], "kind": kind}}))
    assert not refusal(recipe, folder)
    assert recipe_and_adapter(str(folder), [])[0].method == AdapterConfig.load(folder).method == method
    other = "softcot" if method == "prompt_tuning" else "prompt_tuning"
    assert f"method is {method!r} there and {other!r} here" in refusal(
        load_recipe(RECIPE, [*SMALL, f"output_dir={tmp_path}", f"method={other}"]), folder
    )
    adapter.write_text(json.dumps(values | {"projection": "deep"}))
    with pytest.raises(SoftCoTError, match=r"adapter.json is damaged: method: "):
        load_adapter(folder, Experiment(recipe))


JSON_DAMAGE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"3",
    b'"text"',
    b"{",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"step": 1, "step": 2}',
]


def json_mutations(content: bytes) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Each value replaced by one of another type, each key left out, and one too many; with the place of it."""
    values = json.loads(content)
    for path in [(key,) for key in values] + [(key, k) for key, v in values.items() if isinstance(v, dict) for k in v]:
        for wrong in (None, [], {}, "x", -1, 1.5, True, "left out"):
            copy = json.loads(content)
            section = copy[path[0]] if len(path) > 1 else copy
            if wrong == "left out":
                del section[path[-1]]
            elif type(section[path[-1]]) is type(wrong):
                continue
            else:
                section[path[-1]] = wrong
            yield path, json.dumps(copy).encode()
    yield ("more",), json.dumps(values | {"more": 1}).encode()


@pytest.mark.parametrize("name", ["adapter.json", "trainer.json"])
def test_damaged_json_is_refused_by_name_and_never_a_stack_trace(saved, name):
    recipe, folder = saved
    experiment = Experiment(recipe)
    may_be_others = {
        "revision",
        "training_data",
        "chat_templates",
        "package_version",
        "summary",
        "layer",
        "placeholders",
        "initial_embeddings",
    }
    mutations = list(json_mutations((folder / name).read_bytes()))
    assert len(mutations) > 20
    for path, damaged in [((), content) for content in JSON_DAMAGE] + mutations:
        (folder / name).write_bytes(damaged)
        said = refusal(recipe, folder, experiment)
        if not may_be_others.intersection(path):
            assert said.startswith(f"{folder / name} is damaged: "), (said, damaged[:200])
            assert f"To train on from the one before, remove {folder}" in said
            assert "\n" not in said


@pytest.mark.parametrize("name", ["projection.safetensors", *FILES])
def test_missing_or_truncated_file_is_named(saved, name):
    recipe, folder = saved
    experiment = Experiment(recipe)
    content = (folder / name).read_bytes().rstrip()
    for length in (0, 1, 7, 8, 9, len(content) // 3, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        said = refusal(recipe, folder, experiment)
        if name != "recipe.yaml" or length < 9:  # the rest of a recipe may be its defaults
            assert said, f"{name} cut at {length}"
    (folder / name).unlink()
    assert refusal(recipe, folder, experiment).startswith(f"{folder / name} is damaged: No such file")
    with pytest.raises(SoftCoTError, match=f"{name} is damaged: No such file.*remove {folder}"):
        resume._choose(recipe.run_dir)


@pytest.mark.parametrize("content", ["null", "[]", "3", "training: null", "training: []", "{", "a: b: c", "{}", "\t"])
def test_damaged_recipe_is_named(saved, content):
    recipe, folder = saved
    (folder / "recipe.yaml").write_text(content)
    assert str(folder / "recipe.yaml") in refusal(recipe, folder)


@pytest.mark.parametrize("name", ["projection.safetensors", "optimizer.safetensors"])
def test_tensors_of_another_kind_are_refused(saved, name):
    recipe, folder = saved
    experiment = Experiment(recipe)
    good = load_file(folder / name)
    first = next(iter(good))
    for wrong in (
        {},
        {first: good[first]},
        {**good, "more": torch.zeros(1)},
        {**good, first: good[first].double()},
        {**good, first: good[first].to(torch.int32)},
        {**good, first: good[first][:-1].clone()},
    ):
        save_file(wrong, folder / name)
        assert "is damaged: " in refusal(recipe, folder, experiment)


def test_checkpoint_under_another_steps_name_is_refused(saved):
    recipe, folder = saved
    later = folder.with_name("step-60")
    shutil.copytree(folder, later)
    assert latest_checkpoint(recipe.run_dir) == later
    assert "step 50 is not that of the folder" in refusal(recipe, later)
