"""Inspects the DeepSpeed engine that constructs the optimizer: parameter names, and features that are not supported.

DeepSpeed passes only parameters to an optimizer named in a config. Names come from `name_parameters` (called by
`sharded_lamb.deepspeed.initialize`), else from the engine, which is found on the call stack.
"""

import sys
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_names: Any = WeakIdKeyDictionary()  # parameter → name


def name_parameters(model: nn.Module) -> None:
    """Register the names of ``model``'s parameters for optimizers that are constructed later.

    Needed only if neither `sharded_lamb.deepspeed.initialize` nor a DeepSpeed engine constructs the optimizer.
    """
    for name, p in model.named_parameters():
        _names[p] = name


def constructing_engine() -> DeepSpeedEngine | None:
    """The engine on the call stack whose constructor runs; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        instance = frame.f_locals.get("self")
        if isinstance(instance, DeepSpeedEngine):
            return instance
        frame = frame.f_back  # type: ignore[assignment]
    return None


def names_of(params: list[Tensor], engine: DeepSpeedEngine | None) -> list[str] | None:
    """The name of every parameter; None if any has no known name."""
    known: Any = {} if engine is None else getattr(engine, "param_names", {})
    names = [_names[p] if p in _names else known.get(p) for p in params]
    return None if any(name is None for name in names) else names


def with_names(params: Any, engine: DeepSpeedEngine | None) -> Any:
    """Parameters or group dicts → the same with (name, parameter) pairs; unchanged unless every name is known."""
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
    """Raises ValueError, with reason and remedy, for a feature whose partitioning of parameters is not supported."""
    for feature, remedy in _unsupported(engine):
        raise ValueError(f"ShardedLamb under DeepSpeed does not support {feature} yet: {remedy}")


def _defects_of_release(engine: DeepSpeedEngine) -> Iterator[tuple[str, str]]:
    """DeepSpeed's own defects in the installed release, with any optimizer."""
    release, remedy = Version(deepspeed.__version__), "install DeepSpeed >= 0.19.8"
    of = f"of DeepSpeed {release}"
    if release < Version("0.17"):
        yield f"DeepSpeed {release}", f"its bf16 without ZeRO does not follow its own gradients; {remedy}"
    if release < Version("0.18") and engine.load_universal_checkpoint():
        yield f"universal checkpoints {of}", f"other weights are loaded than were saved; {remedy}"
    if release.release[:2] != (0, 18) or dist.get_world_size() == 1:
        return
    stage, on_gloo = engine.zero_optimization_stage(), accelerator_device().type == "cpu"
    if stage == 1 and engine.get_data_types() == (torch.bfloat16, torch.float32):
        yield f"ZeRO 1 {of} in bf16 with grad_accum_dtype fp32", f"it does not average gradients; {remedy}"
    if stage in (1, 2) and on_gloo and Version(torch.__version__).release >= (2, 13):
        yield f"ZeRO {stage} {of} with torch {torch.__version__}", f"its all-gather on gloo raises; {remedy}"


def _unsupported(engine: DeepSpeedEngine) -> Iterator[tuple[str, str]]:
    yield from _defects_of_release(engine)
    offload, parameters = engine.zero_offload_optimizer(), engine.zero_offload_param()
    slices = "a rank's parameters are slices whose norms are not summed"
    if getattr(engine, "zenflow", False):  # DeepSpeed < 0.17.3 has no such feature
        yield (
            "ZenFlow",
            "it updates selected gradients outside the optimizer; remove zero_optimization.zenflow",
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
    if getattr(engine, "bf16_optimizer_states", lambda: False)():  # DeepSpeed < 0.18 has no such option
        yield "bf16_optimizer_states", "moments are fp32; remove it from the bf16 section"
    if engine.zero_elastic_checkpoint():
        yield (
            "elastic_checkpoint",
            "it requires a step count in the groups; use DeepSpeed's universal checkpoint",
        )
    if engine.pipeline_parallelism:
        yield "pipeline parallel", "ranks hold different layers; use ZeRO instead"
    if engine.has_moe_layers:
        yield (
            "mixture-of-experts layers",
            "experts are partitioned over separate process groups; use another optimizer",
        )


def clipping(engine: DeepSpeedEngine) -> float:
    """The config's gradient_clipping; 0: no clipping."""
    return float(engine.gradient_clipping())


def accelerator_device() -> torch.device:
    """The device of collectives."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())
