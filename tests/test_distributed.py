"""Which ranks hold one copy of the frozen weights between them."""

import pytest

from softcot_ds.distributed import split_ranks
from softcot_ds.errors import SoftCoTError


@pytest.mark.parametrize(
    ("local_ranks", "size", "groups"),
    [
        ([0, 1, 2, 3], None, [[0, 1, 2, 3]]),
        ([0, 1, 0, 1], None, [[0, 1], [2, 3]]),
        ([0, 0], None, [[0], [1]]),
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 1, 0, 1], 4, [[0, 1, 2, 3]]),
        ([0, 1, 2, 3, 0, 1], 2, [[0, 1], [2, 3], [4, 5]]),
        ([0, 1, 0], 1, [[0], [1], [2]]),
    ],
)
def test_ranks_fall_apart_by_nodes_or_by_the_size_that_is_asked_for(local_ranks, size, groups):
    assert split_ranks(local_ranks, size) == groups


@pytest.mark.parametrize(
    ("local_ranks", "size", "message"),
    [
        ([0, 1, 2, 0], None, "the nodes have 3, 1 ranks"),
        ([0, 1, 2, 0, 1], 2, "backbone.group_size=2 does not divide 5 ranks: 1 would be left"),
        ([0, 1], 4, "backbone.group_size=4 does not divide 2 ranks"),
        ([0, 1, 2, 0, 1, 2], 2, "(ranks 2 to 3), and the nodes have 3, 3 ranks"),
        ([0, 0, 1, 1], None, "no neighbours: their numbers on their nodes are 0, 0, 1, 1 in the order of ranks"),
        ([1, 0], None, "no neighbours"),
    ],
)
def test_ranks_that_do_not_fall_apart_evenly_are_refused_with_the_numbers(local_ranks, size, message):
    with pytest.raises(SoftCoTError) as error:
        split_ranks(local_ranks, size)
    assert message in str(error.value)
