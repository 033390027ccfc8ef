"""``gather_dtype``: masters have the bits of a run without it, and all ranks hold the same rounding of them.

Gradients are equal on all ranks and have few bits, so that their average is exact on any number of ranks.
"""

import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from tests import training
from tests.comm.wire_oracle import received
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim.fsdp_models import Tree
from tests.pairs import pairs

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "bucket_mb": 0.002}
Weights = dict[str, Tensor]


def few_bits(value: Tensor) -> Tensor:
    return value.bfloat16().float()


def take_step(opt: Any, params: dict[str, Parameter], stage: int, step: int, pull: float = 0.0) -> None:
    """``pull``: gradients depend on the weights that the ranks hold."""
    grads: dict[str, Tensor | None] = {
        name: few_bits(training.draw(tuple(p.shape), "gradient", name, step) + pull * p.detach())
        for name, p in params.items()
    }
    if step == 1:
        grads["norm.bias"] = None
    training.train(opt, params, stage=stage, rank=0, world=1, steps=[step], gradients=lambda *_: grads)


def masters_of(opt: Any, params: dict[str, Parameter]) -> Weights | None:
    """Whole masters on the first rank, or the weights if there are none."""
    full = opt.full_state_dict()
    if full is None:
        return None
    return {
        name: full["state"][i].get("master", p.detach().clone()) for i, (name, p) in enumerate(params.items())
    }


Trained = tuple[Weights, Weights | None]


def trained(
    rank: int,
    gather: torch.dtype | None,
    stage: int,
    dtype: torch.dtype,
    event: Callable[[int, Any, dict[str, Parameter]], None] | None = None,
    mesh: tuple[int, ...] = (),
    **options: Any,
) -> Trained:
    """(this rank's weights, masters) after 5 steps; ``event`` happens before the fourth."""
    params = training.parameters(dtype=dtype)
    if mesh:
        options["mesh"] = init_device_mesh("cpu", mesh)
    opt = ShardedLamb(params.items(), stage=stage, gather_dtype=gather, **{**OPTIONS, **options})
    for step in range(5):
        if step == 3 and event is not None:
            event(rank, opt, params)
        take_step(opt, params, stage, step)
    assert opt.memory()["staging"] == (0 if stage == 1 else opt._gradients.staging_bytes())
    return training.copies(params), masters_of(opt, params)


@cache
def exact(stage: int, dtype: torch.dtype, *options: tuple[str, Any]) -> Weights:
    """Masters without compressed gathers, on one rank."""
    masters = trained(0, None, stage, dtype, **dict(options))[1]
    assert masters is not None
    return masters


def check(results: list[Trained], masters: Weights, gather: torch.dtype, dtype: torch.dtype) -> None:
    assert results[0][1] is not None
    training.assert_same_bits(results[0][1], masters)
    for weights, _ in results:
        for name, value in weights.items():
            assert torch.equal(value, received(masters[name].to(dtype), gather)), name


@pairs(gather=[BF16, FP8], dtype=[torch.float32, BF16, torch.float16], stage=[1, 2], world=[1, 2, 3, 4])
def test_masters_are_exact_and_weights_are_their_rounding(
    gather: torch.dtype, dtype: torch.dtype, stage: int, world: int
) -> None:
    """So the bits are the same at every world size, and on every rank."""
    results = run_ranks(world, trained, gather, stage, dtype)
    if gather == BF16 and dtype != torch.float32:  # nothing to compress
        training.assert_same_bits(results[0][1], exact(stage, dtype))
        return
    check(results, exact(stage, dtype), gather, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "lars"},
        {"variant": "lans"},
        {"caution": True},
        {"ratio_blocks": {"fc.weight": "dim0"}},
        {"kernel": "torch"},
        {"master_dtype": torch.float64},
    ],
    ids=str,
)
def test_every_rule_and_kernel(options: dict[str, Any]) -> None:
    masters = trained(0, None, 1, torch.float32, **options)[1]
    assert masters is not None
    check(run_ranks(2, trained, FP8, 1, torch.float32, **options), masters, FP8, torch.float32)


def test_replicas_of_shards() -> None:
    check(
        run_ranks(4, trained, FP8, 2, torch.float32, mesh=(2, 2)), exact(2, torch.float32), FP8, torch.float32
    )


def test_float64_travels_as_it_is() -> None:
    plain, compressed = (run_ranks(2, trained, gather, 1, torch.float64) for gather in (None, FP8))
    training.assert_same_bits(compressed[1][0], plain[1][0])


# -- weights that the user writes ----------------------------------------------------------------------


def writes(rank: int, opt: Any, params: dict[str, Parameter]) -> None:
    """Elements of both ranks: one far above its block, one as it was, one that a NaN's neighbors would not survive."""
    with torch.no_grad():
        weight = params["embed.weight"]
        weight[0, 0], weight[-1, -1], weight[5, 5] = 3e4, -5e3, weight[5, 5].clone()
        params["scale"].fill_(0.3)


def replaces(rank: int, opt: Any, params: dict[str, Parameter]) -> None:
    """The parameter's memory, with the same values but one."""
    value = params["fc.weight"].detach().clone()
    value[3, 3] = 700.0
    params["fc.weight"].data = value


def skips(rank: int, opt: Any, params: dict[str, Parameter]) -> None:
    writes(rank, opt, params)
    for name, p in params.items():
        p.grad = torch.full_like(p, torch.nan if name == "scale" else 1.0)
    opt.step()
    assert opt.skipped_steps == 1
    opt.zero_grad()


def fails(rank: int, opt: Any, params: dict[str, Parameter]) -> None:
    """Ranks disagree after masters were compared with weights; in a run on one rank, the kernels alone fail so."""
    writes(rank, opt, params)
    sum_norms = type(opt)._sum_norms

    def raises(*_: Any) -> None:
        raise ValueError("planted")

    type(opt)._sum_norms = raises
    try:
        with pytest.raises(ValueError, match="planted"):
            take_step(opt, params, 1, 77)
    finally:
        type(opt)._sum_norms = sum_norms
    opt.zero_grad()


@pairs(
    event=[writes, replaces, skips, fails],
    gather=[BF16, FP8],
    dtype=[torch.float32, BF16],
)
def test_a_weight_that_the_user_writes_is_respected_and_only_it(
    event: Any, gather: torch.dtype, dtype: torch.dtype
) -> None:
    if gather == BF16 and dtype == BF16:
        return
    masters = trained(0, None, 1, dtype, event)[1]
    assert masters is not None
    assert masters["embed.weight"].equal(exact(1, dtype)["embed.weight"]) == (event is replaces)
    check(run_ranks(2, trained, gather, 1, dtype, event), masters, gather, dtype)


def evaluates(rank: int, opt: Any, params: dict[str, Parameter]) -> None:
    """The average is gathered exactly: in fp32 it is that of a run without compression."""
    writes(rank, opt, params)
    before = training.copies(params)
    with opt.averaged():
        for p in params.values():
            shown.append(p.detach().clone())
    training.assert_same_bits(training.copies(params), before)


shown: list[Tensor] = []


def averaged(rank: int, gather: torch.dtype | None) -> tuple[Trained, list[Tensor]]:
    shown.clear()
    return trained(rank, gather, 1, torch.float32, evaluates, ema_decay=0.7), list(shown)


def test_averages_are_those_of_masters_and_are_shown_exactly() -> None:
    (_, masters), expected = averaged(0, None)
    results = run_ranks(2, averaged, FP8)
    for _, average in results:
        assert all(map(torch.equal, average, expected))
    assert masters is not None
    check([result for result, _ in results], masters, FP8, torch.float32)


def joined(rank: int) -> Trained:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(30, 40))
    params: Any = dict(model.module.named_parameters())
    opt = ShardedLamb(params.items(), gather_dtype=FP8)
    with Join([model, opt]):
        for _ in range(1 + 2 * rank):
            model(torch.ones(2, 30)).square().mean().backward()
            opt.step()
            opt.zero_grad()
    return training.copies(params), masters_of(opt, params)


def test_ranks_that_joined_receive_the_same_weights() -> None:
    first, second = run_ranks(2, joined)
    assert first[1] is not None
    check([first, second], first[1], FP8, torch.float32)


# -- state -----------------------------------------------------------------------------------------------


def built(
    gather: torch.dtype | None, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Any, Any, dict[str, Parameter]]:
    model = Tree({name: (scale * value).to(dtype) for name, value in training.weights().items()})
    params: Any = dict(model.named_parameters())
    return model, ShardedLamb(params.items(), gather_dtype=gather, **OPTIONS), params


Run = tuple[Weights, Weights | None, Weights, Weights | None]
"""Weights and masters when saved or loaded, and at the end."""


def finish(opt: Any, params: dict[str, Parameter], pull: float) -> Run:
    now = training.copies(params), masters_of(opt, params)
    for step in range(3, 5):
        take_step(opt, params, 1, step, pull)
    return *now, training.copies(params), masters_of(opt, params)


def saved(rank: int, folder: Path, gather: torch.dtype | None, dtype: torch.dtype, pull: float) -> Run:
    model, opt, params = built(gather, dtype)
    for step in range(3):
        take_step(opt, params, 1, step, pull)
    checkpoint.save(folder, model, opt)
    return finish(opt, params, pull)


def loaded(rank: int, folder: Path, gather: torch.dtype | None, dtype: torch.dtype, pull: float) -> Run:
    model, opt, params = built(gather, dtype, scale=3.0)
    take_step(opt, params, 1, 97)
    checkpoint.load(folder, model, opt)
    return finish(opt, params, pull)


@pytest.mark.parametrize(("gather", "dtype"), [(BF16, torch.float32), (FP8, torch.float32), (FP8, BF16)])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, gather: torch.dtype, dtype: torch.dtype) -> None:
    """Gradients depend on the rounded weights."""
    before = run_ranks(2, saved, tmp_path / "run", gather, dtype, 0.5)
    after = run_ranks(3, loaded, tmp_path / "run", gather, dtype, 0.5)
    for one, other in zip(before[0], after[0], strict=True):
        training.assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_checkpoints_hold_exact_weights_for_any_other_option(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = exact(1, dtype)
    options = [None, BF16, FP8] if dtype == torch.float32 else [None, FP8]
    for before in options:
        source = run_ranks(2, saved, tmp_path / str(before), before, dtype, 0.0)[0]
        for after in options:
            weights, masters, _, final = run_ranks(2, loaded, tmp_path / str(before), after, dtype, 0.0)[0]
            assert source[1] is not None
            training.assert_same_bits(masters, source[1])
            training.assert_same_bits(final, expected)
            if after != before:
                training.assert_same_bits(weights, {n: value.to(dtype) for n, value in source[1].items()})
    model = Tree(training.weights())
    checkpoint.load(tmp_path / str(FP8), model, Lamb(model.named_parameters()))
    assert source[1] is not None
    training.assert_same_bits(dict(model.named_parameters()), {n: w.float() for n, w in source[1].items()})


def through_state_dicts(rank: int, gather: torch.dtype, local: bool) -> bool:
    model, opt, params = built(gather, torch.float32)
    for step in range(3):
        take_step(opt, params, 1, step, 0.5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = training.through_bytes(opt.local_state_dict() if local else opt.full_state_dict())
    expected = finish(opt, params, 0.5)
    model, opt, params = built(gather, torch.float32, scale=3.0)
    model.load_state_dict(weights)
    if local:
        opt.load_state_dict(state)
    else:
        opt.load_full_state_dict(state)
    resumed = finish(opt, params, 0.5)
    return all(
        one is None or all(torch.equal(one[n], two[n]) for n in one)
        for one, two in zip(expected, resumed, strict=True)
    )


@pytest.mark.parametrize("local", [True, False])
def test_state_dicts_resume_to_the_same_bits(local: bool) -> None:
    assert run_ranks(2, through_state_dicts, FP8, local) == [True, True]


@pytest.mark.parametrize("load", ["load_state_dict", "load_full_state_dict"])
def test_a_state_dict_whose_masters_are_not_loaded_is_reported(
    load: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, opt, params = built(FP8, torch.float32)
    take_step(opt, params, 1, 0)
    state = opt.full_state_dict()
    for gather in (None, BF16):
        caplog.clear()
        _, other, _ = built(gather, torch.float32)
        with caplog.at_level(logging.WARNING, logger="sharded_lamb"):
            getattr(other, load)(state)
        assert ("load the masters into the model" in caplog.text) == (gather is None)


# -- training --------------------------------------------------------------------------------------------


def regression(rank: int, gather: torch.dtype | None) -> tuple[list[float], float]:
    """(root mean square errors before training, after it, and of the masters; ‖X‖ ‖w‖ / √n) of a linear regression."""
    torch.manual_seed(0)
    inputs, model = torch.randn(64, 300), nn.Linear(300, 1, bias=False)
    targets = inputs @ (model.weight.detach().T + 0.02 * torch.randn(300, 1))
    opt = ShardedLamb(model.named_parameters(), weight_decay=0.0, gather_dtype=gather)
    start = model.weight.detach().clone()
    for step in range(30):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / 30)
        (model(inputs) - targets).square().mean().backward()
        opt.step()
        opt.zero_grad()
    masters = masters_of(opt, {"weight": model.weight})
    assert masters is not None
    errors = [
        float((inputs @ w.T - targets).norm() / 8) for w in (start, model.weight.detach(), masters["weight"])
    ]
    return errors, float(torch.linalg.matrix_norm(inputs, 2) * masters["weight"].norm() / 8)


@pytest.mark.parametrize(("gather", "relative"), [(BF16, 2.0**-8), (FP8, 2.0**-4)], ids=str)
def test_30_steps_end_near_exact_training(gather: torch.dtype, relative: float) -> None:
    """Weights that are off by ε ‖w‖ are off by at most ε ‖X‖ ‖w‖ / √n in the error. That is once in the error itself,
    and once in the residuals from which gradients were computed."""
    (before, exact_error, _), _ = regression(0, None)
    (_, error, of_masters), size = regression(0, gather)
    assert exact_error < before / 4
    assert abs(error - of_masters) <= relative * size
    assert abs(error - exact_error) <= 2 * relative * size
    assert error < before


# -- refused ---------------------------------------------------------------------------------------------


def with_dtensors(rank: int) -> None:
    model = nn.Linear(8, 8)
    fully_shard(model)
    ShardedLamb(model.named_parameters(), gather_dtype=BF16)


def of_some_ranks(rank: int) -> None:
    ShardedLamb(nn.Linear(8, 8).named_parameters(), gather_dtype=BF16 if rank else None)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (with_dtensors, "'weight', a DTensor: FSDP2 gathers it.*MixedPrecisionPolicy"),
        (of_some_ranks, "gather_dtype"),
    ],
)
def test_what_cannot_be_compressed_is_an_error_on_every_rank(case: Any, why: str) -> None:
    for kind, message in run_ranks_expecting_errors(2, case).values():
        assert kind == "ValueError"
        assert re.search(why, message), message


def test_slices_saved_without_the_option_are_loaded_with_it() -> None:
    """Masters begin as the model's weights, which are exact."""

    def made(**option: Any) -> tuple[Parameter, ShardedLamb]:
        p = Parameter(torch.linspace(-1, 1, 300))
        return p, ShardedLamb([("w", p)], lr=0.1, **option)

    p, opt = made()
    p.grad = torch.linspace(1, -2, 300)
    opt.step()
    q, other = made(gather_dtype=torch.bfloat16)
    q.data.copy_(p.detach())
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[q]["exp_avg"], opt.state[p]["exp_avg"])
    assert torch.equal(other.state[q]["master"], p.detach())
