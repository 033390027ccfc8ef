"""What ranks tell each other through the rendezvous store, on a connection of its own.

Each rank writes its own report a period, and reads its predecessor's and the verdict. The first rank reads everyone's;
so does a rank whose predecessor does not answer or has left, so that the first one that lives always does.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from sharded_lamb.watchdog.diagnosis import Ledger, Report
from sharded_lamb.watchdog.stack_probe import Member

logger = logging.getLogger("sharded_lamb")

TIMEOUT = timedelta(minutes=5)
"""Of the store's operations; one that waits in vain ends only when the store answers or is gone."""

_NO_VERDICT = "-"


class Talk:
    """Reports of one rank, sent by a thread of its own: an operation on a store that does not answer never returns.

    Args:
        store: shared by the ranks; ``prefix`` is nobody else's.
        place: of this rank in ``members``.
        report: what this rank says now; without its number.
        clock: seconds, of `AwakeClock`.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        members: Sequence[Member],
        place: int,
        report: Callable[[], Report],
        clock: Callable[[], float],
        *,
        period_s: float,
        silent_s: float,
        timeout_s: float,
    ) -> None:
        self._store = PrefixStore(prefix, _own_connection(store))
        self._place, self._report, self._clock, self.period_s = place, report, clock, period_s
        self.ledger = Ledger(members, silent_s, timeout_s)
        self.verdict: str | None = None
        self.spoke = self._clock()  # when the store last answered
        self._reads_all = place == 0
        self._posts = 0
        self._over = threading.Event()
        self._round_done = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sharded_lamb watchdog: talk", daemon=True)

    def introduce(self) -> None:
        """The first report. Ranks meet after it and before `start`: reading waits for keys that are not there."""
        self._post()
        if self._place == 0:
            self._store.set("verdict", _NO_VERDICT)

    def start(self) -> None:
        self._thread.start()

    def read_all(self, until: Callable[[], bool], wait_s: float) -> None:
        """From another thread: wait for rounds in which everyone's reports are read, until one is enough."""
        self._reads_all = True
        with self._round_done:
            self._round_done.wait_for(until, wait_s)

    def close(self, farewell: Callable[[Report], Report] | None) -> None:
        """The last report, if the store answers, and the end of the thread."""
        self._over.set()
        self._thread.join(2.0)
        if farewell is not None and not self._thread.is_alive():
            with suppress(Exception):  # an error that ends the training must not be hidden behind one of ours
                self._post(farewell)

    def linger(self) -> None:
        """Before this process ends for a verdict: until all that answer have read it, or some periods are over.

        The store may go with this process, and a launcher that sees one end ends the others.
        """
        thread = threading.Thread(target=self._await_readers, daemon=True)  # the store may not answer
        thread.start()
        thread.join(3 * self.period_s + 0.5)

    def _await_readers(self) -> None:
        with suppress(RuntimeError):
            self._store.set(f"read {self._place}", "")
            now = self._clock()
            places = range(len(self.ledger.members))
            # A rank that reads its predecessor's reports alone waits for those that may read all.
            readers = [p for p in places if p not in self.ledger.reports or self.ledger.answers(p, now)]
            while not self._store.check([f"read {place}" for place in readers]):
                time.sleep(self.period_s / 10)

    def _run(self) -> None:
        while not self._over.wait(self.period_s):
            try:
                self._round()
            except RuntimeError as error:
                if "timeout" in str(error):
                    continue  # it comes when a store that was stopped, with us or not, goes on
                if not self._over.is_set():
                    logger.warning(
                        f"watchdog: the store of the ranks is gone ({error}): each watches itself alone now"
                    )
                return

    def _round(self) -> None:
        self._post()
        now = self._clock()
        reads_all = self._reads_all
        places = range(len(self.ledger.members)) if reads_all else [self._place - 1]
        *texts, verdict = self._store.multi_get([*map(str, places), "verdict"])
        with self._round_done:
            for place, text in zip(places, texts, strict=True):
                self.ledger.note(place, Report.loaded(text.decode()), now)
            self._round_done.notify_all()
        if self._place and not self.ledger.answers(self._place - 1, now):
            self._reads_all = True
        if reads_all and verdict.decode() == _NO_VERDICT:
            found = self.ledger.verdict(now)
            if found is not None:
                found = found.encode(errors="backslashreplace").decode()
                verdict = self._store.compare_set("verdict", _NO_VERDICT, found)
        self.spoke = now
        if verdict.decode() != _NO_VERDICT:
            self.verdict = verdict.decode()

    def _post(self, change: Callable[[Report], Report] = lambda report: report) -> None:
        self._posts += 1
        self._store.set(str(self._place), change(replace(self._report(), posts=self._posts)).dumped())


def _own_connection(store: Store) -> Store:
    """A store's operations exclude each other: one in which the training thread waits must not hold ours."""
    try:
        own: Store = store.clone()  # type: ignore[attr-defined]
    except RuntimeError:  # a kind that cannot be cloned
        return store
    own.set_timeout(TIMEOUT)
    return own
