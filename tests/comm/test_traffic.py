"""Collectives and bytes of a step, counted independently of `Traffic`, and `Traffic` checked against them."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from sharded_lamb.core.layout import BLOCK
from tests.harness import run_ranks
from tests.pairs import pairs
from tests.sharded_cases import Case, give_gradients, make_optimizer, make_parameters, rank_gradients

STEPS = 2

ALL = [
    *("all_reduce", "broadcast", "reduce", "isend", "irecv", "send", "recv", "barrier", "batch_isend_irecv"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "gather", "scatter", "reduce_scatter"),
    *(
        "reduce_scatter_tensor",
        "all_to_all",
        "all_to_all_single",
        "all_reduce_coalesced",
        "broadcast_object_list",
    ),
]


@dataclass
class Seen:
    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)  # bytes that this rank sent
    largest_all_reduce: int = 0


def _sent(name: str, args: tuple[Any, ...], group_size: int) -> int:
    """Bytes sent, from the operation's input tensor."""
    if name in ("isend", "send", "broadcast", "all_reduce"):
        return args[0].nbytes
    if name == "all_to_all_single":
        return args[1].nbytes * (group_size - 1) // group_size
    return 0


@contextmanager
def spied() -> Iterator[Seen]:
    """Every function of torch.distributed that moves data, wrapped."""
    seen = Seen()

    def wrapper(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.calls[name] += 1
            seen.sent[name] += _sent(name, args, dist.get_world_size(kwargs.get("group")))
            if name == "all_reduce":
                seen.largest_all_reduce = max(seen.largest_all_reduce, args[0].nbytes)
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in ALL:
            stack.enter_context(mock.patch.object(dist, name, wrapper(name, getattr(dist, name))))
        yield seen


@dataclass
class Report:
    seen: Seen
    calls: dict[str, int]  # `opt.traffic` of the same steps
    bytes: dict[str, int]
    gloo: Counter[str]  # profiler events


def _steps(rank: int, case: Case, world: int) -> Report:
    """Measured after two steps, in which stage 1 compares gradients and hooks learn."""
    params = make_parameters(case)
    opt = make_optimizer(case, params)

    def one(step: int) -> None:
        give_gradients(case, params, rank_gradients(case, step, world)[rank])
        opt.step()
        opt.zero_grad()

    for step in range(2):
        one(step)
    calls, sent = opt.traffic.calls.copy(), opt.traffic.bytes.copy()
    # The profiler includes the process group's threads: one event per operation.
    with spied() as seen, profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(2, 2 + STEPS):
            one(step)
    assert profiler.profiler is not None
    names = (event.name() for event in profiler.profiler.kineto_results.events())
    gloo = Counter(name for name in names if "gloo:" in name)
    opt.traffic.calls.subtract(calls)
    opt.traffic.bytes.subtract(sent)
    return Report(seen, dict(+opt.traffic.calls), dict(+opt.traffic.bytes), gloo)


def case_of(shapes: dict[str, tuple[int, ...]], stage: int, **more: Any) -> Case:
    return Case(
        shapes=shapes,
        options={"max_grad_norm": 1.0},
        settings={"stage": stage, "bucket_mb": 0.01},
        missing=0.0,
        drive="backward" if stage == 2 else "assign",
        **more,
    )


MIXED_SIZES = {"a": (1031,), "b": (61, 67), "c": (), "d": (0,), "e": (7,), "f": (3 * BLOCK,), "g": (2, 2903)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_two_small_all_reduces_however_many_parameters(stage: int, world: int) -> None:
    few = {f"p{i}": (40 + i,) for i in range(3)}
    many = {f"p{i}": (40 + i % 3,) for i in range(100)}
    for shapes in (few, many):
        for report in run_ranks(world, _steps, case_of(shapes, stage), world):
            assert report.seen.calls["all_reduce"] == 2 * STEPS
            assert report.gloo["gloo:all_reduce"] == 2 * STEPS
            assert report.calls["all_reduce_small"] == 2 * STEPS
            assert report.seen.largest_all_reduce <= 8 * max(3 * len(shapes) + 1, 2 * len(shapes) + 6)


def buckets_of(shapes: dict[str, tuple[int, ...]], itemsize: int, mb: float, world: int) -> list[int]:
    """Elements of every bucket, padding included; the documented rule, computed independently."""
    sizes, filled = [], 0
    for shape in reversed(shapes.values()):
        filled += -(-math.prod(shape) // BLOCK) * BLOCK
        if filled * itemsize >= mb * 2**20:
            sizes.append(filled)
            filled = 0
    if filled:
        sizes.append(filled)
    return [-(-size // (BLOCK * world)) * BLOCK * world for size in sizes]


@pairs(dtype=[torch.float32, torch.bfloat16], stage=[1, 2], world=[2, 3, 4])
def test_bytes_are_those_of_shards_and_small_vectors(dtype: torch.dtype, stage: int, world: int) -> None:
    case = case_of(MIXED_SIZES, stage, dtypes=dict.fromkeys(MIXED_SIZES, dtype), bits=7)
    buckets = buckets_of(MIXED_SIZES, dtype.itemsize, 0.01, world)
    assert len(buckets) > 1
    shards = sum(buckets) * dtype.itemsize * (world - 1) // world * STEPS
    count = len(MIXED_SIZES)
    small = 8 * (3 * count + 1 + 2 * count + 6) * STEPS
    gathers, scatters = len(buckets) * STEPS, len(buckets) * STEPS if stage == 2 else 0
    for report in run_ranks(world, _steps, case, world):
        seen = report.seen
        assert seen.sent["all_reduce"] == report.bytes["all_reduce_small"] == small
        assert report.bytes["all_gather"] == shards
        assert report.bytes.get("reduce_scatter", 0) == (shards if stage == 2 else 0)
        assert seen.sent["isend"] == stage * shards
        assert sum(seen.sent.values()) == sum(report.bytes.values())
        messages = (gathers + scatters) * (world - 1)  # one message carries all small slices
        assert seen.calls["isend"] == seen.calls["irecv"] == messages
        assert report.calls["all_gather"] == gathers
        assert report.calls.get("reduce_scatter", 0) == scatters
        assert set(+seen.calls) == {"all_reduce", "isend", "irecv"}
        assert set(report.gloo) == {"gloo:all_reduce", "gloo:send", "gloo:recv"}
        assert report.gloo["gloo:send"] == report.gloo["gloo:recv"] == messages


@pairs(gather=[torch.bfloat16, torch.float8_e4m3fn], stage=[1, 2], world=[2, 3])
def test_compressed_gathers_send_half_or_257_bytes_for_1024(
    gather: torch.dtype, stage: int, world: int
) -> None:
    case = case_of(MIXED_SIZES, stage)
    case = replace(case, settings={**case.settings, "gather_dtype": gather})
    blocks = sum(buckets_of(MIXED_SIZES, 4, 0.01, world)) // BLOCK * (world - 1) // world * STEPS
    sent = blocks * (2 * BLOCK if gather == torch.bfloat16 else BLOCK + 1)
    for report in run_ranks(world, _steps, case, world):
        assert report.bytes["all_gather"] == sent
        assert report.seen.sent["isend"] == sent + (stage - 1) * blocks * 4 * BLOCK
        assert set(+report.seen.calls) == {"all_reduce", "isend", "irecv"}


@pairs(reduce=[torch.bfloat16, torch.float8_e4m3fn], world=[2, 3])
def test_compressed_reductions_send_half_or_257_bytes_for_1024(reduce: torch.dtype, world: int) -> None:
    case = case_of(MIXED_SIZES, 2)
    case = replace(case, settings={**case.settings, "reduce_dtype": reduce})
    blocks = sum(buckets_of(MIXED_SIZES, 4, 0.01, world)) // BLOCK * (world - 1) // world * STEPS
    sent = blocks * (2 * BLOCK if reduce == torch.bfloat16 else BLOCK + 1)
    for report in run_ranks(world, _steps, case, world):
        assert report.bytes["reduce_scatter"] == sent
        assert report.seen.sent["isend"] == sent + blocks * 4 * BLOCK
        assert set(+report.seen.calls) == {"all_reduce", "isend", "irecv"}


def _nothing_to_send(rank: int, stage: int) -> tuple[Counter[str], int]:
    with spied() as seen:
        group = dist.new_group([dist.get_rank()])
        p = Parameter(torch.ones(1000))
        case = case_of({"p": (1000,)}, stage)
        opt = make_optimizer(case, {"p": p}, process_group=group)
        for _ in range(3):
            (p * 2).sum().backward()
            opt.step()
            opt.zero_grad()
    return seen.calls, sum(opt.traffic.calls.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_sends_nothing(stage: int) -> None:
    assert run_ranks(1, _nothing_to_send, stage) == [(Counter(), 0)]
