"""What all rows begin with is found; reading it is tested where it is used (test_step.py, test_cache.py)."""

from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.models.shared_prefix import common_prefix

TOKENS = st.lists(st.integers(0, 2), max_size=6)


@given(TOKENS, st.lists(TOKENS, max_size=5))
def test_the_common_prefix_begins_every_row_and_cannot_be_longer(first, rows):
    rows = [first + row for row in rows]
    found = common_prefix(rows)
    assert all(row[: len(found)] == found for row in rows)
    assert len(found) >= len(first) or not rows
    assert not rows or len({tuple(row[: len(found) + 1]) for row in rows}) > 1 or found in rows
