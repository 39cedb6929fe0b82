"""An evaluation's report as one page: what it found, and what the base wrote to each problem under every condition.

Questions and answers are whatever people and models write: no text of theirs gets into the page but as text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median

from softcot_ds.evaluation.document import document, figure, table
from softcot_ds.evaluation.drawing import by_condition as drawn
from softcot_ds.evaluation.report import Record, samples_of
from softcot_ds.evaluation.report import table as for_a_terminal
from softcot_ds.evaluation.words import shown, shown_interval
from softcot_ds.evaluation_config import STANDS_FOR

Records = Mapping[str, Sequence[Record]]
"""By condition, one of each problem."""

_MOST = 2400
"""Characters of a text that are shown; of a longer one its middle is left out, as its answer stands at the end."""
_HEAD = 90
"""Characters of a question that stand in its line."""
_STANDS = "what stands for the thoughts"
_SIGNS = {"right": "✓", "wrong": "✗", "unparsed": "?"}
_STYLE = """
.wide { margin: .6rem 0 1rem; }
.problem { border-bottom: 1px solid #e3e3e3; padding: .3rem 0; content-visibility: auto;
           contain-intrinsic-size: auto 2.4rem; }
.problem summary { cursor: pointer; overflow-wrap: anywhere; }
summary b { font: .78rem system-ui, sans-serif; padding: .05rem .4rem; margin-left: .3rem; border-radius: .6rem;
            background: #eee; white-space: nowrap; display: inline-block; }
summary b.right { background: #d3ece3; } summary b.wrong { background: #f7dccb; }
.outputs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .6rem 1.2rem; }
.outputs h3 { font-size: .92rem; margin: .6rem 0 0; } .note { color: #555; font-size: .85rem; margin: 0; }
pre { font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0;
      padding: .4rem .6rem; background: #f6f6f6; unicode-bidi: plaintext; }
pre.wide { white-space: pre; } .problem[hidden], form[hidden] { display: none; }
form { margin: .6rem 0; } form > * { margin: 0 .6rem .4rem 0; } form label { display: inline-block; font-size: .88rem; }
"""
_SCRIPT = """
const problems = [...document.querySelectorAll(".problem")], wanted = [...document.querySelectorAll("form select")];
function filter() {
  let shown = 0;
  for (const problem of problems) {
    const verdicts = problem.dataset.v.split(" ");
    problem.hidden = !wanted.every((select, i) => verdicts[i].includes(select.value));
    shown += !problem.hidden;
  }
  document.querySelector("output").textContent = `${shown} of ${problems.length} problems:`;
}
for (const select of wanted) select.onchange = filter;
for (const button of document.querySelectorAll("form button")) button.onclick = () => {
  const verdicts = button.value.split(" ");
  wanted.forEach((select, i) => { select.value = verdicts[i] || ""; });
  filter();
};
document.querySelector("form").hidden = false;
filter();
"""
_OF_FILTERS = {"": "any", "r": "right", "n": "not right", "u": "unparsed", "c": "cut"}


def report_page(report: Record, records: Records, questions: Sequence[str]) -> str:
    """The page.

    Args:
        report: of ``records``, see ``make_report``.
        questions: as the models read them, in the records' order.
    """
    some = next(iter(report["conditions"].values()))
    decoded = "accuracy" in some
    problems = list(zip(*records.values(), strict=True))
    verdicts = [" ".join(map(_letters, of_problem)) for of_problem in problems]
    listed = [
        _problem(number, question, dict(zip(records, of_problem, strict=True)), letters)
        for number, (question, of_problem, letters) in enumerate(zip(questions, problems, verdicts, strict=True), 1)
    ]
    body = [
        f"<p>{escape(_what_it_is(report))}</p>",
        f'<div class="plots">{"".join(_figures(report, records))}</div>',
        *([f"<p>{_OF_ACCURACIES}</p>", _accuracies(report, records)] if "accuracy" in some else []),
        *([f"<p>{_OF_LOSSES}</p>", _losses(report)] if "loss" in some else []),
        f'<details><summary>All numbers</summary><pre class="wide">{escape(for_a_terminal(report))}</pre></details>',
        "<h2>Problems</h2>",
        f"<p>{_OF_PROBLEMS}</p>",
        *([_filters(list(records), verdicts)] if decoded else []),
        *listed,
    ]
    title = f"{report['task']}: {report['num_problems']:,} problems, step {report['step']}"
    return document(title, body, _STYLE, _SCRIPT if decoded else "")


def _what_it_is(report: Record) -> str:
    told = f"Adapter {report['adapter']}"
    told += f", trained on {report['trained_on']}" if report["trained_on"] != report["task"] else ""
    told += f"; base {report['base']}, assistant {report['assistant']}; {report['num_thoughts']} thoughts. "
    if "samples" in report:
        told += f"{report['samples']} samples of each problem at temperature {report['temperature']:g}. "
    for key in ("strategy", "read"):
        told += f"{key.capitalize()}: {report[key]}. " if key in report else ""
    return told + "Intervals are of 95% and over problems: what another seed would give may lie outside of them."


_OF_ACCURACIES = (
    "Lead: the points by which learned is above a condition on the same problems; its p value knows that they are the "
    "same, which the intervals of two conditions do not show. Cut: outputs that ended at the limit of tokens; "
    "unparsed: those without an answer that could be read. Tokens: what the base writes for an answer; characters: "
    "those of an output, median / most."
)
_OF_LOSSES = "Losses are of the reference solutions, nats per token: lower is better."
_OF_PROBLEMS = (
    "✓ right, ✗ wrong, ? unparsed, … cut. Of long texts the middle is left out; the files CONDITION.jsonl in the "
    "evaluation's folder have all of them, and the prompts."
)


def _figures(report: Record, records: Records) -> list[str]:
    """Accuracy and loss, as far as they were asked for."""
    found, rows = [], report["conditions"]
    if "accuracy" in next(iter(rows.values())):
        references = Counter(row["reference"] for row in next(iter(records.values())))
        floor = max(references.values()) / references.total()
        points = {name: {"mean": row["accuracy"], "ci95": row["ci95"]} for name, row in rows.items()}
        text = f"accuracy, % (dotted: always the most frequent answer, {floor:.0%})"
        found.append(figure("Accuracy", "by condition", drawn(points, 100, text, 100 * floor)))
    if "loss" in next(iter(rows.values())):
        points = {name: {"mean": row["loss"]["per_token"], "ci95": row["loss"]["ci95"]} for name, row in rows.items()}
        found.append(figure("Loss", "by condition", drawn(points, 1, "loss of the solutions, nats per token")))
    return found


def _accuracies(report: Record, records: Records) -> str:
    rows = []
    for name, row in report["conditions"].items():
        lengths = [len(sample["output"]) for record in records[name] for sample in samples_of(record)]
        pair = report["comparisons"].get(f"learned-{name}", {})
        lead = 100 * pair["difference"] if pair else None
        cells = [name, f"{row['accuracy']:.1%}", shown_interval(row["ci95"], ".1%"), shown(lead, "+.1f")]
        cells += [shown(pair.get("p_value"), ".2g"), f"{row['unparsed']:,}", f"{row['cut']:,}"]
        cells += [f"{row['spent_per_problem']['written']:,.1f}", f"{median(lengths):,.0f} / {max(lengths):,}"]
        rows.append([*cells, STANDS_FOR[name]])
    heads = ("condition", "accuracy", "95%", "lead", "p", "unparsed", "cut", "tokens", "characters", _STANDS)
    return table(heads, ("condition", _STANDS), rows)


def _losses(report: Record) -> str:
    rows = []
    for name, row in report["conditions"].items():
        pair = report["comparisons"].get(f"learned-{name}", {}).get("loss", {})
        cells = [name, f"{row['loss']['per_token']:.4f}", shown_interval(row["loss"]["ci95"], ".4f")]
        cells += [shown(pair.get("per_token"), "+.4f"), shown_interval(pair.get("ci95"), "+.4f")]
        rows.append([*cells, shown(pair.get("p_value"), ".2g"), STANDS_FOR[name]])
    return table(("condition", "loss", "95%", "learned - it", "95%", "p", _STANDS), ("condition", _STANDS), rows)


def _filters(names: Sequence[str], verdicts: Sequence[str]) -> str:
    presets = {"all": ""}
    if "learned" in names and len(names) > 1:
        for word, own, others in (("right", "r", "n"), ("wrong", "n", "r")):
            presets[f"only learned {word}"] = " ".join(own if name == "learned" else others for name in names)
    buttons = []
    for words, wanted in presets.items():
        pairs = [zip(wanted.split(), of_problem.split(), strict=False) for of_problem in verdicts]
        count = sum(all(letter in own for letter, own in pair) for pair in pairs)
        buttons.append(f'<button type="button" value="{wanted}">{words} ({count:,})</button>')
    options = "".join(f'<option value="{letter}">{words}</option>' for letter, words in _OF_FILTERS.items())
    selects = [f"<label>{name} <select>{options}</select></label>" for name in names]
    return f"<form hidden>{''.join(buttons)}<br>{''.join(selects)}<br><output></output></form>"


def _letters(record: Record) -> str:
    """What the filters know of a problem under a condition: r or n, whether it is right; u where an output has no
    answer, c where one was cut."""
    samples = samples_of(record)
    if "output" not in samples[0]:
        return "-"
    letters = "r" if record.get("majority", samples[0]["correct"]) == 1 else "n"
    letters += "u" if any(sample["answer"] is None for sample in samples) else ""
    return letters + ("c" if any(sample["cut"] for sample in samples) else "")


def _problem(number: int, question: str, of_conditions: Mapping[str, Record], letters: str) -> str:
    some = next(iter(of_conditions.values()))
    head = question if len(question) <= _HEAD else question[:_HEAD].rstrip() + " …"
    chips = "".join(map(_chip, of_conditions.items(), letters.split())) if "-" not in letters else ""
    cards = "".join(_card(name, record) for name, record in of_conditions.items())
    near = [f"{token!r} {cosine:.2f}" for token, cosine in of_conditions.get("learned", {}).get("nearest_tokens", [])]
    told = f"reference: {some['reference']}"
    told += f"; tokens nearest to the thoughts, and cosines: {', '.join(near)}" if near else ""
    return (
        f'<details class="problem" data-v="{letters}"><summary>{number}. {escape(head)}{chips}</summary>'
        f"<pre>{_text(question)}</pre>"
        f'<p class="note">{_text(told)}</p><div class="outputs">{cards}</div></details>'
    )


def _chip(of_condition: tuple[str, Record], letters: str) -> str:
    name, record = of_condition
    verdict = _verdict(record)
    cut = " …" if "c" in letters else ""
    return f'<b class="{verdict}">{name} {_SIGNS[verdict]}{cut}</b>'


def _verdict(record: Record) -> str:
    """Of several samples, whether their majority is right."""
    if record.get("majority", record.get("correct")) == 1:
        return "right"
    return "unparsed" if all(sample["answer"] is None for sample in samples_of(record)) else "wrong"


def _card(name: str, record: Record) -> str:
    samples = samples_of(record)
    loss, told = record.get("loss"), []
    head, text = name, ""
    if "output" in samples[0]:
        head += f": {_verdict(record)}"
        head += ", cut" if any(sample["cut"] for sample in samples) else ""
        if len(samples) == 1:
            told += [f"answer {samples[0]['answer']}"] if samples[0]["answer"] is not None else []
        else:
            told += [f"{sum(sample['correct'] for sample in samples)} of {len(samples)} samples right"]
            told += [f"votes {', '.join(f'{answer} ({votes})' for answer, votes in record['votes'].items())}"]
            told += ["the first sample:"]
        text = f"<pre>{_text(samples[0]['output'])}</pre>"
    told = ([] if loss is None else [f"loss {loss:.4f} nats"]) + told
    note = f'<p class="note">{_text("; ".join(told))}</p>' if told else ""
    return f"<section><h3>{escape(head)}</h3>{note}{text}</section>"


def _text(text: str) -> str:
    """Of whoever wrote it, as text of the page."""
    if len(text) > _MOST:
        left = len(text) - _MOST
        text = f"{text[: _MOST // 2]}\n[… {left:,} characters left out …]\n{text[-(_MOST // 2) :]}"
    return escape(text)
