"""What a rank did when: what was on the wire, what the host waited for, what it computed meanwhile.

    timeline = Timeline(rank=dist.get_rank())
    with optimizer.record(timeline):
        with timeline.span("forward"):
            loss = model(batch)
        ...
    timeline.save("trace.json")  # for chrome://tracing and ui.perfetto.dev
    print(timeline.summary())

Times are the host's. On a CPU they are what happened. On CUDA they are those of launches (a wait returns once the
stream will wait), so neither wire nor exposed time can be read from them there: run ``torch.profiler``, in whose trace
waits, marks, "copy gradients" and "average" appear under the same names, and passes 1 and 2 as their kernels.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import record_function

WIRE, EXPOSED, COMPUTE, MARKS = "wire", "exposed", "compute", "marks"
"""A collective in flight; the host blocked in its wait; passes 1 and 2 and copies; what the user marks."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """``start`` and ``end`` in seconds of the timeline's clock; ``bytes`` that this rank handed to others."""

    name: str
    lane: str
    start: float
    end: float
    bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """Spans of one rank, in the order in which they ended.

    Args:
        rank: what its trace is called.
        clock: seconds; by default one that all processes of a machine share.
    """

    rank: int = 0
    clock: Callable[[], float] = time.perf_counter
    spans: list[Span] = field(default_factory=list)
    origin: float = 0.0  # what `save` counts from

    def align(self) -> None:
        """Count from now. For ranks on several machines: call it on each right after a barrier."""
        self.origin = self.clock()

    @contextmanager
    def span(self, name: str, lane: str = MARKS) -> Iterator[None]:
        """What happens inside, under a name."""
        start = self.clock()
        try:
            with record_function(name):
                yield
        finally:
            self.spans.append(Span(name, lane, start, self.clock()))

    def each(self, name: str, lane: str, computed: Iterator[T]) -> Iterator[T]:
        """``computed``, with a span for the computation of each item; the loop's own body is in none of them."""
        done = object()
        while True:
            start = self.clock()
            with record_function(name):
                item: Any = next(computed, done)
            if item is done:
                return
            self.spans.append(Span(name, lane, start, self.clock()))
            yield item

    def launched(self, name: str, sent: int) -> "Flight":
        """A collective is in flight from now until its `Flight.landing` is over."""
        return Flight(self, name, sent, self.clock())

    @contextmanager
    def blocking(self, name: str, sent: int) -> Iterator[None]:
        """A collective that the host waits for at once."""
        with self.launched(name, sent).landing():
            yield

    # -- what comes of it ----------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Seconds, calls and bytes.

        ``collectives``: for each kind, and ``total`` over all: ``calls``, ``bytes``; ``wire``: seconds in which at
        least one was in flight; ``exposed``: seconds that the host was blocked for them; ``hidden``: the part of
        ``wire`` that it was not (None where nothing was in flight). ``seconds``: {lane: {name: sum}} of other lanes.

        No backend tells when a collective arrived, so it counts as in flight until its wait is over: ``wire`` and
        ``hidden`` are upper bounds. What the link needs at least is bytes over its rate.
        """
        kinds = dict.fromkeys(span.name for span in self._of(WIRE))
        collectives = {kind: self._collective(kind) for kind in kinds}
        seconds: dict[str, dict[str, float]] = {}
        for span in self.spans:
            if span.lane not in (WIRE, EXPOSED):
                lane = seconds.setdefault(span.lane, {})
                lane[span.name] = lane.get(span.name, 0.0) + span.seconds
        return {"collectives": {**collectives, "total": self._collective(None)}, "seconds": seconds}

    def _of(self, lane: str, name: str | None = None) -> list[Span]:
        return [span for span in self.spans if span.lane == lane and name in (None, span.name)]

    def _collective(self, kind: str | None) -> dict[str, Any]:
        flights = self._of(WIRE, kind)
        wire, exposed = covered(flights), sum(span.seconds for span in self._of(EXPOSED, kind))
        return {
            "calls": len(flights),
            "bytes": sum(span.bytes for span in flights),
            "wire": wire,
            "exposed": exposed,
            "hidden": max(0.0, 1 - exposed / wire) if wire > 0 else None,
        }

    def trace(self) -> dict[str, Any]:
        """Chrome's trace format: a process a rank, a thread a lane (more where spans of a lane overlap)."""
        events: list[dict[str, Any]] = [_named("process_name", self.rank, 0, f"rank {self.rank}")]
        for thread, (title, spans) in enumerate(rows(self.spans).items()):
            events.append(_named("thread_name", self.rank, thread, title))
            events += [
                {
                    "name": span.name,
                    "cat": span.lane,
                    "ph": "X",
                    "ts": (span.start - self.origin) * 1e6,
                    "dur": span.seconds * 1e6,
                    "pid": self.rank,
                    "tid": thread,
                    "args": {"bytes": span.bytes},
                }
                for span in spans
            ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Write `trace` as JSON."""
        Path(path).write_text(json.dumps(self.trace()) + "\n")

    @staticmethod
    def merge(paths: Sequence[str | Path], into: str | Path) -> None:
        """One trace of several ranks' files, beginning at 0.

        Raises:
            ValueError: a file that `save` did not write, or two of one rank.
        """
        owners: dict[int, str | Path] = {}
        events: list[dict[str, Any]] = []
        for path in paths:
            found = _events(path)
            for rank in {event["pid"] for event in found}:
                if rank in owners:
                    raise ValueError(
                        f"{owners[rank]} and {path} are both of rank {rank}: give every rank's Timeline its rank"
                    )
                owners[rank] = path
            events += found
        first = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
        moved = [{**event, "ts": event["ts"] - first} if event["ph"] == "X" else event for event in events]
        Path(into).write_text(json.dumps({"traceEvents": moved, "displayTimeUnit": "ms"}) + "\n")

    def draw(self, path: str | Path) -> None:
        """A picture (PNG) of the lanes. Needs matplotlib."""
        draw({f"rank {self.rank}": self}, path)


@dataclass(slots=True)
class Flight:
    """A collective between its launch and the end of its wait."""

    timeline: Timeline
    name: str
    bytes: int
    start: float

    @contextmanager
    def landing(self) -> Iterator[None]:
        """The wait for it."""
        timeline = self.timeline
        begin = timeline.clock()
        with record_function(self.name):
            yield
        end = timeline.clock()
        timeline.spans.append(Span(self.name, EXPOSED, begin, end, self.bytes))
        timeline.spans.append(Span(self.name, WIRE, self.start, end, self.bytes))


def covered(spans: Sequence[Span]) -> float:
    """Seconds that at least one of ``spans`` covers."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def rows(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """{title: spans in order of time that do not overlap}: a lane, and "lane 2" … where its spans overlap."""
    lanes = [MARKS, COMPUTE, EXPOSED, WIRE]
    lanes += sorted({span.lane for span in spans} - set(lanes))
    found: dict[str, list[Span]] = {}
    for lane in lanes:
        of_lane: list[list[Span]] = []
        for span in sorted((span for span in spans if span.lane == lane), key=lambda span: span.start):
            free = next((row for row in of_lane if row[-1].end <= span.start), None)
            if free is None:
                of_lane.append([span])
            else:
                free.append(span)
        found.update({lane if i == 0 else f"{lane} {i + 1}": row for i, row in enumerate(of_lane)})
    return found


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """A picture (PNG) of several, under one another and to one scale. Needs matplotlib."""
    from matplotlib.figure import Figure

    lanes = [rows(timeline.spans) for timeline in timelines.values()]
    heights = [1.2 + 0.3 * len(found) for found in lanes]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    axes = figure.subplots(len(lanes), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    colors: dict[str, str] = {}
    for axis, title, found in zip(axes, timelines, lanes, strict=True):
        first = min((row[0].start for row in found.values()), default=0.0)
        for height, spans in enumerate(found.values()):
            for span in spans:
                color = colors.setdefault(span.name, f"C{len(colors) % 10}")
                start = 1e3 * (span.start - first)
                axis.barh(
                    height, 1e3 * span.seconds, left=start, color=color, edgecolor="white", linewidth=0.3
                )
        axis.set_yticks(range(len(found)), list(found))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel("milliseconds")
    handles = [figure.gca().barh([0], [0], color=color, label=name) for name, color in colors.items()]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), fontsize=8)
    figure.savefig(path, dpi=120)


def _named(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _events(path: str | Path) -> list[dict[str, Any]]:
    try:
        events: list[dict[str, Any]] = json.loads(Path(path).read_text())["traceEvents"]
        whole = all(event["ph"] in "MX" and {"name", "pid", "tid"} <= event.keys() for event in events)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no trace: expected a file that Timeline.save wrote ({error!r})"
        ) from error
    if not whole:
        raise ValueError(f"{path} is a trace, but not one that Timeline.save wrote: merge those")
    return events
