"""Collectives of a step under fully_shard, counted by torch's CommDebugMode, and compared with timm's Lamb."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from sharded_lamb import ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim import fsdp_models as models
from tests.timm_peer import load_timm_lamb

STEPS = 4


def shapes_of(layers: int) -> dict[str, training.Shape]:
    return {
        f"layer{i}.{name}": shape
        for i in range(layers)
        for name, shape in (("weight", (13, 7)), ("bias", (13,)), ("norm", (5,)))
    }


def counted(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Collectives of one ``step()``, by operation."""
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(op): count for op, count in mode.get_comm_counts().items() if count}


def steps_of(
    rank: int, layers: int, axes: Mapping[str, int], options: Mapping[str, Any]
) -> tuple[list[dict[str, int]], dict[str, int], dict[str, int], int]:
    """Counts of every step; `traffic`'s calls and bytes of the last step; the expected bytes of a step."""
    shapes = shapes_of(layers)
    tree = models.sharded_tree(models.named_mesh(**axes), shapes=shapes)
    opt = ShardedLamb(tree.named_parameters(), lr=0.02, **options)
    counts = []
    for step in range(STEPS):
        tree(models.gradients(rank, step, shapes)).backward()
        calls, sent = opt.traffic.calls.copy(), opt.traffic.bytes.copy()
        counts.append(counted(opt))
        opt.zero_grad()
    opt.traffic.calls.subtract(calls)
    opt.traffic.bytes.subtract(sent)
    return (
        counts,
        dict(+opt.traffic.calls),
        dict(+opt.traffic.bytes),
        opt.expected_bytes()["all_reduce_small"],
    )


@pytest.mark.parametrize("axes", [{"dp": 2}, {"dp": 3}, {"replicate": 2, "shard": 2}], ids=str)
def test_two_small_all_reduces_for_any_number_of_parameters(axes: dict[str, int]) -> None:
    for layers in (1, 3):
        world = torch.Size(axes.values()).numel()
        for counts, calls, sent, expected_bytes in run_ranks(
            world, steps_of, layers, axes, {"max_grad_norm": 1.0}
        ):
            assert counts == [{"c10d.allreduce_": 2}] * STEPS
            assert calls == {"all_reduce_small": 2}
            assert sent == {"all_reduce_small": expected_bytes}
            assert expected_bytes == 8 * (3 * 3 * layers + 1 + 2 * 3 * layers + 6)


def test_one_all_reduce_without_clipping_and_skipping() -> None:
    """The first two steps also compare replicated gradients."""
    for layers in (1, 6):
        for counts, calls, sent, expected_bytes in run_ranks(
            2, steps_of, layers, {"dp": 2}, {"skip_nonfinite": False}
        ):
            assert counts == [{"c10d.allreduce_": count} for count in (2, 2, 1, 1)]
            assert calls == {"all_reduce_small": 1}
            assert sent == {"all_reduce_small": expected_bytes}
            assert expected_bytes == 8 * (4 * 3 * layers + 6)


def packed_run(rank: int) -> models.Run:
    tree = models.sharded_tree(init_device_mesh("cpu", (3,)))
    opt = ShardedLamb(tree.named_parameters(), lr=0.02, skip_nonfinite=False)
    return models.train(tree, opt, lambda step: tree(models.gradients(rank, step)), 6)


def test_one_all_reduce_follows_the_oracle() -> None:
    models.check(run_ranks(3, packed_run), lr=0.02)


def missing_late(rank: int) -> None:
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters(), skip_nonfinite=False)
    for step in range(3):
        tree(models.gradients(rank, step)).backward()
        if step == 2 and rank == 0:
            tree.fc.bias.grad = None  # type: ignore[union-attr]
        opt.step()
        opt.zero_grad()


def test_a_gradient_on_some_ranks_is_an_error_with_one_all_reduce() -> None:
    for kind, message in run_ranks_expecting_errors(2, missing_late).values():
        assert kind == "ValueError"
        assert "a gradient of 'fc.bias' on 1 of 2 ranks only" in message


def construction(rank: int, layers: int) -> dict[str, int]:
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)), shapes=shapes_of(layers))
    with CommDebugMode() as mode:
        ShardedLamb(tree.named_parameters())
    return {str(op): count for op, count in mode.get_comm_counts().items() if count}


def test_construction_gathers_and_broadcasts_nothing() -> None:
    assert run_ranks(2, construction, 1) == run_ranks(2, construction, 20) == [{"c10d.allreduce_": 2}] * 2


def parallel_steps(rank: int) -> list[dict[str, int]]:
    model = models.parallel_block(models.named_mesh(dp=2, tp=2), "dp", "tp")
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    counts = []
    for step in range(STEPS):
        model(models.inputs(rank // 2, step)).square().sum().backward()
        counts.append(counted(opt))
        opt.zero_grad()
    return counts


def test_tensor_parallel_adds_no_collectives() -> None:
    assert run_ranks(4, parallel_steps) == [[{"c10d.allreduce_": 2}] * STEPS] * 4


# -- a peer -----------------------------------------------------------------------------------------------------


def compare_with_timm(rank: int, layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int]:
    """timm's Lamb and `ShardedLamb` on two copies of one model: weights, and collectives of a step."""
    shapes = shapes_of(layers)
    results: list[Any] = []
    for build in (make_own, make_timm):
        tree = models.sharded_tree(init_device_mesh("cpu", (2,)), torch.float64, shapes=shapes)
        opt = build(tree)
        for step in range(STEPS):
            tree({n: g.double() for n, g in models.gradients(rank, step, shapes).items()}).backward()
            total = sum(counted(opt).values())
            opt.zero_grad()
        results += [models.whole_weights(tree), total]
    return results[0], results[2], results[1], results[3]


def make_own(model: nn.Module) -> ShardedLamb:
    return ShardedLamb(
        model.named_parameters(), lr=0.02, variant="timm", exclude_from_weight_decay=["bias$", "norm$"]
    )


def make_timm(model: nn.Module) -> torch.optim.Optimizer:
    plain = [p for name, p in model.named_parameters() if name.endswith(("bias", "norm"))]
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
    return load_timm_lamb()([{"params": plain, "weight_decay": 0.0}, {"params": decayed}], lr=0.02)


def test_timms_lamb_under_fully_shard() -> None:
    """Equal weights; timm's collectives grow with the number of tensors, `ShardedLamb`'s are 2."""
    load_timm_lamb()  # skips if timm is not installed
    for layers in (1, 4):
        for own_weights, timm_weights, own_count, timm_count in run_ranks(2, compare_with_timm, layers):
            for name, value in timm_weights.items():
                gap, size = (own_weights[name] - value).norm().item(), value.norm().item()
                assert gap <= 1e-8 * size, name  # the global norm that clips is rounded to fp32
            assert own_count == 2
            assert timm_count > layers * 3
