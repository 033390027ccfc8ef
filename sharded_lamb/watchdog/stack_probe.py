"""The training thread's position, whether it waits for other ranks there, and whether a process is alive."""

import linecache
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

COMPUTES, MAY_WAIT, WAITS = 0, 1, 2
"""Whether a thread waits for other ranks: no; perhaps, in C++ code that shows no frames; yes."""

_TORCH = str(Path(torch.__file__).parent) + os.sep
_WATCHDOG = str(Path(__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parent.parent) + os.sep
# Not all of torch/distributed: a model's forward runs below FSDP's and DDP's frames.
_COLLECTIVE_FILES = (
    "distributed_c10d.py",
    "c10d_logger.py",
    "_functional_collectives.py",
    "_fsdp_collectives.py",
)
_OUR_COLLECTIVES = tuple(
    str(Path(_PACKAGE, "comm", name)) for name in ("collectives.py", "pending.py", "consistency.py")
)
_WAITING_CALL = re.compile(r"\.wait\(|\bbarrier\(|\bdist\.\w+\(")
# Where the host waits for a GPU, it may wait for a collective on it.
_DEVICE_CALL = re.compile(r"\.(item|tolist|cpu|synchronize|numpy)\(")


@dataclass(frozen=True)
class Location:
    """A thread's position."""

    at: str  # the innermost Python frame outside torch, as "file:line function"
    waits: int  # COMPUTES, MAY_WAIT or WAITS


def locate_thread(ident: int) -> Location:
    """The thread's current position."""
    frames = sys._current_frames()
    frame = frames.pop(ident, None)
    if frame is None:
        return Location("a thread that has ended", COMPUTES)
    location = _locate(list(_outwards(frame)))
    if location.waits == MAY_WAIT and "backward" in location.at:
        # On a GPU autograd runs hooks in threads of its own.
        own = threading.get_ident()
        for other, other_frame in frames.items():
            hook = _locate(list(_outwards(other_frame)))
            if other != own and hook.waits == WAITS:
                return Location(f"{hook.at}, in {location.at}", WAITS)
    return location


def stack_of_thread(ident: int) -> str:
    """The thread's stack as in a traceback; "" once it has ended."""
    frame = sys._current_frames().get(ident)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost; skips the watchdog's own frames, where the thread locates itself."""
    while frame is not None:
        if not _file(frame).startswith(_WATCHDOG):
            yield frame
        frame = frame.f_back


def _locate(frames: list[FrameType]) -> Location:
    """``frames``: from the innermost."""
    caller = next((at for at, frame in enumerate(frames) if _file(frame) != threading.__file__), 0)
    if frames and _file(frames[caller]) in _OUR_COLLECTIVES:  # it waits for a thread that waits in C++
        frames = frames[caller:]
    if not frames:
        return Location("the end of the program", COMPUTES)
    inside = []
    for frame in frames:
        if not _file(frame).startswith(_TORCH):
            break
        inside.append(frame)
    outside = frames[len(inside)] if len(inside) < len(frames) else frames[-1]
    at = _named(outside)
    if _file(outside).startswith(_PACKAGE):
        user = next((f for f in frames if not _file(f).startswith((_TORCH, _PACKAGE, "<"))), None)
        at += f", from {_named(user)}" if user is not None else ""
    return Location(at, _waits(inside, outside))


def _waits(inside: list[FrameType], outside: FrameType) -> int:
    """``inside``: torch's frames below ``outside``; empty if ``outside`` calls C code or nothing."""
    if any(os.path.basename(_file(frame)) in _COLLECTIVE_FILES for frame in inside):
        return WAITS
    if any(frame.f_code.co_name == "_engine_run_backward" for frame in inside[:1]):
        return MAY_WAIT  # DistributedDataParallel waits below it
    innermost = inside[0] if inside else outside
    line = linecache.getline(_file(innermost), innermost.f_lineno)
    if inside:  # DistributedDataParallel broadcasts buffers, ZeroRedundancyOptimizer waits
        return WAITS if _WAITING_CALL.search(line) else COMPUTES
    if _file(outside) in _OUR_COLLECTIVES or _WAITING_CALL.search(line):
        return WAITS
    on_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return MAY_WAIT if on_device and _DEVICE_CALL.search(line) else COMPUTES


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _named(frame: FrameType) -> str:
    path = Path(_file(frame))
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"


@dataclass(frozen=True)
class Member:
    """A rank's process, as the other ranks know it."""

    rank: int
    host: str
    pid: int
    machine: str  # processes with equal ones see each other's pids

    @staticmethod
    def here(rank: int) -> "Member":
        return Member(rank, socket.gethostname(), os.getpid(), _machine())

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def process_state(self) -> str | None:
        """ "has ended" or "is stopped"; None if it runs or is on another machine."""
        if self.machine != _machine():
            return None
        try:
            # pid (name) state …; a name may contain any character
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "has ended"
        except (OSError, IndexError):
            return None
        return {"Z": "has ended", "X": "has ended", "T": "is stopped", "t": "is stopped"}.get(state)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {socket.gethostname()} {os.getpid()}"  # equal to no other process's
