"""Runs programs, or shrinks one::

python -m tests.fuzz --seeds 0:5000 --workers 2 --out outcomes.jsonl
python -m tests.fuzz --shrink 17
python -m tests.fuzz --show 17
"""

import argparse
import collections
import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.generate import generate
from tests.fuzz.outcome import TIMEOUT_S, outcome_of
from tests.fuzz.shrink import shrunk


def main() -> int:
    """Returns the exit code: 1 if a program has a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Random programs against the oracle."
    )
    parser.add_argument("--seeds", default="0:100", help="first:end[:step]")
    parser.add_argument("--workers", type=int, default=1, help="programs at once")
    parser.add_argument("--out", type=Path, help="a file of one JSON row per program")
    parser.add_argument("--details", action="store_true", help="print programs with faults, and tracebacks")
    parser.add_argument(
        "--shrink", type=int, metavar="SEED", help="print the smallest program with this one's fault"
    )
    parser.add_argument("--show", type=int, metavar="SEED", help="print a program")
    parser.add_argument(
        "--without", default="", help="comma-separated kinds of operations, or values, to leave out"
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, help="seconds after which a program hangs"
    )
    args = parser.parse_args()
    without = frozenset(filter(None, args.without.split(",")))
    if args.show is not None:
        print(generate(args.show, without))
        return 0
    if args.shrink is not None:
        return _shrink(args.shrink, without)
    seeds = range(*map(int, args.seeds.split(":")))
    source = (
        _rows(seeds, without, args.timeout, details=args.details)
        if args.workers == 1
        else _in_parallel(seeds, args.workers, ["--without", args.without, "--timeout", str(args.timeout)])
    )
    rows = []
    for row in source:
        rows.append(row)
        if args.out is None or row["outcome"] == "FAULT":
            print(json.dumps(row), flush=True)
    rows.sort(key=lambda row: row["seed"])
    if [row["seed"] for row in rows] != [*seeds]:
        raise RuntimeError(f"{len(rows)} of {len(seeds)} programs were run: a worker failed")
    if args.out is not None:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = collections.Counter(row["outcome"] for row in rows)
    print(
        f"{len(rows)} programs: " + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())),
        file=sys.stderr,
    )
    return 1 if counts["FAULT"] else 0


def _rows(
    seeds: range, without: frozenset[str], timeout: float, *, details: bool
) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        program = generate(seed, without)
        outcome = outcome_of(program, timeout)
        if details and outcome.kind == "FAULT":
            print(program, outcome.details, sep="\n", flush=True)
        yield {
            "seed": seed,
            "ranks": [phase.world for phase in program.phases],
            "stage": [phase.how for phase in program.phases],
            "operations": program.operations,
            "outcome": outcome.kind,
            "reason": " ".join(outcome.reason.split())[:160],
            "at": outcome.at,
        }


def _in_parallel(seeds: range, workers: int, options: list[str]) -> Iterator[dict[str, Any]]:
    rows: queue.Queue[dict[str, Any]] = queue.Queue()

    def run(part: range) -> None:
        span = f"{part.start}:{part.stop}:{part.step}"
        command = [sys.executable, "-m", "tests.fuzz", "--seeds", span, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):  # DeepSpeed warns on stdout
                    rows.put(json.loads(line))

    parts = [seeds[worker::workers] for worker in range(workers)]
    threads = [threading.Thread(target=run, args=(part,)) for part in parts if len(part)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not rows.empty():
        with contextlib.suppress(queue.Empty):
            yield rows.get(timeout=1)


def _shrink(seed: int, without: frozenset[str]) -> int:
    program = generate(seed, without)
    fault = outcome_of(program)
    if fault.kind != "FAULT":
        print(f"seed {seed}: {fault.kind} {fault.reason}")
        return 0
    smallest = shrunk(program, fault)
    print(smallest, outcome_of(smallest).reason, smallest.to_json(), sep="\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
