"""The tasks of the papers, from files as they are published and from the hub, and tasks of one's own."""

import json
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from asdiv_like import problems, write_jsonl, write_xml
from conftest import CHATML, byte_tokenizer
from launch import ROOT

from softcot_ds.choices import TASKS, chosen
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TaskConfig, load_recipe
from softcot_ds.tasks import Problem, make_task

RECIPE = ROOT / "recipes/word_problems.yaml"
AQUA = {
    "question": "What is 2 + 3?",
    "options": ["A)4", "B)5", "C)6"],
    "rationale": "2 + 3 = 5\nANSWER:B",
    "correct": "B",
}
STRATEGY = {
    "question": "Would a pear sink?",
    "answer": False,
    "facts": ["A pear has a density of 0.6.", "Water has 1."],
}
SCORED = {
    "input": "Today is May 1, 2021. What is the date tomorrow?",
    "target_scores": {"05/02/2021": 1, "05/03/2021": 0},
}
HARD = {"input": "Today is May 1. What is tomorrow?\nOptions:\n(A) May 3\n(B) May 2", "target": "(B)"}
ASDIV = {"body": "Ada has 7 plums.", "question": "She eats 2. How many?", "answer": "5 (plums)", "formula": "7-2=5"}
OWN = {"problem": "2 + 3?", "steps": ["2 + 3", "= 5"], "final": 5}


def config(name, **settings):
    if name == "custom":
        fields = {"question": "problem", "reasoning": "steps", "answer": "final"}
        settings = {"fields": fields, "answer": "number", "prompts": ROOT / "softcot_ds/tasks/gsm8k.yaml"} | settings
    return TaskConfig.model_validate({"name": name, "test": "some/set"} | settings)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads records as a task's test data, from a file of JSON lines, and from the hub."""

    def read(name, records, **settings):
        path = tmp_path / "data.json"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        task = make_task(config(name, **settings))
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: records))
        found = []
        for source, place in ((str(path), f"{path}:2"), ("some/set", "some/set record 1")):
            task.config = task.config.model_copy(update={"test": source})
            try:
                found.append((task.read("test"), None))
            except SoftCoTError as error:
                message = str(error)
                assert message.startswith(f"{place}: "), message
                assert "\n" not in message
                found.append((None, message.removeprefix(f"{place}: ")))
        assert found[0] == found[1], "a file and the hub are read alike"
        return task, *found[0]

    return read


# ------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize(
    ("name", "record", "problem", "target"),
    [
        (
            "aqua",
            AQUA,
            Problem("What is 2 + 3?\nOptions:\n(A) 4\n(B) 5\n(C) 6", "2 + 3 = 5\nANSWER:B", "B", ("4", "5", "6")),
            "2 + 3 = 5\nANSWER:B\nThe answer is \\boxed{B}.",
        ),
        (
            "strategy_qa",
            STRATEGY,
            Problem("Would a pear sink?", "1. A pear has a density of 0.6.\n2. Water has 1.", "no"),
            "1. A pear has a density of 0.6.\n2. Water has 1.\nThe answer is \\boxed{no}.",
        ),
        (
            "date_understanding",
            HARD,
            Problem("Today is May 1. What is tomorrow?\nOptions:\n(A) May 3\n(B) May 2", "", "B", ("May 3", "May 2")),
            "The answer is \\boxed{B}.",
        ),
        (
            "asdiv_aug",
            {"question": "Ada has 7 plums. She eats 2. How many?", "answer": "<<7-2=5>>\n####5"},
            Problem("Ada has 7 plums. She eats 2. How many?", "7-2=5", "5"),
            "7-2=5\n#### 5",
        ),
        ("asdiv_aug", ASDIV, Problem("Ada has 7 plums. She eats 2. How many?", "7-2=5", "5"), "7-2=5\n#### 5"),
        ("custom", OWN, Problem("2 + 3?", "2 + 3\n= 5", "5"), "2 + 3\n= 5\nThe answer is \\boxed{5}."),
    ],
)
def test_a_record_becomes_question_solution_and_answer(read, name, record, problem, target):
    task, found, _ = read(name, [record])
    assert found == [problem]
    assert task.target(problem) == target
    assert task.is_correct(task.extract(target, options=problem.options), problem)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("aqua", {"correct": "D"}, "'correct' is 'D', which is none of the options' letters"),
        ("aqua", {"correct": ""}, "'correct' is '', which is none of the options' letters"),
        ("aqua", {"options": ["A)4", "C)5"]}, "'options' are not labelled 'A)', 'B)' and so on; found ['A)4', 'C)5']"),
        ("aqua", {"options": ["4", "5"]}, "'options' are not labelled 'A)', 'B)' and so on; found ['4', '5']"),
        ("aqua", {"options": [4, 5]}, "'options' is a list with int in it, expected text"),
        ("aqua", {"options": "A)4"}, "'options' is str, expected list; found 'A)4'"),
        ("aqua", {"rationale": None}, "'rationale' is NoneType, expected str; found None"),
        ("aqua", {"question": " "}, "'question' is empty"),
        ("strategy_qa", {"answer": "no"}, "'answer' is str, expected bool; found 'no'"),
        ("strategy_qa", {"facts": None}, "'facts' is NoneType, expected list or str; found None"),
        ("strategy_qa", {"facts": ["a\0"]}, "'facts' holds a NUL character, which is no text"),
        ("strategy_qa", {"question": ""}, "'question' is empty"),
        ("asdiv_aug", {"answer": "5"}, "'answer' does not end in a line '#### NUMBER'"),
        ("asdiv_aug", {"answer": "#### five or six"}, "the answer 'five or six' is read as '6', but"),
        (
            "asdiv_aug",
            {"body": 5, "formula": "1"},
            "'body' is missing or no text; found ['answer', 'body', 'formula', 'qu",
        ),
        ("asdiv_aug", {"body": "a"}, "'formula' is missing or no text; found ['answer', 'body', 'question']"),
        ("date_understanding", {"target": "(C)"}, "'target' is '(C)', which is none of the options' letters, such as"),
        ("date_understanding", {"target": 1}, "'target' is 1, which is none of the options' letters, such as '(A)'"),
        ("date_understanding", {"input": "What?"}, "'input' does not end in 'Options:' and lines '(A) ...', '(B) ...'"),
        ("date_understanding", {"input": None}, "'input' is missing or no text; found ['input', 'target']"),
        ("custom", {"final": None}, "'final' is NoneType, expected str or int or float; found None"),
        ("custom", {"final": True}, "'final' is bool, expected str or int or float; found True"),
        ("custom", {"final": "many"}, "'final' is 'many', which is not a number; write one number"),
        ("custom", {"problem": " "}, "'problem' is empty"),
        ("custom", {"steps": 5}, "'steps' is int, expected str or list; found 5"),
    ],
)
def test_a_bad_record_is_named_with_what_is_wrong(read, name, change, message):
    asdiv_aug = {"question": "a", "answer": "#### 5"}
    good = {"aqua": AQUA, "strategy_qa": STRATEGY, "asdiv_aug": asdiv_aug, "date_understanding": HARD, "custom": OWN}[
        name
    ]
    _, _, found = read(name, [good, good | change])
    assert found.startswith(message)


@pytest.mark.parametrize("key", ["problem", "steps", "final"])
def test_a_record_without_a_field_is_told_which_it_has(read, key):
    lacking = {name: value for name, value in OWN.items() if name != key}
    _, _, message = read("custom", [OWN, lacking])
    assert message == f"the key {key!r} is missing; found {sorted(lacking)}"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": 1, "b": 1}, "not one of 2 to 26 options has the score 1; found {'a': 1, 'b': 1}"),
        ({"a": 0, "b": 0}, "not one of 2 to 26 options has the score 1"),
        ({"a": 1}, "not one of 2 to 26 options has the score 1"),
        ([1], "there is neither 'target_scores' nor 'target'; found ['input', 'target_scores']"),
        ({"\ud800": 1, "b": 0}, "the question 'Today is"),
    ],
)
def test_scores_without_one_right_option_are_refused(read, scores, message):
    _, _, found = read("date_understanding", [SCORED, SCORED | {"target_scores": scores}])
    assert found.startswith(message)


# ------------------------------------------------------------------------------------------------- the published data


def published(shared_data, name, **files):
    return make_task(TaskConfig.model_validate({"name": name} | {k: str(shared_data / v) for k, v in files.items()}))


def test_aqua_as_published(shared_data):
    task = published(shared_data, "aqua", train="aqua/dev.json", test="aqua/test.json")
    train, test = task.read("train"), task.read("test")
    assert (len(train), len(test)) == (254, 254)
    assert Counter(problem.answer for problem in test) == {"A": 63, "B": 58, "D": 53, "C": 46, "E": 34}
    assert all(len(problem.options) == 5 for problem in train + test)
    assert test[2].question.startswith(
        "Find out which of the following values is the multiple of X, if it is divisible"
    )
    assert test[2].question.endswith("\nOptions:\n(A) 36\n(B) 15\n(C) 17\n(D) 5\n(E) 7")
    assert test[2].answer == "A"
    assert test[0].options[:2] + test[0].options[4:] == ("5(√3 + 1)", "6(√3 + √2)", "None of these")
    assert test[0].answer == "A"
    assert test[253].question.startswith("A grocery sells a bag of ice for $1.25, and makes 20% profit.")
    assert test[253].options == ("125", "150", "225", "250", "275")
    assert test[253].reasoning == "Profit per bag = 1.25 * 0.20 = 0.25\nTotal profit = 500 * 0.25 = 125\nAnswer is A."


@pytest.mark.slow
@pytest.mark.parametrize(("how", "train", "first"), [("order", 1648, 1648), ("content", 1661, None)])
def test_strategy_qa_as_published(shared_data, how, train, first):
    whole = published(
        shared_data, "strategy_qa", train="strategyqa/eladsegal_train.json", test="strategyqa/eladsegal_dev.json"
    )
    everything = whole.read("train")
    assert (len(everything), len(whole.read("test"))) == (2061, 229)
    assert everything[0].question == "Are more people today related to Genghis Khan than Julius Caesar?"
    assert everything[0].answer == "yes"
    assert everything[0].reasoning.splitlines()[1] == "2. Genghis Khan had sixteen children."
    assert everything[7].answer == "yes"
    assert everything[7].reasoning == (
        "1. The average cost of a US Boeing 737 plane is 1.6 million dollars.\n"
        "2. Wonder Woman (2017 film) grossed over 800 million dollars at the box office."
    )
    assert everything[-1].question.startswith("Does highest US Court have enough seats for every Prime Minister")
    assert everything[-1].answer == "no"
    both = [problem.answer for problem in everything + whole.read("test")]
    assert (len(both), both.count("no")) == (2290, 1219)
    task = make_task(TaskConfig(name="strategy_qa", train=whole.config.train, test_from_train=how))
    parts = task.read("train"), task.read("test")
    assert [len(part) for part in parts] == [train, 2061 - train]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in everything)
    if first is not None:
        assert parts == (everything[:first], everything[first:])


@pytest.mark.parametrize(("file", "count"), [("task.json", 369), ("bbh_date_understanding.json", 250)])
def test_date_understanding_as_published(shared_data, file, count):
    test = published(shared_data, "date_understanding", test=f"date_understanding/{file}").read("test")
    assert len(test) == count
    assert Counter(len(p.options) for p in test).keys() == {5, 6}
    checked = {
        "task.json": {
            0: ("Yesterday was April 30, 2021. What is the date today in MM/DD/YYYY?", "05/01/2021"),
            100: ("2015 is coming in 36 hours. What is the date tomorrow in MM/DD/YYYY?", "12/30/2014"),
            368: (
                "The first day of 2019 is a Tuesday, and today is the first Monday of 2019. What is the date 24 hours "
                "later in MM/DD/YYYY?",
                "01/08/2019",
            ),
        },
        "bbh_date_understanding.json": {
            0: ("Today is Christmas Eve of 1937. What is the date tomorrow in MM/DD/YYYY?", "12/25/1937"),
            249: (
                "Jane was born on the last day of Feburary in 2000. Today is her 16-year-old birthday. What is the "
                "date a month ago in MM/DD/YYYY?",
                "01/29/2016",
            ),
        },
    }[file]
    for number, (question, date) in checked.items():
        assert test[number].question.split("\nOptions:")[0] == question
        assert test[number].options["ABCDEF".index(test[number].answer)] == date
    # As if by chance: each of the six letters within three deviations of a sixth.
    for letter in "ABCDEF":
        share = sum(p.answer == letter for p in test)
        assert abs(share - count / 5.84) < 3 * (count * 5 / 36) ** 0.5, letter


# ------------------------------------------------------------------------------------------------------ ASDiv's XML


def test_asdiv_like_data_is_read_from_jsonl_and_xml(tmp_path):
    made = write_jsonl(tmp_path / "aug.jsonl", 40, seed=1)
    assert made == problems(40, seed=1) != problems(40, seed=2)
    odd = [made[0] | {"answer": answer} for answer in ("9 (plums); 3 (pears)", "7:30", "Ada", "1/2 (cake)")]
    write_xml(tmp_path / "ASDiv.xml", made + odd)
    tasks = [
        make_task(TaskConfig(name="asdiv_aug", train=str(tmp_path / name), test_from_train="order"))
        for name in ("aug.jsonl", "ASDiv.xml")
    ]
    train, test = [task.read("train") for task in tasks], [task.read("test") for task in tasks]
    assert train[0] == train[1]
    assert test[0] == test[1]
    assert (len(train[0]), len(test[0])) == (32, 8)
    assert [eval(p.reasoning.split("=")[0]) == int(p.answer) for p in train[0]] == [True] * 32
    assert tasks[0].notes == []
    note = f"4 of 44 records of {tmp_path}/ASDiv.xml are left out: their answer is not one number"
    assert set(tasks[1].notes) == {note}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<a><Problem></a>", "FILE:1: not XML: mismatched tag"),
        ("<?xml version='1.0' encoding='foo'?><a></a>", "FILE: not XML that can be read: unknown encoding: foo; save"),
        ("<a></a>", "FILE: an XML file without a Problem; is it ASDiv.xml?"),
        (
            '<a><Problem ID="x1"><Body>b</Body></Problem></a>',
            "FILE problem x1: the key 'question' is missing; found ['body']",
        ),
    ],
)
def test_bad_xml_is_named(tmp_path, content, message):
    path = tmp_path / "ASDiv.xml"
    path.write_text(content)
    with pytest.raises(SoftCoTError) as caught:
        make_task(TaskConfig(name="asdiv_aug", train=str(path), test_from_train="order")).read("test")
    assert str(caught.value).replace(str(path), "FILE").startswith(message)


# ------------------------------------------------------------------------------------------------------ own promises


def test_the_facts_of_strategy_qa_stand_in_targets_and_in_no_prompt(read):
    from softcot_ds.data.chat import ChatFormat
    from softcot_ds.data.examples import make_example
    from softcot_ds.data.prompts import AssistantPrompts, BasePrompts, PromptFile

    task, (problem,), _ = read("strategy_qa", [STRATEGY])
    tokenizer = byte_tokenizer(CHATML)
    chat, prompts = ChatFormat(tokenizer, {}, "bytes"), PromptFile.load(task.prompt_file)
    base, assistant = BasePrompts(chat, prompts), AssistantPrompts(chat, prompts, 4, None)
    example = make_example(problem, task.target(problem), base, assistant)
    shown = [
        example.prefix_ids + example.suffix_ids,
        example.assistant.token_ids,
        base.without_thoughts(problem.question).prefix_ids,
        assistant.words_prompt(problem.question),
    ]
    for ids in shown:
        text = tokenizer.decode(ids)
        assert problem.question in text
        assert not [fact for fact in STRATEGY["facts"] if fact in text]
    assert all(fact in tokenizer.decode(example.target_ids) for fact in STRATEGY["facts"])


def test_options_of_date_understanding_have_an_order_that_is_the_same_in_every_run(read):
    scores = {f"05/0{day}/2021": int(day == 2) for day in (2, 3, 4, 5, 6, 7)}
    _, found, _ = read("date_understanding", [SCORED | {"target_scores": scores}])
    turned = dict(reversed(scores.items()))
    _, again, _ = read("date_understanding", [SCORED | {"target_scores": turned}])
    assert found == again, "the order of the file says nothing"
    assert sorted(found[0].options) == sorted(scores)
    assert found[0].options["ABCDEF".index(found[0].answer)] == "05/02/2021"


def test_the_hubs_copy_of_big_bench_is_read_like_the_file(read):
    hub = {
        "inputs": f"Q: {SCORED['input']}\nA:",
        "targets": ["05/02/2021"],
        "multiple_choice_targets": list(SCORED["target_scores"]),
        "multiple_choice_scores": list(SCORED["target_scores"].values()),
    }
    assert read("date_understanding", [hub])[1] == read("date_understanding", [SCORED])[1]
    unhashable = read("date_understanding", [hub, hub | {"multiple_choice_targets": [["a"], "a"]}])[2]
    assert unhashable.startswith("there is neither 'target_scores' nor 'target'")


def test_problems_that_are_cut_by_content_stay_where_they_are(tmp_path):
    records = [STRATEGY | {"question": f"Would {number} pears sink?"} for number in range(200)]
    path = tmp_path / "train.json"

    def parts(some):
        path.write_text(json.dumps(some))
        task = make_task(TaskConfig(name="strategy_qa", train=str(path), test_from_train="content"))
        return [{problem.question for problem in task.read(split)} for split in ("train", "test")]

    train, test = parts(records)
    assert len(train) + len(test) == 200
    assert 20 <= len(test) <= 60
    shuffled = random.Random(0).sample(records, 100)
    less, fewer = parts(shuffled)
    assert less <= train
    assert fewer <= test


@pytest.mark.parametrize(
    ("kind", "value", "answer"),
    [
        ("number", "1,000", "1,000"),
        ("number", -2.5, "-2.5"),
        ("yes_no", True, "yes"),
        ("yes_no", "No", "No"),
        ("text", "The Hague", "The Hague"),
        ("option", "b", "B"),
        ("option", "(B)", "B"),
        ("option", "5", "B"),
        ("option", 1, "B"),
        ("option", 0, "A"),
    ],
)
def test_answers_of_ones_own_are_of_any_kind(read, kind, value, answer):
    fields = {"question": "problem", "answer": "final"} | ({"options": "steps"} if kind == "option" else {})
    record = OWN | {"steps": ["4", "5"], "final": value}
    task, (problem,), _ = read("custom", [record], fields=fields, answer=kind)
    assert problem.answer == answer
    assert (
        task.is_correct(task.extract(f"Well. The answer is {value}.", options=problem.options), problem)
        or value is True
        or (kind == "option" and isinstance(value, int))
    )
    assert not task.is_correct(task.extract("The answer is 77.", options=problem.options), problem)


CHOICE = {"fields": {"question": "problem", "answer": "final", "options": "steps"}, "answer": "option"}


@pytest.mark.parametrize("form", ["{}) {}", "({}) {}", "{}. {}", "{}: {}", " {}){}"])
def test_options_that_carry_their_letters_are_not_given_them_twice(read, form):
    options = [form.format(letter, text) for letter, text in zip("ABC", ("4", "A) in part", "6"), strict=True)]
    _, found, _ = read(
        "custom", [OWN | {"steps": options, "final": final} for final in ("C", 2, "6", options[2])], **CHOICE
    )
    expected = Problem("2 + 3?\nOptions:\n(A) 4\n(B) A) in part\n(C) 6", "", "C", ("4", "A) in part", "6"))
    assert found == [expected] * 4


@pytest.mark.parametrize("options", [["A) 4", "C) 5"], ["A) 4", "5"], ["B) 4", "A) 5"]])
def test_what_only_looks_like_labels_belongs_to_the_options(read, options):
    _, (problem,), _ = read("custom", [OWN | {"steps": options, "final": 1}], **CHOICE)
    assert problem.options == tuple(options)


@pytest.mark.parametrize(
    ("options", "final", "message"),
    [
        (["4"], "A", "'steps' has 1 options; 2 to 26 can be chosen from"),
        ([str(number) for number in range(27)], "A", "'steps' has 27 options; 2 to 26 can be chosen from"),
        (["4", " "], "A", "'steps': the option B is empty"),
        (["A) 4", "B)"], "A", "'steps': the option B is empty"),
        (["4", "5\n6"], "A", "'steps': the option B is of several lines; write each in one"),
        (["4", "5", "4 "], "A", "'steps': the options A and C are both '4'"),
        (
            ["4", "5"],
            "C",
            "'final' is 'C', which is no option: neither a letter from A to B, nor a position, an integer",
        ),
        (["4", "5"], "six", "'final' is 'six', which is no option"),
        (["4", "5"], 2, "'final' is 2, which is no option"),
        (["4", "5"], -1, "'final' is -1, which is no option"),
        (["4", "5"], "", "'final' is '', which is no option"),
        (["1", "0"], 1, "'final' is 1, the position of one option and the text of another; write its letter"),
        (["B", "A"], "A", "'final' is 'A', the letter of one option and the text of another; write its position, an"),
        (["4", "5"], 1.0, "'final' is float, expected str or int; found 1.0"),
    ],
)
def test_options_that_no_letter_can_choose_and_answers_that_name_none_are_refused(read, options, final, message):
    _, _, found = read(
        "custom", [OWN | {"steps": ["4", "5"], "final": "A"}, OWN | {"steps": options, "final": final}], **CHOICE
    )
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"\boxed{The Hague}", "the hague"),
        ("The answer is **The  Hague**.", "the hague"),
        ("Answer: The Hague\nIt is a town.", "the hague"),
        ("#### The Hague", "the hague"),
        ("The Hague", "the hague"),
        ("The answer is Mr. Smith.", "mr. smith"),
        ("Final answer: U.S. Army.", "u.s. army"),
        ("The answer to the question is Paris. It is a town.", "paris"),
        ("So the answer would be Paris", "paris"),
        ("Answer = Paris", "paris"),
        ("It is a town.\nIt is old.", None),
        ("", None),
    ],
)
def test_a_text_is_found_where_it_is_announced_or_alone(read, output, answer):
    task, _, _ = read("custom", [OWN | {"final": "a"}], answer="text")
    assert task.extract(output) == answer


# --------------------------------------------------------------------------------------------- the reference's rules


@pytest.mark.parametrize(
    ("name", "output", "ours", "reference"),
    [
        ("gsm8k", "#### -3", "-3", "3"),
        ("gsm8k", "#### 18\n\nThis assumes 7 days.", "18", "7"),
        ("gsm8k", "So 1,250.5 in all", "2501/2", "2501/2"),
        ("gsm8k", "none", None, None),
        ("aqua", "The answer is B, as a train is fast.", "B", "A"),
        ("aqua", "The answer is b", "B", "B"),
        ("aqua", "No idea", None, None),
        ("strategy_qa", "The answer is yes. There is no doubt.", "yes", "no"),
        ("strategy_qa", "YES", "yes", "yes"),
        ("strategy_qa", "maybe", None, None),
    ],
)
def test_the_references_rules_are_kept_with_their_faults(name, output, ours, reference):
    options = ("1", "2", "3") if name == "aqua" else ()
    for rule, answer in (("ours", ours), ("reference", reference)):
        assert make_task(config(name, train="some/set", metric_rule=rule)).extract(output, options=options) == answer


def test_the_references_rule_for_letters_reads_the_solutions_of_aqua_as_it_is_known_to(shared_data):
    task = published(shared_data, "aqua", train="aqua/dev.json", test="aqua/test.json").under("reference")
    test = task.read("test")
    found = [task.extract(problem.reasoning, options=problem.options) for problem in test]
    assert sum(answer == problem.answer for answer, problem in zip(found, test, strict=True)) == 243


def test_negative_answers_are_never_right_by_the_references_rule(shared_data, tmp_path):
    lines = (shared_data / "gsm8k/test.jsonl").read_text().splitlines()
    (tmp_path / "negative.jsonl").write_text("\n".join(line for line in lines if "#### -" in line))
    task = published(tmp_path, "gsm8k", test="negative.jsonl").under("reference")
    test = task.read("test")
    assert [problem.answer for problem in test] == ["-10", "-3"]
    assert not [p for p in test if task.is_correct(task.extract(task.target(p)), p)]


def test_a_task_without_a_rule_of_the_reference_is_told(tmp_path):
    with pytest.raises(SoftCoTError, match=r"metric_rule: the reference has no rule for the answers of word_problems"):
        make_task(TaskConfig(name="word_problems", train_problems=1, test_problems=1, metric_rule="reference"))


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task.name=date_understanding", "task.train=a/b"], "task.train: date_understanding has none; leave it out"),
        (["task.name=custom"], "task.fields: missing; say what the keys of a record are called"),
        (
            ["task.name=word_problems", "task.train_problems=1", "task.test_problems=1", "task.train=a/b"],
            "task.train: word_problems makes its problems itself; leave it out",
        ),
        (["task.name=custom"], "task.answer: missing; say what an answer is: number, option, yes_no or text"),
        (["task.name=custom"], "task.prompts: missing; write a prompt file"),
        (["task.name=custom"], "task.test: missing; name a JSON-lines file or a hub name"),
        (["task.name=custom", "task.test_from_train=order"], "task.train: missing; name a JSON-lines file or a hub"),
        (["task.name=custom", "task.fields={question: a}"], "task.fields.answer: missing"),
        (["task.name=custom", "task.fields={question: '', answer: a}"], "task.fields.question: "),
        (
            ["task.name=custom", "task.fields={question: a, answer: b, reasoning: b}"],
            "task.fields.reasoning: 'b' is the key of answer too; each has one of its own",
        ),
        (
            ["task.name=custom", "task.fields={question: a, answer: b}", "task.answer=option"],
            "task.answer: 'option' does not fit fields.options=None",
        ),
        (
            ["task.name=aqua", "task.answer=number"],
            "task.answer: aqua knows its own; task.name=custom is for other data",
        ),
        (
            ["task.name=aqua", "task.test=a/b", "task.test_from_train=order"],
            "task.test: test_from_train is for data without test problems; leave one of the two out",
        ),
        (
            ["task.name=date_understanding", "task.test_from_train=order"],
            "task.test: date_understanding has no training data that test_from_train could cut some from",
        ),
        (["task.name=gsm8k", "task.metric_rule=theirs"], "task.metric_rule: "),
    ],
)
def test_a_recipe_is_told_what_a_task_wants(settings, message):
    with pytest.raises(SoftCoTError) as caught:
        load_recipe(RECIPE, ["task.train_problems=null", "task.test_problems=null", *settings])
    assert f"  - {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"), [("gsm8k", "openai/gsm8k"), ("asdiv_aug", "xuyige/ASDiv-Aug"), ("aqua", "deepmind/aqua_rat")]
)
def test_without_a_name_the_published_data_are_meant(name, data):
    task = load_recipe(RECIPE, [f"task.name={name}", "task.train_problems=null", "task.test_problems=null"]).task
    assert (task.train, task.test) == (data, data)
    assert task.validation == ("deepmind/aqua_rat" if name == "aqua" else None)


def test_validation_data_of_the_hub_is_meant_only_where_that_is_trained_on(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    assert config("aqua", train=str(tmp_path / "data.jsonl"), test="deepmind/aqua_rat").validation is None
    assert config("aqua", train="deepmind/aqua_rat", test="deepmind/aqua_rat", validation="a/b").validation == "a/b"
    assert config("aqua", train="other/aqua", test="deepmind/aqua_rat").validation is None
    with pytest.raises(ValueError, match="makes its problems itself"):
        config("word_problems", test=None, train_problems=4, test_problems=4, validation="a/b")


def test_subset_and_splits_of_the_hub_can_be_named(monkeypatch):
    asked = []

    def load(*names, split):
        asked.append((*names, split))
        return [HARD]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    make_task(TaskConfig(name="date_understanding")).read("test")
    make_task(config("date_understanding", subset="dates", test_split="train+validation")).read("test")
    make_task(config("date_understanding")).read("test")
    with pytest.raises(SoftCoTError, match="'question' is missing"):  # HARD is another task's
        make_task(TaskConfig(name="aqua", validation_split="validation[:9]")).read("validation")
    assert asked == [
        ("lukaemon/bbh", "date_understanding", "test"),
        ("some/set", "dates", "train+validation"),
        ("some/set", "date_understanding", "test"),
        ("deepmind/aqua_rat", "raw", "validation[:9]"),
    ]


def test_the_lines_of_the_readme_are_read(read):
    block = (ROOT / "README.md").read_text().split("**Tasks**")[1].split("```")[1]
    lines = [line.split(maxsplit=1) for line in block.strip().splitlines()]
    assert {name for name, _ in lines} == {name for name in TASKS if chosen(TASKS, name).most_generated is None}
    fields = {"question": "problem", "reasoning": "solution", "answer": "result"}
    for name, line in lines:
        _, (problem,), _ = read(name, [json.loads(line)], **({"fields": fields} if name == "custom" else {}))
        assert problem.answer in ("12", "5", "B", "A", "no")
