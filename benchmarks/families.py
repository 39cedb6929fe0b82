"""Which of transformers' causal families can be the base and the assistant, and by which step: each is tried as a toy.

    python benchmarks/families.py [--out benchmarks/results/families.json] [family ...]
    python benchmarks/families.py --page docs/models.md

A toy has the family's own code, random weights and a few layers (softcot_ds/models/toy.py). The trials say of it what
they say of a real model before work starts, and what they call fit is held against examples run alone, in float32. A
family that cannot be made small from its settings' names, or takes too long, stands as not tried.
"""

import argparse
import copy
import json
import logging
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from environment import describe, write_result
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.methods.trial import why_gradient_wrong, why_not_fast, why_unsuitable
from softcot_ds.models.decoding import try_decoding
from softcot_ds.models.frozen_prefix import FrozenPrefix, why_unsupported

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from test_step import UNEVEN, P, draw_examples, loss_and_gradient, true_loss_and_gradient  # noqa: E402
from toy_models import VARIANTS, make_toy  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "families.json"
SECONDS = 60
"""What a family may take."""


class TooLong(Exception):
    pass


def look_at(family: str) -> dict[str, Any]:
    """One row: the step (fast, full, refused, not tried), the assistant, decoding, each with its reason, and errors."""
    try:
        model = make_toy(family)
    except TooLong:
        raise
    except Exception as error:
        return {"family": family, "step": "not tried", "reason": first_line(error)}
    row = {"family": family, "class": type(model).__name__, "attention": model.config._attn_implementation}
    reason = why_unsuitable(model, "base") or why_gradient_wrong(model)
    if reason is not None:
        row |= {"step": "refused", "reason": reason}
    else:
        reason = why_unsupported(model)
        if reason is None:
            prefixed = FrozenPrefix(model)
            reason = why_not_fast(model, prefixed)
            prefixed.remove()
        row |= {"step": "fast"} if reason is None else {"step": "full", "reason": reason}
        row |= errors(family, row["step"])
    reason = why_unsuitable(model, "assistant")
    row |= {"assistant": "fit"} if reason is None else {"assistant": "refused", "assistant_reason": reason}
    try:
        row["decoding"] = try_decoding(make_toy(family))
    except SoftCoTError as error:
        row |= {"decoding": "refused", "decoding_reason": str(error)}
    return row


def errors(family: str, kind: str) -> dict[str, float]:
    """Relative errors of a step's loss and gradient on uneven examples against each run alone."""
    model = make_toy(family)
    width = model.get_input_embeddings()(torch.tensor([[3]])).shape[-1]
    torch.manual_seed(6)
    projection = LinearProjection(P, width)
    examples = draw_examples(UNEVEN, thoughts=3, shared=6)
    truth = true_loss_and_gradient(model, copy.deepcopy(projection), examples, torch.float32)
    step = SoftThoughts(make_toy(family), projection, step=kind, shared_ids=examples[0][0][:6])
    loss, gradient = loss_and_gradient(step, examples, torch.float32)
    return {
        "loss_error": abs(loss - truth[0]) / abs(truth[0]),
        "gradient_error": float((gradient.double() - truth[1]).norm() / truth[1].norm()),
    }


def page(result: dict[str, Any]) -> str:
    """docs/models.md: a row for each family, and why where it is refused or slower."""
    made = result["environment"]
    lines = [
        "# Model families",
        "",
        "Written by `python benchmarks/families.py --page docs/models.md` from its",
        f"[result](../benchmarks/results/families.json): transformers {made['transformers']},",
        "each family tried as a toy of a few layers with random weights. What decides in a run is the trial of",
        "the model itself, right after it is loaded; a family that is missing here, or was not tried, may well work.",
        "",
        "Step: *fast* or *full*, the same loss and gradient; assistant: whether its hidden states can be the thoughts;",
        "decoding: *refilled*, where waiting prompts take the place of outputs that have ended; *in batches*; or",
        "*one by one*, where a batch would change what comes out.",
        "",
        "| family | step | assistant | decoding | why |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(result["families"], key=lambda row: row["family"]):
        reasons = dict.fromkeys(row[key] for key in ("reason", "assistant_reason", "decoding_reason") if key in row)
        why = "; ".join(reasons).replace("|", "\\|")
        lines.append(
            f"| {row['family']} | {row['step']} | {row.get('assistant', '')} | {row.get('decoding', '')} | {why} |"
        )
    return "\n".join(lines) + "\n"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="some of them; without any, all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="try nothing: write the page of the committed result")
    args = parser.parse_args()
    if args.page:
        args.page.write_text(page(json.loads(RESULT.read_text())))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    everything = dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])  # each once

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    rows = []
    for family in args.families or everything:
        signal.alarm(SECONDS)
        try:
            row = look_at(family)
        except TooLong:
            row = {"family": family, "step": "not tried", "reason": f"takes more than {SECONDS} s"}
        finally:
            signal.alarm(0)
        rows.append(row)
        print(*(f"{value:.0e}" if isinstance(value, float) else value for value in row.values()), sep=" | ", flush=True)
    counts = Counter(row["step"] for row in rows)
    write_result({"environment": describe(), "counts": dict(counts), "families": rows}, args.out)


if __name__ == "__main__":
    main()
