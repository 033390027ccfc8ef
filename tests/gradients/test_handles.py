"""``.grad`` after stage 2's backward: the truth, NaN or an error, and edits that the next step follows."""

import copy
import gc
import pickle
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.gradients import reducer
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.pairs import pairs

LR = 0.02
Gradients = dict[str, Tensor | None]
Params = dict[str, nn.Parameter]


def branching(rank: int, step: int) -> Gradients:
    """Rank 1 lacks fc.bias, every rank norm.bias."""
    grads = training.own_gradients(rank, step)
    if rank == 1:
        grads["fc.bias"] = None
    grads["norm.bias"] = None
    return grads


DRAWS = {"all": training.own_gradients, "branches": branching}


# -- edits: of .grad, and the same of the averaged gradient -----------------------------------------------------------


def take_away(params: Params, opt: ShardedLamb, rank: int) -> None:
    params["fc.weight"].grad = params["fc.bias"].grad = None


def taken_away(grads: Gradients) -> Gradients:
    return {**grads, "fc.weight": None, "fc.bias": None}


def zero(params: Params, opt: ShardedLamb, rank: int) -> None:
    assert params["fc.weight"].grad is not None
    params["fc.weight"].grad.zero_()


def zeroed(grads: Gradients) -> Gradients:
    return {**grads, "fc.weight": torch.zeros(training.SHAPES["fc.weight"], dtype=torch.float64)}


def scale(params: Params, opt: ShardedLamb, rank: int) -> None:
    embed, norm, fc = (params[name].grad for name in ("embed.weight", "norm.weight", "fc.weight"))
    assert embed is not None
    assert norm is not None
    assert fc is not None
    embed.data.mul_(torch.tensor(0.5))
    norm.div_(4)
    params["fc.weight"].grad = fc * 2


def scaled(grads: Gradients) -> Gradients:
    by = {"embed.weight": 0.5, "norm.weight": 0.25, "fc.weight": 2.0}
    return {name: None if grad is None else grad * by.get(name, 1.0) for name, grad in grads.items()}


def clip(params: Params, opt: ShardedLamb, rank: int) -> None:
    nn.utils.clip_grad_norm_(params.values(), 0.5)


def clipped(grads: Gradients) -> Gradients:
    norm = torch.stack([grad.norm() for grad in grads.values() if grad is not None]).norm()
    return {
        name: None if grad is None else grad * min(1.0, 0.5 / float(norm)) for name, grad in grads.items()
    }


def clip_and_take_away(params: Params, opt: ShardedLamb, rank: int) -> None:
    opt.clip_grad_norm_(0.5)
    take_away(params, opt, rank)


def log_on_one_rank_and_take_away(params: Params, opt: ShardedLamb, rank: int) -> None:
    """The first rank makes all-reduce (a) before the edit, the others after it."""
    if rank == 0:
        assert params["fc.weight"].grad is not None
        assert params["fc.weight"].grad.norm() > 0
    take_away(params, opt, rank)


EDITS: dict[str, tuple[Callable[[Params, ShardedLamb, int], None], Callable[[Gradients], Gradients]]] = {
    "taken away": (take_away, taken_away),
    "zeroed": (zero, zeroed),
    "scaled": (scale, scaled),
    "clipped by torch": (clip, clipped),
    "clipped, then taken away": (clip_and_take_away, lambda grads: taken_away(clipped(grads))),
    "read on one rank, then taken away": (log_on_one_rank_and_take_away, taken_away),
}


def train_edited(rank: int, edit: str, draw: str) -> dict[str, Tensor]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=0.002)
    for step in range(4):
        training.backward(params, DRAWS[draw](rank, step))
        EDITS[edit][0](params, opt, rank)
        opt.step()
        opt.zero_grad()
    return training.copies(params)


@pairs(edit=[*EDITS], world=[1, 2, 3], draw=[*DRAWS])
def test_the_step_follows_edits(edit: str, world: int, draw: str) -> None:
    averages = [training.average(DRAWS[draw](r, step) for r in range(world)) for step in range(4)]
    edited = [EDITS[edit][1](grads) for grads in averages]
    oracle = training.oracle_run(training.weights(), edited, lr=LR)
    for weights in run_ranks(world, train_edited, edit, draw):
        training.assert_follows(weights, oracle)


def accumulate_after_edits(rank: int) -> dict[str, Tensor]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=0.002)
    for step in range(0, 6, 2):
        training.backward(params, training.own_gradients(rank, step))
        params["fc.weight"].grad = None
        assert params["norm.weight"].grad is not None
        params["norm.weight"].grad.zero_()
        assert params["embed.weight"].grad is not None
        params["embed.weight"].grad.mul_(0.5)
        training.backward(params, training.own_gradients(rank, step + 1))
        opt.step()
        opt.zero_grad()
    return training.copies(params)


def test_gradients_add_to_what_edits_left() -> None:
    by = {"fc.weight": 0.0, "norm.weight": 0.0, "embed.weight": 0.5}
    sums = []
    for step in range(0, 6, 2):
        first, second = (
            training.average(training.own_gradients(r, s) for r in range(2)) for s in (step, step + 1)
        )
        sums.append({name: grad * by.get(name, 1.0) + second[name] for name, grad in first.items()})  # type: ignore[operator]
    oracle = training.oracle_run(training.weights(), sums, lr=LR)
    for weights in run_ranks(2, accumulate_after_edits):
        training.assert_follows(weights, oracle)


# -- reads -----------------------------------------------------------------------------------------------------------


def read_norms(rank: int) -> dict[str, float | None]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=0.002)
    training.backward(params, branching(rank, 0))
    grads = {name: p.grad for name, p in params.items()}
    norms = {name: None if grad is None else float(grad.detach().norm(2)) for name, grad in grads.items()}
    present = [p.grad for p in params.values() if p.grad is not None]
    total = float(nn.utils.get_total_norm(present))
    opt.step()
    assert opt.grad_norm == pytest.approx(total, rel=1e-6)
    assert params["norm.bias"].grad is None
    assert params["fc.bias"].grad is not None
    return norms


@pytest.mark.parametrize("world", [1, 2, 3])
def test_norms_are_those_of_the_averages(world: int) -> None:
    averages = training.average(branching(r, 0) for r in range(world))
    for norms in run_ranks(world, read_norms):
        for name, grad in averages.items():
            assert (norms[name] or 0.0) == pytest.approx(
                0.0 if grad is None else float(grad.norm()), rel=1e-6
            ), name


def one_rank_model() -> tuple[nn.Linear, ShardedLamb]:
    torch.manual_seed(0)
    model = nn.Linear(6, 9)
    opt = ShardedLamb(model.named_parameters(), lr=LR, stage=2)
    model(torch.randn(4, 6)).square().mean().backward()
    return model, opt


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "sum": torch.sum,
    "max norm": lambda g: g.norm(torch.inf),
    "norms of rows": lambda g: g.norm(dim=1).sum(),
    "mean": lambda g: g.float().mean(),
    "squares": lambda g: (g**2).sum(),
    "an element": lambda g: g[0, 0].item(),
    "joined": lambda g: torch.cat([g.view(-1), g.view(-1)]).norm(),
    "cosine": lambda g: torch.cosine_similarity(g.flatten(), g.flatten(), dim=0),
    "an edited copy": lambda g: g.clone().add_(1).norm(),
}


@pytest.mark.parametrize("read", UNKNOWN)
def test_other_values_are_nan(read: str) -> None:
    model, opt = one_rank_model()
    assert model.weight.grad is not None
    with pytest.warns(
        RuntimeWarning, match="aten.* reads the values of a gradient that stage=2 has reduced and freed"
    ):
        assert torch.as_tensor(UNKNOWN[read](model.weight.grad)).isnan()
    assert model.weight.grad.norm() > 0
    opt.step()
    assert model.weight.isfinite().all()


def edit_an_element(g: Tensor) -> None:
    g[0] = 0


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "noise": lambda p, g: g.add_(torch.randn_like(g)),
    "mask": lambda p, g: g.mul_(torch.ones(9, 6)),
    "an element": lambda p, g: edit_an_element(g),
    "a row": lambda p, g: g[0].mul_(2),
    "values clipped": lambda p, g: nn.utils.clip_grad_value_([p], 0.1),
    "clipped by another norm": lambda p, g: nn.utils.clip_grad_norm_([p], 0.1, norm_type=torch.inf),
    "SAM's ascent": lambda p, g: p.add_(g * (0.05 / g.norm())),
    "another optimizer": lambda p, g: torch.optim.SGD([p], lr=0.1).step(),
    "copied out": lambda p, g: torch.zeros(9, 6).copy_(g),
    "compared": lambda p, g: torch.isnan(g),
    "saved": lambda p, g: pickle.dumps(g),
}


@pytest.mark.parametrize("use", REFUSED)
def test_what_cannot_be_nan_is_an_error_that_changes_nothing(use: str) -> None:
    (model, opt), (untouched, other) = one_rank_model(), one_rank_model()
    p, grad = model.weight, model.weight.grad
    assert grad is not None
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"'weight', which stage=2 has reduced.*use stage=1"),
    ):
        REFUSED[use](p, grad)
    opt.step()
    other.step()
    assert torch.equal(model.weight, untouched.weight)


def test_handles_show_copy_and_go_with_their_gradient() -> None:
    model, opt = one_rank_model()
    grad = model.weight.grad
    assert grad is not None
    assert repr(grad).startswith("ReducedGradient(of 'weight'")
    assert torch.zeros_like(grad).sum() == 0
    assert copy.deepcopy(model).weight.grad is None
    opt.step()
    opt.zero_grad()
    assert grad.norm().isnan()
    with pytest.raises(RuntimeError, match="zeroed or replaced since"):
        grad.mul_(2)


def test_a_model_outlives_its_optimizer() -> None:
    model, opt = one_rank_model()
    grad = model.weight.grad
    assert grad is not None
    del opt
    gc.collect()
    assert model.weight.grad is None
    assert grad.norm().isnan()
    model(torch.ones(1, 6)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()


def test_lookahead_sees_every_parameter() -> None:
    """timm's and others' Lookahead keeps slow weights of parameters whose .grad is not None after the step."""

    def trained(make: Callable[..., Any]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        opt, slow = make(model.named_parameters()), {}
        for step in range(4):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            opt.step()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        kept = slow.setdefault(p, p.detach().clone())
                        p.copy_(kept.add_(p - kept, alpha=0.5))
            opt.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    expected = trained(lambda named: Lamb(named, lr=LR))
    torch.testing.assert_close(trained(lambda named: ShardedLamb(named, lr=LR, stage=2)), expected)


# -- mistakes --------------------------------------------------------------------------------------------------------


def edit_on_one_rank(rank: int, edit: str) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2)
    training.backward(params, training.own_gradients(rank, 0))
    if rank == 1:
        EDITS[edit][0](params, opt, rank)
    opt.step()


@pytest.mark.parametrize(
    ("edit", "named"), [("taken away", "set to None, 0"), ("zeroed", "zeroed, 0"), ("scaled", "scaled by")]
)
def test_edits_on_one_rank_only_are_an_error_on_all(edit: str, named: str) -> None:
    for kind, message in run_ranks_expecting_errors(3, edit_on_one_rank, edit, timeout=60).values():
        assert kind == "ValueError"
        assert re.search(
            rf"edits of \.grad of '.*: rank 0 has 'none, 0', rank . has .*: '{named}", message
        ), message


def assign(params: Params) -> None:
    params["fc.weight"].grad = torch.ones_like(params["fc.weight"])


def assign_a_changed_copy(params: Params) -> None:
    """As PCGrad."""
    grad = params["fc.weight"].grad
    assert grad is not None
    params["fc.weight"].grad = grad.clone() - grad.clone()


def assign_after_backward(rank: int, assigned: Callable[[Params], None], then: str) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2)
    training.backward(params, training.own_gradients(rank, 0))
    assigned(params)
    opt.step() if then == "step" else training.backward(params, training.own_gradients(rank, 1))


@pytest.mark.parametrize("then", ["step", "backward"])
@pytest.mark.parametrize("assigned", [assign, assign_a_changed_copy])
def test_gradients_assigned_after_backward_are_an_error(
    assigned: Callable[[Params], None], then: str
) -> None:
    for kind, message in run_ranks_expecting_errors(2, assign_after_backward, assigned, then).values():
        assert kind == "RuntimeError"
        assert "the .grad of 'fc.weight' was assigned while stage=2 holds its reduced gradient" in message


def raise_beside_a_rank_that_waits(rank: int) -> str:
    """Rank 1 has sent buckets that rank 0, which waits in a collective of its own, never receives."""
    params, message = training.parameters(), ""
    opt = ShardedLamb(params.items(), lr=LR, stage=2)
    if rank == 1:
        training.backward(params, training.own_gradients(rank, 0))
        assign(params)
        with mock.patch.object(reducer, "GRACE", 0.2), pytest.raises(RuntimeError) as error:
            training.backward(params, training.own_gradients(rank, 1))
        message = str(error.value)
    dist.barrier()
    del opt
    return message


def test_an_error_is_raised_though_another_rank_sends_nothing() -> None:
    assert "was assigned while stage=2" in run_ranks(2, raise_beside_a_rank_that_waits, timeout=30)[1]


def step_with_a_foreign_handle(rank: int, whose: str) -> None:
    """``whose``: of an earlier step's gradient, or of another optimizer's."""
    params, others = training.parameters(), training.parameters()
    opt = ShardedLamb(params.items(), lr=LR, stage=2)
    other = ShardedLamb(others.items(), lr=LR, stage=2)
    for own in (params, others):
        training.backward(own, training.own_gradients(rank, 0))
    handle = (params if whose == "earlier" else others)["fc.weight"].grad
    opt.step()
    other.step()
    opt.zero_grad()
    params["fc.weight"].grad = handle
    opt.step()


@pytest.mark.parametrize("whose", ["earlier", "another optimizer's"])
def test_a_handle_of_another_gradient_is_an_error(whose: str) -> None:
    for kind, message in run_ranks_expecting_errors(2, step_with_a_foreign_handle, whose).values():
        assert kind == "RuntimeError"
        assert "the .grad of 'fc.weight' was assigned" in message


def test_a_gradient_of_another_optimizer_that_is_nan_makes_the_clipped_ones_nan() -> None:
    """As torch's clip_grad_norm_ does over parameters of several optimizers: both skip."""
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizers = [ShardedLamb(part.named_parameters(), stage=2) for part in model]
    before = training.copies(dict(model.named_parameters()))
    (model[0](torch.ones(1, 3)).sum() + model[1](torch.full((1, 3), torch.nan)).sum()).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).isnan()
    for opt in optimizers:
        opt.step()
        assert opt.skipped_steps == 1
    training.assert_same_bits(training.copies(dict(model.named_parameters())), before)
