r"""Problems per second by a vLLM server against our own decoding, with thoughts in the prompts.

    python tests/with_vllm.py .venv-vllm/bin/python MODEL float32 \
      python benchmarks/served.py MODEL float32 [--rounds N] [--out FILE]

Both decode the same GSM8K-like stories greedily with the same model, in turns: one rests while the other works, on all
cores. A machine with other work on it slows both: medians over the rounds are given, and every round. ``batch_size``
outputs are written at a time, by the server as many requests. The last line of output is a JSON object.

- ``problems_per_second``: of the median round, by ``ours`` and ``vllm``
- ``times_ours``: the median of the rounds' ratios
- ``same``: how many outputs are the same, token by token
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import describe, keep, write_result

import softcot_ds
from softcot_ds.inference import Adapter
from softcot_ds.recipe import load_recipe

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
COUNT, BATCH, TOKENS = 32, 16, 32


def make_adapters(folder: Path, model: str, dtype: str) -> tuple[Adapter, Adapter]:
    """With a projection of random weights: what thoughts say takes no time."""
    from adapters import make_adapter

    settings = [f"base.model={model}", f"base.dtype={dtype}", f"assistant.model={model}", f"output_dir={folder}"]
    settings += ["projection.condition=none", "projection.init_scale=0.1"]
    settings += [f"evaluation.batch_size={BATCH}", f"evaluation.max_new_tokens={TOKENS}"]
    for name in ("train", "test"):
        (folder / name).with_suffix(".jsonl").write_text(f'{{"question": "A {name}?", "answer": "so\\n#### 2"}}\n')
        settings.append(f"task.{name}={folder}/{name}.jsonl")
    settings.append("task.train_problems=null")
    settings += [
        "task.test_problems=null",
        "task.validation_problems=0",
        "evaluation.decode=true",
        f"cache.path={folder}/cache",
    ]
    make_adapter(folder / "adapter", load_recipe(ROOT / "recipes/smollm2_gsm8k.yaml", settings))
    server = f"evaluation.server={os.environ['SOFTCOT_VLLM_SERVER']}"
    return softcot_ds.load(folder / "adapter"), softcot_ds.load(folder / "adapter", server)


def main() -> None:
    from test_vllm import stories

    parser = argparse.ArgumentParser(description="A vLLM server against our own decoding.")
    parser.add_argument("model", help="a folder; the server of SOFTCOT_VLLM_SERVER has the same model")
    parser.add_argument("dtype", choices=["float32", "bfloat16"], help="in which both compute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = dict(zip(("ours", "vllm"), make_adapters(Path(folder), args.model, args.dtype), strict=True))
        rounds: list[dict[str, float]] = []
        result = {"benchmark": "served", **describe(), "threads": torch.get_num_threads()}
        result |= {"vllm": adapters["vllm"].server.version, "model": Path(args.model).name}
        result |= {"dtype": args.dtype, "problems": COUNT}
        result |= {
            "batch_size": BATCH,
            "max_new_tokens": TOKENS,
            "num_thoughts": adapters["ours"].recipe.thoughts.count,
        }
        for number in range(args.rounds + 1):  # the first warms up
            seconds, outputs = {}, {}
            for name, adapter in adapters.items():
                questions = [adapter.question(story) for story in stories(COUNT)]
                adapter.load_models()
                began = time.perf_counter()
                outputs[name] = adapter.outputs(questions)
                seconds[name] = time.perf_counter() - began
            if number:
                rounds.append(seconds)
                ratios = [one["ours"] / one["vllm"] for one in rounds]
                medians = {name: statistics.median(one[name] for one in rounds) for name in adapters}
                result["problems_per_second"] = {name: round(COUNT / value, 3) for name, value in medians.items()}
                result["times_ours"] = round(statistics.median(ratios), 3)
                result["same"] = sum(a == b for a, b in zip(outputs["ours"], outputs["vllm"], strict=True))
                result["seconds"] = [{name: round(value, 2) for name, value in one.items()} for one in rounds]
                keep(result, args.out)
    write_result(result, args.out)


if __name__ == "__main__":
    main()
