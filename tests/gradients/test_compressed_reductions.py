"""``reduce_dtype`` narrower than the gradients: what the owner of a shard has, and what follows from it."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter

from sharded_lamb import ShardedLamb, checkpoint
from sharded_lamb.comm.wire_formats import ScaledFloat8
from tests import training
from tests.comm.wire_oracle import contribution
from tests.gradients import test_exchange as shapes
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim.fsdp_models import Tree
from tests.pairs import pairs

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
STEPS = 3
Slices = dict[str, tuple[int, Tensor]]
"""First element in memory order, and the averaged slice, by name."""


def gradient(name: str, rank: int, world: int, step: int, dtype: torch.dtype) -> Tensor | None:
    """Elements of eight magnitudes in every block; "long" is missing on the last rank, "last" on all in step 1."""
    with mock.patch.object(shapes.dist, "get_world_size", return_value=world):
        grad = shapes.gradient(name, rank, step, torch.float32)
    if grad is None:
        return None
    decades = torch.rand(grad.shape, generator=torch.Generator().manual_seed(rank + 10 * step)) * -8
    return grad.mul_(10**decades).to(dtype)


# -- the owner's average -----------------------------------------------------------------------------------


def averaged(
    rank: int,
    world: int,
    reduce: torch.dtype,
    dtype: torch.dtype,
    kernel: str,
    uses_p2p: bool,
    mesh: tuple[int, ...] = (),
    spoiled: float | None = None,
) -> list[Slices]:
    """The averages of three steps. ``spoiled``: the value of two elements on rank 1 in the first step."""
    named = shapes.parameters(dtype)
    opt = ShardedLamb(
        named.items(),
        stage=2,
        bucket_mb=0.02,
        reduce_dtype=reduce,
        kernel=kernel,
        skip_nonfinite=False,
        mesh=init_device_mesh("cpu", mesh) if mesh else None,
    )
    opt._collectives.uses_p2p = uses_p2p
    results = []
    for step in range(STEPS):
        for name, p in named.items():
            p.grad = gradient(name, rank, world, step, dtype)
        if spoiled is not None and rank == 1 and step == 0:
            for name in ("matrix", "bias"):
                grad = named[name].grad
                assert grad is not None
                grad.view(-1)[3] = spoiled
        opt._gradients.ready(None)
        results.append(
            {
                opt._store.names[segment.param]: (
                    segment.start,
                    bucket.slice_of(segment.param, bucket.shard.grad).clone(),
                )
                for bucket in opt._store.buckets
                for segment in bucket.segments
            }
        )
        opt.step()
        opt.zero_grad()
    return results


def expected(world: int, reduce: torch.dtype, dtype: torch.dtype, groups: int = 1) -> list[dict[str, Tensor]]:
    """Contributions summed in rank order within each of ``groups``, then over these, in float32 or float64."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    taken, averages = dict.fromkeys(shapes.SHAPES, 0), []
    for step in range(STEPS):
        of_step = {}
        for name, shape in shapes.SHAPES.items():
            grads = [gradient(name, rank, world, step, dtype) for rank in range(world)]
            sums = np.zeros((groups, torch.Size(shape).numel()), kind)
            for rank, grad in enumerate(grads):
                if grad is not None:
                    ordered = shapes.in_memory_order(name, grad)
                    sums[rank * groups // world] += contribution(ordered, reduce, taken[name]).astype(kind)
            total = sums[0] + sums[1] if groups == 2 else sums[0]
            of_step[name] = torch.from_numpy(total / kind(world))
            taken[name] += any(grad is not None for grad in grads)
        averages.append(of_step)
    return averages


def check(results: list[list[Slices]], whole: list[dict[str, Tensor]]) -> None:
    for step, of_step in enumerate(whole):
        for name, value in of_step.items():
            found = torch.full_like(value, torch.nan)
            for result in results:
                start, part = result[step].get(name, (0, found[:0]))
                found[start : start + len(part)] = part
            assert torch.equal(found, value), (step, name)


WIRES = [(BF16, torch.float32), (BF16, torch.float64)]
WIRES += [(FP8, dtype) for dtype in (torch.float32, BF16, torch.float16, torch.float64)]


@pairs(wire=WIRES, world=[1, 2, 3, 4], kernel=["cpp", "torch"], uses_p2p=[True, False])
def test_the_owner_has_the_sum_of_rounded_contributions(
    wire: tuple[torch.dtype, torch.dtype], world: int, kernel: str, uses_p2p: bool
) -> None:
    """In rank order, its own contribution rounded as well; not ``uses_p2p``: as on NCCL."""
    results = run_ranks(world, averaged, world, *wire, kernel, uses_p2p)
    check(results, expected(world, *wire))


def test_replicas_of_shards() -> None:
    results = run_ranks(4, averaged, 4, FP8, torch.float32, "auto", True, (2, 2))
    check(results[:2], expected(4, FP8, torch.float32, groups=2))
    check(results[2:], expected(4, FP8, torch.float32, groups=2))


@pairs(reduce=[BF16, FP8], value=[torch.inf, torch.nan])
def test_a_bad_element_stays_bad_once_and_changes_no_other(reduce: torch.dtype, value: float) -> None:
    results = run_ranks(2, averaged, 2, reduce, torch.float32, "auto", True, spoiled=value)
    whole = expected(2, reduce, torch.float32)
    for result in results:
        for step, slices in enumerate(result):
            for name, (start, part) in slices.items():
                right = whole[step][name][start : start + len(part)]
                bad = (
                    [3 - start]
                    if step == 0 and name in ("matrix", "bias") and start <= 3 < start + len(part)
                    else []
                )
                assert (~part.isfinite()).nonzero().flatten().tolist() == bad
                part[bad] = right[bad]
                assert torch.equal(part, right), (step, name)


# -- steps -------------------------------------------------------------------------------------------------


def optimizer(params: dict[str, Parameter], reduce: torch.dtype = FP8, **options: Any) -> ShardedLamb:
    return ShardedLamb(params.items(), lr=0.02, stage=2, bucket_mb=0.004, reduce_dtype=reduce, **options)


def alike(rank: int) -> dict[str, Tensor]:
    """Weights after four steps in which all ranks have the same gradients."""
    params = training.parameters()
    training.train(optimizer(params), params, stage=2, rank=0, world=1, steps=range(4))
    return training.copies(params)


def test_equal_gradients_give_the_same_bits_at_every_world_size_and_every_time() -> None:
    one = alike(0)
    for world in (2, 2, 3, 4):
        for weights in run_ranks(world, alike):
            training.assert_same_bits(weights, one)


def skipping(rank: int, reduce: torch.dtype, skips: bool) -> dict[str, Tensor]:
    """Three steps; before the second, one that GradScaler or the optimizer must skip, by a bad element on rank 1."""
    params = training.parameters()
    opt = optimizer(params, reduce, max_grad_norm=1.0)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    training.train(opt, params, stage=2, rank=rank, world=2, steps=[0])
    if skips:
        for scaled in (False, True):
            grads = training.own_gradients(rank, 50)
            assert grads["fc.weight"] is not None
            grads["fc.weight"][0, 0] = torch.inf if rank == 1 else 1.0
            loss = training.loss_of(params, grads)
            (scaler.scale(loss) if scaled else loss).backward()
            if scaled:
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
                assert scaler.get_scale() == 2.0**9
            else:
                opt.step()
                assert opt.skipped_steps == 1
            opt.zero_grad()
    training.train(opt, params, stage=2, rank=rank, world=2, steps=[1, 2])
    return training.copies(params)


@pytest.mark.parametrize("reduce", [BF16, FP8], ids=str)
def test_a_skipped_step_leaves_no_trace(reduce: torch.dtype) -> None:
    with_it, without = (run_ranks(2, skipping, reduce, skips) for skips in (True, False))
    training.assert_same_bits(with_it[0], without[0])
    training.assert_same_bits(with_it[1], without[1])


def stepping_over_a_bad_one(rank: int) -> None:
    params = training.parameters()
    opt = optimizer(params, max_consecutive_skips=1)
    for _ in range(2):
        grads = training.own_gradients(rank, 50)
        assert grads["fc.weight"] is not None
        grads["fc.weight"][0, 0] = torch.inf if rank == 1 else 1.0
        training.backward(params, grads)
        opt.step()
        opt.zero_grad()
    training.backward(params, training.own_gradients(rank, 0))
    opt.step()


def test_the_error_names_the_parameter() -> None:
    for kind, message in run_ranks_expecting_errors(2, stepping_over_a_bad_one).values():
        assert kind == "DivergedError"
        assert "the first bad parameter of the last one is 'fc.weight'" in message


def accumulating(rank: int, at_once: bool) -> tuple[dict[str, Tensor], float]:
    """Weights and the norm, after two micro-batches of which only the sum travels, or their sum in one backward."""
    params = training.parameters()
    opt = optimizer(params)
    first, second = (training.own_gradients(rank, step) for step in (0, 1))
    for grads in (first, second):
        for name, grad in grads.items():
            assert grad is not None
            grads[name] = grad.bfloat16().float()  # their sum is exact
    if at_once:
        training.backward(params, {name: first[name] + second[name] for name in first})  # type: ignore[operator]
    else:
        with opt.no_sync():
            training.backward(params, first)
        training.backward(params, second)
    norm = float(opt.clip_grad_norm_(0.5))
    opt.step()
    return training.copies(params), norm


def test_accumulated_gradients_are_rounded_once() -> None:
    for (weights, norm), (expected_weights, expected_norm) in zip(
        run_ranks(2, accumulating, False), run_ranks(2, accumulating, True), strict=True
    ):
        training.assert_same_bits(weights, expected_weights)
        assert norm == expected_norm


def interrupted(rank: int, folder: Path, is_resumed: bool) -> dict[str, Tensor]:
    """Weights after four steps; the first two by the program that was interrupted."""
    model = Tree(training.weights())
    params: Any = dict(model.named_parameters())
    opt = optimizer(params)
    if is_resumed:
        checkpoint.load(folder, model, opt)
    else:
        training.train(opt, params, stage=2, rank=rank, world=2, steps=[0, 1])
        checkpoint.save(folder, model, opt)
    training.train(opt, params, stage=2, rank=rank, world=2, steps=[2, 3])
    return training.copies(params)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    before, after = (run_ranks(2, interrupted, tmp_path / "run", is_resumed) for is_resumed in (False, True))
    training.assert_same_bits(after[0], before[0])


# -- training ----------------------------------------------------------------------------------------------


def regression(rank: int, reduce: torch.dtype | None, seed: int) -> float:
    """The mean squared error after 40 steps of a small network, each rank on batches of its own."""
    torch.manual_seed(0)
    inputs, teacher = torch.randn(256, 64), torch.randn(64, 1) / 8
    targets = torch.tanh(inputs @ teacher) + 0.1 * torch.randn(256, 1)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
    opt = ShardedLamb(model.named_parameters(), weight_decay=0.0, stage=2, reduce_dtype=reduce)
    generator = torch.Generator().manual_seed(2 * seed + rank)
    for step in range(40):
        opt.param_groups[0]["lr"] = 0.05 * (1 - step / 40)
        batch = torch.randint(256, (16,), generator=generator)
        (model(inputs[batch]) - targets[batch]).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return float((model(inputs) - targets).square().mean())


def test_40_steps_end_where_exact_ones_do() -> None:
    """Nearer to the exact run of the same batches than runs of other batches are to each other."""
    exact = [run_ranks(2, regression, None, seed)[0] for seed in range(3)]
    spread = float(np.std(exact, ddof=1))
    for reduce in (BF16, FP8):
        assert abs(run_ranks(2, regression, reduce, 1)[0] - exact[1]) < spread / 2


def moved(rank: int, reduce: torch.dtype | None, by_chance: bool) -> Tensor:
    """How far elements come in 40 steps whose gradients are a millionth of their block's largest one's."""
    weight = Parameter(torch.ones(256))
    opt = ShardedLamb([("w", weight)], lr=0.01, weight_decay=0.0, stage=2, reduce_dtype=reduce)
    generator = torch.Generator().manual_seed(rank)
    scale = torch.full((256,), 1e-6)
    scale[0] = 1.0
    with mock.patch.object(ScaledFloat8, "rounds_randomly", by_chance):
        for _ in range(40):
            (weight * scale * (1 + 0.1 * torch.randn(256, generator=generator))).sum().backward()
            opt.step()
            opt.zero_grad()
    return 1 - weight.detach()[1:]


def test_elements_far_below_their_blocks_largest_move_by_chance_alone() -> None:
    exact, by_chance, to_nearest = (
        run_ranks(2, moved, *how)[0] for how in ((None, True), (FP8, True), (FP8, False))
    )
    assert not to_nearest.any()
    assert (exact > 0.1).all()
    assert (by_chance > 0).float().mean() > 0.95
    assert float(by_chance.mean() / exact.mean()) > 0.5


# -- refused -----------------------------------------------------------------------------------------------


def in_stage_1(rank: int) -> None:
    ShardedLamb(nn.Linear(8, 8).named_parameters(), reduce_dtype=BF16)


def with_dtensors(rank: int) -> None:
    model = nn.Linear(8, 8)
    fully_shard(model)
    ShardedLamb(model.named_parameters(), stage=2, reduce_dtype=FP8)


def of_some_ranks(rank: int) -> None:
    ShardedLamb(nn.Linear(8, 8).named_parameters(), stage=2, reduce_dtype=FP8 if rank else None)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (in_stage_1, "'weight', in stage 1: DistributedDataParallel reduces.*bf16_compress_hook"),
        (with_dtensors, "'weight', a DTensor: FSDP2 reduces its gradients.*MixedPrecisionPolicy"),
        (of_some_ranks, "reduce_dtype"),
    ],
)
def test_what_others_reduce_is_an_error_on_every_rank(case: Any, why: str) -> None:
    for kind, message in run_ranks_expecting_errors(2, case).values():
        assert kind == "ValueError"
        assert re.search(why, message), message


def test_gradients_that_would_not_shrink_are_not_encoded() -> None:
    for stage in (1, 2):
        p = Parameter(torch.ones(300, dtype=BF16))
        opt = ShardedLamb([("p", p)], stage=stage, reduce_dtype=BF16)
        assert all(bucket.precision.reduce is None for bucket in opt._store.buckets)
