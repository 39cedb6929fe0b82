"""Problems are read whole and in order, or the line that is wrong is named; answers are graded by value."""

import bz2
import gzip
import json
import lzma
import re
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT

from softcot_ds.choices import TASKS
from softcot_ds.data.prompts import PromptFile
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.pair import world
from softcot_ds.recipe import TaskConfig, load_recipe
from softcot_ds.tasks import Problem, make_task
from softcot_ds.tasks.records import read_json_lines, read_records

GOOD = {"question": "How many?", "answer": "3 * 4 = <<3*4=12>>12 apples.\n#### 12"}


@pytest.fixture
def gsm8k(tmp_path):
    """A GSM8K task whose training data is given as bytes, text or records."""

    def make(content):
        path = tmp_path / "train.jsonl"
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return make_task(TaskConfig(name="gsm8k", train=str(path), test="openai/gsm8k"))

    return make


def error_of(task) -> str:
    with pytest.raises(SoftCoTError) as caught:
        task.read("train")
    message = str(caught.value)
    assert str(task.config.train) in message
    assert "\n" not in message
    return message.replace(str(task.config.train), "FILE")


# ----------------------------------------------------------------------------------------------------- JSON lines


LINE = json.dumps({"question": "a"})


@pytest.mark.parametrize(
    ("content", "questions"),
    [
        ("{0}", ["a"]),
        ("{0}\n", ["a"]),
        ("{0}\n{0}", ["a", "a"]),
        ("{0}\r\n{0}\r\n", ["a", "a"]),
        ("\ufeff{0}\n", ["a"]),
        ('  {{"question": "a", "more": [1]}}  \n', ["a"]),
        ('{{"question": "a\u2028b\u2029c\u0085d"}}\n{0}\n', ["a\u2028b\u2029c\u0085d", "a"]),
        ('{{"question": "a\\u000bb\\fc\\nd"}}\n', ["a\vb\fc\nd"]),
        ('{{"question": "\\ud83c\\udf4e"}}\n', ["\U0001f34e"]),
    ],
)
def test_what_is_one_line_of_json_is_one_record(tmp_path, content, questions):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.format(LINE).encode())
    records = list(read_records(str(path), "train", {"question": str}))
    assert [record["question"] for _, record in records] == questions
    assert [where for where, _ in records] == [f"{path}:{number}" for number in range(1, len(questions) + 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "FILE: the file is empty"),
        ("\ufeff", "FILE: the file is empty"),
        ("\n", "FILE:1: empty line; every line holds one JSON object"),
        ("{0}\n\n", "FILE:2: empty line"),
        ("{0}\n \t\n{0}\n", "FILE:2: empty line"),
        ("{0}\n{{", "FILE:2: not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("{0}\n{0}{0}\n", "FILE:2: not JSON: Extra data at column"),
        ("[1]\n", "FILE record 0: expected a JSON object, found int"),
        ("[{0},\n3]\n", "FILE record 1: expected a JSON object, found int"),
        ("[]", "FILE: there is no record in it"),
        ("[{0}, {{}}]", "FILE record 1: the key 'question' is missing; found []"),
        ("[\n{0},\n{0}\n", "FILE:4: not JSON: Expecting ',' delimiter at column 1"),
        ('[{{"n": NaN}}]', "FILE: not JSON that can be relied on: NaN is no number"),
        ('{{\n"examples": 3}}', "FILE: a JSON object without a list of records in 'examples'"),
        ('{{\n"question": "a"\n}}', "FILE: a JSON object without a list of records in 'examples'"),
        ("{0}\n3\n", "FILE:2: expected a JSON object, found int"),
        ('{{"qestion": "a"}}', "FILE:1: the key 'question' is missing; found ['qestion']"),
        ('{{"question": 3}}', "FILE:1: 'question' is int, expected str"),
        ('{{"question": null}}', "FILE:1: 'question' is NoneType, expected str"),
        ('{{"question": "a\\ud800"}}', "FILE:1: 'question' holds half of a surrogate pair"),
        ('{{"question": "a", "n": ' + "1" * 5000 + "}}", "FILE:1: not JSON that can be relied on: a number of 5,000"),
        ('{{"question": "a", "n": 1e999}}', "FILE:1: not JSON that can be relied on: the number 1e999 is too large"),
        ('{{"question": "a", "n": ' + "[" * 100_000, "FILE:1: not JSON that can be relied on"),
        (
            '{0}\n{{"question": "a", "question": "b"}}',
            "FILE:2: not JSON that can be relied on: the key 'question' stands",
        ),
        (
            '{{"question": "a", "n": {{"b": 1, "b": 1}}}}',
            "FILE:1: not JSON that can be relied on: the key 'b' stands twice",
        ),
        ('{{"question": NaN}}', "FILE:1: not JSON that can be relied on: NaN is no number"),
        ('{{"question": "a", "n": -Infinity}}', "FILE:1: not JSON that can be relied on: -Infinity is no number"),
        ('{{"question": "a\\u0000"}}', "FILE:1: 'question' holds a NUL character"),
        ("\0\0\0", "FILE:1: not JSON"),
        ("{0}\n\ufeff{0}", "FILE:2: not JSON: Unexpected UTF-8 BOM"),
        ('{{"\\ud800": "a"}}', "FILE:1: the key 'question' is missing; found ['\\ud800']"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.format(LINE).encode())
    with pytest.raises(SoftCoTError) as caught:
        list(read_records(str(path), "train", {"question": str}))
    assert str(caught.value).replace(str(path), "FILE").startswith(message)


@pytest.mark.parametrize(
    "frame", ["[{0}]", "[\n{0}\n]\n", '{{\n"name": "a",\n"examples": [{0}]\n}}', '{{"a": "b", "examples": [{0}]}}']
)
def test_a_file_may_be_one_json_value_whatever_its_name(tmp_path, frame):
    path = tmp_path / "data.jsonl"
    path.write_text(frame.format(f"{LINE}, {LINE}"))
    records = list(read_records(str(path), "train", {"question": str}))
    assert records == [(f"{path} record {number}", {"question": "a"}) for number in (0, 1)]


def test_what_is_not_utf8_or_not_a_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(SoftCoTError, match=r"data.jsonl:1: byte 17: not UTF-8 text"):
        list(read_json_lines(path))
    path.write_bytes(b'{"question": "a"}\n' + '{"question": "b"}'.encode("utf-16"))
    with pytest.raises(SoftCoTError, match=r"data.jsonl:2: byte 0: not UTF-8 text"):
        list(read_json_lines(path))
    with pytest.raises(SoftCoTError, match=r"cannot read .*: Is a directory"):
        list(read_json_lines(tmp_path))
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        path.write_bytes(pack(b'{"question": "a"}\n'))
        with pytest.raises(SoftCoTError, match=r"data.jsonl: compressed; unpack it"):
            list(read_records(str(path), "train", {}))


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("softcot_ds.tasks.records._LONGEST_LINE", 2**20)
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"question": "a"}\n')
        file.truncate(2**33)  # a sparse file: 8 GiB of NULs
    with pytest.raises(SoftCoTError, match=r"data.jsonl:2: the line is longer than 1 MiB"):
        list(read_json_lines(path))


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='{}[]",:\\u0d8a \n\0\ufeffquestion1.eE-NaInfty', max_size=60).map(str.encode),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["question", "a"]), inner),
            max_leaves=4,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_whatever_a_file_holds_is_read_or_refused_with_its_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(content)
    records, message = [], None
    try:
        records = list(read_records(str(path), "train", {"question": str}))
    except SoftCoTError as error:
        message = str(error)
    if message is not None:
        assert re.match(rf"{path}(:[1-9]\d*| record \d+|): [^\n]+$", message)
    else:
        assert all(isinstance(record["question"], str) for _, record in records)
        is_list = content.lstrip().startswith(b"[")
        assert len(records) == len(json.loads(content)) if is_list else content.removesuffix(b"\n").count(b"\n") + 1


# ---------------------------------------------------------------------------------------------------------- GSM8K


def test_a_gsm8k_record_becomes_question_reasoning_and_answer(gsm8k):
    (problem,) = gsm8k([GOOD]).read("train")
    assert problem == Problem("How many?", "3 * 4 = 12 apples.", "12")


@pytest.mark.parametrize(
    ("answer", "reasoning", "final"),
    [
        ("a\n####12", "a", "12"),
        ("a\n#### 1,000\n", "a", "1,000"),
        ("a\r\n#### -5 \r\n", "a", "-5"),
        ("#### 5", "", "5"),
        ("a #### b\n#### $7.50", "a #### b", "$7.50"),
    ],
)
def test_gsm8k_final_lines_as_they_are_found_in_the_wild(gsm8k, answer, reasoning, final):
    (problem,) = gsm8k([{"question": "q", "answer": answer}]).read("train")
    assert (problem.reasoning, problem.answer) == (reasoning, final)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "12"}, "FILE:2: 'answer' does not end in a line '#### NUMBER'"),
        ({"answer": "a\n#### 12\nmore"}, "FILE:2: 'answer' does not end in a line '#### NUMBER'"),
        ({"answer": "a\n#### "}, "FILE:2: 'answer' does not end in a line '#### NUMBER'"),
        ({"answer": "a\n#### several"}, "FILE:2: the answer 'several' is not a number; write one number"),
        ({"answer": "a\n#### 10-15"}, "FILE:2: the answer '10-15' is not a number; write one number"),
        ({"answer": "a\n#### 3:30"}, "FILE:2: the answer '3:30' is not a number; write one number"),
        (
            {"answer": "a\n#### 5 apples, 3 oranges"},
            "FILE:2: the answer '5 apples, 3 oranges' is read as '3', but the solution that ends in it as '5'; "
            "write one number as the answer and announce none before it",
        ),
        (
            {"answer": "#### 3 steps\na\n#### 12"},
            "FILE:2: the answer '12' is read as '12', but the solution that ends in it as '3'; "
            "write one number as the answer and announce none before it",
        ),
        ({"question": " \n"}, "FILE:2: 'question' is empty"),
        ({"question": ["a"]}, "FILE:2: 'question' is list, expected str; found ['a']"),
    ],
)
def test_a_bad_gsm8k_record_is_named_by_file_and_line(gsm8k, record, message):
    assert error_of(gsm8k([GOOD, GOOD | record, GOOD])) == message


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("18 dollars for 9 eggs", "18"),
        ("18 (9 eggs at $2)", "18"),
        ("1 000", "1000"),
        ("1,00,000", "100000"),
        ("1.5 million", "1500000"),
        ("1.5e3", "1500"),
        ("\u00bd", "1/2"),
        ("\u22125", "-5"),
        ("\u20135", "-5"),
        ("Rs.500", "500"),
        ("12 (a dozen)", "12"),
        ("twelve", "12"),
        ("-0", "0"),
    ],
)
def test_what_a_data_line_has_as_its_answer_is_graded_right_when_a_model_writes_it(gsm8k, answer, read):
    task = gsm8k([GOOD | {"answer": f"3 + 4 = 7\n#### {answer}"}])
    (problem,) = task.read("train")
    assert task.extract(task.target(problem)) == read
    assert task.is_correct(read, problem)


def test_gsm8k_targets_end_in_the_line_that_is_graded(gsm8k):
    task = gsm8k([GOOD])
    (problem,) = task.read("train")
    assert task.target(problem) == "3 * 4 = 12 apples.\n#### 12"
    assert task.is_correct(task.extract(task.target(problem)), problem)


def test_a_step_of_a_solution_is_a_line_and_what_is_left_without_some_is_still_a_target(gsm8k):
    task = gsm8k([{"question": "q", "answer": "3 + 4 = 7\n\n 7 * 2 = 14\nSo 14.\n#### 14"}])
    (problem,) = task.read("train")
    assert task.steps(problem) == ["3 + 4 = 7\n\n", " 7 * 2 = 14\n", "So 14."]
    assert task.rest(problem, 0) == task.target(problem)
    assert task.rest(problem, 2) == "So 14.\n#### 14"
    assert task.rest(problem, 3) == task.rest(problem, 9) == task.rest(problem, None) == "#### 14"
    assert task.steps(replace(problem, reasoning="")) == []


@pytest.mark.parametrize(
    ("output", "verdict"),
    [
        ("#### 1,000", True),
        ("#### $1000.00", True),
        ("so it is \\boxed{1{,}000}.", True),
        ("2000/2", True),
        ("#### -1000", False),
        ("#### 1000.5", False),
        ("I can't say", False),
        ("", False),
    ],
)
def test_gsm8k_grades_by_value_not_by_text(gsm8k, output, verdict):
    task = gsm8k([GOOD | {"answer": "a\n#### 1,000"}])
    (problem,) = task.read("train")
    assert task.is_correct(task.extract(output), problem) is verdict


def test_an_unparsed_output_is_none_so_that_it_can_be_counted(gsm8k):
    task = gsm8k([GOOD])
    assert task.extract("no idea") is None
    assert not task.is_correct(None, task.read("train")[0])


@pytest.fixture
def hub(monkeypatch):
    """Takes what is to stand for ``datasets.load_dataset``. The library itself takes seconds to import."""
    return lambda load: monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_a_hub_that_cannot_be_reached_is_one_clear_line(hub):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    hub(fail)
    task = make_task(TaskConfig(name="gsm8k", train="some/set", test="some/set"))
    with pytest.raises(SoftCoTError, match=r"task.train: cannot load 'some/set' .*no route to host.*local JSON-lines"):
        task.read("train")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": 5}, "'answer' is int, expected str; found 5"),
        ({"answer": None}, "'answer' is NoneType, expected str; found None"),
        ({"question": None}, "'question' is NoneType, expected str; found None"),
        ({"answer": ["5", "five"]}, "'answer' is list, expected str; found ['5', 'five']"),
        ({"question": "a\0"}, "'question' holds a NUL character, which is no text"),
        ({"question": "\ud800"}, "'question' holds half of a surrogate pair, which is no character"),
        ({"question": ""}, "'question' is empty"),
        ({"answer": "#### 1-2"}, "the answer '1-2' is not a number; write one number"),
    ],
)
def test_a_bad_record_is_refused_alike_in_a_file_and_on_the_hub(hub, gsm8k, record, message):
    hub(lambda *_, **__: [GOOD, GOOD | record])
    with pytest.raises(SoftCoTError) as caught:
        make_task(TaskConfig(name="gsm8k", train="some/set", test="some/set")).read("test")
    assert str(caught.value) == f"some/set record 1: {message}"
    assert error_of(gsm8k([GOOD, GOOD | record])) == f"FILE:2: {message}"


def test_a_hub_that_fails_midway_is_one_clear_line(hub):
    def records(*_, **__):
        yield GOOD
        raise ValueError("bad\nparquet")

    hub(records)
    with pytest.raises(SoftCoTError, match=r"task.test: cannot load 'some/set' .*ValueError: bad parquet"):
        make_task(TaskConfig(name="gsm8k", train="some/set", test="some/set")).read("test")


def test_hub_records_are_read_like_a_local_file(hub, gsm8k):
    asked = []
    hub(lambda *a, **k: asked.append((a, k)) or [GOOD, GOOD | {"answer": "x"}])
    task = make_task(TaskConfig(name="gsm8k", train="some/set", test="some/set"))
    with pytest.raises(SoftCoTError, match="some/set record 1: 'answer' does not end in a line"):
        task.read("test")
    assert asked == [(("some/set", "main"), {"split": "test"})]


@pytest.mark.slow
def test_the_real_gsm8k_is_read_whole(shared_data):
    folder = shared_data / "gsm8k"
    task = make_task(TaskConfig(name="gsm8k", train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl")))
    train, test = task.read("train"), task.read("test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].question.startswith("Natalia sold clips to 48 of her friends in April")
    assert train[0].reasoning.splitlines()[0] == "Natalia sold 48/2 = 24 clips in May."
    assert train[0].answer == "72"
    assert [problem.answer for problem in test if problem.answer.startswith("-")] == ["-10", "-3"]
    assert not [p for p in train + test if "<<" in p.reasoning or "####" in p.reasoning]
    assert all(Fraction(task.extract(p.answer)) == Fraction(p.answer.replace(",", "")) for p in train + test)


def test_an_id_depends_on_the_question_alone():
    assert Problem("q", "a", "1").id == Problem("q", "b", "2").id != Problem("q ", "a", "1").id


# -------------------------------------------------------------------------------------------------- word problems


@pytest.fixture
def words():
    return make_task(TaskConfig(name="word_problems", train_problems=40, test_problems=30))


def test_the_target_of_a_word_problem_is_what_its_world_writes(words):
    for split, count, seed in (("train", 40, 1), ("test", 30, 2)):
        expected = world.generate(split, count, seed)
        problems = words.read(split)
        assert [p.question for p in problems] == [p.question for p in expected]
        assert [words.target(p) for p in problems] == [p.reasoning for p in expected]
        assert [p.answer for p in problems] == [str(p.counts[-1]) for p in expected]
        assert all(words.target(p).count("answer") == 1 and "answer" not in p.reasoning for p in problems)


def test_a_word_problem_has_a_step_for_each_event(words):
    for problem, expected in zip(words.read("train"), world.generate("train", 40, 1), strict=True):
        steps = words.steps(problem)
        assert len(steps) == len(expected.events)
        assert [step.split()[0] for step in steps] == list(world.ORDINALS[: len(steps)])
        assert words.rest(problem, 1) == expected.reasoning[len(steps[0]) :]
        assert words.rest(problem, None) == words.rest(problem, 3) == f"answer {expected.answer}"


def test_word_problems_of_the_splits_differ_and_are_the_same_in_every_run(words):
    train, test = words.read("train"), words.read("test")
    assert not {p.question for p in train} & {p.question for p in test}
    assert (train, test) == (words.read("train"), words.read("test"))


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("first 3 + 4 = 7 answer 7", "7"),
        ("answer 1 4", "14"),
        ("answer 1\n4", "14"),
        ("answer 07", "7"),
        ("answer -3", "-3"),
        ("answer 1 then answer 2", "2"),
        ("3 + 4 = 7", None),
        ("answer", None),
        ("answer x 5", None),
        ("", None),
    ],
)
def test_only_a_number_after_answer_answers_a_word_problem(words, output, answer):
    assert words.extract(output) == answer
    assert words.is_correct(words.extract(output), Problem("q", "r", "7")) is (answer == "7")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("first 3 + 4 = 7 answer 7", None),
        ("answer 1 4", None),
        ("answer 1 4 \n", None),
        ("answer 1 4 answer 1", "14"),
        ("answer 1 4 first", "14"),
        ("answer 1 4 answer", "14"),
        ("answer -", None),
        ("", None),
    ],
)
def test_a_number_at_the_end_of_a_cut_output_may_have_gone_on(words, output, answer):
    assert words.extract(output, cut=True) == answer


def test_a_digit_repeated_for_ever_is_wrong_not_an_error(words):
    assert not words.is_correct(words.extract("answer " + "9 " * 6000), Problem("q", "r", "9"))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "custom"])
def test_every_shipped_prompt_file_is_complete(name):
    config = {"train_problems": 1, "test_problems": 1}
    prompts = PromptFile.load(make_task(TaskConfig(name=name, **config)).prompt_file)
    assert "{question}" in prompts.base_without_thoughts[0]["content"]


# --------------------------------------------------------------------------------------------------- one more task

ODD = """
from softcot_ds.tasks.base import DataTask, Problem
from softcot_ds.tasks.kinds import Kind


def last_word(text, cut=False, options=()):
    last = text.split()[-1:]
    return last[0] if last in (["yes"], ["no"]) and not cut else None


class Odd(DataTask):
    required = {"text": str, "odd": bool}
    kind = Kind("yes or no", last_word)

    def problem(self, record):
        return Problem(record["text"], "so", "yes" if record["odd"] else "no")

    def target(self, problem):
        return f"{problem.reasoning} {problem.answer}"
"""


def test_a_new_task_is_one_module_one_prompt_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(ODD)
    shutil.copyfile(ROOT / "softcot_ds/tasks/word_problems.yaml", tmp_path / "odd.yaml")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TASKS, "odd", "odd:Odd")
    for name, numbers in (("train", range(8)), ("test", [9])):
        records = [{"text": f"tom has {number} coins .", "odd": number % 2 == 1} for number in numbers]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    given = {"train_problems": None, "validation_problems": 2, "test_problems": None}

    def recipe(**task):
        overrides = [f"task.{key}={json.dumps(value)}" for key, value in (given | {"name": "odd"} | task).items()]
        return load_recipe(ROOT / "recipes/word_problems.yaml", overrides)

    with pytest.raises(SoftCoTError, match=r"task.test: missing; name a JSON-lines file"):
        recipe(train=str(tmp_path / "train"))
    experiment = Experiment(recipe(train=str(tmp_path / "train"), test=str(tmp_path / "test")))
    (example,) = experiment.splits.test
    assert len(experiment.splits.train) == 6
    written = experiment.base_tokenizer.decode(example.target_ids[:-1])
    assert experiment.task.is_correct(experiment.task.extract(written), example.problem)
    assert not experiment.task.is_correct(experiment.task.extract("9 no"), example.problem)
    assert not experiment.task.is_correct(experiment.task.extract("9"), example.problem)
