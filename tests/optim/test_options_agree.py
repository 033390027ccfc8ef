"""Options that differ over ranks after construction: an error on every rank in that step, and no weight changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import fully_shard

from sharded_lamb import ShardedLamb
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.step_agreement import LANES, SLOTS, StepAgreement
from sharded_lamb.comm.topology import Topology
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

SHAPES = {"weight": (37, 23), "bias": (37,)}
Edit = Callable[[ShardedLamb], None]


def group(**options: Any) -> Edit:
    def edit(opt: ShardedLamb) -> None:
        opt.param_groups[0].update(options)

    return edit


def clip(opt: ShardedLamb) -> None:
    opt.max_grad_norm = 0.5


EDITS: dict[str, tuple[Edit, str]] = {
    "lr": (group(lr=0.25), "0.25"),
    "lr that is a tensor": (group(lr=torch.tensor(0.25)), "0.25"),
    "the last bit of lr": (group(lr=0.01 * (1 + 2**-52)), "0.010000000000000002"),
    "betas": (group(betas=(0.9, 0.99)), "(0.9, 0.99)"),
    "eps": (group(eps=1e-3), "0.001"),
    "weight_decay": (group(weight_decay=0.125), "0.125"),
    "trust_clip": (group(trust_clip=(0.0, 4.0)), "(0.0, 4.0)"),
    "adapt_without_decay": (group(adapt_without_decay=False), "False"),
    "exclude_from_layer_adaptation": (group(exclude_from_layer_adaptation=("all",)), "'all'"),
    "exclude_from_weight_decay": (group(exclude_from_weight_decay=("bias",)), "'bias'"),
    "max_grad_norm": (clip, "0.5"),
    "an invalid value": (group(eps=0.0), "eps must be a finite number > 0"),
    "patterns that match nothing": (group(exclude_from_weight_decay=("bais",)), "'bais'"),
}


def optimizer(stage: int) -> tuple[dict[str, Tensor], ShardedLamb]:
    if stage < 3:
        params: dict[str, Tensor] = dict(training.parameters(SHAPES))
        return params, ShardedLamb(params.items(), lr=0.01, stage=stage)
    model = nn.Linear(23, 37)
    fully_shard(model)
    return dict(model.named_parameters()), ShardedLamb(model.named_parameters(), lr=0.01)


def local(p: Tensor) -> Tensor:
    return (p.to_local() if hasattr(p, "to_local") else p).detach().clone()


def differing_on_one_rank(rank: int, unlike: int, stage: int, edit: str) -> None:
    params, opt = optimizer(stage)

    def backward() -> None:
        torch.stack(
            [p.square().sum().full_tensor() if stage == 3 else p.square().sum() for p in params.values()]
        ).sum().backward()

    backward()
    opt.step()
    opt.zero_grad()
    backward()
    if rank == unlike:
        EDITS[edit][0](opt)
    before = [local(p) for p in params.values()]
    try:
        opt.step()
    finally:
        assert all(torch.equal(local(p), old) for p, old in zip(params.values(), before, strict=True))


@pytest.mark.parametrize("edit", EDITS)
def test_a_rank_with_another_option_is_an_error_on_every_rank(edit: str) -> None:
    said = EDITS[edit][1]
    for kind, message in run_ranks_expecting_errors(
        2, differing_on_one_rank, 1, 1, edit, timeout=60
    ).values():
        assert kind == "ValueError"
        assert "ranks disagree on the options of a step" in message
        assert edit.split()[-1] in message or said in message
        assert "rank 0 has" in message
        assert "rank 1 has" in message
        assert said in message


@pytest.mark.parametrize("unlike", [0, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_every_stage_and_whichever_rank_differs(stage: int, unlike: int) -> None:
    errors = run_ranks_expecting_errors(3, differing_on_one_rank, unlike, stage, "lr", timeout=60)
    for kind, message in errors.values():
        assert kind == "ValueError"
        assert "options of group 0: lr: rank 0 has" in message
        assert "0.25" in message


def edited_alike(rank: int, stage: int) -> dict[str, int]:
    params, opt = optimizer(stage)
    opt.param_groups[0]["lr"] = (
        torch.tensor(0.03125) if rank else 0.03125
    )  # equal values, though of another type
    for edit in (group(betas=(0.8, 0.9)), group(exclude_from_weight_decay=("bias",)), clip):
        training.give(params, training.own_gradients(0, 0, SHAPES))  # type: ignore[arg-type]
        before = opt.traffic.calls.copy()
        edit(opt)
        opt.step()
        opt.zero_grad()
    return dict(opt.traffic.calls - before)


def test_equal_edits_are_steps_without_another_collective() -> None:
    assert run_ranks(2, edited_alike, 1) == [{"all_reduce_small": 2, "all_gather": 1}] * 2


def invalid_everywhere(rank: int) -> None:
    _, opt = optimizer(1)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.param_groups[0]["betas"] = (0.9, 1.0)
    opt.step()


def test_an_invalid_value_on_all_ranks_is_named_as_at_construction() -> None:
    for kind, message in run_ranks_expecting_errors(2, invalid_everywhere, timeout=60).values():
        assert kind == "ValueError"
        assert message == "parameter group 0: betas[1] must be a number in [0, 1), got 1.0"


def clipped_unlike(rank: int) -> None:
    params, opt = optimizer(2)
    torch.stack([p.square().sum() for p in params.values()]).sum().backward()
    opt.clip_grad_norm_(1.0 + rank)
    opt.step()


def test_clip_grad_norm_with_another_norm_on_one_rank() -> None:
    for kind, message in run_ranks_expecting_errors(2, clipped_unlike, timeout=60).values():
        assert kind == "ValueError"
        assert "max_norm of clip_grad_norm_: rank 0 has [1.0]" in message


def scaled_unlike(rank: int) -> None:
    params, opt = optimizer(1)
    scaler = GradScaler("cpu", init_scale=2.0 ** (4 + rank))
    torch.stack([scaler.scale(p.square().sum()) for p in params.values()]).sum().backward()
    for p in params.values():  # as averaging leaves them
        p.grad = torch.ones_like(p)
    scaler.step(opt)


def test_grad_scalers_with_other_scales() -> None:
    for kind, message in run_ranks_expecting_errors(2, scaled_unlike, timeout=60).values():
        assert kind == "ValueError"
        assert "scale of GradScaler: rank 0 has 16.0" in message


def clips_on_one_rank(
    rank: int, before: float | None, after: float | None, unlike: tuple[int, ...]
) -> Tensor:
    """Without ``skip_nonfinite``, whether a step clips decides which messages it sends."""
    torch.manual_seed(0)
    model = nn.Linear(23, 37)
    fully_shard(model)
    opt = ShardedLamb(model.named_parameters(), lr=0.01, skip_nonfinite=False, max_grad_norm=before)
    for step in range(6):
        model(training.draw((4, 23), step)).square().sum().backward()
        if step == 3 and rank in unlike:
            opt.max_grad_norm = after
        opt.step()
        opt.zero_grad()
    weight: Any = model.weight
    return weight.full_tensor().detach()


@pytest.mark.parametrize(("before", "after"), [(None, 0.5), (0.5, None)])
def test_ranks_that_would_send_other_messages(before: float | None, after: float | None) -> None:
    errors = run_ranks_expecting_errors(2, clips_on_one_rank, before, after, (1,), timeout=60)
    for kind, message in errors.values():
        assert kind == "ValueError"
        assert f"max_grad_norm: rank 0 has {before}, rank 1 has max_grad_norm: {after}" in message
    changed = run_ranks(2, clips_on_one_rank, before, after, (0, 1))
    unchanged = run_ranks(2, clips_on_one_rank, before, after, ())
    assert torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[0], unchanged[0])


def compared(rank: int, world: int) -> None:
    """The comparison alone, on facts and on scalars that the host does not read."""
    agreement = StepAgreement(Collectives(Topology.of(None, None), torch.device("cpu")))
    for trial in range(20):
        same = agreement.all_reduce([torch.ones(2, 3).double()], ("facts", trial))
        last = agreement.all_reduce([torch.ones(1).double()], ("facts", trial if rank < world - 1 else -1))
        scalars = [torch.tensor(0.1 + trial), torch.tensor(2.0)]
        alike = agreement.all_reduce([torch.ones(1).double()], "facts", scalars)
        other = [scalars[0], torch.tensor(2.0 + 1e-6 * (rank == 0))]
        unlike = agreement.all_reduce([torch.ones(1).double()], "facts", other)
        swapped = agreement.all_reduce([torch.ones(1).double()], "facts", scalars if rank else scalars[::-1])
        assert (bool(same), bool(last), bool(alike), bool(unlike)) == (False, True, False, True)
        assert bool(swapped)
    parts = [torch.full((2, 3), 0.5 + rank).double(), torch.tensor(1.0).double()]
    agreement.all_reduce(parts, "facts")
    assert torch.equal(parts[0], torch.full((2, 3), world / 2 + sum(range(world))).double())
    assert parts[1] == world


@pytest.mark.parametrize("world", [2, 3])
def test_the_comparison_finds_every_difference_and_no_other(world: int) -> None:
    assert SLOTS == 2 * LANES
    run_ranks(world, compared, world)
