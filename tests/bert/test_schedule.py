import math

import pytest

from sharded_lamb.bert.config import PhaseConfig
from sharded_lamb.bert.schedule import build_schedule, paper_rule


@pytest.mark.parametrize(
    ("batch", "lr", "warmup"),
    # The paper's table: lr = 5 / (2^k · 10^3), warmup ratio.
    [
        (512, 5 / (2**3.0 * 1e3), 1 / 320),
        (1024, 5 / (2**2.5 * 1e3), 1 / 160),
        (2048, 5 / (2**2.0 * 1e3), 1 / 80),
        (4096, 5 / (2**1.5 * 1e3), 1 / 40),
        (8192, 5 / (2**1.0 * 1e3), 1 / 20),
        (16384, 5 / (2**0.5 * 1e3), 1 / 10),
        (32768, 5 / (2**0.0 * 1e3), 1 / 5),
    ],
)
def test_auto_is_the_papers_table(batch: int, lr: float, warmup: float) -> None:
    assert paper_rule(batch) == pytest.approx((lr, warmup), rel=1e-12)
    schedule = build_schedule(PhaseConfig(steps=10_000, global_batch=batch))
    assert schedule.peak == pytest.approx(lr, rel=1e-12)
    assert schedule.warmup_steps == round(10_000 * warmup)
    assert "1904.00962" in schedule.source
    assert "extrapolated" not in schedule.source


def test_beyond_the_table_the_source_says_so() -> None:
    assert "extrapolated" in build_schedule(PhaseConfig(steps=10, global_batch=65536)).source
    assert (
        build_schedule(PhaseConfig(steps=10, global_batch=8, lr=1.0, warmup_fraction=0.0)).source == "config"
    )


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_warmup_is_linear_and_decay_polynomial(power: float) -> None:
    phase = PhaseConfig(steps=100, global_batch=8, lr=0.2, warmup_fraction=0.25, decay_power=power)
    schedule = build_schedule(phase)
    rates = [schedule.lr(step) for step in range(100)]
    assert rates[:25] == pytest.approx([0.2 * (step + 1) / 25 for step in range(25)], rel=1e-12)
    assert rates[25:] == pytest.approx(
        [0.2 * math.pow(1 - step / 100, power) for step in range(25, 100)], rel=1e-12
    )
    assert min(rates) > 0, "no step is wasted on a rate of 0"


def test_nvidias_phase_1_rates() -> None:
    phase = PhaseConfig(steps=7038, global_batch=65536, lr=6e-3, warmup_fraction=0.2843, decay_power=0.5)
    schedule = build_schedule(phase)
    assert schedule.warmup_steps == 2001
    assert schedule.lr(2000) == pytest.approx(6e-3)
    assert schedule.lr(3519) == pytest.approx(6e-3 * 0.5**0.5)
