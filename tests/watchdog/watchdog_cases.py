"""Functions that tests of the watchdog run in processes of their own.

`train` is one rank's training, with trouble on one of the ranks.
"""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.watchdog import Watchdog

STEPS, TROUBLED_STEP = 6, 3


def hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(600)


def get_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def oversleep() -> None:
    time.sleep(600)


def complain() -> None:
    raise KeyError("a bad sample")


def load_slowly() -> None:
    """For longer than the timeout, with beats; then for longer than the timeout, paused."""
    assert watchdog is not None
    for _ in range(6):
        time.sleep(watchdog.timeout_s / 4)
        watchdog.beat(torch.tensor(3))  # type: ignore[arg-type]
    with watchdog.paused("validating"):
        time.sleep(watchdog.timeout_s * 1.25)


def announce() -> None:
    """Print a line, then compute for less than the timeout."""
    print("here", flush=True)
    time.sleep(1)


TROUBLES: dict[str, Callable[[], None]] = {
    "gil": hold_the_gil,
    "stop": get_stopped,
    "die": die,
    "sleep": oversleep,
    "late": oversleep,
    "raise": complain,
    "slow": load_slowly,
    "announce": announce,
}
watchdog: Watchdog | None = None


class Model(nn.Module):
    def __init__(self, trouble: Callable[[], None] | None) -> None:
        super().__init__()
        self.first, self.second, self.trouble, self.calls = nn.Linear(8, 8), nn.Linear(8, 1), trouble, 0

    def come_late(self) -> None:
        """The others wait for this rank's buffers meanwhile."""
        if self.trouble is not None and self.calls == TROUBLED_STEP:
            self.trouble()

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        if self.trouble is not None and self.calls == TROUBLED_STEP and not hasattr(self, "mean"):
            self.trouble()
        return self.second(self.first(batch))


def train(trouble: str, troubled: int, timeout_s: float) -> None:
    global watchdog
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = Model(TROUBLES[trouble] if dist.get_rank() == troubled else None)
    called: nn.Module = model
    if trouble == "late":
        model.register_buffer("mean", torch.zeros(1))
        called = nn.parallel.DistributedDataParallel(model)
        called.register_forward_pre_hook(lambda *_: model.come_late())
    optimizer = ShardedLamb(model.named_parameters(), stage=1 if trouble == "late" else 2)
    watchdog = Watchdog(timeout_s)
    with nullcontext() if trouble == "slow" else watchdog:  # the end of the program closes it
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            called(torch.ones(4, 8)).sum().backward()
            optimizer.step()
            watchdog.beat(f"step {step}")
    dist.destroy_process_group()
    print("finished", flush=True)


# -- alone --------------------------------------------------------------------------------------------------


def hang_after_beat(beat: str, *, full_pipe: bool) -> None:
    """Exits with 7. ``full_pipe``: stderr is a pipe that is full and never read."""
    if full_pipe:
        _, writer = os.pipe()
        os.dup2(writer, 2)
    with Watchdog(0.5, exit_code=7) as watchdog:
        watchdog.beat(beat)
        while full_pipe:
            os.write(2, b"x" * 4096)
        time.sleep(60)


def beat_in_a_signal_handler() -> None:
    count = 0

    def handler(*_: object) -> None:
        nonlocal count
        count += 1
        watchdog.beat("signal")

    with Watchdog(60) as watchdog:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        while count < 2000:
            watchdog.beat("loop")
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve_a_store(port: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    time.sleep(100)
