"""A file is the old one or the whole new one."""

import errno
import os
import shutil

import pytest

from softcot_ds import files
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import (
    cannot_write,
    dump_yaml,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    temporary_name,
    write_atomically,
)


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

    monkeypatch.setattr(os, step, fail)
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


def test_what_cannot_be_written_is_told_with_the_cause_and_a_way_on(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000 if path == tmp_path else 0))
    path = tmp_path / "new" / "file"
    for number in (errno.ENOSPC, errno.EDQUOT):
        full = OSError(number, os.strerror(number), str(path))
        assert str(cannot_write(path, full, otherwise="set output_dir")) == (
            f"the disk of {path} is full ({os.strerror(number)}, 1.5 MB free). "
            "Make room or set output_dir and run the same command again"
        )
    read_only = OSError(errno.EROFS, "Read-only file system", "inner")
    assert str(cannot_write(path, read_only, kept="the rest is kept")) == (
        f"cannot write to {path}: {read_only}; the rest is kept. Mend that and run the same command again"
    )


def test_a_missing_folder_is_an_error_not_a_new_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "file", "content")
    assert not list(tmp_path.iterdir())


def test_yaml_values_are_those_of_yaml():
    assert parse_yaml("{a: [1, 2.5, x, null, true], b: {c: '5'}}") == {"a": [1, 2.5, "x", None, True], "b": {"c": "5"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # the rest of the column is what JSON and YAML 1.2 say, PyYAML something else
        ("[.5, 5., +1, -0, 1E3, 0o17, 0x1F]", [0.5, 5.0, 1, 0, 1000.0, 15, 31]),
        ("[no, on, yes, off, y]", ["no", "on", "yes", "off", "y"]),
        ("[1:30, 190:20:30, 1_000, 2024-07-26, 2024-13-01, =, .inf, .nan]",
         ["1:30", "190:20:30", "1_000", "2024-07-26", "2024-13-01", "=", ".inf", ".nan"]),
        ("[true, FALSE, ~, Null, '~', 'true', '1']", [True, False, None, None, "~", "true", "1"]),
        ("{on: 1, 'true': 2}", {"on": 1, "true": 2}),
        ("\u0661", "\u0661"),  # a digit of another script
    ],
)  # fmt: skip
def test_plain_scalars_are_those_of_the_core_schema(text, value):
    found = parse_yaml(text)
    assert found == value
    assert repr(found) == repr(value)  # 1, 1.0 and True are equal


AWKWARD = ["1e3", "0100", "yes", "2024-07-26", "", "~", "null", "<<", "=", "1:30", "0x1f", ".5", "1_0", "-", "a: b",
           "\n",
           "\u00e9\U0001f600", "true", "0o7", "5.", "!x", "&a", "*a", "%a", " a ", "#", "\x85", "\u2028", "\0", "\x1b",
           1e-5, 1e22, 0.1, 5e-324, 3.0, 2**63, -1, True, None]  # fmt: skip


@pytest.mark.parametrize("value", AWKWARD, ids=ascii)
def test_what_is_written_as_yaml_is_read_as_the_same(value):
    read = parse_yaml(dump_yaml({"key": [value], "other": value}))
    assert read == {"key": [value], "other": value}
    assert type(read["other"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice, first in line 1"),
        ("{x: {y: 1, y: 1}}", "line 1, column 12: the key 'y' stands twice, first in line 1"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "line 1, column 14: the key 'x' stands twice"),
        ("a: {", "line 1, column 5: "),
        ("[1, 2", "line 1, column 6: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n\tb: 2", "line 2, column 1: while scanning for the next token, found character '\\t'"),
        ("a\n---\nb", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("a: 1\nb: !!python/object:os.system {}", "line 2, column 4: the tag !!python/object:os.system is not read"),
        ("!!int x", "line 1, column 1: the tag !!int is not read here"),
        ("!!set {a, b}", "line 1, column 1: the tag !!set is not read here"),
        ("!!binary aGk=", "line 1, column 1: the tag !!binary is not read here"),
        ("! x", "line 1, column 1: the tag ! is not read here"),
        ("steps: 0100", "line 1, column 8: 0100 is octal to some readers; write it without the leading 0"),
        ("1e999", "line 1, column 1: the number 1e999 is too large"),
        ("9" * 5000, "line 1, column 1: the number 99999999999999999999 and so on is too large"),
        ("0x" + "f" * 5000, "line 1, column 1: the number 0xffffffffffffffffff and so on is too large"),
        ("{[a]: 1}", "line 1, column 2: a key is a text, not a list or mapping"),
        ("1: 2", "line 1, column 1: a key is a text, not '1'; put it in quotes"),
        ("a: {true: 2}", "line 1, column 5: a key is a text, not 'true'; put it in quotes"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("&a [*a]", "nested deeper than 100 levels"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ("[\n" * 100_000, "nested deeper than 100 levels"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("a\0b", "unacceptable character #x0000"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_is_one_line_that_says_where(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_aliases_that_stand_for_billions_of_values_are_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        parse_yaml("\n".join(lines))


def test_merges_of_merges_cost_no_more_than_their_keys():
    lines = ["a0: &a0 {x: 0, y: 0}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], x: {i}}}" for i in range(1, 15)]
    assert parse_yaml("\n".join(lines))["a14"] == {"x": 14, "y": 0}


def test_json_values_are_those_of_json():
    text = '{"a": [1, -2.5e3, "x\\n\\ud83d\\ude00", null, true], "b": {"a": {}}}'
    expected = {"a": [1, -2500.0, "x\n\U0001f600", None, True], "b": {"a": {}}}
    assert parse_json(text) == parse_json(text.encode()) == parse_json(text.encode("utf-8-sig")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "the number 1e999 is too large"),
        ("9" * 5000, "a number of 5,000 digits"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ('{"a":\n1,}', "line 2, column "),
        ("", "line 1, column 1: Expecting value"),
        ("{} {}", "line 1, column 4: Extra data"),
        ('"\\udc00"', "half of a surrogate pair"),
        (b"\xff", "byte 0: not UTF-8 text"),
        ("{}".encode("utf-16"), "byte 0: not UTF-8 text"),
    ],
)
def test_what_is_no_json_is_one_line_that_says_where(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"a\xff")
    for path, message in (
        (tmp_path / "missing", "cannot read .*missing: No such file or directory"),
        (tmp_path, "cannot read .*: Is a directory"),
        (tmp_path / "binary", "binary: byte 1: not UTF-8 text"),
    ):
        for read in (read_yaml, read_json):
            with pytest.raises(SoftCoTError, match=message):
                read(path)


def test_two_nodes_with_one_process_id_write_to_different_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert len({temporary_name(tmp_path / "report.json") for _ in range(2)}) == 2
