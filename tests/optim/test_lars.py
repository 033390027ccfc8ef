"""LARS: exact under every sharding, one moment, one sum per parameter, and the conventions of other libraries."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from tests import training
from tests.harness import run_ranks
from tests.optim import fsdp_models as models
from tests.optim.test_fsdp2_collectives import steps_of
from tests.optim.test_fsdp2_exact import BLOCK_OPTIONS, block_run
from tests.oracle import LARS, PLAIN
from tests.sharded_cases import Case, check_run
from tests.sharded_cases import run as run_case

RULE = {key: value for key, value in LARS.items() if value != PLAIN[key]}
FASTER = {**RULE, "trust_coefficient": 0.02}  # so that ten steps move weights by more than their rounding


@pytest.mark.parametrize(
    ("axes", "dp", "tp"),
    [({"dp": 3}, "dp", None), ({"dp": 2, "tp": 2}, "dp", "tp"), ({"tp": 2}, None, "tp")],
    ids=str,
)
def test_dtensors_follow_the_oracle(axes: dict[str, int], dp: Any, tp: str | None) -> None:
    options = {**BLOCK_OPTIONS, **FASTER}
    runs = run_ranks(torch.Size(axes.values()).numel(), block_run, axes, dp, tp, options)
    models.check(runs, **options)


def mixed(stage: int, *dtypes: torch.dtype, **changes: Any) -> Case:
    """Parameters in other memory orders and of several dtypes, in groups of other conventions."""
    shapes = {"conv.weight": (5, 3, 9, 7), "fc.weight": (31, 37), "fc.bias": (257,), "scale": ()}
    settings = {"stage": stage, "bucket_mb": 0.002, **changes.pop("settings", {})}
    return Case(
        shapes,
        options={**FASTER, **changes},
        groups=(
            (("conv.weight", "scale"), {"momentum_includes_lr": True, "nesterov": True}),
            (("fc.weight",), {"larc_clip": True, "lr": 0.02}),
            (
                ("fc.bias",),
                {"grad_averaging": True, "trust_clip": (0.01, 0.015), "weight_norm_clip": (0.0, 5.0)},
            ),
        ),
        settings=settings,
        dtypes=dict(zip(shapes, dtypes, strict=False)),
        channels_last=frozenset({"conv.weight"}),
        no_decay=frozenset({"scale"}),
        missing=0.3,
        bits=7,
    )


BF16 = torch.bfloat16
SPLIT = {"settings": {"store_param_remainders": True}}


@pytest.mark.parametrize(
    "case",
    [
        mixed(1, max_grad_norm=5.0),
        mixed(2, max_grad_norm=5.0),
        mixed(1, torch.float64, torch.float32),
        mixed(2, BF16, torch.float16, BF16, **SPLIT),
    ],
    ids=["1", "2", "1, fp64 and fp32", "2, bf16 with remainders and fp16"],
)
def test_stages_and_dtypes_follow_the_oracle(case: Case) -> None:
    outcomes = run_ranks(2, run_case, case, 2)
    if any(dtype in (BF16, torch.float16) for dtype in case.dtypes.values()):
        for outcome in outcomes:
            outcome.params |= outcomes[0].masters
    check_run(case, outcomes)


def test_bits_do_not_depend_on_ranks_stages_or_kernels() -> None:
    case = mixed(1)
    runs = [run_ranks(world, run_case, case, world)[0].params for world in (1, 2, 3, 4)]
    runs.append(run_ranks(2, run_case, mixed(1, settings={"kernel": "torch"}), 2)[0].params)
    for params in runs[1:]:
        training.assert_same_bits(params, runs[0])


@pytest.mark.parametrize(("skips", "calls"), [(True, 2), (False, 1)])
def test_all_reduces_of_a_step(skips: bool, calls: int) -> None:
    """Its ratio is made of ‖w‖ alone beside the gradients' summary: one sum per parameter, where LAMB has two."""
    options, params = {"variant": "lars", "skip_nonfinite": skips}, 3
    for counts, _, sent, expected_bytes in run_ranks(2, steps_of, 1, {"dp": 2}, options):
        assert counts[-1] == {"c10d.allreduce_": calls}
        summary = 3 * params + 1 if calls == 2 else 2 * params
        assert (
            sent == {"all_reduce_small": expected_bytes} == {"all_reduce_small": 8 * (summary + params + 6)}
        )


def trained(variant: str, cls: Any = ShardedLamb, **options: Any) -> tuple[dict[str, nn.Parameter], Any]:
    params = {name: nn.Parameter(value) for name, value in training.weights({"a": (31, 5), "b": ()}).items()}
    optimizer = cls(params.items(), lr=0.05, variant=variant, **options)
    for step in range(3):
        for name, p in params.items():
            p.grad = training.draw(tuple(p.shape), name, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("flag", [True, np.True_, torch.tensor(True)], ids=["bool", "numpy", "tensor"])
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_it_keeps_one_moment(cls: Any, flag: Any) -> None:
    params, optimizer = trained("lars", cls, lars=flag)
    assert optimizer.moments == ("exp_avg",)
    for p in params.values():
        assert {key for key in optimizer.state[p] if key != "shard"} == {"step", "exp_avg"}
    if cls is ShardedLamb:
        _, lamb = trained("lamb")
        assert lamb.memory()["moments"] == 2 * optimizer.memory()["moments"]


def test_norms_of_a_step() -> None:
    params, optimizer = trained("lars")
    for name, p in params.items():
        norms = optimizer.layer_norms()[name]
        assert p.grad is not None
        assert norms.gradient == pytest.approx(float(p.grad.norm()), rel=1e-6)
        expected = 1e-3 * norms.weight / (norms.gradient + 0.01 * norms.weight + 1e-6)
        assert norms.ratio == pytest.approx(expected, rel=1e-6)
        assert math.isnan(norms.update)
    assert "a" not in str(optimizer.explain()).split()


def test_a_gradient_of_zero_is_explained() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Lamb([("p", p)], variant="lars")
    p.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.trust_ratios() == {"p": 1.0}
    assert "ratio 1: ‖g‖ is 0" in str(optimizer.explain())


def test_a_changed_rate_scales_the_momentum_or_does_not() -> None:
    """With η inside the momentum, what was gathered keeps its rate (the paper, MLPerf); torch's SGD scales it anew."""
    ends = {}
    for variant in ("lars", "torch_lars"):
        params, optimizer = trained(variant)
        before = {name: p.detach().clone() for name, p in params.items()}
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        ends[variant] = all(torch.equal(before[name], p) for name, p in params.items())
    assert ends == {"lars": False, "torch_lars": True}


def resumed(rank: int, folder: str, stage: int) -> bool:
    """Whether a checkpoint resumes to the bits of the run that went on, in any stage."""
    shapes = {"a": (31, 5), "b": (300,)}

    def made(own_stage: int) -> tuple[nn.Module, ShardedLamb]:
        model = nn.ParameterDict({n: nn.Parameter(v) for n, v in training.weights(shapes).items()})
        return model, ShardedLamb(model.named_parameters(), lr=0.05, variant="lars", stage=own_stage)

    def step(model: nn.Module, optimizer: ShardedLamb, number: int) -> None:
        for name, p in model.named_parameters():
            p.grad = training.draw(tuple(p.shape), name, number)
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made(1)
    step(model, optimizer, 0)
    checkpoint.save(folder, model, optimizer)
    other, loaded = made(stage)
    checkpoint.load(folder, other, loaded)
    full = optimizer.full_state_dict()
    third, from_full = made(stage)
    third.load_state_dict(model.state_dict())
    from_full.load_full_state_dict(full)
    for pair in ((model, optimizer), (other, loaded), (third, from_full)):
        step(*pair, 1)
    return all(
        torch.equal(p, q) and torch.equal(p, r)
        for p, q, r in zip(model.parameters(), other.parameters(), third.parameters(), strict=True)
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_resumes_to_the_same_bits(stage: int, tmp_path: Path) -> None:
    assert run_ranks(2, resumed, str(tmp_path / "saved"), stage) == [True, True]


@pytest.mark.parametrize(("saved", "own"), [("lamb", "lars"), ("lars", "lamb")])
def test_state_of_the_other_algorithm_is_refused(saved: str, own: str, tmp_path: Path) -> None:
    """By the options; without them, by the moments."""
    for cls in (Lamb, ShardedLamb):
        folder = str(tmp_path / f"{cls.__name__}")
        params, optimizer = trained(saved, cls)
        model = nn.ParameterDict(params)
        checkpoint.save(folder, model, optimizer)
        state = optimizer.state_dict() if cls is Lamb else optimizer.local_state_dict()
        params, optimizer = trained(own, cls)
        before = training.copies(params)
        model = nn.ParameterDict(params)
        with pytest.raises(ValueError, match=r"lars=\w+ cannot be given to an optimizer with lars="):
            optimizer.load_state_dict(state)
        with pytest.raises(ValueError, match=r"checkpoint \S+: lars=\w+ cannot be given"):
            checkpoint.load(folder, model, optimizer)
        with pytest.raises(ValueError, match=r"one moment|keeps one"):
            checkpoint.load(folder, model, optimizer, options=False)
        training.assert_same_bits(training.copies(params), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "lars", "bias_correction": True}, "bias_correction=True has no effect with lars=True"),
        ({"variant": "lars", "adam_w_mode": True}, "adam_w_mode=True has no effect with lars=True"),
        ({"variant": "lars", "normalize_grad": True}, "normalize_grad=True has no effect"),
        ({"variant": "torch_lars", "eps_inside_sqrt": True}, "eps_inside_sqrt=True has no effect"),
        ({"larc_clip": True}, "larc_clip=True needs lars=True"),
        ({"momentum_includes_lr": True}, "momentum_includes_lr=True needs lars=True"),
        ({"lars": "no"}, "lars must be True or False, got 'no'"),
        ({"variant": "lars", "nesterov": 1}, "nesterov must be True or False, got 1"),
        ({"trust_coefficient": 0.0}, "trust_coefficient must be a finite number > 0"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    for cls in (Lamb, ShardedLamb):
        with pytest.raises(ValueError, match=message):
            cls([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_one_optimizer_is_lars_or_lamb(cls: Any) -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(3))]},
        {"params": [nn.Parameter(torch.ones(3))], "variant": "lars"},
    ]
    with pytest.raises(ValueError, match="construct an optimizer for each"):
        cls(groups)
    _, optimizer = trained("lars", cls)
    optimizer.param_groups[0]["lars"] = False
    with pytest.raises(ValueError, match="lars=False cannot be given"):
        optimizer.step()
