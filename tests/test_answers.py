"""Which number a model meant. The expected values are what a person reads."""

import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.answers import extract_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", "5"),
        ("5.", "5"),
        ("5!", "5"),
        ("(5)", "5"),
        ("**5**", "5"),
        ("5 apples, please", "5"),
        ("007", "7"),
        ("7.0", "7"),
        ("7.50", "7.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("0.125.", "0.125"),
        ("1,234,567.", "1234567"),
        ("1,234.50,", "1234.5"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("$ -5", "-5"),
        ("- $5", "-5"),
        ("€1,000.25.", "1000.25"),
        ("£3", "3"),
        ("¥4", "4"),
        ("5%.", "5"),
        ("-2.5 %", "-2.5"),
        ("50\\%", "50"),
        ("1/2", "0.5"),
        ("-3 / 4", "-0.75"),
        ("12 1/2", "12.5"),
        ("-12 1/2 miles", "-12.5"),
        ("7/0", "0"),
        ("+5", "5"),
        ("\uff15", "5"),
    ],
)
def test_formats_of_a_number(text, number):
    assert extract_number(text) == Fraction(number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-5", -5),
        ("\u22125", -5),
        ("- 5", -5),
        ("x=-4", -4),
        ("x = -4", -4),
        ("x = - 4", -4),
        ("(-4)", -4),
        ("it dropped to -5 degrees", -5),
        ("from 3 to -5", -5),
        ("5 + -3", -3),
        ("3\n-4", -4),
        ("3 - 1", 1),
        ("3-1", 1),
        ("3 -1", 1),
        ("3\u22121", 1),
        ("(2 + 1) -1", 1),
        ("5% - 1%", 1),
        ("\\frac{1}{2} - 1", 1),
        ("x - 1", 1),
        ("covid-19", 19),
        ("pages 5-10", 10),
        ("done\n- 5 apples", 5),
        ("work\n---\n12", 12),
        ("--- 12", 12),
    ],
)
def test_a_minus_is_a_sign_only_where_a_person_reads_one(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\\boxed{7}", 7),
        ("\\boxed{\\text{7}}", 7),
        ("\\boxed{1{,}000}", 1000),
        ("\\boxed{1\\,000}", 1000),
        ("\\boxed{\\$1,000}", 1000),
        ("\\boxed{50\\%}", 50),
        ("\\boxed{-\\frac{1}{2}}", Fraction(-1, 2)),
        ("\\boxed{\\dfrac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{12\\frac{1}{2}}", Fraction(25, 2)),
        ("\\boxed{12 \\text{ cm}^2}", 12),
        ("\\boxed{x = -4}", -4),
        ("\\boxed{3 + 4 = 7}", 7),
        ("\\boxed{7}. So 3 of 10 remain, #### 9", 7),
        ("\\boxed{1} or rather \\boxed{2}", 2),
        ("\\boxed{1} or rather \\boxed{2", 1),
        ("\\boxed{\\text{about {{9}} apples}} 4", 9),
    ],
)
def test_the_last_complete_box_wins(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 * 4 = 12\n#### 12", 12),
        ("####12", 12),
        ("#### 1,000", 1000),
        ("#### -7", -7),
        ("#### - 7", -7),
        ("#### $7.50\nIs 8 too much?", Fraction(15, 2)),
        ("#### **7**", 7),
        ("#### 7\nThat leaves 4.", 7),
        ("#### 1\n#### 2", 2),
        ("The answer is 7. I checked it 3 times.", 7),
        ("The answer is: 7; there were 9.", 7),
        ("the ANSWER is -$7", -7),
        ("Final Answer: 7 apples of 10", 7),
        ("**Answer:** 7 of 10", 7),
        ("**Answer**: 7 of 10", 7),
        ("Answer:\n7\nof 10", 7),
        ("The answer is 3 + 4 = 7.", 7),
        ("The answer is 3.5 miles. Or 4?", Fraction(7, 2)),
        ("Answer: as follows. 3 + 4 = 7", 7),
        ("#### Step 1: multiply\n3 * 4 = 12\n#### Step 2: add\nThe total is **19**", 19),
        ("The answer isn't clear, it may be 5, or 6", 6),
        ("so 3 + 4 = 7", 7),
    ],
)
def test_what_follows_a_marker_beats_other_numbers(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "text", ["", " \n", "I do not know.", "####", "\\boxed{}", "\\boxed{\\text{none}} of 7", "---"]
)
def test_no_number_is_none(text):
    assert extract_number(text) is None


@pytest.mark.parametrize("text", ["1" * 5000, "0." + "1" * 5000, "#### " + "12" * 5000, "5 then " + "9" * 5000])
def test_a_model_that_repeats_a_digit_for_ever_gives_no_answer(text):
    # Python refuses to convert more than 4300 digits; an evaluation must not end there.
    assert extract_number(text) is None


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3),
    st.sampled_from(
        ["{:f}", "{:,f}", "#### {:,f}.", "It is {:f} in total", "\\boxed{{{:,f}}}", "The answer is {:,f}!"]
    ),
)
def test_a_formatted_number_is_read_back_exactly(value, layout):
    assert extract_number(layout.format(value)) == Fraction(Decimal(value))


@given(st.text())
def test_no_text_crashes_it(text):
    number = extract_number(text)
    assert number is None or str(Fraction(str(number))) == str(number)


@given(st.text(alphabet="0123456789.,-+$%/=#{}\\ \n\u2212abcboxedframnswi:"))
def test_no_text_of_number_like_characters_crashes_it(text):
    number = extract_number(text)
    assert number is None or isinstance(number, Fraction)


def test_every_gsm8k_reference_is_read_as_its_own_number(shared_data):
    for name in ("train.jsonl", "test.jsonl"):
        for line in (shared_data / "gsm8k" / name).read_text().split("\n"):
            if line:
                answer = json.loads(line)["answer"]
                written = answer.rpartition("####")[2].strip()
                assert extract_number(answer) == Fraction(written.replace(",", "")), written
