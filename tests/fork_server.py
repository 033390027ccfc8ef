"""The server from which the tests' workers are forked, with tests/preloaded.py imported: one for all processes of
pytest-xdist, which takes as long to start as a worker of theirs to collect.
"""

import multiprocessing
import os
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

ADDRESS = "SHARDED_LAMB_TESTS_SERVER"
"""Environment variable: the address of the server of the process that started this one."""

PRELOAD = ["tests.preloaded"]
_server = forkserver._forkserver  # type: ignore[attr-defined]


def start() -> None:
    """Start the server, which ends with this process, for the processes that it will start."""
    _limit_threads()
    _server.set_forkserver_preload(PRELOAD)
    _server.ensure_running()
    os.environ[ADDRESS] = _server._forkserver_address


def context() -> ForkServerContext:
    """Workers are forked from a clean process that has imported tests/preloaded.py and done nothing else."""
    _limit_threads()
    found = multiprocessing.get_context("forkserver")
    if _server._forkserver_address is None:
        if address := os.environ.get(ADDRESS):
            _server._forkserver_address = address
            _server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # its end is not waited for
            _server.ensure_running = resource_tracker.ensure_running
        else:
            found.set_forkserver_preload(PRELOAD)
    return found


def _limit_threads() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # threads must not exist in the server when it forks
