"""The deepspeed launcher over ssh, on two nodes with an sshd each."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch import BIN, ONLINE, ROOT, deepspeed_command, environment, run
from slurm_cluster import SEARCH, Cluster

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SHORT = ["task.train_problems=96", "task.validation_problems=9", "task.test_problems=8", *ONLINE]
SHORT += ["training.steps=4", "training.warmup_steps=2", "training.log_every=1", "evaluation.max_new_tokens=1"]

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


class Ssh:
    """Passwordless ssh between nodes, by keys and settings in a folder.

    Files of /etc/ssh are replaced in the view of the commands alone that run here.
    """

    def __init__(self, cluster: Cluster, folder: Path, nodes: list[str]):
        self.cluster = cluster
        self.folder = folder
        for name in ("host_key", "user_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(keygen, check=True, stdin=subprocess.DEVNULL)
        host_key = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"{','.join(nodes)} {host_key}")
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\nBatchMode yes\n"
        )
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPermitRootLogin yes\n"
            "StrictModes no\nUsePAM no\nPidFile none\n"
        )
        sshd = f"mkdir /run/sshd && exec {shutil.which('sshd', path=SEARCH)} -D -e -f {folder}/sshd_config"
        self.servers = []
        for node in nodes:
            with open(folder / f"sshd.{node}.log", "w") as log:
                command = self._with_mounts(node, "mount -t tmpfs tmpfs /run", "sh", "-c", sshd)
                self.servers.append(subprocess.Popen(command, stdout=log, stderr=log))
        for node in nodes:
            give_up = time.monotonic() + 10
            while subprocess.run(self.command(nodes[0], "ssh", node, "true"), capture_output=True).returncode:
                assert time.monotonic() < give_up, (folder / f"sshd.{node}.log").read_text()
                time.sleep(0.1)

    def command(self, node: str, *command: str) -> list[str]:
        """What runs a command on a node, in the checkout, with ssh to the others."""
        return self._with_mounts(node, f"mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config", *command)

    def _with_mounts(self, node: str, mounts: str, *command: str) -> list[str]:
        script = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
        return self.cluster.on_node(node, *script, *command, cwd=ROOT)

    def stop(self) -> None:
        # nsenter waits for what it started, which is in another namespace of processes and is not killed with it.
        for node in self.cluster.nodes:
            for process in self.cluster.processes(node):
                if process.command.startswith("sshd"):
                    os.kill(process.pid, signal.SIGKILL)
        for server in self.servers:
            server.wait(10)


@pytest.fixture(scope="module")
def ssh(cluster, tmp_path_factory):
    missing = [name for name in ("ssh", "ssh-keygen", "sshd", "pdsh") if shutil.which(name, path=SEARCH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}; Debian: apt-get install openssh-server openssh-client pdsh")
    ssh = Ssh(cluster, tmp_path_factory.mktemp("ssh"), cluster.nodes[:2])
    yield ssh
    ssh.stop()


def test_two_nodes_over_ssh_train_as_two_ranks_of_one_machine(ssh, cluster, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    # What ssh starts has the environment of a login: the launcher passes on PYTHONPATH, and these by this file.
    passed_on = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    (tmp_path / "variables").write_text("".join(f"{key}={value}\n" for key, value in passed_on.items()))
    arguments = ["--module", "softcot_ds.train", str(RECIPE), f"output_dir={tmp_path}/nodes", *SHORT]
    process = subprocess.Popen(
        ssh.command("node1", str(BIN / "deepspeed"), "--hostfile", f"{tmp_path}/hosts", *arguments),
        env=environment() | {"DS_ACCELERATOR": "cpu", "DS_ENV_FILE": f"{tmp_path}/variables"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    ranks: dict[str, dict[str, str]] = {}
    give_up = time.monotonic() + 120
    while len(ranks) < 2 and process.poll() is None and time.monotonic() < give_up:
        for node in ("node1", "node2"):
            for rank in cluster.processes(node):
                if "-m softcot_ds.train" in rank.command:
                    words = Path(f"/proc/{rank.pid}/environ").read_text().split("\0")
                    ranks[node] = dict(word.partition("=")[::2] for word in words)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "node1: demo: " in output
    assert " 2 ranks (cpu), ZeRO stage 3" in output
    assert {node: variables["RANK"] for node, variables in ranks.items()} == {"node1": "0", "node2": "1"}
    assert passed_on.items() <= ranks["node2"].items()

    run(deepspeed_command(2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}/ranks", *SHORT), DS_ACCELERATOR="cpu")
    curve, truth = ((tmp_path / name / "demo/losses.jsonl").read_text() for name in ("nodes", "ranks"))
    assert len(curve.splitlines()) == 4
    assert curve == truth, "bit for bit"
