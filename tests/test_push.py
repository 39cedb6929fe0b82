"""Adapters for others: their cards, what is sent of them and what is not; sent, and opened again from there."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from huggingface_hub import ModelCard, constants
from launch import ROOT
from safetensors.torch import load_file
from small_hub import TOKEN, running

import softcot_ds
from softcot_ds import push as push_module
from softcot_ds.adapter import AdapterConfig, train_summary
from softcot_ds.card import is_edited, model_card
from softcot_ds.data.targets import OwnShare
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import dump_yaml, parse_yaml
from softcot_ds.push import files_for_others, main, push
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import load_for_evaluation, recipe_and_adapter
from softcot_ds.values import resolve_location

QUESTIONS = ["tom has 23 coins . how many coins now ?", "leo has 9 coins ."]
MODELS = ["base.model=package:pair/base", "assistant.model=package:pair/assistant"]
CONDITIONS = {
    "none": {"accuracy": 0.25, "ci95": [0.2, 0.3], "loss": {"per_token": 1.5}},
    "learned": {"accuracy": 0.75, "ci95": [0.7, 0.8], "loss": {"per_token": 0.5}},
}
SERVER = "http://host.of.ours:8000"
LOSS = {"per_token": -1.0, "ci95": [-1.25, -0.75], "p_value": 0.001}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that names as many files and folders of this machine as there are settings for them."""
    folder = tmp_path_factory.mktemp("secret")
    for name in ("assistant", "base"):
        shutil.copytree(resolve_location(f"package:pair/{name}"), folder / name)
    for name, numbers in (("train", range(4)), ("test", range(4, 7)), ("validation", range(7, 9))):
        lines = [json.dumps({"q": f"what is {number} plus 1 ?", "a": number + 1}) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "text.txt").write_text("tom has 8 pens .")
    shutil.copy(folder / "base/chat_template.jinja", folder / "chat.jinja")
    shutil.copy(ROOT / "softcot_ds/tasks/word_problems.yaml", folder / "wording.yaml")
    for strategy in ("tree", "graph"):
        shutil.copy(ROOT / f"softcot_ds/evaluation/{strategy}.yaml", folder / f"{strategy}.yaml")
    shutil.copy(ROOT / "ds_configs/zero3.json", folder / "ds.json")
    task = "{name: custom, fields: {question: q, answer: a}, answer: number, validation_problems: 1, "
    task += ", ".join(f"{split}: {folder}/{split}.jsonl" for split in ("train", "validation", "test"))
    task += f", prompts: {folder}/wording.yaml}}"
    settings = [
        f"task={task}",
        *(f"{name}.model={folder}/{name}" for name in ("assistant", "base")),
        *(f"{name}.chat_template={folder}/chat.jinja" for name in ("assistant", "base")),
        *(f"evaluation.{name}.wording={folder}/{name}.yaml" for name in ("tree", "graph")),
        f"output_dir={folder}/runs",
        f"cache.path={folder}/cache",
        f"backbone.deepspeed={folder}/ds.json",
        f"evaluation.plain_text={folder}/text.txt",
        f"evaluation.outputs={folder}/outputs",
        f"evaluation.static_adapter={folder}/static",
        f"evaluation.server={SERVER}",
        "evaluation.conditions=[learned,static]",
    ]
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", settings)
    adapter = make_adapter(recipe.run_dir / "checkpoints/step-5", recipe, step=5)
    for name in ("base", "assistant"):
        shutil.copy(folder / "chat.jinja", adapter / f"{name}_chat_template.jinja")
    own = OwnShare(4, 2, 2, "gold", "none", f"{folder}/base-by-another-name", "f" * 64)
    state = json.loads((adapter / "trainer.json").read_text())
    state["summary"]["own_targets"] = asdict(own)
    (adapter / "trainer.json").write_text(json.dumps(state))
    (adapter / "optimizer.safetensors").write_bytes(b"moments")
    (adapter / "notes.log").write_text(TOKEN)
    report = {
        "task": "custom",
        "num_problems": 1234,
        "num_thoughts": 4,
        "step": 5,
        "temperature": 0.0,
        "train": train_summary(adapter),
        "conditions": CONDITIONS,
        "comparisons": {"learned-none": {"difference": 0.5, "p_value": 0.0625, "loss": LOSS}},
    }
    (recipe.run_dir / "report.json").write_text(json.dumps(report))
    return adapter


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield from running(tmp_path / "cache", monkeypatch)


@pytest.mark.slow
def test_what_is_sent_opens_elsewhere_and_names_nothing_of_this_machine(folder, hub, capsys):
    push(str(folder), "owner/name", MODELS, private=True)
    sent = hub.repos["owner/name"]
    templates = {"base_chat_template.jinja", "assistant_chat_template.jinja"}
    files = {"adapter.json", "trainer.json", "recipe.yaml", "prompts.yaml", "projection.safetensors", "COMPLETE"}
    assert sent.keys() == files | templates | {"README.md"}
    assert hub.private == {"owner/name"}
    secret = str(folder.parents[3])
    assert secret in (folder / "recipe.yaml").read_text()
    assert SERVER in (folder / "recipe.yaml").read_text()
    for own in (secret, SERVER, TOKEN):
        assert not [name for name, content in sent.items() if own.encode() in content]
    said = capsys.readouterr()
    assert "not: notes.log, optimizer.safetensors\n" in said.err
    assert said.err.endswith(f"sent: {constants.ENDPOINT}/owner/name\n")
    assert TOKEN not in said.err

    there, here = softcot_ds.load("owner/name"), softcot_ds.load(folder)
    assert there.folder.is_relative_to(constants.HF_HUB_CACHE)
    assert torch.equal(there.thoughts(QUESTIONS), here.thoughts(QUESTIONS))
    assert there.experiment.chat_identity == here.experiment.chat_identity
    with pytest.raises(
        SoftCoTError, match=r"unpublished:test.jsonl: this data stayed where .*; name some in task.test"
    ):
        _ = there.experiment.splits
    data = [f"task.{split}={folder.parents[3]}/{split}.jsonl" for split in ("train", "test")]
    experiment = softcot_ds.load("owner/name", *data).experiment
    splits = experiment.splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 0, 3]
    with pytest.raises(SoftCoTError, match=r"unpublished:validation.jsonl: .*; name some in task.validation"):
        experiment.require_training()
    softcot_ds.load("owner/name", *data, "task.validation_problems=0").experiment.require_training()


@pytest.mark.slow
def test_an_adapter_of_the_hub_says_neither_who_is_asked_nor_where_is_written(folder, hub):
    push(str(folder), "owner/name", MODELS)
    values = parse_yaml(hub.repos["owner/name"]["recipe.yaml"].decode())
    values |= {"output_dir": "/srv", "evaluation": values["evaluation"] | {"outputs": "/srv/outputs", "server": SERVER}}
    hub.repos["owner/name"]["recipe.yaml"] = dump_yaml(values).encode()
    recipe, _ = recipe_and_adapter("owner/name", [])
    assert (recipe.output_dir, recipe.evaluation.outputs, recipe.evaluation.server) == (Path("runs"), None, None)
    recipe, _ = recipe_and_adapter("owner/name", ["output_dir=mine", f"evaluation.server={SERVER}"])
    assert (recipe.output_dir, recipe.evaluation.server) == (Path("mine"), SERVER)


def test_a_dry_run_shows_the_card_and_the_files_and_asks_nobody(folder, hub, capsys):
    assert main([str(folder.parents[1]), "owner/name", "--dry-run", *MODELS]) == 0
    assert not hub.asked
    said = capsys.readouterr()
    size = (folder / "projection.safetensors").stat().st_size
    assert f"would be sent to owner/name, from {folder}:\n" in said.err
    assert f" {size:,} bytes  projection.safetensors\n" in said.err
    card = ModelCard(said.out)
    assert not is_edited(said.out)
    results = {(one.metric_type, one.metric_args["condition"]): one for one in card.data.eval_results}
    assert {key: one.metric_value for key, one in results.items()} == {
        (kind, name): row["accuracy"] if kind == "accuracy" else row["loss"]["per_token"]
        for name, row in CONDITIONS.items()
        for kind in ("accuracy", "loss")
    }
    assert card.data.eval_results[0] == results["accuracy", "learned"], "whoever takes one takes this"
    assert results["accuracy", "none"].metric_args["ci95"] == [0.2, 0.3]
    cells = ["25.0%", "20.0% to 30.0%", "+50.0", "0.062", "1.5000", "-1.0000 (-1.2500 to -0.7500)"]
    assert f"| `none`, no thoughts, zero-shot CoT | {' | '.join(cells)} |" in card.text.splitlines()
    assert 'softcot_ds.load("owner/name")' in card.text
    assert card.data.base_model_relation == "adapter"
    assert card.data.license == "apache-2.0"


def test_a_card_names_models_as_others_find_them(folder):
    recipe, config = load_for_evaluation(str(folder), []), AdapterConfig.load(folder)
    here = ModelCard(text := model_card(recipe, config, train_summary(folder)))
    assert str(folder.parents[3]) not in text
    assert "Not evaluated yet" in text
    assert f"| base | base | - | `{config.base.fingerprint[:12]}` |" in text
    assert (here.data.base_model, here.data.license, here.data.eval_results) == (None, None, None)
    assert "\n# license: that of the base is not known here" in text

    (folder.parents[3] / "base/README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: L\n---\n# x")
    licensed = ModelCard(model_card(recipe, config, train_summary(folder))).data
    (folder.parents[3] / "base/README.md").unlink()
    assert (licensed.license, licensed.license_name, licensed.license_link) == ("other", "x", None)
    update = {"base": recipe.base.model_copy(update={"model": "a/b"}), "assistant": recipe.assistant}
    update["assistant"] = recipe.assistant.model_copy(update={"model": "c/d"})
    named = ModelCard(model_card(recipe.model_copy(update=update), config, train_summary(folder))).data
    assert named.base_model == ["a/b", "c/d"]
    assert named.datasets is None


def test_a_card_that_somebody_has_changed_is_theirs_here_and_there(folder, hub, capsys):
    recipe, config = load_for_evaluation(str(folder), []), AdapterConfig.load(folder)
    card = folder / "README.md"
    card.write_text(model_card(recipe, config, train_summary(folder)))
    push(str(folder), "owner/name", MODELS)
    first = hub.repos["owner/name"]["README.md"]
    assert b"75.0%" in first, "one that nobody has changed is written anew, with results"

    card.write_text(mine := card.read_text().replace(f"# {recipe.name}", "# Mine"))
    push(str(folder), "owner/name", MODELS)
    assert hub.repos["owner/name"]["README.md"].decode() == mine
    assert "has been changed, and is sent as it is" in capsys.readouterr().err
    assert card.read_text() == mine

    card.unlink()
    push(str(folder), "owner/name", MODELS)
    assert hub.repos["owner/name"]["README.md"].decode() == mine, "of somebody who has changed it on the hub"
    assert "README.md has been changed by somebody, and stays" in capsys.readouterr().err


def test_a_report_of_another_checkpoint_is_not_told(folder, capsys):
    trainer = (folder / "trainer.json").read_text()
    (folder / "trainer.json").write_text(trainer.replace('"steps": 0', '"steps": 1'))
    push(str(folder), "owner/name", MODELS, dry_run=True)
    (folder / "trainer.json").write_text(trainer)
    said = capsys.readouterr()
    assert "Not evaluated yet" in said.out
    assert "report.json is none of this adapter" in said.err


@pytest.mark.parametrize(
    ("repo", "names", "said"),
    [
        ("name", MODELS, "'name' is no name on the hub; write owner/name"),
        ("owner/name", [], r"base.model=.*/base is a folder of this machine, .* base.model=owner/base"),
        ("owner/name", [*MODELS, "thoughts.count=9"], "thoughts.count=9: an adapter is sent as it was trained"),
        (
            "owner/name",
            ["base.model=package:pair/assistant", MODELS[1]],
            r"base.model=package:pair/assistant holds other weights",
        ),
    ],
)
def test_what_others_could_not_open_is_refused(folder, repo, names, said):
    with pytest.raises(SoftCoTError, match=said):
        push(str(folder), repo, names, dry_run=True)


def test_what_the_hub_refuses_is_said_with_what_to_do(folder, hub, monkeypatch):
    hub.repos["owner/public"] = {}
    with pytest.raises(SoftCoTError, match="owner/public is public on the hub; make it private there"):
        push(str(folder), "owner/public", MODELS, private=True)
    assert hub.repos["owner/public"] == {}
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(
        SoftCoTError, match=r"owner/name does not take the adapter: .*; log in .*hf auth login"
    ) as refused:
        push(str(folder), "owner/name", MODELS)
    assert "hf_of_somebody_else" not in str(refused.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SoftCoTError, match=r"owner/name does not take the adapter: .*offline.*; mend that"):
        push(str(folder), "owner/name", MODELS)
    assert "owner/name" not in hub.repos


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_changed_base_is_sent_whole_with_the_name_that_is_given_for_it(tmp_path, method, monkeypatch):
    shutil.copytree(resolve_location("package:pair/base"), tmp_path / "base")
    recipe = load_recipe(ROOT / f"recipes/word_problems_{method}.yaml", [f"base.model={tmp_path}/base"])
    adapter = make_adapter(tmp_path / "adapter", recipe)
    monkeypatch.setattr(push_module, "_tell", lambda text: None)
    files = files_for_others(adapter, load_for_evaluation(str(adapter), ["base.model=owner/base"]), "owner/name")
    contents = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in files.items()}
    assert not [name for name, content in contents.items() if str(tmp_path).encode() in content]
    if method == "lora":
        assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    else:
        assert {"model/model.safetensors", "model/config.json", "model/tokenizer.json"} <= files.keys()
        assert load_file(Path(files["model/model.safetensors"])).keys()
    card = ModelCard(contents["README.md"].decode()).data
    assert card.base_model == ["owner/base"]
    assert card.base_model_relation == {"lora": "adapter", "full": "finetune"}[method]
