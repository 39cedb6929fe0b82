"""Adapters by hub name: found, downloaded by one, or refused with what to do. The hub is a small one of our own."""

import re
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from small_hub import running

from softcot_ds import cli
from softcot_ds.errors import SoftCoTError
from softcot_ds.run_dir import MARKER, adapter_folder, recipe_and_adapter

ADAPTER = {
    "recipe.yaml": b"name: x",
    "adapter.json": b"{}",
    "model/model.safetensors": b"weights",
    "base_chat_template.jinja": b"{{ messages }}",
    "README.md": b"# x",
    MARKER: b"",
}
OTHER = {"projection.bin": b"pickle", "optimizer.safetensors": b"moments", "model/pytorch_model.bin": b"", "x.py": b""}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an adapter, beside which lies what is none of an adapter's; an empty cache and current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for one in running(tmp_path / "cache", monkeypatch):
        one.repos |= {"owner/name": ADAPTER | OTHER, "owner/model": {"config.json": b"{}"}}
        yield one


def test_an_adapter_is_downloaded_once_without_what_could_hold_code(hub, capsys):
    folder = adapter_folder("owner/name")
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert there == ADAPTER
    assert capsys.readouterr().err == "downloading owner/name, 0.0 MB\n"
    hub.asked.clear()
    assert adapter_folder("owner/name") == folder
    assert not hub.asked, "what is there is not asked about again"
    assert adapter_folder(f"owner/name@{folder.name}") == folder


def test_the_marker_comes_last_so_that_a_download_that_was_cut_short_is_gone_on_with(hub, monkeypatch):
    get = hub.do_GET

    def cut(self):
        if "/resolve/" in self.path and self.path.endswith("adapter.json"):
            self.answer(403, b"")
        else:
            get(self)

    for method in ("do_GET", "do_HEAD"):
        monkeypatch.setattr(hub, method, cut)
    with pytest.raises(SoftCoTError, match=r"no folder owner/name, and it is not \(or not completely\) in .*fails"):
        adapter_folder("owner/name")
    assert not list(Path(constants.HF_HUB_CACHE).rglob(MARKER))
    for method in ("do_GET", "do_HEAD"):
        monkeypatch.setattr(hub, method, get)
    assert (adapter_folder("owner/name") / MARKER).is_file()


def test_processes_that_start_together_download_once(hub, capsys):
    found = []
    threads = [threading.Thread(target=lambda: found.append(adapter_folder("owner/name"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert capsys.readouterr().err.count("downloading") == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("owner/absent", "there is no folder owner/absent, and the hub has none of this name, or it is private"),
        ("owner/gated", "owner/gated is gated: accept its terms at "),
        ("owner/model", "owner/model on the hub is no adapter of softcot-ds: it has no file COMPLETE"),
    ],
)
def test_what_the_hub_does_not_have_is_said_by_the_command(hub, source, said, capfd, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main(["generate", source, "--question", "how many ?"]) == 2
    assert capfd.readouterr().err.startswith(f"softcot-ds: error: {said}")


def test_without_a_network_the_command_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = "downloading it fails: HF_HUB_OFFLINE is set. Where there is internet, with the same HF_HOME: hf download "
    with pytest.raises(SoftCoTError, match=re.escape(said) + "owner/name --revision v1$"):
        adapter_folder("owner/name@v1")
    assert not hub.asked


def test_what_lies_here_goes_before_the_hub(hub):
    Path("owner/name").mkdir(parents=True)
    assert adapter_folder("owner/name") == Path("owner/name")
    Path("owner/name/recipe.yaml").touch()
    with pytest.raises(SoftCoTError, match="no complete checkpoint"):
        recipe_and_adapter("owner/name", [])
    Path("file").mkdir()
    Path("file/name").touch()
    for other in ("file/name", "recipes/word_problems.yaml", "/no/such/folder", "name", "no/such.yaml"):
        assert adapter_folder(other) is None
    assert not hub.asked
