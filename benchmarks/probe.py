"""Is the question in the assistant's states at all? A linear probe, from the cached states of training problems.

    python benchmarks/probe.py RECIPE [key=value ...] --out benchmarks/results/probe.json

Ridge regression from all states of a problem, centred and whitened, to what the base needs of the question: which
operations its reference solution takes and how many steps, the first number that it calculates with, how large the
answer is. Each problem is predicted by a probe that has not seen it (five folds; the penalty by the leave-one-out error
within the other four). 0 is what the mean of the others explains, 1 is all. For comparison, the same from the words of
the question: how often each of its tokens occurs in it.
"""

import argparse
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
from environment import describe, write_result

from softcot_ds.data.examples import Example
from softcot_ds.experiment import Experiment
from softcot_ds.methods.conditioning import Conditioning
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.reader import ThoughtReader

FOLDS = 5
PENALTIES = 10.0 ** np.arange(-4, 5)
"""Times the mean square of a problem's features."""


def targets_of(text: str, answer: str) -> dict[str, float]:
    """What is to be found in the states, by name; NaN where a solution has none."""
    used = re.findall(r"[\d)%]\s*([-+*/x])\s*[\d($.]", text)
    numbers = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
    try:
        size = math.log10(1 + abs(float(answer.replace(",", ""))))
    except ValueError:
        size = math.nan
    operations = {f"takes {sign}": float(sign in "".join(used).replace("x", "*")) for sign in "+-*/"}
    first = math.log10(1 + numbers[0]) if numbers else math.nan
    return operations | {"steps": float(text.count("=")), "first number, log10": first, "answer, log10": size}


def predict(features_NF: np.ndarray, wanted_NK: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What a ridge regression on the problems ``seen`` (mask) says of the others, (., K) float64."""
    mean_F, mean_K = features_NF[seen].mean(axis=0), wanted_NK[seen].mean(axis=0)
    ours, theirs, wanted = features_NF[seen] - mean_F, features_NF[~seen] - mean_F, wanted_NK[seen] - mean_K
    values, vectors = np.linalg.eigh(ours @ ours.T)
    scale = np.square(ours).sum() / len(ours)
    found, least = mean_K + 0 * wanted_NK[~seen], np.square(wanted).sum(axis=0)
    for penalty in PENALTIES * scale:
        inverse = vectors / (values.clip(0) + penalty) @ vectors.T
        weights = inverse @ wanted
        left_out = np.square(weights / np.diag(inverse)[:, None]).sum(axis=0)  # the leave-one-out error
        better = left_out < least
        found[:, better] = (mean_K + theirs @ ours.T @ weights)[:, better]
        least = np.minimum(least, left_out)
    return found


def explained(features_NF: np.ndarray, wanted_NK: np.ndarray) -> list[dict[str, float]]:
    """For each target, the share of its variance that is predicted, and half the width of its 95% interval."""
    fold = np.random.default_rng(0).permutation(len(features_NF)) % FOLDS
    predicted, mean = np.empty_like(wanted_NK), np.empty_like(wanted_NK)
    for number in range(FOLDS):
        seen = fold != number
        predicted[~seen], mean[~seen] = predict(features_NF, wanted_NK, seen), wanted_NK[seen].mean(axis=0)
    before, after = np.square(wanted_NK - mean), np.square(wanted_NK - predicted)
    share = 1 - after.sum(axis=0) / before.sum(axis=0)
    # A ratio of sums over problems: the error is that of their residuals (Cochran, Sampling Techniques, section 6.4).
    residuals = before - after - share * before
    margin = 1.96 * np.sqrt(np.square(residuals).sum(axis=0)) / before.sum(axis=0)
    return [{"explained": float(s), "margin": float(m)} for s, m in zip(share, margin, strict=True)]


def words(examples: list[Example]) -> np.ndarray:
    """(N, words) how often each token of what the assistant reads occurs; those of five problems and more."""
    counts = [Counter(example.assistant.token_ids) for example in examples]
    often = [token for token, times in Counter(t for count in counts for t in count).items() if times >= FOLDS]
    return np.array([[float(count[token]) for token in often] for count in counts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, help="write the result, JSON, to this file")
    args = parser.parse_args()
    experiment = Experiment(load_recipe(args.recipe, args.overrides))
    examples = experiment.splits.train
    reader = ThoughtReader.open(experiment.recipe, examples)
    states_NTP, moments = reader.read(examples).double(), reader.moments(examples)
    shapes = moments.mean_P, moments.variances_P, moments.directions_PP
    features = {
        "centred states": Conditioning.of(*shapes, whiten=False)(states_NTP).flatten(1).numpy(),
        "whitened states": Conditioning.of(*shapes, whiten=True)(states_NTP).flatten(1).numpy(),
        "words of the question": words(examples),
    }
    decode = experiment.base_tokenizer.decode
    wanted = [targets_of(decode(e.target_ids, skip_special_tokens=True), e.problem.answer) for e in examples]
    names = [name for name in wanted[0] if not any(math.isnan(row[name]) for row in wanted)]
    wanted_NK = np.array([[row[name] for name in names] for row in wanted])
    found = {}
    for source, features_NF in features.items():
        found[source] = dict(zip(names, explained(features_NF, wanted_NK), strict=True))
        for name, share in found[source].items():
            print(f"{source:22} {name:20} {share['explained']:+.3f} ± {share['margin']:.3f}", flush=True)
    result = {"benchmark": "probe", **describe(), "recipe": args.recipe, "overrides": args.overrides}
    write_result(result | {"problems": len(examples), "thoughts": states_NTP.shape[1], "probes": found}, args.out)


if __name__ == "__main__":
    main()
