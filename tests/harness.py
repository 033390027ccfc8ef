"""Runs a function on the ranks of a gloo process group, in worker processes that are reused over cases.

    results = run_ranks(3, case, arg)          # case(rank, arg) on each of 3 ranks; results[rank]

The workers of a world size are started at its first use and stay until the session ends. A case that raises or
breaks its process group may leave collectives half done: where every rank has answered, the workers destroy all
groups and meet in a new one, under a prefix of the store that no earlier group used. Where a rank hangs or dies,
or where the groups cannot be renewed, the workers are killed and the next use starts new ones. Arguments and
results travel as plain pickles: tensors arrive as copies, no memory is shared.

`case` must be a module-level function (workers import it by name). Every case starts with the same seeds,
default dtype and environment, one thread, and without the process groups that earlier cases made, DeepSpeed's among
them.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import operator
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tests import fork_server

_START_TIMEOUT = 120.0
# A group whose pending work waits for a peer that waits likewise is never destroyed.
_RENEWAL_TIMEOUT = 10.0
# Ranks that wait for one that failed will not get there; they get this long to fail by themselves.
_GRACE_AFTER_ERROR = 5.0
# Groups whose connections stay open poll them from threads of their own, which slow all later cases.
_MOST_THREADS = 40
_LINEAR = torch.nn.functional.linear  # ZeRO-3 replaces it
# Above any case's own timeout, so that the harness and not gloo decides when a case hangs.
_GROUP_TIMEOUT = timedelta(minutes=29)  # not the default, so that a test can tell


class RankError(NamedTuple):
    """What went wrong on one rank. `kind` is the exception's class name, or Timeout, Abandoned or Died."""

    kind: str
    message: str
    traceback: str


class RankErrors(Exception):
    """Some ranks failed. `errors` holds theirs; ranks that returned are in `returned`."""

    def __init__(self, what: str, errors: dict[int, RankError], returned: list[int]) -> None:
        self.errors = errors
        self.returned = returned
        lines = [f"{what}: {len(errors)} of {len(errors) + len(returned)} ranks failed"]
        for rank in sorted([*errors, *returned]):
            lines.append(f"--- rank {rank}: " + (_describe(errors[rank]) if rank in errors else "returned"))
        super().__init__("\n".join(lines))


def _describe(error: RankError) -> str:
    text = f"{error.kind}: {error.message}"
    return f"{text}\n{error.traceback.rstrip()}" if error.traceback else text


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Calls `fn(rank, *args, **kwargs)` on every rank of a gloo group and returns the results by rank.

    Raises:
        RankErrors: a rank raised, died, or did not return in `timeout` seconds. Once one has failed, the
            others get a few seconds more and are then reported as Abandoned.
    """
    return _run(world_size, fn, args, kwargs, timeout=timeout, grace=_GRACE_AFTER_ERROR)


def run_ranks_expecting_errors(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
) -> dict[int, tuple[str, str]]:
    """As `run_ranks`, for a case in which every rank must raise by itself: {rank: (class name, message)}.

    Raises:
        RankErrors: some ranks raised and others did not, or did not in time.
    """
    try:
        _run(world_size, fn, args, kwargs, timeout=timeout, grace=timeout)
    except RankErrors as failure:
        raised_by_itself = {
            rank: (error.kind, error.message) for rank, error in failure.errors.items() if error.traceback
        }
        if len(raised_by_itself) == world_size:
            return raised_by_itself
        raise
    raise AssertionError(f"{fn.__qualname__}: all {world_size} ranks returned, and all should have raised")


def shutdown_pools() -> None:
    """Ends all workers. The next `run_ranks` starts new ones."""
    while _pools:
        _pools.popitem()[1].kill()


atexit.register(shutdown_pools)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    log: Path  # its stdout and stderr, and its stack when it had to be killed

    def threads(self) -> int:
        """How many it has; 0 where the system does not say."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else 0

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


@dataclass
class _Pool:
    workers: list[_Worker]
    store: dist.TCPStore  # lives in this process, so that it outlives any worker
    folder: tempfile.TemporaryDirectory[str]
    generation: int = 0  # how often the process group was renewed

    def renewed(self) -> bool:
        """Gives the workers, which have all answered, a new process group; False where one of them fails to."""
        self.generation += 1
        renewal = pickle.dumps((_renew_groups, (self.generation,), {}))
        progress = _await_replies(self, renewal, _RENEWAL_TIMEOUT, _GRACE_AFTER_ERROR)
        return not progress.errors and progress.reusable

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self.folder.cleanup()


@dataclass
class _Progress:
    """The replies of one case: `waiting` shrinks as ranks land in `results` or `errors`."""

    waiting: dict[int, _Worker]
    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, RankError] = field(default_factory=dict)
    reusable: bool = True
    answered: bool = True  # by every rank: none hung or died

    def take_reply(self, rank: int) -> None:
        worker = self.waiting.pop(rank)
        try:
            ok, value, reusable = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            worker.process.join(5)
            died = f"exit code {worker.process.exitcode}; its output ends:\n{worker.log_tail()}"
            self.errors[rank] = RankError("Died", died, "")
            self.answered = False
            return
        self.reusable = self.reusable and reusable
        if ok:
            self.results[rank] = value
        else:
            self.errors[rank] = RankError(*value)

    def _log_sizes(self) -> list[int]:
        return [worker.log.stat().st_size for worker in self.waiting.values()]

    def give_up(self, kind: str, reason: str) -> None:
        """Reports the ranks that are still running, each with its stack."""
        before = sizes = self._log_sizes()
        for worker in self.waiting.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGUSR1)  # faulthandler writes the stack to the log
        for _ in range(50):  # until all are written
            time.sleep(0.1)
            last, sizes = sizes, self._log_sizes()
            if sizes == last and all(map(operator.gt, sizes, before)):
                break
        for rank, worker in self.waiting.items():
            self.errors[rank] = RankError(kind, f"{reason}; it was at:\n{worker.log_tail()}", "")
            self.answered = False
        self.waiting.clear()


_pools: dict[int, _Pool] = {}
_store: dist.TCPStore | None = None  # in a worker, its connection to the pool's


def _run(
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    timeout: float,
    grace: float,
) -> list[Any]:
    case = pickle.dumps((fn, args, kwargs))
    pool = _pools.get(world_size)
    # The pool is out of the table while it works: whatever ends this call early, it is not used again.
    _pools.pop(world_size, None)
    pool = pool or _start_pool(world_size)
    clean = False
    try:
        progress = _await_replies(pool, case, timeout, grace)
        clean = not progress.errors and progress.reusable
        clean = clean or (progress.answered and pool.renewed())
        clean = clean and not any(worker.threads() > _MOST_THREADS for worker in pool.workers)
    finally:
        if clean:
            _pools[world_size] = pool
        else:
            pool.kill()
    if progress.errors:
        raise RankErrors(fn.__qualname__, progress.errors, sorted(progress.results))
    return [progress.results[rank] for rank in range(world_size)]


def _await_replies(pool: _Pool, case: bytes, timeout: float, grace: float) -> _Progress:
    progress = _Progress(dict(enumerate(pool.workers)))
    for worker in pool.workers:
        with contextlib.suppress(OSError):  # it died since the last case, which reading its reply will report
            worker.pipe.send_bytes(case)
    deadline, reason = time.monotonic() + timeout, ("Timeout", f"no result after {timeout:g} s")
    while progress.waiting:
        ranks = {worker.pipe: rank for rank, worker in progress.waiting.items()}
        ready = wait(list(ranks), max(0.0, deadline - time.monotonic()))
        if not ready:
            progress.give_up(*reason)
        had_errors = bool(progress.errors)
        for pipe in ready:
            progress.take_reply(ranks[pipe])
        if progress.errors and not had_errors and time.monotonic() + grace < deadline:
            first = min(progress.errors)
            deadline = time.monotonic() + grace
            reason = ("Abandoned", f"still running {grace:g} s after rank {first} failed")
    return progress


def _start_pool(world_size: int) -> _Pool:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pool = _Pool([], store, tempfile.TemporaryDirectory(prefix="ranks-"))
    context = fork_server.context()
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            log = Path(pool.folder.name, f"rank{rank}.log")
            log.touch()
            process = context.Process(
                target=_worker_main, args=(theirs, rank, world_size, store.port, str(log))
            )
            process.start()
            theirs.close()
            pool.workers.append(_Worker(process, ours, log))
        started = _await_replies(
            pool, pickle.dumps((_world_size, (), {})), _START_TIMEOUT, _GRACE_AFTER_ERROR
        )
    except BaseException:
        pool.kill()
        raise
    if started.errors:
        pool.kill()
        raise RankErrors("starting the workers", started.errors, sorted(started.results))
    return pool


def _world_size(rank: int) -> int:
    return dist.get_world_size()


def _join_group(rank: int, world_size: int, generation: int) -> None:
    """Names in the store repeat from one generation to the next, hence a prefix of its own for each."""
    assert _store is not None
    store = dist.PrefixStore(f"generation{generation}", _store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT)


def _renew_groups(rank: int, generation: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a group that is still referred to keeps its connections open
    _join_group(rank, int(os.environ["WORLD_SIZE"]), generation)
    dist.barrier()


def _worker_main(pipe: Connection, rank: int, world_size: int, port: int, log: str) -> None:
    _die_with_parent()
    _redirect_output(log)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    global _store
    _store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    _join_group(rank, world_size, 0)
    environment = dict(os.environ)
    imported = 0
    while True:
        try:
            case = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        _clean_up_after_last_case(environment)
        if len(sys.modules) > imported:
            gc.freeze()  # later collections look at what cases made, not at all of torch
            imported = len(sys.modules)
        ok, value = _call(case, rank)
        reusable = (
            dist.is_initialized() and dist.get_world_size() == world_size and _groups_can_be_destroyed()
        )
        try:
            reply = pickle.dumps((ok, value, reusable))
        except Exception as error:
            reply = pickle.dumps((False, _as_rank_error(error), False))
        del value
        pipe.send_bytes(reply)


def _call(case: bytes, rank: int) -> tuple[bool, Any]:
    try:
        fn, args, kwargs = pickle.loads(case)
        return True, fn(rank, *args, **kwargs)
    except BaseException as error:
        return False, _as_rank_error(error)


def _as_rank_error(error: BaseException) -> RankError:
    return RankError(type(error).__name__, str(error), "".join(traceback.format_exception(error)))


def _groups_can_be_destroyed() -> bool:
    """Groups made with use_local_synchronization are named by their ranks: torch names the next such group alike
    once they are destroyed, and it would find their stale addresses in the store. The package's names are unique."""
    names = dist.distributed_c10d._world.pg_names.values()
    return all(name.isdigit() or name == "default_pg" or name.startswith("sharded_lamb/") for name in names)


def _clean_up_after_last_case(environment: dict[str, str]) -> None:
    """Done at the start of a case: all ranks have replied by then, so nobody still uses these groups."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _clear_sharding_prop_cache()  # DTensor keeps specs, with meshes of the groups that are gone
    if deepspeed_groups := sys.modules.get("deepspeed.utils.groups"):
        importlib.reload(deepspeed_groups)  # its globals keep groups that are gone
    torch.nn.functional.linear = _LINEAR
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    _show_stack_at_signal()
    torch.set_num_threads(1)  # a case may have set more, which spin beside other ranks
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    random.seed(0)


def _redirect_output(log: str) -> None:
    """Output of C libraries included; `Died` and `Timeout` show its end."""
    stream = open(log, "w", buffering=1)  # noqa: SIM115 (stays open as long as the worker lives)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    _show_stack_at_signal()


def _show_stack_at_signal() -> None:
    """On stderr, also after a case that had a handler of its own: restoring "the one before" removes this one."""
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=False)


def _die_with_parent() -> None:
    """A worker stuck in a collective would not see its pipe close. PR_SET_PDEATHSIG is Linux's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
