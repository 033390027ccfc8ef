"""`Watchdog`: the beats of one rank, and what is done when nobody's move any more."""

import atexit
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_lamb.watchdog.clock import AwakeClock
from sharded_lamb.watchdog.diagnosis import DOES, DONE, Report
from sharded_lamb.watchdog.stack_probe import Member, place_of_thread, stack_of_thread
from sharded_lamb.watchdog.store_channel import Talk

EXIT_CODE = 70
"""Of a process that its watchdog ends: EX_SOFTWARE. Any but 0 makes torchrun start the ranks again."""

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|timeout after|socket|NCCL|remote process|peer",
    re.IGNORECASE,
)
_Error = TypeVar("_Error", bound=BaseException)


class Watchdog:
    """Ends all ranks, each with one message that names the rank that hangs, when no rank beats for ``timeout_s``.

        with Watchdog(timeout_s=600) as watchdog:
            for step in range(steps):
                ...
                watchdog.beat(f"step {step}")

    A rank that beats, if slowly, keeps all of them alive. Time in which this process was stopped (SIGSTOP, ``scontrol
    suspend``, a VM's pause) does not count. What takes longer than ``timeout_s`` on some rank beats in
    between, or is done in `paused`. Ranks talk through the rendezvous store, on connections of their own, from daemon
    threads: O(ranks) store operations a period in all, and one read of everyone's by one rank, the first that lives.

    Named are, in this order: ranks that failed; ranks that do not answer (the process is stopped or dead, its machine
    is cut off, or a call holds the GIL); ranks that are not in a collective while others wait in one. The process then
    ends with ``exit_code``, from whatever it hangs in; torchrun with ``--max-restarts`` starts all ranks again. Where
    the store itself is gone (the process that holds it died or was stopped: torchrun's agent on the first node, or
    rank 0), each rank watches itself.

    Args:
        timeout_s: seconds without a beat of any rank. Steps, evaluations and checkpoints must beat more often. None:
            nothing is watched, and nobody asked.
        group: the ranks that wait for each other; default: all. Without torch.distributed: this process alone.
        exit_code: 1 to 255.

    Raises:
        ValueError: ``timeout_s`` or ``exit_code`` out of range; this rank is not in ``group``.

    Construction is collective over ``group``, and starts it in the thread that trains. `close` it, or leave the
    ``with``, in that thread. An error that leaves the ``with`` is told to the others, and explained (`explain`).
    """

    def __init__(
        self,
        timeout_s: float | None = 600.0,
        *,
        group: dist.ProcessGroup | None = None,
        exit_code: int = EXIT_CODE,
    ) -> None:
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s={timeout_s!r}: expected seconds > 0, or None for no watching")
        if not 0 < exit_code < 256:
            raise ValueError(f"exit_code={exit_code!r}: expected 1 to 255, so that launchers see a failure")
        self.timeout_s = float("inf") if timeout_s is None else timeout_s
        self._exit_code = exit_code
        self._thread_id, self._process = threading.get_ident(), os.getpid()
        self._period_s = min(5.0, self.timeout_s / 20)
        self._clock = AwakeClock(self._period_s)
        self._beat, self._beaten, self._patience_s = "none yet", self._clock(), self.timeout_s
        self._over = threading.Event()
        self._talk: Talk | None = None
        self._timer = threading.Thread(target=self._watch, name="sharded_lamb watchdog", daemon=True)
        if timeout_s is None:
            self._over.set()
            return
        self._talk = self._introduced(group)
        if self._talk is not None:
            self._talk.start()
        self._timer.start()
        atexit.register(self._at_exit)

    def _introduced(self, group: dist.ProcessGroup | None) -> Talk | None:
        """With everyone's first report in the store, under a name that no earlier attempt has used."""
        self._here = Member.here(0)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        self._here = Member.here(dist.get_rank())
        if dist.get_rank(group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in group: make a Watchdog on its ranks only")
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, (self._here, uuid.uuid4().hex), group=group)
        members, prefix = [member for member, _ in told], f"sharded_lamb watchdog {told[0][1]}"
        talk = Talk(
            dist.distributed_c10d._get_default_store(),
            prefix,
            members,
            members.index(self._here),
            self._report,
            self._clock,
            period_s=self._period_s,
            silent_s=self.timeout_s / 3,
            timeout_s=self.timeout_s,
        )
        talk.introduce()
        dist.all_gather_object(told, None, group=group)
        return talk

    # -- what training calls ------------------------------------------------------------------------

    def beat(self, what: str = "") -> None:
        """This rank has come further: ``what`` is shown if it comes no further. Costs nothing to speak of."""
        self._beat, self._beaten = what, self._clock()

    @contextmanager
    def paused(self, what: str, timeout_s: float | None = None) -> Iterator[None]:
        """Inside, this rank may be without a beat for ``timeout_s``; None: for as long as its process answers."""
        before = self._patience_s
        self.beat(what)
        self._patience_s = float("inf") if timeout_s is None else timeout_s
        try:
            yield
        finally:
            self.beat(f"{what}: done")
            self._patience_s = before

    def explain(self, error: _Error) -> _Error:
        """The error, with a note that names the rank whose loss it comes from, if it is of that kind and one is gone.

        gloo says "Connection closed by peer" and an address. Takes some periods where all ranks answer.
        """
        if self._talk is None or not _comes_from_a_peer(error):
            return error
        ledger = self._talk.ledger.stricter(2.5 * self._period_s)
        self._talk.read_all(lambda: ledger.story(self._clock()) is not None, 4 * self._period_s + 1)
        story = ledger.story(self._clock()) or "; ".join(ledger.fates())
        if not story:
            answers = self._clock() - self._talk.spoke < 3 * self._period_s
            story = "every rank still answers" if answers else "the store of the ranks does not answer"
        error.add_note(f"sharded_lamb watchdog: {story}")
        return error

    def close(self, error: BaseException | None = None) -> None:
        """The end of it on this rank, which the others are told; ``error``: what ended it. Not collective."""
        if self._over.is_set() or os.getpid() != self._process:
            return
        self._over.set()
        atexit.unregister(self._at_exit)
        self._timer.join(2.0)
        if self._talk is not None:
            fine = error is None or (isinstance(error, SystemExit) and not error.code)
            ended = DONE if fine else f"{type(error).__name__}: {error}"[:400]
            lost = error is not None and _comes_from_a_peer(error)
            self._talk.close(lambda report: replace(report, ended=ended, lost=lost))

    def _at_exit(self) -> None:
        self.close(getattr(sys, "last_value", None))  # an exception that nobody caught

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.explain(error)
        self.close(error)

    # -- the threads --------------------------------------------------------------------------------

    def _report(self) -> Report:
        place = place_of_thread(self._thread_id)
        idle_s = self._clock() - self._beaten
        return Report(0, idle_s, self._patience_s, str(self._beat), place.at, place.waits)

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            self._clock()
            found = self._talk.verdict if self._talk is not None else None
            if found is None and self._stuck_alone():
                found = self._own_verdict()
            if found is not None and not self._over.is_set():
                self._end(found)

    def _stuck_alone(self) -> bool:
        """Whether this rank comes no further and nobody can be asked."""
        now = self._clock()
        limit = self._patience_s
        if self._talk is not None:
            if now - self._talk.spoke < self.timeout_s / 2:
                return False
            limit *= 1.2  # others may have found a verdict while the store answered
        return now - self._beaten > limit

    def _own_verdict(self) -> str:
        report = self._report()
        where = f'{DOES[report.waits]} {report.at}, last beat "{self._beat}"'
        if self._talk is None:
            return f"{self._here} has not come further for {report.idle_s:.3g} s: {where}"
        fates = self._talk.ledger.fates()
        text = f"the store of the ranks does not answer, and this rank has not come further for {report.idle_s:.3g} s"
        return "\n  ".join([text, *fates, f"{self._here}: {where}"])

    def _end(self, verdict: str) -> None:
        """The process ends here, whatever its other threads hold or wait for."""
        named = re.match(r"ranks? ([\d, -]+)", verdict)
        text = f"sharded_lamb watchdog (on rank {self._here.rank}): {verdict}\n"
        if named is not None and _among(self._here.rank, named[1]):
            text += stack_of_thread(self._thread_id)
        flush = threading.Thread(target=_say, args=[text], daemon=True)  # nobody may read what we write
        flush.start()
        if self._talk is not None:
            self._talk.linger()
        flush.join(1.0)
        os._exit(self._exit_code)


def _among(rank: int, named: str) -> bool:
    """Whether `verdict.spans` of ranks has the rank."""
    for part in named.split(","):
        first, _, last = part.strip().partition("-")
        if first and int(first) <= rank <= int(last or first):
            return True
    return False


def _say(text: str) -> None:
    with suppress(OSError):
        # sys.stderr may be held by the thread that hangs
        os.write(2, text.encode(errors="backslashreplace"))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _comes_from_a_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None
