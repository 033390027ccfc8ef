"""`launch/slurm.sbatch`: what it runs, what it refuses, and jobs in a SLURM of two nodes on this machine."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from sharded_lamb.checkpoint import read_contents
from tests import debian, interpreter
from tests.bert import conftest as bert
from tests.bert.test_train import trained
from tests.launching.slurm_cluster import Cluster, SlurmError, slurm
from tests.training import assert_same_bits

corpus, tree = bert.corpus, bert.tree  # fixtures

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
SETTINGS = ("LAUNCH", "INTERFACE", "CONTAINER", "CONTAINER_WITH", "SRUN_ARGS", "RESUME_ARGS", "REQUEUE_CODE")
SETTINGS += ("NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "LOG_DIR", "VIRTUAL_ENV")
SETTINGS += ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PREFLIGHT", "PREFLIGHT_ARGS", "SHARDED_LAMB_ROOT", "DRY_RUN")
RECIPE = ("-m", "sharded_lamb.bert", "--config", "a b.yaml")
STEP = "--distribution=block --kill-on-bad-exit=0 --wait=120"
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
WAITS = "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100"
TASK = f"bash {ROOT}/launch/slurm.sbatch --task"


def call(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """As outside SLURM, without the settings of whoever runs the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("SLURM")}
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**kept, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def printed(*arguments: str, **settings: str) -> list[str]:
    done = call(*arguments, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    lines = []
    for line in done.stdout.splitlines():
        words = line.split() if line.startswith("#") else shlex.split(line)
        lines.append(" ".join("python" if word.endswith("/bin/python") else word for word in words))
    return lines


def test_torchrun_on_every_node() -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a,b,c", "SLURM_JOB_NAME": "big"}
    more = {
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_NODEID": "2",
        "INTERFACE": "ib0",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_NTASKS_PER_NODE": "1",
        "SRUN_ARGS": "--mpi=none",
        "PREFLIGHT_ARGS": "--gbits 200",
    }
    srun = f"srun --nodes=3 --ntasks=3 --ntasks-per-node=1 {STEP} --mpi=none --cpus-per-task=96"
    logs = f"--output={ROOT}/logs/big-4711/node-%n.log --open-mode=append"
    assert printed(*RECIPE, **job, **more) == [
        f"{srun} {TASK} -m sharded_lamb preflight --world-size=24 --gbits 200",
        f"{srun} {logs} {TASK} -m sharded_lamb.bert --config a b.yaml",
        "# where SLURM_NODEID=2 SLURM_PROCID=0 SLURM_LOCALID=0:",
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 TP_SOCKET_IFNAME=ib0",
        WAITS,
        "python -m torch.distributed.run --nnodes=3 --nproc-per-node=8 --node-rank=2 --master-addr=a "
        f"--master-port=14711 --max-restarts=3 {SIGNALS} -m sharded_lamb.bert --config a b.yaml",
    ]


def test_one_task_a_rank() -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a,b", "SLURM_NTASKS_PER_NODE": "4", "LAUNCH": "srun"}
    task = {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1", "LOG_DIR": "/logs"}
    assert printed("train.py", "x", PREFLIGHT="0", **job, **task) == [
        f"srun --nodes=2 --ntasks=8 --ntasks-per-node=4 {STEP} --output=/logs/rank-%t.log --open-mode=append "
        f"{TASK} train.py x",
        "# where SLURM_NODEID=1 SLURM_PROCID=6 SLURM_LOCALID=2:",
        "export RANK=6 WORLD_SIZE=8 LOCAL_RANK=2 LOCAL_WORLD_SIZE=4",
        "python train.py x",
    ]


@pytest.mark.parametrize(
    ("program", "settings", "end"),
    [
        (RECIPE, {}, "a b.yaml --resume auto"),
        ((*RECIPE, "--resume", "old"), {}, "a b.yaml --resume old"),
        (RECIPE, {"RESUME_ARGS": ""}, "a b.yaml"),
        (("train.py",), {}, "train.py"),
        (("train.py",), {"RESUME_ARGS": "--from last"}, "train.py --from last"),
    ],
)
def test_a_job_that_was_queued_again_goes_on(
    program: tuple[str, ...], settings: dict[str, str], end: str
) -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a", "PREFLIGHT": "0"}
    assert printed(*program, SLURM_RESTART_COUNT="2", **job, **settings)[-1].endswith(f" {end}")
    first = printed(*program, **job, **settings)[-1]
    assert first.endswith(" ".join(program))


def test_containers() -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a", "PREFLIGHT": "0", "CONTAINER": "image.sif"}
    line = printed("train.py", **job)[0]
    assert line.endswith(f" apptainer exec --nv --bind {ROOT} --pwd {ROOT} image.sif {TASK} train.py")
    line = printed("train.py", CONTAINER_WITH="pyxis", **job)[0]
    options = f"--container-image=image.sif --container-mounts={ROOT}:{ROOT} --container-workdir={ROOT}"
    assert f" {options} " in line
    assert line.endswith(f" {TASK} train.py")


def test_jobs_and_array_tasks_beside_each_other_have_ports_of_their_own() -> None:
    def port(job: int, task: int | None) -> str:
        array = {} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}
        lines = printed("x.py", SLURM_JOB_ID=str(job), SLURM_JOB_NODELIST="a", PREFLIGHT="0", **array)
        (results,) = (word for word in lines[-1].split() if word.startswith("--master-port="))
        return results.removeprefix("--master-port=")

    # SLURM numbers the tasks of an array from the array's own number on; it keeps that for the last one.
    # Some sites' wrappers hand the array's number to all of them.
    ports = [port(job, task) for job, task in [(99, 0), (100, 1), (98, 2), (98, 0), (101, None), (19_999, 3)]]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= int(results) < 30_000 for results in ports)


JOB = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a"}


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        ([], JOB, "what should run?"),
        (["x.py"], {}, "this is no SLURM job"),
        (["x.py"], {**JOB, "LAUNCH": "mpirun"}, "LAUNCH must be torchrun or srun, got 'mpirun'"),
        (["x.py"], {**JOB, "NPROC_PER_NODE": "all"}, "NPROC_PER_NODE must be a number, got 'all'"),
        (["x.py"], {**JOB, "CONTAINER": "a", "CONTAINER_WITH": "docker"}, "apptainer or pyxis, got 'docker'"),
        (["x.py"], {**JOB, "SLURM_JOB_NODELIST": "a["}, "scontrol does not read SLURM_JOB_NODELIST='a['"),
        (["x.py"], {"SHARDED_LAMB_ROOT": "/nowhere"}, "/nowhere is not the repository"),
        (
            ["x.py"],
            {**JOB, "LAUNCH": "srun", "NPROC_PER_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"},
            "sbatch --ntasks-per-node=8 (the job has 1)",
        ),
    ],
)
def test_refusals(program: list[str], settings: dict[str, str], message: str) -> None:
    refused = call(*program, DRY_RUN="1", **settings)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1, refused.stderr


def test_missing_tools_are_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "getent"):
        (tools / name).symlink_to(f"/usr/bin/{name}")

    def refusal(**settings: str) -> str:
        refused = call("x.py", PATH=str(tools), **JOB, **settings)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        return refused.stderr

    assert "no scontrol on PATH; install SLURM's client" in refusal()
    for name, text in (("scontrol", "echo a"), ("srun", "")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    assert "the first node's name 'a' does not resolve here; set MASTER_ADDR" in refusal()
    assert "no apptainer on PATH" in refusal(MASTER_ADDR="127.0.0.1", CONTAINER="image.sif")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with slurm() as made:
            yield made
    except SlurmError as error:
        if debian.wanted():
            raise  # where it is wanted, none is a failure
        pytest.skip(str(error))


class Jobs:
    """Runs of one configuration, each in a folder of its own."""

    def __init__(self, cluster: Cluster, tree: dict[str, Any], folder: Path) -> None:
        self.cluster, self.tree, self.folder = cluster, tree, folder
        self.numbers: dict[str, str] = {}

    def program(self, name: str) -> list[str]:
        config = self.folder / name / "config.yaml"
        config.parent.mkdir()
        config.write_text(yaml.safe_dump({**self.tree, "run_dir": str(config.parent / "run")}))
        return ["-m", "sharded_lamb.bert", "--config", str(config)]

    def submit(self, name: str, **settings: str) -> None:
        """On two nodes of one rank, whose names do not resolve."""
        where = {"VIRTUAL_ENV": str(interpreter.prefix()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        where |= {"MASTER_ADDR": "127.0.0.1", "INTERFACE": "lo", "LOG_DIR": str(self.folder / name / "logs")}
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.folder / name}/job.out", str(SCRIPT)]
        said = self.cluster.call(*command, *self.program(name), cwd=ROOT, **where, **settings)
        self.numbers[name] = said.strip()

    def wait(self, what: str, name: str, true: Callable[[], bool]) -> None:
        """AssertionError, with the last words of the job, where it does not come true in time."""
        try:
            self.cluster.wait(what, true)
        except SlurmError as error:
            logs = [path for path in (self.folder / name).rglob("*") if path.suffix in (".out", ".log")]
            raise AssertionError(
                f"{error}\n" + "\n".join(path.read_text()[-3000:] for path in logs)
            ) from error

    def finished(self, name: str, state: str) -> dict[str, str]:
        """What SLURM says of it when it is over."""
        job = self.numbers[name]
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait("the job's end", name, lambda: self.cluster.job(job)["JobState"] in over)
        results = self.cluster.job(job)
        assert results["JobState"] == state, self.said(name)
        return results

    def said(self, name: str) -> str:
        return (self.folder / name / "job.out").read_text()

    def steps(self, name: str) -> int:
        path = self.folder / name / "run" / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def weights(self, name: str) -> dict[str, Tensor]:
        return read_contents(self.folder / name / "run" / "checkpoints" / f"step-{STEPS:08}").weights


STEPS = 60
# LAUNCH, and to whom USR1 goes: to the tasks alone, as `scancel --signal=USR1 JOB` sends it, or to the script
# alone, as SLURM does before the time is up.
STOPPED = {"torchrun": ("torchrun", []), "ranks": ("srun", ["--batch"])}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs at once, since a job that is queued again waits; and one finished run, of two ranks on one host."""
    config = {
        **tree,
        "phases": [{**tree["phases"][0], "steps": STEPS}],
        "speed": {**tree["speed"], "threads": 1},
    }
    config["checkpoint"] = {"every_steps": 1000, "keep": 0}
    results = Jobs(cluster, config, tmp_path_factory.mktemp("slurm"))
    trained(2, config, results.folder / "whole" / "run")

    left = dict(STOPPED)
    for name, (launch, _) in STOPPED.items():
        results.submit(name, LAUNCH=launch, PREFLIGHT="0")
    results.submit("plain", PREFLIGHT_ARGS="--mb=0")
    results.submit("fails", LAUNCH="srun", PREFLIGHT_ARGS="--world-size=3")

    def all_signalled() -> bool:
        for name in [name for name in left if results.steps(name) >= 5]:
            cluster.call("scancel", "--signal=USR1", *left.pop(name)[1], results.numbers[name])
        return not left

    results.wait("5 steps of each job", "torchrun", all_signalled)
    return results


def test_a_job_on_two_nodes_has_the_bits_of_one_host(jobs: Jobs) -> None:
    assert jobs.finished("plain", "COMPLETED")["Restarts"] == "0"
    assert "preflight: 2 ranks on 1 hosts" in jobs.said("plain")
    logs = sorted(path.name for path in (jobs.folder / "plain" / "logs").iterdir())
    assert logs == ["node-0.log", "node-1.log"]
    assert_same_bits(jobs.weights("plain"), jobs.weights("whole"))


@pytest.mark.parametrize("name", STOPPED)
def test_usr1_saves_and_the_job_goes_on_later_with_the_same_bits(jobs: Jobs, name: str) -> None:
    assert jobs.finished(name, "COMPLETED")["Restarts"] == "1"
    assert jobs.said(name).count("slurm.sbatch: stopped after saving; queued again") == 1
    (saved, _) = sorted((jobs.folder / name / "run" / "checkpoints").glob("step-*"))
    assert 5 <= int(saved.name.removeprefix("step-")) < STEPS
    rows = (jobs.folder / name / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    assert_same_bits(jobs.weights(name), jobs.weights("whole"))


def test_a_job_that_fails_is_not_queued_again(jobs: Jobs) -> None:
    assert jobs.finished("fails", "FAILED")["Restarts"] == "0"
    assert "there are 2 ranks and 3 were expected" in jobs.said("fails")
    assert "slurm.sbatch: error: the preflight failed" in jobs.said("fails")
