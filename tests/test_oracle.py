"""The oracle against other implementations, and against hand-computed numbers."""

import functools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.optim.golden import make_golden as golden
from tests.oracle import VARIANT_FACTS, OracleLamb
from tests.timm_peer import load_timm_lamb

PARAMS, FULL = golden.make_inputs()
GRADS = golden.with_missing(FULL)


def test_ratio_one_is_adam_and_adamw() -> None:
    golden.check_against_torch(PARAMS, GRADS)


def test_uncorrected_is_the_tensorflow_reference() -> None:
    golden.check_against_tf_reference(PARAMS, GRADS)


def test_normalized_with_nesterov_is_lans() -> None:
    golden.check_against_lans_reference(PARAMS, GRADS)


def test_scaled_before_the_momentum_is_lars() -> None:
    golden.check_against_lars_reference(PARAMS, GRADS)
    golden.check_lars_against_torch(PARAMS, GRADS)


def test_clipped_is_timm() -> None:
    golden.check_against_timm(PARAMS, FULL)


def test_l2_mode_is_adam_with_weight_decay() -> None:
    def build(tensors: dict[str, Any]) -> torch.optim.Optimizer:
        return torch.optim.Adam(golden.decay_groups(tensors), **golden.COMMON)

    oracle = golden.make_oracle("adamw", PARAMS, adam_w_mode=False)
    adam = golden.torch_run(build, PARAMS, GRADS)
    golden.compare("Adam with weight_decay", golden.oracle_run(oracle, GRADS), adam, 1e-13)


@pytest.mark.parametrize(
    ("oracle_options", "timm_options"),
    [
        ({"grad_averaging": False}, {"grad_averaging": False}),
        ({"trust_clip": (0.0, 1.0)}, {"trust_clip": True}),
        ({"decoupled_decay": True}, {"decoupled_decay": True}),
        ({"caution": True}, {"caution": True}),
    ],
    ids=["grad_averaging", "trust_clip", "decoupled_decay", "caution"],
)
def test_options_are_timms(oracle_options: dict[str, Any], timm_options: dict[str, Any]) -> None:
    build = functools.partial(golden.build_timm, load_timm_lamb(), **timm_options)
    oracle = golden.make_oracle("timm", PARAMS, **oracle_options)
    peer = golden.torch_run(build, PARAMS, FULL)
    golden.compare(f"timm with {timm_options}", golden.oracle_run(oracle, FULL), peer, 1e-12)


def one_step(**options: Any) -> OracleLamb:
    """w = (3, 4) has norm 5; g = (0.6, 0.8) has norm 1. Without momentum, m = g and v = g²."""
    defaults: dict[str, Any] = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    oracle = OracleLamb({"w": np.array([3.0, 4.0])}, **{**defaults, **options})
    oracle.step({"w": np.array([0.6, 0.8])})
    return oracle


def test_one_step_equals_hand_computed_values() -> None:
    u = np.array([0.6 / 1.6, 0.8 / 1.8])
    ratio = 5 / math.hypot(*u)
    oracle = one_step()
    assert oracle.grad_norm == pytest.approx(1.0, rel=1e-15)
    assert oracle.ratios["w"] == pytest.approx(ratio, rel=1e-15)
    np.testing.assert_allclose(oracle.params["w"], [3, 4] - 0.5 * ratio * u, rtol=1e-15)


def test_eps_inside_the_root_equals_hand_computed_values() -> None:
    u = np.array([0.6 / math.sqrt(1.36), 0.8 / math.sqrt(1.64)])
    np.testing.assert_allclose(one_step(eps_inside_sqrt=True).ratios["w"], 5 / math.hypot(*u), rtol=1e-15)


def test_clipping_equals_hand_computed_values() -> None:
    u = np.array([0.3 / 1.3, 0.4 / 1.4])
    oracle = one_step(max_grad_norm=0.5)
    assert oracle.grad_norm == pytest.approx(1.0, rel=1e-15)
    np.testing.assert_allclose(oracle.ratios["w"], 5 / math.hypot(*u), rtol=1e-15)


@pytest.mark.parametrize(("bounds", "phi"), [((0.0, 2.0), 2.0), ((7.0, 9.0), 7.0), ((0.0, 10.0), 5.0)])
def test_weight_norm_clip_equals_hand_computed_values(bounds: tuple[float, float], phi: float) -> None:
    u_norm = math.hypot(0.6 / 1.6, 0.8 / 1.8)
    np.testing.assert_allclose(one_step(weight_norm_clip=bounds).ratios["w"], phi / u_norm, rtol=1e-15)


def test_correction_in_the_learning_rate_equals_hand_computed_values() -> None:
    """m = g / 2 and v = g² / 16: without eps u is 2 · sign(g), and lr is multiplied by (1 / 4) / (1 / 2)."""
    oracle = one_step(betas=(0.5, 0.9375), eps=0.0, bias_correction="lr")
    ratio = 5 / math.hypot(2, 2)
    np.testing.assert_allclose(oracle.ratios["w"], ratio, rtol=1e-15)
    np.testing.assert_allclose(oracle.params["w"], np.array([3, 4]) - 0.25 * ratio * 2, rtol=1e-15)


def test_trust_clip_leaves_the_fallback_at_one() -> None:
    oracle = OracleLamb({"zero": np.zeros(2), "w": np.ones(2)}, trust_clip=(2.0, 3.0))
    oracle.step({"zero": np.ones(2), "w": np.full(2, 1.0)})
    assert oracle.ratios == {"zero": 1.0, "w": 2.0}


def test_a_missing_gradient_changes_nothing() -> None:
    oracle = OracleLamb({"a": np.ones(2), "b": np.ones(2)})
    oracle.step({"a": None, "b": np.ones(2)})
    assert oracle.steps == {"a": 0, "b": 1}
    assert list(oracle.ratios) == ["b"]
    assert oracle.params["a"].tolist() == [1.0, 1.0]
    assert not oracle.m["a"].any()
    assert not oracle.v["a"].any()


def test_stored_vectors_equal_the_generated_ones() -> None:
    generated = golden.documents()
    assert {path.stem for path in golden.HERE.glob("*.json")} == {"inputs", *VARIANT_FACTS}
    for name, document in generated.items():
        stored = json.loads((golden.HERE / f"{name}.json").read_text())
        golden.same(stored, json.loads(json.dumps(document)), name)


def test_vectors_reach_every_branch() -> None:
    """The vectors detect a wrong variant only if clamps, clips and fallbacks all act somewhere."""
    steps = {v: golden.expected(v, PARAMS, GRADS) for v in VARIANT_FACTS}
    deepspeed = [r for step in steps["deepspeed"] for r in step["ratios"].values()]
    assert 0.01 in deepspeed
    assert 10.0 in deepspeed
    assert np.linalg.norm(PARAMS["embed.weight"]) > 10
    norms = [step["grad_norm"] for step in steps["apex"]]
    assert max(norms) > 1 > min(norm for norm in norms if norm)
    assert steps["lamb"][0]["ratios"]["LayerNorm.bias"] == 1.0  # weights of norm 0
    assert steps["lamb"][0]["ratios"]["LayerNorm.weight"] == 1.0  # an update of norm 0
    # No update is close to zero: its ratio would measure float32 cancellation only (see `test_golden.CANCELLED`).
    others = [rows for variant, rows in steps.items() if variant != "lans"]
    assert max(row["ratios"].get("scale", 0) for rows in others for row in rows) < 20
    finals = {json.dumps(rows[-1]["params"]) for rows in steps.values()}
    assert len(finals) == len(VARIANT_FACTS) - 1  # apex and timm are one rule
