"""Reading numbers in the notations of text: what stands for one number, and which."""

from decimal import Decimal
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.tasks.answers import extract_number


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
        ("from $3 to $5", 5),
        ("3\n-4", -4),
        ("x - 1", 1),
        ("covid-19", 19),
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
        ("1,000", "1000"),
        ("1 000", "1000"),
        ("10\u202f000", "10000"),
        ("10\xa0000.5", "10000.5"),
        ("1\u2009234\u2009567", "1234567"),
        ("1'000", "1000"),
        ("1\u2019000", "1000"),
        ("1_000", "1000"),
        ("1.000.000", "1000000"),
        ("1.234,56", "1234.56"),
        ("1,00,000", "100000"),
        ("12,34,567.5", "1234567.5"),
        ("2,5", "2.5"),
        ("12,34", "12.34"),
        ("0,125", "0.125"),
        ("1.000", "1"),
        ("1, 000", "1000"),
        ("1.5 million", "1500000"),
        ("$2k", "2000"),
        ("$2M", "2000000"),
        ("18m", "18"),
        ("2 hundred thousand", "200000"),
        ("3 lakh", "300000"),
        ("1.2e5", "120000"),
        ("1.2E-3", "0.0012"),
        ("1.2 x 10^5", "120000"),
        ("1.2 \\times 10^{5}", "120000"),
        ("3\u00d710\u2075", "300000"),
        ("5 · 10\u207b²", "0.05"),
        ("10^6", "1000000"),
        ("2^10", "1024"),
        ("18 m²", "18"),
        ("18 m^{2}", "18"),
        ("½", "1/2"),
        ("1½", "3/2"),
        ("\u2153", "1/3"),
        ("-½", "-1/2"),
        ("1\u20442", "1/2"),
        ("1 1/2", "3/2"),
        ("2 and 1/2", "5/2"),
        ("2 and a half", "5/2"),
        ("\\frac{1}{2}", "1/2"),
        ("\\dfrac12", "1/2"),
        ("3\\frac12", "7/2"),
        ("3 \\frac{1}{2}", "7/2"),
        ("-\\frac{1}{2}", "-1/2"),
        ("\\frac{-1}{2}", "-1/2"),
        ("\\frac{7.5}{2}", "15/4"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("10~000", "10000"),
        ("10\\ 000", "10000"),
        ("\\$18", "18"),
        ("\\text{18}", "18"),
        ("2 \\text{ million}", "2000000"),
        ("eighteen", "18"),
        ("twenty-one", "21"),
        ("Twenty One", "21"),
        ("one hundred and five", "105"),
        ("two thousand five hundred", "2500"),
        ("a hundred", "100"),
        ("one million two hundred thousand", "1200000"),
        ("zero", "0"),
        ("negative five", "-5"),
        ("minus 5", "-5"),
        ("two and a half", "5/2"),
        ("one and three quarters", "7/4"),
        ("one half", "1/2"),
        ("three quarters", "3/4"),
        ("two thirds", "2/3"),
        ("2 dollars and 50 cents", "2.5"),
        ("a third of it", "1/3"),
        ("a dozen", "12"),
        ("Two dozen", "24"),
        ("half a dozen", "6"),
        ("a dozen and a half", "18"),
        ("half a million", "500000"),
        ("a quarter of a million", "250000"),
        ("two and a half thousand", "2500"),
        ("٣٤", "34"),
        ("Rs.500", "500"),
        ("is...18!", "18"),
        ("approx.18", "18"),
        ("No.5", "5"),
        ("US$18", "18"),
        ("18\u20ac", "18"),
        ("\u20b9500", "500"),
        ("USD 18", "18"),
        ("\u22125", "-5"),
        ("\u20135", "-5"),
        ("\u20145", "-5"),
        ("\uff0d5", "-5"),
        ("\u20115", "-5"),
        ("~18", "18"),
        ("18cm", "18"),
        ("1st", "1"),
        ("$126/7 days", "126"),
        ("1/2 million", "500000"),
        ("$.50", "0.5"),
        ("007", "7"),
        ("twelve (12)", "12"),
        ("\u200b18", "18"),
        ("2.50 \u20ac", "2.5"),
        ("7/2.5", "2.8"),
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "#### {}", "The answer is {}.", "\\boxed{{{}}}", "3 + 4 = 7\nAnswer: {}"])
def test_the_worlds_notations_read_the_same_wherever_the_answer_stands(text, number, sentence):
    assert extract_number(sentence.format(text)) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "10-15",
        "10\u201315",
        "10 - 15",
        "10 to 15",
        "3-1",
        "3 -1",
        "5% - 1%",
        "(2 + 1) -1",
        "\\frac{1}{2} - 1",
        "9 * 2",
        "18 x 24",
        "3:30",
        "2:1",
        "7/4/2023",
        "2023-07-04",
        "1,2,3",
        "1.2.3",
        "5'6\"",
        "3 hours and 20 minutes",
        "5 feet 6 inches",
        "7/0",
        "1e999999999",
        "9^999999",
        "1000,000",
        "16 - 7 =",
        "pages 5-10",
        "3 5/2",
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "12 is a dozen.\n{}", "#### {}", "The answer is {}.", "\\boxed{{{}}}"])
def test_figures_that_are_not_one_number_are_no_answer(text, sentence):
    assert extract_number(sentence.format(text)) is None


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3),
    st.sampled_from(
        ["{:f}", "{:,f}", "#### {:,f}.", "It is {:f} in total", "\\boxed{{{:,f}}}", "The answer is {:,f}!"]
    ),
)
def test_a_formatted_number_is_read_back_exactly(value, layout):
    assert extract_number(layout.format(value)) == Fraction(Decimal(value))


def _grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


NOTATIONS = [
    str,
    *(
        partial(_grouped, separator=separator)
        for separator in [",", " ", "\u00a0", "\u2009", "\u202f", "'", "_", "{,}"]
    ),
    lambda n: f"{n}.0",
    lambda n: f"${n:,}.00",
    lambda n: f"\\${n:,}",
    lambda n: f"{n} \u20ac",
    lambda n: f"{n}e0",
    lambda n: f"{n} x 10^0",
    lambda n: f"\\frac{{{2 * n}}}{{2}}",
    lambda n: f"**{n}**",
    lambda n: str(n).translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)}),
]
PLACES = [
    "#### {}",
    "5 + 6 = 11\n#### {}\nThat is 12 in all.",
    "The answer is {}.",
    "The answer is {} dollars for 3 of them. I checked 2 times.",
    "So \\boxed{{{}}} is what 3 people get.",
    "Answer: {}\n\nProblem: 3 + 4?\nAnswer: 7",
    "First 5 * 6 = 30.\nIn 7 days, she has a total of {} after the 3 visits.",
    "9 eggs are left.\nTotal: {}\n\nNote: 7 days a week.",
]


@given(
    st.integers(0, 10**12),
    st.sampled_from(["", "-", "\u2212", "\u2013"]),
    st.sampled_from(NOTATIONS),
    st.sampled_from(PLACES),
)
def test_a_number_in_any_notation_in_any_place_is_read_back_exactly(value, sign, notation, place):
    assert extract_number(place.format(sign + notation(value))) == (-value if sign else value)
