"""Ranks that cost no import: processes forked from one that has imported what takes seconds.

A rank that the launcher starts spends seven seconds of a core on importing PyTorch, transformers and DeepSpeed, and the
launcher four more. So what is not about launchers starts here: processes as separate as others, that find each other by
the same variables. One thing they share that others do not: the seed of Python's hashes. Jobs on a cluster start theirs
the way users do, and so does test_stories.py once.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO
from unittest import mock

from launch import ROOT, environment, free_port

from softcot_ds.errors import SoftCoTError


def run_forked(
    ranks: int, module: str, *arguments: object, timeout: float = 240, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` on so many ranks to the end; as under the launcher, one that fails ends the others.

    Standard output and error of all come together. With ``check``, a failure shows them. Variables that are read when
    PyTorch, Triton or DeepSpeed are imported have no effect in ``env``.
    """
    with _started(ranks, module, arguments, env) as (processes, output):
        code, give_up = 0, time.monotonic() + timeout
        while not code and (running := [process for process in processes if process.exitcode is None]):
            if not connection.wait([process.sentinel for process in running], give_up - time.monotonic()):
                raise AssertionError(f"{len(running)} ranks of {module} still run after {timeout} s:\n{output.read()}")
            code = next((process.exitcode for process in processes if process.exitcode), 0)
    text = output.read()
    output.close()
    if check and code:
        raise AssertionError(f"{module} ended with {code}:\n{text}")
    return subprocess.CompletedProcess([module, *map(str, arguments)], code, text)


def kill_forked(when: Path, ranks: int, module: str, *arguments: object, timeout: float = 120) -> None:
    """Run ``python -m module`` on so many ranks until the file ``when`` appears, then kill them all."""
    give_up = time.monotonic() + timeout
    with _started(ranks, module, arguments, {}) as (processes, output):
        while not when.exists() and all(process.is_alive() for process in processes) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert when.exists(), f"{when} never appeared:\n{output.read()}"
    output.close()


def fork(work: Callable[[], object]) -> int:
    """The child of this process that runs ``work``: it ends with 0, 2 for SoftCoTError, 1 for anything else."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except SoftCoTError as error:
        print(error, flush=True)
        code = 2
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """When the child of ``fork`` has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def _started(
    ranks: int, module: str, arguments: tuple, env: dict[str, str]
) -> Iterator[tuple[list[BaseProcess], IO[str]]]:
    """The processes and what they print; whatever becomes of them, none is left behind."""
    sys.audit("os.fork")  # conftest.py does not see the server fork, which is another process
    forkserver.set_forkserver_preload(["imported"])
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()
    variables = environment() | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | env
    command = [module, *map(str, arguments)]
    output = tempfile.NamedTemporaryFile("r")  # noqa: SIM115  # read when the processes have ended
    processes = [
        multiprocessing.get_context("forkserver").Process(
            target=_rank, args=(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, command, output.name)
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        yield processes, output
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(variables: dict[str, str], command: list[str], output: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    assert "imported" in sys.modules, "the server says nothing of an import that fails"
    sys.argv = command
    os.fsync = lambda descriptor: None  # as in conftest.py
    gc.freeze()  # DeepSpeed collects garbage for each engine: it need not look through all that was imported
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
