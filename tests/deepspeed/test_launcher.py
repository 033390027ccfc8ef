"""Scripts without any import of the package, run by DeepSpeed's launcher and by torchrun."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from sharded_lamb.deepspeed import launcher
from tests import interpreter

SCRIPT = """
import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; a minute to compile
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--out", type=Path)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
engine, *_ = deepspeed.initialize(args, model=model)
for _ in range(2):
    engine.backward(engine(torch.randn(4, 8)).square().mean())
    engine.step()
rank = torch.distributed.get_rank()
report = {"world": torch.distributed.get_world_size(), "argv": sys.argv, "name": __name__}
report["ratios"] = engine.basic_optimizer.trust_ratios()
(args.out / f"{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
CONFIG = """{
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "ShardedLamb", "params": {"lr": 0.01, "exclude_from_weight_decay": ["bias$"]}},
    "zero_optimization": {"stage": 2}
}"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "ds.json").write_text(CONFIG)
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    return tmp_path


def run(job: Path, command: list[str]) -> list[dict[str, object]]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((job / f"{rank}.json").read_text()) for rank in range(2)]


def tool(name: str) -> str:
    return str(interpreter.prefix() / "bin" / name)


ARGUMENTS = ["train.py", "--deepspeed", "--deepspeed_config", "ds.json", "--out", "."]


def assert_trained(report: list[dict[str, object]]) -> None:
    for one in report:
        assert one["world"] == 2
        assert one["name"] == "__main__"
        assert one["ratios"] == report[0]["ratios"]
        assert set(report[0]["ratios"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}  # type: ignore[call-overload]


def test_deepspeeds_launcher_with_a_hostfile(job: Path) -> None:
    options = ["--hostfile", "hostfile", "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    report = run(job, [tool("sharded-lamb-deepspeed"), *options, "--master_port", port, *ARGUMENTS])
    assert_trained(report)
    assert report[1]["argv"] == ["train.py", "--local_rank=1", *ARGUMENTS[1:]]


def test_torchrun(job: Path) -> None:
    launch = [tool("torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "sharded_lamb.deepspeed"]
    assert_trained(run(job, [*launch, *ARGUMENTS]))


def test_launcher_options_stay_before_the_script() -> None:
    arguments = launcher.launcher_arguments(
        ["--num_nodes", "2", "-H", "hosts", "train.py", "--module", "x", "-m"]
    )
    assert arguments == [
        "--num_nodes",
        "2",
        "-H",
        "hosts",
        "--module",
        "sharded_lamb.deepspeed",
        "train.py",
        "--module",
        "x",
        "-m",
    ]


def test_a_module_is_passed_on_as_a_module() -> None:
    arguments = launcher.launcher_arguments(["--num_gpus", "2", "--module", "my.train", "--lr", "1"])
    assert arguments == [
        "--num_gpus",
        "2",
        "--module",
        "sharded_lamb.deepspeed",
        "-m",
        "my.train",
        "--lr",
        "1",
    ]


def test_programs_that_are_not_python_raise(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.launch(["--no_python", "train.sh"]) == 2
    assert "--no_python" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--local_rank=0"], ["--help"], ["missing.py"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.run_script(arguments) == 2
    assert "usage:" in capsys.readouterr().err
