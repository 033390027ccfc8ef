"""Checkpoints of the real DeepSpeed on two ranks convert to the state that its engine held."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_lamb import Lamb, checkpoint
from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint, read_contents
from tests.convert.cases import convert, refused
from tests.deepspeed import cases
from tests.harness import run_ranks

GROUPS = [
    ["embed.weight", "norm.bias", "fc.weight", "fc.bias"],
    ["norm.weight", "scale"],
    ["out.weight", "head.bias"],
]
"""`cases.groups_of`, by name."""


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
"""Makes DeepSpeed use BF16_Optimizer for ZeRO 1 in bf16."""


def written(rank: int, stage: int, dtype: str, more: dict[str, Any], folder: str) -> dict[str, Any]:
    """Saves after three steps; returns the engine's own whole tensors of optimizer and model."""
    model = cases.tiny()
    config = cases.config(stage, dtype, gradient_clipping=0.7, **more)
    engine = cases.start(config, model, model_parameters=cases.groups_of(model))
    for step in range(3):
        engine.backward(engine(cases.tokens(rank, step)))
        engine.step()
    assert (type(engine.optimizer).__name__ == "BF16_Optimizer") is (more == FP32_SUMS)
    engine.save_checkpoint(folder, tag="three")
    names = [name for name, _, _ in engine.basic_optimizer._rows]
    held = {"full": engine.basic_optimizer.full_state_dict(), "names": names, "masters": {}}
    if "round_robin_gradients" not in more.get(
        "zero", {}
    ):  # DeepSpeed's own access to masters is wrong with it
        held["masters"] = cases.masters(engine)
    cases.stop(engine)
    return held


def adam_written(rank: int, stage: int, more: dict[str, Any], folder: str) -> dict[str, dict[str, Tensor]]:
    """Saves an Adam (stage 1) or AdamW (stage 3) under ZeRO; returns its state by DeepSpeed's own access."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = cases.tiny()
    params = {"lr": 1e-2, "weight_decay": 0.01, "torch_adam": True, "adam_w_mode": stage == 3}
    adam = {"type": "Adam", "params": params}
    config = cases.config(stage, "bf16", optimizer=adam, **more)
    groups = (
        {"model_parameters": cases.groups_of(model)} if stage == 3 else {}
    )  # its access below fails for later ones
    engine = cases.start(config, model, **groups)
    for step in range(3):
        engine.backward(engine(cases.tokens(rank, step)))
        engine.step()
    engine.save_checkpoint(folder, tag="three")
    held = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            moments = {k: safe_get_full_optimizer_state(p, k).clone() for k in ("exp_avg", "exp_avg_sq")}
            held[name] = {"master": safe_get_full_fp32_param(p).clone(), **moments}
    cases.stop(engine)
    return held


def check(contents: InMemoryCheckpoint, engine: dict[str, Any], dtype: torch.dtype) -> None:
    assert [sorted(group["names"]) for group in contents.groups] == [sorted(group) for group in GROUPS]
    trained = [name for group in GROUPS for name in group]
    assert sorted(contents.states) == sorted(trained)
    for name in trained:
        expected = engine["full"]["state"][engine["names"].index(name)]
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(contents.states[name][kind], expected[kind]), (name, kind)
        master: Tensor = expected["master"]
        assert torch.equal(master.double(), engine["masters"].get(name, master.double())), name
        assert contents.weights[name].dtype == dtype
        assert contents.weights[name].shape == master.shape
        assert torch.equal(contents.weights[name], master.to(dtype)), name
        if dtype == torch.float32:
            assert "master" not in contents.states[name]
        else:
            assert torch.equal(contents.states[name]["master"], master), name
            assert not torch.equal(master, master.to(dtype).float()), name
    assert torch.equal(contents.weights["frozen"], torch.ones(5, dtype=dtype))
    assert contents.aliases == {"head.weight": "embed.weight"}
    assert [group["options"]["lr"] for group in contents.groups] == [0.02, 0.05, 0.02]
    assert [group["options"]["weight_decay"] for group in contents.groups] == [0.1, 0.0, 0.1]
    assert [group["options"]["betas"] for group in contents.groups] == [(0.9, 0.99), (0.9, 0.99), (0.8, 0.95)]
    assert contents.optimizer["max_grad_norm"] == 0.7
    assert contents.extra == {"deepspeed": {"global_steps": 3, "global_samples": 12}}


@pytest.mark.parametrize(
    ("stage", "dtype", "more"),
    [
        (0, "bf16", {}),
        (1, "fp32", {}),
        (1, "bf16", {}),
        (1, "bf16", FP32_SUMS),
        (2, "bf16", {"zero": {"round_robin_gradients": True}}),
        (3, "fp32", {}),
        (3, "bf16", {"zero": {"sub_group_size": 500}}),
    ],
)
def test_the_state_read_is_the_engines(stage: int, dtype: str, more: dict[str, Any], tmp_path: Path) -> None:
    engine, _ = run_ranks(2, written, stage, dtype, more, str(tmp_path / "theirs"), timeout=300)
    options = ["--trust-pickle"]
    if stage == 0:  # the file numbers parameters
        (tmp_path / "names.json").write_text(json.dumps([name for group in GROUPS for name in group]))
        options += ["--names", str(tmp_path / "names.json")]
    source = (
        tmp_path / "theirs" / ("three" if stage == 2 else "")
    )  # the folder of a tag, or the one with latest
    convert(source, tmp_path / "ours", "deepspeed", "sharded_lamb", *options)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == ["ours", "theirs"]
    check(read_contents(tmp_path / "ours"), engine, torch.float32 if dtype == "fp32" else torch.bfloat16)

    model = cases.tiny(seed=99)
    own = dict(model.named_parameters())
    optimizer = Lamb([{"params": [own[name] for name in group]} for group in GROUPS])
    checkpoint.load(tmp_path / "ours", model, optimizer)
    for name, p in model.named_parameters():
        if p.requires_grad:  # fp32 here: masters are loaded
            assert torch.equal(p, engine["full"]["state"][engine["names"].index(name)]["master"]), name
            assert float(optimizer.state[p]["step"]) == 3.0


@pytest.mark.parametrize(("stage", "more"), [(1, {}), (1, FP32_SUMS), (3, {})])
def test_an_adam_under_zero(
    stage: int, more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, _ = run_ranks(2, adam_written, stage, more, str(tmp_path / "theirs"), timeout=300)
    convert(tmp_path / "theirs", tmp_path / "ours", "deepspeed", "sharded_lamb", "--trust-pickle")
    assert "neither ShardedLamb nor DeepSpeed's Lamb: variant adamw is assumed" in capsys.readouterr().out
    contents = read_contents(tmp_path / "ours")
    assert contents.states.keys() == engine.keys()
    for name, state in contents.states.items():
        assert float(state.pop("step")) == 3.0
        assert all(torch.equal(value, engine[name][kind]) for kind, value in state.items()), name
        assert state.keys() == engine[name].keys()
    assert {group["options"]["variant"] for group in contents.groups} == {"adamw"}
    assert {group["options"]["adam_w_mode"] for group in contents.groups} == {stage == 3}
    decays = [group["options"]["weight_decay"] for group in contents.groups]
    assert decays == ([0.01, 0.0, 0.01] if stage == 3 else [0.01])


def test_partitions_in_another_order_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masters must equal the model's weights, or moments would be mixed up; no rank may be missing."""
    run_ranks(2, written, 1, "bf16", {}, str(tmp_path / "theirs"), timeout=300)
    file = tmp_path / "theirs" / "three" / "mp_rank_00_model_states.pt"
    model = torch.load(file, weights_only=False)
    first = model["param_shapes"][0]
    first.move_to_end("norm.bias")
    torch.save(model, file)
    command = (
        tmp_path / "theirs",
        tmp_path / "ours",
        "--from",
        "deepspeed",
        "--to",
        "lamb",
        "--trust-pickle",
    )
    assert "is not the model's weight" in refused(capsys, *command)
    (file.parent / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "is of 2 ranks, but has the partitions of 1" in refused(capsys, *command)
    assert not (tmp_path / "ours").exists()


def test_pickles_are_loaded_only_with_trust_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    (source / "latest").write_text("three")
    command = (source, tmp_path / "ours", "--from", "deepspeed", "--to", "sharded_lamb")
    assert "give --trust-pickle if you trust it" in refused(capsys, *command)
    assert "lacks the first rank's model states" in refused(capsys, *command, "--trust-pickle")
    (source / "latest").unlink()
    assert "expected a folder with latest" in refused(capsys, *command, "--trust-pickle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_universal_and_parallel_checkpoints_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs" / "one"
    folder.mkdir(parents=True)
    command = (folder, tmp_path / "ours", "--from", "deepspeed", "--to", "sharded_lamb", "--trust-pickle")
    torch.save({"module": {}, "mp_world_size": 2}, folder / "mp_rank_00_model_states.pt")
    assert "under tensor, pipeline or expert parallelism" in refused(capsys, *command)
    (folder / "zero").mkdir()
    assert "is a universal checkpoint" in refused(capsys, *command)


def test_options_of_deepspeeds_own_lamb(tmp_path: Path) -> None:
    """Its kernel needs a GPU, so the file is made by hand, in the layout of deepspeed/ops/lamb/fused_lamb.py."""
    folder = tmp_path / "theirs" / "one"
    folder.mkdir(parents=True)
    half = {"a": torch.randn(3, 2).half(), "b": torch.randn(4).half()}
    masters = [value.float() + 1e-5 for value in half.values()]
    moments = [{"step": 5, "exp_avg": m + 1, "exp_avg_sq": m.abs()} for m in masters]
    group = {
        "lr": 0.01,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_coeff": 0.5,
        "min_coeff": 0.08,
        "params": [0, 1],
    }
    optimizer = {
        "optimizer_state_dict": {"state": dict(enumerate(moments)), "param_groups": [group]},
        "fp32_groups": [masters],
        "clip_grad": 1.0,
    }
    torch.save(
        {"module": half, "optimizer": optimizer, "mp_world_size": 1}, folder / "mp_rank_00_model_states.pt"
    )
    convert(folder, tmp_path / "ours", "deepspeed", "sharded_lamb", "--trust-pickle")
    contents = read_contents(tmp_path / "ours")
    options = contents.groups[0]["options"]
    assert (options["variant"], options["bias_correction"]) == ("deepspeed", "lr")
    assert (options["trust_clip"], options["eps"]) == ((0.08, 0.5), 1e-8)
    assert contents.optimizer["max_grad_norm"] == 1.0
    assert torch.equal(contents.states["b"]["master"], masters[1])
    assert float(contents.states["a"]["step"]) == 5.0
