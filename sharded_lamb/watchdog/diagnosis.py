"""Which rank hangs, from what ranks last said of themselves. Pure: neither a clock nor a store is looked at here."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sharded_lamb.watchdog.stack_probe import COMPUTES, MAY_WAIT, WAITS, Member


@dataclass(frozen=True)
class Report:
    """What a rank says of itself, once a period."""

    posts: int  # reports so far: a number that does not move is a rank that does not answer
    idle_s: float  # seconds since its last beat
    patience_s: float  # of which so many are in order
    beat: str  # the last
    at: str
    waits: int
    ended: str | None = None  # how it left: "done", or an exception
    lost: bool = False  # it left because of another rank

    def dumped(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loaded(text: str) -> "Report":
        return Report(**json.loads(text))


class Ledger:
    """The last report of every rank, and when (by the reader's clock, in seconds) it came.

    ``silent_s``: a rank without a new report for so long does not answer. ``timeout_s``: without a beat for so long it
    is charged with it, whatever patience it had asked for.
    """

    def __init__(self, members: Sequence[Member], silent_s: float, timeout_s: float) -> None:
        self.members, self.silent_s, self.timeout_s = members, silent_s, timeout_s
        self.reports: dict[int, Report] = {}  # by place in ``members``
        self._came: dict[int, float] = {}

    def stricter(self, silent_s: float) -> "Ledger":
        """The same reports, with less patience for the next ones."""
        view = Ledger(self.members, silent_s, self.timeout_s)
        view.reports, view._came = self.reports, self._came
        return view

    def note(self, place: int, report: Report, now: float) -> None:
        known = self.reports.get(place)
        if known is None or known.posts != report.posts or known.ended != report.ended:
            self._came[place] = now
        self.reports[place] = report

    def is_silent(self, place: int, now: float) -> bool:
        """Whether the rank should report and does not; False before anything is known of it."""
        report = self.reports.get(place)
        return report is not None and report.ended is None and now - self._came[place] > self.silent_s

    def answers(self, place: int, now: float) -> bool:
        report = self.reports.get(place)
        return report is not None and report.ended is None and not self.is_silent(place, now)

    def verdict(self, now: float) -> str | None:
        """Who hangs, and what the others wait for, once nobody that answers comes further; None before."""
        answering = [p for p in range(len(self.members)) if self.answers(p, now)]
        if not answering or any(self.reports[p].idle_s < self.reports[p].patience_s for p in answering):
            return None
        if any(self._may_go_on(p, now) for p in range(len(self.members))):
            return None
        idle = min(self.reports[p].idle_s for p in answering)
        least = min(self.reports[p].waits for p in answering)
        guilty, what = self.gone(now, finished=least == WAITS), "does not answer any more"
        if not guilty:
            guilty = [p for p in answering if self.reports[p].waits == least]
            what = _CHARGES[least] if len(guilty) < len(answering) else _CHARGES_OF_ALL[least]
        others = [p for p in answering if p not in guilty]
        lines = [f"{self._named(guilty)} {what}; no rank has come further for {idle:.3g} s"]
        lines += [f"  {line}" for line in self._described(guilty, now)]
        if others:
            lines += ["others:", *(f"  {line}" for line in self._described(others, now))]
        return "\n".join(lines)

    def _may_go_on(self, place: int, now: float) -> bool:
        """Of a rank that does not answer: whether its last beat is no longer ago than is in order, and it may live."""
        if not self.is_silent(place, now) or self._dead(place):
            return False
        report = self.reports[place]
        return report.idle_s + now - self._came[place] < min(report.patience_s, self.timeout_s)

    def gone(self, now: float, *, finished: bool = True) -> list[int]:
        """The ranks without which the others cannot go on: those that failed; else those that do not answer; else,
        with ``finished``, those that are done, and those that left because of another, or seem to have."""
        places = range(len(self.members))
        silent = [p for p in places if self.is_silent(p, now) or (self.answers(p, now) and self._dead(p))]
        left = [p for p in places if p in self.reports and self.reports[p].ended is not None]
        failed = [p for p in left if self.reports[p].ended != DONE and not self.reports[p].lost]
        return failed or silent or (left if finished else [])

    def fates(self) -> list[str]:
        """Of processes of this machine that have ended or are stopped, whatever they reported."""
        return [f"{m}: its process {fate}" for m in self.members if (fate := m.fate()) is not None]

    def _dead(self, place: int) -> bool:
        return self.members[place].fate() is not None

    def story(self, now: float) -> str | None:
        """Of the ranks that are `gone`, for a rank whose connection broke; None: all answer."""
        return "; ".join(self._described(self.gone(now), now)) or None

    def _named(self, places: Iterable[int]) -> str:
        ranks = [self.members[p].rank for p in places]
        return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"

    def _described(self, places: Sequence[int], now: float) -> list[str]:
        """A line a kind of whereabouts: thousands of ranks wait at the same place."""
        alike: dict[str, list[int]] = {}
        for place in places:
            alike.setdefault(self._state(place, now), []).append(place)
        lines = []
        for state, of in alike.items():
            who = str(self.members[of[0]]) if len(of) == 1 else f"{self._named(of)} ({self._hosts(of)})"
            lines.append(f"{who}: {state}")
        return lines

    def _hosts(self, places: Sequence[int]) -> str:
        hosts = list(dict.fromkeys(self.members[p].host for p in places))
        return f"host{'s' * (len(hosts) > 1)} {', '.join(hosts[:4])}{', …' * (len(hosts) > 4)}"

    def _state(self, place: int, now: float) -> str:
        report, last = self.reports[place], f'last beat "{self.reports[place].beat}"'
        if report.ended is not None:
            return f"left ({report.ended}), {last}"
        fate = self.members[place].fate()
        if fate is not None:
            return f"its process {fate}, {last}"
        if self.is_silent(place, now):
            return f"its process is stopped, dead or cut off, or a call holds the GIL; {last}, it was at {report.at}"
        return f"{DOES[report.waits]} {report.at}, {last}"


DONE = "done"

DOES = {COMPUTES: "at", MAY_WAIT: "computing, or waiting in C++, at", WAITS: "waiting in a collective at"}
_CHARGES = {
    COMPUTES: "hangs while others wait for it",
    MAY_WAIT: "may hang while others wait for it",
}
_CHARGES_OF_ALL = {
    COMPUTES: "hang, and none of them waits for another",
    MAY_WAIT: "hang or wait for each other",
    WAITS: "wait in collectives for each other: these are not the same ones, or the network is cut",
}


def spans(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" if b - a > 1 else f"{a}, {b}" for a, b in parts)
