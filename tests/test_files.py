"""A file is the old one or the whole new one."""

import os

import pytest

from softcot_ds import files
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import parse_yaml, read_yaml, temporary_name, write_atomically


def test_text_and_bytes_arrive_as_they_are(tmp_path):
    write_atomically(tmp_path / "text", "ü\r\n\u2028")
    write_atomically(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "ü\r\n\u2028".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync" if step == "fsync" else "pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_content_is_synced_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    real_sync, path = os.fsync, tmp_path / "file"

    def sync(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "content"
        events.append((kind, path.exists()))
        real_sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", sync)
    write_atomically(path, "content")
    assert events == [("content", False), ("folder", True)]


def test_a_missing_folder_is_an_error_not_a_new_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "file", "content")
    assert not list(tmp_path.iterdir())


def test_yaml_values_are_those_of_yaml():
    assert parse_yaml("{a: [1, 2.5, x, null, true], b: {c: '5'}}") == {"a": [1, 2.5, "x", None, True], "b": {"c": "5"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice"),
        ("{x: {y: 1, y: 1}}", "line 1, column 12: the key 'y' stands twice"),
        ("a: {", "line 1, column 5: "),
        ("!!python/object:os.system {}", "line 1, column 1: could not determine a constructor"),
        ("!!int x", "invalid literal"),
        ("2024-13-01", "month must be in 1..12"),
        ("=", "line 1, column 1: "),
        ("{[a]: 1}", "line 1, column 2: found unhashable key"),
    ],
)
def test_what_is_no_yaml_is_one_line_that_says_where(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"a\xff")
    for path, message in (
        (tmp_path / "missing", "cannot read .*missing: No such file or directory"),
        (tmp_path, "cannot read .*: Is a directory"),
        (tmp_path / "binary", "binary: byte 1: not UTF-8 text"),
    ):
        with pytest.raises(SoftCoTError, match=message):
            read_yaml(path)


def test_two_nodes_with_one_process_id_write_to_different_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert len({temporary_name(tmp_path / "report.json") for _ in range(2)}) == 2
