"""Kills the ranks of a run at random: it must resume to the same bits, and always have a checkpoint.

    python -m sharded_lamb.bench.kills --count 100 --json kills.json

A tiny BERT trains on two ranks under torchrun and is killed, restarted, and killed again. Whenever it ends, its weights
and state are compared with those of an undisturbed run, and another run starts. After every kill the checkpoint that
the next start resumes from is read and its hashes are verified. Needs a checkout or ``--config``: wheels lack configs/.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sharded_lamb import faults
from sharded_lamb.bench.report import about, dumped
from sharded_lamb.checkpoint import Checkpoints, problem_with, read_contents

STEPS = 10
EVERY = 2
RANKS = 2
POINTS = tuple(name for name in faults.POINTS if name != "construction")
CONFIG = Path(__file__).parents[2] / "configs" / "bert-quickstart.yaml"
_MODEL = ("hidden_size=32", "layers=1", "heads=2", "intermediate_size=64", "dropout=0.1")
_PHASE = f"{{steps: {STEPS}, global_batch: 8, sequence_length: 64, lr: 0.01, warmup_fraction: 0.2}}"
SETTINGS = (
    *(f"model.{setting}" for setting in _MODEL),
    f"phases=[{_PHASE}]",
    f"checkpoint={{every_steps: {EVERY}, keep: 2}}",
    "log={fill_mask: []}",
    "speed={precision: fp32, threads: 1}",
)


@dataclass(frozen=True)
class Kill:
    """One kill and its outcome."""

    number: int
    fault: str
    fired: bool  # False: the run ended before
    went_on_from: int  # step that the killed start resumed from
    left: int | None  # step of the newest checkpoint afterwards; None: none was written yet
    problem: str | None  # of that checkpoint
    same_bits: bool | None  # of a run that ended; else None


def drawn(rng: random.Random) -> str:
    """A random fault: a kill at some point of some rank in some step, at once or some milliseconds later."""
    point, rank, step = rng.choice(POINTS), rng.randrange(RANKS), rng.randrange(STEPS)
    if point.startswith("checkpoint-"):
        step = step - step % EVERY + EVERY - 1  # a step that writes one
        rank = (
            rank if point in ("checkpoint-write", "checkpoint-fsync") else 0
        )  # only the first rank passes the other points
    delay = rng.choice(("", f":delay={rng.uniform(0.001, 0.1):.4f}"))
    return f"kill@{point}:rank={rank}:step={step}{delay}"


class Job:
    """A run in ``folder``, and the end of an undisturbed one."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config
        self.run = folder / "run"
        self._start(folder / "whole", "")
        self.expected = _end_of(folder / "whole")

    def _start(self, run: Path, fault: str) -> tuple[int, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", faults.VARIABLE: fault}
        settings = [*SETTINGS, f"run_dir={run}", f"data.prepared={self.folder / 'prepared'}"]
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={RANKS}",
        ]
        command = [
            *launcher,
            "-m",
            "sharded_lamb.bert",
            "--config",
            str(self.config),
            "--resume",
            "auto",
            *settings,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def kill(self, number: int, fault: str) -> Kill:
        """Start or resume the run under ``fault``."""
        resumed_from = self._newest()
        code, output = self._start(self.run, fault)
        left = self._newest()
        problem = (
            None if left is None else problem_with(Checkpoints(self.run / "checkpoints").candidates()[0])
        )
        if resumed_from is not None and left is None:
            problem = "the checkpoints are gone"
        same = None
        if code == 0:
            same = _same(_end_of(self.run), self.expected)
            shutil.rmtree(self.run)
        elif "signal" not in output.lower() and "exitcode: -9" not in output:
            problem = f"it ended by itself: {output[-500:]}"
        return Kill(number, fault, code != 0, resumed_from or 0, left, problem, same)

    def _newest(self) -> int | None:
        """The step that a start would resume from; None without a checkpoint."""
        checkpoints = Checkpoints(self.run / "checkpoints").candidates()
        return int(checkpoints[0].name.removeprefix("step-")) if checkpoints else None


def _end_of(run: Path) -> dict[str, torch.Tensor]:
    contents = read_contents(run / "checkpoints" / f"step-{STEPS:08d}")
    states = {
        f"{name} {kind}": value for name, state in contents.states.items() for kind, value in state.items()
    }
    return {**contents.weights, **states}


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def measure(folder: Path, config: Path, count: int, seed: int) -> list[Kill]:
    """``count`` kills that fired, and the starts that ended between them."""
    rng, job = random.Random(seed), Job(folder, config)
    kills: list[Kill] = []
    while (fired := sum(kill.fired for kill in kills)) < count and len(kills) < 3 * count:
        kills.append(job.kill(len(kills), drawn(rng)))
        print(f"{fired + kills[-1].fired}/{count}: {kills[-1]}", flush=True)
    kills.append(job.kill(len(kills), ""))  # the last run's end
    return kills


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a checkpoint was broken or a run ended with other bits; 2 without a configuration."""
    parser = argparse.ArgumentParser(prog="python -m sharded_lamb.bench.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/bert-quickstart.yaml")
    chosen = parser.parse_args(arguments)
    if not chosen.config.is_file():
        print(
            f"kills: no file {chosen.config}: run it from a checkout (wheels lack configs/), or pass --config with "
            f"its configs/bert-quickstart.yaml",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        kills = measure(Path(folder), chosen.config, chosen.count, chosen.seed)
    bad = [kill for kill in kills if kill.problem or kill.same_bits is False]
    ends = [kill for kill in kills if kill.same_bits is not None]
    counts = {
        "kills": sum(kill.fired for kill in kills),
        "runs that ended": len(ends),
        "with the same bits": sum(kill.same_bits is True for kill in ends),
        "kills that left a broken checkpoint, or none where one was": sum(
            bool(kill.problem) for kill in kills
        ),
    }
    print(", ".join(f"{what}: {number}" for what, number in counts.items()))
    for kill in bad:
        print(f"  {kill}", file=sys.stderr)
    if chosen.json:
        chosen.json.write_text(_report(kills, counts, chosen))
    return 1 if bad else 0


def _report(kills: list[Kill], counts: dict[str, int], chosen: argparse.Namespace) -> str:
    command = f"python -m sharded_lamb.bench.kills --count {chosen.count} --seed {chosen.seed}"
    content: dict[str, Any] = {
        **about(torch.device("cpu")),
        "command": command,
        "ranks": RANKS,
        "counts": counts,
        "rows": [asdict(kill) for kill in kills],
    }
    return dumped(content)


if __name__ == "__main__":
    sys.exit(main())
