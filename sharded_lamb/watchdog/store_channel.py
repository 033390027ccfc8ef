"""The ranks' reports in the rendezvous store, over a connection of its own.

Every period each rank posts its own report and reads its predecessor's and the diagnosis. The first rank reads every
report; so does a rank whose predecessor does not respond or has left. The first live rank therefore always does.
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
"""Of the store's operations. An operation on a store that does not answer ends only once it answers or is gone."""

_NO_DIAGNOSIS = "-"


class StoreChannel:
    """One rank's reports, posted by a thread of its own: an operation on a store that does not answer never returns.

    Args:
        store: shared by the ranks.
        prefix: of the keys; no other channel uses it.
        index: of this rank in ``members``.
        report: returns this rank's current state; ``posts`` is filled in here.
        clock: returns seconds, see `AwakeClock`.
        period_s: seconds between two reports.
        silent_s, timeout_s: see `Ledger`.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        members: Sequence[Member],
        index: int,
        report: Callable[[], Report],
        clock: Callable[[], float],
        *,
        period_s: float,
        silent_s: float,
        timeout_s: float,
    ) -> None:
        self._store = PrefixStore(prefix, _own_connection(store))
        self._index, self._report, self._clock, self.period_s = index, report, clock, period_s
        self.ledger = Ledger(members, silent_s, timeout_s)
        self.diagnosis: str | None = None
        self.answered_at = self._clock()  # when the store last answered
        self._reads_all = index == 0
        self._posts = 0
        self._over = threading.Event()
        self._round_done = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sharded_lamb watchdog: store", daemon=True)

    def announce(self) -> None:
        """Post the first report. Synchronize the ranks between this and `start`: a read waits for missing keys."""
        self._post()
        if self._index == 0:
            self._store.set("diagnosis", _NO_DIAGNOSIS)

    def start(self) -> None:
        self._thread.start()

    def read_all(self, until: Callable[[], bool], wait_s: float) -> None:
        """Read every rank's report until ``until`` returns True, at most ``wait_s``. Call it from another thread."""
        self._reads_all = True
        with self._round_done:
            self._round_done.wait_for(until, wait_s)

    def close(self, farewell: Callable[[Report], Report] | None) -> None:
        """End the thread and, if the store answers, post the last report, changed by ``farewell``."""
        self._over.set()
        self._thread.join(2.0)
        if farewell is not None and not self._thread.is_alive():
            with suppress(Exception):  # an error of ours must not hide the one that ends the training
                self._post(farewell)

    def wait_for_readers(self) -> None:
        """Before this process exits: wait a few periods until every rank that responds has read the diagnosis.

        The store may end with this process, and a launcher ends all ranks when one exits.
        """
        thread = threading.Thread(target=self._await_readers, daemon=True)  # the store may not answer
        thread.start()
        thread.join(3 * self.period_s + 0.5)

    def _await_readers(self) -> None:
        with suppress(RuntimeError):
            self._store.set(f"read {self._index}", "")
            now = self._clock()
            indices = range(len(self.ledger.members))
            # A rank that reads only its predecessor's report waits for those that may read all.
            readers = [i for i in indices if i not in self.ledger.reports or self.ledger.responds(i, now)]
            while not self._store.check([f"read {index}" for index in readers]):
                time.sleep(self.period_s / 10)

    def _run(self) -> None:
        while not self._over.wait(self.period_s):
            try:
                self._round()
            except RuntimeError as error:
                if "timeout" in str(error):
                    continue  # raised once a store that was stopped, with or without this process, resumes
                if not self._over.is_set():
                    logger.warning(
                        f"watchdog: the ranks' store is gone ({error}): each rank now watches only itself"
                    )
                return
            except Exception:  # a fault here must not end the watch over the others
                logger.exception("watchdog: one report of this rank failed; the next follows")

    def _round(self) -> None:
        self._post()
        now = self._clock()
        reads_all = self._reads_all
        indices = range(len(self.ledger.members)) if reads_all else [self._index - 1]
        *texts, diagnosis = self._store.multi_get([*map(str, indices), "diagnosis"])
        with self._round_done:
            for index, text in zip(indices, texts, strict=True):
                self.ledger.record(index, Report.loaded(text.decode()), now)
            self._round_done.notify_all()
        if self._index and not self.ledger.responds(self._index - 1, now):
            self._reads_all = True
        if reads_all and diagnosis.decode() == _NO_DIAGNOSIS:
            own = self.ledger.diagnosis(now)
            if own is not None:
                own = own.encode(errors="backslashreplace").decode()
                diagnosis = self._store.compare_set("diagnosis", _NO_DIAGNOSIS, own)
        self.answered_at = now
        if diagnosis.decode() != _NO_DIAGNOSIS:
            self.diagnosis = diagnosis.decode()

    def _post(self, change: Callable[[Report], Report] = lambda report: report) -> None:
        self._posts += 1
        self._store.set(str(self._index), change(replace(self._report(), posts=self._posts)).dumped())


def _own_connection(store: Store) -> Store:
    """A store runs one operation at a time: one that the training thread waits in must not block ours."""
    try:
        own: Store = store.clone()  # type: ignore[attr-defined]
    except RuntimeError:  # a kind that cannot be cloned
        return store
    own.set_timeout(TIMEOUT)
    return own
