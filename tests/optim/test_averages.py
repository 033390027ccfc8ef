"""``ema_decay``: torch's AveragedModel under sharding, in every stage; its use for evaluation; saved and resumed."""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sharded_lamb import ShardedLamb, checkpoint
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim import fsdp_models as models

DECAY, STEPS = 0.7, 6
SHAPES: dict[str, training.Shape] = {
    "embed.weight": (67, 31),
    "fc.weight": (37, 23),
    "fc.bias": (1,),
    "scale": (2,),
}
LATE = "fc.weight"  # has no gradient in the first step, in which torch's average begins
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "bucket_mb": 0.002}


def made(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and options of its optimizer."""
    stage, dtype, *more = kind.split()
    model = models.Tree({n: w.to(getattr(torch, dtype)) for n, w in training.weights(SHAPES).items()})
    if stage == "fsdp2":
        fully_shard(model.fc)
        fully_shard(model)
        return model, {}
    return model, {"stage": int(stage), "store_param_remainders": "remainders" in more}


def step(model: nn.Module, opt: ShardedLamb, number: int) -> None:
    """The same gradients on every rank, so that their average does not depend on the number of ranks."""
    grads = models.gradients(0, number, SHAPES)
    if number == 0:
        del grads[LATE]
    if isinstance(next(model.parameters()), torch.distributed.tensor.DTensor):
        loss = model(models.gradients(0, number, SHAPES))
    else:
        terms = [(p * grads[n].to(p.dtype)).sum() for n, p in model.named_parameters() if n in grads]
        loss = torch.stack(terms).sum()
    loss.backward()
    if number == 0:
        dict(model.named_parameters())[LATE].grad = None
    opt.step()
    opt.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return models.whole_weights(model)


def averages(model: nn.Module, opt: ShardedLamb) -> dict[str, Tensor]:
    with opt.averaged(model):
        return weights(model)


def run(rank: int, kind: str, steps: int = STEPS) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """(weights, averages, the whole state on the first rank)"""
    model, more = made(kind)
    opt = ShardedLamb(model.named_parameters(), **OPTIONS, **more, ema_decay=DECAY)
    for number in range(steps):
        step(model, opt, number)
    return weights(model), averages(model, opt), opt.full_state_dict()


def test_alone_it_has_the_bits_of_torchs_averaged_model() -> None:
    model, more = made("1 float32")
    opt = ShardedLamb(model.named_parameters(), **OPTIONS, **more, ema_decay=DECAY)
    peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for number in range(STEPS):
        step(model, opt, number)
        peer.update_parameters(model)
        training.assert_same_bits(averages(model, opt), weights(peer.module))
    plain, _ = made("1 float32")
    other = ShardedLamb(plain.named_parameters(), **OPTIONS, **more)
    for number in range(STEPS):
        step(plain, other, number)
    training.assert_same_bits(weights(model), weights(plain))  # averages change no step


def assert_near(values: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance / 100)


NEAR = {"1 float64": 1e-13, "fsdp2 float32": 1e-6}
"""Norms of float64 parameters are not rounded, and FSDP2 does not cut between blocks."""
KINDS = ("1 float32", "2 float32", "2 bfloat16", "2 bfloat16 remainders", "1 float64", "fsdp2 float32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_sharding_has_the_same_bits(kind: str) -> None:
    alone = run(0, kind.replace("fsdp2", "1"))
    for world in (2, 3):
        (trained, average, state), *others = run_ranks(world, run, kind)
        same = training.assert_same_bits
        if kind in NEAR:
            same = partial(assert_near, tolerance=NEAR[kind])
        same(trained, alone[0])
        same(average, alone[1])
        for index, entry in alone[2]["state"].items():
            same({"ema": state["state"][index]["ema"]}, {"ema": entry["ema"]})
            assert entry["ema"].dtype == (torch.float64 if "64" in kind else torch.float32)
        for other in others:
            training.assert_same_bits(other[1], average)


def test_masters_are_averaged_not_rounded_weights() -> None:
    """In float64 from the masters of every step; the bf16 weights' average differs."""
    expected: dict[int, Tensor] = {}
    for number in range(STEPS):
        _, _, state = run(0, "2 bfloat16", number + 1)
        for index, entry in state["state"].items():
            master = entry["master"].double()
            expected[index] = master if number == 0 else DECAY * expected[index] + (1 - DECAY) * master
    for index, entry in state["state"].items():
        torch.testing.assert_close(entry["ema"].double(), expected[index], rtol=3e-7, atol=1e-8)


def evaluated(rank: int, kind: str, skipped: bool) -> list[dict[str, Tensor]]:
    """Weights after steps of which one is skipped, with and without evaluations between them."""
    results = []
    for evaluates in (False, True):
        model, more = made(kind)
        opt = ShardedLamb(model.named_parameters(), **OPTIONS, **more, ema_decay=DECAY)
        for number in range(3):
            step(model, opt, number)
            if evaluates:
                with torch.no_grad():
                    model(models.gradients(0, 0, SHAPES))  # FSDP2 leaves the root unsharded
                before, loss = weights(model), float(model(models.gradients(0, 9, SHAPES)).detach())
                with opt.averaged(model):
                    inside = weights(model)
                    seen = float(model(models.gradients(0, 9, SHAPES)).detach())
                training.assert_same_bits(weights(model), before)
                if number:
                    assert seen != loss
                    assert not torch.equal(inside["embed.weight"], before["embed.weight"])
            if skipped and number == 1:
                ema = averages(model, opt)
                next(model.parameters()).grad = torch.full_like(next(model.parameters()), torch.nan)
                opt.step()
                opt.zero_grad()
                assert opt.skipped_steps == 1
                training.assert_same_bits(averages(model, opt), ema)
        results.append(weights(model))
    return results


@pytest.mark.parametrize("kind", ["1 float32", "2 bfloat16 remainders", "fsdp2 float32"])
def test_evaluation_and_skipped_steps_leave_training_as_it_is(kind: str) -> None:
    for plain, with_evaluations in run_ranks(2, evaluated, kind, kind == "1 float32"):
        training.assert_same_bits(plain, with_evaluations)


def resumed(rank: int, kind: str, folder: str, how: str) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    model, more = made(kind)
    opt = ShardedLamb(model.named_parameters(), **OPTIONS, **more, ema_decay=DECAY)
    for number in range(STEPS):
        if number == 3:
            state = copy.deepcopy(opt.local_state_dict()), opt.full_state_dict()
            if how == "checkpoint":
                checkpoint.save(folder, model, opt)
            elif how == "other ranks":
                checkpoint.load(folder, model, opt)
            opt.close()
            values = copy.deepcopy(weights(model))
            model, more = made(kind)
            opt = ShardedLamb(model.named_parameters(), **OPTIONS, **more, ema_decay=DECAY)
            if how in ("checkpoint", "other ranks"):
                checkpoint.load(folder, model, opt)
            else:
                model.load_state_dict(values)
                opt.load_state_dict(state[0]) if how == "local" else opt.load_full_state_dict(state[1])
        step(model, opt, number)
    return averages(model, opt)


def test_a_resumed_average_has_the_same_bits(tmp_path: Path) -> None:
    kind, folder = "2 bfloat16", str(tmp_path / "saved")
    (expected,) = run_ranks(1, run, kind)
    for how in ("local", "full", "checkpoint"):
        for average in run_ranks(2, resumed, kind, folder, how):
            training.assert_same_bits(average, expected[1])
    for average in run_ranks(3, resumed, kind, folder, "other ranks"):
        training.assert_same_bits(average, expected[1])


def test_state_with_and_without_an_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without one saved it begins at the weights; a saved one that is not kept is said to be left out."""
    model, _ = made("1 float32")
    plain = ShardedLamb(model.named_parameters(), **OPTIONS)
    step(model, plain, 1)
    checkpoint.save(tmp_path / "plain", model, plain)
    for load in ("checkpoint", "state dict"):
        other, _ = made("1 float32")
        opt = ShardedLamb(other.named_parameters(), **OPTIONS, ema_decay=DECAY)
        if load == "checkpoint":
            checkpoint.load(tmp_path / "plain", other, opt)
        else:
            other.load_state_dict(weights(model))
            opt.load_state_dict(plain.local_state_dict())
        training.assert_same_bits(averages(other, opt), weights(model))
        start = weights(other)
        step(other, opt, 2)
        for name, average in averages(other, opt).items():
            torch.testing.assert_close(average, torch.lerp(start[name], weights(other)[name], 1 - DECAY))
        opt.close()
    checkpoint.save(
        tmp_path / "averaged", other, opt := ShardedLamb(other.named_parameters(), ema_decay=DECAY)
    )
    state = opt.full_state_dict()
    opt.close()
    with caplog.at_level(logging.WARNING, "sharded_lamb"):
        checkpoint.load(tmp_path / "averaged", model, plain)
        plain.load_state_dict(state)
    assert [record.levelname for record in caplog.records if "with ema_decay" in record.message] == [
        "WARNING"
    ] * 2


def misused(rank: int, what: str, folder: str) -> None:
    model, more = made("fsdp2 float32" if what == "dtensors" else "2 float32")
    opt = ShardedLamb(
        model.named_parameters(), **OPTIONS, **more, ema_decay=None if what == "none" else DECAY
    )
    step(model, opt, 1)
    with opt.averaged(None if what == "dtensors" else model):
        if what == "step":
            opt.step()
        elif what == "checkpoint":
            checkpoint.save(folder, model, opt)
        elif what == "load":
            opt.load_full_state_dict(None)
        else:
            with opt.averaged():
                pass


MISUSES = {
    "none": "construct the optimizer with ema_decay",
    "step": "before a step, a checkpoint or a load",
    "checkpoint": "before a step, a checkpoint or a load",
    "load": "before a step, a checkpoint or a load",
    "twice": "before a step, a checkpoint or a load",
    "dtensors": "pass the model, as in averaged(model)",
}


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_is_an_error_on_every_rank(what: str, tmp_path: Path) -> None:
    for _, message in run_ranks_expecting_errors(2, misused, what, str(tmp_path / "x")).values():
        assert MISUSES[what] in message


@pytest.mark.parametrize("decay", [1.0, -0.1, 2, "0.9", float("nan")])
def test_decays_out_of_range_are_refused(decay: Any) -> None:
    with pytest.raises(ValueError, match="ema_decay must be None, or a number in"):
        ShardedLamb([nn.Parameter(torch.ones(3))], ema_decay=decay)


def memory(rank: int) -> dict[str, int]:
    model, more = made("2 bfloat16")
    return ShardedLamb(model.named_parameters(), **OPTIONS, **more, ema_decay=DECAY).memory()


def test_its_memory_is_sharded() -> None:
    alone, (half, _) = memory(0), run_ranks(2, memory)
    assert alone["averages"] == alone["moments"] // 2
    assert half["averages"] == half["moments"] // 2 < 0.65 * alone["averages"]
