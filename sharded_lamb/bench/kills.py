"""What becomes of a run whose ranks are killed at random: it must go on to the same bits, and never lack a checkpoint.

    python -m sharded_lamb.bench.kills --count 100 --json kills.json

A tiny BERT trains on two ranks under torchrun and is killed, started again, and killed again; whenever it comes to its
end its weights and state are compared with those of a run that nobody killed, and another run is begun. After every
kill the checkpoint that the next start goes on from is read and its hashes verified.
"""

import argparse
import json
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
from sharded_lamb.bench.report import about
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
    """One kill, and what came of it."""

    number: int
    fault: str
    fired: bool  # else the run was at its end before
    went_on_from: int  # step that the killed start began at
    left: int | None  # step of the checkpoint that is there after it; None: none was written yet
    problem: str | None  # with it
    same_bits: bool | None  # of a run that ended


def drawn(rng: random.Random) -> str:
    """A kill at a random point, of a random rank, in a random step, now or some milliseconds later."""
    point, rank, step = rng.choice(POINTS), rng.randrange(RANKS), rng.randrange(STEPS)
    if point.startswith("checkpoint-"):
        step = step - step % EVERY + EVERY - 1  # where one is written
        rank = (
            rank if point in ("checkpoint-write", "checkpoint-fsync") else 0
        )  # the first rank does the rest
    delay = rng.choice(("", f":delay={rng.uniform(0.001, 0.1):.4f}"))
    return f"kill@{point}:rank={rank}:step={step}{delay}"


class Job:
    """A run in ``folder``, and where one that nobody kills ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            str(CONFIG),
            "--resume",
            "auto",
            *settings,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def kill(self, number: int, fault: str) -> Kill:
        """Start the run, or go on with it, under ``fault``."""
        begun = self._newest()
        code, said = self._start(self.run, fault)
        left = self._newest()
        problem = (
            None if left is None else problem_with(Checkpoints(self.run / "checkpoints").candidates()[0])
        )
        if begun is not None and left is None:
            problem = "the checkpoints are gone"
        same = None
        if code == 0:
            same = _same(_end_of(self.run), self.expected)
            shutil.rmtree(self.run)
        elif "signal" not in said.lower() and "exitcode: -9" not in said:
            problem = f"it ended by itself: {said[-500:]}"
        return Kill(number, fault, code != 0, begun or 0, left, problem, same)

    def _newest(self) -> int | None:
        """The step that a start would go on from."""
        found = Checkpoints(self.run / "checkpoints").candidates()
        return int(found[0].name.removeprefix("step-")) if found else None


def _end_of(run: Path) -> dict[str, torch.Tensor]:
    found = read_contents(run / "checkpoints" / f"step-{STEPS:08d}")
    states = {
        f"{name} {kind}": value for name, state in found.states.items() for kind, value in state.items()
    }
    return {**found.weights, **states}


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def measure(folder: Path, count: int, seed: int) -> list[Kill]:
    """``count`` kills that fired, and the starts that came to the end between them."""
    rng, job = random.Random(seed), Job(folder)
    found: list[Kill] = []
    while (fired := sum(kill.fired for kill in found)) < count and len(found) < 3 * count:
        found.append(job.kill(len(found), drawn(rng)))
        print(f"{fired + found[-1].fired}/{count}: {found[-1]}", flush=True)
    found.append(job.kill(len(found), ""))  # the last run's end
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a checkpoint was broken or a run ended with other bits."""
    parser = argparse.ArgumentParser(prog="python -m sharded_lamb.bench.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        kills = measure(Path(folder), chosen.count, chosen.seed)
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
    """JSON with a row a line."""
    command = f"python -m sharded_lamb.bench.kills --count {chosen.count} --seed {chosen.seed}"
    head: dict[str, Any] = {
        **about(torch.device("cpu")),
        "command": command,
        "ranks": RANKS,
        "counts": counts,
    }
    lines = ",\n  ".join(json.dumps(asdict(kill)) for kill in kills)
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n  {lines}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
