r"""What Coconut's curriculum promises, on a toy that needs it: steps that are thought, too many to be done at once.

    python benchmarks/coconut.py [--seeds 0 1 2] [--out benchmarks/results/coconut.json]

A question names one of five states and four moves, each a permutation of the states that the base has to learn by
heart; a step of the solution is the state after a move, one token. Permutations do not commute, so that nothing short
of doing one after the other gives the last state, the answer. The base, two layers that begin at random, is too shallow
to do that in one pass. It is trained by ``method: coconut_full`` first to write all steps, then with the first, the
first two, ... left out, one latent for each; three optimizer steps in ten are of any stage so far. The control is the
same training with ``latents_per_step: 0``: the steps are left out, and nothing stands in their place. No test question
is trained on.

``accuracy`` of the test questions, by seed: ``written``, of the training that is left at stage 0; ``latents``, with all
steps left out, and by condition what becomes of it with another question's latents (``shuffled``), vectors of zeros
(``zero``) and without any (``empty``, which makes it write its steps again, as stage 0 was never left for good);
``no latents``, of the control. Chance is a fifth. The last line of output is a
JSON object; finished trainings are not run again.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from environment import describe, keep, write_result
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softcot_ds.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STATES, MOVES, STEPS, TEST = 5, "abcdefgh", 4, 1000
STAGE_0, STAGE = 1000, 1500
"""Optimizer steps: of the first stage, and of each other."""
CONTROLS = ["shuffled", "zero", "empty"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<go>{{ m.content }}<end>{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
)
PROMPTS = "".join(
    f'{name}: [{{role: user, content: "{content}"}}]\n'
    for name, content in {
        "assistant": "{question}{thoughts}",
        "assistant_text": "{question}",
        "base": "{question}{thoughts}",
        "base_without_thoughts": "{question}",
    }.items()
)


def make_data(folder: Path) -> None:
    """All questions, of which the test's are drawn at random."""
    draw = random.Random(0)
    tables = {move: draw.sample(range(STATES), STATES) for move in MOVES}
    problems = []
    for number in range(STATES * len(MOVES) ** STEPS):
        state, moves = number % STATES, number // STATES
        question, steps = str(state), []
        for _ in range(STEPS):
            moves, move = divmod(moves, len(MOVES))
            state = tables[MOVES[move]][state]
            question += MOVES[move]
            steps.append(str(state))
        problems.append(json.dumps({"question": question, "steps": steps, "answer": steps[-1]}) + "\n")
    draw.shuffle(problems)
    (folder / "test.jsonl").write_text("".join(problems[:TEST]))
    (folder / "train.jsonl").write_text("".join(problems[TEST:]))


def make_base(folder: Path) -> None:
    """Two layers of random weights, and a tokenizer of these questions and solutions. Line ends are nothing to it."""
    pieces = ["<pad>", "<end>", "<go>", *map(str, range(STATES)), *MOVES, "The answer is \\boxed{", "}."]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    split = pre_tokenizers.Split(Regex(r"The answer is \\boxed\{|\}\.|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "removed"), split])
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "additional_special_tokens": ["<go>"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_recipe(folder: Path) -> Path:
    """With all that it names, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder)
    make_base(folder / "base")
    (folder / "prompts.yaml").write_text(PROMPTS)
    stages = [STAGE_0, *[STAGE] * STEPS]
    model = {"model": str(folder / "base"), "dtype": "float32"}
    recipe = {
        "name": "toy",
        "method": "coconut_full",
        "output_dir": str(folder),
        "task": {
            "name": "custom",
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "fields": {"question": "question", "reasoning": "steps", "answer": "answer"},
            "answer": "number",
            "prompts": str(folder / "prompts.yaml"),
            "train_problems": None,
            "test_problems": None,
            "validation_problems": 100,
        },
        "assistant": model,
        "base": model,
        "thoughts": {"count": 2 + STEPS, "placeholder": "<pad>"},
        "coconut": {"latents_per_step": 1, "stage_steps": stages, "uniform_prob": 0.3},
        "backbone": {"partition": "none"},
        "training": {
            "steps": sum(stages),
            "global_batch_size": 64,
            "micro_batch_size": 64,
            "learning_rate": 1e-3,
            "warmup_steps": 50,
            "schedule": "constant",
            "log_every": 100,
            "validate_every": 500,
            "save_every": 500,
        },
        "evaluation": {"conditions": ["learned", *CONTROLS], "batch_size": 250, "max_new_tokens": 16},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path


def accuracies(path: Path, name: str, *overrides: str) -> dict[str, float]:
    """Of a training, by condition: trained and evaluated, where that has not been done."""
    settings = [f"name={name}", *overrides]
    report = load_recipe(str(path), settings).run_dir / "report.json"
    if not report.exists():
        for module in ("train", "evaluate"):
            subprocess.run([sys.executable, "-m", f"softcot_ds.{module}", path, *settings], cwd=ROOT, check=True)
    return {name: found["accuracy"] for name, found in json.loads(report.read_text())["conditions"].items()}


def measure(path: Path, seed: int) -> dict[str, Any]:
    own = f"seed={seed}"
    written = [f"training.steps={STAGE_0}", "thoughts.count=2"]
    without = ["coconut.latents_per_step=0", "thoughts.count=2"]
    alone = "evaluation.conditions=[learned]"
    found = accuracies(path, f"latents-{seed}", own)
    return {
        "seed": seed,
        "written": accuracies(path, f"written-{seed}", own, *written, alone)["learned"],
        "latents": found.pop("learned"),
        **found,
        "no latents": accuracies(path, f"no-latents-{seed}", own, *without, alone)["learned"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/coconut", help="where the toy and its runs lie")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    path = make_recipe(args.runs)
    result: dict[str, Any] = {"benchmark": "coconut", **describe(), "test_problems": TEST, "accuracy": []}
    for seed in args.seeds:
        result["accuracy"].append(measure(path, seed))
        keep(result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
