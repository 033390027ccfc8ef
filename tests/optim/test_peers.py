"""Known failures of other LAMBs and other sharded optimizers, each as a test."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks
from tests.oracle import OracleLamb

STAGES = pytest.mark.parametrize("stage", [1, 2])
WORLD = 3


def compare(
    stage: int, options: dict[str, Any], *, draw: training.Draw = training.own_gradients
) -> OracleLamb:
    """`WORLD` ranks against the oracle with the same options: weights and ratios."""
    oracle = training.oracle_of_ranks(WORLD, range(4), draw, **options)
    for weights, ratios in run_ranks(WORLD, training.run, WORLD, stage, options, None, draw):
        training.assert_follows(weights, oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)
    return oracle


# -- apex DistributedFusedLAMB -------------------------------------------------------------------------------


def train_fragments(rank: int, stage: int) -> tuple[dict[str, Tensor], dict[str, float], int]:
    shapes = {
        "small": (300,),
        "whole": (4096,),
        "tail": (700,),
    }  # one bucket; every rank has a part of `whole`
    params = training.parameters(shapes)
    opt = ShardedLamb(params.items(), lr=0.01, stage=stage)

    def draw(r: int, step: int) -> dict[str, Tensor | None]:
        return training.own_gradients(r, step, shapes)

    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=range(3), gradients=draw)
    return training.copies(params), opt.trust_ratios(), opt.state[params["whole"]]["exp_avg"].numel()


@STAGES
def test_apex_distributed_update_norm_counts_every_fragment(stage: int) -> None:
    shapes = {"small": (300,), "whole": (4096,), "tail": (700,)}
    averaged = [
        training.average(training.own_gradients(r, step, shapes) for r in range(WORLD)) for step in range(3)
    ]
    oracle = training.oracle_run(training.weights(shapes), averaged, lr=0.01)
    results = run_ranks(WORLD, train_fragments, stage)
    assert all(0 < numel < 4096 for _, _, numel in results)
    assert sum(numel for _, _, numel in results) == 4096
    for weights, ratios, _ in results:
        assert ratios == pytest.approx(oracle.ratios, rel=1e-6)
        training.assert_follows(weights, oracle)


@STAGES
def test_constructor_lr_has_effect(stage: int) -> None:
    small, large = compare(stage, {"lr": 1e-4}), compare(stage, {"lr": 0.03})
    assert not np.allclose(small.params["fc.weight"], large.params["fc.weight"], rtol=1e-3)


def train_with_schedule(rank: int, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.1, stage=stage)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (0.5, 1.0, 0.25, 0.0)[min(step, 3)])
    rates = []
    for step in range(4):
        rates.append(opt.param_groups[0]["lr"])
        training.train(opt, params, stage=stage, rank=rank, world=2, steps=[step])
        schedule.step()
    return training.copies(params), rates


@STAGES
def test_schedulers_have_effect(stage: int) -> None:
    oracle = OracleLamb({name: value.double().numpy() for name, value in training.weights().items()})
    for step, lr in enumerate([0.05, 0.1, 0.025, 0.0]):
        for options in oracle.options.values():
            options["lr"] = lr
        grads = training.average(training.own_gradients(rank, step) for rank in range(2))
        oracle.step({name: g.numpy() for name, g in grads.items() if g is not None})
    for weights, rates in run_ranks(2, train_with_schedule, stage):
        assert rates == [0.05, 0.1, 0.025, 0.0]
        training.assert_follows(weights, oracle)


@STAGES
def test_grad_averaging_has_effect(stage: int) -> None:
    # Without decay the ratio cancels a factor on m, so the run needs decay.
    options = {"lr": 0.02, "weight_decay": 0.5}
    on = compare(stage, {**options, "grad_averaging": True})
    off = compare(stage, {**options, "grad_averaging": False})
    assert not np.allclose(on.params["fc.weight"], off.params["fc.weight"], rtol=1e-3)


@dataclass(frozen=True)
class Rounded:
    """The same gradients on every rank, representable in ``dtypes``: so is their average, in any dtype."""

    dtypes: Mapping[str, torch.dtype]

    def __call__(self, rank: int, step: int) -> dict[str, Tensor | None]:
        grads = training.own_gradients(0, step)
        return {name: None if g is None else g.to(self.dtypes[name]) for name, g in grads.items()}


MIXES = {
    "fp16 and fp32": {n: torch.float16 if n.endswith("weight") else torch.float32 for n in training.SHAPES},
    "bf16": dict.fromkeys(training.SHAPES, torch.bfloat16),
    "bf16, fp16, fp64": dict(
        zip(training.SHAPES, [torch.bfloat16, torch.float16, torch.float64] * 3, strict=False)
    ),
}


def train_mixed(rank: int, stage: int, mix: str) -> dict[str, Tensor]:
    """Whole masters on rank 0, or weights of parameters without masters."""
    dtypes = MIXES[mix]
    params = {
        n: torch.nn.Parameter(value.to(dtypes[n]).contiguous()) for n, value in training.weights().items()
    }
    opt = ShardedLamb(params.items(), lr=0.02, stage=stage, reduce_dtype=torch.float32)
    draw = Rounded(dtypes)
    training.train(opt, params, stage=stage, rank=rank, world=2, steps=range(4), gradients=draw)
    full = opt.full_state_dict()
    for p in params.values():
        assert p.isfinite().all()
    if full is None:
        return {}
    masters = {name: full["state"][i].get("master", p.detach()) for i, (name, p) in enumerate(params.items())}
    for name, p in params.items():
        assert torch.equal(masters[name].to(p.dtype), p)
    return masters


@STAGES
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_fp16_and_fp32(mix: str, stage: int) -> None:
    """fp16, bf16, fp32 and fp64 parameters in one optimizer: masters as exact as an fp32 run."""
    dtypes = MIXES[mix]
    start = {name: value.to(dtypes[name]) for name, value in training.weights().items()}
    draw = Rounded(dtypes)
    oracle = training.oracle_of_ranks(2, range(4), draw, start, lr=0.02)
    masters = run_ranks(2, train_mixed, stage, mix)[0]
    training.assert_follows(masters, oracle)


def absent_at_first(rank: int, step: int) -> dict[str, Tensor | None]:
    grads = training.own_gradients(rank, step)
    if step == 0:
        grads["fc.weight"] = grads["scale"] = None
    return grads


@STAGES
def test_parameter_without_gradient_at_first_backward_is_updated_later(stage: int) -> None:
    oracle = compare(stage, {"lr": 0.02}, draw=absent_at_first)
    assert oracle.steps["fc.weight"] == 3
    assert oracle.steps["embed.weight"] == 4


def resume_after_loading(rank: int, stage: int, steps_before: int) -> dict[str, Tensor]:
    """Load a state of two steps into an optimizer that has made ``steps_before`` steps, and resume."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.02, stage=stage)
    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=range(2))
    weights, saved = training.copies(params), opt.state_dict()
    saved = {**saved, "state": {k: {n: t.clone() for n, t in s.items()} for k, s in saved["state"].items()}}

    other = training.parameters()
    fresh = ShardedLamb(other.items(), lr=0.5, stage=stage)
    training.train(fresh, other, stage=stage, rank=rank, world=WORLD, steps=range(10, 10 + steps_before))
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(weights[name])
    fresh.load_state_dict(saved)
    training.train(fresh, other, stage=stage, rank=rank, world=WORLD, steps=range(2, 4))
    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=range(2, 4))
    training.assert_same_bits(training.copies(other), training.copies(params))
    return training.copies(other)


@STAGES
def test_load_before_first_step(stage: int) -> None:
    oracle = training.oracle_of_ranks(WORLD, range(4), lr=0.02)
    for weights in run_ranks(WORLD, resume_after_loading, stage, 0):
        training.assert_follows(weights, oracle)


@STAGES
def test_load_after_steps(stage: int) -> None:
    oracle = training.oracle_of_ranks(WORLD, range(4), lr=0.02)
    for weights in run_ranks(WORLD, resume_after_loading, stage, 3):
        training.assert_follows(weights, oracle)


def sharded_elements(rank: int) -> tuple[int, int]:
    """(elements whose moments this rank stores, all elements), with two "nodes" of two ranks in the environment."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "2", str(rank % 2)
    params = training.parameters({"a": (4096,), "b": (4096,)})
    opt = ShardedLamb(params.items())
    return opt.memory()["moments"] // 8, 8192


def test_shards_span_all_ranks_not_one_node() -> None:
    assert run_ranks(4, sharded_elements) == [(2048, 8192)] * 4


# -- apex FusedLAMB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_max_grad_norm_zero_is_rejected(cls: type[Lamb] | type[ShardedLamb]) -> None:
    params = training.parameters()
    with pytest.raises(ValueError, match=r"max_grad_norm must be a number > 0, or None.*got 0"):
        cls(params.items(), max_grad_norm=0)
    opt = cls(params.items())
    if isinstance(opt, ShardedLamb):
        with pytest.raises(ValueError, match=r"max_norm must be a number > 0"):
            opt.clip_grad_norm_(0)


# -- DeepSpeed, ColossalAI -----------------------------------------------------------------------------------


@STAGES
def test_one_ratio_per_parameter_not_per_partition(stage: int) -> None:
    for _, ratios in run_ranks(2, training.run, 2, stage, {"lr": 0.01}):
        assert len({round(ratio, 6) for ratio in ratios.values()} - {1.0}) >= 5


@STAGES
def test_bias_correction_inside_the_ratio(stage: int) -> None:
    """DeepSpeed and ColossalAI correct lr instead, which gives other weights."""
    inside = compare(stage, {"lr": 0.02, "bias_correction": True, "weight_decay": 0.3})
    none = compare(stage, {"lr": 0.02, "bias_correction": False, "weight_decay": 0.3})
    on_lr = compare(stage, {"lr": 0.02, "bias_correction": "lr", "weight_decay": 0.3})
    name = "fc.weight"
    assert not np.allclose(inside.params[name], on_lr.params[name], rtol=1e-3)
    assert not np.allclose(none.params[name], on_lr.params[name], rtol=1e-3)


@STAGES
def test_bf16_and_cpu(stage: int) -> None:
    dtypes = dict.fromkeys(training.SHAPES, torch.bfloat16)
    start = {name: value.bfloat16() for name, value in training.weights().items()}
    draw = Rounded(dtypes)
    oracle = training.oracle_of_ranks(2, range(4), draw, start, lr=0.05)
    for weights, _ in run_ranks(2, training.run, 2, stage, {"lr": 0.05}, dtypes, draw):
        assert {w.device.type for w in weights.values()} == {"cpu"}
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}
        training.assert_follows(weights, oracle, 2**-8)
        assert not torch.equal(weights["fc.weight"], start["fc.weight"])


def small_collectives(rank: int, stage: int, count: int) -> int:
    shapes = {f"p{i}": (5,) for i in range(count)}
    params = training.parameters(shapes)
    opt = ShardedLamb(params.items(), stage=stage)
    training.give(params, training.own_gradients(0, 0, shapes))
    opt.step()
    return opt.traffic.calls["all_reduce_small"]


@STAGES
def test_small_all_reduces_do_not_grow_with_parameters(stage: int) -> None:
    for count in (1, 60):
        assert run_ranks(2, small_collectives, stage, count) == [2, 2]


# -- ZeroRedundancyOptimizer + timm --------------------------------------------------------------------------


def construct_inside_zero(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"gives each rank whole parameters of its own.*or pass optimizer_class=Lamb"
    ):
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ShardedLamb, lr=0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return [p.detach() for p in model.parameters()]


def test_zero_redundancy_optimizer_shards_by_itself() -> None:
    """Each of its ranks passes other parameters: those of equal shapes would be overwritten."""
    first, second = run_ranks(2, construct_inside_zero)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@STAGES
@pytest.mark.parametrize("by_call", [False, True])
def test_clip_is_global_over_ranks(stage: int, by_call: bool) -> None:
    oracle = training.oracle_of_ranks(WORLD, range(4), lr=0.02, max_grad_norm=0.3, weight_decay=0.2)
    results = run_ranks(WORLD, train_clipped, stage, by_call)
    for weights, norm in results:
        training.assert_follows(weights, oracle)
        assert norm == pytest.approx(oracle.grad_norm, rel=1e-6)
    assert len({norm for _, norm in results}) == 1


def train_clipped(rank: int, stage: int, by_call: bool) -> tuple[dict[str, Tensor], float]:
    params = training.parameters()
    options = {"lr": 0.02, "weight_decay": 0.2, "max_grad_norm": None if by_call else 0.3}
    opt = ShardedLamb(params.items(), stage=stage, **options)
    for step in range(4):
        if stage == 1:
            training.give(params, training.average(training.own_gradients(r, step) for r in range(WORLD)))
        else:
            training.backward(params, training.own_gradients(rank, step))
        if by_call:
            returned = opt.clip_grad_norm_(0.3).item()
        opt.step()
        assert opt.grad_norm is not None
        assert not by_call or returned == opt.grad_norm
        opt.zero_grad()
    return training.copies(params), opt.grad_norm


@pytest.mark.parametrize("world", [2, 3])
def test_state_is_sharded_evenly_inside_tensors(world: int) -> None:
    results = run_ranks(world, even_bytes)
    assert len(set(results)) == 1
    assert results[0] <= 8 * (100_000 // world + 256)


def even_bytes(rank: int) -> int:
    params = training.parameters({"one": (100_000 - 256,), "other": (1,)})
    return ShardedLamb(params.items()).memory()["moments"]


# -- bitsandbytes --------------------------------------------------------------------------------------------


def train_from_zero(rank: int, stage: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    params = training.parameters()
    with torch.no_grad():
        params["norm.bias"].zero_()
        params["embed.weight"].mul_(100)
    opt = ShardedLamb(params.items(), lr=0.01, stage=stage)
    training.train(opt, params, stage=stage, rank=rank, world=2, steps=[0])
    return training.copies(params), opt.trust_ratios()


@STAGES
def test_zero_initialised_tensors_are_updated(stage: int) -> None:
    for weights, ratios in run_ranks(2, train_from_zero, stage):
        assert ratios["norm.bias"] == 1.0
        assert (weights["norm.bias"].abs() > 0.009).all()  # Adam's first step: lr in every element


@STAGES
def test_ratios_above_one_scale_updates_up(stage: int) -> None:
    """The ratio equals ‖w‖/‖u‖ above 1 as well; it does not only bound ‖u‖."""
    for _, ratios in run_ranks(2, train_from_zero, stage):
        assert 40 < ratios["embed.weight"] < 120


# -- timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_groups_max_grad_norm_is_rejected_not_ignored(cls: type[Lamb] | type[ShardedLamb]) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 in a parameter group.*pass max_grad_norm to"):
        cls([{"params": [p], "max_grad_norm": 0.5}])


def step_and_compare_gradients(rank: int, stage: int) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage, max_grad_norm=0.01)
    given = training.own_gradients(0, 0)
    expected = {name: g.clone() for name, g in given.items() if g is not None}
    for name, p in params.items():
        p.grad = given[name]
    opt.step()
    for name, p in params.items():
        g = given[name]
        assert g is not None
        assert torch.equal(g, expected[name])
        if stage == 1:
            assert p.grad is g


@STAGES
def test_gradients_are_not_clipped_in_place(stage: int) -> None:
    run_ranks(2, step_and_compare_gradients, stage)


def step_without_gradients(rank: int, stage: int) -> dict[str, Tensor]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage, max_grad_norm=1.0)
    opt.step()
    opt.zero_grad()
    opt.step()
    assert opt.trust_ratios() == {}
    assert opt.skipped_steps == 0
    opt.zero_grad()
    training.train(opt, params, stage=stage, rank=rank, world=2, steps=[0])
    return training.copies(params)


@STAGES
def test_step_without_any_gradient(stage: int) -> None:
    oracle = training.oracle_of_ranks(2, [0], max_grad_norm=1.0)
    for weights in run_ranks(2, step_without_gradients, stage):
        training.assert_follows(weights, oracle)


def test_lamb_step_without_any_gradient() -> None:
    params = training.parameters()
    Lamb(params.items(), max_grad_norm=1.0).step()
    training.assert_same_bits(training.copies(params), training.weights())
