"""DeepSpeed's checkpoints (its own, consolidated, universal) and this package's whole state."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.deepspeed import cases
from tests.harness import run_ranks, run_ranks_expecting_errors

STAGES = [0, 1, 2, 3]
ALONE = ("--num_extract_workers", "1", "--num_merge_workers", "1")


def start(config: dict[str, Any], groups: bool = False, **model: Any) -> Any:
    tiny = cases.tiny(**model)
    return cases.start(config, tiny, **({"model_parameters": cases.groups_of(tiny)} if groups else {}))


def train(engine: Any, rank: int, steps: range) -> None:
    for step in steps:
        engine.backward(engine(cases.tokens(rank, step)))
        engine.step()


def state_of(engine: Any) -> dict[str, Tensor]:
    """Every bit that the optimizer holds on this rank, DeepSpeed's padding excepted (it may hold anything)."""
    found = cases.masters(engine)
    full = engine.basic_optimizer.full_state_dict()
    for param, state in (full or {"state": {}})["state"].items():
        found.update({f"{param}/{key}": value.clone() for key, value in state.items()})
    return found


def interrupted(rank: int, config: dict[str, Any], folder: str, groups: bool) -> None:
    engine = start(config, groups)
    train(engine, rank, range(2))
    engine.save_checkpoint(folder, tag="two")
    train(engine, rank, range(2, 4))
    never_stopped = state_of(engine)
    cases.stop(engine)

    engine = start(config, groups, seed=99)
    engine.load_checkpoint(folder, tag="two")
    train(engine, rank, range(2, 4))
    training.assert_same_bits(state_of(engine), never_stopped)
    cases.stop(engine)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(
    stage: int, dtype: str, groups: bool, tmp_path: Path
) -> None:
    run_ranks(2, interrupted, cases.config(stage, dtype), str(tmp_path), groups, timeout=300)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (2, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (3, {"sub_group_size": 500}),
    ],
)
def test_checkpoints_of_other_layouts(stage: int, zero: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(2, interrupted, cases.config(stage, "bf16", zero=zero), str(tmp_path), True, timeout=300)


def saved(rank: int, config: dict[str, Any], folder: str, groups: bool) -> dict[str, Any]:
    """Weights and whole state at step 2, where a checkpoint is left, and weights at step 4."""
    engine = start(config, groups)
    train(engine, rank, range(2))
    engine.save_checkpoint(folder, tag="two")
    at_two, full = cases.masters(engine), engine.basic_optimizer.full_state_dict()
    cases.stop(engine)
    return {"masters": at_two, "full": full}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32(stage: int, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    result, *_ = run_ranks(2, saved, cases.config(stage, "bf16"), str(tmp_path), True, timeout=300)
    consolidated = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="two")
    for name, value in result["masters"].items():
        assert torch.equal(consolidated[name].double(), value), name


def universal(folder: Path) -> None:
    """DeepSpeed's own converter, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = ["--input_folder", str(folder / "two"), "--output_folder", str(folder / "universal")]
    # ZeRO 1 and 2 want client state that only Megatron writes, or this switch.
    ds_to_universal.main(parse([*arguments, "--inject_missing_state", *ALONE]))
    (folder / "latest").write_text("universal")


def parse(arguments: list[str]) -> Any:
    import sys
    from unittest import mock

    from deepspeed.checkpoint import ds_to_universal

    with mock.patch.object(sys, "argv", ["ds_to_universal", *arguments]):
        return ds_to_universal.parse_arguments()


def resumed(rank: int, config: dict[str, Any], folder: str, expected: Any) -> dict[str, Any]:
    """Load a universal checkpoint; what is there then, and one step of it beside the oracle."""
    engine = start({**config, "checkpoint": {"load_universal": True}}, True, seed=99)
    engine.load_checkpoint(folder, tag="universal")
    loaded = cases.masters(engine)
    oracle = cases.oracle_of(loaded, overrides=cases.GROUP_OVERRIDES)
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    place = {name: i for i, (name, _, _) in enumerate(engine.basic_optimizer._rows)}
    for name in names:
        state = expected["state"][place[name]]
        oracle.m[name] = state["exp_avg"].double().numpy()
        oracle.v[name] = state["exp_avg_sq"].double().numpy()
        oracle.steps[name] = int(state["step"])
    cases.follow(engine, rank, oracle, steps=2, first=2)
    groups = [
        {key: group[key] for key in ("lr", "weight_decay", "betas")}
        for group in engine.basic_optimizer.param_groups
    ]
    found = {"loaded": loaded, "worst": cases.worst(cases.masters(engine), oracle), "groups": groups}
    cases.stop(engine)
    return found


@pytest.mark.parametrize(("stage", "before", "after"), [(1, 2, 3), (2, 3, 2), (3, 2, 3), (3, 3, 2)])
def test_universal_checkpoints_at_other_world_sizes(
    stage: int, before: int, after: int, tmp_path: Path
) -> None:
    """Three groups of different options: ZeRO-3's loader gives all the first's, which is undone."""
    config = cases.config(stage, "bf16")
    result, *_ = run_ranks(before, saved, config, str(tmp_path), True, timeout=300)
    universal(tmp_path)
    for found in run_ranks(after, resumed, config, str(tmp_path), result["full"], timeout=300):
        for name, value in result["masters"].items():
            assert torch.equal(found["loaded"][name], value), name
        assert [group["lr"] for group in found["groups"]] == [0.02, 0.05, 0.02]
        assert [group["weight_decay"] for group in found["groups"]] == [0.1, 0.0, 0.1]
        assert [list(group["betas"]) for group in found["groups"]] == [[0.9, 0.99], [0.9, 0.99], [0.8, 0.95]]
        assert found["worst"] <= cases.FP32_TOLERANCE


def test_a_universal_checkpoint_in_subgroups(tmp_path: Path) -> None:
    """DeepSpeed puts one step count into the state of every subgroup: each must count for itself."""
    config = cases.config(3, "bf16", zero={"sub_group_size": 500})
    result, *_ = run_ranks(2, saved, config, str(tmp_path), True, timeout=300)
    universal(tmp_path)
    for found in run_ranks(2, resumed, config, str(tmp_path), result["full"], timeout=300):
        assert found["worst"] <= cases.FP32_TOLERANCE


def other_options(rank: int, config: dict[str, Any], folder: str, tag: str) -> float:
    """An engine of other options that has stepped already loads: the saved options count, as with torch."""
    params = {**cases.LAMB, "weight_decay": 0.7, "exclude_from_weight_decay": ["head"]}
    more = {"checkpoint": {"load_universal": True}} if tag == "universal" else {}
    engine = start({**config, "optimizer": {"type": "ShardedLamb", "params": params}, **more})
    train(engine, rank, range(1))
    engine.load_checkpoint(folder, tag=tag)
    oracle = cases.oracle_of(cases.masters(engine), no_decay={"fc.weight", "fc.bias"})
    full = engine.basic_optimizer.full_state_dict()
    shared: list[Any] = [full]
    torch.distributed.broadcast_object_list(shared, 0)
    for place, (name, _, _) in enumerate(engine.basic_optimizer._rows):
        if name in oracle.params:
            state = shared[0]["state"][place]
            oracle.m[name] = state["exp_avg"].double().numpy()
            oracle.v[name] = state["exp_avg_sq"].double().numpy()
            oracle.steps[name] = int(state["step"])
    cases.follow(engine, rank, oracle, steps=2, first=2)
    worst = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return worst


@pytest.mark.parametrize("tag", ["two", "universal"])
@pytest.mark.parametrize("stage", [1, 3])
def test_saved_options_win_over_the_engines(stage: int, tag: str, tmp_path: Path) -> None:
    params = {**cases.LAMB, "exclude_from_weight_decay": ["^fc"]}
    config = cases.config(stage, "bf16", params=params)
    run_ranks(2, saved, config, str(tmp_path), False, timeout=300)
    if tag == "universal":
        universal(tmp_path)
    assert max(run_ranks(2, other_options, config, str(tmp_path), tag, timeout=300)) <= cases.FP32_TOLERANCE


def before_the_first_step(rank: int, config: dict[str, Any], folder: str) -> float:
    """A checkpoint that has no moments yet, into an engine that has: they start again."""
    engine = start(config)
    engine.save_checkpoint(folder, tag="none")
    cases.stop(engine)
    engine = start(config, seed=99)
    train(engine, rank, range(3))
    engine.load_checkpoint(folder, tag="none")
    oracle = cases.oracle_of(cases.masters(engine))
    cases.follow(engine, rank, oracle, steps=2)
    worst = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return worst


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_checkpoint_of_before_the_first_step(stage: int, dtype: str, tmp_path: Path) -> None:
    worst = run_ranks(2, before_the_first_step, cases.config(stage, dtype), str(tmp_path), timeout=300)
    assert max(worst) <= cases.FP32_TOLERANCE


def from_fused_lamb(rank: int) -> list[dict[str, Any]]:
    """The groups that DeepSpeed's own Lamb leaves in a checkpoint."""
    engine = start(cases.config(2, params={"variant": "deepspeed", "lr": 0.01}))
    train(engine, rank, range(1))
    state = engine.basic_optimizer.state_dict()
    theirs = {"lr": 0.03, "bias_correction": True, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
    theirs.update(max_grad_norm=0.0, max_coeff=0.7, min_coeff=0.1, step=3)
    state["param_groups"] = [{**theirs, "params": group["params"]} for group in state["param_groups"]]
    engine.basic_optimizer.load_state_dict(state)
    train(engine, rank, range(1))
    found = [
        {k: v for k, v in group.items() if k != "params"} for group in engine.basic_optimizer.param_groups
    ]
    cases.stop(engine)
    return found


def test_a_checkpoint_of_deepspeeds_lamb_keeps_its_algorithm() -> None:
    """Its bias_correction says whether; where is the variant's to say."""
    ((found,), _) = run_ranks(2, from_fused_lamb, timeout=300)
    assert found["bias_correction"] == "lr"
    assert found["trust_clip"] == (0.1, 0.7)
    assert (found["lr"], found["weight_decay"], found["eps"], found["variant"]) == (
        0.03,
        0.2,
        1e-7,
        "deepspeed",
    )
    assert not {"max_coeff", "min_coeff", "step", "max_grad_norm"} & found.keys()


def seen_by_deepspeed(rank: int, stage: int) -> None:
    """DeepSpeed links the states of all groups after the first group's first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = start(cases.config(stage), groups=True)
    train(engine, rank, range(2))
    full = engine.basic_optimizer.full_state_dict()
    for place, (_, p, _) in enumerate(engine.basic_optimizer._rows):
        if p.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(p, key)
                assert value.any()
                if full is not None:
                    assert torch.equal(value, full["state"][place][key])
    cases.stop(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_view_of_the_state(stage: int) -> None:
    run_ranks(2, seen_by_deepspeed, stage, timeout=300)


def foreign(rank: int, folder: str) -> None:
    engine = start(cases.config(2))
    engine.load_checkpoint(folder, tag="two")
    train(engine, rank, range(1))


def test_a_checkpoint_with_moments_of_another_size(tmp_path: Path) -> None:
    run_ranks(2, saved, cases.config(2), str(tmp_path), False, timeout=300)
    for path in (tmp_path / "two").glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        (state,) = content["optimizer_state_dict"]["base_optimizer_state"]["state"].values()
        state["exp_avg"] = state["exp_avg"][:-8]
        torch.save(content, path)
    for kind, message in run_ranks_expecting_errors(2, foreign, str(tmp_path), timeout=300).values():
        assert kind == "ValueError"
        assert "universal" in message


def crossed(rank: int, config: dict[str, Any], full: Any) -> dict[str, Any]:
    """A whole state, from anywhere, into an engine of other options; what comes out, and the model's weights."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    engine = start(config, seed=99)
    engine.basic_optimizer.load_full_state_dict(full if rank == 0 else None)
    again = engine.basic_optimizer.full_state_dict()
    with GatheredParameters(list(engine.module.parameters())):
        model = {
            name: p.detach().float().clone()
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        }
    train(engine, rank, range(2, 3))  # the proof at the first step finds model and masters the same
    cases.stop(engine)
    return {"full": again, "model": model}


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_whole_state_between_stages_and_world_sizes(stage: int, dtype: str, tmp_path: Path) -> None:
    source, *_ = run_ranks(3, saved, cases.config(3 - stage, "bf16"), str(tmp_path), False, timeout=300)
    full = source["full"]
    other = {"lr": 0.5, "weight_decay": 0.9}
    result, *others = run_ranks(2, crossed, cases.config(stage, dtype, params=other), full, timeout=300)
    assert all(other["full"] is None for other in others)
    assert result["full"]["param_groups"] == full["param_groups"]
    names = [name for name, _ in cases.tiny().named_parameters()]
    for param, state in full["state"].items():
        for key, value in state.items():
            assert torch.equal(result["full"]["state"][param][key], value), (names[param], key)
        rounded = state["master"].to(torch.bfloat16 if dtype == "bf16" else torch.float32).float()
        assert torch.equal(result["model"][names[param]], rounded), names[param]


@pytest.mark.parametrize("stage", [2, 3])
def test_whole_state_goes_to_the_other_optimizers(stage: int, tmp_path: Path) -> None:
    """What an engine leaves, `Lamb` on one device and `ShardedLamb` load: the next step is the oracle's."""
    source, *_ = run_ranks(2, saved, cases.config(stage, "bf16"), str(tmp_path), False, timeout=300)
    full = source["full"]
    for kind in (Lamb, ShardedLamb):
        model = cases.tiny()
        names = [name for name, p in model.named_parameters()]
        params = dict(model.named_parameters())
        with torch.no_grad():
            for param, state in full["state"].items():
                params[names[param]].copy_(state["master"])
        optimizer = kind(list(params.items()), **{**cases.LAMB, "betas": (0.9, 0.99)})
        if kind is Lamb:
            optimizer.load_state_dict(full)
        else:
            optimizer.load_full_state_dict(full)
        oracle = cases.oracle_of({names[i]: state["master"].double() for i, state in full["state"].items()})
        grads = {}
        for i, state in full["state"].items():
            name = names[i]
            oracle.m[name], oracle.v[name] = (
                state["exp_avg"].double().numpy(),
                state["exp_avg_sq"].double().numpy(),
            )
            oracle.steps[name] = int(state["step"])
            grads[name] = training.draw(tuple(state["master"].shape), name)
            params[name].grad = grads[name].clone()
        oracle.step({name: np.asarray(g.double().numpy()) for name, g in grads.items()})
        optimizer.step()
        found = {name: p.detach().double() for name, p in params.items() if name in grads}
        assert cases.worst(found, oracle) <= cases.FP32_TOLERANCE


def from_ours(rank: int, stage: int, full: Any) -> Any:
    engine = start(cases.config(stage), seed=3)
    engine.basic_optimizer.load_full_state_dict(full if rank == 0 else None)
    again = engine.basic_optimizer.full_state_dict()
    cases.stop(engine)
    return again


@pytest.mark.parametrize("stage", STAGES)
def test_whole_state_comes_from_sharded_lamb(stage: int) -> None:
    model = cases.tiny()
    optimizer = ShardedLamb(model.named_parameters(), **{**cases.LAMB, "betas": (0.9, 0.99)})
    for step in range(2):
        model(cases.tokens(0, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    full = optimizer.full_state_dict()
    assert full is not None
    again = run_ranks(2, from_ours, stage, full, timeout=300)[0]
    for param, state in full["state"].items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(again["state"][param][key], state[key])


def misfit(rank: int, stage: int, full: Any) -> None:
    engine = start(cases.config(stage))
    engine.basic_optimizer.load_full_state_dict(full if rank == 0 else None)


def test_a_whole_state_that_does_not_fit_is_an_error_on_every_rank(tmp_path: Path) -> None:
    source, *_ = run_ranks(2, saved, cases.config(2, "bf16"), str(tmp_path), False, timeout=300)
    full = source["full"]
    for stage, change, said in (
        (2, lambda: full["state"][2].update(exp_avg=torch.zeros(3)), "expected a whole tensor"),
        (3, lambda: full["state"][2].update(step=torch.tensor(7.0)), "one step count"),
        (1, lambda: full["state"].update({999: full["state"][2]}), "state of parameters [999]"),
        (2, lambda: full["state"][2].update(exp_avg="x"), "AttributeError"),
        (2, lambda: full["param_groups"].pop(), "holds groups of"),
    ):
        kept = {key: dict(value) for key, value in full["state"].items()}
        change()
        for kind, message in run_ranks_expecting_errors(2, misfit, stage, full, timeout=300).values():
            assert kind in ("ValueError", said)
            assert said in (kind, message) or said in message
        full["state"] = kept
    shutil.rmtree(tmp_path)
