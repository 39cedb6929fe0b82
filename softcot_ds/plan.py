"""``softcot-ds plan RECIPE --nodes N --gpus-per-node G``: what each way to hold the weights needs, moves and takes.

From the models' configurations alone: no weight is read, and nothing but a config.json is ever downloaded.
"""

import argparse
import gc
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from softcot_ds.command import add_recipe, parsed, run_command
from softcot_ds.planning.hardware import Cluster, load_hardware
from softcot_ds.recipe import Recipe, load_recipe

_MOST = 100_000
"""Nodes, or GPUs of a node, that are planned for."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds plan", description="Memory, traffic and time of each way to hold the weights."
    )
    add_recipe(parser, "a YAML file; softcot-ds recipes lists some")
    parser.add_argument("--nodes", type=_positive, default=1)
    parser.add_argument("--gpus-per-node", type=_positive, default=8, help="a rank for each; default: 8")
    parser.add_argument("--gpu", default="h100", help="a name of the hardware table; default: h100")
    parser.add_argument("--network", type=_rate, metavar="GBPS", help="of each GPU to other nodes, Gb/s")
    parser.add_argument("--hardware", type=Path, metavar="FILE", help="YAML that adds to the hardware table")
    parser.add_argument("--scaling", action="store_true", help="the best choice on one node to 1,024 GPUs too")
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parsed(parser, argv)
    return run_command(lambda: _plan(load_recipe(args.recipe, args.overrides), args))


def _plan(recipe: Recipe, args: argparse.Namespace) -> None:
    hardware = load_hardware(args.hardware)
    gpu = hardware.gpu(args.gpu)
    cluster = Cluster(gpu, hardware.reached, args.nodes, args.gpus_per_node, args.network or gpu.network_gbps)

    # Torch and transformers take seconds. Whatever they make stays: looking for garbage takes a fifth longer.
    gc.disable()
    from softcot_ds.planning import report

    gc.enable()

    plan = report.make_plan(recipe, cluster)
    scaled = report.scale(plan) if args.scaling else []
    print(json.dumps(report.as_json(plan, scaled), indent=2) if args.json else report.as_text(plan, scaled))


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of Gb/s above 0")
    return rate


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {_MOST:,}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
