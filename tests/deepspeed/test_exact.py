"""DeepSpeed's engine at every stage against an unsharded float64 LAMB."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.deepspeed import cases
from tests.harness import run_ranks
from tests.oracle import variant_options

STAGES = [0, 1, 2, 3]


def train(rank: int, config: dict[str, Any], oracle: dict[str, Any] | None = None) -> dict[str, Any]:
    engine = cases.start(config)
    before = cases.masters(engine)
    reference = cases.oracle_of(before, **(oracle or {}))
    # Before 0.18, DeepSpeed scales the loss in bf16 without ZeRO; its optimizer divides by it.
    scale = 1 / getattr(engine.optimizer, "cur_scale", 1.0)
    ratios = cases.follow(engine, rank, reference, scale=lambda grads: scale)
    after = cases.masters(engine)
    optimizer = engine.basic_optimizer
    outcome = {
        "worst": cases.worst(after, reference),
        "moved": min(float((after[name] - before[name]).norm()) for name in before),
        "ratios": ratios[-1],
        "coefficients": optimizer.get_lamb_coeffs(),
        "expected": reference.ratios,
        "calls": dict(optimizer.traffic.calls),
        "wrapper": type(engine.optimizer).__name__,
    }
    cases.stop(engine)
    return outcome


def assert_exact(results: list[dict[str, Any]]) -> None:
    for outcome in results:
        assert outcome["worst"] <= cases.FP32_TOLERANCE
        assert outcome["moved"] > 1e-3
        assert outcome["ratios"] == pytest.approx(outcome["expected"], rel=1e-5)
        assert outcome["coefficients"] == list(outcome["ratios"].values())
        assert outcome["ratios"] == results[0]["ratios"]  # the same bits on every rank


# All pairs of stage, dtype and world size.
@pytest.mark.parametrize(
    ("stage", "dtype", "world"),
    [
        (stage, dtype, 2 + (stage + half) % 2)
        for stage in STAGES
        for half, dtype in enumerate(("fp32", "bf16"))
    ],
)
def test_every_stage_follows_the_oracle(stage: int, dtype: str, world: int) -> None:
    results = run_ranks(world, train, cases.config(stage, dtype), timeout=300)
    assert_exact(results)
    # One proves the mapping; then one for norms and one for the gradient summary per step.
    calls = {"all_reduce_small": 1 + 2 * 4} if stage else {}
    assert [outcome["calls"] for outcome in results] == [calls] * world
    assert min(results[0]["expected"].values()) < 0.8 * max(results[0]["expected"].values())


@pytest.mark.parametrize("stage", STAGES)
def test_caution(stage: int) -> None:
    config = cases.config(stage, "fp32", params={**cases.LAMB, "caution": True})
    results = run_ranks(2, train, config, {"caution": True}, timeout=300)
    assert_exact(results)
    assert results[0]["calls"] == ({"all_reduce_small": 1 + 2 * 4} if stage else {})


@pytest.mark.parametrize(("stage", "dtype"), [(2, "bf16"), (3, "fp32")])
def test_four_ranks(stage: int, dtype: str) -> None:
    assert_exact(run_ranks(4, train, cases.config(stage, dtype), timeout=300))


def test_one_rank() -> None:
    assert_exact(run_ranks(1, train, cases.config(2, "bf16"), timeout=300))


def test_bf16_with_gradients_accumulated_in_fp32() -> None:
    """ZeRO 1 is then DeepSpeed's BF16_Optimizer, which steps all groups in one call."""
    config = cases.config(1, "bf16", data_types={"grad_accum_dtype": "fp32"})
    results = run_ranks(2, train, config, timeout=300)
    if cases.release() >= Version("0.18"):  # before, it takes this for training without ZeRO
        assert results[0]["wrapper"] == "BF16_Optimizer"
    assert_exact(results)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_skipping_a_step_makes_one_small_collective(stage: int) -> None:
    config = cases.config(stage, params={**cases.LAMB, "skip_nonfinite": False})
    results = run_ranks(2, train, config, timeout=300)
    assert_exact(results)
    assert results[0]["calls"] == {"all_reduce_small": 1 + 4}


@pytest.mark.parametrize("stage", STAGES)
def test_the_variant_of_deepspeed_itself(stage: int) -> None:
    """DeepSpeed's bias correction and clamp, on exact ratios, with its defaults of eps and decay."""
    facts = variant_options("deepspeed", {}, set())
    params = {"lr": 0.05, "variant": "deepspeed", "max_coeff": 0.5, "min_coeff": 0.2, "bias_correction": True}
    oracle = {
        **facts,
        "lr": 0.05,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "trust_clip": (0.2, 0.5),
    }
    for name in ("no_decay", "no_adapt"):
        oracle.pop(name, None)
    results = run_ranks(2, train, cases.config(stage, params=params), oracle, timeout=300)
    assert_exact(results)
    assert {0.2, 0.5} & set(results[0]["expected"].values())


def known(rank: int, world: int, config: dict[str, Any]) -> dict[str, Any]:
    engine = cases.start(config, cases.Known())
    start = {name: p.detach().double() for name, p in cases.Known().named_parameters()}
    reference = cases.oracle_of(start)
    for step in range(3):
        engine.backward(engine(rank, step))
        engine.step()
        reference.step(cases.known_averages(world, step))
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(engine.module.parameters())):
        weights = {name: p.detach().double().clone() for name, p in engine.module.named_parameters()}
    ratios = engine.basic_optimizer.trust_ratios()
    cases.stop(engine)
    return {"worst": cases.worst(weights, reference), "ratios": ratios, "expected": reference.ratios}


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (1, {"round_robin_gradients": True}),
        (2, {"round_robin_gradients": True}),
        (2, {"round_robin_gradients": True, "parameter_alignment": True}),
        (1, {"parameter_alignment": True}),
        (3, {"stage3_param_persistence_threshold": 0}),
        (3, {"stage3_param_persistence_threshold": 1000, "sub_group_size": 500}),
        (2, {"overlap_comm": True, "reduce_bucket_size": 1000}),
    ],
)
def test_gradients_known_without_deepspeed(stage: int, zero: dict[str, Any]) -> None:
    """Weights are read from the model, independently of DeepSpeed's mapping of its partitions."""
    if "parameter_alignment" in zero and cases.release() < Version("0.19"):
        pytest.skip("DeepSpeed before 0.19 has no parameter_alignment")
    for outcome in run_ranks(3, known, 3, cases.config(stage, zero=zero), timeout=300):
        assert outcome["worst"] <= cases.FP32_TOLERANCE
        assert outcome["ratios"] == pytest.approx(outcome["expected"], rel=1e-5)


def naive(rank: int, config: dict[str, Any]) -> dict[str, float]:
    """timm's Lamb inside ZeRO: the length of its first step relative to the exact one."""
    from tests.timm_peer import load_timm_lamb

    del config["optimizer"]
    model = cases.tiny()
    peer = load_timm_lamb()(model.parameters(), lr=0.02, max_grad_norm=None, weight_decay=0.1)
    engine = cases.start({**config, "zero_allow_untested_optimizer": True}, model, optimizer=peer)
    before = cases.masters(engine)
    reference = cases.oracle_of(before, betas=(0.9, 0.999))
    engine.backward(engine(cases.tokens(rank, 0)))
    reference.step(cases.gradients(engine))
    engine.step()
    after = cases.masters(engine)
    expected = {name: torch.from_numpy(value) for name, value in reference.params.items()}
    lengths = {
        name: float((after[name] - before[name]).norm() / (expected[name] - before[name]).norm())
        for name in ("embed.weight", "fc.weight", "out.weight", "head.bias")
    }
    cases.stop(engine)
    return lengths


@pytest.mark.parametrize("stage", [2, 3])
def test_a_naive_lamb_fails_this_check(stage: int) -> None:
    """A peer's LAMB under the same engine makes different steps.

    Under ZeRO-3 even nan: its norm includes the end of a partition, which is uninitialized memory.
    """
    lengths, *_ = run_ranks(2, naive, cases.config(stage), timeout=300)
    assert not all(abs(share - 1) <= 0.1 for share in lengths.values())


def first_step_with(rank: int, stage: int, fault: str) -> str:
    """The error of a first step with a corrupted mapping."""
    from sharded_lamb.deepspeed import optimizer as module

    engine = cases.start(cases.config(stage))
    true = module.find_partitions

    def corrupted(*arguments: Any) -> Any:
        partitions = true(*arguments)
        (partition, *rest) = partitions.local
        segments = list(partition.segments)
        if fault == "dropped" and rank == 0:
            segments.pop()
        if fault == "shifted":
            segments = [replace(s, shard_start=max(s.shard_start - 1, 0)) for s in segments]
        partition = replace(partition, segments=tuple(segments))
        return replace(partitions, local=(partition, *rest))

    module.find_partitions = corrupted
    try:
        engine.backward(engine(cases.tokens(rank, 0)))
        engine.step()
    except ValueError as error:
        return str(error)
    finally:
        module.find_partitions = true
    return "stepped"


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("fault", "fragment"), [("dropped", "the ranks hold"), ("shifted", "differ between the model")]
)
def test_a_wrong_mapping_raises_on_every_rank(stage: int, fault: str, fragment: str) -> None:
    for message in run_ranks(2, first_step_with, stage, fault, timeout=300):
        assert fragment in message


def test_the_tolerance_can_fail() -> None:
    """It detects a ratio that is off by 1e-4."""
    start = {"w": torch.ones(10, dtype=torch.float64)}
    one, other = cases.oracle_of(start), cases.oracle_of(start, lr=0.02 * (1 + 1e-3))
    for oracle in (one, other):
        oracle.step({"w": torch.arange(10.0).double().numpy()})
    assert cases.worst({"w": torch.from_numpy(other.params["w"])}, one) > cases.FP32_TOLERANCE
