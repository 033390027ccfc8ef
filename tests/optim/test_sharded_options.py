"""Every keyword-only option of `ShardedLamb` has an effect; a group's option affects that group only."""

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sharded_lamb import ShardedLamb, kernels
from sharded_lamb.core.hyperparams import DEFAULTS, GROUP_OPTIONS
from sharded_lamb.gradients.handles import ReducedGradient
from tests.harness import run_ranks
from tests.sharded_cases import Case, run

SHAPES = {"a.weight": (31, 17), "a.bias": (31,), "b.weight": (300,), "b.bias": (7,)}
CASE = Case(shapes=SHAPES, options={"weight_decay": 0.1}, missing=0.0, steps=5, seed=1)

# option → a value that must change the parameters of this run
CHANGES: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.8, 0.99),
    "eps": 0.1,
    "weight_decay": 0.2,
    "bias_correction": False,
    "grad_averaging": False,
    "adam_w_mode": False,
    "eps_inside_sqrt": True,
    "max_grad_norm": 0.5,
    "trust_clip": (0.0, 0.1),
    "weight_norm_clip": (0.0, 0.1),
    "exclude_from_weight_decay": ("bias",),
    "exclude_from_layer_adaptation": ("weight",),
    "adapt_without_decay": False,
    "normalize_grad": True,
    "nesterov": True,
    "trust_coefficient": 0.5,
    "decoupled_decay": True,
    "caution": True,
    "variant": "nvlamb",
    "ratio_blocks": {"a.weight": "dim0"},
    "state_dtype": torch.bfloat16,
}
# option whose effect needs more than CHANGES → the test that shows it
SHOWN_BY = {
    "stage": "test_stage_selects_averaged_or_own_gradients",
    "process_group": "test_process_group_of_some_ranks",
    "mesh": "test_mesh_shards_inside_and_replicates_across",
    "bucket_mb": "test_bucket_mb_sets_the_number_of_buckets",
    "master_dtype": "test_master_dtype_of_the_model_has_no_masters",
    "reduce_dtype": "test_reduce_dtype_is_the_dtype_on_the_wire",
    "overlap": "test_overlap_reduces_while_backward_runs",
    "skip_nonfinite": "test_skip_nonfinite",
    "max_consecutive_skips": "test_max_consecutive_skips",
    "kernel": "test_kernel_selects_the_backend",
    "corrected_weight_decay": "test_corrected_decay_follows_timm",
    "lars": "test_stages_and_dtypes_follow_the_oracle",
    "momentum_includes_lr": "test_a_changed_rate_scales_the_momentum_or_does_not",
    "larc_clip": "test_stages_and_dtypes_follow_the_oracle",
    "gather_dtype": "test_masters_are_exact_and_weights_are_their_rounding",
    "ema_decay": "test_alone_it_has_the_bits_of_torchs_averaged_model",
    "store_param_remainders": "test_memory_of_a_bfloat16_model_is_2_bytes_less_an_element",
}


@cache
def plain_params(*options: tuple[str, Any]) -> dict[str, Tensor]:
    return params_with(**dict(options))


def params_with(world: int = 2, **options: Any) -> dict[str, Tensor]:
    needed = {"weight_decay": 0.0} if "adapt_without_decay" in options else {}
    settings = {key: value for key, value in options.items() if key not in (*DEFAULTS, "lr", "betas", "eps")}
    rule = {key: value for key, value in options.items() if key not in settings}
    return run_ranks(
        world, run, replace(CASE, options={**CASE.options, **rule, **needed}, settings=settings), world
    )[0].params


def test_every_keyword_has_a_test() -> None:
    signature = inspect.signature(ShardedLamb.__init__).parameters.values()
    keywords = {p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY} | DEFAULTS.keys()
    scalars = {"lr", "betas", "eps", "weight_decay"}
    assert CHANGES.keys() | SHOWN_BY.keys() == keywords | scalars
    assert not CHANGES.keys() & SHOWN_BY.keys()


@pytest.mark.parametrize("option", sorted(CHANGES))
def test_option_changes_the_result(option: str) -> None:
    before = {"weight_decay": 0.0} if option == "adapt_without_decay" else {}
    plain, changed = plain_params(*before.items()), params_with(**{option: CHANGES[option]})
    assert any(not torch.equal(plain[name], changed[name]) for name in SHAPES)


@cache
def grouped_params(
    first: tuple[str, ...], second: tuple[str, ...], *base: tuple[str, Any]
) -> dict[str, Tensor]:
    case = replace(CASE, groups=((first, dict(base)), (second, dict(base))))
    params: dict[str, Tensor] = run_ranks(2, run, case, 2)[0].params
    return params


@pytest.mark.parametrize(
    "option", sorted(CHANGES.keys() & {*GROUP_OPTIONS, "lr", "betas", "eps", "weight_decay"})
)
def test_option_of_a_group_changes_that_group_alone(option: str) -> None:
    base = {"weight_decay": 0.0} if option == "adapt_without_decay" else {}
    first, second = tuple(SHAPES)[:2], tuple(SHAPES)[2:]
    changed = replace(CASE, groups=((first, base), (second, {**base, option: CHANGES[option]})))
    plain, params = grouped_params(first, second, *base.items()), run_ranks(2, run, changed, 2)[0].params
    differing = {name for name in SHAPES if not torch.equal(plain[name], params[name])}
    assert differing
    assert differing <= set(second)


def _own_gradients(rank: int, stage: int) -> float:
    p = Parameter(torch.ones(5))
    opt = ShardedLamb([p], stage=stage)
    p.grad = torch.full((5,), float(1 + rank) if stage == 2 else 1.5)
    opt.step()
    assert isinstance(p.grad, ReducedGradient) == (stage == 2)
    assert opt.grad_norm is not None
    return opt.grad_norm


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_selects_averaged_or_own_gradients(stage: int) -> None:
    assert run_ranks(2, _own_gradients, stage) == pytest.approx([1.5 * 5**0.5] * 2)


@pytest.mark.parametrize(("bucket_mb", "buckets"), [(32, 1), (0.0001, 4), (0.0021, 2)])
def test_bucket_mb_sets_the_number_of_buckets(bucket_mb: float, buckets: int) -> None:
    outcome = run_ranks(2, run, replace(CASE, settings={"bucket_mb": bucket_mb}), 2)[0]
    assert outcome.calls["all_gather"] == buckets * CASE.steps


def _sent_before_the_last_gradient(rank: int, overlap: bool) -> list[int]:
    """Buckets launched before the gradient of the first layer, which is last in backward."""
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(4)))
    opt = ShardedLamb(model.named_parameters(), stage=2, overlap=overlap, bucket_mb=0.001)
    seen: list[int] = []
    first: Any = model[0].weight
    first.register_hook(lambda grad: seen.append(opt.traffic.calls["reduce_scatter"]))
    for _ in range(2):
        model(torch.ones(1, 20)).sum().backward()
        opt.step()
        opt.zero_grad()
    return seen


def test_overlap_reduces_while_backward_runs() -> None:
    assert run_ranks(2, _sent_before_the_last_gradient, True) == [[3, 7]] * 2
    assert run_ranks(2, _sent_before_the_last_gradient, False) == [[0, 4]] * 2


def _with_nan(rank: int, options: dict[str, Any], steps: int) -> tuple[Tensor, int, str]:
    p = Parameter(torch.ones(5))
    opt = ShardedLamb([("the.weight", p)], stage=2, **options)
    raised = ""
    for _ in range(steps):
        p.grad = torch.full((5,), float("nan") if rank == 1 else 1.0)
        try:
            opt.step()
        except RuntimeError as error:
            raised = str(error)
        opt.zero_grad()
    return p.detach().clone(), opt.skipped_steps, raised


def test_skip_nonfinite() -> None:
    for p, skipped, raised in run_ranks(2, _with_nan, {}, 3):
        assert torch.equal(p, torch.ones(5))
        assert (skipped, raised) == (3, "")
    for p, skipped, _ in run_ranks(2, _with_nan, {"skip_nonfinite": False}, 1):
        assert p.isnan().all()
        assert skipped == 0


def test_max_consecutive_skips() -> None:
    for limit, steps, fails in ((2, 2, False), (2, 3, True), (4, 4, False)):
        for _, _, raised in run_ranks(2, _with_nan, {"max_consecutive_skips": limit}, steps):
            assert bool(raised) == fails
            assert not fails or ("the.weight" in raised and "max_consecutive_skips=2" in raised)


@pytest.mark.parametrize("name", kernels.available())
def test_kernel_selects_the_backend(name: str) -> None:
    """All give the same bits, so only the name differs."""
    params, plain = params_with(kernel=name), params_with(kernel="torch")
    assert all(torch.equal(params[key], plain[key]) for key in SHAPES)
    assert run_ranks(2, _kernel, name) == [name, name]


def _kernel(rank: int, name: str) -> str:
    return ShardedLamb([Parameter(torch.ones(3))], kernel=name)._kernel.name


@pytest.mark.parametrize("asked", ["fastest", "fused", "triton"])
def test_errors_name_an_unavailable_kernel(asked: str) -> None:
    error = RuntimeError if asked == "triton" else ValueError
    with pytest.raises(error, match=f"kernel .*{asked}"):
        ShardedLamb([torch.nn.Parameter(torch.ones(3))], kernel=asked)
