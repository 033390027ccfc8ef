"""Fault injection: kills, hangs or slows a rank, or fails its writes, at a named point of a step.

    SHARDED_LAMB_FAULT="kill@mid-backward:step=7:rank=1; slow@step:rank=0:seconds=2" torchrun …

A fault is ``ACTION@POINT`` and conditions ``:key=value``; several are separated by ``;``:

    kill     sends SIGKILL to this process, delay seconds later
    freeze   sends SIGSTOP to this process, likewise: it lives and no longer responds
    hang     sleeps for ever in this thread; holds no lock
    slow     sleeps for seconds in this thread
    full     raises OSError ENOSPC, as on a full disk (alias "disk-full")
    nan      makes point() return True: its caller sets a gradient to NaN

Conditions: ``rank``; ``step``, which the training loop reports by ``point("step", step=...)`` (the recipe does);
``visit``: only the n-th time, from 1, that the other conditions hold; ``attempt``: of torchrun, default 0, so that a
restarted run is not hit again ("any": every attempt). The variable is read once; without it a point costs one call.
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
"""The environment variable that holds the faults."""

POINTS = {
    "construction": "in ShardedLamb's constructor, before ranks compare its arguments",
    "step": "the training loop begins a step and reports its number",
    "backward": "before the backward of a micro-batch",
    "mid-backward": "stage 2: in backward, before a bucket is reduced",
    "gradient": "before gradients are read or sent",
    "reduce-scatter": "before a bucket's reduce-scatter",
    "mid-reduce-scatter": "while it is in flight",
    "all-reduce": "before a small all-reduce, (a) or (b)",
    "all-gather": "before a bucket's all-gather",
    "mid-all-gather": "while it is in flight",
    "pass-1": "before moments are written",
    "pass-2": "before weights are written",
    "checkpoint-write": "before this rank writes its data",
    "checkpoint-fsync": "after the data are written, before they are synced to disk",
    "checkpoint-manifest": "before the manifest is written",
    "checkpoint-rename": "before the folder gets its final name",
    "checkpoint-latest": "before `latest` points at it",
    "checkpoint-prune": "before old checkpoints are deleted",
}
"""{point: when a run passes it}, in the order of a run."""

_ACTIONS = ("kill", "freeze", "hang", "slow", "full", "nan")
_NEEDS = {"slow": "seconds"}
_TAKES = {"kill": {"delay"}, "freeze": {"delay"}, "slow": {"seconds"}}
_CONDITIONS = {"rank", "step", "visit", "attempt"}


@dataclass(frozen=True)
class Fault:
    """An action at a point. A condition of None always holds."""

    action: str
    point: str
    rank: int | None = None
    step: int | None = None
    visit: int | None = None
    attempt: int | None = 0
    seconds: float = 0.0  # sleep of "slow"
    delay: float = 0.0  # seconds from the point to "kill" and "freeze"


def parse(text: str) -> tuple[Fault, ...]:
    """The faults in ``text``, in the syntax of `VARIABLE`.

    Raises:
        ValueError: a syntax error; shows the variable and the wrong part.
    """
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
        raise _refused(text, part, "nan needs the point gradient: nan@gradient")
    if action == "full" and not where.startswith("checkpoint-"):
        raise _refused(text, part, "full needs a point that writes: checkpoint-…")
    values: dict[str, int | float | None] = {}
    for condition in conditions:
        key, _, value = condition.partition("=")
        if key not in _CONDITIONS | _TAKES.get(action, set()) or key in values:
            known = ", ".join(sorted(_CONDITIONS | _TAKES.get(action, set())))
            raise _refused(text, part, f"{condition!r}: expected key=value, once each of {known}")
        values[key] = _number(key, value, text, part)
    if action in _NEEDS and _NEEDS[action] not in values:
        raise _refused(text, part, f"{action} needs {_NEEDS[action]}=…")
    return Fault(action, where, **values)  # type: ignore[arg-type]


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
    """This process's faults, and the points that it has passed."""

    faults: tuple[Fault, ...]
    rank: int
    visits: dict[Fault, int] = field(default_factory=dict)
    without_step: dict[Fault, int] = field(default_factory=dict)  # passes before any step was reported
    at_step: int | None = None

    @staticmethod
    def of(environ: Mapping[str, str]) -> "Injector | None":
        """The faults of this rank and attempt; None if there are none.

        Raises:
            ValueError: see `parse`.
        """
        faults = parse(environ.get(VARIABLE, ""))
        if not faults:
            return None
        rank = int(environ.get("RANK") or 0)
        attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
        own = [f for f in faults if f.rank in (None, rank) and f.attempt in (None, attempt)]
        return Injector(tuple(own), rank) if own else None

    def passed(self, where: str, step: int | None) -> bool:
        assert where in POINTS, f"{where!r} is not in faults.POINTS"
        if step is not None:
            self.at_step = step
        makes_nan = [self._act(fault) for fault in self._due(where)]
        return any(makes_nan)

    def _due(self, where: str) -> Iterable[Fault]:
        for fault in self.faults:
            if fault.point != where:
                continue
            if fault.step is not None and self.at_step is None:
                self._warn_without_step(fault)
            if fault.step not in (None, self.at_step):
                continue
            self.visits[fault] = self.visits.get(fault, 0) + 1
            if fault.visit in (None, self.visits[fault]):
                yield fault

    def _warn_without_step(self, fault: Fault) -> None:
        """Warn once if the loop does not report its steps."""
        self.without_step[fault] = self.without_step.get(fault, 0) + 1
        if self.without_step[fault] == 2:
            logger.warning(
                "%s: %s@%s waits for step=%d, and this loop does not report its steps: call "
                'sharded_lamb.faults.point("step", step=...) in it, or count with visit= instead',
                *(VARIABLE, fault.action, fault.point, fault.step),
            )

    def _act(self, fault: Fault) -> bool:
        """Returns whether the caller must set a gradient to NaN."""
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
    """This process's injector, read from the environment at the first call; None without faults.

    Raises:
        ValueError: see `parse`.
    """
    return Injector.of(os.environ)


def point(name: str, *, step: int | None = None) -> bool:
    """Pass a point: trigger the faults that are due here.

    Args:
        name: one of `POINTS`; "checkpoint: write" means "checkpoint-write".
        step: the training loop's step; it also holds for later points.

    Returns:
        Whether the caller must set a gradient to NaN; False except at "gradient".

    Raises:
        ValueError: the environment variable has a syntax error.
        OSError: ENOSPC, injected.
    """
    here = injector()
    return here is not None and here.passed(name.replace(": ", "-"), step)
