"""Whole states in state dicts, consolidated as in ZeroRedundancyOptimizer and loaded by every rank; slices warn."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

STAGES = pytest.mark.parametrize("stage", [1, 2])
Run = tuple[dict[str, Tensor], dict[str, Any]]


def warned(opt: ShardedLamb) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.state_dict()
    return [str(warning.message) for warning in caught]


def consolidate(
    rank: int, world: int, stage: int, dtype: torch.dtype, to: int
) -> tuple[Run, dict[str, Tensor]]:
    """(weights and state dict after two steps, weights after five)."""
    params = training.parameters(dtype=dtype)
    opt = training.grouped(params, stage)
    run = {"stage": stage, "rank": rank, "world": world}
    assert warned(opt) == []  # nothing to lose
    training.train(opt, params, steps=range(2), **run)
    (message,) = warned(opt)
    assert f"over {world} ranks is this rank's slices" in message
    assert "call consolidate_state_dict() on every rank" in message
    full = opt.full_state_dict()
    opt.consolidate_state_dict(to)
    assert warned(opt) == []
    opt.param_groups[1]["lr"] = 0.005  # as a scheduler between the two calls
    state = opt.state_dict()
    assert state["param_groups"][1]["lr"] == 0.005
    if rank == to and to == 0:
        assert full is not None
        for param, entry in full["state"].items():
            training.assert_same_bits(state["state"][param], entry)
    assert ("shard" in state["state"][0]) == (rank != to)
    saved = training.copies(params), training.through_bytes(state)
    training.train(opt, params, steps=range(2, 5), **run)
    assert len(warned(opt)) == 1  # the consolidated state is gone
    assert "shard" in opt.local_state_dict()["state"][0]
    return saved, training.copies(params)


def resume(rank: int, world: int, stage: int, saved: list[Run]) -> dict[str, Tensor]:
    values, state = saved[rank % len(saved)]
    params = {name: Parameter(value) for name, value in values.items()}
    opt = training.grouped(params, stage, lr=0.9)
    opt.load_state_dict(state)
    training.train(opt, params, steps=range(2, 5), stage=stage, rank=rank, world=world)
    return training.copies(params)


@STAGES
@pytest.mark.parametrize(("dtype", "to"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_a_consolidated_state_dict_resumes_bit_exactly_on_every_rank(
    dtype: torch.dtype, to: int, stage: int
) -> None:
    results = run_ranks(2, consolidate, 2, stage, dtype, to)
    for saved in (
        [results[to][0]],
        [run for run, _ in results],
    ):  # the framework's file, and every rank's own
        for resumed in run_ranks(2, resume, 2, stage, saved):
            training.assert_same_bits(resumed, results[0][1])


def test_whole_tensors_load_on_another_number_of_ranks() -> None:
    """Stage 1 on the same averaged gradients: the bits of the uninterrupted run."""
    results = run_ranks(3, consolidate, 3, 1, torch.float32, 0)
    for resumed in run_ranks(2, resume, 3, 1, [results[0][0]]):
        training.assert_same_bits(resumed, results[0][1])


def test_lambs_state_loads() -> None:
    params, sharded_params = training.parameters(), training.parameters()
    lamb, sharded = Lamb(params.items(), lr=0.02), ShardedLamb(sharded_params.items(), lr=0.9)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                for name, p in sharded_params.items():
                    p.copy_(params[name])
            sharded.load_state_dict(training.through_bytes(lamb.state_dict()))
        for opt, own in ((lamb, params), (sharded, sharded_params)):
            training.give(own, training.own_gradients(0, step))
            opt.step()
    for name, p in params.items():
        torch.testing.assert_close(sharded_params[name].detach(), p.detach(), rtol=2e-6, atol=2e-6)


def load_different(rank: int, saved: list[Run]) -> None:
    params = training.parameters()
    opt = training.grouped(params, 1)
    before = training.bits_of(opt, params)
    state = training.through_bytes(saved[0][1])
    state["state"][4]["step"] += rank
    try:
        opt.load_state_dict(state)
    finally:
        training.assert_same_bits(training.bits_of(opt, params), before)


def test_ranks_that_load_different_states_are_an_error() -> None:
    saved = [run for run, _ in run_ranks(2, consolidate, 2, 1, torch.float32, 0)]
    for kind, message in run_ranks_expecting_errors(2, load_different, saved).values():
        assert kind == "ValueError"
        assert "step counts: rank 0 has" in message


def ask_by_dcp(rank: int) -> None:
    model = nn.Linear(23, 19)
    opt = ShardedLamb(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.consolidate_state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = dcp.get_optimizer_state_dict(model, opt)
        assert "shard" in state["state"]["weight"]  # slices on every rank, also where the whole state is
        dcp.set_optimizer_state_dict(model, opt, state)
    with pytest.raises(ValueError, match="to must be one of this optimizer's ranks 0 to 1, got 2"):
        opt.consolidate_state_dict(2)


def test_torchs_checkpoints_receive_slices_without_a_warning() -> None:
    run_ranks(2, ask_by_dcp)


# -- frameworks that save what the first rank's state_dict() returns -------------------------------------------------


def begin_anew() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def with_accelerate(rank: int, folder: str, consolidates: bool) -> list[str]:
    """The warnings of save_state."""
    from accelerate import Accelerator

    begin_anew()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    model, prepared = accelerator.prepare(model, ShardedLamb(model.named_parameters(), lr=1e-2))
    opt = prepared.optimizer
    if consolidates:
        accelerator.register_save_state_pre_hook(lambda *_: opt.consolidate_state_dict())

    def train() -> None:
        for step in range(2):
            accelerator.backward(model(training.draw((4, 8), rank, step)).square().mean())
            prepared.step()
            prepared.zero_grad()

    train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator.save_state(folder, safe_serialization=False)
    warnings_seen = [str(warning.message) for warning in caught if "ShardedLamb" in str(warning.message)]
    train()
    expected = training.bits_of(opt, dict(model.named_parameters()))
    accelerator.load_state(folder)
    train()
    training.assert_same_bits(training.bits_of(opt, dict(model.named_parameters())), expected)
    return warnings_seen


def test_accelerate_resumes_what_was_consolidated(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert run_ranks(2, with_accelerate, str(tmp_path), True) == [[], []]


def test_accelerate_is_told_of_slices_when_it_saves_and_when_it_loads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for kind, message in run_ranks_expecting_errors(2, with_accelerate, str(tmp_path), False).values():
        assert kind == "ValueError"
        assert "saved by rank 0 of 2, and this is rank 1 of 2" in message


def with_trainer(rank: int, folder: str, uses_class: bool) -> dict[str, Tensor]:
    """Stops after two steps and resumes from the Trainer's own checkpoint, if ``uses_class``; else trains through."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Consolidate(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **keywords: Any) -> None:
            keywords["optimizer"].optimizer.consolidate_state_dict()

    class ForTrainer(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (super().forward(x).square().mean(),)

    def trained(steps: int, resume: bool) -> dict[str, Tensor]:
        begin_anew()
        torch.manual_seed(0)
        model = ForTrainer(8, 5)
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            save_steps=2,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=2,
            dataloader_pin_memory=False,
        )
        data = [{"x": training.draw((8,), i)} for i in range(16)]
        keywords: dict[str, Any] = {"optimizer_cls_and_kwargs": (ShardedLamb, {"lr": 0.02})}
        if not uses_class:
            opt = ShardedLamb(model.named_parameters(), lr=0.02, weight_decay=0.0)  # as TrainingArguments'
            keywords = {"optimizers": (opt, None)}
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Consolidate()], **keywords)
        trainer.train(resume_from_checkpoint=resume or None)
        return training.copies(dict(model.named_parameters()))

    if uses_class:
        trained(2, resume=False)
        return trained(4, resume=True)
    return trained(4, resume=False)


def test_the_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs` and a stop, `optimizers` and none: the Trainer moves the model after construction."""
    pytest.importorskip("transformers")
    stopped = run_ranks(2, with_trainer, str(tmp_path / "stopped"), True, timeout=300)
    through = run_ranks(2, with_trainer, str(tmp_path / "through"), False, timeout=300)
    for ours, expected in zip(stopped, through, strict=True):
        training.assert_same_bits(ours, expected)
