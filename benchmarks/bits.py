"""What holding the base in fewer bits does to the loss and the projection's gradient. The last line is a JSON object.

    python benchmarks/bits.py RECIPE [KEY=VALUE ...] [--projection FILE] [--out FILE]

For each ``backbone.bits``: the mean cross entropy of the validation problems, nats a supervised token; how far the
gradient of their sum is from that of 16 bits, relative to its norm, and the cosine of both; and bytes of the base's
weights. Thoughts are computed online, by a projection that was trained with 16 bits (``--projection``) or is new.
"""

import argparse
from pathlib import Path

import torch
from environment import describe, write_result

from softcot_ds.distributed import init_distributed, shut_down
from softcot_ds.experiment import Experiment
from softcot_ds.methods.projection import load_projection
from softcot_ds.models.loss import IGNORE
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.reader import ThoughtReader
from softcot_ds.training.batches import read_batch
from softcot_ds.training.engine import build_model
from softcot_ds.training.start import Start


def measure(path: str, overrides: list[str], projection: Path | None) -> tuple[dict[str, float], torch.Tensor]:
    """Loss and bytes, and the gradient as one vector."""
    recipe = load_recipe(path, [*overrides, "backbone.partition=none", "thoughts.source=online"])
    experiment = Experiment(recipe)
    model = build_model(recipe, experiment, Start(load_projection(projection)) if projection else None)
    examples = experiment.splits.validation
    reader = ThoughtReader.open(recipe, examples)
    total, count, size = 0.0, 0, recipe.training.micro_batch_size
    for start in range(0, len(examples), size):
        batch = read_batch(examples[start : start + size], reader, experiment.base_pad_id, model)
        loss = model(batch)
        loss.backward()
        total += loss.item()
        count += int((batch.targets != IGNORE).sum())
    gradient = torch.cat([parameter.grad.flatten().double() for parameter in model.projection.parameters()])
    return {"loss": total / count, "base_bytes": sum(p.nbytes for p in model.base.parameters())}, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--projection", type=Path, help="a trained projection.safetensors")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    init_distributed(timeout_minutes=5)
    result = {"benchmark": "bits", **describe(), "trained": args.projection is not None, "bits": {}}
    whole = None
    for bits in (16, 8, 4):
        row, gradient = measure(args.recipe, [*args.overrides, f"backbone.bits={bits}"], args.projection)
        whole = gradient if whole is None else whole
        row["gradient_difference"] = ((gradient - whole).norm() / whole.norm()).item()
        row["gradient_cosine"] = torch.nn.functional.cosine_similarity(gradient, whole, dim=0).item()
        result["bits"][str(bits)] = row
        print(f"{bits:2} bits: loss {row['loss']:.5f}, gradient {row['gradient_difference']:.2%} off")
    write_result(result, args.out)
    shut_down()


if __name__ == "__main__":
    main()
