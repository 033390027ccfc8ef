"""Backward waits for no other rank: whatever trains under DDP, with collectives inside backward, trains in stage 2."""

import warnings
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.gradients import reducer
from sharded_lamb.gradients.exchange import Staging
from tests import training
from tests.harness import run_ranks

WIDTH = 16
ONE_EACH_MB = WIDTH * WIDTH * 4 / 2**20
LR = 0.01


class Mean(torch.autograd.Function):
    """A mean over ranks whose backward is a collective too, as those of SyncBatchNorm and all-to-all are."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return _mean(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return _mean(grad)


def _mean(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


class Layers(nn.Module):
    """Layers above a collective; calls in any order, some left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))

    def forward(self, x: Tensor, calls: Sequence[int]) -> Tensor:
        x = Mean.apply(self.layers[0](x))  # type: ignore[no-untyped-call]
        for index in calls:
            x = x + torch.tanh(self.layers[index](x))
        return x.square().mean()


class Tasks(nn.Module):
    """Independent parts, an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor, calls: Sequence[int]) -> Tensor:
        return torch.stack([self.layers[index](x).square().mean() for index in calls]).sum()


Calls = Callable[[int, int], Sequence[int]]
"""(rank, step) → the layers that it calls, in order."""


def left_out(rank: int, step: int) -> Sequence[int]:
    return [index for index in range(1, 7) if not (rank == 1 and index > 6 - step)]


def rotated(rank: int, step: int) -> Sequence[int]:
    return [(index + rank + step) % 3 for index in range(3)]


def trained(
    rank: int, make: Callable[[], nn.Module], calls: Calls, apart: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after stage 2, and after ``Lamb`` on gradients that were averaged after backward."""

    def data(step: int) -> Tensor:
        return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))

    def parts(model: nn.Module) -> list[nn.Module]:
        return list(model.layers) if apart else [model]  # type: ignore[arg-type]

    ours, theirs = make(), make()
    sharded = [ShardedLamb(m.named_parameters(), lr=LR, stage=2, bucket_mb=ONE_EACH_MB) for m in parts(ours)]
    plain = [Lamb(m.named_parameters(), lr=LR) for m in parts(theirs)]
    with mock.patch.object(reducer, "PATIENCE", 0.05):
        for step in range(5):
            ours(data(step), calls(rank, step)).backward()
            theirs(data(step), calls(rank, step)).backward()
            for p in theirs.parameters():
                p.grad = _mean(torch.zeros_like(p) if p.grad is None else p.grad)
            for optimizer in (*sharded, *plain):
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for p in ours.parameters()], [p.detach().clone() for p in theirs.parameters()]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("make", "calls", "apart"),
    [(Layers, left_out, False), (Tasks, rotated, True)],
    ids=["collective", "optimizers"],
)
def test_ranks_that_wait_for_each_other_in_backward_train(
    make: Callable[[], nn.Module], calls: Calls, apart: bool, world: int
) -> None:
    for ours, theirs in run_ranks(world, trained, make, calls, apart, timeout=60):
        for weight, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(weight, expected, rtol=2e-5, atol=1e-6)


def staging_of(rank: int, late: bool) -> tuple[int, int, list[str]]:
    """Buckets staged at most at once, and afterwards; and warnings. ``late``: rank 1 waits for rank 0's backward."""
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6))
    opt = ShardedLamb(model.named_parameters(), lr=LR, stage=2, bucket_mb=ONE_EACH_MB)
    most, one = 0, Staging(opt._store.buckets, opt._collectives).nbytes
    with mock.patch.object(reducer, "PATIENCE", 0.05), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(reducer.IMPATIENT_ROUNDS + 1):
            loss = torch.stack([layer(torch.ones(1, WIDTH)).sum() for layer in model]).sum()
            if late and rank == 1:
                dist.barrier()
            loss.backward()
            if late and rank == 0:
                dist.barrier()
            most = max(most, opt.memory()["staging"] // one)
            opt.step()
            opt.zero_grad()
    return most, opt.memory()["staging"] // one, [str(each.message) for each in caught]


def test_memory_in_flight_is_bounded_unless_a_rank_is_late() -> None:
    for most, after, messages in run_ranks(2, staging_of, False):
        assert (most, after) == (reducer.IN_FLIGHT, reducer.IN_FLIGHT)
        assert messages == []
    (most, after, messages), (_, _, other) = run_ranks(2, staging_of, True)
    assert (most, after) == (6, reducer.IN_FLIGHT)
    assert len(messages) == 1
    assert "staging memory grows" in messages[0]
    assert other == []


def after_a_failed_backward(rank: int, failing: tuple[int, ...], then: str) -> dict[str, Tensor]:
    """A backward fails, and the model zeroes gradients, as a loop that skips a batch does.

    ``then``: "step": the batch that it skips has a step, without gradients; "in place": how it zeroes.
    """
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=0.002)
    for step in range(3):
        loss = training.loss_of(params, training.own_gradients(rank, 50 + step))
        if rank in failing:
            handle = params["norm.weight"].register_hook(_fail)
            with pytest.raises(ArithmeticError):
                loss.backward()
            handle.remove()
        else:
            loss.backward()
        nn.ParameterDict({name.replace(".", "_"): p for name, p in params.items()}).zero_grad(
            set_to_none=then != "in place"
        )
        if then == "step":
            opt.step()
        training.backward(params, training.own_gradients(rank, step))
        opt.step()
        opt.zero_grad()
    return training.copies(params)


def _fail(grad: Tensor) -> None:
    raise ArithmeticError


@pytest.mark.parametrize("then", ["", "step", "in place"])
@pytest.mark.parametrize("failing", [(0, 1), (1,)], ids=["everywhere", "on one rank"])
def test_a_model_zeroed_after_a_failed_backward_starts_anew(failing: tuple[int, ...], then: str) -> None:
    oracle = training.oracle_of_ranks(2, range(3), lr=LR)
    for weights in run_ranks(2, after_a_failed_backward, failing, then, timeout=60):
        training.assert_follows(weights, oracle)
