"""An option is chosen by its letter where something makes it one, or by its value; what is ambiguous is no answer."""

import json
import re
import time

import pytest

from softcot_ds.tasks.options import extract_option
from softcot_ds.tasks.yes_no import extract_yes_no

KM = ("100 km", "125 km", "130 km", "150 km", "None of these")
DATES = ("05/01/2021", "02/23/2021", "03/11/2021", "05/09/2021", "06/12/2021", "04/29/2021")
WORK = ("12 days", "24 days", "8 days", "6 days", "10 days")

CHOSEN = [
    # boxes
    (r"So it is \boxed{B}.", "B"),
    (r"\boxed{b}", "B"),
    (r"$\boxed{\text{B}}$", "B"),
    (r"\[\boxed{\textbf{(B)}}\]", "B"),
    (r"\boxed{(B) 125 km}", "B"),
    (r"\boxed{\mathrm{B)}\ 125}", "B"),
    (r"\boxed{125}", "B"),
    (r"\boxed{125 \text{ km}}", "B"),
    (r"\boxed{100} km in the first hour, \boxed{25} in the second: the total is \boxed{B}", "B"),
    (r"The distance is \boxed{100}. Adding 25: the answer is \boxed{B}.", "B"),
    (r"The final answer is: $\boxed{\text{Option B}}$", "B"),
    (r"\boxed{A}", "A"),
    (r"\boxed{\text{None of these}}", "E"),
    (r"\boxed{B", "B"),
    # the answer is
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is **B**.", "B"),
    ("The answer is **(B) 125 km**.", "B"),
    ("the answer is B) 125", "B"),
    ("The answer is: B", "B"),
    ("The answer is:\n\n**B) 125 km**", "B"),
    ("The correct answer is option B, because 100 + 25 = 125.", "B"),
    ("The correct option is B.", "B"),
    ("The correct choice is therefore (B).", "B"),
    ("Therefore, the best answer would be B.", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("### Answer\nB", "B"),
    ("Answer:\n\nB", "B"),
    ("Answer - B.", "B"),
    ("ANSWER:B", "B"),
    ("Ans: (b)", "B"),
    ("answer is b", "B"),
    ("Answer B", "B"),
    ("Final Answer: The final answer is B. I hope it is correct.", "B"),
    ("Final answer: **B**", "B"),
    ("The answer is B because it takes an hour more.", "B"),
    ("The answer is A.", "A"),
    ("The answer is A because a train is fast.", "A"),
    ("Answer: a", "A"),
    ("Answer: a) 100 km", "A"),
    ("The answer is 125 km.", "B"),
    ("The answer is 125, which corresponds to option B.", "B"),
    ("The answer is none of the above.", "E"),
    ("<answer>B</answer>", "B"),
    ("Let's check each option:\n(A) 100 km - incorrect\n(B) 125 km - correct", "B"),
    ("We need to find which option is correct.\n\nA) 100 km: no\n\nSo the train covers 125 km.", "B"),
    ("Select the correct option:\nA) 100 km\nB) 125 km\n\n100 + 25 = 125", "B"),
    ("100 + 25 = 125\n#### B", "B"),
    ("100 + 25 = 125\n#### 125", "B"),
    ("The answer is not A but B.", "B"),
    ("The answer, after all of this, is B.", "B"),
    ("My answer is B", "B"),
    ("Correct answer: B", "B"),
    ("Correct Answer (B)", "B"),
    ("The correct answer is:\n\n$$\\boxed{B}$$", "B"),
    ("Therefore, the correct choice is:\n\n(B) 125 km", "B"),
    (r"Answer: \(B\)", "B"),
    (r"So, the answer is $\boxed{B}$ 125.", "B"),
    ("The option that matches is B.", "B"),
    ("The answer should be B", "B"),
    ("The answer must be B!", "B"),
    ("Answer = B", "B"),
    ("Ans. B", "B"),
    ("The answer is [B].", "B"),
    ("The answer is 'B'.", "B"),
    ('The answer is "B".', "B"),
    ("The answer is `B`.", "B"),
    ("Answer: B) 125 km (100 + 25)", "B"),
    ("Answer: B\nExplanation: option A leaves out the last 25 km.", "B"),
    ("Selected option: B", "B"),
    ("My choice: B", "B"),
    ("The letter is B.", "B"),
    ("答案是B", "B"),
    ("答案:B", "B"),
    ("答案\uff1aB", "B"),
    # after it: remarks, other options, another problem
    ("The answer is B. Option A is wrong, as it leaves out the last 25 km.", "B"),
    ("The answer is B.\n\nNote: option (C) would count the stop twice.", "B"),
    ("The answer is B.\n\nQuestion: What is a dog?\nOptions: A) 1 B) 2 C) 3\nThe answer is C.", "B"),
    ("The answer is B.<|im_end|>\n<|im_start|>user\nThe answer is C.", "B"),
    ("The answer is C. Wait, I left out the stop. So the answer is B.", "B"),
    ("Is the answer C? No, it is too much. The answer is B.", "B"),
    ("<think>The answer is C. Or A?</think>\n\nThe answer is B.", "B"),
    # affirmed
    ("Option B is correct.", "B"),
    ("Hence (B) is the correct answer", "B"),
    ("B is the correct choice", "B"),
    ("B is the answer", "B"),
    ("So option B (125 km) is the right one.", "B"),
    ("125 is only in the second; (B) must be true.", "B"),
    ("A is correct.", "A"),
    ("Option A is 100, too small. Option B is 125, which is correct. Option C is 130, too large.", "B"),
    ("- A) is incorrect.\n- B) is correct.\n- C) is incorrect.", "B"),
    ("Only option B satisfies this.", "B"),
    ("Option C is not correct. Option B is correct.", "B"),
    ("B) 125 km is the correct answer.", "B"),
    ("Among the options, B) 125 km is correct.", "B"),
    ("Hence, option **B** is the answer.", "B"),
    ("Therefore, B is the correct answer.", "B"),
    ("B is right.", "B"),
    ("Statement C is true of no car. So B is the answer.", "B"),
    # chosen
    ("I think it's option B.", "B"),
    ("∴ Option B", "B"),
    ("=> B", "B"),
    ("I select (B).", "B"),
    ("I choose B) 125 km", "B"),
    ("I would go with option B.", "B"),
    ("This corresponds to option B.", "B"),
    ("This matches option (B).", "B"),
    ("This does not match option A; it matches option B.", "B"),
    ("125 km, which is option B.", "B"),
    # a label on a line of its own
    ("B", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("**B**", "B"),
    ("B)", "B"),
    ("b", "B"),
    ("B) 125 km", "B"),
    ("**B) 125 km**", "B"),
    ("B. 125 km", "B"),
    ("B: 125 km", "B"),
    ("(B) 125", "B"),
    ("Option B", "B"),
    ("$B$", "B"),
    ("A", "A"),
    ("a", "A"),
    ("100 + 25 = 125\nB", "B"),
    ("100 + 25 = 125\n\n**B**", "B"),
    ("100 + 25 = 125\nSo B.", "B"),
    ("Thus A", "A"),
    ("100 + 25 = 125\nOption: B", "B"),
    ("B) 125 km\n\nExplanation: the car goes 100 km, then 25 km.", "B"),
    ("B.\n\nA car that goes 100 km in a day goes 25 in a quarter.", "B"),
    ("A) 100 km\nB) 125 km\nC) 130 km\nD) 150 km\nE) None of these\n\n100 + 25 = 125. Answer: B", "B"),
    ("A) 100 km\nB) 125 km\nC) 130 km\nD) 150 km\nE) None of these\n\nB) 125 km", "B"),
    ("A) 100 km\nB) 125 km\nC) 130 km\nD) 150 km\nE) None of these\n\n100 + 25 = 125 km.", "B"),
    ("A: 100\nB: 125\nSo I'd pick B", "B"),
    ("It's B.", "B"),
    ("The answer isn't A. The answer's B.", "B"),
    ("(A) 100 km - too small\n(B) 125 km - correct\n(C) 130 km - too large", "B"),
    ("It can't be A, C, D, so B is the answer.", "B"),
    ("125 km (B)", "B"),
    # denied, taken back, supposed
    ("The answer isn't A, it's B.", "B"),
    ("I'll go with B, not C.", "B"),
    ("It's not (A) or (C); it has to be (B).", "B"),
    ("Option B seems right, but option D is wrong.", "B"),
    ("Option D can't be right. That leaves B.", "B"),
    ("I think the answer is A. Wait, no, it's B.", "B"),
    ("The answer is A... no, B is the answer.", "B"),
    ("The answer is C. That's wrong: 100 + 25 = 125.", "B"),
    ("The answer is B? Actually, the answer is C? No. The answer is B.", "B"),
    ("At first I thought the answer was C, but it is actually B.", "B"),
    ("You might think the answer is C, but I'm not sure. I'd say B.", "B"),
    ("If it were slower the answer would be A; the answer is B.", "B"),
    ("The answer is B, although some say the answer is C.", "B"),
    ("Since the car goes on, the answer is B.", "B"),
    ("The answer is B. The other option is C.", "B"),
    ("The answer is B, actually.", "B"),
    ("The answer is B. Sorry for the delay!", "B"),
    # mentioned
    ("So it must be option B.", "B"),
    ("First (A), which is too small, then (C), which is too large. Therefore (B).", "B"),
    ("Adding both gives what (B) says.", "B"),
    # a value alone
    ("Therefore 125", "B"),
    ("Therefore, the car has gone 125 km.", "B"),
    ("100 + 25 = 125", "B"),
    ("It goes 100 km and then 25 km more, 125 km in all.", "B"),
    ("So it is none of these.", "E"),
]


@pytest.mark.parametrize(("output", "letter"), CHOSEN)
def test_the_option_that_a_person_sees_chosen_is_found(output, letter):
    assert extract_option(output, options=KM) == letter


@pytest.mark.parametrize(
    "output",
    [
        "",
        "I do not know.",
        "A car is fast.",
        "Answer: A car that is fast goes far.",
        "The answer is a number between 120 and 140.",
        "The answer is a bit more than what a car can do.",
        "This is a question about a car and a train.",
        "The answer is B or C.",
        "The answer is either B or C.",
        "Both A and C are correct.",
        r"\boxed{A, C}",
        r"\boxed{B \text{ or } C}",
        "The answer is A and B.",
        "The answer is 131.",
        "Therefore 77",
        r"\boxed{77}",
        "A) 100 km\nB) 125 km\nC) 130 km\nD) 150 km\nE) None of these",
        "A) 100 km\nB) 125 km\nC) 130 km\nD) 150 km\nE) None of these\n\nLet me think.",
        "Option A is too small. Option C is too large.",
        "Option A is wrong.",
        "The answer is not B.",
        "If the answer is B, then the car is fast.",
        "Is it (B) or (C)?",
        "Option B is possible, and option C is possible.",
        "The answer is F.",
        "Z",
        "The answer could be B.",
        "The answer cannot be B.",
        "The answer can't be (B).",
        "B is not the answer.",
        "The answer is definitely not B.",
        "Neither A nor B is correct.",
        "I would rule out option B.",
        "A and B are people who walk.",
        "The first option is a trap.",
        "Choose one of the options.",
        "I thought the answer was B.",
        "If the car stops the answer is B.",
        "The answer is B... no.",
        "❌ A) 100 km\n❌ B) 125 km\n✅ C) 130 km\n❌ D) 150 km",
    ],
)
def test_what_chooses_no_option_or_two_is_no_answer(output):
    found = extract_option(output, options=KM)
    assert found is None


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("The answer is 05/09/2021.", "D"),
        ("The answer is 5/9/2021.", "D"),
        (r"\boxed{05/09/2021}", "D"),
        ("Today is 05/08/2021, so tomorrow is 05/09/2021.", "D"),  # two dates, of which one is an option
        ("Today is 05/08/2021.\nTomorrow is 05/09/2021", "D"),
        ("Today is 04/29/2021, and in ten days it is 05/09/2021.", None),
        ("The answer is (D) 05/09/2021.", "D"),
        ("F", "F"),
        ("The answer is (F).", "F"),
        ("05/01/2021 is the date.", "A"),
        ("Today is 05/01/2021. Tomorrow is 05/02/2021.", None),
        ("Today is 04/30/2021. Tomorrow is 05/01/2021.", "A"),
    ],
)
def test_dates_are_options_too(output, letter):
    assert extract_option(output, options=DATES) == letter


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("A and B together take 8 days, so B alone takes 24 days.", "B"),
        ("A and B work together. A's share of a day is 1/12.\nThe answer is C.", "C"),
        ("Let B = 24. Then A = 12.\nAnswer: (A)", "A"),
        ("It is A, B and C who work. So 24 days.", "B"),
        ("A train leaves B, and a car leaves A.", None),
        ("A takes 12 days.\nB takes 24 days.\nTogether they take 8 days.", "C"),
        ("(A + B)'s work of a day is 1/8.\nSo 8 days.", "C"),
        ("Answer: C = 24 - 18 = 6", "D"),
        ("The answer is A's 12 days.", "A"),
        ("The answer is A's share.", None),
        ("Answer: D", "D"),
        ("P(A and B) / P(B) = 1/3, so P(A) is more.", None),
    ],
)
def test_people_named_like_options_are_none(output, letter):
    assert extract_option(output, options=WORK) == letter


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{B", None),
        ("The answer is B", None),
        ("The answer is B.", None),
        ("The answer is B. The", "B"),
        ("The answer is (B)", "B"),
        ("The answer is (B", None),
        ("The answer is B. The answer is A", "B"),
        ("So B", None),
        ("100 + 25 = 125", None),
    ],
)
def test_of_a_cut_output_only_what_was_announced_and_is_complete_counts(output, letter):
    assert extract_option(output, cut=True, options=KM) == letter


def test_letters_reach_as_far_as_the_options():
    assert extract_option("The answer is G.", options=list("pqrstuv")) == "G"
    assert extract_option("The answer is G.", options=list("pqr")) is None
    assert extract_option("The answer is B.") is None


def test_two_options_of_one_value_are_not_chosen_by_it():
    assert extract_option("Therefore 5", options=["5", "5.", "6"]) is None
    assert extract_option("Therefore 6", options=["5", "5.", "6"]) == "C"
    assert extract_option("Therefore 5 days", options=["5 hours", "5 days", "6"]) == "B"


@pytest.mark.parametrize(("name", "right"), [("test.json", 250), ("dev.json", 252)])
def test_solutions_of_aqua_are_read_better_than_by_the_last_letter(shared_data, name, right):
    records = [json.loads(line) for line in (shared_data / "aqua" / name).read_text().splitlines()]
    found = [extract_option(record["rationale"], options=[o[2:] for o in record["options"]]) for record in records]
    assert sum(f == record["correct"] for f, record in zip(found, records, strict=True)) == right
    assert not [f for f, record in zip(found, records, strict=True) if f not in (None, record["correct"])]


STYLES = {
    "{list}\n\n{steps}\n\nAnswer: {letter}": 254,
    "Answer: {letter}\n\nExplanation: {steps}": 254,
    "{letter}) {value}\n\n{steps}": 254,
    "{steps}\n\nTherefore, the answer is {value}.": 250,  # of 4 questions, two options have the same value
    "{steps}\nThe answer is {letter}.\n\nQuestion: {next}\nThe answer is {other}.": 254,
    "{judged}": 247,
}


@pytest.mark.slow
@pytest.mark.parametrize(("style", "right"), STYLES.items())
def test_what_aqua_has_as_right_is_read_in_styles_that_models_write(shared_data, style, right):
    records = [json.loads(line) for line in (shared_data / "aqua" / "test.json").read_text().splitlines()]
    found = []
    for number, record in enumerate(records):
        following, options = records[(number + 1) % len(records)], dict(o.split(")", 1) for o in record["options"])
        output = style.format(
            steps=re.sub(r"\n?[^\n]*\b(?i:answer|ans|option|choice)\b[^\n]*$", "", record["rationale"]),
            list="\n".join(f"({letter}) {value}" for letter, value in options.items()),
            letter=record["correct"],
            value=options[record["correct"]],
            next=following["question"],
            other=following["correct"],
            judged="\n".join(
                f"- {letter}) {value} is {'correct' if letter == record['correct'] else 'incorrect'}."
                for letter, value in options.items()
            ),
        )
        found.append(extract_option(output, options=list(options.values())))
    assert sum(f == record["correct"] for f, record in zip(found, records, strict=True)) == right
    assert not [f for f, record in zip(found, records, strict=True) if f not in (None, record["correct"])]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["answer is ", "#### ", "((A) ", "Option A is not ", "A is ", "* ", "B) 125\n", "\n"])
def test_what_a_model_repeats_for_ever_is_read_in_a_moment(unit):
    began = time.process_time()
    for find in (extract_option, extract_yes_no):
        find(unit * (9_000 // len(unit)), options=KM)
    assert time.process_time() - began < 2  # seconds; of the first it was five
