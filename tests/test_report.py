"""Which report is the run's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.evaluation.report import what_it_says_more

REPORT = {
    "conditions": {"learned": {}, "zero": {}},
    "num_problems": 1000,
    "step": 200,
    "max_new_tokens": 48,
    "num_thoughts": 32,
}


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, ""),
        ({"num_problems": 8}, "it is on 1000 problems, this one on 8"),
        ({"step": 100}, "it is of step 200, this one of step 100"),
        ({"max_new_tokens": 4}, "its outputs may have 48 tokens, those of this one 4"),
        ({"conditions": {"learned": {}, "none": {}}}, "it has conditions that this one lacks (zero)"),
        ({"conditions": {"zero": {}, "learned": {}, "none": {}}}, ""),
        ({"step": 300, "num_problems": 1001, "max_new_tokens": 64}, ""),
        ({"step": 300, "num_problems": 8}, "it is on 1000 problems, this one on 8"),
        ({"metric_rule": "reference"}, "its answers were found by the rule ours, those of this one by reference"),
        ({"conditions": {"learned": {"loss": {}}, "zero": {}}}, ""),
        ({"num_thoughts": 4}, "it is of 32 thoughts, this one of 4"),
        ({"strategy": "vote"}, "its strategy is single, that of this one vote"),
    ],
)
def test_the_runs_report_is_replaced_by_one_that_says_as_much(changes, stays):
    assert "; ".join(what_it_says_more(REPORT, REPORT | changes)) == stays


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*REPORT, "learned"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_no_report_is_replaced_and_ends_nothing(old):
    more = what_it_says_more(old, REPORT)
    if not isinstance(old, dict) or not isinstance(old.get("conditions"), dict):
        assert more == []
