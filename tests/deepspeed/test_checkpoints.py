"""DeepSpeed's checkpoints (its own, consolidated, universal) and this package's full state dict."""

import json
import pickle
import shutil
from collections.abc import Callable
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
    """All of the optimizer's memory on this rank, except DeepSpeed's padding, which is undefined."""
    outcome = cases.masters(engine)
    full = engine.basic_optimizer.full_state_dict()
    for param, state in (full or {"state": {}})["state"].items():
        outcome.update({f"{param}/{key}": value.clone() for key, value in state.items()})
        assert {"step", "master"} | set(engine.basic_optimizer.moments) == state.keys()
    return outcome


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


# All pairs of stage, dtype and groups.
@pytest.mark.parametrize(
    ("stage", "dtype", "groups"),
    [
        (stage, dtype, (stage + half) % 2 == 1)
        for stage in STAGES
        for half, dtype in enumerate(("fp32", "bf16"))
    ],
)
def test_resuming_from_a_checkpoint_is_bit_exact(
    stage: int, dtype: str, groups: bool, tmp_path: Path
) -> None:
    run_ranks(2, interrupted, cases.config(stage, dtype), str(tmp_path), groups, timeout=300)


@pytest.mark.parametrize("stage", [1, 3])
def test_lars_resumes_with_one_moment(stage: int, tmp_path: Path) -> None:
    params = {"lr": 0.01, "weight_decay": 0.1, "variant": "lars", "trust_coefficient": 0.02}
    config = cases.config(stage, params=params)
    run_ranks(2, interrupted, config, str(tmp_path), False, timeout=300)


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
    """Weights and full state at step 2, where it saves a checkpoint, and weights at step 4."""
    engine = start(config, groups)
    train(engine, rank, range(2))
    engine.save_checkpoint(folder, tag="two")
    at_two, full = cases.masters(engine), engine.basic_optimizer.full_state_dict()
    cases.stop(engine)
    return {"masters": at_two, "full": full}


Saving = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Saving:
    """Calls `saved` on so many ranks, once for equal arguments. Each caller gets rank 0's results, and the checkpoint
    where it names a folder, as copies of its own.
    """
    made: dict[str, tuple[bytes, Path]] = {}

    def call(
        world: int, config: dict[str, Any], folder: Path | None = None, groups: bool = False
    ) -> dict[str, Any]:
        key = json.dumps([world, config, groups], sort_keys=True)
        if key not in made:
            kept = tmp_path_factory.mktemp("saved")
            result, *_ = run_ranks(world, saved, config, str(kept), groups, timeout=300)
            made[key] = pickle.dumps(result), kept
        result, kept = made[key]
        if folder is not None:
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        return pickle.loads(result)  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32(stage: int, tmp_path: Path, save: Saving) -> None:
    result = save(2, cases.config(stage, "bf16"), tmp_path, groups=True)
    (consolidated,) = run_ranks(1, consolidate, tmp_path)
    for name, value in result["masters"].items():
        assert torch.equal(consolidated[name].double(), value), name


def consolidate(rank: int, folder: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="two")
    return {name: value.detach() for name, value in weights.items()}


def universal(folder: Path) -> None:
    """Run DeepSpeed's converter, in a worker: it has imported DeepSpeed."""
    run_ranks(1, convert, folder)


def convert(rank: int, folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = ["--input_folder", str(folder / "two"), "--output_folder", str(folder / "universal")]
    # ZeRO 1 and 2 require client state that only Megatron writes, or this switch.
    ds_to_universal.main(parse([*arguments, "--inject_missing_state", *ALONE]))
    (folder / "latest").write_text("universal")


def parse(arguments: list[str]) -> Any:
    import sys
    from unittest import mock

    from deepspeed.checkpoint import ds_to_universal

    with mock.patch.object(sys, "argv", ["ds_to_universal", *arguments]):
        return ds_to_universal.parse_arguments()


def resumed(rank: int, config: dict[str, Any], folder: str, expected: Any) -> dict[str, Any]:
    """Load a universal checkpoint: the state after it, and one step against the oracle."""
    engine = start({**config, "checkpoint": {"load_universal": True}}, True, seed=99)
    engine.load_checkpoint(folder, tag="universal")
    loaded = cases.masters(engine)
    oracle = cases.oracle_of(loaded, overrides=cases.GROUP_OVERRIDES)
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    index = {name: i for i, (name, _, _) in enumerate(engine.basic_optimizer._rows)}
    for name in names:
        state = expected["state"][index[name]]
        oracle.m[name] = state["exp_avg"].double().numpy()
        oracle.v[name] = state["exp_avg_sq"].double().numpy()
        oracle.steps[name] = int(state["step"])
    cases.follow(engine, rank, oracle, steps=2, first=2)
    groups = [
        {key: group[key] for key in ("lr", "weight_decay", "betas")}
        for group in engine.basic_optimizer.param_groups
    ]
    outcome = {"loaded": loaded, "worst": cases.worst(cases.masters(engine), oracle), "groups": groups}
    cases.stop(engine)
    return outcome


@pytest.mark.parametrize(("stage", "before", "after"), [(1, 2, 3), (2, 3, 2), (3, 2, 3), (3, 3, 2)])
def test_universal_checkpoints_at_other_world_sizes(
    stage: int, before: int, after: int, tmp_path: Path, save: Saving
) -> None:
    """Three groups with different options: ZeRO-3's loader gives all groups the first's, which is undone."""
    config = cases.config(stage, "bf16")
    result = save(before, config, tmp_path, groups=True)
    universal(tmp_path)
    for outcome in run_ranks(after, resumed, config, str(tmp_path), result["full"], timeout=300):
        for name, value in result["masters"].items():
            assert torch.equal(outcome["loaded"][name], value), name
        assert [group["lr"] for group in outcome["groups"]] == [0.02, 0.05, 0.02]
        assert [group["weight_decay"] for group in outcome["groups"]] == [0.1, 0.0, 0.1]
        assert [list(group["betas"]) for group in outcome["groups"]] == [
            [0.9, 0.99],
            [0.9, 0.99],
            [0.8, 0.95],
        ]
        assert outcome["worst"] <= cases.FP32_TOLERANCE


def test_a_universal_checkpoint_in_subgroups(tmp_path: Path) -> None:
    """DeepSpeed shares one step count between all subgroups: each must count separately."""
    config = cases.config(3, "bf16", zero={"sub_group_size": 500})
    result, *_ = run_ranks(2, saved, config, str(tmp_path), True, timeout=300)
    universal(tmp_path)
    for outcome in run_ranks(2, resumed, config, str(tmp_path), result["full"], timeout=300):
        assert outcome["worst"] <= cases.FP32_TOLERANCE


def other_options(rank: int, config: dict[str, Any], folder: str, tag: str) -> float:
    """An engine with other options loads after a step: it takes the saved options, as in torch."""
    params = {**cases.LAMB, "weight_decay": 0.7, "exclude_from_weight_decay": ["head"]}
    more = {"checkpoint": {"load_universal": True}} if tag == "universal" else {}
    engine = start({**config, "optimizer": {"type": "ShardedLamb", "params": params}, **more})
    train(engine, rank, range(1))
    engine.load_checkpoint(folder, tag=tag)
    oracle = cases.oracle_of(cases.masters(engine), no_decay={"fc.weight", "fc.bias"})
    full = engine.basic_optimizer.full_state_dict()
    shared: list[Any] = [full]
    torch.distributed.broadcast_object_list(shared, 0)
    for index, (name, _, _) in enumerate(engine.basic_optimizer._rows):
        if name in oracle.params:
            state = shared[0]["state"][index]
            oracle.m[name] = state["exp_avg"].double().numpy()
            oracle.v[name] = state["exp_avg_sq"].double().numpy()
            oracle.steps[name] = int(state["step"])
    cases.follow(engine, rank, oracle, steps=2, first=2)
    worst = cases.worst(cases.masters(engine), oracle)
    cases.stop(engine)
    return worst


@pytest.mark.parametrize("tag", ["two", "universal"])
@pytest.mark.parametrize("stage", [1, 3])
def test_saved_options_replace_the_engines(stage: int, tag: str, tmp_path: Path, save: Saving) -> None:
    params = {**cases.LAMB, "exclude_from_weight_decay": ["^fc"]}
    config = cases.config(stage, "bf16", params=params)
    save(2, config, tmp_path)
    if tag == "universal":
        universal(tmp_path)
    assert max(run_ranks(2, other_options, config, str(tmp_path), tag, timeout=300)) <= cases.FP32_TOLERANCE


def before_the_first_step(rank: int, config: dict[str, Any], folder: str) -> float:
    """Load a checkpoint without moments into an engine with moments: they are reset."""
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
def test_a_checkpoint_from_before_the_first_step(stage: int, dtype: str, tmp_path: Path) -> None:
    worst = run_ranks(2, before_the_first_step, cases.config(stage, dtype), str(tmp_path), timeout=300)
    assert max(worst) <= cases.FP32_TOLERANCE


def from_fused_lamb(rank: int) -> list[dict[str, Any]]:
    """Load the groups of a checkpoint of DeepSpeed's Lamb."""
    engine = start(cases.config(2, params={"variant": "deepspeed", "lr": 0.01}))
    train(engine, rank, range(1))
    state = engine.basic_optimizer.state_dict()
    deepspeed_group = {
        "lr": 0.03,
        "bias_correction": True,
        "betas": (0.8, 0.95),
        "eps": 1e-7,
        "weight_decay": 0.2,
    }
    deepspeed_group.update(max_grad_norm=0.0, max_coeff=0.7, min_coeff=0.1, step=3)
    state["param_groups"] = [
        {**deepspeed_group, "params": group["params"]} for group in state["param_groups"]
    ]
    engine.basic_optimizer.load_state_dict(state)
    train(engine, rank, range(1))
    outcome = [
        {k: v for k, v in group.items() if k != "params"} for group in engine.basic_optimizer.param_groups
    ]
    cases.stop(engine)
    return outcome


def test_a_checkpoint_of_deepspeeds_lamb_keeps_its_algorithm() -> None:
    """Its bias_correction enables the correction; the variant applies it to lr."""
    ((outcome,), _) = run_ranks(2, from_fused_lamb, timeout=300)
    assert outcome["bias_correction"] == "lr"
    assert outcome["trust_clip"] == (0.1, 0.7)
    assert (outcome["lr"], outcome["weight_decay"], outcome["eps"], outcome["variant"]) == (
        0.03,
        0.2,
        1e-7,
        "deepspeed",
    )
    assert not {"max_coeff", "min_coeff", "step", "max_grad_norm"} & outcome.keys()


def seen_by_deepspeed(rank: int, stage: int) -> None:
    """DeepSpeed links the states of all groups after the first group's first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = start(cases.config(stage), groups=True)
    train(engine, rank, range(2))
    full = engine.basic_optimizer.full_state_dict()
    for index, (_, p, _) in enumerate(engine.basic_optimizer._rows):
        if p.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(p, key)
                assert value.any()
                if full is not None:
                    assert torch.equal(value, full["state"][index][key])
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
    """Load a full state dict into an engine with other options; returns its full state dict and the model's weights."""
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
    train(engine, rank, range(2, 3))  # the first step proves that model and masters agree
    cases.stop(engine)
    return {"full": again, "model": model}


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_full_state_between_stages_and_world_sizes(stage: int, dtype: str, save: Saving) -> None:
    full = save(3, cases.config(3 - stage, "bf16"))["full"]
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
def test_other_optimizers_load_the_full_state(stage: int, save: Saving) -> None:
    """`Lamb` and `ShardedLamb` load an engine's full state: the next step is the oracle's."""
    full = save(2, cases.config(stage, "bf16"))["full"]
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
        outcome = {name: p.detach().double() for name, p in params.items() if name in grads}
        assert cases.worst(outcome, oracle) <= cases.FP32_TOLERANCE


def from_ours(rank: int, stage: int, full: Any) -> Any:
    engine = start(cases.config(stage), seed=3)
    engine.basic_optimizer.load_full_state_dict(full if rank == 0 else None)
    again = engine.basic_optimizer.full_state_dict()
    cases.stop(engine)
    return again


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_loads_the_full_state_of_sharded_lamb(stage: int) -> None:
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


def test_a_full_state_that_does_not_fit_raises_on_every_rank(save: Saving) -> None:
    full = save(2, cases.config(2, "bf16"))["full"]
    for stage, change, fragment in (
        (2, lambda: full["state"][2].update(exp_avg=torch.zeros(3)), "expected a whole tensor"),
        (3, lambda: full["state"][2].update(step=torch.tensor(7.0)), "one step count"),
        (1, lambda: full["state"].update({999: full["state"][2]}), "state of parameters [999]"),
        (2, lambda: full["state"][2].update(exp_avg="x"), "AttributeError"),
        (2, lambda: full["param_groups"].pop(), "has groups of"),
    ):
        kept = {key: dict(value) for key, value in full["state"].items()}
        change()
        for kind, message in run_ranks_expecting_errors(2, misfit, stage, full, timeout=300).values():
            assert kind in ("ValueError", fragment)
            assert fragment in (kind, message) or fragment in message
        full["state"] = kept
