"""Placements: DTensors on meshes with assigned gradients, and the placements that are rejected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from sharded_lamb.sharding.placements import index_of_coordinate, owners
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim import fsdp_models as models

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 1.0, "weight_norm_clip": (0.0, 0.7)}
SHAPES: dict[str, training.Shape] = {
    "rows": (7, 5),
    "columns": (5, 13),
    "middle": (3, 11, 4),
    "both": (9, 10),
    "strided": (8, 3),
    "whole": (17,),
    "sub": (5, 6),
    "other": (13,),
    "one": (1,),
    "empty": (0, 3),
    "scalar": (),
    "large": (41, 43),
}


def placements_on(mesh: DeviceMesh) -> dict[str, tuple[DeviceMesh, tuple[Any, ...]]]:
    """{parameter: mesh and placements}; other parameters are plain."""
    last = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh  # type: ignore[index]
    first = mesh[mesh.mesh_dim_names[0]] if mesh.ndim > 1 else mesh  # type: ignore[index]
    rest = (Replicate(),) * (mesh.ndim - 1)
    # torch 2.11 gathers only what tensor parallelism and fully_shard make: a split for each rank of the next dimension.
    split = 2 if torch.__version__ >= "2.12" or mesh.ndim == 1 else mesh.size(1)
    return {
        "rows": (mesh, (*rest, Shard(0))),
        "columns": (mesh, (Shard(1), *rest)),
        "middle": (last, (Shard(-2),)),
        "both": (mesh, (Shard(0), Shard(1), Replicate())[: mesh.ndim]),
        "strided": (mesh, (_StridedShard(0, split_factor=split), Shard(0), Replicate())[: mesh.ndim])
        if mesh.ndim > 1
        else (mesh, (Shard(0),)),
        "whole": (mesh, (Replicate(), *rest)),
        "sub": (last, (Shard(0),)),
        "other": (first, (Shard(0),)),
        "one": (mesh, (*rest, Shard(0))),
        "empty": (last, (Shard(1),)),
        "scalar": (last, (Replicate(),)),
    }


def distributed(mesh: DeviceMesh) -> dict[str, Parameter]:
    placements = placements_on(mesh)
    return {
        name: Parameter(distribute_tensor(value, *placements[name]) if name in placements else value)
        for name, value in training.weights(SHAPES).items()
    }


def averaged_gradients(step: int) -> dict[str, Tensor | None]:
    """Averaged gradients; one is missing on every rank on odd steps."""
    grads: dict[str, Tensor | None] = dict(models.gradients(0, step, SHAPES))
    return {**grads, "columns": None} if step % 2 else grads


def bare_run(rank: int, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, int]]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])
    params, placements = distributed(mesh), placements_on(mesh)
    opt = ShardedLamb(params.items(), **OPTIONS)
    for step in range(STEPS):
        for name, g in averaged_gradients(step).items():
            placed = g if g is None or name not in placements else distribute_tensor(g, *placements[name])
            params[name].grad = placed
        opt.step()
    sizes = {n: p.to_local().numel() for n, p in params.items() if isinstance(p, DTensor)}
    return {name: models.whole(p) for name, p in params.items()}, opt.trust_ratios(), sizes


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 2), (1, 3), (4, 1), (2, 1, 2)], ids=str)
def test_every_kind_of_placement_beside_a_plain_parameter(shape: tuple[int, ...]) -> None:
    results = run_ranks(torch.Size(shape).numel(), bare_run, shape)
    oracle = training.oracle_run(
        training.weights(SHAPES), (averaged_gradients(step) for step in range(STEPS)), **OPTIONS
    )
    for weights, ratios, _ in results:
        training.assert_follows(weights, oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)
    if shape[-1] > 1:
        assert len({sizes["rows"] for _, _, sizes in results}) > 1  # uneven
        assert 0 in {sizes["one"] for _, _, sizes in results}


# -- Partial gradients -------------------------------------------------------------------------------------------


def partial_run(rank: int, count: int, op: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = {f"norm{i}": (5 + i,) for i in range(count)}
    params = {
        name: Parameter(distribute_tensor(value, mesh, [Replicate()]))
        for name, value in training.weights(shapes).items()
    }
    opt = ShardedLamb(params.items(), lr=0.02, max_grad_norm=0.1)
    for step in range(3):
        for name, g in models.gradients(rank, step, shapes).items():
            params[name].grad = DTensor.from_local(g, mesh, [Partial(op)])
        opt.step()
    return {name: models.whole(p) for name, p in params.items()}, dict(opt.traffic.calls)


@pytest.mark.parametrize("op", ["sum", "avg"])
def test_partial_gradients_are_summed_together(op: str) -> None:
    """Gradients of norms under sequence parallel: one all-reduce, whatever their number."""
    for count in (2, 20):
        shapes = {f"norm{i}": (5 + i,) for i in range(count)}
        averaged = [
            training.average(models.gradients(r, step, shapes) for r in range(3)) for step in range(3)
        ]
        factor = 3 if op == "sum" else 1
        grads = [{name: g * factor for name, g in step.items() if g is not None} for step in averaged]
        oracle = training.oracle_run(training.weights(shapes), grads, lr=0.02, max_grad_norm=0.1)
        for weights, calls in run_ranks(3, partial_run, count, op):
            training.assert_follows(weights, oracle)
            assert calls["all_reduce_partial"] == 3


def replicated_gradient_run(rank: int) -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    value, g = training.draw((7, 3), "w"), models.gradients(0, 0, {"w": (7, 3)})["w"]
    weights = []
    for placement in (Shard(0), Replicate()):
        p = Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        opt = ShardedLamb([("w", p)], lr=0.02)
        p.grad = distribute_tensor(g, mesh, [placement])
        opt.step()
        weights.append(models.whole(p))
        del opt
    return weights[0], weights[1]


def test_gradients_are_redistributed_like_their_parameter() -> None:
    for sharded, replicated in run_ranks(2, replicated_gradient_run):
        assert torch.equal(sharded, replicated)


# -- the ranks of an optimizer ----------------------------------------------------------------------------------


def pipeline_stage(rank: int, with_group: bool) -> tuple[dict[str, Tensor], float | None]:
    """2 pipeline stages; the model of each is fully sharded over 2 ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    shapes = {f"stage{mesh.get_local_rank('pp')}.weight": (7 + mesh.get_local_rank("pp"), 3)}
    tree = models.sharded_tree(mesh["dp"], shapes=shapes)
    ranks = {"process_group": mesh.get_group("dp")} if with_group else {}
    opt = ShardedLamb(tree.named_parameters(), **OPTIONS, **ranks)
    for step in range(STEPS):
        tree(models.gradients(mesh.get_local_rank("dp"), step, shapes)).backward()
        opt.step()
        opt.zero_grad()
    return models.whole_weights(tree), opt.grad_norm


def test_a_pipeline_stage_has_an_optimizer_of_its_own() -> None:
    results = run_ranks(4, pipeline_stage, True)
    for stage in range(2):
        shapes = {f"stage{stage}.weight": (7 + stage, 3)}
        averaged = [
            training.average(models.gradients(r, step, shapes) for r in range(2)) for step in range(STEPS)
        ]
        oracle = training.oracle_run(training.weights(shapes), averaged, **OPTIONS)
        for weights, norm in results[2 * stage : 2 * stage + 2]:
            training.assert_follows(weights, oracle)
            assert norm == pytest.approx(oracle.grad_norm, rel=1e-6)


def test_a_pipeline_without_process_group_is_rejected() -> None:
    for kind, message in run_ranks_expecting_errors(4, pipeline_stage, False, timeout=30).values():
        assert kind == "ValueError"
        assert "ranks disagree on what they optimize" in message


def on_some_ranks(rank: int) -> dict[str, Tensor] | None:
    """Two of three ranks have a model; none passes process_group."""
    mesh = DeviceMesh("cpu", [0, 2])
    if rank == 1:
        return None
    p = Parameter(distribute_tensor(training.draw((5, 3), "w"), mesh, [Shard(0)]))
    opt = ShardedLamb([("w", p)], lr=0.02)
    p.grad = distribute_tensor(training.draw((5, 3), "g"), mesh, [Shard(0)])
    opt.step()
    return {"w": models.whole(p)}


def test_the_ranks_default_to_those_of_the_mesh() -> None:
    first, second, third = run_ranks(3, on_some_ranks)
    assert second is None
    assert first is not None
    assert third is not None
    start, g = training.draw((5, 3), "w"), training.draw((5, 3), "g").double()
    oracle = training.oracle_run({"w": start}, [{"w": g}], lr=0.02)
    training.assert_follows(first, oracle)
    training.assert_same_bits(first, third)


# -- rejected parameters and gradients ---------------------------------------------------------------------------


def partial_parameter(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    ShardedLamb([("fc.weight", p)])


def gappy_parameter(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(DTensor.from_local(torch.ones(4, 6)[:, :3], mesh, [Shard(0)], run_check=False))
    ShardedLamb([("fc.weight", p)])


def mesh_beyond_the_group(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    ShardedLamb([("fc.weight", p)], process_group=alone)


def other_models_in_the_group(rank: int) -> None:
    """The local sizes sum to 5 of 6 elements: a rank holds part of another model's parameter."""
    mesh = init_device_mesh("cpu", (2,))
    local = torch.ones(3 - rank)
    p = Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(6,), stride=(1,)))
    ShardedLamb([("fc.weight", p)])


def placements_differ_over_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(rank)], run_check=False))
    ShardedLamb([("fc.weight", p)])


def on_the_meta_device(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=mesh)
    ShardedLamb(model.named_parameters())


def plain_gradient(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    opt = ShardedLamb([("fc.weight", p)])
    p.grad = torch.ones(4)
    opt.step()


def gradient_on_some_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    opt = ShardedLamb([("fc.weight", p)])
    if rank == 0:
        p.grad = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    opt.step()


def replicas_with_their_own_gradients(rank: int) -> None:
    """A 2 x 2 mesh (replicate, shard); gradients are not averaged over the replicating axis."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    p = Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate(), Shard(0)]))
    opt = ShardedLamb([("fc.weight", p)])
    p.grad = DTensor.from_local(
        torch.full((2,), 1.0 + mesh.get_local_rank("replicate")),
        mesh,
        [Replicate(), Shard(0)],
        run_check=False,
    )
    opt.step()


def converted_after_construction(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    opt = ShardedLamb([("fc.weight", p)])
    p._local_tensor = p._local_tensor.bfloat16()  # as fully_shard does when the module is converted
    opt.step()


def two_optimizers(rank: int) -> None:
    model = models.sharded_tree(init_device_mesh("cpu", (2,)))
    first = ShardedLamb(model.named_parameters())
    ShardedLamb(model.named_parameters())
    del first


@pytest.mark.parametrize(
    ("case", "kind", "why"),
    [
        (partial_parameter, "ValueError", "has placement Partial(sum) on axis 0 of its mesh"),
        (gappy_parameter, "ValueError", "must fill memory without gaps"),
        (mesh_beyond_the_group, "ValueError", "would be missing from its norms"),
        (other_models_in_the_group, "ValueError", "hold 5 of the 6 elements of parameter 'fc.weight'"),
        (placements_differ_over_ranks, "ValueError", "ranks disagree on what they optimize"),
        (on_the_meta_device, "ValueError", "is on the meta device: call model.to_empty"),
        (plain_gradient, "TypeError", "the placements of the gradient are unknown"),
        (gradient_on_some_ranks, "ValueError", "it is a DTensor, of which every rank holds a part"),
        (replicas_with_their_own_gradients, "ValueError", "these ranks would diverge"),
        (converted_after_construction, "RuntimeError", "convert and move the model first"),
        (two_optimizers, "ValueError", "already belongs to another ShardedLamb"),
    ],
)
def test_errors_name_the_reason(case: Callable[[int], None], kind: str, why: str) -> None:
    world = 4 if case is replicas_with_their_own_gradients else 2
    for actual, message in run_ranks_expecting_errors(world, case, timeout=30).values():
        assert actual == kind, message
        assert why in message


# -- owners -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4))
def test_one_rank_owns_each_shard(axes: list[tuple[int, bool]]) -> None:
    """An independent rule: a rank owns its shard if its coordinate is 0 on every axis that does not shard."""
    sizes, shards = [size for size, _ in axes], [sharding for _, sharding in axes]
    ranks = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes)).tolist()
    indices = [index_of_coordinate(coordinate, sizes, shards) for coordinate in ranks]
    by_coordinates = [
        all(position == 0 for position, sharding in zip(coordinate, shards, strict=True) if not sharding)
        for coordinate in ranks
    ]
    assert owners(indices) == by_coordinates
    owned = [index for index, owns in zip(indices, by_coordinates, strict=True) if owns]
    assert sorted(owned) == list(range(len(owned)))
