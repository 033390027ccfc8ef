"""Stage 2's stream on a GPU, played on a CPU: the order in which streams wait, and whose memory is kept from reuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.comm.collectives import Collectives, Traffic
from sharded_lamb.comm.pending import Pending
from sharded_lamb.gradients.streams import ReductionStream
from tests.harness import run_ranks

GPU = torch.device("cuda", 0)
Event = tuple[Any, ...]


class Streams:
    """torch.cuda's streams: which is current, and what happens on which, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.current: Any = None
        self.backward, self.made = self.Stream(self, "backward"), 0
        self.current = self.backward

    class Stream:
        def __init__(self, owner: "Streams", name: str) -> None:
            self.owner, self.name, self.device = owner, name, GPU

        def wait_stream(self, other: "Streams.Stream") -> None:
            self.owner.events.append((self.name, "waits for", other.name))

    def new(self, device: torch.device) -> "Streams.Stream":
        self.made += 1
        return self.Stream(self, "reduction")

    def now(self, device: torch.device) -> "Streams.Stream":
        return self.current

    @contextmanager
    def entered(self, stream: "Streams.Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def happens(self, what: str, *details: object) -> None:
        self.events.append((self.current.name, what, *details))


@contextmanager
def streams_of_a_gpu() -> Iterator[Streams]:
    streams = Streams()

    def record(tensor: Tensor, stream: Streams.Stream) -> None:
        streams.happens("keeps memory", tensor.data_ptr())

    with (
        mock.patch.object(torch.cuda, "Stream", streams.new),
        mock.patch.object(torch.cuda, "current_stream", streams.now),
        mock.patch.object(torch.cuda, "stream", streams.entered),
        mock.patch.object(Tensor, "record_stream", record),
    ):
        yield streams


def test_operations_follow_the_current_stream_and_are_joined() -> None:
    with streams_of_a_gpu() as streams:
        stream, read = ReductionStream(GPU, has_peers=True), torch.ones(3)
        with stream.entered([None, read]):
            streams.happens("copies")
        stream.join()
    assert streams.events == [
        ("reduction", "waits for", "backward"),
        ("backward", "keeps memory", read.data_ptr()),
        ("reduction", "copies"),
        ("backward", "waits for", "reduction"),
    ]
    assert not stream.blocks_host


@pytest.mark.parametrize(("device", "has_peers"), [(torch.device("cpu"), True), (GPU, False)])
def test_no_stream_is_made_where_none_is_needed(device: torch.device, has_peers: bool) -> None:
    with streams_of_a_gpu() as streams:
        stream = ReductionStream(device, has_peers=has_peers)
        with stream.entered([torch.ones(3)]):
            streams.happens("copies")
        stream.join()
    assert streams.events == [("backward", "copies")]
    assert stream.blocks_host


def reduced(rank: int) -> tuple[list[Event], list[list[int]], list[float | None]]:
    """The events of two accumulated backwards and a step, the gradients' memory, and the timeouts of waits."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    optimizer = ShardedLamb(model.named_parameters(), lr=0.01, stage=2, bucket_mb=0.001)
    timeouts: list[float | None] = []
    addresses: list[list[int]] = []
    with streams_of_a_gpu() as streams:
        optimizer._gradients.reducer._stream = ReductionStream(GPU, has_peers=True)  # type: ignore[attr-defined]
        computing, wait, small = Traffic.computing, Pending.wait, Collectives.all_reduce_small

        def seen_computing(self: Traffic, name: str) -> Any:
            streams.happens(name)
            return computing(self, name)

        def seen_wait(self: Pending, timeout: float | None = None) -> bool:
            streams.happens("waits for a message")
            timeouts.append(timeout)
            return wait(self, timeout)

        def seen_small(self: Collectives, vector: Tensor) -> None:
            streams.happens("all-reduces norms")
            small(self, vector)

        with (
            mock.patch.object(Traffic, "computing", seen_computing),
            mock.patch.object(Pending, "wait", seen_wait),
            mock.patch.object(Collectives, "all_reduce_small", seen_small),
        ):
            take = type(optimizer._gradients.reducer)._take_gradient  # type: ignore[attr-defined]

            def seen_take(self: Any, param: int, p: Tensor) -> Tensor | None:
                grad: Tensor | None = take(self, param, p)
                if grad is not None:
                    addresses.append([len(streams.events), grad.data_ptr()])
                return grad

            with mock.patch.object(type(optimizer._gradients.reducer), "_take_gradient", seen_take):  # type: ignore[attr-defined]
                for _ in range(2):
                    model(torch.randn(4, 16)).square().mean().backward()
            optimizer.step()
    return streams.events, addresses, timeouts


def test_a_reduction_is_on_its_stream_and_backward_waits_for_nothing() -> None:
    for events, taken, timeouts in run_ranks(2, reduced):
        first_small = events.index(("backward", "all-reduces norms"))
        joins = [i for i, event in enumerate(events) if event == ("backward", "waits for", "reduction")]
        assert joins
        assert joins[0] == first_small - 1, "joined at the first norm, not before"
        in_backward = events[: joins[0]]
        work = [
            event for event in in_backward if event[1] in ("copy gradients", "average", "waits for a message")
        ]
        assert {event[0] for event in work} == {"reduction"}
        assert len(work) >= 2 * 3 * 5
        assert set(timeouts) == {None}, "the host does not poll"
        for index, address in taken:
            kept = events.index(("backward", "keeps memory", address), index)
            copied = events.index(("reduction", "copy gradients"), index)
            waited = events.index(("reduction", "waits for", "backward"), index)
            assert waited < kept < copied
