"""Ranks and devices, the same under the deepspeed launcher, under SLURM and alone."""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from softcot_ds.errors import LostRank, SoftCoTError
from softcot_ds.launchers import MEETING, alone_of
from softcot_ds.progress import tell

# DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, once a step and more: nothing a user can mend.
warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)

# DeepSpeed would compile a shared-memory all-reduce for CPU ranks, half a minute on each new machine; gloo has one.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_control_group: Any = None
_groups: dict[int | None, "Group"] = {}
"""Groups of ranks by the size that was asked for: each costs connections, and is made once."""


def device() -> torch.device:
    """This process's device: its GPU, or the CPU on a machine without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_distributed(timeout_minutes: float, cpu_only: bool = False) -> None:
    """Join the process group that a launcher describes in the environment; alone, be a group of one.

    Args:
        timeout_minutes: how long an operation of the ranks waits for those that are late, until ``set_timeout``.
        cpu_only: meet over gloo also where there are GPUs, which are not touched; DeepSpeed cannot be used then.

    Raises:
        SoftCoTError: a launcher started several processes that know nothing of each other (``srun -n 2``).
        LostRank: the ranks do not find each other, the port is taken, or the launcher's variables are wrong.

    The default timeout of PyTorch, ten minutes, is shorter than the loading of a large model.
    """
    if dist.is_initialized():
        return
    if not cpu_only and (several := alone_of()):
        raise SoftCoTError(
            f"{several}, but this process knows of no others: each would do all of the work, in one directory. Start "
            "one deepspeed per node, which starts the ranks (deepspeed --module softcot_ds.train RECIPE); under srun "
            "with --ntasks-per-node=1. To run alone, use srun -n 1"
        )
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    backend = "nccl" if device().type == "cuda" and not cpu_only else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device())
    timeout = timedelta(minutes=timeout_minutes)
    # DeepSpeed makes groups of its own, and takes PyTorch's default for them.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    global _control_group
    try:
        met = _met_apart(timeout)
        if cpu_only or met:
            dist.init_process_group(backend, timeout=timeout, **met)
        if not cpu_only:  # takes the ranks that have met as they are
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
        # Control messages travel over the CPUs: they never make a rank wait for its GPU.
        _control_group = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # no peers, no such address or interface; a variable is missing
        raise _cannot_meet(error) from error


def _met_apart(timeout: timedelta) -> dict[str, Any]:
    """Where and as what to meet under a name, see ``environment_apart``; empty where ranks meet under none."""
    if MEETING not in os.environ:
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    return {"store": dist.PrefixStore(os.environ[MEETING], store), "rank": rank, "world_size": world_size}


def set_timeout(minutes: float) -> None:
    """How long every operation of the ranks that begins from now on waits for those that are late; all ranks call it.

    Seen to be so over gloo. NCCL takes the value for its watchdog, by the same call.
    """
    if world_size() == 1:
        return
    barrier()  # a rank that is still busy with what may take longer would be given up otherwise
    if device().type == "cuda":
        torch.cuda.synchronize()
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def _cannot_meet(error: Exception) -> LostRank:
    environ = os.environ
    where = f"MASTER_ADDR={environ.get('MASTER_ADDR')} MASTER_PORT={environ.get('MASTER_PORT')}"
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return LostRank(
        f"rank {environ['RANK']} of {environ.get('WORLD_SIZE')} cannot meet the others at {where}: {reason}. Start the "
        "same command on every node, with the first one's address. If another job uses that port, start with "
        "deepspeed --master_port PORT; if this network does not connect the nodes, name the interface that does in "
        "GLOO_SOCKET_IFNAME"
    )


def lost_rank(error: RuntimeError) -> str | None:
    """What the transport said, when ``error`` means that another rank died or did not answer in time; else None."""
    text = str(error)
    if isinstance(error, dist.DistError) or "gloo" in text:
        # "[file:line] what happened. Advice that does not help"
        return text.splitlines()[0].partition("] ")[2].partition(". ")[0] or text.splitlines()[0]
    return None


def says_nothing(error: Exception) -> bool:
    """Whether what ended a trial says nothing about what was tried: no memory was left, or another rank is gone."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and bool(lost_rank(error)))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and writes for all."""
    return rank() == 0


def say(message: str) -> None:
    """Print on rank 0, at once: the output is usually a log file."""
    if is_main():
        tell(message)


@dataclass(frozen=True)
class Group:
    """The ranks that hold one copy of the frozen weights between them, this one among them."""

    size: int
    """How many they are; the same in every group."""
    number: int
    """Which of the groups this is: the first ranks are group 0."""
    count: int
    """How many groups there are."""
    rank: int
    """This rank's place within the group."""
    process_group: Any
    """Operations over these ranks alone: what PyTorch and DeepSpeed take as ``group``."""

    @classmethod
    def of(cls, size: int | None) -> "Group":
        """This rank's group. All ranks call it together; made once for each ``size``.

        Args:
            size: ranks of a group; None for the ranks of a node.

        Raises:
            SoftCoTError: the ranks do not fall apart into such groups; on every rank.
        """
        if size not in _groups:
            groups = split_ranks(from_all_ranks(int(os.environ.get("LOCAL_RANK", "0"))), size)
            number, place = divmod(rank(), len(groups[0]))
            made = dist.new_group(groups[number], use_local_synchronization=True)  # or all would have to make each
            _groups[size] = cls(len(groups[0]), number, len(groups), place, made)
        return _groups[size]


@dataclass(frozen=True)
class DataRanks:
    """Among whom data is divided: the ranks, or groups of ranks that work on the same part together."""

    number: int
    """Which part this rank works on."""
    count: int
    """How many parts there are."""
    alike: int = 1
    """How many ranks work on the same part."""
    is_first: bool = True
    """Whether this rank writes for those that work on the same part."""


def split_ranks(local_ranks: Sequence[int], size: int | None) -> list[list[int]]:
    """The ranks in groups of neighbours, all of one size.

    Whatever starts the ranks numbers those of a node from 0 on, and that alone tells the nodes: several may share a
    host name (virtual nodes), and launchers disagree about all other variables.

    Args:
        local_ranks: each rank's number on its node.
        size: ranks of a group; None for the ranks of a node.

    Raises:
        SoftCoTError: the nodes have different numbers of ranks, ``size`` does not divide the ranks, or a group would
            hold parts of several nodes.
    """
    ranks, nodes = range(len(local_ranks)), [[]]
    for rank, place in enumerate(local_ranks):
        if place == 0 and rank > 0:
            nodes.append([])
        nodes[-1].append(rank)
    if any(local_ranks[rank] != place for node in nodes for place, rank in enumerate(node)):
        raise SoftCoTError(
            f"the ranks of a node are no neighbours: their numbers on their nodes are {_listed(local_ranks)} in the "
            "order of ranks. Start them node by node (mpirun --map-by core, or one deepspeed per node)"
        )
    sizes = [len(node) for node in nodes]
    if size is None and len({*sizes}) > 1:
        raise SoftCoTError(
            f"the nodes have {_listed(sizes)} ranks, and each is to hold a whole copy of the weights: start as many on "
            "each, set backbone.group_size to a number that divides them all, or backbone.partition=zero3"
        )
    size = size or sizes[0]
    if len(ranks) % size:
        raise SoftCoTError(
            f"backbone.group_size={size} does not divide {len(ranks)} ranks: {len(ranks) % size} would be left without "
            "a whole copy of the weights; set one that does, or start another number of ranks"
        )
    groups = [list(ranks[start : start + size]) for start in range(0, len(ranks), size)]
    for group in groups:
        partly = [node for node in nodes if {*node} & {*group} and {*node} - {*group}]
        if partly and not {*group} <= {*partly[0]}:
            raise SoftCoTError(
                f"backbone.group_size={size} would put parts of several nodes into one group (ranks {group[0]} to "
                f"{group[-1]}), and the nodes have {_listed(sizes)} ranks: set a number that divides those of each "
                "node, or takes whole nodes"
            )
    return groups


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks; ``values`` is changed in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: int) -> int:
    """The largest value on any rank; the same answer on all."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_control_group)
    return int(largest)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on all."""
    return bool(max_over_ranks(int(flag)))


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier(group=_control_group)


def from_all_ranks(value: Any) -> list[Any]:
    """What each rank gives (it must be picklable), in the order of ranks; the same list on all."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_control_group)
    return values


def agreed(reason: str | None) -> str | None:
    """Why not, of the first rank that has a reason; the same answer on all, for what may fail, or be judged otherwise,
    on some."""
    return next((reason for reason in from_all_ranks(reason) if reason is not None), None)


def on_main(work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0 while the others wait; all return its result (which must be picklable).

    Raises:
        SoftCoTError: ``work`` raised one, or an OSError (a full disk); on every rank, so that none waits for ever.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (SoftCoTError, OSError) as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, group=_control_group)
    if outcome[1] is not None:
        raise SoftCoTError(outcome[1])
    return outcome[0]


def shut_down(code: int = 0, midway: bool = False) -> None:
    """Leave the process group; NCCL warns when a process ends without. After a failure nobody is waited for.

    Args:
        code: the exit code of this process.
        midway: an operation of the group has not ended, and never will. PyTorch's threads that wait for it would turn
            the end of the process into an abort, so this does not return: it ends the process with ``code``.
    """
    if not dist.is_initialized():
        return
    if midway and world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if not code:
        barrier()  # rank 0 serves the others' store: it leaves with them, not before
    _groups.clear()
    dist.destroy_process_group()


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
