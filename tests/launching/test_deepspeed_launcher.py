"""`launch/deepspeed.sh`: what it runs, what it refuses, and two hosts whose ssh is a stand-in."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import interpreter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "deepspeed.sh"
HOSTS = str(ROOT / "launch" / "hostfile")
SETTINGS = ("HOSTFILE", "MASTER_ADDR", "MASTER_PORT", "INTERFACE", "NODE_RANK", "PREFLIGHT", "PREFLIGHT_ARGS")
SETTINGS += ("VIRTUAL_ENV", "DS_ENV_FILE")
PREFLIGHT = "--no_local_rank --module sharded_lamb preflight"

# pdsh as DeepSpeed calls it: `pdsh -S -f FAN_OUT -w HOST,HOST WORD ...` runs the words, joined, by the shell of each
# host, with its number for %n. Hosts know nothing of the environment of whoever calls.
PDSH = """#!/usr/bin/env bash
[[ "$1 $2 $4" == "-S -f -w" ]] || exit 9
hosts=(${5//,/ })
shift 5
status=0 number=0 processes=()
for host in "${hosts[@]}"; do
    command="$*"
    env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${command//%n/$number}" &
    processes+=($!)
    ((number += 1))
done
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit "$status"
"""
# A script that knows nothing of this package.
PROGRAM = """
import argparse, json, os
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; a minute to compile
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--note")
args = deepspeed.add_config_arguments(parser).parse_args()
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(args, model=model)
engine.backward(engine(torch.randn(4, 8)).square().mean())
engine.step()
names = ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "NOT_SENT", "CROSS_RANK", "LOCAL_RANK")
said = {name: os.environ.get(name) for name in names}
said["ratios"], said["note"] = engine.basic_optimizer.trust_ratios(), args.note
said["ranks"] = torch.distributed.get_world_size()
Path(f"{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "ShardedLamb", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 2},
}


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**kept, **settings}


def call(*arguments: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    """Without the settings of whoever runs the tests."""
    return subprocess.run(
        [SCRIPT, *arguments],
        env=environment(**settings),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


def printed(*arguments: str, **settings: str) -> list[str]:
    done = call("--dry-run", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    return [shlex.join([Path(line[0]).name, *line[1:]]) for line in lines]


def test_hosts_and_options_are_handed_on() -> None:
    where = (
        f"--hostfile={HOSTS} --include node-0@node-1:0,2 --ssh_port=2222 --master_addr=node-0 --master_port=7"
    )
    arguments = ["--include", "node-0@node-1:0,2", "--ssh_port=2222", "train.py", "--exclude", "a b"]
    settings = {"HOSTFILE": HOSTS, "MASTER_ADDR": "node-0", "MASTER_PORT": "7", "INTERFACE": "ib0"}
    assert printed(*arguments, PREFLIGHT_ARGS="--gbits 200 --config ds.json", **settings) == [
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 TP_SOCKET_IFNAME=ib0",
        f"sharded-lamb-deepspeed {where} {PREFLIGHT} --gbits 200 --config ds.json",
        f"sharded-lamb-deepspeed {where} train.py --exclude 'a b'",
    ]


def test_modules_and_flags() -> None:
    assert printed("-q", "-m", "my.train", "--lr", "1", PREFLIGHT="0") == [
        "sharded-lamb-deepspeed -q --master_port=29500 --module my.train --lr 1"
    ]
    assert printed("--module", "sharded_lamb.bert", "--config", "a.yaml", PREFLIGHT="0") == [
        "sharded-lamb-deepspeed --master_port=29500 --no_local_rank --module sharded_lamb.bert --config a.yaml"
    ]


def test_without_ssh() -> None:
    settings = {"HOSTFILE": HOSTS, "MASTER_ADDR": "node-0", "NODE_RANK": "1", "PREFLIGHT": "0"}
    where = f"--hostfile={HOSTS} --master_addr=node-0 --master_port=29500 --no_ssh --node_rank=1"
    assert printed("train.py", **settings) == [f"sharded-lamb-deepspeed {where} train.py"]


def test_the_example_of_a_hostfile_is_one() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(HOSTS) == {"node-0": 8, "node-1": 8}


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {}, "what should run?"),
        (["--include"], {}, "--include needs a value"),
        (["x.py"], {"HOSTFILE": "/nowhere"}, "there is no HOSTFILE /nowhere; launch/hostfile shows"),
        (["x.py"], {"HOSTFILE": str(SCRIPT)}, "is not 'NAME slots=RANKS'"),
        (["x.py"], {"HOSTFILE": "/dev/null"}, "names no host"),
        (["x.py"], {"HOSTFILE": HOSTS, "NODE_RANK": "1"}, "NODE_RANK=1 needs HOSTFILE, and MASTER_ADDR"),
    ],
)
def test_refusals(arguments: list[str], settings: dict[str, str], message: str) -> None:
    refused = call("--dry-run", *arguments, **settings)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1, refused.stderr


def test_missing_tools_are_named(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\n[[ $2 != *"$MISSING"* ]]\n')
    python.chmod(0o755)

    def refusal(missing: str = "nothing", **settings: str) -> str:
        where = {"PATH": str(tools), "VIRTUAL_ENV": str(tmp_path / "venv"), "MISSING": missing}
        refused = call("x.py", HOSTFILE=HOSTS, **where, **settings)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        return refused.stderr

    assert "cannot import sharded_lamb; install it on every host" in refusal("sharded_lamb")
    assert "cannot import deepspeed; install it on every host" in refusal("deepspeed")
    assert "no ssh on PATH; install it" in refusal()
    (tools / "ssh").symlink_to(shutil.which("true") or "true")
    assert "no pdsh on PATH; install it" in refusal()
    assert "there is no network interface 'no0' here" in refusal(
        INTERFACE="no0", NODE_RANK="0", MASTER_ADDR="a"
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a program, and ssh and pdsh in its folder `bin`."""
    pytest.importorskip("deepspeed")
    (tmp_path / "bin").mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", "#!/bin/sh\nexit 0\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    (tmp_path / "hostfile").write_text("# two\none slots=1\n\ntwo slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n\n# a remark\n")
    return tmp_path


def settings_of(job: Path) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{job / 'bin'}:{os.environ['PATH']}"
    results = {"HOSTFILE": "hostfile", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PATH": path}
    return {**results, "VIRTUAL_ENV": str(interpreter.prefix()), "PYTHONPATH": str(ROOT)}


ARGUMENTS = ("train.py", "--deepspeed", "--deepspeed_config", "ds.json", "--note", "two words")


def test_two_hosts(job: Path) -> None:
    settings = {**settings_of(job), "INTERFACE": "lo", "PREFLIGHT_ARGS": "--mb=0 --world-size=2"}
    done = call(*ARGUMENTS, cwd=job, NOT_SENT="1", **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "preflight: 2 ranks on 1 hosts" in done.stdout
    said = [json.loads((job / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one.pop("CROSS_RANK") for one in said] == ["0", "1"]
    assert said[0] == said[1]
    assert said[0]["ratios"].keys() == {"weight", "bias"}
    assert said[0]["ranks"] == 2
    assert (said[0]["LOCAL_RANK"], said[0]["note"]) == ("0", "two words")
    assert (said[0]["GLOO_SOCKET_IFNAME"], said[0]["OMP_NUM_THREADS"]) == ("lo", "1")
    assert said[0]["NOT_SENT"] is None


def test_a_failed_preflight_ends_it(job: Path) -> None:
    failed = call(
        *ARGUMENTS, cwd=job, **settings_of(job), INTERFACE="lo", PREFLIGHT_ARGS="--mb=0 --world-size=3"
    )
    assert failed.returncode == 1
    assert "there are 2 ranks and 3 were expected" in failed.stderr
    assert (
        failed.stderr.splitlines()[-1] == "deepspeed.sh: error: the preflight failed; what it says is above"
    )
    assert not (job / "0.json").exists()


def has_ended(process: Path) -> bool:
    """Gone, or nobody asked for its exit code yet. ``process``: its folder in /proc."""
    try:
        return "\nState:\tZ" in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_end_of_the_script_is_the_end_of_its_ranks(job: Path) -> None:
    (job / "train.py").write_text(
        "import os, time\nopen('pid', 'w').write(f'{os.getpid()} ')\ntime.sleep(90)\n"
    )
    (job / "hostfile").write_text("localhost slots=1\n")
    (job / "without").mkdir()
    (job / "without" / "mlflow.py").write_text(
        "raise ImportError\n"
    )  # DeepSpeed would import it for two seconds
    # The launcher kills its children, which the forks of `interpreter` are not.
    settings = {**settings_of(job), "VIRTUAL_ENV": sys.prefix, "PREFLIGHT": "0", "NODE_RANK": "0"}
    settings["PYTHONPATH"] = f"{job / 'without'}:{ROOT}"
    process = subprocess.Popen(
        [SCRIPT, "train.py"],
        env=environment(**settings),
        cwd=job,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (job / "pid").exists() and (job / "pid").read_text().endswith(" "))
        rank = Path("/proc", (job / "pid").read_text().strip())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
        wait_for(lambda: has_ended(rank))
    finally:
        process.kill()


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
