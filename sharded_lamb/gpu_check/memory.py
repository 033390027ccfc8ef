"""Memory on one device against what ``sharded-lamb plan`` predicts."""

import gc
from dataclasses import replace

import torch

from sharded_lamb import ShardedLamb, shapes
from sharded_lamb.gpu_check.battery import Findings, Section, Setting
from sharded_lamb.gpu_check.training import STAGES
from sharded_lamb.plan.check import Weights
from sharded_lamb.plan.costs import Costs, costs
from sharded_lamb.plan.sharding import Choices, Sharding

CHOICES: dict[str, Choices] = {
    "fp32": Choices(),
    "bf16": Choices(model_dtype=torch.bfloat16),
    "bf16 remainders": Choices(model_dtype=torch.bfloat16, store_param_remainders=16),
}
STEPS = 3


def memory(setting: Setting, found: Findings) -> str:
    """Bytes by kind, exactly; allocated and peak bytes in construction and steps, beside the predicted total."""
    ratios = []
    for name, choices in CHOICES.items():
        for stage in STAGES:
            bucket_mb = choices.bucket_mb if setting.on_gpu else 0.05  # several buckets in either
            cut = replace(choices, bucket_mb=bucket_mb)
            predicted = costs(shapes.load(setting.shapes), cut, Sharding(stage, 1))
            ratio = _measured(setting, found, f"stage {stage} {name}", cut, predicted)
            ratios.append(f"{ratio:.2f}")
    text = "bytes by kind as predicted"
    return f"{text}; peak over prediction {', '.join(ratios)}" if setting.on_gpu else text


def _measured(setting: Setting, found: Findings, name: str, choices: Choices, predicted: Costs) -> float:
    """Train some steps; returns peak bytes over the predicted total (0 on a CPU)."""
    gc.collect()
    before = torch.cuda.memory_allocated() if setting.on_gpu else 0
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = Weights(shapes.load(setting.shapes).values(), choices.model_dtype, setting.device)
    optimizer = ShardedLamb(
        model.named_parameters(),
        stage=2 if predicted.sharding.stage == 2 else 1,
        bucket_mb=choices.bucket_mb,
        kernel=setting.kernel,
        store_param_remainders=choices.store_param_remainders,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    ours = optimizer.memory()
    expected = {kind: predicted.memory[kind] for kind in ours}
    odd = {kind: (size, expected[kind]) for kind, size in ours.items() if size != expected[kind]}
    found.check(name, not odd, f"(measured, predicted): {odd}" if odd else ours)
    if not setting.on_gpu:
        return 0.0
    allocated = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    row = {"predicted": predicted.total_memory, "allocated": allocated, "peak": peak}
    found.note(f"{name}, MiB", {kind: round(size / 2**20, 1) for kind, size in row.items()})
    return peak / predicted.total_memory


SECTIONS = (Section("memory", "Memory against `plan`", 15, memory),)
