"""A process that has trained and saved ends with 0: no thread of a process group outlives the exit handlers.

A gloo thread that drops the last reference to a tensor of Python's while the interpreter finalizes aborts the process.
"""

import subprocess
import sys

import pytest

RUNS = 1  # python -m tests.checkpoint.exits KIND 300 repeats them


@pytest.mark.parametrize("kind", ["step", "save", "save+destroy", "async+destroy", "unasked"])
def test_processes_end_with_0(kind: str) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.exits", kind, str(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout.splitlines()[-1:] == [str({0: 2 * RUNS})], done.stdout + done.stderr
