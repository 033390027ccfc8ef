"""A model that moves to another device after its optimizer was constructed, as Accelerate's ``prepare`` moves it.

One machine's CPU stands for both devices: parameters get new memory, as by ``model.to(device)``, and the optimizer is
told that it is elsewhere.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import _pytree as pytree

from sharded_lamb import ShardedLamb
from sharded_lamb.comm import groups, stalls
from sharded_lamb.comm.groups import OwnedGroup
from sharded_lamb.sharding.param_store import ParamStore
from tests.harness import run_ranks, run_ranks_expecting_errors

DTYPES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "remainders": (torch.bfloat16, {"store_param_remainders": True}),
    "gathered in 8 bits": (torch.float32, {"gather_dtype": torch.float8_e4m3fn}),
}


@contextlib.contextmanager
def moved(model: nn.Module, optimizer: ShardedLamb) -> Iterator[None]:
    """Inside, the parameters are on another device than the optimizer's memory, until it follows."""
    for p in model.parameters():
        p.data = p.data.clone()
        if p.grad is not None:
            p.grad.data = p.grad.data.clone()
    old = optimizer._store
    with mock.patch.object(ParamStore, "has_moved", property(lambda store: store is old)):
        yield
        assert optimizer._store is not old, "it did not follow"


def made(rank: int, stage: Any, kind: str) -> tuple[nn.Module, ShardedLamb]:
    dtype, options = DTYPES[kind]
    torch.manual_seed(rank)  # construction broadcasts the first rank's weights
    model = nn.Sequential(nn.Linear(70, 33), nn.LayerNorm(33), nn.Linear(33, 5)).to(dtype)
    optimizer = ShardedLamb(
        model.named_parameters(),
        lr=0.01,
        stage=stage,
        bucket_mb=0.004,
        max_grad_norm=1.0,
        **options,
    )
    return model, optimizer


def backward(rank: int, model: nn.Module, step: int, stage: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + (rank if stage == 2 else 0))
    terms = [
        (p * torch.randn(p.shape, generator=generator).to(p.dtype)).float().sum() for p in model.parameters()
    ]
    torch.stack([term for term in terms if term.requires_grad]).sum().backward()  # type: ignore[no-untyped-call]


def by_zero_grad(optimizer: ShardedLamb) -> None:
    optimizer.zero_grad()


def by_loading(optimizer: ShardedLamb) -> None:
    """As AcceleratedOptimizer, after it has moved the state."""
    optimizer.load_state_dict(optimizer.local_state_dict())


FOLLOWS: dict[str, Callable[[ShardedLamb], None]] = {"zero_grad": by_zero_grad, "load": by_loading}


def train(rank: int, stage: int, kind: str, move_at: int | None, by: str) -> Any:
    """Bits after five steps, of which one is skipped; ``move_at``: the step before which the model moves."""
    model, optimizer = made(rank, stage, kind)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(5):
        if by == "load":
            optimizer.zero_grad()
        if step == move_at:
            with moved(model, optimizer):
                FOLLOWS[by](optimizer)
        optimizer.zero_grad()
        backward(rank, model, step, stage)
        if step == 1:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(torch.inf)
        optimizer.step()
        scheduler.step()
    whole = optimizer.full_state_dict()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, whole and whole["state"], optimizer.skipped_steps, optimizer.grad_norm


def assert_equal(ours: Any, expected: Any) -> None:
    assert pytree.tree_structure(ours) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_moved_model_is_followed_with_its_state(stage: int, kind: str) -> None:
    for world_size, move_at, by in ((1, 0, "load"), (2, 0, "load"), (3, 3, "zero_grad")):
        ours = run_ranks(world_size, train, stage, kind, move_at, by)
        expected = run_ranks(world_size, train, stage, kind, None, by)
        assert ours[0][2] == 1
        assert_equal(ours, expected)


def step_follows(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a model that moves between two steps of stage 1, with gradients, and of one that stays."""
    results = []
    for moves in (True, False):
        model, optimizer = made(rank, 1, "fp32")
        backward(rank, model, 0, 1)
        with moved(model, optimizer) if moves else contextlib.nullcontext():
            optimizer.step()
        backward(rank, model, 1, 1)
        with moved(model, optimizer) if moves else contextlib.nullcontext():
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    return results[0], results[1]


def test_in_stage_1_the_step_and_the_clip_follow_gradients_that_moved_too() -> None:
    for ours, expected in run_ranks(2, step_follows):
        assert_equal(ours, expected)


def move_after_backward(rank: int, is_error: bool) -> None:
    model, optimizer = made(rank, 2, "fp32")
    backward(rank, model, 0, 2)
    with moved(model, optimizer):
        if is_error:
            optimizer.step()
        optimizer.zero_grad()
    backward(rank, model, 0, 2)
    optimizer.step()


def test_gradients_that_were_reduced_before_are_an_error_on_every_rank() -> None:
    run_ranks(2, move_after_backward, False)
    errors = run_ranks_expecting_errors(2, move_after_backward, True)
    for kind, message in errors.values():
        assert kind == "RuntimeError"
        assert "call optimizer.zero_grad() after model.to" in message


def move_on_one_rank(rank: int) -> None:
    model, optimizer = made(rank, 1, "fp32")
    backward(rank, model, 0, 1)
    quick = mock.patch.multiple(stalls, PATIENCE=0.5, PERIOD=0.2)
    with quick, moved(model, optimizer) if rank else contextlib.nullcontext():
        optimizer.step()


def test_a_model_that_moves_on_one_rank_is_an_error_on_every_rank() -> None:
    for _, message in run_ranks_expecting_errors(2, move_on_one_rank, timeout=60).values():
        assert "rank 1" in message
        assert "construction, load or registration" in message


def freeze_and_move(rank: int, moves: bool) -> list[Tensor]:
    """A parameter that is frozen after a step keeps its state: unfrozen, it is updated as if it had not moved."""
    model, optimizer = made(rank, 2, "fp32")
    for step in range(4):
        model[0].weight.requires_grad_(step != 1)  # type: ignore[union-attr]
        if moves and step == 1:
            with moved(model, optimizer):
                optimizer.zero_grad()
        optimizer.zero_grad()
        backward(rank, model, step, 2)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_frozen_parameters_keep_their_state() -> None:
    assert_equal(run_ranks(2, freeze_and_move, True), run_ranks(2, freeze_and_move, False))


def overlap_and_move(rank: int, moves: bool) -> tuple[list[Tensor], bool]:
    """Weights, and whether gathers know the buckets that parameters are in: the first one is frozen by the move."""
    model, optimizer = made(rank, 1, "fp32")
    optimizer.overlap_forward(model)
    for step in range(4):
        model[0].requires_grad_(step < 2)
        if moves and step == 2:
            optimizer.synchronize()
            with moved(model, optimizer):
                optimizer.zero_grad()
        optimizer.zero_grad()
        model(torch.ones(2, 70)).sum().backward()
        optimizer.step()
    optimizer.synchronize()
    bucket_of = {p: i for i, bucket in enumerate(optimizer._store.buckets) for p in bucket.params}
    return [p.detach().clone() for p in model.parameters()], optimizer._gathers._bucket_of == bucket_of


def test_the_next_forward_still_waits_for_gathers() -> None:
    ours = run_ranks(2, overlap_and_move, True)
    assert all(is_known for _, is_known in ours)
    assert_equal(ours, run_ranks(2, overlap_and_move, False))


def groups_and_hooks(rank: int) -> tuple[int, int, bool]:
    """Process groups that moves leave behind, hooks of a parameter, and whether the optimizer ends with them."""
    before = len(c10d._world.pg_names)
    model, optimizer = made(rank, 2, "fp32")
    for _ in range(3):
        with moved(model, optimizer):
            optimizer.zero_grad()
    hooks: Any = model[0].weight._post_accumulate_grad_hooks  # type: ignore[union-attr]
    held, count = len(c10d._world.pg_names) - before, len(hooks)
    optimizer.close()
    return held, count, len(c10d._world.pg_names) == before and not hooks


def test_nothing_of_the_old_device_stays() -> None:
    for held, hooks, ended in run_ranks(2, groups_and_hooks):
        assert (held, hooks, ended) == (1, 1, True)


def on_nccl_alone(rank: int) -> tuple[str, bool]:
    """The backend of a group for CPU memory under a default group that has none, and what the ranks then hold."""
    default, made_on = mock.Mock(wraps=dist.group.WORLD, _device_types=[torch.device("cuda")]), OwnedGroup.on

    def under_nccl(device: torch.device, ranks: Sequence[int]) -> OwnedGroup:
        with mock.patch.object(dist, "group", mock.Mock(WORLD=default)):
            return made_on(device, ranks)

    with (
        mock.patch.object(OwnedGroup, "on", under_nccl),
        mock.patch.object(groups, "_new_group", wraps=groups._new_group) as new_group,
    ):
        model, optimizer = made(rank, 1, "fp32")
    backward(rank, model, 0, 1)
    optimizer.step()
    _, backend, _ = new_group.call_args.args
    return backend, all(bool(p.isfinite().all()) for p in model.parameters())


def test_parameters_on_the_cpu_have_a_group_of_their_own_under_nccl() -> None:
    assert run_ranks(2, on_nccl_alone) == [("gloo", True)] * 2


@contextlib.contextmanager
def swapping() -> Iterator[None]:
    """``torch.__future__.set_swap_module_params_on_conversion``: module.to() swaps; weak references bar it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("clips", [False, True], ids=["", "clip_grad_norm_"])
def test_a_model_whose_parameters_are_swapped(clips: bool) -> None:
    with swapping():
        model = nn.Linear(3, 2)
        optimizer = ShardedLamb(model.named_parameters(), lr=0.1)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
            model._apply(lambda t: t * 2)
        model.weight.grad = torch.ones_like(model.weight)
        if clips:
            optimizer.clip_grad_norm_(1.0)
            model._apply(lambda t: t.clone())  # swaps gradients too
        before = model.weight.detach().clone()
        optimizer.step()
        moved = (before - model.weight.detach()).norm() / before.norm()
        assert moved.item() == pytest.approx(0.1, rel=1e-4)  # a step's length: lr ‖w‖


def to_double_and_back(model: nn.Module) -> None:
    model.double()
    model.float()


def load_itself(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())


SWAPS: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda model: model.to("cpu"),
    "float": lambda model: model.float(),
    "double and float": to_double_and_back,
    "load_state_dict": load_itself,
}


def train_swapped(rank: int, stage: int, way: str | None, when: str) -> tuple[list[Tensor], list[int]]:
    """Weights, and the reductions that every backward has started."""
    model, optimizer = made(rank, stage, "fp32")
    started = []
    with swapping():
        for step in range(4):
            if way is not None and when == "before zero_grad":
                SWAPS[way](model)
            optimizer.zero_grad(set_to_none=step != 2 or when == "before backward")
            if way is not None and when == "before backward":
                SWAPS[way](model)
            for part in range(2):
                backward(rank, model, 2 * step + part, stage)
                if stage == 2:
                    reducer: Any = optimizer._gradients
                    started.append(reducer.rounds)
            if way in ("to", "float") and when == "before the step":
                SWAPS[way](model)
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], started


@pytest.mark.parametrize("way", SWAPS)
@pytest.mark.parametrize("world", [1, 2])
def test_stage_2_reduces_gradients_of_swapped_parameters_in_backward(world: int, way: str) -> None:
    expected = run_ranks(world, train_swapped, 2, None, "")
    for when in ("before zero_grad", "before the step"):
        assert_equal(run_ranks(world, train_swapped, 2, way, when), expected)


def warned_of(rank: int, way: str) -> tuple[list[Tensor], list[str]]:
    """Swaps after zero_grad: the hooks are lost for one backward, of which the step reduces the gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights, _ = train_swapped(rank, 2, way, "before backward")
    return weights, [str(warning.message) for warning in caught if "swap" in str(warning.message)]


@pytest.mark.parametrize("way", SWAPS)
@pytest.mark.parametrize("world", [1, 2])
def test_stage_2_reduces_gradients_in_the_step_where_swaps_removed_hooks(world: int, way: str) -> None:
    expected = run_ranks(world, train_swapped, 2, None, "before backward")
    for (weights, messages), (same, _) in zip(run_ranks(world, warned_of, way), expected, strict=True):
        for ours, theirs in zip(weights, same, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert len(messages) == (4 if world > 1 else 0)
        assert all("the gradient of '0.weight' is reduced in this step" in message for message in messages)
