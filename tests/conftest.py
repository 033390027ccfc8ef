"""Settings, markers and fixtures of the whole suite."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import fork_server, rewriting

# Imports and pytest's collection free nothing; Python's collector would spend two seconds on finding that out.
gc.disable()
# Examples share two cores with worker processes, so their wall time says nothing: no deadline. The same
# examples every time, so that a failure seen anywhere is seen everywhere; "explore" searches for new ones.
hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, print_blob=True, max_examples=60
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

if hasattr(os, "SCHED_BATCH"):
    # For all processes that tests start. A gloo thread that is woken while another holds its connection's lock polls
    # until it gets the lock; in batch scheduling it does not displace the holder. An all-reduce and a send between two
    # ranks, beside two others on two cores, took 5.0 ms, and take 1.6.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
TESTS = Path(__file__).parent
# The longest first: workers of pytest-xdist take files in turn, so that none is left with a long one at the end.
SYSTEM = (
    "launching/test_slurm.py",
    "watchdog/test_watchdog.py",
    "preflight/test_preflight.py",
    "launching/test_deepspeed_launcher.py",
    "bert/test_command.py",
    "bert/test_faults.py",
    "bench/test_overlap.py",
    "bert/test_hosts.py",
    "kernels/test_triton_kernels.py",
    "deepspeed/test_launcher.py",
    "checkpoint/test_exits.py",
    "kernels/test_wheel.py",
    "kernels/test_targets.py",
    "kernels/test_counted.py",
    "kernels/test_compiling.py",
    "cluster/test_namespaces.py",
    "launching/test_env.py",
    "launching/test_kubernetes.py",
    "launching/test_scripts.py",
    "test_site.py",
    "test_packaging.py",
    "launching/test_torchrun.py",
    "test_telemetry.py",
)
"""Files whose tests start programs: torchrun, launchers, SLURM, hosts that are namespaces, compilers."""
COMPUTING = (
    "bert/test_deepspeed.py",
    "fuzz/test_fuzz.py",
    "checkpoint/test_table.py",
    "optim/test_fsdp2_state.py",
    "deepspeed/test_checkpoints.py",
    "bert/test_train.py",
    "kernels/test_remainders.py",
    "optim/test_fsdp2_training.py",
    "bert/test_fsdp2.py",
    "gpu_check/test_rehearsal.py",
    "deepspeed/test_interplay.py",
    "bert/test_variants.py",
    "optim/test_sharded_exact.py",
    "bench/test_step.py",
    "deepspeed/test_exact.py",
    "plan/test_measured.py",
)
"""The longest other files. One follows each of those above, which mostly wait: two that wait leave cores idle."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        fork_server.start()
        rewriting.write(config, TESTS)


def file_of(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {file: 2 * number for number, file in enumerate(SYSTEM)}
    place |= {file: 2 * number + 1 for number, file in enumerate(COMPUTING)}
    for item in items:
        item.add_marker("system" if file_of(item) in SYSTEM else "unit")
    items.sort(key=lambda item: place.get(file_of(item), 2 * len(place)))


_imported, _threads = 0, 0


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_runtest_setup() -> None:
    """One thread, whatever the last test set. Collections, and searches for DDP (`gradients/ddp.py`), look at what
    tests make and not at all that is imported.
    """
    import torch  # not by the process that only hands files to the workers of pytest-xdist

    global _imported, _threads
    _threads = _threads or torch.get_num_threads()
    torch.set_num_threads(_threads)
    if len(sys.modules) > _imported:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _worker_pools() -> Iterator[None]:
    yield
    if harness := sys.modules.get("tests.harness"):
        harness.shutdown_pools()
