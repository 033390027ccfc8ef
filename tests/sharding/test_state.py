"""State of one rank: its slices resume bit-exactly and load on no other rank. Whole tensors: test_full_state.py."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.pairs import pairs

STAGES = pytest.mark.parametrize("stage", [1, 2])
KEYS = {"step", "exp_avg", "exp_avg_sq", "shard"}
Params = dict[str, Parameter]


# -- one rank's slices ---------------------------------------------------------------------------------------


def resume(rank: int, world: int, stage: int, dtype: torch.dtype, saved_after: int) -> list[str]:
    params = training.parameters(dtype=dtype)
    opt = training.grouped(params, stage)
    run = {"stage": stage, "rank": rank, "world": world}
    training.train(opt, params, steps=range(saved_after), **run)
    state, values = training.through_bytes(opt.state_dict()), training.renew(params)
    training.train(opt, params, steps=range(saved_after, saved_after + 3), **run)

    again = training.grouped(values, stage, lr=0.7)  # the saved learning rate wins
    training.train(again, values, steps=[], **run)
    again.load_state_dict(state)
    assert [group["lr"] for group in again.param_groups] == [0.02, 0.01]
    training.train(again, values, steps=range(saved_after, saved_after + 3), **run)
    training.assert_same_bits(training.bits_of(again, values), training.bits_of(opt, params))
    return [f"{key}/{name}/{t.dtype}" for key, entry in state["state"].items() for name, t in entry.items()]


@pairs(world=[1, 2, 3], dtype=[torch.float32, torch.bfloat16], saved_after=[0, 2], stage=[1, 2])
def test_resuming_is_bit_exact(world: int, dtype: torch.dtype, saved_after: int, stage: int) -> None:
    keys = run_ranks(world, resume, world, stage, dtype, saved_after)
    assert all(own == keys[0] for own in keys)
    moments = [key for key in keys[0] if "exp_avg" in key]
    assert len(moments) == 2 * len(training.SHAPES)
    assert all(key.endswith("torch.float32") for key in moments)  # not the parameter's dtype
    assert ("0/master/torch.float32" in keys[0]) == (dtype == torch.bfloat16)


def check_initial_state(rank: int, stage: int) -> None:
    params = training.parameters()
    opt = training.grouped(params, stage)
    state = opt.state_dict()
    assert sorted(state["state"]) == list(range(len(params)))
    for entry in state["state"].values():
        assert set(entry) == KEYS
        assert entry["step"].item() == 0
        assert entry["exp_avg"].numel() == entry["exp_avg_sq"].numel() == entry["shard"][3].item()
        assert entry["shard"][:2].tolist() == [rank, 3]
    assert opt.state_dict()["state"].keys() == state["state"].keys()


@STAGES
def test_state_exists_before_the_first_step(stage: int) -> None:
    run_ranks(3, check_initial_state, stage)


def stamps(rank: int) -> list[list[int]]:
    opt = training.grouped(training.parameters(), 1)
    state = opt.state_dict()["state"]
    return [state[param]["shard"].tolist() for param in range(len(training.SHAPES))]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stamps_tile_every_parameter(world: int) -> None:
    ranks = run_ranks(world, stamps)
    for param, shape in enumerate(training.SHAPES.values()):
        pieces = sorted(
            (start, length) for _, _, start, length, _, _ in (own[param] for own in ranks) if length
        )
        end = 0
        for start, length in pieces:
            assert start == end
            end += length
        assert end == torch.Size(shape).numel()


# -- loaded by the wrong rank or model -------------------------------------------------------------------------


def trained_state(rank: int, world: int) -> dict[str, Any]:
    params = training.parameters()
    opt = training.grouped(params, 1)
    training.train(opt, params, stage=1, rank=rank, world=world, steps=range(2))
    return opt.state_dict()


def load_slices(rank: int, states: list[dict[str, Any]]) -> None:
    """A rejected load changes nothing."""
    params = training.parameters()
    opt = training.grouped(params, 1)
    before = training.bits_of(opt, params)
    try:
        opt.load_state_dict(states[rank])
    finally:
        training.assert_same_bits(training.bits_of(opt, params), before)


def test_state_of_other_ranks_is_rejected() -> None:
    states = run_ranks(2, trained_state, 2)
    for rank, (kind, message) in run_ranks_expecting_errors(2, load_slices, states[::-1]).items():
        assert kind == "ValueError"
        assert f"saved by rank {1 - rank} of 2, and this is rank {rank} of 2" in message
        assert "full_state_dict() and load_full_state_dict()" in message


def test_rank_zeros_state_is_rejected_on_every_rank() -> None:
    """As a framework loads that saves rank 0's state_dict() only."""
    state = run_ranks(2, trained_state, 2)[0]
    for kind, message in run_ranks_expecting_errors(2, load_slices, [state, state]).values():
        assert kind == "ValueError"
        assert "saved by rank 0 of 2, and this is rank 1 of 2" in message
        assert "call consolidate_state_dict() on every rank before the first rank saves" in message


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(3, 2), (1, 2), (2, 1)])
def test_other_world_size_is_rejected(saved_at: int, loaded_at: int) -> None:
    states = run_ranks(saved_at, trained_state, saved_at)
    states = [states[rank % saved_at] for rank in range(loaded_at)]
    for kind, message in run_ranks_expecting_errors(loaded_at, load_slices, states).values():
        assert kind == "ValueError"
        assert f"of {saved_at}, and this is rank" in message
        assert "load_full_state_dict()" in message


def test_other_models_are_rejected() -> None:
    state = trained_state(0, 1)
    shapes = dict(training.SHAPES)
    with pytest.raises(
        ValueError, match=r"parameter groups of \[3, 4\] parameters and this optimizer has \[7\]"
    ):
        ShardedLamb(training.parameters().items()).load_state_dict(state)
    shapes["fc.weight"] = (37, 24)
    with pytest.raises(ValueError, match=r"'embed.weight'.*in another layout"):
        training.grouped(training.parameters(shapes), 1).load_state_dict(state)
    renamed = {("other" if name == "scale" else name): p for name, p in training.parameters().items()}
    with pytest.raises(ValueError, match=r"has 'scale' where this optimizer has 'other'"):
        training.grouped(renamed, 1).load_state_dict(state)
    half = {**state, "state": {k: v for k, v in state["state"].items() if k != 2}}
    with pytest.raises(ValueError, match=r"has no state of 'norm\.bias'"):
        training.grouped(training.parameters(), 1).load_state_dict(half)


@pytest.mark.parametrize("kind", [Lamb, ShardedLamb])
def test_patterns_of_names_do_not_load_where_there_are_none(
    kind: type[Lamb] | type[ShardedLamb], tmp_path: Path
) -> None:
    """They would count as shown in the groups, and match nothing."""
    model = nn.Linear(3, 2)
    named = kind(model.named_parameters(), exclude_from_weight_decay=["bias$"], weight_decay=0.5)
    checkpoint.save(tmp_path / "saved", model, named)
    other = nn.Linear(3, 2)
    unnamed = kind(other.parameters(), weight_decay=0.5)
    said = r"group 0 was saved with the patterns \['bias\$'\], which match names, and the parameters have none: pass"
    for state in (named.state_dict(), named.full_state_dict() if isinstance(named, ShardedLamb) else None):
        with pytest.raises(ValueError, match=said):
            unnamed.load_state_dict(state or named.state_dict())
    with pytest.raises(ValueError, match=r"saved.*group 0 was saved with the patterns"):
        checkpoint.load(tmp_path / "saved", other, unnamed)
    assert unnamed.param_groups[0]["exclude_from_weight_decay"] == ()
    checkpoint.load(tmp_path / "saved", other, unnamed, options=False)
    by_shape = kind(nn.Linear(3, 2).named_parameters(), exclude_from_weight_decay=["ndim<=1"])
    unnamed.load_state_dict(by_shape.state_dict())
    assert unnamed.param_groups[0]["exclude_from_weight_decay"] == ("ndim<=1",)


def in_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, in another order than the model's."""
    named = list(model.named_parameters())[::-1]
    return [{"params": [pair for pair in named if (pair[1].ndim > 1) is wide]} for wide in (True, False)]


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_checkpoints_load_by_name_in_another_order_and_other_groups(flat: bool) -> None:
    """With names in groups, torch copies those of the saved layout, as with AdamW."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    saved = Lamb(model.named_parameters(), lr=1e-2)
    model(torch.ones(2, 3)).sum().backward()
    saved.step()
    reverse: Any = list(other.named_parameters())[::-1]
    loaded = Lamb(in_groups(other) if flat else reverse)
    dcp.set_optimizer_state_dict(
        other, loaded, dcp.get_optimizer_state_dict(model, saved, options=options), options=options
    )
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(saved.state[p]["exp_avg"], loaded.state[q]["exp_avg"])
    names = [name for group in loaded.param_groups for name in group["param_names"]]
    assert names == ["weight", "bias"] if flat else names == ["bias", "weight"]


def change_pipeline(rank: int, world: int, folder: str) -> None:
    """Two stages of a pipeline, a rank each, load as one model over both ranks, and that as two stages."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    own = [dist.new_group([r]) for r in range(world)][rank]
    torch.manual_seed(0)
    whole = nn.ModuleDict({f"s{i}": nn.Linear(4, 4) for i in range(world)})
    part = nn.ModuleDict({f"s{rank}": whole[f"s{rank}"]})
    staged = ShardedLamb(part.named_parameters(), stage=2, process_group=own)
    part[f"s{rank}"](torch.full((2, 4), 1.0 + rank)).square().mean().backward()
    staged.step()
    moments = full_moments(part, staged, own)
    saved = {"o": dcp.get_optimizer_state_dict(part, staged, options=options)}
    torch_dcp.save(saved, checkpoint_id=f"{folder}/staged")
    staged.close()

    both = ShardedLamb(whole.named_parameters(), stage=2)
    asked = {"o": dcp.get_optimizer_state_dict(whole, both, options=options)}
    torch_dcp.load(asked, checkpoint_id=f"{folder}/staged")
    dcp.set_optimizer_state_dict(whole, both, asked["o"], options=options)
    found = full_moments(whole, both)
    assert all(torch.equal(found[name], value) for name, value in moments.items())
    torch_dcp.save(
        {"o": dcp.get_optimizer_state_dict(whole, both, options=options)}, checkpoint_id=f"{folder}/both"
    )
    both.close()

    again = ShardedLamb(part.named_parameters(), stage=2, process_group=own)
    asked = {"o": dcp.get_optimizer_state_dict(part, again, options=options)}
    torch_dcp.load(asked, checkpoint_id=f"{folder}/both")
    dcp.set_optimizer_state_dict(part, again, asked["o"], options=options)
    back = full_moments(part, again, own)
    assert all(torch.equal(back[name], value) for name, value in moments.items())


def full_moments(model: nn.Module, optimizer: ShardedLamb, group: Any = None) -> dict[str, Tensor]:
    """{name: the whole first moment}, on every rank."""
    optimizer.consolidate_state_dict()
    packed = [optimizer.state_dict()["state"]]
    dist.broadcast_object_list(packed, group=group, group_src=0)
    names = [name for name, _ in model.named_parameters()]
    return {name: packed[0][i]["exp_avg"] for i, name in enumerate(names)}


def test_a_pipelines_layout_may_change_between_saving_and_loading(tmp_path: Path) -> None:
    run_ranks(2, change_pipeline, 2, str(tmp_path))


def test_slices_do_not_load_as_whole_tensors() -> None:
    params, whole = training.parameters(), training.parameters()
    sharded = ShardedLamb(params.items())
    with pytest.raises(ValueError, match=r"exp_avg of '.*': expected a whole tensor of shape \("):
        sharded.load_full_state_dict(sharded.state_dict())
    half = sharded.state_dict()
    half["state"][0] = {key: value for key, value in half["state"][0].items() if key != "shard"}
    with pytest.raises(ValueError, match=r"'embed.weight' has no stamp of a rank and others have one"):
        sharded.load_state_dict(half)
    with pytest.raises(
        ValueError, match=r"expected a whole tensor of shape \(.*result of full_state_dict\(\)"
    ):
        Lamb(whole.items()).load_state_dict(sharded.state_dict())


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1.0, 10.5, 1e30, [1.0, 2.0], None], ids=str)
def test_a_saved_step_that_is_no_count_is_rejected(step: Any) -> None:
    params = training.parameters()
    sharded, whole = ShardedLamb(params.items()), Lamb(training.parameters().items())
    training.train(sharded, params, steps=range(2), stage=1, rank=0, world=1)
    for opt, load, saved in (
        (sharded, sharded.load_state_dict, sharded.state_dict()),
        (sharded, sharded.load_full_state_dict, sharded.full_state_dict()),
        (whole, whole.load_state_dict, sharded.full_state_dict()),
    ):
        edited = copy.deepcopy(saved)
        edited["param_groups"][0]["lr"] = 0.7
        edited["state"][1]["step"] = torch.tensor(0.0 if step is None else step)
        if step is None:
            del edited["state"][1]["step"]
        with pytest.raises(ValueError, match=r"lacks \['step'\]|expected a whole number >= 0, got"):
            load(edited)
        assert opt.param_groups[0]["lr"] != 0.7


def test_other_dtypes_are_rejected() -> None:
    state = ShardedLamb(training.parameters().items()).state_dict()
    with pytest.raises(
        ValueError, match=r"'embed\.weight' lacks \['master'\]: it was saved with other dtypes"
    ):
        ShardedLamb(training.parameters(dtype=torch.bfloat16).items()).load_state_dict(state)


def test_a_state_with_bad_options_changes_nothing() -> None:
    params = training.parameters()
    opt = training.grouped(params, 1)
    state = trained_state(0, 1)
    state["param_groups"][1]["betas"] = (0.9, 1.5)
    before = training.bits_of(opt, params)
    with pytest.raises(ValueError, match=r"betas\[1\] must be a number in \[0, 1\), got 1\.5"):
        opt.load_state_dict(state)
    training.assert_same_bits(training.bits_of(opt, params), before)
    assert opt.param_groups[1]["betas"] == (0.9, 0.999)


# -- pickle, copies, hooks, DCP ------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_pickle_and_deepcopy_at_one_rank_resume_bit_exactly(way: Any, stage: int) -> None:
    params = training.parameters()
    opt = training.grouped(params, stage, skip_nonfinite=False)
    run = {"stage": stage, "rank": 0, "world": 1}
    training.train(opt, params, steps=range(2), **run)
    other_params, other = way((params, opt))
    assert all(other_params[name] is not params[name] for name in params)
    training.train(opt, params, steps=range(2, 4), **run)
    expected = training.bits_of(opt, params)
    training.train(other, other_params, steps=range(2, 4), **run)
    training.assert_same_bits(training.bits_of(other, other_params), expected)
    training.assert_same_bits(training.bits_of(opt, params), expected)  # the two share no memory


def copy_at_two_ranks(rank: int) -> None:
    opt = training.grouped(training.parameters(), 1)
    for way in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied: use state_dict\(\) on every rank"):
            way(opt)


def test_pickle_and_deepcopy_at_two_ranks_are_type_errors() -> None:
    run_ranks(2, copy_at_two_ranks)


def load_with_hooks(rank: int) -> list[str]:
    opt = training.grouped(training.parameters(), 1)
    called = []
    opt.register_load_state_dict_pre_hook(lambda opt, state: called.append("pre"))
    opt.register_load_state_dict_post_hook(lambda opt: called.append("post"))
    opt.register_state_dict_pre_hook(lambda opt: called.append("save"))
    opt.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 7})
    state = opt.state_dict()
    assert state["extra"] == 7
    opt.load_state_dict(state)
    return called


def test_state_hooks_are_called() -> None:
    assert run_ranks(2, load_with_hooks) == [["save", "pre", "post"]] * 2


def dcp_round_trip(rank: int) -> dict[str, Tensor]:
    """This rank's slices by name, read and written by torch.distributed.checkpoint's state-dict functions."""
    model = nn.Linear(23, 19)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(training.draw(tuple(p.shape), "dcp"))
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}

    def draw(r: int, step: int) -> dict[str, Tensor | None]:
        return training.own_gradients(r, step, shapes)

    run = {"stage": 1, "rank": rank, "world": 2, "gradients": draw}
    training.train(opt, params, steps=range(2), **run)
    before = training.bits_of(opt, params)
    state = training.through_bytes(dcp.get_optimizer_state_dict(model, opt))
    assert {*state["state"]} == {"weight", "bias"}
    assert {*state["state"]["weight"]} == KEYS
    training.assert_same_bits(training.bits_of(opt, params), before)  # it did not call step()
    with torch.no_grad():
        for entry in opt.state.values():
            entry["exp_avg"].zero_()
            entry["step"].zero_()
    dcp.set_optimizer_state_dict(model, opt, state)
    training.assert_same_bits(training.bits_of(opt, params), before)
    return before


def test_dcp_gets_and_sets_the_state_of_a_rank() -> None:
    run_ranks(2, dcp_round_trip)


def load_with_other_strides(rank: int) -> None:
    """Moments of a channels_last DTensor, saved as contiguous tensors."""
    mesh = init_device_mesh("cpu", (2,))

    def build() -> tuple[Tensor, ShardedLamb]:
        local = training.draw((2, 3, 5, 5), "conv", rank).to(memory_format=torch.channels_last)
        p = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
        return p, ShardedLamb([("conv", p)], lr=0.1)

    p, opt = build()
    grad = training.draw((2, 3, 5, 5), "gradient", rank).to(memory_format=torch.channels_last)
    p.grad = DTensor.from_local(grad, mesh, [Shard(0)])
    opt.step()
    state = opt.state_dict()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state["state"][0][key]
        contiguous = moment.to_local().contiguous()
        assert contiguous.stride() != moment.to_local().stride()
        state["state"][0][key] = DTensor.from_local(contiguous, mesh, [Shard(0)])
    other, again = build()
    again.load_state_dict(state)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(again.state[other][key].to_local(), opt.state[p][key].to_local()), key


def test_moments_with_other_strides_are_loaded() -> None:
    run_ranks(2, load_with_other_strides)
