"""What the optimizer learns of the DeepSpeed engine that constructs it: parameters' names, and what is not supported.

DeepSpeed hands an optimizer named in a config its parameters and nothing else. Names come from `name_parameters`
(which `sharded_lamb.deepspeed.initialize` calls), else from the engine, found among the callers.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_names: Any = WeakIdKeyDictionary()  # parameter → name


def name_parameters(model: nn.Module) -> None:
    """Let optimizers made from now on know the names of ``model``'s parameters.

    Needed only where neither `sharded_lamb.deepspeed.initialize` nor a DeepSpeed engine makes the optimizer.
    """
    for name, p in model.named_parameters():
        _names[p] = name


def calling_engine() -> DeepSpeedEngine | None:
    """The engine in whose construction the caller runs, if any."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, DeepSpeedEngine):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def names_of(params: list[Tensor], engine: DeepSpeedEngine | None) -> list[str] | None:
    """A name for every parameter, or None where one has none."""
    known: Any = {} if engine is None else getattr(engine, "param_names", {})
    found = [_names[p] if p in _names else known.get(p) for p in params]
    return None if any(name is None for name in found) else found


def with_names(params: Any, engine: DeepSpeedEngine | None) -> Any:
    """Parameters or group dicts → the same as (name, parameter) pairs, where every parameter's name is known.

    Raises:
        ValueError: patterns in a group go by names and a parameter has none.
    """
    items = [params] if isinstance(params, Tensor) else list(params)
    if any(isinstance(item, tuple) for item in items):
        return items
    groups = [dict(item) if isinstance(item, dict) else {"params": [item]} for item in items]
    for group in groups:
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    names = names_of([p for group in groups for p in group["params"]], engine)
    if names is None:
        return items
    named = iter(names)
    for group in groups:
        group["params"] = [(next(named), p) for p in group["params"]]
    return groups if any(isinstance(item, dict) for item in items) else [g["params"][0] for g in groups]


def check_supported(engine: DeepSpeedEngine) -> None:
    """Raises ValueError for what would cut parameters in ways that are not mapped, with the reason."""
    for found, remedy in _unsupported(engine):
        raise ValueError(f"ShardedLamb under DeepSpeed does not support {found} yet: {remedy}")


def _unsupported(engine: DeepSpeedEngine) -> Iterator[tuple[str, str]]:
    offload, parameters = engine.zero_offload_optimizer(), engine.zero_offload_param()
    slices = "a rank's parameters are slices whose norms are not summed"
    if engine.zenflow:
        yield (
            "ZenFlow",
            "it updates chosen gradients apart from the optimizer; remove zero_optimization.zenflow",
        )
    if offload is not None and getattr(offload, "super_offload", False):
        yield "SuperOffload", "it runs its own CPU Adam; set offload_optimizer.super_offload to false"
    if any(str(getattr(section, "device", "")).endswith("nvme") for section in (offload, parameters)):
        yield "offload to NVMe", 'partitions are swapped out between steps; use "device": "cpu"'
    if offload is not None and getattr(offload, "ratio", 1.0) != 1.0:
        yield "partial offload", "the part on the accelerator runs AdamW; set offload_optimizer.ratio to 1.0"
    if engine.autotp_size() > 1:
        yield "tensor parallel", f"{slices}; set autotp_size to 1"
    if engine.mpu is not None and bwc_tensor_model_parallel_world_size(engine.mpu) > 1:
        yield "tensor parallel", f"{slices}; initialize without mpu"
    if engine.bf16_optimizer_states():
        yield "bf16_optimizer_states", "moments are fp32; remove it from the bf16 section"
    if engine.zero_elastic_checkpoint():
        yield (
            "elastic_checkpoint",
            "it wants a step count in the groups; use DeepSpeed's universal checkpoint",
        )
    if engine.pipeline_parallelism:
        yield "pipeline parallel", "ranks hold different layers; use ZeRO instead"
    if engine.has_moe_layers:
        yield (
            "mixture-of-experts layers",
            "experts are partitioned over groups of their own; use another optimizer",
        )


def clipping(engine: DeepSpeedEngine) -> float:
    """The config's gradient_clipping; 0 is none."""
    return float(engine.gradient_clipping())


def accelerator_device() -> torch.device:
    """Where collectives run."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())
