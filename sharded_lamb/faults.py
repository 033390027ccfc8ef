"""Faults on purpose: a rank that is killed, hangs, is slow, or cannot write, at a named point of a step.

    SHARDED_LAMB_FAULT="kill@mid-backward:step=7:rank=1; slow@step:rank=0:seconds=2" torchrun …

A fault is ``ACTION@POINT`` and conditions ``:key=value``; several are separated by ``;``.

======== =========================================================================
kill     SIGKILL of this process, ``delay`` seconds later
freeze   SIGSTOP of this process, likewise: it is there and answers nothing
hang     this thread sleeps for ever and holds nothing
slow     this thread sleeps for ``seconds``
full     ``OSError`` ENOSPC, as on a full disk ("disk-full" is the same)
nan      the caller of `point` is told to make a gradient NaN
======== =========================================================================

Conditions: ``rank``; ``step``, as the training loop counts and tells by ``point("step", step=...)`` (the recipe does);
``visit``: only the n-th time, from 1, that the others are met; ``attempt``: of torchrun, 0 unless given, so that what a
fault broke goes on when it is started again ("any": every one). The variable is read once; without it a point costs a
call that returns.
"""

import difflib
import errno
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

logger = logging.getLogger("sharded_lamb")

VARIABLE = "SHARDED_LAMB_FAULT"

POINTS = {
    "construction": "of a ShardedLamb, before its ranks compare what they construct",
    "step": "the training loop begins a step; tells which",
    "backward": "before the backward of a micro-batch",
    "mid-backward": "stage 2: in backward, a bucket is about to be reduced",
    "gradient": "before gradients are read or sent",
    "reduce-scatter": "before that of a bucket",
    "mid-reduce-scatter": "it is under way",
    "all-reduce": "before a small all-reduce, (a) or (b)",
    "all-gather": "before that of a bucket",
    "mid-all-gather": "it is under way",
    "pass-1": "before moments are written",
    "pass-2": "before weights are written",
    "checkpoint-write": "before this rank's data are written",
    "checkpoint-fsync": "they are written and not on the disk yet",
    "checkpoint-manifest": "before the manifest is",
    "checkpoint-rename": "before the folder gets its name",
    "checkpoint-latest": "before `latest` points at it",
    "checkpoint-prune": "before old checkpoints are deleted",
}
"""Where a fault can be, in the order of a run."""

_ACTIONS = ("kill", "freeze", "hang", "slow", "full", "nan")
_NEEDS = {"slow": "seconds"}
_TAKES = {"kill": {"delay"}, "freeze": {"delay"}, "slow": {"seconds"}}
_CONDITIONS = {"rank", "step", "visit", "attempt"}


@dataclass(frozen=True)
class Fault:
    """What happens where. None: whatever it is."""

    action: str
    point: str
    rank: int | None = None
    step: int | None = None
    visit: int | None = None
    attempt: int | None = 0
    seconds: float = 0.0  # that "slow" sleeps
    delay: float = 0.0  # seconds from the point to "kill" and "freeze"


def parse(text: str) -> tuple[Fault, ...]:
    """Raises ValueError, with what is wrong in it."""
    return tuple(_fault(part.strip(), text) for part in text.split(";") if part.strip())


def _fault(part: str, text: str) -> Fault:
    head, *conditions = (piece.strip() for piece in part.split(":"))
    action, at, where = head.partition("@")
    action = "full" if action == "disk-full" else action
    if not at or action not in _ACTIONS:
        raise _refused(text, part, f"expected ACTION@POINT with one of {', '.join(_ACTIONS)}")
    if where not in POINTS:
        close = difflib.get_close_matches(where, POINTS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise _refused(text, part, f"{hint}The points are {', '.join(POINTS)}")
    if action == "nan" and where != "gradient":
        raise _refused(text, part, "only nan@gradient can be")
    if action == "full" and not where.startswith("checkpoint-"):
        raise _refused(text, part, "a disk is full where it is written to, at a point checkpoint-…")
    found: dict[str, int | float | None] = {}
    for condition in conditions:
        key, _, value = condition.partition("=")
        if key not in _CONDITIONS | _TAKES.get(action, set()) or key in found:
            known = ", ".join(sorted(_CONDITIONS | _TAKES.get(action, set())))
            raise _refused(text, part, f"{condition!r}: expected key=value, once each of {known}")
        found[key] = _number(key, value, text, part)
    if action in _NEEDS and _NEEDS[action] not in found:
        raise _refused(text, part, f"{action} needs {_NEEDS[action]}=…")
    return Fault(action, where, **found)  # type: ignore[arg-type]


def _number(key: str, value: str, text: str, part: str) -> int | float | None:
    if key == "attempt" and value == "any":
        return None
    pattern = r"\d+(\.\d+)?" if key in ("seconds", "delay") else r"\d+"
    if re.fullmatch(pattern, value) is None or (key == "visit" and int(value) == 0):
        what = "seconds" if key in ("seconds", "delay") else "a whole number" + " from 1" * (key == "visit")
        raise _refused(text, part, f"{key}={value}: expected {what}" + ' or "any"' * (key == "attempt"))
    return float(value) if key in ("seconds", "delay") else int(value)


def _refused(text: str, part: str, why: str) -> ValueError:
    return ValueError(f"{VARIABLE}={text!r}: {part!r}: {why}")


@dataclass
class Injector:
    """The faults of this process, and what it has passed."""

    faults: tuple[Fault, ...]
    rank: int
    visits: dict[Fault, int] = field(default_factory=dict)
    untold: dict[Fault, int] = field(default_factory=dict)  # that wait for a step: passed before any was told
    at_step: int | None = None

    @staticmethod
    def of(environ: Mapping[str, str]) -> "Injector | None":
        """None where nothing is to happen in this process. Raises ValueError, see `parse`."""
        faults = parse(environ.get(VARIABLE, ""))
        if not faults:
            return None
        rank = int(environ.get("RANK") or 0)
        attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
        mine = [f for f in faults if f.rank in (None, rank) and f.attempt in (None, attempt)]
        return Injector(tuple(mine), rank) if mine else None

    def passed(self, where: str, step: int | None) -> bool:
        assert where in POINTS, f"{where!r} is not in faults.POINTS"
        if step is not None:
            self.at_step = step
        told = [self._acts(fault) for fault in self._due(where)]
        return any(told)

    def _due(self, where: str) -> Iterable[Fault]:
        for fault in self.faults:
            if fault.point != where:
                continue
            if fault.step is not None and self.at_step is None:
                self._wonder(fault)
            if fault.step not in (None, self.at_step):
                continue
            self.visits[fault] = self.visits.get(fault, 0) + 1
            if fault.visit in (None, self.visits[fault]):
                yield fault

    def _wonder(self, fault: Fault) -> None:
        """Whether anybody will ever say which step it is."""
        self.untold[fault] = self.untold.get(fault, 0) + 1
        if self.untold[fault] == 2:
            logger.warning(
                "%s: %s@%s waits for step=%d, and this loop does not say which step it is: call "
                'sharded_lamb.faults.point("step", step=...) in it, or count with visit= instead',
                *(VARIABLE, fault.action, fault.point, fault.step),
            )

    def _acts(self, fault: Fault) -> bool:
        """Whether the caller is to make a gradient NaN."""
        if fault.action in ("kill", "freeze"):
            _signal_self(signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP, fault.delay)
        elif fault.action == "hang":
            while True:
                time.sleep(3600)
        elif fault.action == "slow":
            time.sleep(fault.seconds)
        elif fault.action == "full":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({VARIABLE}: {fault.point})")
        return fault.action == "nan"


def _signal_self(number: signal.Signals, delay: float) -> None:
    if delay == 0:
        os.kill(os.getpid(), number)
        return
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


@cache
def injector() -> Injector | None:
    """This process's, read from the environment at the first call. Raises ValueError, see `parse`."""
    return Injector.of(os.environ)


def point(name: str, *, step: int | None = None) -> bool:
    """This process passes a point. What is to happen here happens.

    Args:
        name: of `POINTS`; "checkpoint: write" is "checkpoint-write".
        step: of the training loop, if it is known here; holds for the points that follow.

    Returns:
        Whether the caller is to make a gradient NaN; False elsewhere than at "gradient".

    Raises:
        ValueError: the environment variable has a mistake.
        OSError: ENOSPC, on purpose.
    """
    here = injector()
    return here is not None and here.passed(name.replace(": ", "-"), step)
