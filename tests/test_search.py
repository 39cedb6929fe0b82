"""Strategies that search: the tree and the graph, with a base that says what a dictionary holds."""

import re
from types import SimpleNamespace

import pytest
import torch

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Posed
from softcot_ds.evaluation.graph import graph
from softcot_ds.evaluation.jobs import Thoughts
from softcot_ds.evaluation.judging import _number, _word
from softcot_ds.evaluation.strategies import Reply
from softcot_ds.evaluation.tree import tree
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.strategy_config import Wording

TASK = SimpleNamespace(extract=lambda text, cut, options: (re.findall(r"answer (\d+)", text) or [None])[-1])
VALUES = {"impossible": 0.001, "likely": 1, "sure": 20}


class Base:
    """Says what ``says`` holds of (begun, kind of question): a text for each draw, the last one again and again. A text
    that ends in "..." is cut there. Of several problems each has a dictionary."""

    def __init__(self, *says, room=lambda begun, then: 100):
        self.says = says
        self.rooms = room
        self.asked = []
        self.rounds = []

    def pose(self, problem, more):
        said = {message["role"]: message["content"] for message in more}
        asked = problem, said.get("assistant", ""), said.get("user", "")
        if asked not in self.asked:
            self.asked.append(asked)
        return BasePrompt([self.asked.index(asked)], [])

    def problems(self):
        prompts = [self.pose(problem, []) for problem in range(len(self.says))]
        thoughts = Thoughts(
            lambda indices: torch.tensor(indices, dtype=torch.float32)[:, None, None], 1, {"of": "a test"}
        )
        posed = Posed("learned", prompts, thoughts, [()] * len(prompts), self.pose, 0)
        object.__setattr__(posed, "room", lambda prompt: self.rooms(*self.asked[prompt.prefix_ids[0]][1:]))
        return posed

    def ask(self, name, prompts, thoughts, sampling, draw=0, count=1):
        asked = [self.asked[prompt.prefix_ids[0]] for prompt in prompts]
        told = thoughts([*range(len(prompts))])[:, 0, 0].tolist()
        assert told == [problem for problem, _, _ in asked], "thoughts are those of the prompt's problem"
        self.rounds.append((name.removeprefix("learned "), draw, count, sampling, asked))
        replies = []
        for problem, begun, then in asked:
            texts = self.says[problem].get((begun, self.kind(then)), [""])
            texts = texts(then) if callable(texts) else texts
            for number in range(count):
                text = texts[min(number, len(texts) - 1)]
                replies.append(Reply(text.removesuffix("..."), text.endswith("...")))
        return replies

    @staticmethod
    def kind(then):
        """What is asked, by words of the wording that each question alone has."""
        kinds = {"Suggest": "propose", "How likely": "value", "beginnings": "vote", "How sure": "score"}
        kinds |= {"attempts": "aggregate", "mistakes mended": "improve"}
        return next((kind for words, kind in kinds.items() if words in then), "") if then else ""


def settings(strategy, temperature=0.7, **section):
    return EvaluationConfig(strategy=strategy, temperature=temperature, max_new_tokens=50, **{strategy: section})


def run(strategy, base, **section):
    answers = strategy(base.ask, base.problems(), TASK, settings(strategy.__name__, **section))
    assert all(answer.value == TASK.extract(answer.reply.text, answer.reply.cut, ()) for answer in answers)
    draws = [draw for _, first, count, _, _ in base.rounds for draw in range(first, first + count)]
    assert len(draws) == len({*draws}), "each round has random numbers of its own"
    return answers


def voting_for(text):
    """Votes for the one that shows this text, whatever its number is."""
    pattern = re.compile(rf"Number (\d+):\n{re.escape(text)}$", re.MULTILINE)
    return lambda then: [f"The best is number {pattern.findall(then)[0]}"]


def test_a_tree_keeps_the_beginning_that_is_worth_most_and_goes_on_with_it():
    first = {
        ("", ""): ["10 - 4 = 6\nand so on", "10 + 4 = 14\nanswer 1", "10 - 4 = 7\n"],
        ("10 - 4 = 6\n", "value"): ["It is likely.", "sure", "nothing that can be read"],  # 21
        ("10 + 4 = 14\n", "value"): ["impossible", "likely", "likely"],  # 2.001
        ("10 - 4 = 7\n", "value"): ["impossible"],  # 0.003
        ("10 - 4 = 6\n", ""): ["answer 5", "answer 6", "answer 6 or so"],
        ("10 - 4 = 6\nanswer 5", "value"): ["likely"],
        ("10 - 4 = 6\nanswer 6", "value"): ["sure"],
        ("10 - 4 = 6\nanswer 6 or so", "value"): ["not sure"],  # says nothing
        ("10 + 4 = 14\n", ""): ["answer 14"],
        ("10 + 4 = 14\nanswer 14", "value"): ["impossible"],
    }
    second = {("", ""): ["answer 3"]}  # ended: nothing is to be chosen from
    base = Base(first, second)
    options = {"depth": 2, "candidates": 3, "breadth": 2, "judge": "value", "judgements": 3}
    answers = run(tree, base, **options)
    assert [answer.value for answer in answers] == ["6", "3"]
    assert answers[0].reply == Reply("10 - 4 = 6\nanswer 6", False)
    assert [name for name, *_ in base.rounds] == ["step 1", "judgement 1", "step 2", "judgement 2"], "for all problems"
    assert [[(problem, begun) for problem, begun, _ in asked] for *_, asked in base.rounds[::2]] == [
        [(0, ""), (1, "")],
        [(0, "10 - 4 = 6\n"), (0, "10 + 4 = 14\n")],
    ], "the two best are gone on with, the better one first; what has ended is not"
    assert [sampling.max_new_tokens for _, _, _, sampling, _ in base.rounds] == [64, 32, 50, 32]
    scores = [[(step["text"], step["score"]) for step in level] for level in answers[0].details["steps"]]
    assert scores[0] == [("10 - 4 = 6\n", 21), ("10 + 4 = 14\n", 2.001), ("10 - 4 = 7\n", pytest.approx(0.003))]
    assert scores[1][0] == ("10 - 4 = 6\nanswer 6", 60)
    assert len(scores[1]) == 4, "what the second has in three draws is one"
    assert [answer.details["judgements"] for answer in answers] == [3 * 3 + 4 * 3, 0]
    assert [answer.details["unread_judgements"] for answer in answers] == [1 + 3, 0]


def test_a_tree_takes_the_beginning_with_most_votes():
    says = {
        ("", ""): ["one\n2", "two\n3", "three\n4", "two\n5"],
        ("", "vote"): lambda then: ["The best is number 3", "3", "number 1", "none of them", "number 9"],
        ("three\n", ""): ["answer 4"],
    }
    base = Base(says)
    (answer,) = run(tree, base, depth=2, candidates=4, judgements=5)
    assert answer.value == "4"
    (shown,) = [then for _, _, _, _, asked in base.rounds for _, _, then in asked if "beginnings" in then]
    assert re.findall(r"Number (\d):\n(\w+)\n", shown) == [("1", "one"), ("2", "two"), ("3", "three")], "each once"
    assert [(step["text"], step["score"]) for step in answer.details["steps"][0]] == [
        ("three\n", 2.0),
        ("one\n", 1.0),
        ("two\n", 0.0),
    ]
    assert (answer.details["judgements"], answer.details["unread_judgements"]) == (5, 2)


@pytest.mark.parametrize(
    ("replies", "best"),
    [
        (["answer 1", "answer 2", "answer 3"], "1"),
        (["answer 1", "answer 2", "answer 2"], "2"),
        (["", "answer 4", "  "], "4"),
        (["", " "], None),
    ],
)
def test_of_beginnings_that_are_judged_alike_what_was_made_more_often_is_the_best_then_the_earlier_draw(replies, best):
    for judge in ("vote", "value"):
        base = Base({("", ""): replies})  # which says nothing that can be read
        (answer,) = run(tree, base, depth=1, candidates=len(replies), judge=judge)
        assert answer.value == best
        assert answer.details["unread_judgements"] == answer.details["judgements"]


def test_a_tree_goes_on_with_steps_that_are_proposed():
    says = {
        ("", "propose"): ["1. add 4\n\n2) take 4\n- double it\n* halve it"],
        ("", "vote"): voting_for("take 4"),
        ("take 4\n", "propose"): [""],  # has nothing to propose, nor would it have when asked again
        ("take 4\n", ""): ["10 - 4\nanswer 6", "answer 7"],
    }
    base = Base(says)
    (answer,) = run(tree, base, depth=4, candidates=3, generate="propose", judgements=1)
    assert answer.reply.text == "take 4\n10 - 4\nanswer 6"
    assert [name for name, *_ in base.rounds] == ["step 1", "judgement 1", "step 2", "step 4", "judgement 4"]
    assert [step["text"] for step in answer.details["steps"][0]] == ["take 4\n", "add 4\n", "double it\n"], "three"
    assert "Suggest 3 different" in base.rounds[0][-1][0][2]


def test_greedily_a_tree_proposes_and_each_beginning_is_ended_once():
    says = {
        ("", "propose"): ["a\nb"],
        ("a\n", "value"): ["likely"],
        ("b\n", "value"): ["sure"],
        ("b\n", ""): ["answer 2"],
    }
    base = Base(says)
    options = {"depth": 2, "candidates": 2, "generate": "propose", "judge": "value", "judgements": 1}
    (answer,) = tree(base.ask, base.problems(), TASK, settings("tree", temperature=0.0, **options))
    assert answer.value == "2"
    assert [count for _, _, count, _, _ in base.rounds] == [1, 1, 1]


def test_a_line_that_is_cut_is_gone_on_with_where_it_was_cut():
    says = {("", ""): ["10 - ..."], ("10 - ", ""): ["4 = 6\n..."], ("10 - 4 = 6\n", ""): ["\n\nanswer 6\n\nmore", "x"]}
    (answer,) = run(tree, Base(says), depth=3, candidates=1)
    assert answer.reply.text == "10 - 4 = 6\n\n\nanswer 6\n\nmore", "the last step has all that is written"
    assert answer.details["judgements"] == 0


def test_what_fills_the_context_ends_there_and_what_cannot_be_asked_is_not_read():
    says = {("", ""): ["long\n1", "short\n2"], ("", "vote"): ["2"], ("long\n", ""): ["answer 1"]}
    full = {"votes": lambda begun, then: 0 if then else 9, "steps": lambda begun, then: 0 if begun else 9}
    (answer,) = run(tree, Base(says, room=full["votes"]), depth=2, candidates=2)
    assert answer.value == "1", "no votes: the earlier one"
    assert answer.details["unread_judgements"] == answer.details["judgements"] == 5
    (answer,) = run(tree, Base(says, room=full["steps"]), depth=2, candidates=2)
    assert answer.reply == Reply("short\n", True)
    base = Base(says, room=lambda begun, then: 0)
    run(tree, base, depth=2, candidates=2)
    assert base.rounds[0][-1] == [(0, "", "")], "the problem itself is asked, to be refused as ever"


GRAPH = [
    {"do": "generate", "count": 3},
    {"do": "score", "count": 2},
    {"do": "keep", "count": 2},
    {"do": "generate"},
    {"do": "aggregate", "count": 2, "of": [3, 4]},
    {"do": "score"},
    {"do": "keep"},
    {"do": "improve"},
]


def test_a_graph_scores_keeps_merges_and_improves_as_the_list_says():
    says = {
        ("", ""): ["answer 1", "answer 2", "answer 3"],
        ("answer 1", "score"): ["Score: 3", "4/10"],  # 3.5
        ("answer 2", "score"): ["certainly right", "7"],  # 7, of one that is read
        ("answer 3", "score"): ["99", "-1"],  # none is read
        ("", "aggregate"): ["answer 4", "answer 5"],
        ("answer 4", "score"): ["5"],
        ("answer 5", "score"): ["8 out of 10"],
        ("answer 5", "improve"): ["answer 6"],
    }
    base = Base(says, {("", ""): ["answer 9"], ("", "aggregate"): [" "]})
    answers = run(graph, base, operations=GRAPH)
    assert [answer.value for answer in answers] == ["6", "9"]
    assert [name for name, *_ in base.rounds] == [
        f"operation {number} ({do})"
        for number, do in [
            (1, "generate"),
            (2, "score"),
            (4, "generate"),
            (5, "aggregate"),
            (6, "score"),
            (8, "improve"),
        ]
    ]
    (merged, _) = [then for _, _, then in base.rounds[3][-1]]
    assert re.findall(r"Number (\d):\n(.+)", merged) == [("1", "answer 2"), ("2", "answer 1"), ("3", "answer 1")]
    told = answers[0].details["operations"]
    assert [one["do"] for one in told] == [one["do"] for one in GRAPH]
    assert [[answer["score"] for answer in told[number]["answers"]] for number in (1, 2, 5)] == [
        [3.5, 7.0, 0.0],
        [7.0, 3.5],
        [5.0, 8.0],
    ]
    assert [answer.details["judgements"] for answer in answers] == [3 * 2 + 2, 3 * 2 + 1]
    assert answers[0].details["unread_judgements"] == 1 + 2


def test_where_there_is_no_room_for_answers_a_graph_goes_on_with_what_it_has():
    says = {("", ""): ["answer 1", "answer 2"], ("answer 2", "score"): ["9"], ("answer 1", "score"): ["8"]}
    operations = [{"do": "generate", "count": 2}, {"do": "score"}, {"do": "aggregate"}, {"do": "improve"}]
    (answer,) = run(graph, Base(says, room=lambda begun, then: "attempts" not in then), operations=operations)
    assert answer.value == "2", "the better one; and it is not improved, as nothing is written"
    (answer,) = run(graph, Base(says, room=lambda begun, then: not then), operations=operations)
    assert answer.value == "1", "none has a score: the earlier one"
    assert answer.details["unread_judgements"] == answer.details["judgements"] == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sure", 20),
        ("Likely.", 1),
        ("I think it is **impossible**", 0.001),
        ("It is likely right.\nSo: sure", 20),
        ("sure\n\nThat is all.", 20),
        ("unlikely", None),
        ("not sure", None),
        ("It isn't likely", None),
        ("impossible, likely or sure", None),
        ("surely", None),
        ("", None),
    ],
)
def test_a_word_is_read_where_one_is_said(text, value):
    assert _word(text, VALUES) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("2.", 2),
        ("**2**", 2),
        ("The best is number 2.", 2),
        ("Number 1 has a mistake. The best is number 3", 3),
        ("Solution 2, because 5 apples are 10 halves", 2),
        ("number 2, and 2 again", 2),
        ("2/5", 2),
        ("2 out of 5", 2),
        ("1 or 2", None),
        ("number 7", None),
        ("number 7, or 2", None),
        ("2.5", None),
        ("-2", None),
        ("x2", None),
        ("the second", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_a_number_is_read_where_one_is_said(text, value):
    assert _number(text, range(1, 6)) == value


def test_a_wording_says_what_it_is_asked_and_all_its_mistakes(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("value: '{words} and {count}'\nvotes: x\n")
    with pytest.raises(SoftCoTError) as error:
        Wording(path, {"value": {"words"}, "vote": {"answers"}})
    assert str(error.value).splitlines()[1:] == [
        "  - unknown key 'votes'; known: value, vote",
        "  - value: {count} has no meaning here",
        "  - vote: missing",
    ]
    path.write_text("value: 'of {words}, {x} and {}'\n")
    assert Wording(path, {"value": {"words"}})("value", words="a {count}") == "of a {count}, {x} and {}"
    for text in ("[]", "value: 3", ""):
        path.write_text(text)
        with pytest.raises(SoftCoTError, match="a strategy's wording is a mapping of value to texts"):
            Wording(path, {"value": {"words"}})
