"""Processes for tests that end, kill or stop them: forked from the harness's server, which has imported torch.

    with forked(case, arg, RANK="0") as process:
        code, output = process.ended()

A new interpreter would spend seconds on its imports. `case` must be a module-level function; the keyword arguments are
its environment.
"""

import atexit
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests import fork_server
from tests.harness import _die_with_parent, _redirect_output


@dataclass
class Forked:
    """A process, and the file that its output goes to."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.exitcode is None

    def output(self) -> str:
        """Its stdout and stderr so far."""
        return self.log.read_text(errors="replace")

    def ended(self) -> tuple[int, str]:
        """(exit code, output)"""
        self.process.join(120)
        assert self.process.exitcode is not None, f"still running after 120 s: {self.output()}"
        return self.process.exitcode, self.output()


@contextmanager
def forked(case: Callable[..., object], *args: object, **environment: str) -> Iterator[Forked]:
    """Runs ``case(*args)`` in a process of its own, which is killed at the end."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        log = Path(folder, "log")
        log.touch()
        process = fork_server.context().Process(target=_main, args=(str(log), environment, case, args))
        process.start()
        try:
            yield Forked(process, log)
        finally:
            process.kill()
            process.join()


def _main(
    log: str, environment: Mapping[str, str], case: Callable[..., object], args: tuple[object, ...]
) -> None:
    _die_with_parent()
    _redirect_output(log)
    torch.set_num_threads(1)
    os.environ.update(environment)
    code = 0
    try:
        case(*args)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # multiprocessing ends its processes without them
    time.sleep(0.5)  # an interpreter takes as long to end
    sys.exit(code)
