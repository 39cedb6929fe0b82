"""What the commands share: arguments, signals, exit codes, and one message for what a user can mend."""

import argparse
import contextlib
import errno
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from softcot_ds.errors import STOP_SIGNALS, Interrupted, LostRank, SoftCoTError, Stopped
from softcot_ds.launch import add_gpus, launch
from softcot_ds.progress import close_bars
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.settings import known_keys
from softcot_ds.shipped import settings_files

# That DeepSpeed finds no GPU it says in each process that imports it; nothing a user has to mend.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

EXIT_MISTAKE = 2
"""Exit code after something that the user can mend."""
EXIT_LOST_RANK = 3
"""Exit code when another rank has died or does not answer."""


def recipe_command(
    name: str,
    description: str,
    work: Callable[..., object],
    load: Callable[[str, list[str]], tuple] | None = None,
    needs_recipe: bool = True,
) -> Callable[[Sequence[str] | None], int]:
    """The ``main`` of a command whose arguments are a recipe and overrides.

    Args:
        work: called with the recipe, or with all that ``load`` returns.
        load: what to work on, from the recipe's path, or an adapter directory's, and the overrides.
        needs_recipe: without, the recipe may be left out, and ``work`` is called with None.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(prog=f"softcot-ds {name}", description=description)
        adapters = "" if load is None else "; or an adapter: its directory, its run's, or owner/name on the hub"
        add_recipe(parser, f"a YAML file; softcot-ds recipes lists some{adapters}", nargs=None if needs_recipe else "?")
        # The deepspeed launcher adds this argument; LOCAL_RANK in the environment says the same.
        parser.add_argument("--local_rank", help=argparse.SUPPRESS)
        add_gpus(parser)
        args = parsed(parser, argv)

        def run() -> None:
            given = [] if args.recipe is None else [args.recipe, *args.overrides]
            subject: tuple = (None,)
            if given:  # what is wrong with it is said once
                subject = load(args.recipe, args.overrides) if load else (load_recipe(args.recipe, args.overrides),)
            if args.gpus:
                launch(name, given, args.gpus)
            else:
                work(*subject)

        return run_command(run)

    return main


def add_recipe(parser: argparse.ArgumentParser, help: str, name: str = "recipe", nargs: str | None = None) -> None:
    """The arguments of a command that works on a recipe: the recipe, and overrides of it.

    Args:
        name: of the first one.
    """
    add_settings(parser, name, help, nargs)
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replace a value of the recipe, such as training.steps=200"
    )
    overrides.completer = _keys  # type: ignore[attr-defined]  # argcomplete's


def add_settings(parser: argparse.ArgumentParser, name: str, help: str, nargs: str | None = None) -> None:
    """An argument that is a recipe or a study."""
    argument = parser.add_argument(name, nargs=nargs, help=help)
    argument.completer = _settings_files  # type: ignore[attr-defined]


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command. A shell that asks what may come next is told, and the process ends."""
    complete(parser)
    # The deepspeed launcher's argument comes first: parsed otherwise, an optional recipe behind it would not be found.
    return parser.parse_intermixed_args(argv)


def complete(parser: argparse.ArgumentParser) -> None:
    """Where a shell wants a command line completed, do that, and end the process."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # type: ignore[import-not-found]  # an extra: of no use without a shell that asks

        argcomplete.autocomplete(parser)


def _settings_files(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter  # type: ignore[import-not-found]

    return [*FilesCompleter()(prefix), *map(str, settings_files())]


def _keys(**_: Any) -> list[str]:
    keys = known_keys(Recipe)
    return [f"{key}=" for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def run_command(work: Callable[[], None]) -> int:
    """Run a command's work; returns its exit code. What a user can mend is one message, no stack trace."""
    code = 1  # of a defect, whose stack trace is wanted
    midway = False  # in something that the ranks do together, and that will not end
    try:
        with interrupted_by_signals():
            work()
        sys.stdout.flush()
        code = 0
    except Stopped as error:
        _report(str(error))
        code = exit_code_of(error.signal_number)
    except SoftCoTError as error:
        _report(f"error: {error}")
        code = EXIT_LOST_RANK if isinstance(error, LostRank) else EXIT_MISTAKE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _report(f"error: the disk is full: {error}; make room, and the same command goes on from what is finished")
            code = EXIT_MISTAKE
        elif isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be said
            code, midway = exit_code_of(signal.SIGPIPE), True
        else:
            raise
    except Interrupted as error:
        _report(
            f"interrupted by {signal.Signals(error.signal_number).name}; the same command goes on from what is finished"
        )
        code, midway = exit_code_of(error.signal_number), True
    except RuntimeError as error:
        distributed = sys.modules.get("softcot_ds.distributed")
        if distributed is None or (reason := distributed.lost_rank(error)) is None:
            raise
        _report(
            f"error: another rank has died, or has not answered in time ({reason}); its own last lines say why. The "
            "same command goes on from what is finished"
        )
        code, midway = EXIT_LOST_RANK, True
    finally:
        distributed = sys.modules.get("softcot_ds.distributed")  # only where the command works with other ranks
        if distributed is not None:
            distributed.shut_down(code, midway)
    trackers = sys.modules.get("softcot_ds.training.trackers")
    if trackers is not None and trackers.left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _nobody_reads() -> bool:
    """Whether what read this process's output, ``head`` for one, has gone away."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def exit_code_of(signal_number: int) -> int:
    """The exit code of a process that a signal stopped, as shells give it."""
    return 128 + signal_number


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise ``Interrupted`` in the block when one of ``STOP_SIGNALS`` comes.

    Batch systems signal every process of a job, and launchers hand signals that they ignore down to their children: so
    the handlers are set even where a signal is ignored, and forked children, such as data loader workers, leave the
    answer to their parent.
    """
    pid = os.getpid()

    def interrupt(number: int, _frame: Any) -> None:
        if os.getpid() == pid:
            raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(message: str) -> None:
    # Mostly all ranks fail alike: let the first one speak, upon which the launcher ends the others.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank:
        time.sleep(5)
    close_bars()
    sys.stdout.flush()
    prefix = f"[rank {os.environ['RANK']}] " if local_rank else ""
    print(f"softcot-ds: {prefix}{message}", file=sys.stderr, flush=True)
