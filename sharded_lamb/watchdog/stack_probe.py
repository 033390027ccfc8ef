"""The training thread's position, whether it waits for other ranks there, and whether a process is alive."""

import faulthandler
import linecache
import os
import re
import socket
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


@dataclass(frozen=True)
class Frame:
    """One call on a thread's stack."""

    file: str
    line: int  # 0: none, or unknown
    function: str

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.file).parts[-2:])}:{self.line} {self.function}"

    @property
    def source(self) -> str:
        """The line's text, "" if the file cannot be read."""
        return linecache.getline(self.file, self.line)


def locate_thread(ident: int) -> Location:
    """The thread's current position."""
    stacks, is_whole = _stacks()
    frames = stacks.pop(ident, None)
    if frames is None:
        return (
            Location("a thread that has ended", COMPUTES)
            if is_whole
            else Location("an unknown place", MAY_WAIT)
        )
    location = _locate(frames)
    if location.waits == MAY_WAIT and "backward" in location.at:
        # On a GPU autograd runs hooks in threads of its own.
        stacks.pop(threading.get_ident(), None)
        for hook in map(_locate, stacks.values()):
            if hook.waits == WAITS:
                return Location(f"{hook.at}, in {location.at}", WAITS)
    return location


def stack_of_thread(ident: int) -> str:
    """The thread's stack as in a traceback; "" once it has ended."""
    frames = _stacks()[0].get(ident, [])
    calls = [(frame.file, frame.line, frame.function, frame.source.strip()) for frame in reversed(frames)]
    return "".join(traceback.format_list(calls))


def _stacks() -> tuple[dict[int, list[Frame]], bool]:
    """({ident: the thread's frames, from the innermost}, whether that is all threads).

    faulthandler writes at most 100 threads and 100 frames of each, the innermost. It does not release the GIL: to walk
    the frames of a thread that continues meanwhile (``sys._current_frames``, ``f_back``) can end the process by SIGSEGV
    in CPython 3.11.
    """
    try:
        with _memory_file() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return parsed(file.read().decode("ascii", "replace"))
    except OSError:  # too many files are open, say
        return {}, False


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stacks"), "w+b")
    return tempfile.TemporaryFile()


_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File (?:"(.*)"|\?\?\?), line (\d+|\?\?\?) in (.*)')
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


def parsed(dump: str) -> tuple[dict[int, list[Frame]], bool]:
    """`_stacks` from faulthandler's text, which escapes what is not ASCII."""
    stacks: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    text = _ESCAPE.sub(lambda code: chr(int(code[1] or code[2] or code[3], 16)), dump)
    for line in text.split("\n"):
        if thread := _THREAD.match(line):
            frames = stacks.setdefault(int(thread[1], 16), [])
        elif call := _FRAME.fullmatch(line):
            frames.append(Frame(call[1] or "???", int(call[2]) if call[2].isdecimal() else 0, call[3]))
    return stacks, "..." not in text.split("\n")


def _locate(frames: list[Frame]) -> Location:
    """``frames``: from the innermost, without the watchdog's own, where the thread locates itself."""
    frames = [frame for frame in frames if not frame.file.startswith(_WATCHDOG)]
    caller = next((at for at, frame in enumerate(frames) if frame.file != threading.__file__), 0)
    if frames and frames[caller].file in _OUR_COLLECTIVES:  # it waits for a thread that waits in C++
        frames = frames[caller:]
    if not frames:
        return Location("the end of the program", COMPUTES)
    inside = []
    for frame in frames:
        if not frame.file.startswith(_TORCH):
            break
        inside.append(frame)
    outside = frames[len(inside)] if len(inside) < len(frames) else frames[-1]
    at = str(outside)
    if outside.file.startswith(_PACKAGE):
        user = next((f for f in frames if not f.file.startswith((_TORCH, _PACKAGE, "<"))), None)
        at += f", from {user}" if user is not None else ""
    return Location(at, _waits(inside, outside))


def _waits(inside: list[Frame], outside: Frame) -> int:
    """``inside``: torch's frames below ``outside``; empty if ``outside`` calls C code or nothing."""
    if any(os.path.basename(frame.file) in _COLLECTIVE_FILES for frame in inside):
        return WAITS
    if any(frame.function == "_engine_run_backward" for frame in inside[:1]):
        return MAY_WAIT  # DistributedDataParallel waits below it
    line = (inside[0] if inside else outside).source
    if inside:  # DistributedDataParallel broadcasts buffers, ZeroRedundancyOptimizer waits
        return WAITS if _WAITING_CALL.search(line) else COMPUTES
    if outside.file in _OUR_COLLECTIVES or _WAITING_CALL.search(line):
        return WAITS
    on_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return MAY_WAIT if on_device and _DEVICE_CALL.search(line) else COMPUTES


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
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "has ended"
        except (OSError, IndexError):
            return None
        return {"Z": "has ended", "X": "has ended", "T": "is stopped", "t": "is stopped"}.get(state)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {socket.gethostname()} {os.getpid()}"  # equal to no other process's
