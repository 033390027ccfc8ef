"""LANS: exact under every sharding, three sums per parameter, and blind to the gradient's scale."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from tests import training
from tests.harness import run_ranks
from tests.optim import fsdp_models as models
from tests.optim.test_fsdp2_collectives import steps_of
from tests.optim.test_fsdp2_exact import BLOCK_OPTIONS, block_run
from tests.sharded_cases import Case, check_alike, check_close, expect
from tests.sharded_cases import run as run_case

OPTIONS: dict[str, Any] = {"normalize_grad": True, "nesterov": True}


@pytest.mark.parametrize(
    ("axes", "dp", "tp"),
    [({"dp": 3}, "dp", None), ({"dp": 2, "tp": 2}, "dp", "tp"), ({"tp": 2}, None, "tp")],
    ids=str,
)
def test_dtensors_follow_the_oracle(axes: dict[str, int], dp: Any, tp: str | None) -> None:
    options = {"variant": "lans", **BLOCK_OPTIONS}
    runs = run_ranks(torch.Size(axes.values()).numel(), block_run, axes, dp, tp, options)
    models.check(runs, **BLOCK_OPTIONS, **OPTIONS)


def mixed(stage: int, *dtypes: torch.dtype, **settings: Any) -> Case:
    """Parameters in other memory orders and of several dtypes; one group without a second direction."""
    shapes = {"conv.weight": (5, 3, 9, 7), "fc.weight": (31, 37), "fc.bias": (257,), "scale": ()}
    return Case(
        shapes,
        options=OPTIONS,
        groups=((("conv.weight", "scale"), {}), (("fc.weight", "fc.bias"), {"nesterov": False})),
        settings={"stage": stage, "bucket_mb": 0.002, **settings},
        dtypes=dict(zip(shapes, dtypes, strict=False)),
        channels_last=frozenset({"conv.weight"}),
        missing=0.3,
        bits=7,
    )


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "case",
    [
        mixed(1),
        mixed(2),
        mixed(1, BF16, torch.float32, BF16),
        mixed(2, BF16, torch.float16, BF16, store_param_remainders=True),
    ],
    ids=["1", "2", "1, bf16 and fp32", "2, bf16 with remainders and fp16"],
)
def test_stages_and_dtypes_follow_the_oracle(case: Case) -> None:
    outcomes = run_ranks(2, run_case, case, 2)
    check_alike(outcomes)
    check_close({**outcomes[0].params, **outcomes[0].masters}, expect(case, 2))


@pytest.mark.parametrize(
    ("options", "calls", "sums"),
    [
        ({"variant": "lans"}, 2, 3),
        ({"variant": "lans", "skip_nonfinite": False}, 2, 3),
        ({"normalize_grad": True, "skip_nonfinite": False}, 2, 2),
        ({"nesterov": True, "skip_nonfinite": False}, 1, 3),
    ],
    ids=["lans", "skipping nothing", "normalized alone", "nesterov alone"],
)
def test_all_reduces_of_a_step(options: dict[str, Any], calls: int, sums: int) -> None:
    """A norm must be known before moments are written; a second direction is one more number per parameter."""
    params = 3
    for counts, _, sent, expected_bytes in run_ranks(2, steps_of, 1, {"dp": 2}, options):
        assert counts[-1] == {"c10d.allreduce_": calls}
        summary = 3 * params + 1 if calls == 2 else 2 * params
        assert (
            sent
            == {"all_reduce_small": expected_bytes}
            == {"all_reduce_small": 8 * (summary + sums * params + 6)}
        )


def trained(cls: Any, factor: float, **options: Any) -> dict[str, Tensor]:
    params = {name: nn.Parameter(value) for name, value in training.weights({"a": (31, 5), "b": ()}).items()}
    optimizer = cls(params.items(), lr=0.05, variant="lans", **options)
    for step in range(3):
        for name, p in params.items():
            p.grad = factor * training.draw(tuple(p.shape), name, step)
        optimizer.step()
    return training.copies(params)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_the_gradients_scale_and_clipping_change_nothing(cls: Any) -> None:
    plain = trained(cls, 1.0)
    training.assert_same_bits(trained(cls, 2.0**20), plain)
    training.assert_same_bits(trained(cls, 1.0, max_grad_norm=1e-3), plain)
    negative = trained(cls, -1.0)
    assert all(not torch.equal(negative[name], value) for name, value in plain.items())


@pytest.mark.parametrize("factor", [-0.5, 0.0])
def test_of_a_factor_on_reduced_gradients_the_sign_counts(factor: float) -> None:
    """Stage 2's ``.grad`` has no values to scale: the factor is multiplied in at the step."""

    def stepped(given: float, written: float) -> dict[str, Tensor]:
        params = {"a": nn.Parameter(torch.arange(1.0, 9.0)), "b": nn.Parameter(torch.tensor(2.0))}
        optimizer = ShardedLamb(params.items(), lr=0.05, variant="lans", stage=2)
        torch.stack([(p * p).sum() * given for p in params.values()]).sum().backward()
        for p in params.values():
            assert p.grad is not None
            p.grad.mul_(written)
        optimizer.step()
        return training.copies(params)

    training.assert_same_bits(stepped(1.0, factor), stepped(factor, 1.0))


def test_gradients_of_zero_stay_zero() -> None:
    p = nn.Parameter(torch.full((3,), 2.0))
    optimizer = Lamb([p], lr=0.1, weight_decay=0.0, variant="lans")
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 2.0))
    assert optimizer.trust_ratios() == {"group0.param0": 1.0}


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize(("own", "saved"), [("lamb", "lans"), ("lans", "lamb")])
def test_state_of_the_other_algorithm_is_refused(cls: Any, own: str, saved: str, tmp_path: Path) -> None:
    def made(variant: str) -> tuple[nn.Parameter, Any]:
        p = nn.Parameter(torch.ones(3))
        optimizer = cls([("p", p)], variant=variant)
        p.grad = torch.ones(3)
        optimizer.step()
        return p, optimizer

    (p, optimizer), (source, other) = made(own), made(saved)
    before = p.detach().clone()
    state = other.state_dict() if cls is Lamb else other.local_state_dict()
    with pytest.raises(ValueError, match=rf"normalize_grad=\w+ cannot be given .*variant='{saved}'"):
        optimizer.load_state_dict(state)
    checkpoint.save(tmp_path / "saved", nn.ParameterDict({"p": source}), other)
    with pytest.raises(ValueError, match=r"checkpoint \S+: normalize_grad=\w+ cannot be given"):
        checkpoint.load(tmp_path / "saved", nn.ParameterDict({"p": p}), optimizer)
    assert torch.equal(p, before)
    assert optimizer.param_groups[0]["variant"] == own
