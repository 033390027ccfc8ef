"""DeepSpeed's clipping, skipping, offload, schedules and accumulation around a step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

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
    outcome = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return outcome, max(factors)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
)
def test_clipping_is_deepspeeds(stage: int, dtype: str) -> None:
    """With decay, clipping changes the direction of updates: the oracle detects a missing factor."""
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
    ratios = cases.follow(engine, rank, reference, steps=steps)
    outcome = {
        "worst": cases.worst(cases.masters(engine), reference),
        "ratios": ratios[-1],
        "expected": reference.ratios,
        "calls": dict(engine.basic_optimizer.traffic.calls),
    }
    cases.stop(engine)
    return outcome


def assert_exact(results: list[dict[str, Any]]) -> None:
    for outcome in results:
        assert outcome["worst"] <= cases.FP32_TOLERANCE
        assert outcome["ratios"] == pytest.approx(outcome["expected"], rel=1e-5)


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
    """Three groups: defaults; no decay and another learning rate; other betas."""
    overrides = {"overrides": cases.GROUP_OVERRIDES}
    assert_exact(
        run_ranks(3, followed, cases.config(stage, dtype), groups=True, oracle=overrides, timeout=300)
    )


def test_groups_in_subgroups() -> None:
    """ZeRO-3 divides groups into subgroups and steps each separately: two small collectives per subgroup."""
    config = cases.config(3, "bf16", zero={"sub_group_size": 100})
    overrides = {"overrides": cases.GROUP_OVERRIDES}
    results = run_ranks(2, followed, config, groups=True, oracle=overrides, timeout=300)
    assert_exact(results)
    assert results[0]["calls"]["all_reduce_small"] > 1 + 2 * 4 * 3


@pytest.mark.parametrize("stage", STAGES)
def test_patterns_match_names_that_deepspeed_does_not_pass(stage: int) -> None:
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
    """fp16: one backward overflows on one rank, the next three do not."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch supports it on any CPU, slowly
    scale = 128.0
    engine = cases.start(cases.config(stage, "fp16", fp16={"loss_scale": scale}))
    before = cases.masters(engine)
    oracle = cases.oracle_of(before)
    engine.backward(engine(cases.tokens(rank, 0)) * (1e9 if rank == 1 else 1.0))
    engine.step()
    after = cases.masters(engine)
    cases.follow(engine, rank, oracle, steps=3, scale=lambda grads: 1 / scale)
    outcome = {
        "still": all(torch.equal(after[name], before[name]) for name in before),
        "skipped": engine.skipped_steps,
        "worst": cases.worst(cases.masters(engine), oracle),
    }
    cases.stop(engine)
    return outcome


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_changes_nothing(stage: int) -> None:
    """Nor the step count: the following steps are the oracle's first."""
    for outcome in run_ranks(2, overflown, stage, timeout=300):
        assert outcome["still"]
        assert outcome["skipped"] == 1
        assert outcome["worst"] <= cases.FP32_TOLERANCE


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
    outcome = {
        "still": all(torch.equal(after[name], before[name]) for name in before),
        "skipped": optimizer.skipped_steps,
        "ratios": optimizer.trust_ratios(),
    }
    optimizer.load_full_state_dict(optimizer.full_state_dict())
    outcome["skipped after loading"] = optimizer.skipped_steps
    optimizer.skipped_steps = 5
    outcome["skipped as set"] = optimizer.skipped_steps
    cases.stop(engine)
    return outcome


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "bf16")])
def test_a_nan_on_one_rank_changes_nothing_on_any(stage: int, dtype: str) -> None:
    """Where DeepSpeed itself would not skip: bf16 without check_grad_overflow, and fp32 without ZeRO."""
    for outcome in run_ranks(2, poisoned, stage, dtype, 1, timeout=300):
        assert outcome["still"]
        assert [outcome[f"skipped{when}"] for when in ("", " after loading", " as set")] == [1, 1, 5]
        assert outcome["ratios"] == {}


def test_too_many_skips_are_an_error_on_every_rank() -> None:
    for kind, message in run_ranks_expecting_errors(2, poisoned, 2, "bf16", 3, timeout=300).values():
        assert kind == "DivergedError"
        assert "2 steps in a row" in message


class Unused(nn.Module):
    """Two parameters that the loss does not depend on: in step 1, or in any step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.never = nn.Linear(9, 5), nn.Linear(7, 3)
        self.late = nn.Parameter(torch.randn(11, 2))

    def forward(self, step: int) -> torch.Tensor:
        loss: torch.Tensor = self.used(torch.ones(2, 9, dtype=self.late.dtype)).square().mean()
        return loss + self.late.square().mean() if step else loss


def without_gradients(rank: int, stage: int, dtype: str) -> dict[str, Any]:
    engine = cases.start(cases.config(stage, dtype), Unused())
    before = cases.masters(engine)
    steps = []
    for step in range(2):
        engine.backward(engine(step))
        engine.step()
        after = cases.masters(engine)
        steps.append({name: bool((after[name] != before[name]).any()) for name in after})
    ratios = engine.basic_optimizer.trust_ratios()
    cases.stop(engine)
    return {"steps": steps, "ratios": set(ratios)}


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")]
)
def test_a_parameter_without_a_gradient_is_unchanged(stage: int, dtype: str) -> None:
    """DeepSpeed passes zeros for it, with which decay alone would make a step of length η |w|."""
    used = {"used.weight", "used.bias"}
    for outcome in run_ranks(2, without_gradients, stage, dtype, timeout=300):
        first, second = ({name for name, moved in step.items() if moved} for step in outcome["steps"])
        assert first == used
        assert second == {*used, "late"}
        assert outcome["ratios"] == {*used, "late"}


class Layouts(nn.Module):
    """A convolution, whose memory format may change, and a parameter that may be a view."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3)
        self.odd = nn.Parameter(torch.randn(8, 3)[:, :2] if view else torch.randn(8, 2))

    def forward(self, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return (
            self.conv(torch.randn(1, 2, 5, 5)).square().mean()
            + (self.odd.sum(0) * torch.randn(2)).square().sum()
        )


def laid_out(rank: int, dtype: str, view: bool, converts: bool) -> float:
    model = Layouts(view)
    engine = cases.start(cases.config(0, dtype), model.bfloat16() if dtype == "bf16" else model)
    oracle = cases.oracle_of(cases.masters(engine))
    for step in range(4):
        if converts and step == 2:
            engine.module.to(memory_format=torch.channels_last)
        loss = engine(step)
        engine.backward(loss)
        oracle.step(cases.gradients(engine))
        engine.step()
    full = engine.basic_optimizer.full_state_dict()
    worst = cases.worst(cases.masters(engine), oracle)
    if full is not None:
        for place, (name, _, _) in enumerate(engine.basic_optimizer._rows):
            gap = np.abs(full["state"][place]["exp_avg"].numpy() - oracle.m[name]).max()
            worst = max(worst, float(gap / np.abs(oracle.m[name]).max()))
    cases.stop(engine)
    return worst


@pytest.mark.parametrize("converts", [False, True])
def test_memory_formats_without_zero(converts: bool) -> None:
    assert max(run_ranks(2, laid_out, "fp32", False, converts, timeout=300)) <= cases.FP32_TOLERANCE


def test_a_parameter_with_gaps_in_memory_raises() -> None:
    for kind, message in run_ranks_expecting_errors(2, laid_out, "fp32", True, False, timeout=300).values():
        assert kind == "ValueError"
        assert "'odd'" in message
        assert "contiguous" in message


def diverged(rank: int) -> None:
    engine = cases.start(cases.config(0))
    with torch.no_grad():
        engine.module.out.weight[0, 0] += rank
    engine.backward(engine(cases.tokens(rank, 0)))
    engine.step()


def test_copies_that_differ_between_ranks_raise() -> None:
    """Slices of tensor parallelism differ so; without ZeRO nothing else distinguishes them from full parameters."""
    for kind, message in run_ranks_expecting_errors(2, diverged, timeout=300).values():
        assert kind == "ValueError"
        assert "'out.weight' is not the same on all 2 ranks" in message


def one_after_another(rank: int, stages: list[int]) -> list[float]:
    """Successive engines on one model, whose parameters keep attributes of earlier engines."""
    model, outcome = cases.tiny(), []
    for stage in stages:
        engine = cases.start(cases.config(stage), model)
        oracle = cases.oracle_of(cases.masters(engine))
        cases.follow(engine, rank, oracle, steps=2)
        outcome.append(cases.worst(cases.masters(engine), oracle))
        cases.stop(engine)
    return outcome


@pytest.mark.parametrize("stages", [[2, 0, 1], [1, 2]])
def test_successive_engines_on_one_model(stages: list[int]) -> None:
    for outcome in run_ranks(2, one_after_another, stages, timeout=300):
        assert max(outcome) <= cases.FP32_TOLERANCE


def zero_at_first(rank: int, stage: int, dtype: str) -> float:
    """The first real step has zero gradients and must not be mistaken for DeepSpeed's probe."""
    engine = cases.start(cases.config(stage, dtype))
    oracle = cases.oracle_of(cases.masters(engine))
    engine.backward(engine(cases.tokens(rank, 0)) * 0)
    engine.step()
    cases.follow(engine, rank, oracle, steps=2)
    worst = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return worst


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (2, "bf16")])
def test_a_first_step_of_zeros_counts_as_no_gradient(stage: int, dtype: str) -> None:
    assert max(run_ranks(2, zero_at_first, stage, dtype, timeout=300)) <= cases.FP32_TOLERANCE


def moved_away(rank: int) -> float:
    """DeepSpeed may move its buffers between steps: addresses of the first step become invalid."""
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
def test_model_weights_that_differ_from_deepspeeds_copies_raise(stage: int) -> None:
    for kind, message in run_ranks_expecting_errors(2, overwritten, stage, False, timeout=300).values():
        assert kind == "ValueError"
        assert "'fc.weight'" in message
        assert "refresh_fp32_params" in message


def test_refreshed_masters_are_used() -> None:
    run_ranks(2, overwritten, 1, True, timeout=300)


def disagreeing(rank: int, stage: int) -> None:
    engine = cases.start(cases.config(stage, params={**cases.LAMB, "lr": 0.01 * (1 + rank)}))
    engine.backward(engine(cases.tokens(rank, 0)))
    engine.step()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_that_disagree_raise_at_the_first_step(stage: int) -> None:
    for kind, message in run_ranks_expecting_errors(2, disagreeing, stage, timeout=300).values():
        assert kind == "ValueError"
        assert "options of group 0" in message
        assert "'0.02'" in message
