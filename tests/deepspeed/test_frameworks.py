"""Hugging Face's Trainer and Accelerate, which read ds_config files and never call this package."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deepspeed import cases
from tests.harness import run_ranks

AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "ShardedLamb",
        "params": {
            "lr": "auto",
            "betas": "auto",
            "eps": "auto",
            "weight_decay": "auto",
            "exclude_from_weight_decay": ["bias$", "norm"],
        },
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
    "bf16": {"enabled": False},
}
NO_DECAY = {"model.norm.weight", "model.norm.bias", "model.fc.bias", "model.head.bias"}


class ForTrainer(nn.Module):
    """The Trainer's model interface: keyword inputs, the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.model = cases.tiny()

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.model(input_ids),)


class Watch:
    """Steps the oracle on DeepSpeed's averaged gradients, just before each step of the engine."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.step = engine, engine.step
        self.oracle = cases.oracle_of(cases.masters(engine), no_decay=NO_DECAY)
        self.steps = 0
        engine.step = self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        (rate,) = self.engine.get_lr()
        for options in self.oracle.options.values():
            options["lr"] = rate
        self.oracle.step(cases.gradients(self.engine))
        self.steps += 1
        return self.step(*arguments, **keywords)

    def report(self) -> dict[str, Any]:
        return {
            "worst": cases.worst(cases.masters(self.engine), self.oracle),
            "steps": self.steps,
            "ratios": self.engine.basic_optimizer.trust_ratios(),
            "type": type(self.engine.basic_optimizer).__name__,
        }


def begin_anew() -> None:
    """Reset Accelerate's per-process state; set the variable that `accelerate launch` sets for DeepSpeed."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


def with_trainer(rank: int, stage: int, folder: str) -> dict[str, Any]:
    import deepspeed
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import sharded_lamb.deepspeed  # noqa: F401
    from sharded_lamb.integrations.transformers import ShardedLambCallback

    begin_anew()
    watches = []

    class Begin(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            watches.append(Watch(trainer.model_wrapped))

    path = Path(folder, f"ds_config{rank}.json")
    path.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": stage}}))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.02,
        warmup_steps=2,
        weight_decay=0.1,
        adam_beta2=0.99,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        deepspeed=str(path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": cases.tokens(0, step)[0]} for step in range(16)]
    trainer = Trainer(ForTrainer(), arguments, train_dataset=data, callbacks=[Begin(), ShardedLambCallback()])
    trainer.train()
    outcome = watches[0].report()
    assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine)
    cases.stop(trainer.model_wrapped)
    return outcome


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer(stage: int, tmp_path: Path) -> None:
    for outcome in run_ranks(2, with_trainer, stage, str(tmp_path), timeout=300):
        assert outcome["type"] == "DeepSpeedLamb"
        assert outcome["steps"] == 4
        assert "model.fc.weight" in outcome["ratios"]
        assert outcome["worst"] <= cases.FP32_TOLERANCE


def with_accelerate(rank: int, stage: int) -> dict[str, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    import sharded_lamb.deepspeed  # noqa: F401

    begin_anew()
    params = {**cases.LAMB, "exclude_from_weight_decay": ["bias$", "norm"]}
    plugin = DeepSpeedPlugin(hf_ds_config=cases.config(stage, params=params))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = ForTrainer()
    data = [cases.tokens(rank, step)[0] for step in range(8)]  # without a GPU, Accelerate does not split it
    loader = torch.utils.data.DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    engine, optimizer, loader = accelerator.prepare(model, DummyOptim(model.parameters()), loader)
    watch = Watch(engine)
    for tokens in loader:
        (loss,) = engine(input_ids=tokens)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    outcome = watch.report()
    cases.stop(engine)
    return outcome


@pytest.mark.parametrize("stage", [1, 3])
def test_accelerate(stage: int) -> None:
    for outcome in run_ranks(2, with_accelerate, stage, timeout=300):
        assert outcome["type"] == "DeepSpeedLamb"
        assert outcome["steps"] == 4
        assert "model.fc.weight" in outcome["ratios"]
        assert outcome["worst"] <= cases.FP32_TOLERANCE
