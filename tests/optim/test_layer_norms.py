"""Norms of every parameter, exact and equal on all ranks under every sharding, without a collective of their own."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.optim.step_results import LayerNorms
from tests import training
from tests.deepspeed import cases
from tests.harness import run_ranks
from tests.optim import fsdp_models as models

STEPS = 3  # of the deferred kind, the third is the first
Norms = dict[str, LayerNorms]
OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.5, "weight_norm_clip": (0.0, 0.7)},
    "lans": {"normalize_grad": True, "nesterov": True},
    "caution": {"caution": True, "betas": (0.5, 0.99)},  # see test_caution.py
    "one all-reduce": {},  # in stage 3: see `keywords`
}


def keywords(case: str) -> dict[str, Any]:
    return {"lr": 0.02, **OPTIONS[case], **({"skip_nonfinite": False} if case == "one all-reduce" else {})}


def read(opt: Any) -> Norms:
    """`layer_norms`, read twice, between equal counts of collectives."""
    before, all_bytes = dict(opt.traffic.calls), dict(opt.traffic.bytes)
    late = opt.fetch_layer_norms()
    norms: Norms = opt.layer_norms()
    ratios = opt.trust_ratios()
    assert late.read() == norms
    assert {name: each.ratio for name, each in norms.items()} == ratios
    str(opt.explain())
    assert (dict(opt.traffic.calls), dict(opt.traffic.bytes)) == (before, all_bytes)
    return norms


def plain(rank: int, world: int, stage: int, case: str) -> Norms:
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage, bucket_mb=0.004, **keywords(case))
    training.train(opt, params, stage=stage, rank=rank, world=world, steps=range(STEPS))
    assert opt.traffic.calls.get("all_reduce_small", 0) == (2 * STEPS if world > 1 else 0)
    return read(opt)


def fully_sharded(rank: int, world: int, case: str) -> Norms:
    tree = models.sharded_tree(init_device_mesh("cpu", (world,)))
    opt = ShardedLamb(tree.named_parameters(), **keywords(case))
    at_construction = opt.traffic.calls.get("all_reduce_small", 0)
    for step in range(STEPS):
        tree(models.gradients(rank, step)).backward()
        opt.step()
        opt.zero_grad()
    calls = 2 * STEPS - (case == "one all-reduce")  # ranks compare gradients in the first two
    assert opt.traffic.calls.get("all_reduce_small", 0) - at_construction == (calls if world > 1 else 0)
    return read(opt)


def check(results: list[Norms], oracle: Any) -> None:
    assert all(repr(norms) == repr(results[0]) for norms in results)
    assert results[0].keys() == oracle.norms.keys()
    for name, norms in results[0].items():
        assert norms == pytest.approx(oracle.norms[name], rel=1e-5), name


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2(stage: int, world: int, case: str) -> None:
    oracle = training.oracle_of_ranks(world, range(STEPS), lr=0.02, **OPTIONS[case])
    check(run_ranks(world, plain, world, stage, case), oracle)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_stage_3(world: int, case: str) -> None:
    start = training.weights(models.SHAPES)
    oracle = training.oracle_of_ranks(world, range(STEPS), models.gradients, start, lr=0.02, **OPTIONS[case])
    check(run_ranks(world, fully_sharded, world, case), oracle)


@pytest.mark.parametrize("case", ["clipped", "lans", "caution"])
def test_one_device(case: str) -> None:
    params = training.parameters()
    opt = Lamb(params.items(), lr=0.02, **OPTIONS[case])
    assert opt.layer_norms() == {}
    for step in range(STEPS):
        training.give(params, training.own_gradients(0, step))
        opt.step()
    oracle = training.oracle_of_ranks(1, range(STEPS), lr=0.02, **OPTIONS[case])
    check([opt.layer_norms(), opt.fetch_layer_norms().read()], oracle)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_are_unscaled_and_missing_ones_left_out(stage: int) -> None:
    """``stage`` 0: `Lamb`. GradScaler's scale is not in ‖g‖."""
    run_ranks(1, scaled, stage)


def scaled(rank: int, stage: int) -> None:
    params = training.parameters()
    keys: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 0.5}
    opt: Any = ShardedLamb(params.items(), stage=stage, **keys) if stage else Lamb(params.items(), **keys)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def some(rank: int, step: int) -> dict[str, torch.Tensor | None]:
        return {**training.own_gradients(rank, step), "fc.weight": None}

    scaler.scale(
        training.loss_of(params, some(0, 0), [name for name in params if name != "fc.weight"])
    ).backward()
    scaler.step(opt)
    oracle = training.oracle_of_ranks(1, [0], some, **keys)
    assert "fc.weight" not in opt.layer_norms()
    check([opt.layer_norms()], oracle)


def in_deepspeed(rank: int, skip_nonfinite: bool) -> tuple[Norms, Any]:
    params = {**cases.LAMB, "skip_nonfinite": skip_nonfinite}
    engine = cases.start(cases.config(2, "bf16", params=params))
    reference = cases.oracle_of(cases.masters(engine))
    cases.follow(engine, rank, reference, STEPS)
    opt = engine.basic_optimizer
    calls = dict(opt.traffic.calls)
    norms = opt.layer_norms()
    assert opt.fetch_layer_norms().read().keys() == norms.keys() == opt.trust_ratios().keys()
    assert "non-finite" not in str(opt.explain())
    assert dict(opt.traffic.calls) == calls
    cases.stop(engine)
    return norms, reference


@pytest.mark.parametrize(("world", "skip_nonfinite"), [(1, True), (2, True), (2, False)])
def test_deepspeed(world: int, skip_nonfinite: bool) -> None:
    results = run_ranks(world, in_deepspeed, skip_nonfinite, timeout=300)
    norms, oracle = [own for own, _ in results], results[0][1]
    if not skip_nonfinite:  # no step sums gradients then
        oracle.norms = {name: (w, u, float("nan"), r) for name, (w, u, _, r) in oracle.norms.items()}
    assert all(repr(own) == repr(norms[0]) for own in norms)
    assert norms[0].keys() == oracle.norms.keys()
    for name, own in norms[0].items():
        assert own == pytest.approx(oracle.norms[name], rel=1e-5, nan_ok=True), name
