"""What validation says: the same loss on any number of ranks, and where the thoughts lie among the tokens."""

from functools import partial

import pytest
import torch
from launch import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from softcot_ds.distributed import DataRanks
from softcot_ds.experiment import Experiment
from softcot_ds.models.assistant import compute_thoughts
from softcot_ds.models.decoding import Output
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.reader import ThoughtReader
from softcot_ds.training import validation
from softcot_ds.training.batches import read_batch
from softcot_ds.training.engine import build_model
from softcot_ds.training.validation import Validator, compare_with_tokens

SMALL = ["task.train_problems=8", "task.validation_problems=7", "task.test_problems=3", "thoughts.source=online"]


class Engine:
    """What DeepSpeed's engine is to validation."""

    optimizer = None

    def __init__(self, module):
        self.module = module
        self.batches = []

    def __call__(self, batch):
        self.batches.append(tuple(item.example_id for item in batch.assistant))
        return self.module(batch)


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
def true_loss(experiment, model):
    """The mean over all supervised tokens, of each example alone, the base in float64."""
    nats = []
    base = build_model(experiment.recipe, experiment, None).base.double()
    embed = base.get_input_embeddings()
    for example in experiment.splits.validation:
        states = compute_thoughts(model.assistant, [example.assistant])[0].double()
        thoughts = states @ model.projection.weight.double().T + model.projection.bias.double()
        prefix, rest = (
            embed(torch.tensor(ids)) for ids in (example.prefix_ids, example.suffix_ids + example.target_ids)
        )
        with torch.no_grad():
            logits = base(inputs_embeds=torch.cat([prefix, thoughts, rest])[None]).logits[0]
        predictions = logits[-len(example.target_ids) - 1 : -1].log_softmax(dim=-1)
        nats += [-row[token].item() for row, token in zip(predictions, example.target_ids, strict=True)]
    return sum(nats) / len(nats)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_validation_loss_is_the_mean_over_all_tokens_on_any_number_of_ranks(
    experiment, model, make_batch, true_loss, ranks, monkeypatch
):
    # Four batches: of three ranks two have none in the second round, of five one never has any.
    examples, sums, ran = experiment.splits.validation, [], []
    monkeypatch.setattr(validation, "sum_over_ranks", lambda total: sums.append(total.clone()) or torch.ones(2))
    for rank in range(ranks):
        engine = Engine(model)
        Validator(engine, examples, make_batch, experiment, DataRanks(rank, ranks))._loss()
        ran.append(engine.batches)
    loss, count = torch.stack(sums).sum(dim=0).tolist()
    assert count == sum(len(example.target_ids) for example in examples)
    assert loss / count == pytest.approx(true_loss, rel=1e-6)
    assert {len(batches) for batches in ran} == {-(-4 // ranks)}, "every rank runs as often as the others"
    ids = [example.problem.id for example in sorted(examples, key=lambda example: example.length)]
    assert {batch for batches in ran for batch in batches} == {tuple(ids[i : i + 2]) for i in range(0, 7, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 7, 40, 1000])
def test_nearest_tokens_and_lengths_are_those_of_a_naive_float64_search(dtype, rows_at_once, monkeypatch):
    monkeypatch.setattr(validation, "_ROW_ELEMENTS", rows_at_once * 24 + 5)
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(41, 24, generator=generator) * torch.logspace(-3, 3, 41)[:, None]).to(dtype)
    table[[3, 40]] = 0  # rows of padding
    vectors = torch.randn(5, 24, generator=generator)
    vectors[1] = -2 * table[17].float()  # points away from its nearest in distance
    vectors[2] = 1e-3 * table[40 - 1].float()
    length, nearest = compare_with_tokens(vectors, lambda ids: table[ids], 41)
    rows = list(table.double())
    expected = [
        max(float(v @ row / (v.norm() * row.norm())) if row.any() else 0.0 for row in rows) for v in vectors.double()
    ]
    assert length == pytest.approx(sum(float(row.norm()) for row in rows) / 41, rel=1e-6)
    assert nearest.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[2] == pytest.approx(1.0)


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
        compare_with_tokens(vectors, lambda ids: table[ids], len(table))
    assert 0 < largest.new_bytes < table.nbytes / 3


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
