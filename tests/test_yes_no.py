"""A yes or no counts where it is a statement; the word in passing, and both at once, are no answer."""

import pytest

from softcot_ds.tasks.yes_no import extract_yes_no

SAID = [
    # boxes
    (r"\boxed{Yes}", "yes"),
    (r"\boxed{\text{No}}", "no"),
    (r"$\boxed{\textbf{no}}$", "no"),
    (r"The final answer is: $\boxed{Yes}$", "yes"),
    (r"\boxed{True}", "yes"),
    (r"\boxed{False}.", "no"),
    (r"\boxed{yes.}", "yes"),
    # the answer is
    ("The answer is yes.", "yes"),
    ("So the answer is no.", "no"),
    ("The answer is **No**.", "no"),
    ("The answer is: No, it would not.", "no"),
    ("Finished, the answer is Yes", "yes"),
    ("The final answer is no because a pear is lighter than water.", "no"),
    ("The answer to the question is yes.", "yes"),
    ("Therefore, the answer to whether a pear would sink in water is no.", "no"),
    ("Answer: Yes", "yes"),
    ("**Answer:** No", "no"),
    ("**Answer: No.**", "no"),
    ("Answer:\n\nYes", "yes"),
    ("### Answer\nNo", "no"),
    ("Final Answer: yes", "yes"),
    ("#### no", "no"),
    ("<answer>no</answer>", "no"),
    ("The answer is true.", "yes"),
    ('The answer is "no".', "no"),
    ("The answer is 'Yes'.", "yes"),
    ("the correct answer would be No", "no"),
    ("The answer is a resounding yes!", "yes"),
    ("The answer is most likely no.", "no"),
    ("The answer is most certainly no.", "no"),
    ("The answer is a definite no.", "no"),
    ('The answer to "Would a pear sink?" is no.', "no"),
    ("Thus, it's safe to say the answer is Yes.", "yes"),
    ("True", "yes"),
    ("False.", "no"),
    # what comes later, and before
    ("The answer is yes. There is no doubt about it.", "yes"),
    ("The answer is no. No further evidence is needed. Yes, I am sure.", "no"),
    ("The answer is yes. Wait, a pear floats. The answer is no.", "no"),
    ("Is the answer yes? No, a pear floats. The answer is no.", "no"),
    ("The answer is no.\n\nQuestion: Is water wet?\nAnswer: Yes", "no"),
    ("<think>The answer is yes.</think>The answer is no.", "no"),
    # a statement
    ("Yes", "yes"),
    ("no", "no"),
    ("No.", "no"),
    ("YES!", "yes"),
    ("**Yes**", "yes"),
    ("**No.**", "no"),
    ("Yes, a pear is lighter than water.", "yes"),
    ("No, because a pear floats. There is no way around it.", "no"),
    ("No. The Dalai Lama was born in 1935. Yes, there were others before.", "no"),
    ("Yes - it would.", "yes"),
    ("**Yes**, a pear would float.", "yes"),
    ("No it would not.", "no"),
    ("A pear is lighter than water.\nNo", "no"),
    ("1. A pear has a density of 0.6.\n2. Water has 1.\n\nNo, it would not sink.", "no"),
    ("A pear is lighter than water. No, it would not sink.", "no"),
    ("Would a pear sink in water? No, it would float.", "no"),
    # concluded
    ("No, wait. A stone is heavier than water, so yes.", "yes"),
    ("A pear is lighter. So, no.", "no"),
    ("Therefore, yes, it would float.", "yes"),
    ("Thus the answer: no", "no"),
    ("Hence no, it cannot.", "no"),
    ("A pear is lighter than water, so no, it would not sink.", "no"),
    ("In conclusion, yes.", "yes"),
    ("Is a pear heavy? No. Is water light? No. Would it float? Yes. Therefore no, it would not sink.", "no"),
    ("Yes, pears are heavy fruit. But they are lighter than water. So no, it would not sink.", "no"),
    ("It would float, so I would say no.", "no"),
    ("Short answer: No. Long answer: it depends.", "no"),
    ("It's a no.", "no"),
    ("My conclusion is yes", "yes"),
    ("1. Is X big? Yes.\n2. Is Y big? No.\n\nFinal answer: No", "no"),
    ("Thus, yes.\n\nQuestion: Is fire cold?\nNo.", "yes"),
    # denied, taken back, supposed, in passing
    ("The answer isn't yes; it's no.", "no"),
    ("The answer is not yes. It is no.", "no"),
    ("That is a no.", "no"),
    ("The answer is no, because the answer to the first part is yes.", "no"),
    ("The answer is no, even though one could say the answer is yes.", "no"),
    ("Because it floats the answer is no.", "no"),
    ("If a pear were heavier the answer would be yes, but it is lighter, so the answer is no.", "no"),
    ("One might think the answer is yes, but it is no.", "no"),
    ("Many people think the answer is yes. It is no.", "no"),
    ("The answer is no. Actually, the answer is yes.", "yes"),
    ("The answer is no. Actually, yes, it would.", "yes"),
    ("The answer is yes, but there is no proof.", "yes"),
    ("No, actually, it would float.", "no"),
    ("Yes. Let me explain: it sinks.", "yes"),
    ("The answer is no, and there is no doubt, no.", "no"),
]


@pytest.mark.parametrize(("output", "answer"), SAID)
def test_the_yes_or_no_that_a_person_reads_is_found(output, answer):
    assert extract_yes_no(output) == answer


@pytest.mark.parametrize(
    "output",
    [
        "",
        "A pear is lighter than water.",
        "There is no evidence for it.",
        "No one knows.",
        "No evidence is left.",
        "There is no doubt that it would float.",
        "They no longer live there.",
        "Answer yes or no.",
        "The answer is yes or no.",
        "The answer is yes/no.",
        "The answer is yes and no.",
        "The answer is no longer known.",
        "The answer is no more than a guess.",
        "It depends.",
        "Is a pear heavy? No. Is water light? Yes.",
        "If the answer is yes, then a pear is heavy.",
        "The answer could be yes.",
        "The answer cannot be yes.",
        "The answer is not no.",
        "I have no answer.",
        "No answer.",
        "No further information is given.",
        "Noah and Yesenia ate a pear.",
        r"\boxed{42}",
        "Yesterday it rained.",
        "No-one ate it.",
        "Maybe.",
        "It is no secret that pears float.",
        "The answer is yes to the first question and no to the second.",
        "The answer is yes if it is hollow, otherwise no.",
        "If it is hollow the answer is yes.",
        "If it is yes, a pear is heavy.",
        "I thought the answer was yes.",
    ],
)
def test_the_word_in_passing_is_no_answer(output):
    assert extract_yes_no(output) is None


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"\boxed{No}", "no"),
        (r"\boxed{No", None),
        ("The answer is no", None),
        ("The answer is no.", None),
        ("The answer is no. A pear", "no"),
        ("The answer is no. The answer is ye", "no"),
        ("No, a pear", None),
        ("So no, it", None),
    ],
)
def test_of_a_cut_output_only_what_was_announced_and_is_complete_counts(output, answer):
    assert extract_yes_no(output, cut=True) == answer
