"""A process that has trained and saved ends with 0: no thread of a process group outlives the exit handlers.

A gloo thread that drops the last reference to a tensor of Python's while the interpreter finalizes aborts the process.
"""

import json
import subprocess
import sys

KINDS = ("step", "save", "save+destroy", "async+destroy", "unasked", "failed")
RUNS = 1


def test_processes_end_with_0() -> None:
    command = [sys.executable, "-m", "tests.checkpoint.exits", str(RUNS), *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {kind: {"0": 2 * RUNS} for kind in KINDS}, done.stderr
    assert done.stderr.count("is as it should be") == RUNS, "the first rank logs the error"
