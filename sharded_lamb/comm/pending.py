"""Collectives and messages in flight: the wait for them, bounded where a peer may never come."""

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch.distributed as dist

from sharded_lamb.comm.groups import Messages, OwnedGroup
from sharded_lamb.comm.stalls import Entered, explained
from sharded_lamb.timeline import Flight

POLL_SECONDS = 5e-5
"""Between two looks at whether a collective has completed."""
COMPLETION_SECONDS = 1.0
"""In which a work that has completed ends its wait."""


class Pending:
    """A collective in flight: after `wait` its result may be used on this rank's stream."""

    def __init__(
        self,
        works: Sequence["dist.Work | None"],
        flight: Flight | None = None,
        *,
        messages: tuple[OwnedGroup, Sequence[int]] | None = None,
        memory: object = None,
        entered: Entered | None = None,
    ) -> None:
        """
        Args:
            messages: the group whose point-to-point messages ``works`` are, and the peer of each (a rank in the
                group). They live as long as the group does.
            memory: what they send.
            entered: the collective, where its wait blocks the host.
        """
        self._messages = Messages([work for work in works if work is not None], memory)
        self._group: OwnedGroup | None
        self._peers: Sequence[int]
        self._group, self._peers = messages or (None, ())
        if self._group is not None:
            self._group.in_flight.add(self._messages)
        self._flight = flight
        self._entered = entered
        self._waiter: _Waiter | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the result, at most ``timeout`` seconds. Returns whether it is there.

        Raises:
            RuntimeError: as `Entered.wait`, or the group has ended, and its messages with it.
        """
        if self._group is not None:
            self._group.check_open()
        begin = None if self._flight is None else self._flight.timeline.clock()
        with explained(self._entered):
            if timeout is not None and not self._arrives(timeout):
                return False
            with nullcontext() if self._flight is None else self._flight.landing(begin):
                if self._entered is not None and timeout is None:
                    self._entered.wait(self._arrives, self._check_connection)
                if self._waiter is not None:
                    self._waiter.finishes()
                else:
                    for work in self._messages.works:
                        work.wait()
        if self._group is not None:
            self._group.in_flight.discard(self._messages)
        self._messages = Messages([], None)
        self._group = self._flight = self._entered = self._waiter = None
        return True

    def _arrives(self, timeout: float) -> bool:
        if self._group is None:  # gloo's messages do not report completion before their wait
            end = time.monotonic() + timeout
            while not all(work.is_completed() for work in self._messages.works):
                if time.monotonic() > end:
                    return False
                time.sleep(POLL_SECONDS)
            return True
        if self._waiter is None:
            self._waiter = _Waiter(self._messages.works)
        return self._waiter.finishes(timeout)

    def _check_connection(self) -> None:
        """Raise if the message that is waited for cannot arrive, since its connection has closed.

        gloo fails the receives that have not begun to arrive when it closes a connection. Of a message that is under
        way, in either direction, it forgets the work (`Pair::signalException`), whose wait would end by the timeout.
        """
        if self._group is None or self._waiter is None:
            return
        at = self._waiter.at
        try:
            self._group.check_connection(self._peers[at])
        except RuntimeError:
            if not self._waiter.finishes(COMPLETION_SECONDS) and self._waiter.at == at:
                raise


class _Waiter(threading.Thread):
    """Waits for works beside the main thread, and ends."""

    def __init__(self, works: Sequence["dist.Work"]) -> None:
        super().__init__(name="sharded_lamb-wait", daemon=True)
        self._works = works
        self.at = 0  # the index of the work for which it waits
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for at, work in enumerate(self._works):
                self.at = at
                work.wait()
        except Exception as error:
            self._error = error.with_traceback(None)

    def finishes(self, timeout: float | None = None) -> bool:
        """Whether it ends within ``timeout`` seconds; raises as the works' waits."""
        self.join(timeout)
        ended = not self.is_alive()
        if ended and self._error is not None:
            raise type(self._error)(
                *self._error.args
            )  # the one kept would refer to the frames of all callers
        return ended
