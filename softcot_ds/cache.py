"""``softcot-ds cache``: compute the assistant's thoughts once, in parallel, and keep them on disk.

Run it alone, under ``mpirun -n N``, ``srun --mpi=pmix`` or the deepspeed launcher. ``thoughts/builder.py`` says how the
ranks share the work. A run that was killed is continued by running the same command again. ``--verify``, ``--info`` and
``--prune`` take a recipe or a folder of caches.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import TYPE_CHECKING

from softcot_ds.cells import Grid
from softcot_ds.command import add_recipe, exit_code_of, interrupted_by_signals, parsed, run_command
from softcot_ds.errors import Interrupted, OtherRankFailed, SoftCoTError
from softcot_ds.launch import add_gpus, launch
from softcot_ds.recipe import load_recipe

if TYPE_CHECKING:
    from softcot_ds.thoughts.ranks import Ranks


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="softcot-ds cache", description="Compute the assistant's thoughts, once.")
    add_recipe(parser, "a recipe (YAML); with one of the options below also a folder of caches")
    for option, help_text in (
        ("verify", "check every byte; given a recipe, also compute some rows again"),
        ("info", "say what the cache is, how large, who made it and what of its states varies with the question"),
        ("prune", "remove what stopped builders left, and damaged shards"),
    ):
        parser.add_argument(f"--{option}", dest="inspect", action="store_const", const=option, help=help_text)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_gpus(parser)
    args = parsed(parser, argv)
    if args.gpus:
        if args.inspect:
            parser.error(f"--{args.inspect} needs no ranks: leave --gpus out")
        return run_command(lambda: launch("cache", [args.recipe, *args.overrides], args.gpus))
    ranks: Ranks | None = None
    try:
        with interrupted_by_signals():
            # They bring torch and transformers, which take seconds: not for --help.
            if args.inspect:
                from softcot_ds.thoughts.inspection import inspect

                inspect(args.inspect, args.recipe, args.overrides)
                return 0
            from softcot_ds.thoughts.ranks import join_ranks

            ranks = join_ranks()
            from softcot_ds.thoughts.computing import build

            grid = Grid.of(args.overrides)  # a seed decides nothing of a cache
            build(grid.counts(load_recipe(args.recipe, list(grid.plain))), ranks)
    except OtherRankFailed:
        return 2
    except SoftCoTError as error:
        _complain(str(error), ranks)
        return 2
    except Interrupted as error:
        name = signal.Signals(error.signal_number).name
        _complain(f"interrupted by {name}; finished rows are kept, the same command goes on from there", ranks)
        return exit_code_of(error.signal_number)
    except BaseException:  # a defect: the stack trace is wanted, and so is the end of the other ranks
        if ranks is not None:
            ranks.fail()
        raise
    finally:
        if ranks is not None:
            ranks.leave()
    return 0


def _complain(message: str, ranks: Ranks | None) -> None:
    """Tell the user, once, even if all ranks found the same; and the other ranks that this one stops."""
    if ranks is not None:
        ranks.fail()
    if ranks is None or ranks.count(f"complaint/{message}", 1) == 1:
        where = f"rank {ranks.rank}: " if ranks is not None and ranks.size > 1 else ""
        print(f"softcot-ds cache: {where}{message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
