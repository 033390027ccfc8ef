"""`--dry-run`: the numbers of a run, by arithmetic alone."""

from __future__ import annotations

from typing import Any

import torch

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.model import hf_config, model_size, parameters_to_train
from sharded_lamb.bert.optim import STAGES
from sharded_lamb.bert.schedule import schedule_of
from sharded_lamb.bert.train_backend import check_parallel
from sharded_lamb.plan.costs import costs
from sharded_lamb.plan.sharding import Choices, Sharding
from sharded_lamb.recipes.training.precision import resolve_precision

_DTYPES = {"fp32": torch.float32, "bf16_autocast": torch.float32, "bf16": torch.bfloat16}


def describe(config: RunConfig, world_size: int) -> str:
    """Batch arithmetic, memory and steps of `config` on `world_size` ranks.

    Raises:
        ValueError: as in the run itself.
    """
    check_parallel(config, world_size)
    bert = _meta_bert(config)
    size = model_size(bert)
    lines = [
        f"model: {size.parameters:,} parameters; {config.parallel} on {world_size} ranks, "
        f"{config.speed.precision}",
        _memory_line(config, bert, world_size),
    ]
    steps = samples = flops = 0
    causal = config.masking.causal_fraction or 0.0
    for number, phase in enumerate(config.phases):
        plan, schedule = config.plan_batches(phase, world_size), schedule_of(config, number)
        begin, end = plan.step_plan(phase.steps - 1, 0, 0).micro_batches[-1]
        count = plan.samples_before(phase.steps)
        tokens = count * phase.sequence_length
        lines.append(
            f"phase {phase.name!r}: global batch {plan.global_batch} = {world_size} ranks x "
            f"{plan.accumulation(phase.steps)} accumulated x {end - begin} (limit {plan.max_micro_batch}); "
            f"{phase.steps:,} steps, {count:,} sequences of {phase.sequence_length}, {tokens:,} tokens with padding; "
            f"{schedule.describe()}"
        )
        steps, samples = steps + phase.steps, samples + count
        predicted = (1 - causal) * config.max_predictions(phase) + causal * phase.sequence_length
        pairs = round(tokens * phase.sequence_length * (1 - causal / 2))
        flops += size.flops(tokens, round(count * predicted), pairs)
    lines.append(f"in all: {steps:,} steps, {samples:,} sequences, {flops:.3g} floating point operations")
    return "\n".join(lines)


def _meta_bert(config: RunConfig) -> Any:
    """The model without memory for its parameters."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    kind = BertForPreTraining if config.data.nsp else BertForMaskedLM
    vocab_size = -(-config.tokenizer.vocab_size // config.model.pad_vocab_to) * config.model.pad_vocab_to
    shape = hf_config(config.model, vocab_size, 0)
    if config.model.pretrained is not None:
        shape = BertConfig.from_pretrained(config.model.pretrained)
    with torch.device("meta"):
        return kind(shape)


def _memory_line(config: RunConfig, bert: Any, world_size: int) -> str:
    parts = memory(config, bert, world_size)
    listing = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items() if size)
    note = "; full gradients as well while accumulating" if config.parallel in ("zero2", "fsdp2") else ""
    if config.parallel == "deepspeed" and config.deepspeed.config is not None:
        note = "; before offloading by deepspeed.config"
    total = sum(parts.values())
    return f"memory a rank before activations: {total / 2**20:,.0f} MiB ({listing}{note})"


def memory(config: RunConfig, bert: Any, world_size: int) -> dict[str, int]:
    """Bytes of the first rank, which has the most, by kind, without activations."""
    model_dtype = _DTYPES[resolve_precision(config.speed.precision)]
    if config.parallel == "deepspeed":
        return _deepspeed_memory(config, model_size(bert).parameters, model_dtype.itemsize, world_size)
    shapes = {name: p.shape for name, p in parameters_to_train(bert)}
    sharding = Sharding(3 if config.parallel == "fsdp2" else STAGES[config.parallel], world_size)
    settings = config.optimizer
    choices = Choices(
        model_dtype=model_dtype,
        bucket_mb=settings.bucket_mb,
        state_dtype=getattr(torch, settings.state_dtype),
        store_param_remainders=settings.store_param_remainders,
        gather_dtype=settings.gather_dtype and getattr(torch, settings.gather_dtype),
        reduce_dtype=settings.reduce_dtype and getattr(torch, settings.reduce_dtype),
    )
    by_kind = costs(shapes, choices, sharding).memory
    return {
        "weights": by_kind["parameters"],
        "gradients": by_kind["gradients"] + by_kind["gradient_shards"],
        "gradient exchange": by_kind["staging"],
        "optimizer state": by_kind["masters"] + by_kind["moments"],
        "averages": -(-model_size(bert).parameters * 4 // world_size) if settings.ema_decay else 0,
    }


def _deepspeed_memory(config: RunConfig, parameters: int, width: int, world_size: int) -> dict[str, int]:
    """An estimate: ZeRO shards everything evenly, and copies fp32 weights into masters too."""
    stage = config.deepspeed.zero_stage
    return {
        "weights": parameters * width // (world_size if stage == 3 else 1),
        "gradients": parameters * width if stage == 1 else parameters * 4 // world_size,
        "optimizer state": parameters * 12 // world_size,
    }
