"""A real SLURM cluster on this machine: munged, slurmctld, and virtual nodes with a slurmd each.

A node is a set of namespaces: network, host name, IPC, mounts, processes. It has its own address and its own /dev/shm,
and killing its first process ends all of it. The file system is shared, as the folder of a run is on a cluster.

This machine is the head node. The bridge between the nodes stands in a network namespace of its own, so that a link of
the head node is all that lies outside, and everything goes with the processes. These die with the thread that started
them, also when that is killed. Needs root; changes nothing in /etc.
"""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from launch import environment

CPUS = 4
PACKAGES = "munge slurmctld slurmd slurm-client libpmix-dev iproute2"
PROGRAMS = {
    "SLURM": ["munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo"],
    "iproute2": ["ip"],
    "util-linux": ["unshare", "nsenter", "setpriv", "mount"],
}
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY"}
START_S = 30
"""Seconds that the daemons get to start; a busy machine is slow."""

SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NODE_NAMESPACES = "--net --uts --ipc --mount --pid --mount-proc".split()

# The first process of a node. Arguments: state folder, name, address, address of the head node.
# - No resolver can be reached from a node: asking one would cost torch 10 s.
# - slurmd -b says that the node has booted, which ends what the controller believes to be running there.
# - Bash reaps what loses its parent, and stays when slurmd ends.
NODE_INIT = """\
set -e
read -r _ || true  # ends when the link is there
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
ip addr add "$3/24" dev eth0
ip link set eth0 up
ip route add default via "$4"
slurmd -b -D -N "$2" -f "$1/slurm.conf" &
sleep infinity &
wait
"""

CONFIGURATION = """\
ClusterName=test{number}
SlurmctldHost={head}({address}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the time that a requeued job waits: 120 s unless it says 5 or more.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
# PMIx makes folders here that must not be those of another node; /dev/shm is each node's own.
TmpFS=/dev/shm
# No control groups: neither memory limits nor the binding to CPUs are enforced.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
# Nodes are shared by CPU, and claim more than this machine has.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
# The controller reacts at once.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=1
CompleteWait=0
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=3
# Nodes report to the controller directly.
TreeWidth=65533
ReturnToService=1
JobRequeue=1
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs={cpus} RealMemory=1000000 Gres=gpu:1 State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=main Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


def _program(name: str) -> str:
    found = shutil.which(name, path=SEARCH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def why_unavailable() -> str | None:
    """None where a cluster can be started, else a sentence for ``pytest.skip``."""
    for package, programs in PROGRAMS.items():
        missing = [program for program in programs if shutil.which(program, path=SEARCH) is None]
        if missing:
            return f"{package} is not installed (no {', '.join(missing)}); Debian: apt-get install {PACKAGES}"
    if not any(Path("/usr/lib").glob("**/libpmix.so")):
        return f"SLURM cannot start MPI programs (no libpmix.so); Debian: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "a SLURM cluster needs root, for network namespaces"
    # A namespace like a node's, with a bridge and a pair of links in it; all of it goes when the command ends.
    probe = "ip link add name one type bridge && ip link add name two type veth && mount -t tmpfs tmpfs /dev/shm"
    command = [_program("unshare"), *NODE_NAMESPACES, "--fork", "bash", "-c", probe]
    tried = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": SEARCH})
    if tried.returncode:
        return f"this machine does not permit network namespaces: {tried.stderr.strip()}"
    return None


class Process(NamedTuple):
    pid: int
    """As seen from the head node, for ``os.kill``."""
    command: str
    """The command line, its arguments joined by spaces."""


class Cluster:
    """A SLURM cluster of virtual nodes with 4 CPUs and a GPU each, which is none: its device is /dev/null's.

    Partitions over all nodes: ``main``, the default one, and ``urgent``, whose jobs preempt those of ``main``. The
    steps of a preempted job get SIGTERM at once, its batch script gets nothing. If it has not ended after 20 s, the
    grace time, the job is requeued when SLURM next looks at time limits, which it does every 30 s.
    """

    def __init__(self, folder: Path, nodes: int = 3):
        """
        Args:
            folder: for everything that the cluster writes; short, as sockets lie in it.
            nodes: how many; they are called node1, node2, ...
        """
        self.folder = Path(folder).resolve()
        self.nodes = [f"node{index}" for index in range(1, nodes + 1)]
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        """What a client needs in its environment."""
        self._daemons: dict[str, subprocess.Popen] = {}
        self._address = ""
        """The first three numbers of the cluster's addresses; the fourth is 1 for the head node, 10 + i for node i."""
        self._link = ""
        """The head node's link to the bridge; its number is in the addresses and the port, as it is unique here."""

    def start(self) -> None:
        """Start what is not running and wait until all nodes are idle. To be called from a thread that stays.

        Raises:
            RuntimeError: they do not become idle, with the last lines of the daemons' logs; nothing runs then.
        """
        if self._daemons:
            return
        atexit.register(self.stop)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._socket.unlink(missing_ok=True)
            for name in ("controller", *(f"spool.{node}" for node in self.nodes)):
                shutil.rmtree(self.folder / name, ignore_errors=True)  # of a cluster that ran here before
                (self.folder / name).mkdir()
            number = self._connect()
            self._configure(number)
            key = self.folder / "munge.key"
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
            self._start_daemon(
                # --force: the folder may be closed to other users, who have no business here.
                "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._socket}",
                f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                f"--seed-file={self.folder}/munged.seed",
            )  # fmt: skip
            self._wait("munged to answer", self._socket.is_socket)
            self._start_daemon("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
            for node in self.nodes:
                self._power_on(node)
            self._wait("idle nodes", lambda: all(state == "idle" for state in self._states().values()))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything that was started. Files stay in the folder."""
        for node in self.nodes:
            self._power_off(node)
        for name in ("slurmctld", "munged", "bridge"):
            if name in self._daemons:
                _kill(self._daemons.pop(name))
        if self._link:  # gone already, or about to
            self._ip("link", "del", self._link, check=False)
            self._link = ""
        atexit.unregister(self.stop)

    def run(
        self, *command: str, timeout: float = 60, check: bool = True, cwd: Path | None = None, env: dict | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command (sbatch, scontrol, ...) on the head node.

        Args:
            check: a failure is an AssertionError that shows the output.
            env: variables on top of ``launch.environment()``.
        """
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=environment() | self.env | (env or {}), text=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def on_node(self, node: str, *command: str, cwd: Path | str = "/") -> list[str]:
        """The command that runs ``command`` on a node, in the folder ``cwd``."""
        init = str(self._init(node))
        return [_program("nsenter"), "-t", init, "-a", "env", f"--chdir={cwd}", *map(str, command)]

    def processes(self, node: str) -> list[Process]:
        """Everything that runs on a node."""
        space = os.readlink(f"/proc/{self._init(node)}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            # A process may end while we look at it.
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/pid") == space:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found.append(Process(int(entry.name), " ".join(words).strip()))
        return found

    def fail(self, node: str) -> None:
        """Power off: everything on the node dies, and the controller is told at once."""
        self._power_off(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def revive(self, node: str) -> None:
        """Power on again after ``fail``, and wait until the node is idle."""
        if node not in self._daemons:
            self._power_on(node)
        # A node that was said to be down does not come back by itself: a last sign of life of one that was just powered
        # off would bring it back otherwise.
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self._wait(f"{node} to be idle", lambda: self._states().get(node) == "idle")

    def job(self, job_id: int) -> dict[str, str]:
        """What ``scontrol show job`` says; of a job array, about its first task."""
        # Without -o, a value that may hold spaces or '=' ends with its line.
        free = {"JobName", "Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment", "AdminComment"}
        record: dict[str, str] = {}
        for line in self.run("scontrol", "show", "job", str(job_id)).stdout.split("\n\n")[0].splitlines():
            rest = line.strip()
            while rest:
                key, _, value = rest.partition("=")
                value, _, rest = (value, "", "") if key in free else value.partition(" ")
                record[key] = value
        return record

    def wait_for(self, job_id: int, states: set[str], timeout: float) -> dict[str, str]:
        """The job's record as soon as its JobState is one of ``states``.

        Raises:
            AssertionError: not in ``timeout`` seconds, or never, as the job has ended in another state; with the record
                and the end of the job's output.
        """
        give_up = time.monotonic() + timeout
        while True:
            record = self.job(job_id)
            if record["JobState"] in states:
                return record
            late = time.monotonic() > give_up
            if late or record["JobState"] in FINAL:
                fields = "\n".join(f"{key}={value}" for key, value in record.items())
                output = _tail(Path(record.get("StdOut", "")), 60)
                reason = f"not {' or '.join(sorted(states))}" + (f" after {timeout} s" if late else "")
                raise AssertionError(f"job {job_id} is {record['JobState']}, {reason}\n{fields}\n{output}")
            time.sleep(0.1)

    # Daemons

    @property
    def _socket(self) -> Path:
        return self.folder / "munge.sock"

    def _start_daemon(self, name: str, *command: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen:
        # Its own namespace of processes: what a daemon starts dies with it.
        private = ["--pid"] if name in ("munged", "slurmctld") else NODE_NAMESPACES
        wrapped = [_program("setpriv"), "--pdeathsig", "KILL", _program("unshare"), *private, "--fork", "--kill-child"]
        with open(self.folder / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                [*wrapped, *command], cwd=self.folder, env=environment() | self.env | {"PATH": SEARCH}, stdin=stdin,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return self._daemons[name]

    def _wait(self, what: str, condition) -> None:
        give_up = time.monotonic() + START_S
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > give_up:
                reason = f"{', '.join(dead)} ended" if dead else f"not in {START_S} s"
                logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
                raise RuntimeError("\n".join([f"waited for {what}: {reason}", *(_tail(log, 15) for log in logs)]))
            time.sleep(0.02)

    def _states(self) -> dict[str, str]:
        """State by node; empty while the controller does not answer."""
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t", check=False).stdout
        return dict.fromkeys(self.nodes, "") | dict(line.split() for line in listed.splitlines())

    # Nodes

    def _power_on(self, node: str) -> None:
        number = self.nodes.index(node)
        address = f"{self._address}.{11 + number}"
        arguments = [str(self.folder), node, address, f"{self._address}.1"]
        daemon = self._start_daemon(node, "bash", "node-init.sh", *arguments, stdin=subprocess.PIPE)
        self._wait_for_namespace(daemon)
        self._on_bridge("ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", str(daemon.pid))
        self._on_bridge("ip", "link", "set", node, "master", "bridge", "up")
        daemon.stdin.close()

    def _power_off(self, node: str) -> None:
        if node in self._daemons:
            # First the link: dying processes would say good-bye to their peers, which a dead machine does not.
            self._on_bridge("ip", "link", "del", node, check=False)
            _kill(self._daemons.pop(node))

    def _init(self, node: str) -> int:
        """The node's first process, as seen from the head node."""
        children = _children(self._daemons[node].pid) if node in self._daemons else []
        if not children:
            raise RuntimeError(f"{node} is off")
        return children[0]

    # Network

    def _connect(self) -> int:
        """A bridge in a namespace of its own and a link to it, whose number no other cluster here has."""
        bridge = self._start_daemon("bridge", "sleep", "infinity")
        self._wait_for_namespace(bridge)
        self._on_bridge("ip", "link", "add", "bridge", "type", "bridge")
        self._on_bridge("ip", "link", "set", "bridge", "up")
        for number in range(1, 250):
            link = f"slurmtest{number}"
            # Fails where another cluster has this name.
            peer = ["type", "veth", "peer", "name", "head", "netns", str(bridge.pid)]
            made = self._ip("link", "add", link, *peer, check=False)
            if made.returncode == 0:
                break
            if "File exists" not in made.stderr:
                raise RuntimeError(f"no link to the nodes: {made.stderr}")
        else:
            raise RuntimeError("249 clusters run here already; `ip link` shows their links slurmtestN")
        self._link = link
        # A network that the Internet does not use: it is kept for tests (RFC 2544).
        self._address = f"198.18.{number}"
        self._ip("addr", "add", f"{self._address}.1/24", "dev", link)
        self._ip("link", "set", link, "up")
        self._on_bridge("ip", "link", "set", "head", "master", "bridge", "up")
        return number

    def _wait_for_namespace(self, daemon: subprocess.Popen) -> None:
        ours = os.readlink("/proc/self/ns/net")
        # unshare enters its namespaces and then forks.
        self._wait("a namespace", lambda: os.readlink(f"/proc/{daemon.pid}/ns/net") != ours and _children(daemon.pid))

    def _on_bridge(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._command(_program("nsenter"), "-t", str(self._daemons["bridge"].pid), "-n", *command, check=check)

    def _ip(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._command(_program("ip"), *arguments, check=check)

    def _command(self, *command: str, check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": SEARCH})
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done

    # Files

    def _configure(self, number: int) -> None:
        head = socket.gethostname().split(".")[0]
        addresses = {node: f"{self._address}.{11 + index}" for index, node in enumerate(self.nodes)}
        configuration = CONFIGURATION.format(
            number=number, head=head, address=self._address, folder=self.folder, port=17300 + number, cpus=CPUS,
            nodes="\n".join(f"NodeName={node} NodeAddr={address}" for node, address in addresses.items()),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "node-init.sh").write_text(NODE_INIT)
        # slurmd 22.05 loads a control group plugin in any case, and finding out which one fails here.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gpu = self.folder / "gpu"
        gpu.unlink(missing_ok=True)
        os.mknod(gpu, 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={gpu}\n")
        hosts = {"localhost": "127.0.0.1", head: f"{self._address}.1"} | addresses
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        services = Path("/etc/nsswitch.conf").read_text().splitlines()
        kept = [line for line in services if not line.startswith("hosts:")]
        (self.folder / "nsswitch.conf").write_text("\n".join([*kept, "hosts: files", ""]))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill(daemon: subprocess.Popen) -> None:
    """End a daemon and all processes of its namespace; returns when they are gone."""
    for child in _children(daemon.pid):  # unshare waits for it, and it for everything in its namespace
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    if daemon.stdin:
        daemon.stdin.close()


def _tail(path: Path, lines: int) -> str:
    text = path.read_text(errors="replace") if path.is_file() else ""
    return f"--- {path}\n" + "\n".join(text.splitlines()[-lines:])
