"""`launch/torchrun.sh` and `launch/cluster-local`: what they run, what they refuse, and hosts that are namespaces."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_lamb.cluster import local as cluster
from sharded_lamb.cluster.namespaces import Host

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "torchrun.sh"
TORCHRUN = "python -m torch.distributed.run"
SETTINGS = (
    "NNODES",
    "NODE_RANK",
    "NPROC_PER_NODE",
    "RDZV",
    "RDZV_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
    "IS_HOST",
)
SETTINGS += (
    "INTERFACE",
    "LOCAL_ADDR",
    "MAX_RESTARTS",
    "LOG_DIR",
    "PREFLIGHT",
    "PREFLIGHT_ARGS",
    "VIRTUAL_ENV",
)


def call(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Without the settings of whoever runs the tests."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [SCRIPT, *arguments], env={**environment, **settings}, capture_output=True, text=True, timeout=100
    )


def printed(*arguments: str, **settings: str) -> list[str]:
    done = call("--dry-run", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    words = [shlex.split(line) for line in lines]
    return [
        shlex.join([w.rsplit("/", 1)[-1] if w.endswith("/python") else w for w in line]) for line in words
    ]


def test_one_host() -> None:
    same = "--nnodes=1 --nproc-per-node=4"
    where = "--node-rank=0 --master-addr=127.0.0.1 --master-port=29500"
    assert printed("-m", "sharded_lamb.bert", "--config", "a b.yaml", NPROC_PER_NODE="4") == [
        f"{TORCHRUN} {same} --max-restarts=0 {where} -m sharded_lamb preflight --world-size=4",
        f"{TORCHRUN} {same} --max-restarts=3 {where} -m sharded_lamb.bert --config 'a b.yaml'",
    ]


def test_many_hosts_that_are_told_their_ranks() -> None:
    settings = {
        "NNODES": "16",
        "NODE_RANK": "3",
        "NPROC_PER_NODE": "8",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "7",
    }
    more = {"INTERFACE": "ib0", "PREFLIGHT_ARGS": "--config a.yaml --gbits 200", "LOG_DIR": "logs"}
    same = "--nnodes=16 --nproc-per-node=8"
    where = "--node-rank=3 --master-addr=node0 --master-port=7"
    assert printed("train.py", MAX_RESTARTS="0", **settings, **more) == [
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 TP_SOCKET_IFNAME=ib0",
        f"{TORCHRUN} {same} --max-restarts=0 {where} -m sharded_lamb preflight --world-size=128 --config a.yaml "
        f"--gbits 200",
        f"{TORCHRUN} {same} --max-restarts=0 {where} --log-dir=logs --tee=3 train.py",
    ]


def test_c10d() -> None:
    settings = {
        "NNODES": "2",
        "NPROC_PER_NODE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "RDZV": "c10d",
        "IS_HOST": "0",
    }
    same = "--nnodes=2 --nproc-per-node=8"
    where = "--rdzv-endpoint=10.0.0.1:29500 --rdzv-conf=is_host=0 --local-addr=10.0.0.2"
    assert printed("train.py", LOCAL_ADDR="10.0.0.2", RDZV_ID="j7", **settings) == [
        f"{TORCHRUN} {same} --max-restarts=0 --rdzv-backend=c10d --rdzv-id=j7-preflight {where} "
        f"-m sharded_lamb preflight --world-size=16",
        f"{TORCHRUN} {same} --max-restarts=3 --rdzv-backend=c10d --rdzv-id=j7 {where} train.py",
    ]


def test_a_job_that_may_shrink_has_no_preflight() -> None:
    settings = {"NNODES": "1:4", "NPROC_PER_NODE": "8", "MASTER_ADDR": "node0", "RDZV": "c10d"}
    (line,) = printed("train.py", **settings)
    assert "--nnodes=1:4" in line
    assert len(printed("train.py", PREFLIGHT="0")) == 1


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {}, "what should run?"),
        (["x.py"], {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        (["x.py"], {"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES=2 needs NODE_RANK"),
        (["x.py"], {"NNODES": "two"}, "NNODES must be a number or MIN:MAX, got 'two'"),
        (["x.py"], {"NNODES": "1:2", "MASTER_ADDR": "a"}, "NNODES=1:2 needs RDZV=c10d"),
        (["x.py"], {"RDZV": "etcd"}, "RDZV must be static or c10d, got 'etcd'"),
        (["x.py"], {"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE must be a number of processes, got 'gpu'"),
    ],
)
def test_refusals(arguments: list[str], settings: dict[str, str], message: str) -> None:
    refused = call("--dry-run", *arguments, **{"NPROC_PER_NODE": "1", **settings})
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_an_interface_that_is_not_there() -> None:
    refused = call("x.py", INTERFACE="nowhere0", VIRTUAL_ENV=sys.prefix)
    assert refused.returncode == 1
    assert "there is no network interface 'nowhere0' here; there are: " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_python_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    refused = call("x.py", VIRTUAL_ENV=str(tmp_path))
    assert refused.returncode == 1
    assert "cannot import sharded_lamb; install it on every host: pip install -c" in refused.stderr


def test_what_runs_on_every_host_of_a_local_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cluster.main(
            ["--hosts", "2", "--ranks=3", "--rdzv", "static", "--dry-run", "-m", "a", "--hosts", "9"]
        )
        == 0
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("host 0: env ")
    words = shlex.split(second.removeprefix("host 1: env "))
    assert dict(word.split("=", 1) for word in words if "=" in word) == {
        "GLOO_SOCKET_IFNAME": "wire",
        "INTERFACE": "wire",
        "IS_HOST": "0",
        "LOCAL_ADDR": "10.111.0.2",
        "MASTER_ADDR": "10.111.0.1",
        "NCCL_SOCKET_IFNAME": "wire",
        "NNODES": "2",
        "NODE_RANK": "1",
        "NPROC_PER_NODE": "3",
        "RDZV": "static",
        "TP_SOCKET_IFNAME": "wire",
    }
    assert words[-4:] == ["-m", "a", "--hosts", "9"]
    assert words[-5] == str(SCRIPT)


def test_tasks_are_on_their_hosts() -> None:
    hosts = [Host(index, 100 + index, f"10.111.0.{index + 1}") for index in range(3)]
    made = cluster.tasks(hosts, ["x.py"], ranks=2)
    assert [task.host for task in made] == hosts
    assert [task.environment["IS_HOST"] for task in made] == ["1", "0", "0"]


@pytest.mark.parametrize("arguments", [[], ["--hosts", "2"], ["--hosts", "many", "x.py"]])
def test_wrong_use_of_cluster_local(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cluster.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err
