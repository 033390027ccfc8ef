"""Peers' arithmetic, sharded: compared with timm's Lamb itself, and with the oracle for apex."""

import pytest
import torch

from tests import training
from tests.harness import run_ranks
from tests.oracle import variant_options
from tests.timm_peer import load_timm_lamb

STAGES = pytest.mark.parametrize("stage", [1, 2])
WORLD = 3


@STAGES
def test_apex_semantics(stage: int) -> None:
    """FusedLAMB as in NVIDIA's BERT: clipped at 1, ratio 1 for parameters without decay."""
    no_decay = {"norm.weight", "norm.bias", "fc.bias"}
    facts = variant_options("apex", training.SHAPES, no_decay)
    oracle = training.oracle_of_ranks(WORLD, range(4), lr=0.02, **facts)
    options = {"variant": "apex", "lr": 0.02, "exclude_from_weight_decay": ("norm", "bias")}
    assert {oracle.ratios[name] for name in no_decay} == {1.0}
    for weights, ratios in run_ranks(WORLD, training.run, WORLD, stage, options):
        training.assert_follows(weights, oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)


@STAGES
def test_timm_semantics(stage: int) -> None:
    """timm's own Lamb on the averaged gradients, in float64, against the variant named after it."""
    params = training.parameters(dtype=torch.float64)
    peer = load_timm_lamb()(
        [
            {"params": [p for name, p in params.items() if "norm" in name], "weight_decay": 0.0},
            {"params": [p for name, p in params.items() if "norm" not in name]},
        ],
        lr=0.02,
    )
    for step in range(4):
        training.give(params, training.average(training.own_gradients(r, step) for r in range(2)))
        peer.step()
    options = {"variant": "timm", "lr": 0.02, "exclude_from_weight_decay": ("norm",)}
    dtypes = dict.fromkeys(training.SHAPES, torch.float64)
    for weights, _ in run_ranks(2, training.run, 2, stage, options, dtypes):
        for name, value in weights.items():
            gap, size = (value - params[name]).norm().item(), params[name].norm().item()
            assert gap <= 1e-8 * size, name  # the global norm that clips is rounded to fp32
