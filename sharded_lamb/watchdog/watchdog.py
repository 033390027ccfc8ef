"""`Watchdog`: one rank's beats, and the exit of all ranks once none makes progress."""

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
from sharded_lamb.watchdog.diagnosis import ACTIVITY, Report, ended_by
from sharded_lamb.watchdog.stack_probe import Member, locate_thread, stack_of_thread
from sharded_lamb.watchdog.store_channel import StoreChannel

EXIT_CODE = 70
"""Exit code of a process that its watchdog ends: EX_SOFTWARE. torchrun restarts the ranks on any code but 0."""

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|timeout after|socket|NCCL|remote process|peer",
    re.IGNORECASE,
)
_Error = TypeVar("_Error", bound=BaseException)


class Watchdog:
    """Ends all ranks, each with one message that names the stuck rank, once no rank beats for ``timeout_s``.

        with Watchdog(timeout_s=600) as watchdog:
            for step in range(steps):
                ...
                watchdog.beat(f"step {step}")

    A rank that beats, however slowly, keeps all ranks alive. Time in which this process is stopped (SIGSTOP, ``scontrol
    suspend``, a VM's pause) does not count. Work that takes longer than ``timeout_s`` on some rank must beat in between
    or run in `paused`. Daemon threads exchange reports through the rendezvous store, over connections of their own:
    O(ranks) store operations a period in all, and every report is read by one rank, the first live one.

    The message names, in this order: ranks that failed; ranks that do not respond (the process is stopped or dead, its
    machine is cut off, or a call holds the GIL); ranks that are not in a collective while others wait in one. The
    process then exits with ``exit_code``, whatever call it hangs in; torchrun's ``--max-restarts`` restarts all ranks.
    If the store itself is gone (the process that serves it died or was stopped: torchrun's agent on the first node, or
    rank 0), each rank watches only itself.

    Args:
        timeout_s: seconds without a beat of any rank. Steps, evaluations and checkpoints must beat more often. None
            disables the watchdog: no thread, no collective.
        group: the ranks that wait for each other; default: all. Without torch.distributed: this process alone.
        exit_code: 1 to 255.

    Raises:
        ValueError: ``timeout_s`` or ``exit_code`` is out of range, or this rank is not in ``group``.

    Construction is collective over ``group`` (two all-gathers of small objects) and belongs in the training thread, as
    does `close` or the end of the ``with``. An error that leaves the ``with`` is reported to the other ranks and
    gets the note of `explain`.
    """

    def __init__(
        self,
        timeout_s: float | None = 600.0,
        *,
        group: dist.ProcessGroup | None = None,
        exit_code: int = EXIT_CODE,
    ) -> None:
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise ValueError(
                f"timeout_s={timeout_s!r}: expected seconds > 0, or None to disable the watchdog"
            )
        if not 0 < exit_code < 256:
            raise ValueError(f"exit_code={exit_code!r}: expected 1 to 255, so that launchers see a failure")
        self.timeout_s = float("inf") if timeout_s is None else timeout_s
        self._exit_code = exit_code
        self._thread_id, self._process = threading.get_ident(), os.getpid()
        self._period_s = min(5.0, self.timeout_s / 20)
        self._clock = AwakeClock(self._period_s)
        self._beat, self._beaten, self._patience_s = "none yet", self._clock(), self.timeout_s
        self._over = threading.Event()
        self._channel: StoreChannel | None = None
        self._timer = threading.Thread(target=self._watch, name="sharded_lamb watchdog", daemon=True)
        if timeout_s is None:
            self._over.set()
            return
        self._channel = self._open_channel(group)
        if self._channel is not None:
            self._channel.start()
        self._timer.start()
        atexit.register(self._at_exit)

    def _open_channel(self, group: dist.ProcessGroup | None) -> StoreChannel | None:
        """A channel once every rank has announced itself, under a prefix that no earlier attempt used. Collective."""
        self._member = Member.here(0)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return None
        self._member = Member.here(dist.get_rank())
        if dist.get_rank(group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in group: make a Watchdog on its ranks only")
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (self._member, uuid.uuid4().hex), group=group)
        members, prefix = [member for member, _ in gathered], f"sharded_lamb watchdog {gathered[0][1]}"
        channel = StoreChannel(
            dist.distributed_c10d._get_default_store(),
            prefix,
            members,
            members.index(self._member),
            self._report,
            self._clock,
            period_s=self._period_s,
            silent_s=self.timeout_s / 3,
            timeout_s=self.timeout_s,
        )
        channel.announce()
        dist.all_gather_object(gathered, None, group=group)
        return channel

    # -- called by training ------------------------------------------------------------------------

    def beat(self, what: str = "") -> None:
        """Report progress. The message shows the last ``what`` of a stuck rank. Takes about a microsecond."""
        self._beat, self._beaten = what, self._clock()

    @contextmanager
    def paused(self, what: str, timeout_s: float | None = None) -> Iterator[None]:
        """Allow this rank ``timeout_s`` seconds without a beat inside; None: as long as its process responds."""
        before = self._patience_s
        self.beat(what)
        self._patience_s = float("inf") if timeout_s is None else timeout_s
        try:
            yield
        finally:
            self.beat(f"{what}: done")
            self._patience_s = before

    def explain(self, error: _Error) -> _Error:
        """Returns ``error``; adds a note that names the lost rank if it is a lost connection.

        gloo reports "Connection closed by peer" and an address. Takes a few periods if all ranks respond.
        """
        if self._channel is None or not _comes_from_a_peer(error):
            return error
        ledger = self._channel.ledger.stricter(2.5 * self._period_s)
        self._channel.read_all(lambda: ledger.explanation(self._clock()) is not None, 4 * self._period_s + 1)
        note = ledger.explanation(self._clock()) or "; ".join(ledger.dead_processes())
        if not note:
            answers = self._clock() - self._channel.answered_at < 3 * self._period_s
            note = "every rank still responds" if answers else "the ranks' store does not answer"
        error.add_note(f"sharded_lamb watchdog: {note}")
        return error

    def close(self, error: BaseException | None = None) -> None:
        """Stop watching on this rank and report its end, and the ``error`` that caused it. Not collective."""
        if self._over.is_set() or os.getpid() != self._process:
            return
        self._over.set()
        atexit.unregister(self._at_exit)
        self._timer.join(2.0)
        if self._channel is not None:
            lost_peer = error is not None and _comes_from_a_peer(error)
            self._channel.close(lambda report: replace(report, ended=ended_by(error), lost_peer=lost_peer))

    def _at_exit(self) -> None:
        self.close(getattr(sys, "last_value", None))  # an uncaught exception

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
        location = locate_thread(self._thread_id)
        idle_s = self._clock() - self._beaten
        return Report(0, idle_s, self._patience_s, str(self._beat), location.at, location.waits)

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            self._clock()
            diagnosis = self._channel.diagnosis if self._channel is not None else None
            if diagnosis is None and self._is_stuck_alone():
                diagnosis = self._own_diagnosis()
            if diagnosis is not None and not self._over.is_set():
                self._end(diagnosis)

    def _is_stuck_alone(self) -> bool:
        """Whether this rank makes no progress and the store does not answer."""
        now = self._clock()
        limit = self._patience_s
        if self._channel is not None:
            if now - self._channel.answered_at < self.timeout_s / 2:
                return False
            limit *= 1.2  # others may have written a diagnosis while the store answered
        return now - self._beaten > limit

    def _own_diagnosis(self) -> str:
        report = self._report()
        where = f'{ACTIVITY[report.waits]} {report.at}, last beat "{self._beat}"'
        if self._channel is None:
            return f"{self._member} has made no progress for {report.idle_s:.3g} s: {where}"
        dead = self._channel.ledger.dead_processes()
        text = (
            f"the ranks' store does not answer, and this rank has made no progress for {report.idle_s:.3g} s"
        )
        return "\n  ".join([text, *dead, f"{self._member}: {where}"])

    def _end(self, diagnosis: str) -> None:
        """Exit the process, whatever its other threads hold or wait for."""
        named = re.match(r"ranks? ([\d, -]+)", diagnosis)
        text = f"sharded_lamb watchdog (on rank {self._member.rank}): {diagnosis}\n"
        if named is not None and _contains(self._member.rank, named[1]):
            text += stack_of_thread(self._thread_id)
        flush = threading.Thread(target=_print_error, args=[text], daemon=True)  # a full pipe blocks
        flush.start()
        if self._channel is not None:
            self._channel.wait_for_readers()
        flush.join(1.0)
        os._exit(self._exit_code)


def _contains(rank: int, named: str) -> bool:
    """Whether ``named``, from `diagnosis.rank_ranges`, contains the rank."""
    for part in named.split(","):
        first, _, last = part.strip().partition("-")
        if first and int(first) <= rank <= int(last or first):
            return True
    return False


def _print_error(text: str) -> None:
    with suppress(OSError):
        # the stuck thread may hold sys.stderr
        os.write(2, text.encode(errors="backslashreplace"))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _comes_from_a_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None
