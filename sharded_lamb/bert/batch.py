"""The batch arithmetic of a phase."""

from __future__ import annotations

from sharded_lamb.bert.config import PhaseConfig, RunConfig
from sharded_lamb.recipes.training.batch import BatchPlan


def plan_batches(config: RunConfig, phase: PhaseConfig, world_size: int) -> BatchPlan:
    """Raises: ValueError that lists the world sizes and batches that fit."""
    ramp = phase.ramp
    return BatchPlan(
        steps=phase.steps,
        global_batch=phase.global_batch,
        world_size=world_size,
        max_micro_batch=config.max_micro_batch(phase),
        ramp_start=ramp.start if ramp else phase.global_batch,
        ramp_steps=ramp.steps if ramp else 0,
        ramp_multiple=ramp.multiple_of if ramp else None,
    )
