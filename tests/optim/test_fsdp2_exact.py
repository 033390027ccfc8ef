"""DTensor parameters (fully_shard, HSDP, tensor parallel): exact against the fp64 oracle on every mesh."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from sharded_lamb import ShardedLamb
from tests import training
from tests.harness import run_ranks
from tests.optim import fsdp_models as models
from tests.optim.fsdp_models import GROUPED, SHAPES, Run

STEPS = 8
# Counting an element twice cancels in ‖w‖/‖u‖; clipping ‖w‖ reveals it.
CLIP = (0.0, 0.7)
BLOCK_OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "weight_norm_clip": CLIP,
}


def stage_1(world: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain parameters with the averages of the same gradients."""
    params = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    opt = training.grouped(params, 1, weight_norm_clip=CLIP)
    shapes = {name: tuple(value.shape) for name, value in start.items()}

    def draw(rank: int, step: int) -> dict[str, Tensor | None]:
        return dict(models.gradients(rank, step, shapes))

    training.train(opt, params, stage=1, rank=0, world=world, steps=range(STEPS), gradients=draw)
    return training.copies(params)


def tree_run(
    rank: int, shape: tuple[int, ...], shapes: Any = SHAPES, shard_dim: int = 0
) -> tuple[Run, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    tree = models.sharded_tree(
        mesh, shapes=shapes, shard_placement_fn=lambda p: Shard(shard_dim if p.ndim > shard_dim else 0)
    )
    opt = ShardedLamb(models.two_groups(tree), **GROUPED, weight_norm_clip=CLIP)
    run = models.train(tree, opt, lambda step: tree(models.gradients(rank, step, shapes)), STEPS)
    return run, stage_1(mesh.size(), run.start)


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 1), (2, 2)], ids=str)
def test_fully_shard_follows_the_oracle_and_stage_1(shape: tuple[int, ...]) -> None:
    """Meshes (W,) and (2, W / 2), which is (replicate, shard)."""
    results = run_ranks(torch.Size(shape).numel(), tree_run, shape)
    runs = [run for run, _ in results]
    for step, grads in enumerate(runs[0].gradients):  # fully_shard averaged the given gradients
        expected = training.average(models.gradients(rank, step) for rank in range(len(runs)))
        for name, g in grads.items():
            assert g is not None
            assert torch.equal(g.float(), expected[name].float())  # type: ignore[union-attr]
    models.check(runs, **GROUPED, weight_norm_clip=CLIP, overrides=models.overrides(runs[0].start))
    for name, value in results[0][1].items():
        gap, size = (value - runs[0].weights[name]).norm(), value.norm()
        assert gap <= 4e-6 * size, name
    if shape[-1] > 2:
        assert 0 in {run.local_sizes["scale"] for run in runs}
    if shape[-1] > 1:
        assert len({run.local_sizes["embed.weight"] for run in runs}) > 1


def test_any_dimension_may_be_sharded() -> None:
    """fully_shard needs even division on dimensions other than the first; test_placements.py has uneven ones."""
    shapes = {"conv.weight": (3, 4, 5), "fc.weight": (7, 6), "fc.bias": (5,), "scale": (3,)}
    runs = [run for run, _ in run_ranks(2, tree_run, (2,), shapes, 1)]
    assert runs[0].placements["conv.weight"] == "(Shard(dim=1),)"
    models.check(runs, **GROUPED, weight_norm_clip=CLIP, overrides=models.overrides(runs[0].start))


def block_run(
    rank: int, axes: dict[str, int], dp: Any, tp: str | None, options: dict[str, Any] = BLOCK_OPTIONS
) -> Run:
    mesh = models.named_mesh(**axes)
    model = models.parallel_block(mesh, dp, tp)
    opt = ShardedLamb(model.named_parameters(), **options)
    # Tensor-parallel ranks must see the same inputs.
    share = rank // axes["tp"] if tp else rank
    return models.train(model, opt, lambda step: model(models.inputs(share, step)).square().sum(), STEPS)


@pytest.mark.parametrize("world", [2, 3])
def test_a_real_model_under_fully_shard(world: int) -> None:
    models.check(run_ranks(world, block_run, {"dp": world}, "dp", None), **BLOCK_OPTIONS)


def test_fully_shard_and_tensor_parallel() -> None:
    """TP 2 x FSDP 2: strided shards, and parameters that both tensor-parallel ranks hold whole."""
    runs = run_ranks(4, block_run, {"dp": 2, "tp": 2}, "dp", "tp")
    assert runs[0].placements["up.weight"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    assert runs[0].placements["down.weight"] == "(Shard(dim=0), Shard(dim=1))"
    assert runs[0].placements["down.bias"] == "(Shard(dim=0), Replicate())"
    assert runs[0].placements["norm.weight"] == "(Shard(dim=0),)"
    models.check(runs, **BLOCK_OPTIONS)


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel_alone_beside_plain_parameters(world: int) -> None:
    """Plain parameters are the same on every rank and count once."""
    runs = run_ranks(world, block_run, {"tp": world}, None, "tp")
    assert runs[0].placements["norm.weight"] == ""
    assert runs[0].placements["up.weight"] == "(Shard(dim=0),)"
    assert runs[0].placements["down.bias"] == "(Replicate(),)"
    models.check(runs, **BLOCK_OPTIONS)
