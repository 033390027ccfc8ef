"""`--dry-run`: what a run would be, by arithmetic alone."""

from __future__ import annotations

import torch

from sharded_lamb.bert.batch import plan_batches
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.model import ModelSize, hf_config, model_size, resolve_precision
from sharded_lamb.bert.optim import STAGES
from sharded_lamb.bert.schedule import build_schedule
from sharded_lamb.bert.train_backend import check_parallel

_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}


def describe(config: RunConfig, world_size: int) -> str:
    """Batch arithmetic, memory and steps of `config` on `world_size` ranks.

    Raises:
        ValueError: what the run itself would refuse.
    """
    check_parallel(config, world_size)
    size = _size(config)
    lines = [
        f"model: {size.parameters:,} parameters; {config.parallel} on {world_size} ranks, "
        f"{config.speed.precision}",
        *_memory(config, size.parameters, world_size),
    ]
    steps = samples = flops = 0
    for phase in config.phases:
        plan, schedule = plan_batches(config, phase, world_size), build_schedule(phase)
        begin, end = plan.step_plan(phase.steps - 1, 0, 0).micro_batches[-1]
        count = plan.samples_before(phase.steps)
        tokens = count * phase.sequence_length
        lines.append(
            f"phase {phase.name!r}: global batch {plan.global_batch} = {world_size} ranks x "
            f"{plan.accumulation(phase.steps)} accumulated x {end - begin} (limit {plan.max_micro_batch}); "
            f"{phase.steps:,} steps, {count:,} sequences of {phase.sequence_length}, {tokens:,} tokens with padding; "
            f"lr {schedule.peak:.4g}, {schedule.warmup_steps:,} steps of warmup, power {schedule.power:g} "
            f"({schedule.source})"
        )
        steps, samples = steps + phase.steps, samples + count
        flops += size.flops(tokens, count * config.max_predictions(phase), phase.sequence_length)
    lines.append(f"in all: {steps:,} steps, {samples:,} sequences, {flops:.3g} floating point operations")
    return "\n".join(lines)


def _size(config: RunConfig) -> ModelSize:
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    kind = BertForPreTraining if config.data.nsp else BertForMaskedLM
    vocab_size = -(-config.tokenizer.vocab_size // config.model.pad_vocab_to) * config.model.pad_vocab_to
    shape = hf_config(config.model, vocab_size, 0)
    if config.model.pretrained is not None:
        shape = BertConfig.from_pretrained(config.model.pretrained)
    with torch.device("meta"):
        return model_size(kind(shape))


def _memory(config: RunConfig, parameters: int, world_size: int) -> list[str]:
    """Bytes a rank by kind, without activations."""
    width = _BYTES[resolve_precision(config.speed.precision)]
    deepspeed = config.parallel == "deepspeed"
    stages = {**STAGES, "fsdp2": 3, "deepspeed": config.deepspeed.zero_stage}
    stage = stages[config.parallel]
    master = 4 if width == 2 or deepspeed else 0  # DeepSpeed copies fp32 weights too
    weights = parameters * width // (world_size if stage == 3 else 1)
    shard = width if config.parallel == "fsdp2" else 4  # bytes of a gradient element that a rank keeps
    gradients = parameters * width if stage == 1 else parameters * shard // world_size
    state = parameters * (8 + master) // world_size
    total = weights + gradients + state
    parts = {"weights": weights, "gradients": gradients, "optimizer state": state}
    listing = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())
    note = "" if stage == 1 or deepspeed else "; full gradients as well while accumulating"
    if config.deepspeed.config is not None and deepspeed:
        note = "; before what deepspeed.config offloads"
    return [f"memory a rank before activations: {total / 2**20:,.0f} MiB ({listing}{note})"]
