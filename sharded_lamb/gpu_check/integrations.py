"""Checks beside torch's and other programs' training loops: GradScaler, FSDP2, DeepSpeed, Accelerate, Trainer."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from sharded_lamb import ShardedLamb
from sharded_lamb.gpu_check import processes
from sharded_lamb.gpu_check.battery import Findings, LeftOut, Section, Setting
from sharded_lamb.gpu_check.training import (
    STAGES,
    group_of_one,
    reconstruction_loss,
    small_data,
    small_model,
    train_small,
)

ZERO_S = 45.0
"""Seconds that the battery must have left for DeepSpeed; each number of ranks takes at most twice as many."""

HALF_PRECISION = 2e-2
"""Relative, norm-wise, of weights after five steps in 16 bits against fp32."""


def grad_scaler(setting: Setting, found: Findings) -> str:
    """float16 autocast with a step that overflows: skipped once, scale halved, both stages alike."""
    results = []
    for stage in STAGES:
        scaler = torch.amp.GradScaler(setting.device.type, init_scale=2.0**10)
        trained = train_small(
            lambda model, stage=stage: ShardedLamb(  # type: ignore[misc]
                model.named_parameters(), lr=0.01, stage=stage, kernel=setting.kernel
            ),
            setting.device,
            scaler=scaler,
            overflow_at=2,
        )
        scale, skipped = scaler.get_scale(), trained.optimizer.skipped_steps
        text = f"scale {scale:g}, {skipped} skipped"
        found.check(f"stage {stage}", (scale, skipped) == (512.0, 1), text)
        finite = all(bool(weight.isfinite().all()) for weight in trained.weights)
        found.check(f"stage {stage}: weights", finite, "finite" if finite else "not finite")
        results.append(trained.weights)
    stage_1, stage_2 = results  # clip_grad_norm_ sums the squares of a stage in its own order
    found.within("stage 1 and stage 2", stage_2, stage_1, 1e-6)
    return "an overflow skips one step and halves the scale; both stages alike"


def fsdp2(setting: Setting, found: Findings) -> str:
    """``fully_shard`` on a mesh of one device, against plain parameters."""

    def make(model: nn.Module) -> ShardedLamb:
        return ShardedLamb(model.named_parameters(), lr=0.01, max_grad_norm=1.0)

    plain = train_small(make, setting.device).weights
    with group_of_one(setting):
        mesh = init_device_mesh(setting.device.type, (1,))

        def sharded(**options: Any) -> Callable[[nn.Module], nn.Module]:
            def wrap(model: nn.Module) -> FSDPModule:
                for layer in model.children():
                    if any(True for _ in layer.parameters()):
                        fully_shard(layer, mesh=mesh, **options)
                return fully_shard(model, mesh=mesh, **options)

            return wrap  # type: ignore[return-value]

        found.equal("fp32", train_small(make, setting.device, wrap=sharded()).weights, plain)
        bf16 = sharded(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        found.within(
            "bf16 policy", train_small(make, setting.device, wrap=bf16).weights, plain, HALF_PRECISION
        )
        if setting.on_gpu:
            offloaded = train_small(make, setting.device, wrap=sharded(offload_policy=CPUOffloadPolicy()))
            found.within("CPU offload", offloaded.weights, plain, 1e-6)
    return "fp32 equal to the bit to plain parameters; bf16 policy and CPU offload within tolerance"


def deepspeed(setting: Setting, found: Findings) -> str:
    """ZeRO 0 to 3 in fp32, bf16 and fp16 (on a CPU not fp16), on one rank and on two, in processes of their own."""
    expected = 12 if setting.on_gpu else 8
    for world_size in (1, 2):
        timeout = max(ZERO_S / 2, min(2 * ZERO_S, setting.seconds_left))
        rows = processes.rows_of("sharded_lamb.gpu_check.zero", setting.device, world_size, timeout)
        for row in rows:
            name = f"{row['zero']}, ranks: {world_size}"
            if "error" in row:
                found.check(name, False, row["error"])
            else:
                tolerance = 1e-5 if row["zero"].startswith("fp32") else HALF_PRECISION
                text = f"relative difference {row['difference']:.1e}, at most {tolerance:.0e}"
                found.check(name, row["difference"] <= tolerance, text)
        found.check(f"combinations, ranks: {world_size}", len(rows) == expected, f"{len(rows)} of {expected}")
    return f"ZeRO 0 to 3 on one rank and on two, {expected} combinations with dtypes: within tolerance of ShardedLamb"


def outside(setting: Setting, found: Findings) -> str:
    """Accelerate with bf16, and transformers' Trainer with a resume; one that is not importable is left out."""
    left_out = []
    for name, run in (("Accelerate", _accelerate), ("Trainer", _trainer)):
        try:
            run(setting, found)
        except ImportError as error:
            left_out.append(f"{name} (not importable: {error})")
            found.note(name, f"left out, not importable: {error}")
    if not found.checks:
        raise LeftOut("; ".join(left_out))
    return "trains, and resumes" + (f"; left out: {'; '.join(left_out)}" if left_out else "")


def _accelerate(setting: Setting, found: Findings) -> None:
    """One ``prepare`` moves the model after the optimizer was constructed."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=not setting.on_gpu)
    model = small_model(torch.device("cpu"))
    optimizer = ShardedLamb(model.named_parameters(), lr=0.01, stage=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    x = small_data(accelerator.device, 1)[0]
    for _ in range(8):
        loss = reconstruction_loss(model, x)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 4))
    device = next(model.parameters()).device
    falls = losses[-1] < losses[0] and device.type == setting.device.type
    found.check("Accelerate bf16, first and last loss", falls, [losses[0], losses[-1], str(device)])


def _trainer(setting: Setting, found: Findings) -> None:
    """Twelve steps, and six that resume from the checkpoint in the middle, end alike."""
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            name: torch.randint(0, 500, (16,), generator=generator, device="cpu")
            for name in ("input_ids", "labels")
        }
        for _ in range(64)
    ]
    shape = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500
    )

    def trained(resume: str | None) -> tuple[Any, list[torch.Tensor]]:
        torch.manual_seed(0)
        net: Any = BertForMaskedLM(shape)
        net.to(setting.device)
        optimizer = ShardedLamb(net.named_parameters(), lr=0.01, stage=1, kernel=setting.kernel)
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=12,
            logging_steps=4,
            save_steps=6,
            report_to=[],
            bf16=setting.on_gpu,
            use_cpu=not setting.on_gpu,
            disable_tqdm=True,
        )
        constant: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer: Any = Trainer(net, arguments, train_dataset=data, optimizers=(optimizer, constant))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state, [p.detach().float().cpu() for p in net.parameters()]

    with tempfile.TemporaryDirectory() as folder:
        _, whole = trained(None)
        state, resumed = trained(f"{folder}/checkpoint-6")
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    found.check("Trainer, steps of a resumed run", state.global_step == 12, [state.global_step, losses])
    together = [[torch.cat([w.flatten() for w in weights])] for weights in (resumed, whole)]
    found.within("Trainer, a resumed and a whole run", together[0], together[1], 1e-2)


SECTIONS = (
    Section("grad-scaler", "GradScaler", 5, grad_scaler),
    Section("fsdp2", "FSDP2 on one device", 10, fsdp2),
    Section("deepspeed", "DeepSpeed", ZERO_S, deepspeed),
    Section("outside", "Accelerate and Trainer", 30, outside),
)
