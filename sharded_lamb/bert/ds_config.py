"""`parallel: deepspeed`: the recipe's settings as DeepSpeed's configuration, without importing DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import OptimizerConfig, RunConfig
from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.recipes.training.config_io import merged_over
from sharded_lamb.recipes.training.precision import resolve_precision

# Sections of a ds_config that the recipe decides → the settings to use instead.
DECIDED = {
    "optimizer": "optimizer.variant, optimizer.weight_decay and other keys of optimizer",
    "scheduler": "phases.N.lr, phases.N.warmup_fraction and phases.N.decay_power",
    "train_batch_size": "phases.N.global_batch",
    "train_micro_batch_size_per_gpu": "batch.max_micro_batch",
    "gradient_accumulation_steps": "batch.max_micro_batch, from which accumulation follows",
    "managed_gradient_accumulation": "batch.max_micro_batch, from which accumulation follows",
    "gradient_allreduce_op": "phases.N.global_batch: losses are scaled for averaged gradients",
    "gradient_clipping": "optimizer.max_grad_norm",
    "elasticity": "phases.N.global_batch: a run resumes on any number of ranks",
    "data_efficiency": "phases.N.sequence_length",
    "curriculum_learning": "phases.N.sequence_length",
    "torch_autocast": "speed.precision",
    "amp": "speed.precision",
}


def ds_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: the recipe's settings and further sections of `deepspeed.config`.

    Raises:
        ValueError: the file is missing or not JSON, or it has a section that the recipe decides.
    """
    file = {} if config.deepspeed.config is None else _read(Path(config.deepspeed.config))
    _refuse_decided(file, config)
    plans = [config.plan_batches(phase, world_size) for phase in config.phases]
    bf16 = config.speed.precision == "bf16"
    elements = int(config.optimizer.bucket_mb * 2**20) // (2 if bf16 else 4)
    bucket = max(2, elements // 2 * 2)  # DeepSpeed requires an even number
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(plan.max_micro_batch for plan in plans),
        # For information only: the loop sets the accumulation boundary itself.
        "gradient_accumulation_steps": max(plan.accumulation(plan.steps) for plan in plans),
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,  # DeepSpeed's default is 1.0
        "optimizer": {"type": "ShardedLamb", "params": lamb_params(config.optimizer)},
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if bf16:  # a sum of hundreds of micro-batches needs more than bf16's 8 bits
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged_over(own, file)


def lamb_params(settings: OptimizerConfig) -> dict[str, Any]:
    """``optimizer.params`` of a ds_config.

    It lists the variant's options instead of its name: given the name, the plugin would require its authors' clipping
    and DeepSpeed's meaning of bias_correction, but explicit settings win here.
    """
    given = settings.keywords()
    options = {**VARIANTS[given.pop("variant")], **given}
    del options["max_grad_norm"]  # `ds_config` passes it as gradient_clipping
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {**plain, "lr": 0.0}  # the schedule sets it before every step


def _read(path: Path) -> dict[str, Any]:
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"deepspeed.config={str(path)!r}: {error.strerror}; give the path of a JSON file"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed.config={str(path)!r}: not valid JSON: {error}") from None
    if not isinstance(sections, dict):
        raise ValueError(
            f"deepspeed.config={str(path)!r}: expected an object of sections, found {type(sections).__name__}"
        )
    return sections


def _refuse_decided(file: dict[str, Any], config: RunConfig) -> None:
    origin = f"deepspeed.config={config.deepspeed.config!r}"
    for key, remedy in DECIDED.items():
        if key in file:
            raise ValueError(f"{origin}: {key!r} is the recipe's to decide; remove it and set {remedy}")
    precision = resolve_precision(config.speed.precision)
    for key, expected in (("fp16", False), ("bf16", precision == "bf16")):
        enabled = _section(file, key, origin).get("enabled", expected)
        if enabled is not expected:
            raise ValueError(
                f"{origin}: {key}.enabled={enabled!r} beside speed.precision={precision!r}; remove it and set "
                f"speed.precision to bf16, bf16_autocast or fp32"
            )
    stage = _section(file, "zero_optimization", origin).get("stage", config.deepspeed.zero_stage)
    if stage != config.deepspeed.zero_stage:
        raise ValueError(
            f"{origin}: zero_optimization.stage={stage!r} beside deepspeed.zero_stage="
            f"{config.deepspeed.zero_stage}; remove it and set deepspeed.zero_stage"
        )


def _section(file: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    section = file.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{origin}: {key}={section!r}: expected an object of settings")
    return section
