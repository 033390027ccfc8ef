"""Calls in unusual orders: each once gave a wrong number or a crash."""

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.optim.skips import DivergedError
from tests.harness import run_ranks

BOTH = pytest.mark.parametrize("cls", [Lamb, ShardedLamb])


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(6, 5, generator=generator)).square().mean()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def after_one_step(**options: Any) -> tuple[list[torch.Tensor], float | None]:
    model = small_model()
    opt = ShardedLamb(model.named_parameters(), **options)
    loss_of(model).backward()
    opt.step()
    return weights(model), opt.grad_norm


def same(model: nn.Module, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def test_autograd_grad_starts_no_reduction() -> None:
    model = small_model()
    opt = ShardedLamb(model.named_parameters(), stage=2)
    loss_of(model).backward()
    before = dict(opt.traffic.calls), opt._gradients.rounds
    torch.autograd.grad(loss_of(model, 1), list(model.parameters()))
    opt.step()
    assert (dict(opt.traffic.calls), opt._gradients.rounds) == before
    assert same(model, after_one_step(stage=2)[0])


@BOTH
def test_backward_through_a_graph_from_before_the_step_is_an_error(cls: type) -> None:
    model = small_model()
    opt = cls(model.named_parameters())
    loss_of(model).backward()
    stale = loss_of(model)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_unscaling_before_stage_2_has_reduced_is_an_error() -> None:
    model = small_model()
    opt = ShardedLamb(model.named_parameters(), stage=2)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
    scaler.scale(loss_of(model)).backward()
    with opt.no_sync():
        scaler.scale(loss_of(model, 1)).backward()
    with pytest.raises(RuntimeError, match=r"not reduced.*outside no_sync\(\)"):
        scaler.step(opt)


def test_stage_1_clipping_before_unscaling_takes_the_unscaled_gradients() -> None:
    model = small_model()
    opt = ShardedLamb(model.named_parameters())
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    opt.clip_grad_norm_(1e9)
    scaler.unscale_(opt)
    scaler.step(opt)
    assert opt.grad_norm == pytest.approx(after_one_step()[1], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_group_may_be_added_between_backward_and_step(stage: int) -> None:
    model, extra = small_model(), nn.Parameter(torch.ones(3))
    opt = ShardedLamb(model.named_parameters(), stage=stage)
    loss_of(model).backward()
    opt.add_param_group({"params": [("extra", extra)]})
    opt.step()
    assert same(model, after_one_step(stage=stage)[0])
    assert torch.equal(extra.detach(), torch.ones(3))


def test_clipping_includes_unfrozen_parameters() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    opt = ShardedLamb(model.named_parameters())
    model[0].weight.requires_grad_(True)
    loss_of(model).backward()
    assert opt.clip_grad_norm_(1.0).item() == pytest.approx(after_one_step()[1], rel=1e-6)


def test_clipping_with_everything_frozen_is_zero() -> None:
    opt = ShardedLamb(small_model().requires_grad_(False).named_parameters())
    assert opt.clip_grad_norm_(1.0).item() == 0


def state_in_flight(rank: int, loads: bool) -> tuple[float, float]:
    """Sums of a first moment: before, and after a transfer of the state while rank 1 alone has sent gradients."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=2)

    def backward() -> None:
        model(torch.ones(2, 64)).sum().backward()

    backward()
    opt.step()
    opt.zero_grad()
    before = opt.full_state_dict()
    if rank == 1:
        backward()
    if loads:
        opt.load_full_state_dict(before)
    after = opt.full_state_dict()
    opt.step()
    sums = [float(state["state"][0]["exp_avg"].sum()) if state else 0.0 for state in (before, after)]
    return sums[0], sums[1]


@pytest.mark.parametrize("loads", [False, True])
def test_state_travels_beside_gradients_that_one_rank_has_sent(loads: bool) -> None:
    before, after = run_ranks(2, state_in_flight, loads, timeout=60)[0]
    assert before == after


def test_the_models_zero_grad_after_no_sync_drops_reduced_gradients() -> None:
    def narrow() -> tuple[nn.Module, ShardedLamb]:
        torch.manual_seed(3)  # backward reaches the smallest parameter's layer last
        model = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 4))
        return model, ShardedLamb(model.named_parameters(), stage=2)

    model, opt = narrow()
    loss_of(model, 1).backward()
    with opt.no_sync():
        loss_of(model, 2).backward()
    model.zero_grad()
    expected, fresh = narrow()
    for each, optimizer in ((model, opt), (expected, fresh)):
        loss_of(each).backward()
        optimizer.step()
    assert same(model, weights(expected))


@BOTH
def test_loaded_patterns_take_effect_and_lr_tensors_are_copied(cls: type) -> None:
    source = cls(small_model().named_parameters(), lr=torch.tensor(0.1), exclude_from_weight_decay=["bias$"])
    steps = []
    for patterns in ([], ["bias$"]):
        model = small_model()
        opt = cls(model.named_parameters(), lr=0.1, exclude_from_weight_decay=patterns, bias_correction=False)
        if not patterns:
            opt.load_state_dict({**opt.state_dict(), "param_groups": source.state_dict()["param_groups"]})
            assert opt.param_groups[0]["lr"] is not source.param_groups[0]["lr"]
            opt.param_groups[0].update(bias_correction=False)
        loss_of(model).backward()
        opt.step()
        steps.append(weights(model))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(*steps, strict=True))


def test_loading_resets_the_skips_in_a_row() -> None:
    model = small_model()
    opt = ShardedLamb(model.named_parameters(), max_consecutive_skips=1)
    good = copy.deepcopy(opt.state_dict())
    (loss_of(model) * torch.inf).backward()
    opt.step()
    with pytest.raises(DivergedError, match="1 steps in a row"):
        opt.step()
    opt.load_state_dict(good)
    opt.zero_grad()
    loss_of(model).backward()
    opt.step()
    assert same(model, after_one_step()[0])


@BOTH
def test_a_rejected_group_changes_nothing(cls: type) -> None:
    opt = cls(small_model().named_parameters())
    extra = ("extra", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="matches no parameter"):
        opt.add_param_group({"params": [extra], "exclude_from_weight_decay": ["nothing"]})
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        opt.add_param_group({"params": [extra], "weight_decey": 0.5})
    assert len(opt.param_groups) == 1


@BOTH
def test_bias_correction_rejects_numbers(cls: type) -> None:
    with pytest.raises(ValueError, match="bias_correction must be True, False or"):
        cls(small_model().named_parameters(), bias_correction=1)


@BOTH
def test_a_variant_with_another_clip_can_be_copied(cls: type) -> None:
    model = small_model()
    opt = cls(model.named_parameters(), variant="apex", max_grad_norm=2.0)
    assert copy.deepcopy(opt).max_grad_norm == 2.0


def timeouts(rank: int) -> tuple[Any, Any]:
    opt = ShardedLamb(small_model().named_parameters())
    groups = dist.group.WORLD, opt._collectives.everyone.pg
    world, own = (group._get_backend(torch.device("cpu")).options._timeout for group in groups)
    return world, own


def test_process_groups_have_the_users_timeout() -> None:
    for world, own in run_ranks(2, timeouts):
        assert world != timedelta(minutes=30), "gloo's default would prove nothing"
        assert own == world
