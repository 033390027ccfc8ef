"""A run whose ranks are killed or hang where it hurts, or whose node leaves, loses nothing."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sharded_lamb import faults
from sharded_lamb.__main__ import main as sharded_lamb_command
from sharded_lamb.checkpoint import problem_with, read_contents
from tests import interpreter
from tests.bert.test_command import (
    ROOT,
    environment,
    parent_of,
    processes_with,
    rows_of,
    torchrun,
    wait_for_rows,
    write_config,
)
from tests.bert.test_train import losses, train, trained
from tests.harness import RankErrors, run_ranks
from tests.training import assert_same_bits

STEPS = 8
KILLS = {
    "kill@checkpoint-manifest:rank=0:step=3": 2,
    "kill@mid-all-gather:rank=0:step=5": 4,
    "kill@checkpoint-latest:rank=0:step=7": 6,
}
"""The step at which the next attempt resumes. Steps count from 0; every second one writes a checkpoint."""
UNDER_TORCHRUN = {"kill@mid-backward:rank=1:step=2": 2, "hang@all-reduce:rank=1:step=5": 4}
HANG_TIMEOUT_S = 8
EXACT = ("step", "loss", "lr", "grad_norm", "sample", "heldout_loss")


@pytest.fixture(scope="module")
def long_tree(tree: dict[str, Any]) -> dict[str, Any]:
    phase = {**tree["phases"][0], "steps": STEPS}
    checkpoint, watchdog = {"every_steps": 2, "keep": 2}, {"hang_timeout_s": HANG_TIMEOUT_S}
    model = {**tree["model"], "dropout": 0.1}
    return {**tree, "model": model, "phases": [phase], "checkpoint": checkpoint, "faults": watchdog}


def exact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in EXACT} for row in rows]


Finished = tuple[list[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def whole(long_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Rows and folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(2, long_tree, folder)[0], folder


def assert_same_run(run: Path, whole: Finished) -> None:
    rows, folder = whole
    last = Path("checkpoints", f"step-{STEPS:08d}")
    one, two = read_contents(folder / last), read_contents(run / last)
    assert_same_bits(two.weights, one.weights)
    assert two.states.keys() == one.states.keys()
    for name, state in one.states.items():
        assert_same_bits(two.states[name], state)
    assert exact(rows_of(run)) == exact(rows)
    kept = sorted((run / "checkpoints").glob("step-*"))
    assert [problem_with(path) for path in kept] == [None, None]


def start_again(rank: int, tree: dict[str, Any], run_dir: str, fault: str) -> None:
    """As torchrun starts a rank: in a process of its own after a death. Its output is appended to the file `said`."""
    os.environ[faults.VARIABLE] = fault
    faults.injector.cache_clear()  # an earlier case of this process may have read it
    with Path(run_dir).with_name("said").open("a", buffering=1) as said, contextlib.redirect_stdout(said):
        train(rank, tree, run_dir, [], resume="auto")


def test_killed_anywhere_it_ends_with_the_same_bits(
    long_tree: dict[str, Any], whole: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for fault in KILLS:
        rank = int(fault.split("rank=")[1][0])
        with pytest.raises(RankErrors) as killed:
            run_ranks(2, start_again, long_tree, str(run), fault)
        assert killed.value.errors[rank].kind == "Died"
        assert f"exit code {-signal.SIGKILL}" in killed.value.errors[rank].message
    run_ranks(2, start_again, long_tree, str(run), "")
    said = (tmp_path / "said").read_text()
    assert [int(step) for step in re.findall(r"from step (\d+)", said)] == [*KILLS.values()]
    assert_same_run(run, whole)


def test_killed_or_hung_torchrun_starts_it_again_and_it_ends_with_the_same_bits(
    long_tree: dict[str, Any], whole: Finished, tmp_path: Path
) -> None:
    config = write_config(long_tree, tmp_path)
    attempts = ";".join(f"{fault}:attempt={attempt}" for attempt, fault in enumerate(UNDER_TORCHRUN))
    done = subprocess.run(
        torchrun(2, config, "--resume", "auto", restarts=len(UNDER_TORCHRUN)),
        env=environment(**{faults.VARIABLE: attempts}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert [int(step) for step in re.findall(r"from step (\d+)", said)] == [*UNDER_TORCHRUN.values()]
    for rank in (0, 1):
        assert f"sharded_lamb watchdog (on rank {rank}): rank 1 hangs while others wait for it" in said
    assert_same_run(tmp_path / "run", whole)


def test_ranks_that_are_restarted_continue_the_run_that_they_began_and_no_earlier_one(
    tree: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without --resume, which refuses a folder that has a run, also in the ranks that torchrun starts after that."""
    config = write_config(tree, tmp_path, checkpoint={"every_steps": 2, "keep": 0})

    def run(fault: str) -> subprocess.CompletedProcess[str]:
        command = torchrun(1, config, restarts=1)
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240, "check": False}
        return subprocess.run(command, env=environment(**{faults.VARIABLE: fault}), cwd=ROOT, **options)

    done = run("kill@step:step=3")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"from step (\d+)", done.stdout) == ["2"]
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    before = sorted(checkpoints.rglob("*"))
    refused = run("")
    assert refused.returncode == 1
    assert refused.stderr.count("already contains a run: continue it with --resume auto") == 2
    assert sorted(checkpoints.rglob("*")) == before

    with mock.patch.object(subprocess, "Popen", side_effect=AssertionError("it has started ranks")):
        for resume, message in (
            ([], "already contains a run: continue it with --resume auto"),
            (["--resume", "auto", "model.layers=2"], "model.layers: 1 there, 2 now"),
            (["--resume", str(tmp_path / "none")], f"{tmp_path / 'none'} "),
        ):
            assert sharded_lamb_command(["pretrain", "--config", str(config), *resume]) == 2
            assert message in capfd.readouterr().err


def _wait_until_it_listens(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = endpoint.partition(":")
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.05)
    raise AssertionError("the first agent ended")


def test_a_node_leaves_and_training_goes_on_with_fewer_ranks(
    long_tree: dict[str, Any], tmp_path: Path
) -> None:
    """Two agents of one rank each. The one that does not hold the rendezvous is killed with its rank."""
    tree = {**long_tree, "model": {**long_tree["model"], "dropout": 0.0}}  # keyed by rank
    tree["phases"] = [{**tree["phases"][0], "steps": 12}]
    rows, _ = trained(2, tree, tmp_path / "whole")
    config = write_config(tree, tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    timeouts = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=2"
    command = [interpreter.python(), "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-conf={timeouts}"]
    command += ["--local-addr=localhost", "--max-restarts=2", "-m", "sharded_lamb.bert", "--resume", "auto"]
    # Long enough for the other node to be killed in the middle.
    slow = {"SHARDED_LAMB_FAULT": "slow@step:seconds=0.3"}
    agents = []
    with (tmp_path / "log").open("w") as log:
        for number in range(2):
            agent = subprocess.Popen(
                [*command, "--config", str(config)],
                env=environment(**slow, NODE=f"{tmp_path} {number}"),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            agents.append(agent)
            if len(agents) == 1:
                _wait_until_it_listens(endpoint, agent)
        try:
            wait_for_rows(tmp_path / "run", 5, agents[0])
            (rank,) = set(processes_with(f"NODE={tmp_path} 1")) - {agents[1].pid}
            # The agent first, which is the rank's parent: it would join the next rendezvous if it outlived its rank.
            for process in (parent_of(rank), rank):
                os.kill(process, signal.SIGKILL)
            assert agents[0].wait(100) == 0, (tmp_path / "log").read_text()
        finally:
            for agent in agents:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    checkpoints = tmp_path / "run" / "checkpoints"
    position = read_contents(max(checkpoints.glob("step-*"))).extra["position"]
    assert position["world_size"] == 1
    results = rows_of(tmp_path / "run")
    for key in ("step", "sample", "global_batch", "lr"):
        assert [row.get(key) for row in results] == [row.get(key) for row in rows]
    assert losses(results) == pytest.approx(losses(rows), rel=1e-5)
    assert results[0]["loss"] == rows[0]["loss"], (
        "the first steps were made by two ranks, as those of the other run"
    )
