"""Problems like ASDiv's, of our own wording: a stand-in for data that may not be passed on."""

import json
import random
from pathlib import Path
from xml.sax.saxutils import escape

STORIES = [
    ("{name} had {a} {thing}. A friend brought {b} more.", "How many {thing} does {name} have now?", "{a}+{b}", 1),
    ("A shelf holds {a} {thing}, of which {b} are sold.", "How many {thing} stay on the shelf?", "{a}-{b}", 1),
    ("There are {a} rows with {b} {thing} in each.", "How many {thing} are there in all?", "{a}*{b}", 1),
    ("{name} shares {a} {thing} among {b} bags evenly.", "How many {thing} are in each bag?", "{a}/{b}", 1),
    ("{name} buys {a} boxes of {b} {thing} and eats {c}.", "How many {thing} are left?", "({a}*{b})-{c}", 1),
]
NAMES = ["Ada", "Bela", "Chidi", "Dora"]
THINGS = ["plums", "stamps", "marbles", "pencils"]


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """Different problems with ASDiv's keys: body, question, answer "9 (plums)", formula "7+2=9". Answers are whole and
    positive."""
    chance, found = random.Random(seed), {}
    while len(found) < count:
        body, question, formula, least = chance.choice(STORIES)
        words = {"name": chance.choice(NAMES), "thing": chance.choice(THINGS)}
        words |= {"a": chance.randint(2, 60), "b": chance.randint(2, 12), "c": chance.randint(1, 9)}
        formula = formula.format(**words)
        value = eval(formula)  # of our own templates
        if value == int(value) and value >= least:
            body, question = body.format(**words), question.format(**words)
            answer = f"{int(value)} ({words['thing']})"
            found[body + question] = {
                "body": body,
                "question": question,
                "answer": answer,
                "formula": f"{formula}={int(value)}",
            }
    return list(found.values())


def write_jsonl(path: Path, count: int, seed: int) -> list[dict[str, str]]:
    """As ASDiv-Aug is published: GSM8K's keys, the calculation alone as the solution."""
    made = problems(count, seed)
    records = [
        {
            "question": f"{problem['body']} {problem['question']}",
            "answer": f"<<{problem['formula']}>>\n####{problem['answer'].split()[0]}",
        }
        for problem in made
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def write_xml(path: Path, made: list[dict[str, str]]) -> None:
    """As ASDiv is published."""
    tags = {"Body": "body", "Question": "question", "Answer": "answer", "Formula": "formula"}
    items = [
        f'<Problem ID="own-{number:04}" Grade="2" Source="own">'
        + "".join(f"<{tag}>{escape(problem[key])}</{tag}>" for tag, key in tags.items())
        + "</Problem>"
        for number, problem in enumerate(made, 1)
    ]
    path.write_text(
        "<Machine-Reading-Corpus-File>\n<ProblemSet>\n"
        + "\n".join(items)
        + "\n</ProblemSet>\n</Machine-Reading-Corpus-File>\n"
    )
