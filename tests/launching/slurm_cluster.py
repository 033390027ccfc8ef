"""A SLURM of two nodes on this machine, under one folder: munge, controller and node daemons of its own.

    python -m tests.launching.slurm_cluster COMMAND ...    # runs it in such a cluster, e.g. sinfo

Needs root and Debian's slurm-wlm and munge, which it installs only where SHARDED_LAMB_INSTALL_DEBIAN=1 allows that.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import debian

PROGRAMS = {
    "munged": "munge",
    **dict.fromkeys(("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue"), "slurm-wlm"),
}
"""{program: Debian's package}"""
NODES = ("n1", "n2")

# A requeued job waits for cred_expire, by default two minutes; less than 5 is ignored.
_CONF = """
ClusterName=sharded-lamb-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=10 State=UP
"""


class SlurmError(RuntimeError):
    """There is no SLURM here, and why."""


class Cluster:
    """Commands in the environment of a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = {**own, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": debian.path()}

    def call(self, *command: str, cwd: Path | None = None, **settings: str) -> str:
        """Its output. Raises: SlurmError where it fails or takes a minute."""
        try:
            done = subprocess.run(
                command,
                env={**self.environment, **settings},
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            raise SlurmError(f"{command[0]} ended with {error.returncode}: {error.stderr}") from error
        except subprocess.TimeoutExpired as error:
            raise SlurmError(f"{command[0]} did not end") from error
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, true: Callable[[], bool], seconds: float = 120) -> None:
        """Raises: SlurmError, with the daemons' last words, where it does not come true in time."""
        wait_for(what, true, seconds, self.folder)


def wait_for(what: str, true: Callable[[], bool], seconds: float, folder: Path) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            logs = "".join(f"\n{path.name}:\n{path.read_text()[-1500:]}" for path in folder.glob("*.log"))
            raise SlurmError(f"{what} did not happen within {seconds:.0f} s{logs}")
        time.sleep(0.1)


def need_slurm() -> None:
    """Raises: SlurmError where there is none and none may be installed."""
    if os.geteuid() != 0:
        raise SlurmError("SLURM's daemons start jobs as other users, so they need root")
    if reason := debian.missing(PROGRAMS):
        raise SlurmError(reason)


@contextmanager
def slurm() -> Iterator[Cluster]:
    """A cluster with idle nodes n1 and n2. What was started ends with it. Raises: SlurmError."""
    need_slurm()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge wants its socket to be reached by all
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder)
        started: list[subprocess.Popen[bytes]] = []
        undo.callback(_end_all, folder, started)
        started.append(_start_munge(folder))
        ports = _free_ports(3)
        (folder / "slurm.conf").write_text(
            _CONF.format(host=socket.gethostname(), folder=folder, ports=ports)
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for command in (["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            started.append(_start(command, cluster.environment, folder))
        cluster.wait("idle nodes", lambda: _states(cluster) == ["idle", "idle"], 30)
        yield cluster


def _states(cluster: Cluster) -> list[str]:
    try:
        return cluster.call("sinfo", "-h", "-N", "-o", "%t").split()
    except SlurmError:  # the controller does not listen yet
        return []


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            free = held.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
        return ports


def _start(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / f"{command[0]}.out.log").open("a") as log:
        return subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _start_munge(folder: Path) -> subprocess.Popen[bytes]:
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = ("key-file=munge.key", "log-file=munge.log", "pid-file=munge.pid", "seed-file=munge.seed")
    file_options = [f"--{option.replace('=', f'={folder}/')}" for option in files]
    environment = {**os.environ, "PATH": debian.path(), "SLURM_CONF": str(folder / "slurm.conf")}
    command = ["munged", "--foreground", f"--socket={folder}/munge.socket", *file_options]
    started = _start(command, environment, folder)
    wait_for("munge's socket", (folder / "munge.socket").exists, 15, folder)
    return started


def _of_cluster(folder: Path) -> list[int]:
    """Daemons, steps and what jobs started: all have the cluster's SLURM_CONF in their environment."""
    mark = f"SLURM_CONF={folder}/slurm.conf\0".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes() and int(path.name) != os.getpid():
                pids.append(int(path.name))
        except OSError:
            continue
    return pids


def _end_all(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + seconds
        for pid in _of_cluster(folder):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while _of_cluster(folder) and time.monotonic() < end:
            time.sleep(0.05)
    for process in started:
        process.wait(10)


if __name__ == "__main__":
    with slurm() as made:
        sys.exit(subprocess.run(sys.argv[1:], env=made.environment).returncode)
