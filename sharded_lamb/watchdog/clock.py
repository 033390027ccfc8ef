"""`AwakeClock`: seconds in which this process could run."""

import threading
import time


class AwakeClock:
    """``time.monotonic`` without the time in which the whole process was stopped.

    SIGSTOP, ``scontrol suspend``, ``docker pause`` and a migrated VM stop every thread. A job that resumes after
    an hour of that has not hung for an hour. Threads that read the clock every ``period_s`` see the stop as a gap.

    Args:
        period_s: the longest time between two reads, by any thread, in a process that runs; seconds.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s, self._gap_s = period_s, 3 * period_s + 1.0
        self._missed = 0.0
        self._last = time.monotonic()
        self._lock = threading.RLock()  # a signal handler may beat in the middle of a beat

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            gap = now - self._last
            if gap > self._gap_s:
                self._missed += gap - self._period_s
            self._last = now
            return now - self._missed
