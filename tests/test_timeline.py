"""Timelines: sums and traces of spans made by hand, and what a step of two ranks leaves on one."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sharded_lamb import ShardedLamb
from sharded_lamb.timeline import Span, Timeline, covered, draw
from tests.harness import run_ranks


class Clock:
    """Shows what it was set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _fly(timeline: Timeline, clock: Clock, name: str, times: tuple[float, float, float], sent: int) -> None:
    launch, wait, end = times
    clock.now = launch
    flight = timeline.launched(name, sent)
    clock.now = wait
    with flight.landing():
        clock.now = end


def test_sums_of_spans(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    _fly(timeline, clock, "gather", (0, 3, 4), 100)
    _fly(timeline, clock, "gather", (2, 5, 6), 50)
    clock.now = 7
    with timeline.blocking("small", 8):
        clock.now = 8
    clock.now = 10
    with timeline.span("forward"):
        clock.now = 12.5
    with timeline.span("pass 1", "compute"):
        clock.now = 13
    results = timeline.summary()
    gather = {"calls": 2, "bytes": 150, "wire": 6, "exposed": 2, "hidden": pytest.approx(2 / 3)}
    small = {"calls": 1, "bytes": 8, "wire": 1, "exposed": 1, "hidden": 0}
    total = {"calls": 3, "bytes": 158, "wire": 7, "exposed": 3, "hidden": pytest.approx(4 / 7)}
    assert results["collectives"] == {"gather": gather, "small": small, "total": total}
    assert results["seconds"] == {"marks": {"forward": 2.5}, "compute": {"pass 1": 0.5}}


def test_of_nothing_nothing_is_hidden() -> None:
    total = {"calls": 0, "bytes": 0, "wire": 0, "exposed": 0, "hidden": None}
    assert Timeline().summary() == {"collectives": {"total": total}, "seconds": {}}


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0),
        ([(0, 1), (2, 3)], 2),
        ([(0, 10), (1, 2), (9, 11)], 11),
        ([(5, 6), (0, 1), (0.5, 5)], 6),
    ],
)
def test_seconds_that_any_span_covers(spans: list[tuple[float, float]], seconds: float) -> None:
    assert covered([Span("x", "wire", start, end) for start, end in spans]) == seconds


def test_what_raises_is_on_it_too(clock: Clock) -> None:
    timeline = Timeline(clock=clock)

    @timeline.span("backward")
    def fail() -> None:
        clock.now = 1
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timeline.spans == [Span("backward", "marks", 0, 1)]


def test_spans_of_a_generator_leave_out_the_body_of_the_loop(clock: Clock) -> None:
    timeline, done = Timeline(clock=clock), []

    def computed() -> Iterator[int]:
        for index in range(2):
            clock.now += 1
            yield index

    for index in timeline.each("pass 2", "compute", computed()):
        done.append(index)
        clock.now += 10
    assert done == [0, 1]
    assert timeline.spans == [Span("pass 2", "compute", 0, 1), Span("pass 2", "compute", 11, 12)]


# -- files --------------------------------------------------------------------------------------------


def _two_in_flight(rank: int, clock: Clock) -> Timeline:
    timeline = Timeline(rank=rank, clock=clock)
    _fly(timeline, clock, "gather", (20, 23, 24), 100)
    _fly(timeline, clock, "gather", (22, 25, 26), 50)
    _fly(timeline, clock, "gather", (24, 26, 27), 25)
    return timeline


def _check_chrome(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The format's required fields; one thread's spans must not overlap. Its complete events."""
    events = trace["traceEvents"]
    for event in events:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["name"], str)
        assert all(isinstance(event[key], int) for key in ("pid", "tid"))
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
    complete = [event for event in events if event["ph"] == "X"]
    threads: dict[tuple[int, int], float] = {}
    for event in sorted(complete, key=lambda event: event["ts"]):
        assert event["dur"] >= 0
        assert event["ts"] >= threads.get((event["pid"], event["tid"]), float("-inf")) - 1e-3
        threads[event["pid"], event["tid"]] = event["ts"] + event["dur"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named == set(threads)
    return complete


def test_a_trace_is_chromes(tmp_path: Path, clock: Clock) -> None:
    timeline = _two_in_flight(3, clock)
    timeline.save(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    complete = _check_chrome(trace)
    flights = [event for event in complete if event["cat"] == "wire"]
    assert [(event["ts"], event["dur"], event["args"]["bytes"]) for event in flights] == [
        (20e6, 4e6, 100),
        (24e6, 3e6, 25),
        (22e6, 4e6, 50),
    ]
    assert {event["pid"] for event in complete} == {3}
    titles = [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"]
    assert titles == ["rank 3", "exposed", "wire", "wire 2"]


def test_an_aligned_trace_counts_from_there(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    clock.now = 100
    timeline.align()
    _fly(timeline, clock, "gather", (101, 102, 103), 0)
    assert min(event["ts"] for event in _check_chrome(timeline.trace())) == 1e6


def test_ranks_merge_into_one_trace(tmp_path: Path, clock: Clock) -> None:
    paths = [tmp_path / "0.json", tmp_path / "1.json"]
    for rank, path in enumerate(paths):
        _two_in_flight(rank, clock).save(path)
    Timeline.merge(paths, tmp_path / "all.json")
    complete = _check_chrome(json.loads((tmp_path / "all.json").read_text()))
    assert Counter(event["pid"] for event in complete) == {0: 6, 1: 6}
    assert min(event["ts"] for event in complete) == 0
    with pytest.raises(ValueError, match=r"0\.json and .*0\.json are both of rank 0"):
        Timeline.merge([paths[0], paths[0]], tmp_path / "all.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [3]}', '{"traceEvents": [{"ph": "B"}]}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is (no|a) trace"):
        Timeline.merge([tmp_path / "broken.json"], tmp_path / "all.json")


def test_a_picture_without_matplotlib_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="a picture needs matplotlib: pip install matplotlib"):
        Timeline().draw(tmp_path / "none.png")


def test_pictures(tmp_path: Path, clock: Clock) -> None:
    pytest.importorskip("matplotlib")
    _two_in_flight(0, clock).draw(tmp_path / "one.png")
    draw({"a": _two_in_flight(0, clock), "empty": Timeline()}, tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        content = (tmp_path / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 5000


# -- a step -------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    spans: list[Span]
    calls: dict[str, int]  # of `traffic`, in the same steps
    bytes: dict[str, int]
    buckets: int
    left: int  # spans that came after it was over


STEPS = 2


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))


def _steps(rank: int, stage: int, behind_forward: bool) -> Recorded:
    model = _model()
    opt = ShardedLamb(model.named_parameters(), stage=stage, bucket_mb=0.01)
    if behind_forward:
        opt.overlap_forward(model)

    def one() -> None:
        opt.zero_grad()
        model(torch.ones(2, 40)).square().mean().backward()
        opt.step()

    timeline = Timeline(rank)
    for _ in range(2):  # stage 1 compares gradients in them
        one()
    opt.synchronize()
    calls, sent = opt.traffic.calls.copy(), opt.traffic.bytes.copy()
    with opt.record(timeline):
        for _ in range(STEPS):
            one()
        opt.synchronize()
    calls, sent = opt.traffic.calls - calls, opt.traffic.bytes - sent
    recorded = list(timeline.spans)
    one()
    opt.synchronize()
    buckets = len(opt._store.buckets)
    return Recorded(recorded, dict(calls), dict(sent), buckets, len(timeline.spans) - len(recorded))


@pytest.mark.parametrize(("stage", "behind_forward"), [(1, False), (2, False), (2, True)])
def test_a_step_leaves_what_traffic_counts(stage: int, behind_forward: bool) -> None:
    for results in run_ranks(2, _steps, stage, behind_forward):
        buckets = results.buckets
        assert buckets > 1
        flights = [span for span in results.spans if span.lane == "wire"]
        waits = [span for span in results.spans if span.lane == "exposed"]
        expected = {"all_reduce_small": 2 * STEPS, "all_gather": buckets * STEPS}
        if stage == 2:
            expected["reduce_scatter"] = buckets * STEPS
        assert Counter(span.name for span in flights) == results.calls == expected
        assert Counter(span.name for span in waits) == expected
        sent: Counter[str] = Counter()
        for span in flights:
            sent[span.name] += span.bytes
        assert sent == results.bytes
        computed = Counter(span.name for span in results.spans if span.lane == "compute")
        reduced = {"copy gradients": buckets * STEPS, "average": buckets * STEPS} if stage == 2 else {}
        assert computed == {"pass 1": STEPS, "pass 2": buckets * STEPS, **reduced}
        assert all(span.end >= span.start for span in results.spans)
        assert results.left == 0


def test_gradients_are_copied_before_and_averaged_after_their_flight() -> None:
    for results in run_ranks(2, _steps, 2, False):
        of = {
            name: sorted((s.start, s.end) for s in results.spans if s.name == name and s.lane != "exposed")
            for name in ("copy gradients", "reduce_scatter", "average")
        }
        for copy, flight, average in zip(*of.values(), strict=True):
            assert copy[1] <= flight[0] < flight[1] <= average[0]


def test_gathers_behind_the_next_forward_land_in_it() -> None:
    """Pass 1 ends a step's small all-reduces; what flies past the next step's first copy was waited for in between."""
    for results in run_ranks(2, _steps, 2, True):
        gathers = sorted(
            (s.start, s.end) for s in results.spans if s.name == "all_gather" and s.lane == "exposed"
        )
        second = sorted(s.start for s in results.spans if s.name == "copy gradients")[results.buckets]
        passed = sorted(s.end for s in results.spans if s.name == "pass 2")[results.buckets - 1]
        between = [1 for start, end in gathers if passed <= start and end <= second]
        assert len(between) == results.buckets


def _profiled(rank: int) -> set[str]:
    model = _model()
    opt, timeline = ShardedLamb(model.named_parameters(), stage=2), Timeline()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, opt.record(timeline):
        with timeline.span("forward"):
            loss = model(torch.ones(2, 40)).square().mean()
        loss.backward()
        opt.step()
    return {event.key for event in profiler.key_averages()} & {span.name for span in timeline.spans}


def test_the_profiler_has_the_names_that_are_said_to_be_there() -> None:
    waits = {"all_reduce_small", "reduce_scatter", "all_gather"}
    for names in run_ranks(2, _profiled):
        assert names == {"forward", "copy gradients", "average", "pass 1", "pass 2", *waits}


def test_one_rank_sends_nothing_and_computes() -> None:
    model = _model()
    opt, timeline = ShardedLamb(model.named_parameters()), Timeline()
    model(torch.ones(2, 40)).square().mean().backward()
    with opt.record(timeline):
        opt.step()
    assert [(span.name, span.lane) for span in timeline.spans] == [
        ("pass 1", "compute"),
        ("pass 2", "compute"),
    ]


def test_recordings_nest_and_end_when_the_body_raises() -> None:
    opt, outer, inner = ShardedLamb(_model().named_parameters()), Timeline(), Timeline()

    @opt.record(outer)
    def fail() -> None:
        with opt.record(inner):
            assert opt.traffic.timeline is inner
        assert opt.traffic.timeline is outer
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert opt.traffic.timeline is None
