"""What DeepSpeed does around a step (clips, skips, offloads, schedules, accumulates) and what it must find there."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.deepspeed import cases
from tests.harness import run_ranks, run_ranks_expecting_errors

STAGES = [0, 1, 2, 3]
CPU = {"device": "cpu"}


def clip_factor(grads: dict[str, np.ndarray], limit: float) -> float:
    """DeepSpeed's formula, its epsilon included."""
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
    return min(1.0, limit / (norm + 1e-6))


def clipped(rank: int, config: dict[str, Any]) -> tuple[float, float]:
    engine = cases.start(config)
    oracle = cases.oracle_of(cases.masters(engine))
    factors = []

    def factor(grads: dict[str, np.ndarray]) -> float:
        factors.append(clip_factor(grads, 0.5))
        return factors[-1]

    cases.follow(engine, rank, oracle, scale=factor)
    found = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return found, max(factors)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
)
def test_clipping_is_deepspeeds(stage: int, dtype: str) -> None:
    """A sum of squares of decay and clipped gradients is no multiple of the unclipped one: the oracle sees it."""
    for worst, factor in run_ranks(
        2, clipped, cases.config(stage, dtype, gradient_clipping=0.5), timeout=300
    ):
        assert factor < 1
        assert worst <= 1e-5  # DeepSpeed's norm is fp32


def followed(
    rank: int,
    config: dict[str, Any],
    groups: bool = False,
    oracle: dict[str, Any] | None = None,
    steps: int = 4,
) -> dict[str, Any]:
    model = cases.tiny()
    keywords = {"model_parameters": cases.groups_of(model)} if groups else {}
    engine = cases.start(config, model, **keywords)
    reference = cases.oracle_of(cases.masters(engine), **(oracle or {}))
    said = cases.follow(engine, rank, reference, steps=steps)
    found = {
        "worst": cases.worst(cases.masters(engine), reference),
        "ratios": said[-1],
        "expected": reference.ratios,
        "calls": dict(engine.basic_optimizer.traffic.calls),
    }
    cases.stop(engine)
    return found


def assert_exact(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["worst"] <= cases.FP32_TOLERANCE
        assert found["ratios"] == pytest.approx(found["expected"], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "dtype", "zero"),
    [
        (1, "bf16", {"offload_optimizer": CPU}),
        (2, "fp32", {"offload_optimizer": CPU}),
        (3, "bf16", {"offload_optimizer": CPU}),
        (3, "fp32", {"offload_optimizer": CPU, "offload_param": CPU}),
        (3, "bf16", {"offload_param": CPU, "stage3_param_persistence_threshold": 0}),
    ],
)
def test_offload_to_the_cpu(stage: int, dtype: str, zero: dict[str, Any]) -> None:
    assert_exact(run_ranks(2, followed, cases.config(stage, dtype, zero=zero), timeout=300))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_groups_keep_their_options(stage: int, dtype: str) -> None:
    """Three groups: defaults; no decay and another rate; other betas."""
    overrides = {"overrides": cases.GROUP_OVERRIDES}
    assert_exact(
        run_ranks(3, followed, cases.config(stage, dtype), groups=True, oracle=overrides, timeout=300)
    )


def test_groups_in_subgroups() -> None:
    """ZeRO-3 cuts groups into subgroups and steps each by itself: two small collectives a subgroup."""
    config = cases.config(3, "bf16", zero={"sub_group_size": 100})
    overrides = {"overrides": cases.GROUP_OVERRIDES}
    results = run_ranks(2, followed, config, groups=True, oracle=overrides, timeout=300)
    assert_exact(results)
    assert results[0]["calls"]["all_reduce_small"] > 1 + 2 * 4 * 3


@pytest.mark.parametrize("stage", STAGES)
def test_patterns_find_names_that_deepspeed_does_not_pass(stage: int) -> None:
    params = {
        **cases.LAMB,
        "exclude_from_weight_decay": ["bias$", "norm"],
        "exclude_from_layer_adaptation": ["^scale$"],
    }
    names = {"norm.weight", "norm.bias", "fc.bias", "head.bias"}
    oracle = {"no_decay": names, "no_adapt": {"scale"}}
    results = run_ranks(2, followed, cases.config(stage, params=params), oracle=oracle, timeout=300)
    assert_exact(results)
    assert results[0]["ratios"]["scale"] == 1.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation(stage: int) -> None:
    config = cases.config(stage, gradient_accumulation_steps=2)
    results = run_ranks(2, followed, config, steps=6, timeout=300)
    assert_exact(results)


def scheduled(rank: int, stage: int) -> tuple[float, list[float]]:
    scheduler = {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.05, "warmup_num_steps": 3},
    }
    engine = cases.start(cases.config(stage, scheduler=scheduler))
    oracle, rates = cases.oracle_of(cases.masters(engine)), []
    for step in range(4):
        (rate,) = engine.get_lr()
        rates.append(rate)
        for options in oracle.options.values():
            options["lr"] = rate
        cases.follow(engine, rank, oracle, steps=1, first=step)
    worst = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return worst, rates


@pytest.mark.parametrize("stage", STAGES)
def test_a_scheduler_from_the_config(stage: int) -> None:
    worst, rates = run_ranks(2, scheduled, stage, timeout=300)[0]
    assert worst <= cases.FP32_TOLERANCE
    assert len(set(rates)) > 2


def overflown(rank: int, stage: int) -> dict[str, Any]:
    """fp16: a backward that overflows on one rank, then three that do not."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU, if slowly
    scale = 128.0
    engine = cases.start(cases.config(stage, "fp16", fp16={"loss_scale": scale}))
    before = cases.masters(engine)
    oracle = cases.oracle_of(before)
    engine.backward(engine(cases.tokens(rank, 0)) * (1e9 if rank == 1 else 1.0))
    engine.step()
    after = cases.masters(engine)
    cases.follow(engine, rank, oracle, steps=3, scale=lambda grads: 1 / scale)
    found = {
        "still": all(torch.equal(after[name], before[name]) for name in before),
        "skipped": engine.skipped_steps,
        "worst": cases.worst(cases.masters(engine), oracle),
    }
    cases.stop(engine)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_moves_nothing(stage: int) -> None:
    """Not the step count either: the steps after it are the oracle's first ones."""
    for found in run_ranks(2, overflown, stage, timeout=300):
        assert found["still"]
        assert found["skipped"] == 1
        assert found["worst"] <= cases.FP32_TOLERANCE


def poisoned(rank: int, stage: int, dtype: str, bad_steps: int) -> dict[str, Any]:
    params = {**cases.LAMB, "max_consecutive_skips": 2}
    config = cases.config(stage, dtype, params=params)
    if dtype == "bf16":
        config["bf16"]["check_grad_overflow"] = False
    engine = cases.start(config)
    cases.follow(engine, rank, cases.oracle_of(cases.masters(engine)), steps=1)
    before = cases.masters(engine)
    for step in range(bad_steps):
        loss = engine(cases.tokens(rank, 1 + step))
        engine.backward(loss * (float("nan") if rank == 1 else 1.0))
        engine.step()
    after = cases.masters(engine)
    optimizer = engine.basic_optimizer
    found = {
        "still": all(torch.equal(after[name], before[name]) for name in before),
        "skipped": optimizer.skipped_steps,
        "ratios": optimizer.trust_ratios(),
    }
    cases.stop(engine)
    return found


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "bf16")])
def test_a_nan_on_one_rank_moves_nothing_on_any(stage: int, dtype: str) -> None:
    """Where DeepSpeed itself would go on: bf16 without check_grad_overflow, and fp32 without ZeRO."""
    for found in run_ranks(2, poisoned, stage, dtype, 1, timeout=300):
        assert found["still"]
        assert found["skipped"] == 1
        assert found["ratios"] == {}


def test_too_many_skips_are_an_error_on_every_rank() -> None:
    for kind, message in run_ranks_expecting_errors(2, poisoned, 2, "bf16", 3, timeout=300).values():
        assert kind == "RuntimeError"
        assert "2 steps in a row" in message


def moved_away(rank: int) -> float:
    """DeepSpeed may move its buffers between steps: memory that was there at the first step is not there later."""
    engine = cases.start(cases.config(2, "bf16"))
    oracle = cases.oracle_of(cases.masters(engine))
    cases.follow(engine, rank, oracle, steps=2)
    zero = engine.optimizer
    for partition in zero.single_partition_of_fp32_groups:
        partition.data = partition.data.clone()
        state = zero.optimizer.state[partition]
        state["exp_avg"].data = state["exp_avg"].data.clone()
    zero._link_all_hp_params()
    cases.follow(engine, rank, oracle, steps=2, first=2)
    worst = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return worst


def test_buffers_that_move_between_steps() -> None:
    assert max(run_ranks(2, moved_away, timeout=300)) <= cases.FP32_TOLERANCE


def overwritten(rank: int, stage: int, refresh: bool) -> None:
    engine = cases.start(cases.config(stage, "bf16"))
    with torch.no_grad():
        engine.module.fc.weight.mul_(2)
    if refresh:
        engine.optimizer.refresh_fp32_params()
    engine.backward(engine(cases.tokens(rank, 0)))
    engine.step()
    cases.stop(engine)


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_written_behind_deepspeeds_back(stage: int) -> None:
    for kind, message in run_ranks_expecting_errors(2, overwritten, stage, False, timeout=300).values():
        assert kind == "ValueError"
        assert "'fc.weight'" in message
        assert "refresh_fp32_params" in message


def test_refreshed_masters_are_taken() -> None:
    run_ranks(2, overwritten, 1, True, timeout=300)


def disagreeing(rank: int, stage: int) -> None:
    engine = cases.start(cases.config(stage, params={**cases.LAMB, "lr": 0.01 * (1 + rank)}))
    engine.backward(engine(cases.tokens(rank, 0)))
    engine.step()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_that_disagree_are_told_at_the_first_step(stage: int) -> None:
    for kind, message in run_ranks_expecting_errors(2, disagreeing, stage, timeout=300).values():
        assert kind == "ValueError"
        assert "options of group 0" in message
        assert "'0.02'" in message
