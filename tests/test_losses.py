"""The loss of the reference solutions: against float64 passes of each problem alone, kept, on problems that fit."""

import json
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from adapters import make_adapter
from evaluations import EVERY, records
from launch import ONLINE, ROOT
from toy_models import VOCABULARY, make_toy
from transformers import AutoModelForCausalLM

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.conditions import Conditions, Posed
from softcot_ds.evaluation.jobs import Thoughts, Worker
from softcot_ds.evaluation.losses import Losses
from softcot_ds.evaluation.report import table
from softcot_ds.evaluation.run import evaluate
from softcot_ds.inference import Adapter
from softcot_ds.methods.trial import load_scorer
from softcot_ds.models import scoring
from softcot_ds.models.frozen_prefix import FrozenPrefix
from softcot_ds.models.scoring import Scorer
from softcot_ds.recipe import load_recipe
from softcot_ds.values import resolve_location

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=11", *ONLINE]
LOSS_ALONE = ["evaluation.decode=false", "evaluation.batch_size=4", "evaluation.text_max_tokens=6"]


def make_recipe(tmp_path, *overrides):
    return load_recipe(RECIPE, [f"output_dir={tmp_path}", *SMALL, *LOSS_ALONE, *overrides])


def naive(base, prompt, thoughts, target):
    """The loss of one problem: everything embedded, one pass over it, each token predicted by the one before it."""
    embed = base.get_input_embeddings()
    parts = [embed(torch.tensor(ids, dtype=torch.int64)) for ids in (prompt.prefix_ids, prompt.suffix_ids, target)]
    if thoughts is not None:
        parts.insert(1, thoughts.double())
    with torch.no_grad():
        logits = base(inputs_embeds=torch.cat(parts)[None]).logits[0]
    said = logits[-len(target) - 1 : -1].log_softmax(dim=-1)
    return -sum(float(said[place, token]) for place, token in enumerate(target))


@pytest.mark.slow
def test_each_condition_has_the_loss_of_whole_passes_of_each_problem_alone(tmp_path, monkeypatch):
    static = make_adapter(tmp_path / "static", make_recipe(tmp_path, "method=prompt_tuning"))
    chosen = [f"evaluation.conditions=[{','.join(EVERY)}]", f"evaluation.static_adapter={static}"]
    recipe = make_recipe(tmp_path, *chosen)
    adapter = make_adapter(tmp_path / "adapter", recipe)
    words = []
    monkeypatch.setattr(
        Conditions, "words", property(lambda _: words[-1], lambda _, value: words.append(value)), raising=False
    )
    load = jobs.load_to_run
    monkeypatch.setattr(jobs, "load_to_run", lambda *arguments: load(*arguments).double())  # but for norms
    report = evaluate(recipe, adapter)

    opened = Adapter(recipe, adapter)
    examples = opened.experiment.splits.test
    conditions = Conditions(opened, examples)
    conditions.words = words[-2]
    base = AutoModelForCausalLM.from_pretrained(resolve_location("package:pair/base"), dtype=torch.float64)
    solutions = [example.target_ids for example in examples]
    assert all(ids[-1] == opened.experiment.base_prompts.end_of_turn_id for ids in solutions)
    tokens = sum(map(len, solutions))
    for condition in EVERY:
        posed = conditions.of(condition)
        given = [None] * 11 if posed.thoughts is None else posed.thoughts(list(range(11)))
        truth = [naive(base, *one) for one in zip(posed.prompts, given, solutions, strict=True)]
        found = records(recipe, condition)
        assert [record["loss"] for record in found] == pytest.approx(truth, rel=1e-6), condition
        assert [record["solution_tokens"] for record in found] == [len(ids) for ids in solutions]
        assert not {"output", "answer", "correct"} & set(found[0]), "nothing is decoded"
        said = report["conditions"][condition]["loss"]
        low, high = said.pop("ci95")
        assert low < said["per_token"] < high
        assert said == {
            "per_token": pytest.approx(sum(truth) / tokens, rel=1e-6),
            "per_problem": pytest.approx(sum(truth) / 11, rel=1e-6),
            "tokens": tokens,
            "num_problems": 11,
        }
        if condition == "learned":
            table, decode = base.get_input_embeddings().weight[None], opened.experiment.base_tokenizer.decode
            best = torch.cosine_similarity(given[3].double()[:, None], table, dim=-1).max(dim=1)
            assert found[3]["nearest_tokens"] == [
                [decode([token]), pytest.approx(cosine, rel=1e-5)]
                for token, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        if condition == "placeholder":  # the base's ordinary pass over token ids
            prompt, target, pad = conditions.of("zero").prompts[3], solutions[3], opened.experiment.base_tokenizer
            ids = [*prompt.prefix_ids, *[pad.pad_token_id] * 4, *prompt.suffix_ids, *target]
            loss = base(
                input_ids=torch.tensor([ids]), labels=torch.tensor([[-100] * (len(ids) - len(target)) + target])
            )
            assert found[3]["loss"] == pytest.approx(loss.loss.item() * len(target), rel=1e-6)
    assert report["comparisons"].keys() == {f"learned-{name}" for name in EVERY[1:]}
    for name in EVERY[1:]:
        difference = (
            report["conditions"]["learned"]["loss"]["per_token"] - report["conditions"][name]["loss"]["per_token"]
        )
        assert report["comparisons"][f"learned-{name}"]["loss"]["per_token"] == pytest.approx(difference)


def test_a_report_of_losses_alone_leaves_the_runs_own_that_has_accuracies(tmp_path, scribe, capsys):
    recipe = make_recipe(tmp_path, "evaluation.conditions=[learned,none]", "evaluation.decode=true")
    adapter = make_adapter(tmp_path / "adapter", recipe)
    evaluate(recipe, adapter)
    of_the_run = (recipe.run_dir / "report.json").read_text()
    assert {"accuracy", "loss"} <= set(json.loads(of_the_run)["conditions"]["none"])
    evaluate(make_recipe(tmp_path, "evaluation.conditions=[learned,none]"), adapter)
    assert (recipe.run_dir / "report.json").read_text() == of_the_run
    assert "report.json stays as it is: it has accuracies, this one has none" in capsys.readouterr().out
    assert len(list(recipe.run_dir.glob("evaluation/*/report.json"))) == 2
    assert len(scribe.scored) == 2 * 3, "the second finds the losses of the first"
    shown = table(json.loads(of_the_run)).splitlines()
    assert max(map(len, shown[1:])) <= 100
    assert [line.split()[0] for line in shown[-2:]] == ["learned", "none"]


def told(indices):
    """Thoughts that say which problem they are of."""
    return torch.tensor(indices, dtype=torch.float32)[:, None, None].expand(-1, 4, 8)


def jobs_of(tmp_path, lengths, context, thoughts=told):
    """Losses of problems whose prompts and solutions have these lengths, ``(with thoughts, without, solution)``."""
    recipe = make_recipe(tmp_path)
    posed = {
        "learned": Posed(
            "learned", [BasePrompt([1] * n, []) for n, _, _ in lengths], Thoughts(thoughts, 4, {}), [], None, context
        ),
        "none": Posed("none", [BasePrompt([1] * n, []) for _, n, _ in lengths], None, [], None, context),
    }
    examples = [SimpleNamespace(target_ids=[3] * n) for _, _, n in lengths]
    return Losses(Worker(recipe, recipe.base, "weights"), posed, examples, context)


def test_a_solution_that_does_not_fit_under_one_condition_is_left_out_under_all(tmp_path, scribe, capsys):
    lengths = [(5, 9, 3), (5, 9, 4), (6, 1, 2), (7, 1, 2), (1, 1, 1)]  # with four thoughts
    found = jobs_of(tmp_path, lengths, context=12).run()
    of = [index * 4 * 8 for index in range(5)]  # by the thoughts of the problem itself
    assert found["learned"] == [5 + 3 + of[0], None, 6 + 2 + of[2], None, 1 + 1 + of[4]]
    assert found["none"] == [9 + 3, None, 1 + 2, None, 1 + 1]
    assert (
        "losses are compared on 3 problems: the solutions of 2 do not fit the 12 tokens of the base"
        in capsys.readouterr().out
    )
    with pytest.raises(
        SoftCoTError, match=r"no prompt with its solution fits the 5 tokens .*; set evaluation.loss=false"
    ):
        jobs_of(tmp_path, lengths, context=5)


def test_a_loss_that_is_not_finite_is_refused_before_it_is_in_a_report(tmp_path, scribe):
    """A second time, too, when it is read from disk."""
    for _ in range(2):
        losses = jobs_of(
            tmp_path, [(5, 9, 3), (1, 1, 1)], context=20, thoughts=lambda _: torch.full((2, 4, 8), math.nan)
        )
        with pytest.raises(
            SoftCoTError, match=r"learned loss of problem 1: .*pair/base in float32 gives nan\. Set base.d"
        ):
            losses.run()


def prompts_of(width):
    """Three prompts that begin alike, of unequal lengths, with thoughts and texts."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY // 4, VOCABULARY // 2, (3, 30)).tolist()
    prompts = [
        BasePrompt([7, 8, 9, *ids[0][:9]], ids[0][9:11]),
        BasePrompt([7, 8, 9], []),
        BasePrompt([7, 8, 9, 4], [5]),
    ]
    return prompts, torch.randn(3, 2, width), [ids[0][11:13], ids[1][:8], ids[2][:1]]


@pytest.mark.parametrize(
    ("family", "fast"), [("llama", True), ("gemma2", True), ("qwen2-sliding", True), ("gpt2", False), ("mamba", False)]
)
def test_losses_of_a_batch_are_those_of_each_row_alone_whatever_the_family(family, fast, monkeypatch):
    model = make_toy(family).double()
    scorer = load_scorer(model, family)
    assert scorer.is_fast == fast
    prompts, thoughts, texts = prompts_of(model.get_input_embeddings().weight.shape[1])
    # All in one pass; and, as where their logits would fill the memory, two and one.
    for given, room, passes in ((thoughts.double(), 2**30, 1), (None, VOCABULARY * 8 * (10 if fast else 30), 2)):
        monkeypatch.setattr(scoring, "_LOGITS_BYTES", room)
        monkeypatch.setattr(scorer, "logits", Mock(wraps=scorer.logits))
        shared = scorer.read_shared(prompts)
        assert shared.length == (2 if fast else 0), "the last token of the shortest prefix is read in each row"
        found = [score.loss for score in scorer.scores(prompts, given, texts, shared)]
        assert scorer.logits.call_count == passes
        rows = zip(prompts, [None] * 3 if given is None else given, texts, strict=True)
        scorer.read_whole_rows()  # the model has its own layers again
        assert found == pytest.approx([naive(model, *row) for row in rows], rel=1e-6)  # norms are in float32
        scorer = Scorer(model)


def test_a_model_whose_fast_pass_is_wrong_reads_whole_rows_and_one_that_looks_ahead_is_refused(monkeypatch):
    model = make_toy("llama")
    with monkeypatch.context() as patch:
        patch.setattr(FrozenPrefix, "logits", lambda self, embeds, *rest: torch.zeros(len(rest[3]), VOCABULARY))
        assert not load_scorer(model, "toy").is_fast
    forward = model.forward

    def looks_ahead(**inputs):
        embeds = inputs["inputs_embeds"]
        return forward(**inputs | {"inputs_embeds": embeds + embeds.mean(dim=1, keepdim=True)})

    model.forward = looks_ahead
    with pytest.raises(SoftCoTError, match=r"toy cannot tell the losses .* each row alone\. Set evaluation.loss=false"):
        load_scorer(model, "toy")
