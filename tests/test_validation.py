"""What validation says: the same loss on any number of ranks, and where the thoughts lie among the tokens."""

from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from launch import ONLINE, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from softcot_ds.distributed import DataRanks
from softcot_ds.experiment import Experiment
from softcot_ds.models import embedding
from softcot_ds.models.assistant import compute_thoughts
from softcot_ds.models.decoding import Output
from softcot_ds.models.embedding import Nearest
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.reader import ThoughtReader
from softcot_ds.training import validation
from softcot_ds.training.batches import read_batch
from softcot_ds.training.engine import build_model
from softcot_ds.training.gap import Gap
from softcot_ds.training.validation import Validator

SMALL = ["task.train_problems=8", "task.validation_problems=7", "task.test_problems=3", *ONLINE]


class Engine:
    """What DeepSpeed's engine is to validation."""

    optimizer = None

    def __init__(self, module):
        self.module = module
        self.batches = []

    def __call__(self, batch, **how):
        self.batches.append(tuple(item.example_id for item in batch.assistant))
        return self.module(batch, **how)


@pytest.fixture(scope="module")
def experiment():
    batches = ["training.micro_batch_size=2", "training.global_batch_size=4", "backbone.partition=none"]
    return Experiment(load_recipe(ROOT / "recipes" / "word_problems.yaml", [*SMALL, *batches]))


@pytest.fixture(scope="module")
def model(experiment):
    return build_model(experiment.recipe, experiment, None).train(False)


@pytest.fixture(scope="module")
def make_batch(experiment, model):
    return partial(read_batch, reader=ThoughtReader(None), pad_id=experiment.base_pad_id, model=model)


@pytest.fixture(scope="module")
def truth(experiment, model):
    """Thoughts of each example (7, T, D), and the loss of each with the thoughts of each (7, 7), nats over its target:
    one by one, projection and base in float64. Examples in the order of their lengths."""
    base = build_model(experiment.recipe, experiment, None).base.double()
    embed = base.get_input_embeddings()
    examples = sorted(experiment.splits.validation, key=lambda example: example.length)
    states = [compute_thoughts(model.assistant, [example.assistant])[0].double() for example in examples]
    thoughts = [state @ model.projection.weight.double().T + model.projection.bias.double() for state in states]
    nats = torch.zeros(len(examples), len(examples), dtype=torch.float64)
    for row, example in enumerate(examples):
        prefix, rest = (
            embed(torch.tensor(ids)) for ids in (example.prefix_ids, example.suffix_ids + example.target_ids)
        )
        for column, given in enumerate(thoughts):
            with torch.no_grad():
                logits = base(inputs_embeds=torch.cat([prefix, given, rest])[None]).logits[0]
            predictions = logits[-len(example.target_ids) - 1 : -1].log_softmax(dim=-1)
            nats[row, column] = -predictions[torch.arange(len(example.target_ids)), example.target_ids].sum()
    return torch.stack(thoughts).detach(), nats


@pytest.mark.parametrize(
    ("ranks", "alike", "size"),
    [
        (1, 1, 2),
        (2, 2, 2),
        (5, 1, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 2), (3, 1, 2), (1, 1, 1), (2, 1, 9)]),
    ],
)
def test_validation_is_that_of_each_example_alone_on_any_number_of_ranks(
    experiment, model, make_batch, truth, ranks, alike, size, monkeypatch
):
    """Of three ranks two have no batch in the second round, of five one never has any. ``alike``: so many ranks work on
    one part together."""
    monkeypatch.setattr(experiment.recipe.training, "micro_batch_size", size)
    examples, sums, ran = experiment.splits.validation, [], []
    for rank in range(ranks * alike):
        found: list[torch.Tensor] = []
        monkeypatch.setattr(validation, "sum_over_ranks", lambda t, found=found: found.append(t.clone()) or t.fill_(1))
        engine = Engine(model)
        data_ranks = DataRanks(rank // alike, ranks, alike, is_first=rank % alike == 0)
        with torch.no_grad():
            validator = Validator(engine, examples, make_batch, experiment, data_ranks)
            validator._losses()
            validator._parts()
        sums.append(found)
        ran.append(engine.batches)
    totals = [torch.stack(of_ranks).sum(dim=0) for of_ranks in zip(*sums, strict=True)]
    batches = -(-7 // size)
    assert {len(of_rank) for of_rank in ran} == {2 * -(-batches // ranks)}, "every rank runs as often as the others"

    # On one rank now, with the sums of all.
    left = iter(totals)
    monkeypatch.setattr(validation, "sum_over_ranks", lambda t: t.copy_(next(left)))
    with torch.no_grad():
        scalars, gap = validator._losses()
        parts = validator._parts()
    thoughts, nats = truth
    own, shuffled, _ = totals
    tokens = sum(len(example.target_ids) for example in examples)
    torch.testing.assert_close(own, nats.diag(), rtol=1e-5, atol=0)  # float32's rounding of one example
    assert scalars["loss/validation"] == pytest.approx(nats.trace().item() / tokens, rel=1e-6)
    taken = [int((nats[row] - loss).abs().argmin()) for row, loss in enumerate(shuffled)]
    assert sorted(taken) == list(range(7)), "the thoughts of each are used once"
    assert all(row != column for row, column in enumerate(taken)), "nobody has their own"
    torch.testing.assert_close(shuffled, nats[range(7), taken], rtol=1e-5, atol=0)
    assert scalars["loss/validation_shuffled"] == pytest.approx(nats[range(7), taken].sum().item() / tokens, rel=1e-6)
    assert scalars["loss/validation_gap"] == gap.mean
    assert gap.mean == pytest.approx((nats[range(7), taken] - nats.diag()).sum().item() / tokens, rel=1e-4)

    means = thoughts.mean(dim=0)
    deviations = thoughts - means
    everything = (thoughts - means.mean(dim=0)).square().sum()
    assert parts["thoughts/constant_norm"] == pytest.approx(means.norm(dim=1).square().mean().sqrt().item(), rel=1e-5)
    assert parts["thoughts/varying_norm"] == pytest.approx(
        deviations.norm(dim=2).square().mean().sqrt().item(), rel=1e-4
    )
    assert parts["thoughts/question_share"] == pytest.approx((deviations.square().sum() / everything).item(), rel=1e-4)


def test_gap_of_solutions_of_one_length_has_the_interval_of_a_paired_t_test():
    own, shuffled = np.random.default_rng(0).normal([[10], [11]], 2, (2, 12))
    gap = Gap.of(own, shuffled, np.full(12, 5))
    interval = scipy.stats.ttest_rel(shuffled, own).confidence_interval()
    assert (gap.mean - gap.margin, gap.mean + gap.margin) == pytest.approx([bound / 5 for bound in interval])
    assert not gap.is_seen
    assert not Gap.of(own, own, np.full(12, 5)).is_seen
    assert not Gap.of(own + 9, own, np.full(12, 5)).is_seen, "another's thoughts are better"
    assert Gap.of(own, own + 0.1 + own / 100, np.full(12, 5)).is_seen


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.005, 0.045), (0.1, 0.7, 1.0)])
def test_gap_is_seen_as_often_as_its_interval_says(effect, least, most):
    """Of 400 validations of 60 problems of 1 to 100 tokens: one in 40 where there is no effect."""
    rng, seen = np.random.default_rng(1), 0
    for _ in range(400):
        tokens = rng.integers(1, 100, 60)
        own = tokens + rng.normal(0, 1, 60) * np.sqrt(tokens)
        shuffled = own + tokens * effect + rng.normal(0, 2, 60) * np.sqrt(tokens)
        seen += Gap.of(own, shuffled, tokens).is_seen
    assert least < seen / 400 < most


def test_problems_that_cannot_have_another_ones_thoughts_are_not_compared(
    experiment, model, make_batch, capsys, monkeypatch
):
    alone = Validator(Engine(model), experiment.splits.validation[:1], make_batch, experiment, DataRanks(0, 1))
    assert "1 of the 1 problems are the same to the assistant; so whether thoughts carry" in capsys.readouterr().out
    monkeypatch.setattr(model, "needs_states", False)
    free = Validator(Engine(model), experiment.splits.validation, make_batch, experiment, DataRanks(0, 1))
    for validator in (alone, free):
        with torch.no_grad():
            scalars, gap = validator._losses()
        assert (scalars.keys(), gap) == ({"loss/validation"}, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 7, 40, 1000])
def test_nearest_tokens_and_lengths_are_those_of_a_naive_float64_search(dtype, rows_at_once, monkeypatch):
    monkeypatch.setattr(embedding, "_ROW_ELEMENTS", rows_at_once * 24 + 5)
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(41, 24, generator=generator) * torch.logspace(-3, 3, 41)[:, None]).to(dtype)
    table[[3, 40]] = 0  # rows of padding
    vectors = torch.randn(5, 24, generator=generator)
    vectors[1] = -2 * table[17].float()  # points away from its nearest in distance
    vectors[2] = 1e-3 * table[40 - 1].float()
    nearest = Nearest.to(vectors, lambda ids: table[ids], 41)
    rows = list(table.double())
    cosines = [
        [float(v @ row / (v.norm() * row.norm())) if row.any() else 0.0 for row in rows] for v in vectors.double()
    ]
    assert nearest.token_norm == pytest.approx(sum(float(row.norm()) for row in rows) / 41, rel=1e-6)
    assert nearest.cosines_N.tolist() == pytest.approx([max(one) for one in cosines], rel=1e-5)
    assert nearest.ids_N.tolist() == [one.index(max(one)) for one in cosines]
    assert nearest.ids_N[2] == 39
    assert nearest.cosines_N[2] == pytest.approx(1.0)


def test_the_search_holds_no_copy_of_the_table():
    class Largest(TorchDispatchMode):
        new_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != table_at:
                    self.new_bytes = max(self.new_bytes, tensor.untyped_storage().nbytes())
            return result

    table = torch.randn(2**17, 256).bfloat16()
    table_at = table.untyped_storage().data_ptr()
    vectors = torch.randn(8, 256)
    with Largest() as largest:
        Nearest.to(vectors, lambda ids: table[ids], len(table))
    assert 0 < largest.new_bytes < table.nbytes / 3


def test_samples_name_the_tokens_that_their_thoughts_are_nearest_to(experiment, model, make_batch, monkeypatch):
    table = model.base.get_input_embeddings().weight
    ids = torch.arange(40, 40 + 2 * 4).view(2, 4)
    monkeypatch.setattr(model, "thoughts", lambda batch: 3 * table[ids[: len(batch.assistant)]].detach())
    monkeypatch.setattr(validation, "decode", lambda *_, **__: [Output([5], cut=False)] * 2)
    validator = Validator(Engine(model), experiment.splits.validation, make_batch, experiment, DataRanks(0, 1))
    monkeypatch.setattr(validator, "_parts", dict)
    scalars, seen = validator._thought_statistics()
    torch.testing.assert_close(torch.from_numpy(seen.thoughts_ND), 3 * table[ids.flatten()].detach())
    assert scalars["thoughts/norm"] == pytest.approx(np.linalg.norm(seen.thoughts_ND, axis=1).mean())
    words = [repr(experiment.base_tokenizer.decode([token])) for token in ids.flatten().tolist()]
    assert [word for word, _ in seen.tokens] == words
    np.testing.assert_array_equal(np.stack([vector for _, vector in seen.tokens]), table[ids.flatten()].detach())
    questions = [example.problem.question for example in experiment.splits.validation[:2]]
    assert seen.names == [f"{place}: {question[:60]}" for question in questions for place in (1, 2, 3, 4)]
    for text, of_question in zip(validator._samples(seen.nearest).split("-" * 80), ids.tolist(), strict=True):
        words = [repr(experiment.base_tokenizer.decode([token])) for token in of_question]
        assert ", ".join(f"{word} 1.00" for word in words) in text


def test_a_sample_that_was_cut_is_shown_as_such_and_its_last_number_is_no_answer(
    experiment, model, make_batch, monkeypatch
):
    ids = experiment.base_tokenizer.encode("answer 7", add_special_tokens=False)
    monkeypatch.setattr(validation, "decode", lambda *_, **__: [Output(ids, cut=True), Output(ids, cut=False)])
    text = Validator(Engine(model), experiment.splits.validation, make_batch, experiment, DataRanks(0, 1))._samples()
    cut, whole = text.split("-" * 80)
    assert "answer 7 [cut]" in cut
    assert "ANSWER not parsed (wrong; reference" in cut
    assert "answer 7\n" in whole
    assert "ANSWER 7 (" in whole
