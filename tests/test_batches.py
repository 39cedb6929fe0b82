"""Batches without loss."""

from collections import Counter
from itertools import combinations, islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT

from softcot_ds.data.batches import collate, cut_by_tokens, cut_evenly, global_batches, in_steps, pad
from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.distributed import DataRanks
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import TrainingConfig, load_recipe
from softcot_ds.tasks import Problem
from softcot_ds.training.batches import check_micro_batches


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_brings_every_example_at_most_once_and_leaves_out_less_than_a_batch(lengths, size, seed):
    if len(lengths) < size:
        with pytest.raises(SoftCoTError, match=rf"global_batch_size {size} is larger than the {len(lengths)}"):
            next(global_batches(lengths, size, seed))
        return
    per_epoch = len(lengths) // size
    batches = list(islice(global_batches(lengths, size, seed), 2 * per_epoch))
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        counts = Counter(index for batch in epoch for index in batch)
        assert all(len(batch) == size for batch in epoch)
        assert set(counts.values()) == {1}
        assert len(counts) == per_epoch * size


def test_the_longest_example_is_trained_on_too():
    lengths = [10] * 32 + [99]
    drawn = Counter(index for batch in islice(global_batches(lengths, 32, 0), 200) for index in batch)
    assert len(drawn) == 33
    assert min(drawn.values()) > 180


def test_examples_of_a_batch_are_of_like_length():
    lengths = [(7 * i) % 500 for i in range(1600)]
    spreads = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in islice(global_batches(lengths, 32, 0), 50)
    ]
    assert max(spreads) <= 500 / 50 + 10


def test_epochs_become_the_steps_that_they_take():
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", ["training.steps=null", "training.epochs=3"])
    assert recipe.training.warmup_steps == 20
    for num_examples, steps in ((319, 27), (320, 30), (4000, 375)):
        counted = in_steps(recipe, num_examples)
        assert counted.training.num_steps == steps
        assert counted == load_recipe(ROOT / "recipes/word_problems.yaml", [f"training.steps={steps}"])
        assert in_steps(counted, 7) is counted, "steps are what they are, whatever the data"
    with pytest.raises(SoftCoTError, match=r"20 steps of warm-up do not fit into training\.steps=3"):
        in_steps(recipe, 40)
    with pytest.raises(SoftCoTError, match="global_batch_size 32 is larger than the 31 training problems"):
        in_steps(recipe, 31)


def test_batches_of_a_window_come_in_no_order_of_length():
    lengths = [(7 * i) % 500 for i in range(1600)]
    shortest = [min(lengths[i] for i in batch) for batch in islice(global_batches(lengths, 32, 0), 50)]
    assert shortest != sorted(shortest)


def test_the_order_depends_on_the_seed_and_the_epoch():
    def draw(seed, start):
        return list(islice(global_batches([1] * 64, 4, seed), start, start + 16))

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(1, 0)
    assert draw(0, 0) != draw(0, 16)


@given(st.integers(1, 36), st.integers(0, 40))
def test_micro_batches_share_a_batch_out_evenly(count, extra):
    batch = list(range(100, 100 + count + extra))
    parts = cut_evenly(batch, count)
    assert len(parts) == count
    assert [index for part in parts for index in part] == batch
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def make_example(prefix: int, rest: int) -> Example:
    """Of a thought, and of ``rest`` tokens after it."""
    return Example(Problem("q", "r", "1"), AssistantInput("id", [0], [0]), [1] * prefix, [], [2] * rest)


def padded(part: list[int], lengths: list[tuple[int, int]]) -> int:
    """Tokens of a micro-batch, by hand."""
    return len(part) * (max(lengths[i][0] for i in part) + 1 + max(lengths[i][1] for i in part))


def every_cut(batch: list[int], count: int) -> list[list[list[int]]]:
    """All ways to cut a batch into so many parts."""
    cuts = combinations(range(1, len(batch)), count - 1)
    return [[batch[a:b] for a, b in pairwise((0, *cut, len(batch)))] for cut in cuts]


pairs_of_lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=3, max_size=8)


@given(pairs_of_lengths, st.integers(19, 60), st.integers(1, 3))
def test_micro_batches_of_a_budget_are_the_fewest_and_the_largest_is_as_small_as_any_cut_makes_it(
    lengths, tokens, ranks
):
    batch = list(range(len(lengths)))
    parts = cut_by_tokens(batch, [make_example(*pair) for pair in lengths], tokens, ranks)
    assert [index for part in parts for index in part] == batch
    assert min(map(len, parts)) >= 1

    def smallest(count: int) -> int:
        return min(max(padded(part, lengths) for part in cut) for cut in every_cut(batch, count))

    counts = range(ranks, len(batch) + 1, ranks)
    fewest = next((count for count in counts if smallest(count) <= tokens), counts[-1])
    assert len(parts) == fewest
    assert max(padded(part, lengths) for part in parts) == smallest(fewest)


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (5, {"micro_batch_size": 1}, "training.global_batch_size 8 does not feed 5 ranks; raise it or use fewer"),
        (9, {"micro_batch_tokens": 99}, "training.global_batch_size 8 does not feed 9 ranks; raise it or use fewer"),
        (
            2,
            {"micro_batch_tokens": 13},
            "training.micro_batch_tokens 13 does not hold problem .* of 14 tokens; raise it",
        ),
    ],
)
def test_global_batches_that_cannot_be_cut_are_refused_before_a_model_is_loaded(ranks, settings, message):
    examples = [make_example(2, 3), make_example(4, 9)]
    config = TrainingConfig(global_batch_size=8, **settings)
    with pytest.raises(SoftCoTError, match=message):
        check_micro_batches(examples, config, DataRanks(0, ranks))
    check_micro_batches(examples, config.model_copy(update={"micro_batch_tokens": 14}), DataRanks(0, 8))


# ------------------------------------------------------------------------------------------------------- padding


rows = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5)


@given(rows, st.sampled_from(["left", "right"]))
def test_padding_hides_nothing_and_adds_nothing(rows, side):
    ids, mask = pad(rows, 77, side)
    assert ids.dtype == torch.int64
    assert ids.shape == mask.shape == (len(rows), max(len(row) for row in rows))
    for row, found, shown in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        fill = len(found) - len(row)
        assert found == ([77] * fill + row if side == "left" else row + [77] * fill)
        assert shown == ([False] * fill + [True] * len(row) if side == "left" else [True] * len(row) + [False] * fill)


def test_a_batch_counts_its_real_tokens():
    assistant = AssistantInput("id", [5, 0, 0], [1, 2])
    problem = Problem("q", "r", "1")
    examples = [Example(problem, assistant, [1, 2, 3], [4], [5, 6]), Example(problem, assistant, [], [], [7])]
    batch = collate(examples, 0)
    assert batch.num_tokens == 7
    assert [example.length for example in examples] == [8, 3]
    assert batch.prefix_ids.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert batch.suffix_ids.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch.assistant == [assistant, assistant]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.suffix_ids, batch.suffix_ids)
    assert moved.thoughts is None
