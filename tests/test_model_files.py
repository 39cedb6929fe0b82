"""Models by hub name: found, downloaded by one, or refused with what to do. The hub is a small one of our own."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from small_hub import running

from softcot_ds.errors import SoftCoTError
from softcot_ds.models.model_files import model_folder
from softcot_ds.recipe import ModelConfig
from softcot_ds.values import resolve_location

PAIR = Path(resolve_location("package:pair/assistant"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The files of a model on a hub, the embedded assistant; and an empty cache."""
    for one in running(tmp_path / "cache", monkeypatch):
        files = {path.name: path.read_bytes() for path in PAIR.iterdir() if path.is_file()}
        files |= {"consolidated.safetensors": b"x" * 1000, "pytorch_model.bin": b"y" * 1000, "onnx/config.json": b"{}"}
        one.repos["owner/name"] = files
        yield SimpleNamespace(files=files, asked=one.asked)


def model(name="owner/name", **settings):
    return ModelConfig(model=name, **settings)


def test_a_model_is_downloaded_once_and_its_size_is_said(hub, capsys):
    folder = model_folder(model(), weights=True)
    small = {name for name in hub.files if name.endswith((".json", ".jinja")) and "/" not in name}
    assert {path.name for path in folder.iterdir()} == small | {"model.safetensors"}, "what is read, and nothing else"
    for path in folder.iterdir():
        assert path.read_bytes() == hub.files[path.name]
    megabytes = sum(len(hub.files[name]) for name in small | {"model.safetensors"}) / 1e6
    assert capsys.readouterr().err == f"downloading owner/name, {megabytes:.1f} MB\n"
    hub.asked.clear()
    assert model_folder(model(), weights=True) == folder
    assert not hub.asked, "what is there is not asked about again"


def test_weights_are_fetched_when_they_are_wanted(hub, capsys):
    folder = model_folder(model())
    assert not (folder / "model.safetensors").exists()
    assert "downloading owner/name (configuration and tokenizer), " in capsys.readouterr().err
    assert model_folder(model(), weights=True) == folder
    assert (folder / "model.safetensors").exists()


def test_shards_are_those_of_the_index(hub):
    content = hub.files.pop("model.safetensors")
    hub.files |= {f"model-0000{part}-of-00002.safetensors": content for part in (1, 2)}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    names = {path.name for path in model_folder(model(), weights=True).iterdir()}
    assert set(index["weight_map"].values()) <= names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin"}


def test_processes_that_start_together_download_once(hub, capsys):
    threads = [threading.Thread(target=model_folder, args=(model(), True)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err.count("downloading") == 1
    assert hub.asked.count("GET /owner/name/resolve/main/model.safetensors") <= 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (model("owner/gated"), r"owner/gated is gated: accept its terms at http.*/owner/gated.* hf auth login"),
        (model("owner/absent"), r"no folder owner/absent, and the hub has none of this name, or it is private; check"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(hub, config, said):
    with pytest.raises(SoftCoTError, match=said):
        model_folder(config)


def test_without_a_network_the_command_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SoftCoTError, match=r"HF_HUB_OFFLINE is set. Where there .*: hf download owner/name --revision v1$"
    ):
        model_folder(model(revision="v1"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits 23 s between its tries
    with pytest.raises(SoftCoTError, match=r"downloading it fails: .*: hf download owner/name$"):
        model_folder(model())
