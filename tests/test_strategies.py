"""How an answer is reached: a strategy is one function, whose rounds are kept, told apart and gone on with."""

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from statistics import stdev
from types import SimpleNamespace

import pytest
from adapters import make_adapter
from launch import ONLINE, ROOT
from scribe import Scribe, replace_decoding
from test_votes import by_enumeration

from softcot_ds.choices import STRATEGIES
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.conditions import Conditions
from softcot_ds.evaluation.decoder import Decoder, seed_of
from softcot_ds.evaluation.jobs import Worker
from softcot_ds.evaluation.report import table, what_it_says_more
from softcot_ds.evaluation.run import evaluate
from softcot_ds.evaluation.strategies import Answer, single
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.experiment import Experiment
from softcot_ds.models.backbone import load_tokenizer
from softcot_ds.models.decoding import Output, Sampling
from softcot_ds.recipe import load_recipe
from softcot_ds.tasks import Task

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=12", *ONLINE]
DECODE = ["evaluation.batch_size=2", "evaluation.temperature=0.8", "evaluation.conditions=[learned,none]"]
DRAWS = 3


def vote(ask, problems, task, settings):
    """A strategy of one's own: what most of three samples say; of several, the first."""
    draws = [
        ask(f"{problems.name} {draw}", problems.prompts, problems.thoughts, Sampling.of(settings), draw)
        for draw in range(DRAWS)
    ]
    answers = []
    for replies in zip(*draws, strict=True):
        values = [task.extract(reply.text, reply.cut) for reply in replies]
        value, _ = Counter(values).most_common(1)[0]
        answers.append(Answer(value, replies[values.index(value)]))
    return answers


class Guesser(Scribe):
    """Writes one of three answers by chance, and notes it; is killed when it has filled ``patience`` portions."""

    def __init__(self, tokenizer, patience=None):
        super().__init__(tokenizer)
        self.patience = patience
        self.said = {}

    def __call__(self, model, prompts, thoughts, stop_ids, sampling, table, batch_size, seeds, samples, drafter):
        if len(self.batches) == self.patience:
            raise KeyboardInterrupt
        prompts = [prompt for prompt in prompts for _ in range(samples)]
        self.batches.append(prompts)
        numbers = [random.Random(seed).randrange(3) for seed in seeds]
        for prompt, number in zip(prompts, numbers, strict=True):
            text = self.tokenizer.decode(prompt.prefix_ids) + "{}" + self.tokenizer.decode(prompt.suffix_ids)
            self.said.setdefault(text.format("" if thoughts is None else "[4 thoughts]"), []).append(number)
        return [Output(self.tokenizer.encode(f"answer {n}", add_special_tokens=False), False) for n in numbers]


def recipe_in(tmp_path, strategy, *overrides):
    settings = [f"output_dir={tmp_path}", f"evaluation.strategy={strategy}", *SMALL, *DECODE, *overrides]
    return load_recipe(RECIPE, settings)


def records(recipe):
    """By folder of the evaluation and condition."""
    return {
        (path.parent.name, path.stem): [json.loads(line) for line in path.read_text().splitlines()]
        for path in recipe.run_dir.glob("evaluation/*/*.jsonl")
    }


@pytest.fixture
def guesser(monkeypatch):
    guesser = Guesser(load_tokenizer(load_recipe(RECIPE).base))
    replace_decoding(monkeypatch, guesser)
    return guesser


@pytest.fixture
def with_vote(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "vote", "test_strategies:vote")


def test_a_strategy_of_ones_own_is_a_function_and_a_line(tmp_path, guesser, with_vote):
    recipe = recipe_in(tmp_path, "vote")
    report = evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))
    assert report["strategy"] == "vote"
    assert guesser.num_prompts == 2 * DRAWS * 12
    different = 0
    for (_, condition), rows in records(recipe).items():
        for row in rows:
            said = guesser.said[row["prompt"]]
            assert len(said) == DRAWS, condition
            most = max(said, key=said.count)  # of several the first
            assert row["answer"] == str(most)
            assert row["output"] == f"answer {most}"
            assert row["correct"] == (row["answer"] == row["reference"])
            different += len(set(said)) > 1
        assert report["conditions"][condition]["correct"] == sum(row["correct"] for row in rows)
    assert different > 6, "each draw has random numbers of its own"


@pytest.fixture
def each_portion_takes_a_second(monkeypatch):
    monkeypatch.setattr(jobs, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


@pytest.mark.parametrize("strategy", ["vote", "tree", "graph"])
def test_rounds_go_on_where_they_were_interrupted(
    tmp_path, guesser, with_vote, monkeypatch, each_portion_takes_a_second, strategy
):
    recipe = recipe_in(tmp_path / "once", strategy)
    adapter = make_adapter(tmp_path / "adapter", recipe)
    undisturbed = evaluate(recipe, adapter)
    again = recipe_in(tmp_path / "again", strategy)
    for patience in (3, 4, None):  # killed in the second round of learned, and in the first of none
        killed = Guesser(guesser.tokenizer, patience)
        replace_decoding(monkeypatch, killed)
        if patience is None:
            report = evaluate(again, adapter)
        else:
            with pytest.raises(KeyboardInterrupt):
                evaluate(again, adapter)
    assert len(killed.batches) == len(guesser.batches) - 3 - 4
    assert records(again) == records(recipe)
    assert report["conditions"] == undisturbed["conditions"], "seconds too"
    portions = [sum(bool(batch[0].suffix_ids) == has for batch in guesser.batches) for has in (True, False)]
    seconds = [row["seconds_per_problem"] for row in report["conditions"].values()]
    assert seconds == pytest.approx([number / 12 for number in portions])
    if strategy != "vote":
        judged = [row["judgements"] for row in report["conditions"].values()]
        # 0 is no number of a beginning, and is a score.
        assert all((0 < one["unread"] < one["asked"]) == (strategy == "tree") for one in judged)
        assert all(one["unread_share"] == one["unread"] / one["asked"] for one in judged)
        assert max(map(len, table(report).splitlines()[1:])) <= 100


def read_by(batches, thoughts):
    """Tokens of portions: what all of one begin with once."""
    return sum(
        sum(len(p.prefix_ids) + thoughts + len(p.suffix_ids) - shared for p in batch) + shared
        for batch in batches
        for ids in [[p.prefix_ids[: len(p.prefix_ids) - (not thoughts)] for p in batch]]  # one token is left to be read
        for shared in [next(n for n in itertools.count() if len({tuple(some[: n + 1]) for some in ids}) > 1)]
    )


def test_what_is_read_and_written_for_a_problem_stands_beside_its_accuracy(
    tmp_path, guesser, with_vote, each_portion_takes_a_second, capsys
):
    once, thrice = recipe_in(tmp_path, "single"), recipe_in(tmp_path, "vote")
    sampled = recipe_in(tmp_path / "apart", "single", "evaluation.samples=3")
    adapter = make_adapter(tmp_path / "adapter", once)
    told = [evaluate(recipe, adapter)["conditions"] for recipe in (once, thrice, sampled)]
    printed = capsys.readouterr().out.splitlines()
    tokens = {n: len(guesser.tokenizer.encode(f"answer {n}", add_special_tokens=False)) + 1 for n in range(3)}
    thinks = told[0]["learned"]["spent_per_problem"]["assistant_read"]
    for name, thoughts in (("learned", 4), ("none", 0)):
        batches = [[p for p in batch] for batch in guesser.batches if bool(batch[0].suffix_ids) == bool(thoughts)]
        assert [len(batch) for batch in batches] == [6] * 2 * DRAWS + [18] * 2
        read = read_by(batches[:2], thoughts) / 12
        said = [numbers for text, numbers in guesser.said.items() if ("[4 thoughts]" in text) == bool(thoughts)]
        first = sum(tokens[numbers[0]] for numbers in said) / 12
        three = sum(tokens[number] for numbers in said for number in numbers[:DRAWS]) / 12
        rows = [of[name] for of in told]
        spent = [[row["spent_per_problem"][key] for key in ("read", "written")] for row in rows]
        assert spent[0] == pytest.approx([read, first])
        assert spent[1] == pytest.approx([DRAWS * read, three]), "each draw is a round of its own"
        assert spent[2] == pytest.approx([read, three / 3]), "what one of three samples costs"
        assert [row["tokens_per_problem"] for row in rows] == pytest.approx([sum(both) for both in spent])
        assert [row["seconds_per_problem"] for row in rows] == pytest.approx([2 / 12, DRAWS * 2 / 12, 2 / 3 / 12])
        assert rows[0]["spent_per_problem"]["assistant_read"] == (thinks if thoughts else 0)
        shown = [line.split() for line in printed if line.startswith(f"{name} ") and "%" in line]
        assert shown[0][5:7] == [f"{rows[0]['tokens_per_problem']:.1f}", "0.17"]
    asked = [example.assistant.token_ids for example in Experiment(once).splits.test]
    assert thinks == pytest.approx(sum(map(len, asked)) / 12), "its prompt, and the places of the thoughts"


def test_what_one_strategy_has_asked_is_there_for_another_and_each_has_a_report(tmp_path, guesser, with_vote):
    single, voted = recipe_in(tmp_path, "single"), recipe_in(tmp_path, "vote")
    adapter = make_adapter(tmp_path / "adapter", single)
    assert "strategy" not in evaluate(single, adapter)
    assert guesser.num_prompts == 2 * 12
    evaluate(voted, adapter)
    assert guesser.num_prompts == 2 * DRAWS * 12, "the first draw is that of single"
    assert len({folder for folder, _ in records(single)}) == 2


def test_samples_are_draws_of_their_own_and_the_report_has_their_votes(tmp_path, guesser, monkeypatch, capsys):
    monkeypatch.setattr(Task, "is_correct", lambda self, answer, problem: answer == "1")  # one in three
    once, sampled = recipe_in(tmp_path, "single"), recipe_in(tmp_path, "single", "evaluation.samples=4")
    adapter = make_adapter(tmp_path / "adapter", once)
    assert "samples" not in evaluate(once, adapter)
    report = evaluate(sampled, adapter)
    assert guesser.num_prompts == 2 * 4 * 12, "the first sample is what was decoded before"
    # Two conditions of two portions each.
    assert [len(batch) for batch in guesser.batches] == [6] * 4 + [18] * 4, "and the others are decoded together"
    found = {condition: rows for (_, condition), rows in records(sampled).items() if "samples" in rows[0]}
    right, majority = {}, {}
    for condition, rows in found.items():
        answers = [[sample["answer"] for sample in row["samples"]] for row in rows]
        assert answers == [list(map(str, guesser.said[row["prompt"]])) for row in rows]
        columns = list(zip(*answers, strict=True))
        right[condition] = [answer.count("1") / 4 for answer in answers]
        majority[condition] = [row["majority"] for row in rows]
        truth = [[by_enumeration(answer, "1", k) for k in range(1, 5)] for answer in answers]
        means = [[float(sum(values)) / 12 for values in zip(*of_k, strict=True)] for of_k in zip(*truth, strict=True)]
        told = report["conditions"][condition]
        for name, values in zip(("majority", "ties", "pass_at_k"), zip(*means, strict=True), strict=True):
            assert told[name] == pytest.approx(dict(zip("1234", values, strict=True)))
        assert told["accuracy"] == told["majority"]["1"] == pytest.approx(sum(right[condition]) / 12)
        assert told["accuracy_sd"] == pytest.approx(stdev(column.count("1") / 12 for column in columns))
        assert majority[condition] == pytest.approx([float(values[-1][0]) for values in truth])
        assert [row["votes"] for row in rows] == [Counter(answer) for answer in answers]
    compared = report["comparisons"]["learned-none"]
    for told, values in ((compared, right), (compared["majority"], majority)):
        assert told["difference"] == pytest.approx((sum(values["learned"]) - sum(values["none"])) / 12)
        assert told["ci95"][0] <= told["difference"] <= told["ci95"][1]
    printed = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(printed) if "pass@4" in line)
    shown = report["conditions"]["none"]
    cells = [shown["accuracy_sd"], *(shown[name]["4"] for name in ("majority", "ties", "pass_at_k"))]
    assert [cell for cell in printed[header + 2].split() if "%" in cell][:2] == [f"{cell:.1%}" for cell in cells[:2]]
    assert all(f" {cell:.1%} " in printed[header + 2] for cell in cells)
    assert what_it_says_more(report, report | {"samples": 1}) == ["it has 4 samples of each problem, this one 1"]


def test_self_consistency_is_the_vote_of_the_samples_by_its_name(tmp_path, guesser, monkeypatch):
    monkeypatch.setattr(Task, "is_correct", lambda self, answer, problem: answer == "1")
    one, vote = (recipe_in(tmp_path, name, "evaluation.samples=5") for name in ("single", "self_consistency"))
    adapter = make_adapter(tmp_path / "adapter", one)
    alone, together = evaluate(one, adapter), evaluate(vote, adapter)
    assert guesser.num_prompts == 2 * 5 * 12, "what was decoded for one serves the other"
    assert (together["strategy"], together["votes"]) == ("self_consistency", True)
    for condition, row in together["conditions"].items():
        of_one = alone["conditions"][condition]
        assert row["accuracy"] == row["by_rule"]["ours"]["accuracy"] == of_one["majority"]["5"]
        assert row["ci95"] == of_one["majority_ci95"]
        assert row["majority"]["1"] == of_one["accuracy"] != row["accuracy"]
        spent, spent_by_one = row["spent_per_problem"], of_one["spent_per_problem"]
        assert spent["written"] == pytest.approx(5 * spent_by_one["written"])
        assert spent["read"] == pytest.approx(spent_by_one["read"]), "once for all"
        assert row["seconds_per_problem"] == pytest.approx(5 * of_one["seconds_per_problem"])
    found = together["comparisons"]["learned-none"]
    assert found["difference"] == found["majority"]["difference"]
    assert found["majority"] == alone["comparisons"]["learned-none"]["majority"]
    assert "accuracy is that of their majority" in table(together)
    assert "accuracy is the mean over them" in table(alone)


def test_a_round_that_is_not_sampled_is_one_for_all_samples(tmp_path, guesser, monkeypatch):
    def plans_first(ask, problems, task, settings):
        ask("plan", problems.prompts, None, Sampling(5))
        return single(ask, problems, task, settings)

    monkeypatch.setitem(STRATEGIES, "own", f"{__name__}:own")
    monkeypatch.setattr(sys.modules[__name__], "own", plans_first, raising=False)
    recipe = recipe_in(tmp_path, "own", "evaluation.samples=3", "evaluation.conditions=[learned]")
    report = evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))
    assert guesser.num_prompts == (1 + 3) * 12
    assert (report["strategy"], report["samples"]) == ("own", 3)


def test_a_draw_is_another_only_where_it_is_sampled_and_the_first_is_as_it_was_without(tmp_path):
    recipe = recipe_in(tmp_path, "single")
    decoder = Decoder(Worker(recipe, recipe.base, "weights"), [2], 512)
    prompts = [BasePrompt([1, 2], [3])]
    sampled = [decoder.job("x", prompts, None, Sampling(5, 0.7, 0.9), draw).key for draw in (0, 1, 2)]
    greedy = [decoder.job("x", prompts, None, Sampling(5), draw).key for draw in (0, 1, 2)]
    assert len({*sampled, *greedy}) == 4
    assert len(set(greedy)) == 1
    kept = [json.loads(path.read_text())["sampling"] for path in recipe.run_dir.glob("outputs/*/settings.json")]
    first = {"temperature": 0.7, "top_p": 0.9, "seed": recipe.seed}
    assert all(sampling in kept for sampling in ("greedy", first, {**first, "draw": 1}, {**first, "draw": 2}))
    assert seed_of(5, 3) == seed_of(5, 3, 0) == int.from_bytes(hashlib.sha256(b"5/3").digest()[:8])
    seeds = {seed_of(5, number, draw) for number in range(20) for draw in range(20)}
    assert len(seeds) == 400


def asks_the_same_twice(ask, problems, task, settings):
    for _ in range(2):
        replies = ask(problems.name, problems.prompts, problems.thoughts, Sampling.of(settings))
    return [Answer(task.extract(reply.text, reply.cut), reply) for reply in replies]


def forgets_some(ask, problems, task, settings):
    return [Answer(None, reply) for reply in ask("all", problems.prompts, problems.thoughts, Sampling.of(settings))][1:]


@pytest.mark.parametrize(
    ("strategy", "kind", "message"),
    [
        (asks_the_same_twice, SoftCoTError, r"the strategy asks the same again.* a draw of their own .*\(it is 0.8\)"),
        (forgets_some, TypeError, r"is to return an Answer for each of 12 problems; it returned 11, of \['Answer'\]"),
        (lambda *_: ["4"] * 12, TypeError, r"it returned 12, of \['str'\]"),
    ],
)
def test_a_strategy_that_does_not_do_what_is_asked_of_one_is_told(tmp_path, monkeypatch, strategy, kind, message):
    monkeypatch.setitem(STRATEGIES, "own", f"{__name__}:own")
    monkeypatch.setattr(sys.modules[__name__], "own", strategy, raising=False)
    recipe = load_recipe(RECIPE, [*SMALL, *DECODE, f"output_dir={tmp_path}", "evaluation.strategy=own"])
    replace_decoding(monkeypatch, Guesser(load_tokenizer(recipe.base)))
    with pytest.raises(kind, match=message):
        evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))


def test_what_only_a_strategy_reads_is_in_the_name_of_its_evaluation():
    values = load_recipe(RECIPE, SMALL).evaluation.model_dump()
    assert EvaluationConfig(**values).other_strategy == {}

    class WithSetting(EvaluationConfig):
        minimum: int = 2

    assert WithSetting(**values | {"minimum": 3}).other_strategy == {}
    STRATEGIES["own"] = "nowhere:own"
    try:
        told = WithSetting(**values | {"strategy": "own", "minimum": 3}).other_strategy
    finally:
        del STRATEGIES["own"]
    assert told == {"strategy": "own", "minimum": 3}


def thinks_first(ask, problems, task, settings):
    """Two rounds, of which only the second has thoughts."""
    ask("first", problems.prompts, None, Sampling.of(settings))
    replies = ask("then", problems.prompts, problems.thoughts, Sampling.of(settings))
    return [Answer(task.extract(reply.text, reply.cut), reply) for reply in replies]


def test_states_of_a_later_round_are_read_before_anything_is_decoded(tmp_path, monkeypatch):
    """On all ranks then, and not beside the base."""
    events = []

    class Watched(Guesser):
        def __call__(self, *arguments):
            events.append("decoded")
            return super().__call__(*arguments)

    read = Conditions.read_states
    monkeypatch.setattr(Conditions, "read_states", lambda self: events.append("states read") or read(self))
    monkeypatch.setitem(STRATEGIES, "own", f"{__name__}:thinks_first")
    overrides = ["evaluation.strategy=own", "evaluation.conditions=[learned]", f"output_dir={tmp_path}"]
    recipe = load_recipe(RECIPE, [*SMALL, *DECODE, *overrides])
    replace_decoding(monkeypatch, Watched(load_tokenizer(recipe.base)))
    evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))
    assert events[0] == "states read"
    assert events.count("decoded") == 4, "twelve problems in two portions, twice"


def test_nothing_is_asked_of_nobody(tmp_path, monkeypatch):
    def asks_again(ask, problems, task, settings):
        assert ask("again", [], None, Sampling.of(settings)) == []
        return [Answer("4", reply) for reply in ask("all", problems.prompts, problems.thoughts, Sampling.of(settings))]

    monkeypatch.setitem(STRATEGIES, "own", f"{__name__}:own")
    monkeypatch.setattr(sys.modules[__name__], "own", asks_again, raising=False)
    recipe = load_recipe(RECIPE, [*SMALL, *DECODE, f"output_dir={tmp_path}", "evaluation.strategy=own"])
    replace_decoding(monkeypatch, Guesser(load_tokenizer(recipe.base)))
    assert evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))["num_problems"] == 12
