"""Ratio blocks in a ds_config: partitions, cut at any element, follow an oracle for which a block is a parameter."""

from typing import Any

import pytest

from tests.deepspeed import cases
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.oracle import split_blocks

RATIO_BLOCKS: dict[str, Any] = {"out.weight": 3, "norm": 2, "embed": "dim0"}
BLOCKS = {"out.weight": 3, "norm.weight": 2, "norm.bias": 2, "embed.weight": 53}


def train(rank: int, stage: int, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    params = {**cases.LAMB, **options, "ratio_blocks": RATIO_BLOCKS}
    engine = cases.start(cases.config(stage, dtype, params=params))
    reference = cases.oracle_of(cases.masters(engine), blocks=BLOCKS, **options)
    ratios = cases.follow(engine, rank, reference, steps=3)
    optimizer = engine.basic_optimizer
    outcome = {
        "worst": cases.worst(split_blocks(cases.masters(engine), BLOCKS), reference),
        "ratios": ratios[-1],
        "coefficients": optimizer.get_lamb_coeffs(),
        "expected": reference.ratios,
        "calls": optimizer.traffic.calls["all_reduce_small"],
        "shapes": {tuple(state["exp_avg"].shape) for state in optimizer.state.values()},
    }
    cases.stop(engine)
    return outcome


@pytest.mark.parametrize(
    ("stage", "dtype", "options"),
    [
        (0, "fp32", {}),
        (1, "bf16", {}),
        (2, "fp32", {"normalize_grad": True, "nesterov": True}),
        (3, "fp32", {}),
        (3, "bf16", {"caution": True}),
    ],
    ids=str,
)
def test_partitions_follow_the_oracle(stage: int, dtype: str, options: dict[str, Any]) -> None:
    results = run_ranks(2, train, stage, dtype, options, timeout=300)
    for outcome in results:
        assert outcome["worst"] <= cases.FP32_TOLERANCE
        assert outcome["ratios"] == pytest.approx(outcome["expected"], rel=1e-5)
        assert outcome["coefficients"] == list(outcome["ratios"].values())
        assert outcome["ratios"] == results[0]["ratios"]  # the same bits on every rank
        assert outcome["calls"] == (2 * 3 + 1 if stage else 0)  # one proves the mapping


def refused(rank: int, params: dict[str, Any], groups: bool) -> None:
    model = cases.tiny()
    keywords: dict[str, Any] = (
        {"model_parameters": [{"params": model.fc.parameters(), **params}]} if groups else {}
    )
    cases.start(cases.config(1, params=cases.LAMB if groups else {**cases.LAMB, **params}), model, **keywords)


@pytest.mark.parametrize(
    ("ratio_blocks", "groups", "says"),
    [
        ({"out.weight": 5}, False, "5 does not divide its first dimension, 24"),
        ({"qkv": 3}, False, "ratio_blocks: ['qkv'] matches no parameter"),
        ({"fc": 1}, True, "in a parameter group"),
    ],
)
def test_errors_name_the_option(ratio_blocks: Any, groups: bool, says: str) -> None:
    errors = run_ranks_expecting_errors(1, refused, {"ratio_blocks": ratio_blocks}, groups, timeout=300)
    for kind, message in errors.values():
        assert kind == "ValueError"
        assert says in message


def transposed_later(rank: int) -> None:
    engine = cases.start(cases.config(0, params={**cases.LAMB, "ratio_blocks": RATIO_BLOCKS}))
    weight = engine.module.out.weight
    weight.data = weight.data.T.contiguous().T
    engine.backward(engine(cases.tokens(rank, 0)))
    engine.step()


def test_a_parameter_that_is_transposed_later_is_refused() -> None:
    for kind, message in run_ranks_expecting_errors(1, transposed_later, timeout=300).values():
        assert kind == "ValueError"
        assert (
            "'out.weight' has 3 ratio blocks along its first dimension, which is not the outermost" in message
        )
