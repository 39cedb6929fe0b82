"""The deepspeed launcher over ssh, on two nodes with an sshd each."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch import BIN, ROOT, deepspeed_command, environment, run
from slurm_cluster import SEARCH, Cluster

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SHORT = ["task.train_problems=96", "task.validation_problems=9", "task.test_problems=8", "thoughts.source=online"]
SHORT += ["training.steps=6", "training.warmup_steps=2", "training.save_every=6", "training.log_every=1"]

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


@pytest.fixture
def launcher(ssh, tmp_path):
    """The launcher's command line up to the module, and its environment."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    # A process started by ssh has the environment of a login. PYTHONPATH is passed on by the launcher itself.
    passed_on = {key: environment()[key] for key in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")} | {"DS_ACCELERATOR": "cpu"}
    (tmp_path / "variables").write_text("".join(f"{key}={value}\n" for key, value in passed_on.items()))
    command = ssh.command("node1", str(BIN / "deepspeed"), "--hostfile", f"{tmp_path}/hosts", "--module")
    return command, environment() | {"DS_ENV_FILE": f"{tmp_path}/variables", "DS_ACCELERATOR": "cpu"}


def losses(folder: Path) -> str:
    return (folder / "demo" / "losses.jsonl").read_text()


def test_two_nodes_over_ssh_train_as_two_ranks_of_one_machine(launcher, tmp_path):
    command, env = launcher
    training = ["softcot_ds.train", str(RECIPE), f"output_dir={tmp_path}/nodes", *SHORT]
    done = subprocess.run([*command, *training], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node1: demo: " in done.stdout
    assert " 2 ranks (cpu)" in done.stdout
    for node in ("node1", "node2"):
        assert f"{node}: [" in done.stdout, "a rank on each node"
    run(deepspeed_command(2, "softcot_ds.train", RECIPE, f"output_dir={tmp_path}/ranks", *SHORT), DS_ACCELERATOR="cpu")
    assert losses(tmp_path / "nodes") == losses(tmp_path / "ranks"), "bit for bit"
    assert len(losses(tmp_path / "nodes").splitlines()) == 6
    trainer = json.loads((tmp_path / "nodes/demo/checkpoints/step-6/trainer.json").read_text())
    assert trainer["summary"]["world_size"] == 2


def test_ctrl_c_saves_and_leaves_no_rank(launcher, cluster, tmp_path):
    command, env = launcher
    endless = [*SHORT, "training.steps=100000", "training.save_every=100000", "training.validate_every=100000"]
    process = subprocess.Popen(
        [*command, "softcot_ds.train", str(RECIPE), f"output_dir={tmp_path}", *endless],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    give_up = time.monotonic() + 120
    # The event file appears when the loop is about to start.
    while not (tmp_path / "demo/tensorboard").exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.1)
    ranks = {node: [p for p in cluster.processes(node) if "-m softcot_ds.train" in p.command] for node in cluster.nodes}
    assert [len(found) for found in ranks.values()] == [1, 1, 0]
    variables = Path(f"/proc/{ranks['node2'][0].pid}/environ").read_text().split("\0")
    assert {"OMP_NUM_THREADS=1", "DS_ACCELERATOR=cpu", "RANK=1", "WORLD_SIZE=2"} <= set(variables)
    # As a terminal does; nsenter, too, is in the group.
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    # The launcher does not wait for the ranks.
    give_up = time.monotonic() + 60
    while any("softcot_ds.train" in p.command for node in ranks for p in cluster.processes(node)):
        assert time.monotonic() < give_up, output
        time.sleep(0.1)
    assert len(list((tmp_path / "demo/checkpoints").glob("step-*/COMPLETE"))) == 1, output
