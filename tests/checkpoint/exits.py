"""How processes end after training: ``python -m tests.checkpoint.exits RUNS KIND…`` prints {kind: {exit code: ranks}}.

Every run forks two ranks, which end as programs do. KIND joins "save", "async", "unasked" (an async save whose result
is never read), "failed" (such a save, which fails) and "destroy" (the program destroys the process groups) by +; "step"
alone: only steps. Exit code 99: threads of the package's process groups outlived the exit handlers, and could abort the
process (exit code -6).
"""

import atexit
import collections
import gc
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

_limit: int | None = None  # threads of process groups that may live to the end


def _check_threads() -> None:
    """Registered before all imports: the last exit handler."""
    tasks = Path("/proc/self/task")
    if _limit is not None and tasks.is_dir():
        names = [Path(task, "comm").read_text().strip() for task in tasks.iterdir()]
        if names.count("pt_gloo_runloop") > _limit:
            os.write(2, f"threads at the end: {sorted(names)}\n".encode())
            os._exit(99)


atexit.register(_check_threads)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (the first step imports it, in every fork)
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402

from sharded_lamb import ShardedLamb  # noqa: E402
from sharded_lamb.checkpoint import Checkpoints, async_save  # noqa: E402


def _fail(folder: Path) -> None:
    raise OSError(f"{folder} is as it should be")


def program(acts: list[str], folder: str) -> object:
    """A program's last acts. Returns what is alive when it ends."""
    dist.init_process_group("gloo")
    model = torch.nn.Linear(64, 64)
    opt = ShardedLamb(model.named_parameters(), stage=2)
    checkpoints = Checkpoints(folder)
    model(torch.randn(4, 64)).sum().backward()
    opt.step()
    if "save" in acts:
        checkpoints.save(1, model, opt)
    if "async" in acts:
        checkpoints.async_save(1, model, opt).result()
    if "unasked" in acts:
        checkpoints.async_save(1, model, opt)
    if "failed" in acts:
        async_save(folder, model, opt, written=_fail)
    if "destroy" in acts:
        dist.destroy_process_group()
    return model, opt, checkpoints


def start(rank: int, port: int, acts: list[str], folder: str) -> int:
    """Fork a rank; returns its process id."""
    global _limit
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    alive = program(acts, folder)
    _limit = 0 if "destroy" in acts else 2  # the default group's, which are the program's own
    sys.exit(alive is None)


def ended(pids: list[int], timeout_s: float = 120.0) -> list[int]:
    """Exit codes; -9 of those that had to be killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                if time.monotonic() > deadline:
                    os.kill(pid, 9)
                got, status = os.waitpid(pid, os.WNOHANG)
                if got:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def main() -> None:
    runs, kinds = int(sys.argv[1]), sys.argv[2:]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    gc.freeze()  # collections in the forks look at what they make, not at all of torch
    codes: dict[str, collections.Counter[int]] = {kind: collections.Counter() for kind in kinds}
    for kind in kinds * runs:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Not a TemporaryDirectory: a fork that ends would remove it, while its thread writes.
        folder = tempfile.mkdtemp()
        codes[kind].update(ended([start(rank, port, kind.split("+"), f"{folder}/run") for rank in range(2)]))
        shutil.rmtree(folder)
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
