"""torch.distributed.checkpoint saves every stage's state and loads it in any layout; state under fully_shard."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.layouts import OPTIONS, Layout, build, groups, steps
from tests.optim import fsdp_models as models

Whole = tuple[dict[str, Tensor], dict[str, Any] | None]


def save(rank: int, layout: Layout, folder: Path) -> tuple[Whole, Whole]:
    """Whole weights and state as saved after two steps, and after two more."""
    model, opt = build(layout)
    steps(model, opt, range(2))
    optim = get_optimizer_state_dict(model, opt)
    dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=folder)
    saved = models.whole_weights(model), training.through_bytes(opt.full_state_dict())
    steps(model, opt, range(2, 4))
    return saved, (models.whole_weights(model), opt.full_state_dict())


def load(rank: int, layout: Layout, folder: Path) -> tuple[Whole, Whole]:
    model, opt = build(layout)
    steps(model, opt, range(7, 8))  # loading must replace this state
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optim"])
    loaded = models.whole_weights(model), training.through_bytes(opt.full_state_dict())
    steps(model, opt, range(2, 4))
    return loaded, (models.whole_weights(model), opt.full_state_dict())


def assert_same_state(actual: dict[str, Any] | None, expected: dict[str, Any] | None) -> None:
    assert actual is not None
    assert expected is not None
    assert actual["state"].keys() == expected["state"].keys()
    for param, entry in expected["state"].items():
        training.assert_same_bits(actual["state"][param], entry)


LAYOUTS = [
    Layout(3, stage=1),
    Layout(2, stage=2),
    Layout(4, stage=1, axes=("replicate", "shard")),
    Layout(4),
    Layout(2),
    Layout(4, axes=("replicate", "shard")),
    Layout(4, axes=("dp", "tp")),
    Layout(2, axes=("tp",)),
]


@pytest.mark.parametrize(
    ("source", "target"), [*zip(LAYOUTS, [*LAYOUTS[1:], LAYOUTS[0]], strict=True)], ids=str
)
def test_a_checkpoint_of_any_layout_loads_in_any_other(
    source: Layout, target: Layout, tmp_path: Path
) -> None:
    """Each writes what the next reads; on their own ranks they load it in tests/checkpoint/test_table.py."""
    (weights, full), (end, _) = run_ranks(source.world, save, source, tmp_path)[0]
    loaded = run_ranks(target.world, load, target, tmp_path)
    for (loaded_weights, _), (loaded_end, _) in loaded:
        training.assert_same_bits(loaded_weights, weights)
        for name, value in end.items():
            assert (loaded_end[name] - value).norm() <= 4e-6 * value.norm(), name
    assert_same_state(loaded[0][0][1], full)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Layout(3, dtype=torch.bfloat16), Layout(2, stage=2, dtype=torch.bfloat16)),
        (Layout(2, stage=1, dtype=torch.bfloat16), Layout(4, axes=("dp", "tp"), dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_checkpoints_include_masters(source: Layout, target: Layout, tmp_path: Path) -> None:
    (weights, full), (end, _) = run_ranks(source.world, save, source, tmp_path)[0]
    assert full is not None
    assert all("master" in entry for entry in full["state"].values())
    loaded = run_ranks(target.world, load, target, tmp_path)
    for (loaded_weights, _), (loaded_end, _) in loaded:
        training.assert_same_bits(loaded_weights, weights)
        assert (
            sum(not torch.equal(loaded_end[name], value) for name, value in end.items()) <= 1
        )  # a rounding at a tie
    assert_same_state(loaded[0][0][1], full)


# -- odd shapes ---------------------------------------------------------------------------------------------------


def odd_parameters() -> torch.nn.ParameterDict:
    shapes = {
        "empty": (0, 3),
        "scalar": (),
        "one": (1,),
        "cube": (5, 7, 11),
        "flat": (700,),
        "conv": (8, 3, 5, 5),
    }
    params = torch.nn.ParameterDict({name: training.draw(shape, name) for name, shape in shapes.items()})
    params["conv"] = params["conv"].detach().to(memory_format=torch.channels_last)
    return params


def odd_save(rank: int, folder: Path) -> dict[str, Any] | None:
    params = odd_parameters()
    opt = ShardedLamb(params.named_parameters(), bucket_mb=0.001)
    for name, p in params.items():
        p.grad = training.draw(tuple(p.shape), "odd", name)
    opt.step()
    dcp.save({"optim": get_optimizer_state_dict(params, opt)}, checkpoint_id=folder)
    return opt.full_state_dict()


def odd_load(rank: int, folder: Path) -> dict[str, Any] | None:
    params = odd_parameters()
    opt = ShardedLamb(params.named_parameters())
    state = {"optim": get_optimizer_state_dict(params, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(params, opt, state["optim"])
    return opt.full_state_dict()


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(3, 2), (1, 4), (4, 1)])
def test_odd_shapes_and_memory_formats(saved_at: int, loaded_at: int, tmp_path: Path) -> None:
    saved = run_ranks(saved_at, odd_save, tmp_path)[0]
    assert_same_state(run_ranks(loaded_at, odd_load, tmp_path)[0], saved)


def offloaded(rank: int, stage: int, folder: Path) -> None:
    """StateDictOptions(cpu_offload=True) copies the saved tensors and preserves their region and stamp."""
    model, opt = build(Layout(2, stage=stage))
    steps(model, opt, range(1))
    before = opt.full_state_dict()
    options = StateDictOptions(cpu_offload=True)
    dcp.save({"optim": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=folder)
    steps(model, opt, range(1, 2))
    state = {"optim": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, opt, state["optim"])
    if rank == 0:
        assert_same_state(opt.full_state_dict(), before)
    else:
        opt.full_state_dict()


@pytest.mark.parametrize("stage", [0, 1])
def test_states_are_offloaded(stage: int, tmp_path: Path) -> None:
    run_ranks(2, offloaded, stage, tmp_path)


# -- without a checkpoint library ---------------------------------------------------------------------------------


def resumed(rank: int, axes: tuple[str, ...], dtype: torch.dtype) -> None:
    """state_dict() of one rank, serialized and loaded: bit-equal to the uninterrupted run."""
    layout = Layout(4, axes=axes, dtype=dtype)
    model, opt = build(layout)
    steps(model, opt, range(2))
    state, weights = training.through_bytes(opt.state_dict()), training.through_bytes(model.state_dict())
    steps(model, opt, range(2, 4))
    other, again = build(layout)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    steps(other, again, range(2, 4))
    training.assert_same_bits(models.whole_weights(other), models.whole_weights(model))
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert {*again.state[p]} == {*opt.state[q]}
        for key, value in opt.state[q].items():
            assert torch.equal(models.whole(again.state[p][key]), models.whole(value)), key
        for key in ("exp_avg", "exp_avg_sq"):
            value = opt.state[q][key]
            assert isinstance(value, DTensor)
            assert value.placements == q.placements  # type: ignore[attr-defined]
            assert value.shape == q.shape


# bfloat16 has all state that float32 has, and masters.
@pytest.mark.parametrize(
    ("axes", "dtype"),
    [
        (("dp",), torch.bfloat16),
        (("dp", "tp"), torch.bfloat16),
        (("replicate", "shard"), torch.bfloat16),
        (("dp", "tp"), torch.float32),
    ],
    ids=str,
)
def test_resuming_is_bit_exact(axes: tuple[str, ...], dtype: torch.dtype) -> None:
    run_ranks(4, resumed, axes, dtype)


def stamps_of(rank: int, layout: Layout) -> dict[str, Any]:
    model, opt = build(layout)
    steps(model, opt, range(1))
    return {"state": {i: {"shard": s["shard"].tolist()} for i, s in opt.state_dict()["state"].items()}}


def load_with_other_stamps(rank: int, layout: Layout, stamps: list[dict[str, Any]]) -> None:
    _model, opt = build(layout)
    state = opt.state_dict()
    others = stamps[(rank + 1) % len(stamps)]["state"]
    for i, entry in state["state"].items():
        state["state"][i] = {**entry, "shard": torch.tensor(others[i]["shard"])}
    opt.load_state_dict(state)


@pytest.mark.parametrize("saved_at", [Layout(2), Layout(4, axes=("dp", "tp")), Layout(2, stage=1)], ids=str)
def test_state_of_other_ranks_is_rejected(saved_at: Layout) -> None:
    stamps = run_ranks(saved_at.world, stamps_of, saved_at)
    for kind, message in run_ranks_expecting_errors(2, load_with_other_stamps, Layout(2), stamps).values():
        assert kind == "ValueError"
        assert f"of {saved_at.world} and this is rank" in message
        assert "torch.distributed.checkpoint" in message


def lamb_state(rank: int, layout: Layout) -> dict[str, Any] | None:
    _model, opt = build(layout)
    reference = models.block()
    lamb = Lamb(groups(reference), **OPTIONS)
    for step in range(3):
        for name, p in reference.named_parameters():
            p.grad = training.draw(tuple(p.shape), "layouts", name, step)
        lamb.step()
    opt.load_full_state_dict(training.through_bytes(lamb.state_dict()) if rank == 0 else None)
    full = opt.full_state_dict()
    if full is not None:
        for param, entry in lamb.state_dict()["state"].items():
            training.assert_same_bits(full["state"][param], entry)
    return full


@pytest.mark.parametrize(
    "layout", [Layout(3), Layout(4, axes=("dp", "tp")), Layout(2, axes=("tp",))], ids=str
)
def test_whole_state_of_lamb_round_trips(layout: Layout) -> None:
    run_ranks(layout.world, lamb_state, layout)


def round_trip_of_torchs_full_state(rank: int, layout: Layout) -> None:
    """torch's full_state_dict option, which Accelerate's FULL_STATE_DICT uses."""
    for on_first in (True, False):
        model, opt = build(layout)
        steps(model, opt, range(2))
        options = StateDictOptions(full_state_dict=True, cpu_offload=on_first)
        saved = get_optimizer_state_dict(model, opt, options=options)
        assert bool(saved) is (rank == 0 or not on_first)
        saved = training.through_bytes(saved)
        expected = training.through_bytes(opt.full_state_dict())
        trained = [p.detach().clone() for p in model.parameters()]
        model, opt = build(layout)
        steps(model, opt, range(4, 5))
        with torch.no_grad():
            for p, weight in zip(model.parameters(), trained, strict=True):
                p.copy_(weight)
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=on_first)
        set_optimizer_state_dict(model, opt, saved if rank == 0 or not on_first else {}, options=whole)
        full = opt.full_state_dict()
        if rank == 0:
            assert_same_state(full, expected)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2),
        Layout(4, axes=("dp", "tp")),
        Layout(2, axes=("tp",)),
        Layout(2, stage=1, dtype=torch.bfloat16, remainders=True),
        Layout(3, stage=2),
    ],
    ids=str,
)
def test_torchs_full_state(layout: Layout) -> None:
    run_ranks(layout.world, round_trip_of_torchs_full_state, layout)


def train_during_save(rank: int, layout: Layout, folder: Path) -> tuple[Any, Any]:
    """Train while the checkpoint is written: it holds the state from before."""
    model, opt = build(layout)
    steps(model, opt, range(2))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}
    expected = training.through_bytes(opt.full_state_dict())
    writing = dcp.async_save(state, checkpoint_id=folder)
    steps(model, opt, range(2, 3))
    writing.result()
    (_, loaded), _ = load(rank, layout, folder)
    return expected, loaded


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 1), Layout(3, 2)], ids=str)
def test_asynchronous_saving(layout: Layout, tmp_path: Path) -> None:
    expected, loaded = run_ranks(layout.world, train_during_save, layout, tmp_path)[0]
    assert_same_state(loaded, expected)


def offloaded_from_another_device(rank: int) -> None:
    """CPU offload on a GPU mesh, with the parameters' parts on the CPU: state must be a view, not a copy."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    from sharded_lamb.sharding.buckets import Precision
    from sharded_lamb.sharding.local_shards import LocalShard

    mesh = DeviceMesh("cuda", torch.arange(2), _init_backend=False)
    meta = TensorMeta(torch.Size((4, 3)), (3, 1), torch.float32)
    p = DTensor(torch.zeros(2, 3), DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)
    shard = LocalShard.of(p, Precision.of(torch.float32, torch.float32, torch.float32, None))
    state = shard.as_dtensor(shard.exp_avg)
    assert state.to_local().data_ptr() == shard.exp_avg.data_ptr()
    assert (state.shape, state.placements) == (p.shape, p.placements)


def test_offloaded_state_is_the_memory_that_steps_update() -> None:
    run_ranks(2, offloaded_from_another_device)
