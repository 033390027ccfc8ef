"""Gathers that overlap the next forward: the same bits, and every module waits for its parameters.

In these tests a gather starts only at its wait, so that a parameter without a wait is certainly stale.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.param_gather import IN_FLIGHT
from sharded_lamb.comm.pending import Pending
from tests.harness import run_ranks

SMALL = 0.002  # MiB: a bucket a layer


class Lazy(Pending):
    """A gather that only starts when it is waited for."""

    def __init__(self, start: Callable[[], Pending]) -> None:
        super().__init__([])
        self._start = start

    def wait(self) -> None:
        self._start().wait()
        self._start = lambda: Pending([])


@contextmanager
def lazy_gathers() -> Iterator[None]:
    original = Collectives.all_gather

    def lazy(self: Collectives, flat: Tensor) -> Pending:
        return Lazy(lambda: original(self, flat))

    with mock.patch.object(Collectives, "all_gather", lazy):
        yield


class Attending(nn.Module):
    """The parent reads ``out_proj`` without calling it; ``sometimes`` is only called with ``more``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.body = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        self.sometimes = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, more: bool = True) -> Tensor:
        x = self.embedding(tokens)
        x = self.body(x + self.attention(x, x, x)[0])
        return self.head(self.sometimes(x) if more else x)


@dataclass
class Run:
    weights: dict[str, Tensor]
    in_flight: list[int] = field(default_factory=list)  # after every step
    left: list[int] = field(default_factory=list)  # after the next forward
    messages: list[int] = field(default_factory=list)  # compressed ones, after every step


def train(
    rank: int,
    overlaps: bool,
    stage: int,
    dtype: torch.dtype,
    steps: int = 5,
    gather_dtype: torch.dtype | None = None,
) -> Run:
    torch.manual_seed(0)
    model = Attending().to(dtype)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if stage == 1 else model
    opt = ShardedLamb(
        model.named_parameters(), lr=0.05, stage=stage, bucket_mb=SMALL, gather_dtype=gather_dtype
    )
    generator = torch.Generator().manual_seed(rank)
    run = Run({})
    with lazy_gathers():
        if overlaps:
            opt.overlap_forward(model)
        for step in range(steps):
            tokens = torch.randint(40, (3, 5), generator=generator)
            loss = wrapped(tokens, more=step != 3).float().logsumexp(-1).mean()
            run.left.append(len(opt._gathers._in_flight))
            opt.zero_grad()
            loss.backward()
            opt.step()
            run.in_flight.append(len(opt._gathers._in_flight))
            run.messages.append(sum(gather.message_bytes() > 0 for gather in opt._store.gathers))
        opt.synchronize()
        assert not any(gather.message_bytes() for gather in opt._store.gathers)
    run.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("stage", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (1, torch.float32)])
def test_overlap_has_the_bits_of_waiting_in_the_step(world: int, stage: int, dtype: torch.dtype) -> None:
    waiting = run_ranks(world, train, False, stage, dtype)
    overlapping = run_ranks(world, train, True, stage, dtype)
    for one, other in zip(waiting, overlapping, strict=True):
        assert one.in_flight == [0] * 5
        assert other.in_flight[0] > 1
        for name, weight in one.weights.items():
            assert torch.equal(weight, other.weights[name]), name
        for name, weight in waiting[0].weights.items():
            assert torch.equal(weight, other.weights[name]), name


def test_compressed_gathers_overlap_and_hold_few_messages() -> None:
    gather = torch.float8_e4m3fn
    waiting = run_ranks(2, train, False, 2, torch.float32, gather_dtype=gather)
    overlapping = run_ranks(2, train, True, 2, torch.float32, gather_dtype=gather)
    for one, other in zip(waiting, overlapping, strict=True):
        assert one.messages == [0] * 5
        assert other.in_flight[0] > IN_FLIGHT
        assert 1 < max(other.messages) <= IN_FLIGHT
        for name, weight in one.weights.items():
            assert torch.equal(weight, other.weights[name]), name
            assert torch.equal(weight, waiting[0].weights[name]), name


def test_the_next_step_waits_for_gathers_that_no_forward_read() -> None:
    """The fourth forward does not call ``sometimes``: its gather stays in flight until the next step."""
    for run in run_ranks(2, train, True, 2, torch.float32):
        assert run.left[:3] == [0, 0, 0]
        assert run.left[3] >= 1
        assert run.left[4] == 0


def watched(rank: int) -> dict[str, list[str]]:
    """Parameters that are still stale at each event after a step that left gathers in flight."""
    torch.manual_seed(0)
    model = Attending()
    opt = ShardedLamb(model.named_parameters(), lr=0.05, stage=2, bucket_mb=SMALL)
    tokens = torch.arange(8).view(2, 4)
    bucket_of = {p: i for i, bucket in enumerate(opt._store.buckets) for p in bucket.params}
    names = {p: name for name, p in model.named_parameters()}

    def stale() -> list[str]:
        return sorted(name for p, name in names.items() if bucket_of[p] in opt._gathers._in_flight)

    def step() -> None:
        model(tokens).logsumexp(-1).mean().backward()
        opt.step()
        opt.zero_grad()

    seen = {}
    with lazy_gathers():
        watch = opt.overlap_forward(model)
        step()
        seen["after a step"] = stale()
        model.embedding(tokens)
        seen["after embedding"] = stale()
        model.body[0](torch.zeros(1, 32))
        seen["after body.0"] = stale()
        model.body.state_dict()
        seen["after a state_dict"] = stale()
        step()
        model.body[1].load_state_dict({"weight": torch.zeros(32, 32), "bias": torch.zeros(32)})
        seen["after a load_state_dict"] = stale()
        step()
        opt.synchronize()
        seen["after synchronize"] = stale()
        step()
        opt.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]})
        seen["after add_param_group"] = stale()
        step()
        watch.remove()
        seen["after remove"] = stale()
        step()
        seen["a step after remove"] = stale()
    return seen


def test_every_module_waits_for_its_own_parameters() -> None:
    first, second = run_ranks(2, watched)
    assert first == second
    everything = first["after a step"]
    assert "embedding.weight" in everything
    assert "body.3.weight" in everything
    assert "attention.out_proj.weight" not in everything  # its module is never called
    assert "embedding.weight" not in first["after embedding"]
    assert "body.0.weight" in first["after embedding"]
    assert "body.0.weight" not in first["after body.0"]
    assert "body.1.weight" in first["after body.0"]
    for event, stale in first.items():
        if event not in ("after a step", "after embedding", "after body.0"):
            assert stale == [], event


def unfrozen(rank: int, overlap: bool) -> tuple[list[int], Tensor]:
    """Gathers in flight after each step, and weights; the optimizer's layers are unfrozen one after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1:].requires_grad_(False)
    opt = ShardedLamb(model[1:].named_parameters(), lr=0.1, stage=2, bucket_mb=SMALL)
    flying = []
    with lazy_gathers():
        if overlap:
            opt.overlap_forward(model)
        for layer in (None, 2, 1):
            if layer is not None:
                model[layer].requires_grad_(True)
            for _ in range(2):
                model(torch.full((1, 64), 1.0 + rank)).square().sum().backward()
                opt.step()
                flying.append(len(opt._gathers._in_flight))
                opt.zero_grad()
        opt.synchronize()
    return flying, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_unfrozen_parameters_are_gathered_in_the_next_forward() -> None:
    for (flying, weights), (_, expected) in zip(
        run_ranks(2, unfrozen, True), run_ranks(2, unfrozen, False), strict=True
    ):
        assert flying == [0, 0, 1, 1, 2, 2]
        assert torch.equal(weights, expected)


def test_a_model_of_another_optimizer_raises() -> None:
    opt = ShardedLamb(nn.Linear(3, 3).named_parameters())
    with pytest.raises(ValueError, match="without a parameter of this optimizer"):
        opt.overlap_forward(nn.Linear(3, 3))


def test_a_model_outlives_its_optimizer() -> None:
    """The model's hooks hold the gathers in flight."""
    assert run_ranks(2, outlived) == [True, True]


def outlived(rank: int) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=2, bucket_mb=SMALL)
    opt.overlap_forward(model)
    with lazy_gathers():
        model(torch.ones(1, 64)).sum().backward()
        opt.step()
        del opt
        model(torch.ones(1, 64))
    parts = [torch.empty_like(model[1].weight) for _ in range(2)]
    torch.distributed.all_gather(parts, model[1].weight.detach().contiguous())
    return torch.equal(parts[0], parts[1])


def copied(rank: int) -> list[bool]:
    """Copies of a model whose gathers are in flight are equal and complete on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=2, bucket_mb=SMALL)
    opt.overlap_forward(model)
    alike = []
    with lazy_gathers():
        for how in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
            model(torch.ones(1, 64)).sum().backward()
            opt.step()
            assert opt._gathers._in_flight
            other = how(model)
            alike.append(torch.equal(other(torch.ones(1, 64)), model(torch.ones(1, 64))))
            opt.zero_grad()
    parts = [torch.empty_like(other[1].weight) for _ in range(2)]
    torch.distributed.all_gather(parts, other[1].weight.detach().contiguous())
    return [*alike, torch.equal(parts[0], parts[1])]


def test_a_copy_of_the_model_has_complete_parameters() -> None:
    assert run_ranks(2, copied) == [[True] * 3] * 2


def two_models(rank: int) -> list[int]:
    """Gathers in flight after a step: with both models watched, then one, then none."""
    torch.manual_seed(0)
    models = [nn.Linear(64, 64), nn.Linear(64, 64)]
    named = [(f"{i}.{name}", p) for i, m in enumerate(models) for name, p in m.named_parameters()]
    opt = ShardedLamb(named, lr=0.1, stage=2, bucket_mb=SMALL)
    watches = [opt.overlap_forward(model) for model in models]
    in_flight = []
    with lazy_gathers():
        for watch in (None, *watches):
            if watch is not None:
                watch.remove()
            for model in models:
                model(torch.ones(1, 64)).sum().backward()
            opt.step()
            in_flight.append(len(opt._gathers._in_flight))
            opt.zero_grad()
    return in_flight


def test_models_are_watched_independently() -> None:
    for both, one, none in run_ranks(2, two_models):
        assert both > one > none == 0
