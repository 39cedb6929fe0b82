"""Which number a model meant. The expected values are what a person reads."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.tasks.answers import extract_number


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
        ("\\boxed{7}. So 3 of 10 remain, #### 9", 9),
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
        ("#### 1\n#### 2", 1),
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18\n#### 20", 18),
        ("#### 18 eggs\n\nProblem: x\n#### 7", 18),
        ("#### **18**", 18),
        ("#### $\\boxed{18}$", 18),
        ("#### \\(18\\)", 18),
        ("#### Answer: 18", 18),
        ("#### Final answer: 18 dollars", 18),
        ("#### 1. Find the eggs\n16-7=9\n#### 2. Find the money\n9*2=18\n#### 18", 18),
        ("#### Step 1: 16-7=9\n#### Step 2: 9*2=18\nThe answer is 18.", 18),
        ("#### Eggs sold\n16-7=9\n#### Money\n9*2 = 18", 18),
        ("#### Cost of 3 apples\n3*2 = 6\n#### Total\nThe total is $18.", 18),
        ("#### 18</s>#### 7", 18),
        ("#### 18\n\n### Instruction:\nAdd 3 and 4.\n### Response:\n7", 18),
        ("#### 18\nHuman: and 3+4?\nAssistant: 7", 18),
        ("#### 18 = 9*2", 18),
        ("#### 9*2=18", 18),
        ("#### 18, since 9*2=18", 18),
        ("#### 18 per 7 days", 18),
        ("#### 18/7", Fraction(18, 7)),
        ("#### 2,500", 2500),
        ("#### 2.500", Fraction(5, 2)),
        ("#### 2, 500", 2500),
        ("#### 2 500 km", 2500),
        ("#### 25 %", 25),
        ("#### twelve", 12),
        ("#### Twenty-five", 25),
        ("#### zero", 0),
        ("#### -0.5", Fraction(-1, 2)),
        ("#### \u2212½", Fraction(-1, 2)),
        ("#### ¾", Fraction(3, 4)),
        ("#### 2¾", Fraction(11, 4)),
        ("#### 18kg", 18),
        ("#### \u20ac18", 18),
        ("#### 18 \u20ac", 18),
        ("#### ¥1,800", 1800),
        ("#### 18 USD", 18),
        ("#### Rs 500", 500),
        ("#### Rs.500/-", 500),
        ("#### 5:1", None),
        ("#### 18.0", 18),
        ("#### 018", 18),
        ("#### (18)", 18),
        ("#### [18]", 18),
        ("#### {18}", 18),
        ('#### "18"', 18),
        ("#### `18`", 18),
        ("#### 18;", 18),
        ("#### = 18", 18),
        ("#### \u2248 18", 18),
        ("#### <18>", 18),
        ("#### 18...", 18),
        ("#### .75", Fraction(3, 4)),
        ("#### 1e3", 1000),
        ("#### 10^3", 1000),
        ("#### 2^3", 8),
        ("#### 1.5k", 1500),
        ("#### $3.2M", 3200000),
        ("#### 3 dozen", 3),
    ],
)
def test_the_first_complete_number_after_four_hashes_is_the_answer(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("####18", 18),
        ("### Final Answer\n\n18\n\nThis assumes 7 days.", 18),
        ("## Answer\n**18**", 18),
        ("**Final Answer**\n\n$18", 18),
        ("Final Answer:\n\n\\[\n\\boxed{18}\n\\]", 18),
        ("The final answer is $18$.", 18),
        ("The answer is $$18$$", 18),
        ("The answer is \\(18\\).", 18),
        ("Therefore, the answer is \\[18\\]", 18),
        ("The answer to the question is 18.", 18),
        ("The answer (in dollars) is 18.", 18),
        ("the correct answer is 18", 18),
        ("My answer: 18", 18),
        ("Answer = 18", 18),
        ("Answer -> 18", 18),
        ("ANSWER: 18", 18),
        ("Ans: 18", 18),
        ("Ans. 18", 18),
        ("The answer is 5. Wait, I forgot the muffins. So the answer is 7.", 7),
        ("The answer is eighteen.", 18),
        ("The answer is eighteen dollars per day.", 18),
        ("The answer is one hundred and five.", 105),
        ("Answer: twenty-one", 21),
        ("The answer is negative five.", -5),
        ("The answer is minus 5", -5),
        ("The answer is two and a half hours.", Fraction(5, 2)),
        ("The answer is half a cup.", Fraction(1, 2)),
        ("The answer is one third.", Fraction(1, 3)),
        ("So he has 3 quarters left. The answer is three quarters.", Fraction(3, 4)),
        ("There are zero apples left.", 0),
        ("He needs one more.", 1),
        ("Only one is left.", 1),
        ("She has 18 apples and each one weighs a pound.", 18),
        ("The two friends have 18 apples together.", 18),
        ("So the total cost is $1.5 million.", 1500000),
        ("So the total is 2 hundred thousand dollars", 200000),
        ("The answer is 1.2 \u00d7 10^5.", 120000),
        ("The answer is $1.2 \\times 10^{5}$.", 120000),
        ("The answer is 3.5e-2", Fraction(7, 200)),
        ("She makes $18 every day by selling 9 eggs at $2 each.", 18),
        ("She makes $18 per day after selling 9 eggs.", 18),
        ("After 5 days she has 35 dollars.", 35),
        ("She has 35 dollars after 5 days.", 35),
        ("In 5 days, she has a total of 35 dollars.", 35),
        ("Tom has 6 of the 10 apples.", 6),
        ("Tom bought 6 out of 10 apples.", 6),
        ("By 2023, 18 people had left.", 18),
        ("On day 5, 120 apples were sold.", 120),
        ("Since 3 + 4 = 7, Tom has 12 apples.", 12),
        ("3 + 4 = 7, so Tom needs 12 - 7 = 5 more.", 5),
        ("16 - 3 - 4 = 9\n9 * 2 = 18\n\nI hope this helps! Let me know if you have 2 more questions.", 18),
        ("So she makes $18.\n\nNote: 16 eggs are laid a day.", 18),
        ("So she makes $18.\n\n(We assumed 7 days a week.)", 18),
        ("So she makes $18. Check: 18 / 2 = 9.", 18),
        ("So she makes $18.\n\nVerification: 18 / 2 = 9 eggs", 18),
        ("She makes $18.\n\nIs there anything else, maybe 2 more problems?", 18),
        ("The answer is $18, because 9 * 2 = 18 and 3 + 4 = 7.", 18),
        ("The answer is 18, not 20.", 18),
        ("The answer is 18 (not 20).", 18),
        ("The answer is 18 or 19", 18),
        ("The answer is either 18 or 19.", None),
        ("The answer is 15. Wait, that's wrong. It should be 18.", 18),
        ("The answer is 15... no, 18.", 18),
        ("The answer is 18, because the answer to the first part is 15.", 18),
        ("If the answer is 15, he is wrong, so the answer is 18.", 18),
        ("The total is 18, of which 15 are red.", 18),
        ("\\boxed{18}\n\nThis assumes 7 days.", 18),
        ("\\boxed{18 \\text{ dollars per } 7 \\text{ days}}", 18),
        ("\\boxed{18\\text{ cm}^2}", 18),
        ("\\boxed{18\\ \\text{m}^{2}}", 18),
        ("\\boxed{\\$18.50}", Fraction(37, 2)),
        ("\\boxed{1{,}000}", 1000),
        ("\\boxed{1,\\!000}", 1000),
        ("\\boxed{1\\,000\\,000}", 1000000),
        ("\\boxed{\\frac{9}{2}}", Fraction(9, 2)),
        ("\\boxed{4\\frac{1}{2}}", Fraction(9, 2)),
        ("\\boxed{\\textbf{18}}", 18),
        ("\\boxed{\\mathbf{18}}", 18),
        ("$$\\boxed{18}$$", 18),
        ("\\boxed{x = 18}", 18),
        ("\\boxed{-5}", -5),
        ("\\boxed{\u22125}", -5),
        ("\\boxed{50\\%}", 50),
        ("\\boxed{3:30}", None),
        ("\\boxed{10-15}", None),
        ("Eggs: $\\boxed{9}$\nMoney: $\\boxed{18}$", 18),
        ("Eggs left: $\\boxed{9}$. So the money is 9 * 2 = 18.", 18),
        ("First $\\boxed{9}$ eggs. Then 9 * 2 = 18. The answer is 18", 18),
        ("Answer: 18\n\nQuestion: Tom has 3 apples. How many?\nAnswer: 3", 18),
        ("A: 18\n\nQ: Tom has 3 apples and buys 4.\nA: 7", 18),
        ("The answer is 18.\n\nQuestion 2: Tom has 3 apples\nThe answer is 7.", 18),
        ("The answer is 18.<|eot_id|>The answer is 7.", 18),
        ("9*2=18\n\nProblem:\nTom has 3 and 4, 3+4 = 7", 18),
        ("Question: Janet has 16 eggs. How many?\nAnswer: She has 16 - 7 = 9 eggs.", 9),
        ("Problem: Janet has 16 eggs.\nSolution: 16 - 7 = 9.\n#### 9", 9),
        ("Q: 16 eggs\nA: 9", 9),
        ("Answer: 18. I checked it 3 times.", 18),
        ("Answer: 18 dollars\nExplanation: 16-3-4=9, 9*2=18, 7 days", 18),
        ("Answer: $18 per day", 18),
        ("Answer: 16 eggs are laid. 3 are eaten and 4 baked, so 16-3-4 = 9 left. She makes 9*2 = 18.", 18),
        ("Answer: First, find 9 eggs. Then multiply by 2, which gives 18.", 18),
        ("1. She has 9 eggs.\n2. She sells them for $18.", 18),
        ("Steps:\n1. 16 - 7 = 9\n2. 9 * 2 = 18\n3. Done", 18),
        ("- 9 eggs left\n- 18 dollars", 18),
        ("* 9 eggs\n* 18 dollars", 18),
        ("\u2022 18 dollars", 18),
        ("Total: 18 dollars", 18),
        ("Total profit: -18 dollars", -18),
        ("The change is \u2212$5", -5),
        ("It fell to \u20135 degrees", -5),
        ("He earned 5\u201310 dollars", None),
        ("\\[ 9 \\times 2 = 18 \\text{ dollars} \\]", 18),
        ("$9 \\cdot 2 = 18$", 18),
        ("\\begin{align*} 9 + 9 &= 18 \\end{align*}", 18),
        ("She makes **$18** daily.\n\nHope that helps!", 18),
        ("**18 dollars** is what she makes from **9** eggs.", 18),
        ("So the answer is:\n\n**18**", 18),
        ("The answer is **18** dollars, from 9 eggs", 18),
        ("The answer is: **Janet makes $18**", 18),
        ("答案\uff1a18", 18),
        ("答案是 18 元\u3002", 18),
        ("最终答案为18", 18),
        ("La respuesta es 18.", 18),
        ("La réponse est 18.", 18),
        ("Die Antwort ist 18.", 18),
        ("Ответ: 18", 18),
        ("I am 99% sure that she has 18 eggs.", 18),
        ("18", 18),
        ("18.", 18),
        ("$18", 18),
        ("18 dollars", 18),
        ("She makes $18", 18),
        ("18/1", 18),
        ("She eats 3/4 of it.", Fraction(3, 4)),
        ("1 000 000", 1000000),
        ("1.000.000", 1000000),
        ("1.234,56 \u20ac", Fraction(30864, 25)),
        ("12,5", Fraction(25, 2)),
        ("", None),
        ("I don't know.", None),
        ("x", None),
        ("How many eggs remain of the 18?", None),
        ("So 13 - 4", None),
        ("9 * 2 =", None),
        ('{"answer": 18}', 18),
        ('{"reasoning": "9*2=18", "final_answer": 18}', 18),
        ("{'answer': '18', 'steps': 3}", 18),
        ("<answer> 18 </answer>", 18),
        ("<answer>\n18 eggs\n</answer>\n<score>5</score>", 18),
        ("[ANSWER] 18 [/ANSWER]", 18),
        ("```\nprint(9 * 2)\n```\n18", 18),
        ("result = 9 * 2\nprint(result)  # 18", 18),
        ("The answer is 18, i.e. 9 eggs at $2.", 18),
        ("The answer is approximately 33.33.", Fraction(3333, 100)),
        ("The answer is about $18.", 18),
        ("The answer is $18.00.", 18),
        ("The answer is 18%.", 18),
        ("The answer is 18 percent.", 18),
        ("The answer is 18°C", 18),
        ("The answer is 18th.", 18),
        ("The answer is x = 18", 18),
        ("The answer is: x=18.", 18),
        ("So the answer is\n18", 18),
        ("So, the answer is\n\n$$\n18\n$$", 18),
        ("Thus the answer must be 18.", 18),
        ("This gives the answer 18.", 18),
        ("which gives an answer of 18.", 18),
        ("The answer of the problem is therefore 18.", 18),
        ("The answer: 18", 18),
        ("Answer 18", 18),
        ("Final answer 18", 18),
        ("The answer is 3 + 4 = 7 and 2 more.", 7),
        ("The answer is 18 dollars = 9 eggs * 2 dollars", 18),
        ("####\n18", 18),
        ("####:18", 18),
        ("# Answer: 18", 18),
        ("Thus, she has 18 eggs left, which is 2 more than 16.", 18),
        ("She has 18 eggs, 2 more than before.", 18),
        ("She makes 18 dollars a day, or 126 dollars a week.", 126),
        ("Janet makes 18 dollars.\n\n---\n\nThis solution uses 3 steps.", 18),
        (
            "Therefore, the total is **$1,234.50**.\n\nLet me know if you'd like me to explain any of the 3 steps!",
            Fraction(2469, 2),
        ),
        ("The answer is 18.\n\nThe answer is correct because 9 * 2 = 18 and 16 - 7 = 9.", 18),
        ("So she has 5 + 4 = 9 apples left, and 9 is the answer.", 9),
        ("So 18 is the answer.", 18),
        ("You save $4 + $2 = $6 for 2 tubs of ice cream and 4 packets of milk.", 6),
        ("18 is the final answer. It took 3 steps.", 18),
        ("**Step 1:** 16 - 7 = 9\n\n**Step 2:** 9 * 2 = 18\n\n**Answer:** $18", 18),
        ("### Step 1\n16-7 = 9\n### Step 2\n9*2 = 18\n### Final answer: 18 dollars", 18),
        ("Step-by-step:\n1) 16 - 7 = 9\n2) 9 * 2 = 18\n\nTherefore: 18", 18),
        ("<think>9*2=18</think>\n18", 18),
        ("<think>The answer is 20? no</think>\nThe answer is 18.", 18),
        ("Let x be the price. 2x + 3 = 39, so 2x = 36 and x = 18.", 18),
        ("x = 36/2 = 18", 18),
        ("$x = \\frac{36}{2} = 18$", 18),
        ("$\\frac{36}{2} = \\boxed{18}$", 18),
        ("Total = $9 \\times \\$2 = \\$18$.", 18),
        ("The total is $\\$18$.", 18),
        ("\\text{Answer: } 18", 18),
        ("\\textbf{18}", 18),
        ("**Answer: 18 dollars.**", 18),
        ("__18__", 18),
        ("*18*", 18),
        ("Answer:18", 18),
        ("She earns \u20ac1.234,50.", Fraction(2469, 2)),
        ("Sie verdient 18,50 Euro.", Fraction(37, 2)),
        ("Il gagne 1 234,5 euros.", Fraction(2469, 2)),
        ("The answer is -18.", -18),
        ("The answer is \u201318.", -18),
        ("The answer is: \u221218 degrees", -18),
        ("The temperature is 18 below zero.", 18),
        ("She has 0 eggs left.", 0),
        ("No eggs are left, so the answer is 0.", 0),
        ("The answer is zero eggs.", 0),
        ("The ratio is 3:1", None),
        ("The answer is 3/4.", Fraction(3, 4)),
        ("The answer is 0.75 or 3/4.", Fraction(3, 4)),
        ("The answer is 75% (3/4)", 75),
        ("33 1/3%", Fraction(100, 3)),
        ("33\u2153", Fraction(100, 3)),
        ("She needs 18 more eggs.", 18),
        ("It costs $18 more.", 18),
        ("Tom has 3 times as many apples, 18.", 18),
        ("He will arrive in 18 hours.", 18),
        ("The train leaves at 5 and arrives after 18 hours.", 18),
        ("#### 18\n\n#### Explanation\n16 - 7 = 9", 18),
        ("#### Answer\n18", 18),
        ("#### Final Answer\n\n$18", 18),
        ("### 18", 18),
        ("## 18 dollars", 18),
        ("##### 18", 18),
        ("#####18", 18),
        ("####   18", 18),
        ("#### 18 \n\n\n", 18),
        ("#### $18.00 per day, i.e. $126 a week", 18),
        ("#### The total is 18 dollars", 18),
        ("#### Therefore, 18", 18),
        ("#### 18.5%", Fraction(37, 2)),
        ("#### 1,234,567.89", Fraction(123456789, 100)),
        ("#### three hundred", 300),
        ("#### 3 hundred", 300),
        ("#### \uff19\uff0c\uff10\uff10\uff10", 9000),
        ("#### -$1,000", -1000),
        ("#### ($18)", 18),
        ("#### $-18", -18),
        ("#### 18 - 9", None),
        ("The final answer is 18\n\nQ: Next one has 3", 18),
        ("18\n\nQ: Tom has 3 apples. A: 7", 18),
        ("#### 18\n\nExample 2:\n#### 7", 18),
        ("#### 18\n\nLet's try another problem:\nTom\n#### 7", 18),
        ("The answer is 18.\n\nHere's another problem: Tom has 3.\nThe answer is 7.", 18),
        ("The answer is $18\\.$", 18),
        ("The answer is 18!!!", 18),
        ("The answer is ... 18", 18),
        ('The answer is: "18"', 18),
        ("The answer is '18'.", 18),
        ("The answer is `18`.", 18),
        ("The answer is (18).", 18),
        ("The answer is [18].", 18),
        ("The answer is {18}.", 18),
        ("The answer is <18>.", 18),
        ('{"answer": 18.0}', 18),
        ('{"steps": ["16-7=9", "9*2=18"], "answer": "$18"}', 18),
        ("answer: '18'", 18),
        ("final_answer(18)", 18),
        ("return 18", 18),
        ("She makes eighteen dollars.", 18),
        ("The answer is one thousand two hundred thirty-four.", 1234),
        ("The answer is twenty two.", 22),
        ("The answer is One.", 1),
        ("He needs one and a half cups.", Fraction(3, 2)),
        ("1.2e5", 120000),
        ("6.02\u00d710\u00b2\u00b3", Fraction(602000000000000000000000, 1)),
        ("1.5\u00d710^{-3}", Fraction(3, 2000)),
        ("10^3 = 1000", 1000),
        ("2^3 = 8", 8),
    ],
)
def test_where_a_person_finds_the_answer(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 eggs.\nIf you sell the rest, you get 9 * 2 = 18 dollars.", 18),
        ("Since there are seven days in a week, she runs 10 laps a day.", 10),
        ("She runs 10 laps per day because 70 divided by 7 equals 10.", 10),
        ("He can spend 55 more minutes before his average goes above 60.", 55),
        ("Tom has 12 apples and 5 of them are red.", 12),
        ("So Tom has 12 apples.\n\nIf you have 2 more questions, ask.", 12),
        ("10 ^ 3", 1000),
        ("Result: 18\nTime taken: 3 s", 18),
        ("Total cost = 18 dollars.\nI used 2 operations.", 18),
        ("The answer is18", 18),
        ("2 ** 3", 8),
        ("He needs to buy 3 more boxes.", 3),
        ("The total comes to ₹1,20,000.", 120000),
        ("The final temperature was negative 4 degrees.", -4),
        ("Half of 36 is 18, so she used 18 cups.", 18),
        ("The answer: eighteen dollars", 18),
        ("Total = 2,125 + 500 = 2,625", 2625),
        ("In 4 weeks, he runs 540 meters x 4 = 2160 meters.", 2160),
        ("He will need 64 dollars to pay for the 16 glasses.", 64),
        ("Kylar needs to pay $64 for 16 glasses.", 64),
        ("John is 45 miles from home after 4 hours.", 45),
        ("The answer is 460, because 40 * 10 = 400 and 5 * 12 = 60.", 460),
        ("The answer is between 5 and 7.", None),
        ("The final answer is: 18 (eighteen)", 18),
        ("The answer is 18.\nThe answer is 18.\nThe answer is 18.", 18),
        ("She arrived 5 minutes later than Tom.", 5),
        ("The 4 children get 6 candies each.", 6),
        ("3 plus 5 plus 10 equals 18", 18),
        ("🎉 So Janet earns **$18** per day!", 18),
        ("Janet sells 9 eggs at $2 each, earning her $18.", 18),
        ("Yes, he has enough. He will have $5 left over.", 5),
        ("Tom will be 23 years old in 5 years.", 23),
        ("Over the course of 30 days she spends $540.", 540),
        ("The ratio is 3:2, so Ann gets 18.", 18),
        ("The result is 1.2 \u00d7 10^3.", 1200),
        ("The answer is \\textbf{18}.", 18),
        ("Thus the number of pages she should read is 42 pages per day... wait, 84/2 = 42. Yes. 42.", 42),
        ("12/60 = $0.20 per minute\n0.20 x 50 = $10.00\nWeng earned $10.00", 10),
        ("James writes 624 pages a year to his 2 friends.", 624),
        ("Albert eats 16 + 16 + 8 + 8 = 48 slices if he eats all 4 pizzas.", 48),
        ("The shoes cost $41, because 200 - 16 - 143 = 41.", 41),
        ("Tina makes $990.00 if she works 10 hours every day for 5 days.", 990),
        ("The answer is: **121 people**\n\nLet me double check: 121 + 242 + 484 = 847 ✓", 121),
        ("Jasper sold 25 hot dogs, which is 3 less than the 28 hamburgers.", 25),
        ("It would take her 5 hours.", 5),
        ("\\[ \\text{Total} = 3 \\times 6 = 18 \\text{ apples} \\]", 18),
        ("\\(\\boxed{\\text{\\$}1{,}250}\\)", 1250),
        ("1. 3 + 4 = 7\n2. 7 + 5 = 12\n3. The total is 12.", 12),
        ("It might seem that the answer is 15, but the answer is 12.", 12),
        ("The answer is 15.\n\nCorrection: He gave 3 away, so the answer is 12.", 12),
        ("assistant\n\nThe answer is 7.", 7),
        ("7\nStudent: Thanks!\nTeacher: Now, what is 8 + 9?\nStudent: 17", 7),
        ("The temperature fell by 12 degrees to -3 degrees.", -3),
        ("He paid $12, down from $20.", 12),
        ("They picked fifteen apples.", 15),
        ("Each of them paid $12, for a total of $36.", 36),
        ("5 nights at $100 a night comes to $500.", 500),
        ("He needs 5 weeks to save $500.", 5),
        ("She bought 5 bags, spending a total of $20.", 20),
        ("10 percent of 50 = 5. So the discount is $5 and he pays $45.", 45),
        ("The price after a 10% discount is $45.00.", 45),
        ("She's left with $14.50 after spending $35.50.", Fraction(29, 2)),
        ("She will have $14.50 left after she spends $35.50.", Fraction(29, 2)),
        ("Sorry, I meant 18, not 20.", 18),
        ("You need to pay $64 for 16 glasses.", 64),
        ("18\nTeacher: And 8 + 9?\nTom: 17", 18),
        ("Tom has 12 apples (5 red).", 12),
        ("So the answer is 20? No, 30 - 12 = 18. So it's 18.", 18),
        ("She has $14.50 left out of $50.", Fraction(29, 2)),
        ("To pack 240 muffins they need 20 boxes.", 20),
        ("They need 20 boxes to pack 240 muffins.", 20),
        ("Tom has to eat 12 cookies in 3 days.", 12),
        ("In conclusion, Tom has 12 apples after giving away 3.", 12),
        ("Tom started with 15 apples and gave away 3, leaving him with 12.", 12),
    ],
)
def test_what_instruct_models_write(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("In total there are 26 students: 14 girls and 12 boys.", 26),
        ("**Total: 95 minutes**\n\n* Monday: 40 minutes\n* Friday: 55 minutes", 95),
        ("The bill is $25, made up of $10 for pens and $15 for ink.", 25),
        ("He has 120 marbles, of which 40 are red and 80 are blue.", 120),
        ("The class has 96 cans; Ann's group has 40, Bo's 36 and Kim's 20.", 96),
        ("- 20 roses\n- 15 tulips\nTotal: 35 flowers", 35),
        ("He has 10 apples: he eats 3, and 7 are left.", 7),
        ("There are 3 cats: Tom has 5 kg and Kit 4 kg.", 4),
        ("54. Each of the 6 boxes holds 9 pencils.", 54),
        ("**88**\n\nThe first shift makes 40 parts and the second 48.", 88),
        ("230 grams\n\nThe full jar weighs 380 grams and the empty one 150.", 230),
        ("16 eggs. She eats 3 for breakfast. She sells 9.", 9),
        ("16.\nShe eats 3 and bakes with 4, so 9 are left.", 9),
        ("9\nShe sells 9 * 2 = 18", 18),
        ("10 apples\n5 oranges\nTom buys 15 fruits", 15),
        ("</think>\n\nThe total is $35.", 35),
        ("<think>The answer is 45. But he has a coupon of 10.</think>\n\nHe pays $35.", 35),
        ("15 minutes\n\nProblem 2\nA man has 3 dogs.", 15),
    ],
)
def test_an_answer_may_stand_before_what_explains_it_and_never_in_a_thought(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She bought 5 bags that cost $4 each.", 5),
        ("There are 28 people who each pay $5.", 28),
        ("He bought 5 bags, which cost $20.", 20),
        ("He needs 13 boards, each of which is 2 m long.", 13),
        ("It took 20 minutes at a rate of 45 words per minute.", 20),
        ("That makes 30 points for the team of 5.", 30),
        ("This leaves 12 slices of a 20-slice pizza.", 12),
        ("He owes $300 (500 - 200).", 300),
        ("The profit is $375, or 25% of the revenue of $1,500.", 375),
        ("He made $18 or 25 percent.", 25),
        ("There were 34 boys out of a total of 40.", 34),
        ("Ben has 20 cars because he began with 15, got 9 for his birthday, and lost 4.", 20),
        ("Ben has 15 cars because he began with 15, so Tom has 20.", 20),
        ("They sold nine dozen eggs in 3 days.", 108),
        ("He bought 3 dozen eggs.", 3),
        ("Answer: Half of Mr. Hill's 36 eggs are 36 / 2 = 18, so 4 * 18 = 72 are left.", 72),
        ("He gives away six of a dozen eggs and keeps 6.", 6),
    ],
)
def test_a_number_told_in_passing_is_not_what_a_statement_is_about(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", None),
        ("#### 1", None),
        ("#### 18\n", 18),
        ("#### 18 dollars", 18),
        ("#### 18\n#### 1", 18),
        ("#### 18.", None),
        ("#### 18,", None),
        ("#### 18 ", None),
        ("9*2 = 18 dollars. Then", None),
        ("The answer is 18. Th", 18),
        ("The answer is 18", None),
        ("\\boxed{18}", 18),
        ("\\boxed{18", None),
        ("The answer is \\boxed{18}. I h", 18),
        ("The answer is twenty", None),
        ("Answer: 18 dollars every", 18),
        ("Answer: 16 - 7 = 9 eggs. Then 9", None),
        ("", None),
        ("#### 18\n\nProblem: x. #### 7 b", 18),
        ("She makes **$18**. And", None),
        ("The answer is 18.\nThe answer is 1", 18),
    ],
)
def test_of_an_output_that_was_cut_only_a_complete_announced_answer_counts(text, number):
    assert extract_number(text, cut=True) == number


@pytest.mark.parametrize("text", ["1" * 5000, "0." + "1" * 5000, "#### " + "12" * 5000, "5 then " + "9" * 5000])
def test_a_model_that_repeats_a_digit_for_ever_gives_no_answer(text):
    # Python refuses to convert more than 4300 digits; an evaluation must not end there.
    assert extract_number(text) is None


@pytest.mark.slow
@given(st.text())
def test_no_text_crashes_it(text):
    number = extract_number(text)
    assert number is None or str(Fraction(str(number))) == str(number)


@given(st.text(alphabet="0123456789.,-+$%/=#{}\\ \n\u2212abcboxedframnswi:"))
def test_no_text_of_number_like_characters_crashes_it(text):
    number = extract_number(text)
    assert number is None or isinstance(number, Fraction)


@pytest.mark.slow
def test_every_gsm8k_reference_is_read_as_its_own_number(shared_data):
    for name in ("train.jsonl", "test.jsonl"):
        for line in (shared_data / "gsm8k" / name).read_text().split("\n"):
            if line:
                answer = json.loads(line)["answer"]
                written = answer.rpartition("####")[2].strip()
                assert extract_number(answer) == Fraction(written.replace(",", "")), written


# ------------------------------------------------------------------------------------------------------- at scale


def test_outputs_that_a_person_has_judged(shared_data):
    wrong = []
    for line in (shared_data.parent / "cases" / "answers.jsonl").read_text().split("\n"):
        case = json.loads(line or "null")
        if case and (extract_number(case["output"]) == extract_number(case["reference"])) is not case["correct"]:
            wrong.append(case["name"])
    assert not wrong


STYLES = {
    "{body}\n#### {answer}": 1.0,
    "{body}\n#### The answer is {answer}.": 1.0,
    "{body}\n#### ${answer}\n\n(Check: 2 steps.)": 1.0,
    "{body}\n#### {answer}\n\nProblem: {question}\n{other}\n#### 12": 1.0,
    "{body}\n#### {answer}\n\nThis answer is based on the 7 days of a week.": 1.0,
    "{body}\nThe final answer is: $\\boxed{{{answer}}}$. I hope it is correct.": 1.0,
    "{body}\n\n**Final Answer**\n\n{answer} units": 1.0,
    "{body}\nTherefore, the answer is {answer}.\n\nQuestion: {question}\nAnswer: {other}": 1.0,
    "<answer>{answer}</answer><confidence>0.9</confidence>": 1.0,
    "Answer: {answer}\n\nExplanation: {body}": 0.97,
    "{body}": 0.97,
    "Answer: {body}": 0.97,
    "**Answer:**\n\n{body}": 0.97,
    "### Answer\n{body}": 0.97,
    "{body}\n\nI hope this helps! Let me know if you have 2 more questions.": 0.97,
    "{body}\n\nNote: this assumes 7 days a week.": 0.97,
    "{body}\n\nQuestion: {question}\n{other}": 0.97,
}


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_right_solutions_are_graded_right_in_every_style(shared_data, style):
    lines = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[::4]]
    right = 0
    for line, other in zip(lines, lines[1:] + lines[:1], strict=True):
        body, _, answer = line["answer"].rpartition("####")
        output = style.format(
            body=body.strip(), answer=answer.strip(), question=other["question"], other=other["answer"].split("####")[0]
        )
        right += extract_number(output) == Fraction(answer.replace(",", ""))
    assert right >= STYLES[style] * len(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "#",
        "#### ",
        "#### 1 ",
        "\\",
        "{",
        "\\boxed{",
        "\\boxed{1} ",
        " ",
        "\n",
        "1 ",
        "1,",
        "111,",
        "1=",
        "1 + ",
        "\\frac{",
        "\\text{",
        "one hundred ",
        "answer: 1 are ",
        "the answer is 18. ",
        "**1** ",
        "\nProblem: 1",
        "(",
        ".",
        "1 a ",
        "<<",
        "1/",
        "2^",
        "\n1. ",
        "⁰",
        "½",
        "note. ",
        "1\n",
        "5? ",
        "0: ",
        "a dozen ",
        "half a million ",
        "$",
        "-",
    ],
)
def test_endless_repetition_takes_linear_time(unit):
    # 30,000 characters take a third of a second where time grows with the length, ten where it grows with its square.
    started = time.process_time()
    extract_number((unit * 30_000)[:30_000])
    assert time.process_time() - started < 2
