"""The processes of one cache build: who they are, and a board on which they share work and results.

They may have been started by an MPI launcher, by srun, by the deepspeed launcher (or torchrun), or be one alone. All
that a build needs is a board of counters and texts held by rank 0: batches are handed out by adding one to a counter,
so a slow rank holds nobody up. Under MPI the board is served by a thread of rank 0 over plain messages, which every
MPI carries over every network; without MPI it is PyTorch's store over TCP.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol

import torch.distributed as dist

from softcot_ds.errors import OtherRankFailed, SoftCoTError
from softcot_ds.launchers import MEETING, MPI_SIZE_VARIABLES

_HAND_OUTS = ("shard", "batch")
"""Counters by which ranks share out work."""
_STOP = 1 << 40
"""Added to a hand-out counter, it puts it past the end of any work."""


class Board(Protocol):
    """Counters and texts shared by all ranks; the part of ``torch.distributed.Store`` that is needed here."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which starts at 0, and return its new value."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """The text set for ``key``, which must be there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have been set."""


def _nothing() -> None: ...


class Ranks:
    """This process among those of a build."""

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        board: Board,
        launcher: str,
        close: Callable[[], None] = _nothing,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        """Number of this process among those of its node: which device it takes."""
        self.local_size = local_size
        self.launcher = launcher
        """For people: what connects the ranks."""
        self._board = board
        self._close = close
        self._topic = ""

    def on(self, topic: str) -> "Ranks":
        """The same ranks at another work: what they count and post has nothing to do with that of other topics."""
        other = copy(self)
        other._topic = f"{topic}/"
        return other

    def count(self, counter: str, amount: int = 0) -> int:
        """Add to a counter shared by all ranks; returns its new value."""
        return self._board.add(self._topic + counter, amount)

    def take(self, counter: str) -> int:
        """The next number, from 0 on, that no rank has taken yet. Huge once a rank has failed."""
        return self.count(counter, 1) - 1

    def post(self, key: str, value: Any) -> None:
        """Show a JSON value to all ranks."""
        self._board.set(self._topic + key, json.dumps(value))

    def posted(self, key: str) -> bool:
        """Whether the value has been posted."""
        return self._board.check([self._topic + key])

    def fetch(self, key: str) -> Any:
        """Wait for a value that some rank posts, and return it.

        Raises:
            OtherRankFailed: a rank has failed, so it may never come.
        """
        pause = 0.001
        while not self.posted(key):
            if self.failed:
                raise OtherRankFailed("another rank failed")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return json.loads(self._board.get(self._topic + key))

    @property
    def failed(self) -> bool:
        """Whether any rank has failed, at whatever."""
        return self._board.add("failed", 0) > 0

    def fail(self) -> None:
        """Tell the others that this rank gives up, and end the hand-out of work."""
        self._board.add("failed", 1)
        for counter in _HAND_OUTS:
            self.count(counter, _STOP)

    def export_environment(self) -> None:
        """Tell torch.distributed about these ranks, in the variables that it reads, unless a launcher has done so."""
        if "RANK" in os.environ:
            return
        if self.rank == 0:
            with socket.socket() as listener:
                listener.bind(("", 0))
                self.post("rendezvous", [socket.gethostname(), listener.getsockname()[1]])
        address, port = self.fetch("rendezvous")
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.size),
            MASTER_ADDR=address if self.size > 1 else "127.0.0.1",
            MASTER_PORT=str(port),
        )

    def leave(self, timeout_s: float = 30.0) -> None:
        """Say good-bye. Rank 0 holds the board, so it waits for the others, after a failure at most ``timeout_s``."""
        left = self.count("left", 1)
        if self.rank == 0:
            give_up = time.monotonic() + timeout_s
            while left < self.size and not (self.failed and time.monotonic() > give_up):
                time.sleep(0.01)
                left = self.count("left")
        self._close()


def join_ranks() -> Ranks:
    """Find the other processes of this build by what the launcher left in the environment.

    Raises:
        SoftCoTError: the launcher started several processes that cannot find each other.
    """
    environ = os.environ
    if int(environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in environ:
        return _join_over_tcp()
    if any(name in environ for name in (*MPI_SIZE_VARIABLES, "PMIX_RANK")):
        return _join_over_mpi()
    return Ranks(0, 1, 0, 1, dist.HashStore(), "no launcher")


def _join_over_tcp() -> Ranks:
    """Ranks of the deepspeed launcher or torchrun."""
    environ = os.environ
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    served_by_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            environ["MASTER_ADDR"],
            int(environ["MASTER_PORT"]),
            is_master=rank == 0 and not served_by_agent,
            wait_for_workers=False,
            multi_tenant=True,  # torch.distributed may serve its own store on this port
        )
    except (KeyError, ValueError, dist.DistError) as error:
        raise SoftCoTError(
            f"rank {rank} of {size} finds no rank 0 at MASTER_ADDR={environ.get('MASTER_ADDR')} "
            f"MASTER_PORT={environ.get('MASTER_PORT')} ({error}); start the ranks with deepspeed, torchrun or mpirun"
        ) from error
    local_rank, local_size = int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    board = dist.PrefixStore(f"softcot-cache/{environ.get(MEETING, '')}", store)
    return Ranks(rank, size, local_rank, local_size, board, "torch.distributed")


def _join_over_mpi() -> Ranks:
    """Ranks of mpirun or srun --mpi."""
    announced = {name: os.environ[name] for name in MPI_SIZE_VARIABLES if os.environ.get(name, "").isdigit()}
    several = [f"{name}={value}" for name, value in announced.items() if int(value) > 1]
    try:
        from mpi4py import MPI  # starts MPI, so only where there is a launcher
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library for it
        if several:
            raise SoftCoTError(
                f"{several[0]}, but mpi4py does not load ({str(error).strip().splitlines()[0]}); "
                'install an MPI library, for example: pip install "softcot-ds[mpi]"'
            ) from error
        return Ranks(0, 1, 0, 1, dist.HashStore(), "no MPI")
    world = MPI.COMM_WORLD
    if world.size == 1 and several:
        raise SoftCoTError(
            f"the launcher started several processes ({several[0]}), but MPI sees only one: they are not connected and "
            "would all do the same work. Under SLURM use srun --mpi=pmix; otherwise use the mpirun of the MPI library "
            f"that mpi4py loads ({MPI.Get_library_version().split(',')[0]})"
        )
    if world.size == 1:
        return Ranks(0, 1, 0, 1, dist.HashStore(), "MPI")
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise SoftCoTError("this MPI library was started without support for threads (MPI_THREAD_SERIALIZED)")
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    board = _MpiBoard(MPI, world.Dup())
    return Ranks(world.rank, world.size, node.rank, node.size, board, "MPI", board.close)


class _MpiBoard:
    """A board over MPI messages: a thread of rank 0 answers the other ranks, so that rank 0 can work too.

    Waiting is done by sleeping between looks: MPI's own waiting takes a whole core, which on a small machine is one
    that computes. A look every millisecond is quick beside a batch.
    """

    _REQUEST, _REPLY = 1, 2

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()  # one thread at a time in here, and so in MPI
        self._closing = threading.Event()
        self._server = threading.Thread(target=self._serve, daemon=True, name="mpi-board")
        if comm.rank == 0:
            self._server.start()

    def add(self, key: str, amount: int) -> int:
        return self._request("add", key, amount)

    def set(self, key: str, value: str) -> None:
        self._request("set", key, value)

    def get(self, key: str) -> bytes:
        return self._request("get", key, None).encode()

    def check(self, keys: list[str]) -> bool:
        return all(self._request("check", key, None) for key in keys)

    def close(self) -> None:
        """Stop serving. MPI must not be finalized while a thread is inside of it."""
        self._closing.set()
        if self._server.is_alive():
            self._server.join()

    def _request(self, action: str, key: str, value: Any) -> Any:
        with self._lock:
            if self._comm.rank == 0:
                return self._answer(action, key, value)
            self._send([action, key, value], 0, self._REQUEST)
            return self._receive(0, self._REPLY)[1]

    def _answer(self, action: str, key: str, value: Any) -> Any:
        if action == "add":
            self._values[key] = self._values.get(key, 0) + value
        elif action == "set":
            self._values[key] = value
        elif action == "check":
            return key in self._values
        return self._values[key]

    def _serve(self) -> None:
        status = self._mpi.Status()
        while not self._closing.wait(0.001):
            with self._lock:
                while self._comm.Iprobe(self._mpi.ANY_SOURCE, self._REQUEST, status):
                    source, request = self._receive(status.Get_source(), self._REQUEST)
                    self._send(self._answer(*request), source, self._REPLY)

    def _send(self, value: Any, to: int, tag: int) -> None:
        self._comm.Send([json.dumps(value).encode(), self._mpi.BYTE], to, tag)

    def _receive(self, source: int, tag: int) -> tuple[int, Any]:
        status = self._mpi.Status()
        while not self._comm.Iprobe(source, tag, status):
            time.sleep(0.0005)
        message = bytearray(status.Get_count(self._mpi.BYTE))
        self._comm.Recv([message, self._mpi.BYTE], status.Get_source(), tag)
        return status.Get_source(), json.loads(message)
