"""What launchers tell the processes that they start, in the environment."""

import os

# Each launcher tells a process in one of these how many there are.
MPI_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
"""And its own number among them, from 0."""


def alone_of() -> str:
    """What says that a launcher started this process as one of several, of which torch's variables say nothing:
    ``SLURM_STEP_NUM_TASKS=4``, or an empty text. Such processes would each do all of the work."""
    environ = os.environ
    if "RANK" in environ:
        return ""
    several = [f"{name}={environ[name]}" for name in MPI_SIZE_VARIABLES if environ.get(name, "") not in ("", "1")]
    later = [f"{name}={environ[name]}" for name in _RANK_VARIABLES if environ.get(name, "") not in ("", "0")]
    return (several + later + [""])[0]


MEETING = "SOFTCOT_MEETING"
"""Variable with the name under which ranks meet that are not the first to meet in a store."""


def environment_apart(name: str) -> dict[str, str]:
    """For a process that each rank starts: those of one name meet as their parents would.

    torchrun's agent has one store for all that a rank starts, one after the other; there what the ones before have left
    would be taken for the ranks that are to be met.
    """
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ | ({MEETING: name} if served_by_agent else {})


def launched_ranks() -> int:
    """How many ranks torch's variables speak of, whether or not they have met; 1 alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))
