"""Learning rates: linear warmup and polynomial decay of a phase, or a cosine; and the LAMB paper's square-root rule.

The rate is a pure function of the step, so a checkpoint needs nothing but the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharded_lamb.bert.config import CosineConfig, PhaseConfig, RunConfig

PAPER = "arXiv:1904.00962, table 'untuned LAMB'"
_PAPER_BATCH = 32768
_PAPER_LR = 5e-3  # 5 / (2^0 · 10^3) at batch 32,768; halving the batch divides it by √2
_PAPER_WARMUP = 1 / 5  # at batch 32,768; halving the batch halves it


@dataclass(frozen=True)
class Schedule:
    """`lr(step)` for step 0 … steps-1 of one phase.

    Warmup: lr · (step+1) / warmup_steps. Then: lr · (1 - step/steps)^power, NVIDIA's PolyWarmUpScheduler without the
    rate of 0 that it has in its first and last step.
    """

    peak: float
    steps: int
    warmup_steps: int
    power: float
    source: str

    def lr(self, step: int) -> float:
        assert 0 <= step < self.steps, f"step {step} outside of a schedule of {self.steps}"
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return float(self.peak * (1 - step / self.steps) ** self.power)

    def describe(self) -> str:
        return f"lr {self.peak:.4g}, {self.warmup_steps:,} steps of warmup, decay power {self.power:g} ({self.source})"


@dataclass(frozen=True)
class Cosine:
    """`lr(step)` for the steps of one phase, which begins after ``before`` steps of all phases' ``steps``.

    Warmup: lr · (n+1) / warmup_steps at step n of the run. Then half a cosine, as in ltgoslo/gpt-bert.
    """

    settings: CosineConfig
    before: int
    steps: int

    @property
    def warmup_steps(self) -> int:
        return round(self.settings.warmup_fraction * self.steps)

    def lr(self, step: int) -> float:
        own, at, warmup = self.settings, self.before + step, self.warmup_steps
        assert 0 <= at < self.steps, f"step {at} outside of a schedule of {self.steps}"
        if at < warmup:
            return own.lr * (at + 1) / warmup
        half = 0.5 * (1 + math.cos(math.pi * (at - warmup) / (self.steps - warmup)))
        return own.lr * (own.final_fraction + (1 - own.final_fraction) * half)

    def describe(self) -> str:
        own = self.settings
        return (
            f"lr {own.lr:.4g}, {self.warmup_steps:,} steps of warmup, cosine to {own.lr * own.final_fraction:.4g} "
            f"after {self.steps:,} steps of all phases"
        )


def paper_rule(global_batch: int) -> tuple[float, float]:
    """(lr, warmup fraction) of the LAMB paper for a batch: lr grows with √batch, warmup with the batch."""
    lr = _PAPER_LR * math.sqrt(global_batch / _PAPER_BATCH)
    warmup = _PAPER_WARMUP * min(1.0, global_batch / _PAPER_BATCH)
    return lr, warmup


def build_schedule(phase: PhaseConfig) -> Schedule:
    """The schedule of a phase. The paper's rule replaces `auto`, and `source` names it."""
    auto_lr, auto_warmup = paper_rule(phase.global_batch)
    peak = auto_lr if phase.lr == "auto" else float(phase.lr)
    fraction = auto_warmup if phase.warmup_fraction == "auto" else float(phase.warmup_fraction)
    ruled = [name for name in ("lr", "warmup_fraction") if getattr(phase, name) == "auto"]
    source = "config"
    if ruled:
        beyond = "; extrapolated" if not 512 <= phase.global_batch <= _PAPER_BATCH else ""
        source = f"{' and '.join(ruled)} by the square-root rule of {PAPER}, batch 512 to 32,768{beyond}"
    return Schedule(peak, phase.steps, round(fraction * phase.steps), phase.decay_power, source)


def schedule_of(config: RunConfig, number: int) -> Schedule | Cosine:
    """The schedule of a phase of a run."""
    if config.cosine is None:
        return build_schedule(config.phases[number])
    steps = [phase.steps for phase in config.phases]
    return Cosine(config.cosine, sum(steps[:number]), sum(steps))
