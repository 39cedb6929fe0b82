"""Models by hub name: found, downloaded by one, or refused with what to do. The hub is a small one of our own."""

import hashlib
import http.server
import json
import threading
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from softcot_ds.errors import SoftCoTError
from softcot_ds.models import model_files
from softcot_ds.models.model_files import model_folder
from softcot_ds.recipe import ModelConfig
from softcot_ds.values import resolve_location

COMMIT = "a" * 40
PAIR = Path(resolve_location("package:pair/assistant"))


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one model, owner/name, on this machine; any other is not there, owner/gated wants a login."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if "owner/gated" in path:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not path.startswith(("/api/models/owner/name", "/owner/name/")):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in self.files.items()]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            content = self.files[path.rpartition("/")[2]]
            tag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, code, body, headers=()):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the embedded assistant, and an empty cache."""
    Hub.files = {path.name: path.read_bytes() for path in PAIR.iterdir() if path.is_file()}
    Hub.files |= {"consolidated.safetensors": b"x" * 1000, "pytorch_model.bin": b"y" * 1000}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(model_files, "HfApi", lambda: huggingface_hub.HfApi(endpoint=endpoint))
    cache = tmp_path / "cache"
    download = partial(huggingface_hub.snapshot_download, endpoint=endpoint, cache_dir=cache)
    monkeypatch.setattr(model_files, "snapshot_download", download)
    found = partial(huggingface_hub.try_to_load_from_cache, cache_dir=cache)
    monkeypatch.setattr(model_files, "try_to_load_from_cache", found)
    yield Hub
    server.shutdown()


def model(name="owner/name", **settings):
    return ModelConfig(model=name, **settings)


def test_a_model_is_downloaded_once_and_its_size_is_said(hub, capsys):
    folder = model_folder(model(), weights=True)
    small = {name for name in hub.files if name.endswith((".json", ".jinja"))}
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
        (model("owner/absent"), r"the hub has no model owner/absent, or it is private; check the name"),
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
    monkeypatch.setattr(model_files, "HfApi", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits 23 s between its tries
    with pytest.raises(SoftCoTError, match=r"downloading it fails: .*: hf download owner/name$"):
        model_folder(model())
