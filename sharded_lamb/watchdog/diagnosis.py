"""Which rank is stuck, from the ranks' last reports. Pure: reads neither a clock nor a store."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sharded_lamb.watchdog.stack_probe import COMPUTES, MAY_WAIT, WAITS, Member


@dataclass(frozen=True)
class Report:
    """One rank's state, posted once a period."""

    posts: int  # reports so far: a rank whose count does not grow does not respond
    idle_s: float  # seconds since its last beat
    patience_s: float  # seconds that it may be idle
    beat: str  # the last one's text
    at: str  # the training thread's position
    waits: int  # COMPUTES, MAY_WAIT or WAITS
    ended: str | None = None  # how it left: DONE, or an exception
    lost_peer: bool = False  # it left because it lost another rank

    def dumped(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loaded(text: str) -> "Report":
        return Report(**json.loads(text))


class Ledger:
    """The last report of every rank, and when the reader received it (seconds of the reader's clock).

    Args:
        members: the ranks' processes; other methods take indices into it.
        silent_s: a rank without a new report for longer does not respond.
        timeout_s: a rank that does not respond counts as stuck once its last beat is older, whatever patience it had.
    """

    def __init__(self, members: Sequence[Member], silent_s: float, timeout_s: float) -> None:
        self.members, self.silent_s, self.timeout_s = members, silent_s, timeout_s
        self.reports: dict[int, Report] = {}  # by index into ``members``
        self._received_at: dict[int, float] = {}

    def stricter(self, silent_s: float) -> "Ledger":
        """The same reports with another ``silent_s``."""
        view = Ledger(self.members, silent_s, self.timeout_s)
        view.reports, view._received_at = self.reports, self._received_at
        return view

    def record(self, index: int, report: Report, now: float) -> None:
        known = self.reports.get(index)
        if known is None or known.posts != report.posts or known.ended != report.ended:
            self._received_at[index] = now
        self.reports[index] = report

    def is_silent(self, index: int, now: float) -> bool:
        """Whether the rank should report and does not; False before its first report."""
        report = self.reports.get(index)
        return report is not None and report.ended is None and now - self._received_at[index] > self.silent_s

    def responds(self, index: int, now: float) -> bool:
        report = self.reports.get(index)
        return report is not None and report.ended is None and not self.is_silent(index, now)

    def diagnosis(self, now: float) -> str | None:
        """Which ranks are stuck and what the others wait for; None while a rank that responds makes progress."""
        responding = [i for i in range(len(self.members)) if self.responds(i, now)]
        if not responding or any(self.reports[i].idle_s < self.reports[i].patience_s for i in responding):
            return None
        if any(self._may_recover(i, now) for i in range(len(self.members))):
            return None
        idle = min(self.reports[i].idle_s for i in responding)
        least = min(self.reports[i].waits for i in responding)
        stuck, finding = self.missing(now, finished=least == WAITS), "no longer responds"
        if not stuck:
            stuck = [i for i in responding if self.reports[i].waits == least]
            finding = _SOME_STUCK[least] if len(stuck) < len(responding) else _ALL_STUCK[least]
        elif len(stuck) > 1:
            finding = "no longer respond"
        others = [i for i in responding if i not in stuck]
        lines = [f"{self._named(stuck)} {finding}; no rank has made progress for {idle:.3g} s"]
        lines += [f"  {line}" for line in self._described(stuck, now)]
        if others:
            lines += ["others:", *(f"  {line}" for line in self._described(others, now))]
        return "\n".join(lines)

    def _may_recover(self, index: int, now: float) -> bool:
        """Whether a rank that does not respond may be alive and still within its patience."""
        if not self.is_silent(index, now) or self._is_dead(index):
            return False
        report = self.reports[index]
        return report.idle_s + now - self._received_at[index] < min(report.patience_s, self.timeout_s)

    def missing(self, now: float, *, finished: bool = True) -> list[int]:
        """The ranks that the others wait for in vain.

        Those that failed; else those that do not respond; else, with ``finished``, those that are done and those that
        left because they lost another rank.
        """
        indices = range(len(self.members))
        silent = [
            i for i in indices if self.is_silent(i, now) or (self.responds(i, now) and self._is_dead(i))
        ]
        left = [i for i in indices if i in self.reports and self.reports[i].ended is not None]
        failed = [i for i in left if self.reports[i].ended != DONE and not self.reports[i].lost_peer]
        return failed or silent or (left if finished else [])

    def dead_processes(self) -> list[str]:
        """A line for each process of this machine that has ended or is stopped, whatever it reported."""
        states = [(member, member.process_state()) for member in self.members]
        return [f"{member}: its process {state}" for member, state in states if state is not None]

    def _is_dead(self, index: int) -> bool:
        return self.members[index].process_state() is not None

    def explanation(self, now: float) -> str | None:
        """The `missing` ranks, for a rank whose connection broke; None if every rank responds."""
        return "; ".join(self._described(self.missing(now), now)) or None

    def _named(self, indices: Iterable[int]) -> str:
        ranks = [self.members[i].rank for i in indices]
        return f"rank{'s' * (len(ranks) > 1)} {rank_ranges(ranks)}"

    def _described(self, indices: Sequence[int], now: float) -> list[str]:
        """One line for each state: thousands of ranks may wait at the same position."""
        by_state: dict[str, list[int]] = {}
        for index in indices:
            by_state.setdefault(self._state(index, now), []).append(index)
        lines = []
        for state, alike in by_state.items():
            who = (
                str(self.members[alike[0]])
                if len(alike) == 1
                else f"{self._named(alike)} ({self._hosts(alike)})"
            )
            lines.append(f"{who}: {state}")
        return lines

    def _hosts(self, indices: Sequence[int]) -> str:
        hosts = list(dict.fromkeys(self.members[i].host for i in indices))
        return f"host{'s' * (len(hosts) > 1)} {', '.join(hosts[:4])}{', …' * (len(hosts) > 4)}"

    def _state(self, index: int, now: float) -> str:
        report, last = self.reports[index], f'last beat "{self.reports[index].beat}"'
        if report.ended is not None:
            return f"left ({report.ended}), {last}"
        process_state = self.members[index].process_state()
        if process_state is not None:
            return f"its process {process_state}, {last}"
        if self.is_silent(index, now):
            return f"its process is stopped, dead or cut off, or a call holds the GIL; {last}, it was at {report.at}"
        return f"{ACTIVITY[report.waits]} {report.at}, {last}"


DONE = "done"
_MESSAGE = 1000  # characters; an optimizer that skipped too many steps explains them in its error


def ended_by(error: BaseException | None) -> str:
    """`Report.ended` of a rank that leaves because of ``error``, if any."""
    succeeded = error is None or (isinstance(error, SystemExit) and not error.code)
    return DONE if succeeded else f"{type(error).__name__}: {error}"[:_MESSAGE]


ACTIVITY = {COMPUTES: "at", MAY_WAIT: "computing, or waiting in C++, at", WAITS: "waiting in a collective at"}
_SOME_STUCK = {
    COMPUTES: "hangs while others wait for it",
    MAY_WAIT: "may hang while others wait for it",
}
_ALL_STUCK = {
    COMPUTES: "hang, and none of them waits for another",
    MAY_WAIT: "hang or wait for each other",
    WAITS: "wait for each other in collectives: the collectives differ, or the network is cut",
}


def rank_ranges(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] → "0-2, 5"."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
