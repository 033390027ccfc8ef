"""A rank's timeline: collectives in flight, the host's waits for them, and its computation.

    timeline = Timeline(rank=dist.get_rank())
    with optimizer.record(timeline):
        with timeline.span("forward"):
            loss = model(batch)
        ...
    timeline.save("trace.json")  # for chrome://tracing and ui.perfetto.dev
    print(timeline.summary())

Times are the host's. On CUDA the host only launches work (a wait returns once the stream will wait), so its times show
neither wire nor exposed time: run ``torch.profiler`` there. Its trace shows waits, marks, "copy gradients" and
"average" under the same names, and passes 1 and 2 as their kernels.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import record_function

from sharded_lamb.pictures import figure

WIRE, EXPOSED, COMPUTE, MARKS = "wire", "exposed", "compute", "marks"
"""Lanes: a collective in flight; the host blocked in its wait; passes 1 and 2 and copies; the user's marks."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """One activity, in seconds of the timeline's clock."""

    name: str
    lane: str
    start: float
    end: float
    bytes: int = 0  # that this rank sent

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """Spans of one rank, ordered by their ends.

    Args:
        rank: names the trace.
        clock: returns seconds; the default is shared by all processes of a machine.
        origin: the clock's time that traces show as 0.
    """

    rank: int = 0
    clock: Callable[[], float] = time.perf_counter
    spans: list[Span] = field(default_factory=list)
    origin: float = 0.0

    def align(self) -> None:
        """Set the origin to now. With several machines, call it on every rank right after a barrier."""
        self.origin = self.clock()

    @contextmanager
    def span(self, name: str, lane: str = MARKS) -> Iterator[None]:
        """Record the body as a span; also if it raises."""
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
        """Record a collective of ``sent`` bytes, in flight from now until its `Flight.landing` ends."""
        return Flight(self, name, sent, self.clock())

    @contextmanager
    def blocking(self, name: str, sent: int) -> Iterator[None]:
        """Record the body as a collective that the host waits for at once."""
        with self.launched(name, sent).landing():
            yield

    # -- sums, traces, pictures ----------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Seconds, calls and bytes.

        Returns:
            ``collectives``: for each kind, and ``total`` over all: ``calls``, ``bytes``; ``wire``: seconds in which at
            least one was in flight; ``exposed``: seconds in which the host was blocked for them; ``hidden``: the share
            of ``wire`` in which it was not (None if none was in flight). ``seconds``: {other lane: {name: sum}}.

        Backends do not report when a collective arrives, so it counts as in flight until its wait ends: ``wire`` and
        ``hidden`` are upper bounds. The link's least time is bytes over its rate.
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
        """Chrome's trace format: a process per rank, a thread per lane (several if its spans overlap)."""
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
        """Write `trace` as JSON.

        Raises:
            OSError: the path cannot be written.
        """
        Path(path).write_text(json.dumps(self.trace()) + "\n", encoding="utf-8")

    @staticmethod
    def merge(paths: Sequence[str | Path], into: str | Path) -> None:
        """Merge several ranks' files into one trace that begins at 0.

        Raises:
            ValueError: `save` did not write one of the files, or two are of one rank.
        """
        owners: dict[int, str | Path] = {}
        events: list[dict[str, Any]] = []
        for path in paths:
            of_rank = _events(path)
            for rank in {event["pid"] for event in of_rank}:
                if rank in owners:
                    raise ValueError(
                        f"{owners[rank]} and {path} are both of rank {rank}: give every rank's Timeline its rank"
                    )
                owners[rank] = path
            events += of_rank
        first = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
        moved = [{**event, "ts": event["ts"] - first} if event["ph"] == "X" else event for event in events]
        Path(into).write_text(
            json.dumps({"traceEvents": moved, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8"
        )

    def draw(self, path: str | Path) -> None:
        """Write a picture (PNG) of the lanes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        draw({f"rank {self.rank}": self}, path)


@dataclass(slots=True)
class Flight:
    """A collective, from its launch to the end of its wait."""

    timeline: Timeline
    name: str
    bytes: int
    start: float

    @contextmanager
    def landing(self, begin: float | None = None) -> Iterator[None]:
        """Record the body as the wait for it; ``begin``: when the wait began, if before the body."""
        timeline = self.timeline
        begin = timeline.clock() if begin is None else begin
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
    """{title: spans that do not overlap, ordered by time}; a lane with overlaps has several: "lane", "lane 2" …"""
    lanes = [MARKS, COMPUTE, EXPOSED, WIRE]
    lanes += sorted({span.lane for span in spans} - set(lanes))
    titled: dict[str, list[Span]] = {}
    for lane in lanes:
        of_lane: list[list[Span]] = []
        for span in sorted((span for span in spans if span.lane == lane), key=lambda span: span.start):
            free = next((row for row in of_lane if row[-1].end <= span.start), None)
            if free is None:
                of_lane.append([span])
            else:
                free.append(span)
        titled.update({lane if i == 0 else f"{lane} {i + 1}": row for i, row in enumerate(of_lane)})
    return titled


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Write a picture (PNG) of several timelines, one below the other, to one scale.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lanes = [rows(timeline.spans) for timeline in timelines.values()]
    drawing, axes = figure.stacked(12, [1.2 + 0.3 * len(titled) for titled in lanes], share_x=True)
    colors: dict[str, str] = {}
    for axis, title, titled in zip(axes, timelines, lanes, strict=True):
        first = min((row[0].start for row in titled.values()), default=0.0)
        for height, spans in enumerate(titled.values()):
            for span in spans:
                color = colors.setdefault(span.name, f"C{len(colors) % 10}")
                start = 1e3 * (span.start - first)
                axis.barh(
                    height, 1e3 * span.seconds, left=start, color=color, edgecolor="white", linewidth=0.3
                )
        axis.set_yticks(range(len(titled)), list(titled))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel("milliseconds")
    handles = [drawing.gca().barh([0], [0], color=color, label=name) for name, color in colors.items()]
    if handles:
        drawing.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), fontsize=8)
    figure.save(drawing, path)


def _named(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _events(path: str | Path) -> list[dict[str, Any]]:
    try:
        events: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        whole = all(event["ph"] in "MX" and {"name", "pid", "tid"} <= event.keys() for event in events)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no trace: expected a file that Timeline.save wrote ({error!r})"
        ) from error
    if not whole:
        raise ValueError(f"{path} is a trace, but not one that Timeline.save wrote: merge those")
    return events
