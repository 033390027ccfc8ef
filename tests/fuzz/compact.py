"""Writes the result file of a run from its outcomes: a letter per program::

python -m tests.fuzz.compact outcomes.jsonl --commit 0123abc --command "…" > tests/fuzz/results/programs.json
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tests.fuzz.generate import generate
from tests.fuzz.replay import REFUSALS, replayed

LETTERS = {"equal": ".", "FAULT": "F"} | dict(zip(REFUSALS, "abcdefghijklmnopqrstuvwxyz", strict=False))
"""Of outcomes; a refused program's is of the key in `REFUSALS`."""
PER_LINE = 100


def kind(row: dict[str, Any]) -> str:
    """The key in `LETTERS` of an outcome's row, as ``python -m tests.fuzz --out`` writes it."""
    refusal = replayed(generate(row["seed"])).refusal if row["outcome"] == "refused" else None
    return str(row["outcome"]) if refusal is None else refusal.key


def compact(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``counts``, ``faults`` in full, and ``programs``: first seed → letters.

    Raises:
        ValueError: the rows' seeds are not consecutive.
    """
    rows = sorted(rows, key=lambda row: int(row["seed"]))
    first = rows[0]["seed"]
    if [row["seed"] for row in rows] != [*range(first, first + len(rows))]:
        raise ValueError(f"the rows are not of consecutive seeds from {first}")
    kinds = [kind(row) for row in rows]
    letters = "".join(LETTERS[each] for each in kinds)
    return {
        "seeds": f"{first}:{first + len(rows)}",
        "operations": sum(row["operations"] for row in rows),
        "counts": dict(collections.Counter(row["outcome"] for row in rows)),
        "refused": dict(collections.Counter(each for each in kinds if each in REFUSALS)),
        "faults": [row for row in rows if row["outcome"] == "FAULT"],
        "letters": LETTERS,
        "programs": {first + at: letters[at : at + PER_LINE] for at in range(0, len(letters), PER_LINE)},
    }


def processor(lines: Iterable[str]) -> str:
    """The model of ``/proc/cpuinfo``."""
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.compact", description=__doc__)
    parser.add_argument("outcomes", type=Path, nargs="+")
    parser.add_argument("--commit", required=True, help="of the code that was run")
    parser.add_argument("--command", required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for path in args.outcomes for line in path.read_text().splitlines()]
    about = {
        "command": args.command,
        "commit": args.commit,
        "date": str(date.today()),
        "processor": processor(Path("/proc/cpuinfo").read_text().splitlines()),
    }
    json.dump({**about, **compact(rows)}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
