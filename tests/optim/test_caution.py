"""Caution: exact under every sharding, where the share of kept elements is over all ranks; four sums per parameter.

β1 = 0.5 where gradients are multiples of a coarse step: moments that cancel are then 0 in fp32 and in fp64, while after
another β1 their sign is that of a rounding error.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks
from tests.optim import fsdp_models as models
from tests.optim.test_fsdp2_collectives import steps_of
from tests.optim.test_fsdp2_exact import BLOCK_OPTIONS, block_run
from tests.oracle import OracleLamb
from tests.sharded_cases import Case, check_alike, check_close, expect
from tests.sharded_cases import run as run_case


@pytest.mark.parametrize(
    ("axes", "dp", "tp"),
    [({"dp": 3}, "dp", None), ({"dp": 2, "tp": 2}, "dp", "tp")],
    ids=str,
)
def test_dtensors_follow_the_oracle(axes: dict[str, int], dp: Any, tp: str | None) -> None:
    options = {"caution": True, **BLOCK_OPTIONS}
    runs = run_ranks(torch.Size(axes.values()).numel(), block_run, axes, dp, tp, options)
    models.check(runs, **options)


def mixed(stage: int, *dtypes: torch.dtype, **settings: Any) -> Case:
    """Parameters in other memory orders and of several dtypes; one group without caution, one with decay outside u."""
    shapes = {
        "conv.weight": (5, 3, 9, 7),
        "fc.weight": (31, 37),
        "fc.bias": (257,),
        "scale": (),
        "l2": (300,),
    }
    return Case(
        shapes,
        options={"caution": True, "betas": (0.5, 0.99)},
        groups=(
            (("conv.weight", "scale"), {}),
            (("fc.weight",), {"decoupled_decay": True, "normalize_grad": True}),
            (("fc.bias",), {"caution": False}),
            (("l2",), {"adam_w_mode": False, "bias_correction": "lr"}),
        ),
        settings={"stage": stage, "bucket_mb": 0.002, **settings},
        dtypes=dict(zip(shapes, dtypes, strict=False)),
        channels_last=frozenset({"conv.weight"}),
        missing=0.3,
        bits=7,
    )


BF16 = torch.bfloat16


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "case",
    [mixed(1), mixed(2), mixed(2, BF16, torch.float16, BF16, store_param_remainders=True)],
    ids=["1", "2", "2, bf16 with remainders and fp16"],
)
def test_stages_and_dtypes_follow_the_oracle(case: Case, world: int) -> None:
    outcomes = run_ranks(world, run_case, case, world)
    check_alike(outcomes)
    check_close({**outcomes[0].params, **outcomes[0].masters}, expect(case, world))


@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_all_reduces_of_a_step(skip_nonfinite: bool) -> None:
    """No collective more than without caution: two more numbers per parameter."""
    params, options = 3, {"caution": True, "skip_nonfinite": skip_nonfinite}
    for counts, _, sent, expected_bytes in run_ranks(2, steps_of, 1, {"dp": 2}, options):
        assert counts[-1] == {"c10d.allreduce_": 1 + skip_nonfinite}
        summary = 3 * params + 1 if skip_nonfinite else 2 * params
        assert (
            sent
            == {"all_reduce_small": expected_bytes}
            == {"all_reduce_small": 8 * (summary + 4 * params + 6)}
        )


def trained(cls: Any, *caution: bool, **options: Any) -> dict[str, Tensor]:
    params = training.parameters()
    named = list(params.items())
    groups = [{"params": named[:3], "caution": caution[0]}, {"params": named[3:], "caution": caution[-1]}]
    optimizer = cls(groups, lr=0.05, weight_decay=0.3, **options)
    for step in range(4):
        training.give(params, training.own_gradients(0, step))
        optimizer.step()
    return training.copies(params)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("options", [{}, {"decoupled_decay": True}], ids=str)
def test_a_group_without_it_keeps_its_bits(cls: Any, options: dict[str, Any]) -> None:
    plain, both = trained(cls, False, **options), trained(cls, True, False, **options)
    last = list(plain)[3:]
    training.assert_same_bits({name: both[name] for name in last}, {name: plain[name] for name in last})
    assert not torch.equal(both["embed.weight"], plain["embed.weight"])


def kept(count: int, decay: float) -> tuple[Tensor, Any, OracleLamb]:
    """One parameter after two steps; in the second, ``count`` elements keep their sign, one has gradient 0, and the
    others oppose the first moment."""
    start = torch.linspace(0.5, 1.5, 3000)
    first, second = torch.ones(3000), torch.full((3000,), -0.25)
    second[:count], second[-1] = 1.0, 0.0
    p = nn.Parameter(start.clone())
    optimizer = Lamb([("w", p)], lr=0.1, weight_decay=decay, caution=True)
    oracle = OracleLamb({"w": start.double().numpy()}, lr=0.1, weight_decay=decay, caution=True)
    for grad in (first, second):
        p.grad = grad.clone()
        optimizer.step()
        oracle.step({"w": grad.double().numpy()})
    return p.detach(), optimizer, oracle


@pytest.mark.parametrize("count", [0, 1, 30])
def test_the_scale_of_what_is_kept_is_at_most_1000(count: int) -> None:
    """1 of 3000 elements is less than the share 0.001; with none, u is λ w."""
    w, optimizer, oracle = kept(count, 0.1)
    training.assert_follows({"w": w}, oracle)
    assert optimizer.layer_norms()["w"] == pytest.approx(oracle.norms["w"], rel=1e-6)
    assert ("update is decay alone" in str(optimizer.explain())) == (count == 0)


def test_nothing_kept_and_no_decay_changes_nothing() -> None:
    w, optimizer, oracle = kept(0, 0.0)
    training.assert_follows({"w": w}, oracle)
    assert optimizer.layer_norms()["w"].update == 0
    assert optimizer.trust_ratios() == {"w": 1.0}
    assert "ratio 1: ‖u‖ is 0" in str(optimizer.explain())


def test_a_nan_is_not_masked() -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = ShardedLamb([("p", p)], caution=True, skip_nonfinite=False)
    p.grad = torch.tensor([1.0, torch.nan, 1.0, 1.0, 1.0])
    optimizer.step()
    assert p.isnan().any()
    assert math.isnan(optimizer.layer_norms()["p"].update)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_beside_nesterov_it_is_refused(cls: Any) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"caution=True beside nesterov=True \(LANS\)"):
        cls([a], variant="lans", caution=True)
    optimizer = cls([a], caution=True)
    with pytest.raises(ValueError, match=r"caution=True beside nesterov=True \(LANS\)"):
        optimizer.add_param_group({"params": [b], "caution": False, "nesterov": True})
    assert len(optimizer.param_groups) == 1
