"""Compares what a rank saw with what the oracle expects."""

import math

import numpy as np

from tests.fuzz import program as data
from tests.fuzz.program import Program
from tests.fuzz.replay import Observation
from tests.fuzz.stored import EXACT, WrongNumber, require_near

TOLERANCE = {"float64": 1e-6, "float32": 2e-5, "bfloat16": 2**-7}
"""Norm-wise, relative, by the dtype of a parameter. A step moves a weight by at least 2 % of its norm."""

DECAY = 0.3
"""The largest weight_decay of a program."""


def compare(program: Program, how: str, seen: Observation, right: Observation) -> None:
    """Raises WrongNumber at the first difference."""
    slots = program.slots()
    worst = max(TOLERANCE[slot.dtype] for slot in slots.values())
    if right.number is not None:
        assert seen.number is not None
        _close("the number", seen.number, right.number, 20 * worst + right.loose, worst * right.terms)
    if right.norms is not None:
        assert seen.norms is not None
        reduced = {n for n in seen.norms if how in data.REDUCED_HERE and not program.is_dtensor(how, n)}
        # Whether a rank has a gradient is known once a norm is read: the first may be of a gradient that none has.
        known = [
            name for name, norm in seen.norms.items() if norm or name in right.norms or name not in reduced
        ]
        _same("parameters with a .grad", sorted(known), sorted(right.norms))
        for name, norm in right.norms.items():
            may_hide = name in reduced
            if not (may_hide and math.isnan(seen.norms[name])) and math.isfinite(norm):
                _close(f"the norm of {name}'s .grad", seen.norms[name], norm, 20 * worst + right.loose)
    if right.weights is None:
        return
    assert seen.weights is not None
    _same("skipped steps", seen.skipped, right.skipped)
    if program.follows:
        for name, expected in right.weights.items():
            require_near(f"the weight {name}", seen.weights[name], expected, 0.0)
    for name, expected in right.weights.items():
        gap = float(np.linalg.norm(seen.weights[name] - expected))
        size = float(np.linalg.norm(expected))
        if not gap <= (worst if right.is_rough else TOLERANCE[slots[name].dtype]) * size:
            raise WrongNumber(f"weights of {name} are off by {gap / size:.2g} of their norm")
    close = EXACT + right.loose * right.are_ratios_loose if program.follows else 10 * worst
    for ratios, expected_ratios in zip(seen.ratios or (), right.ratios or (), strict=True):
        _same("updated parameters", sorted(ratios), sorted(expected_ratios))
        for name, ratio in expected_ratios.items():
            # ‖w‖/‖u‖ with u = r + λw, which may cancel: ‖u‖ is off by ε(‖r‖ + λ‖w‖) ≤ ε‖u‖(1 + 2λ‖w‖/‖u‖).
            _close(f"the trust ratio of {name}", ratios[name], ratio, close * max(1, 2 * DECAY * ratio))


def _same(what: str, seen: object, right: object) -> None:
    if seen != right:
        raise WrongNumber(f"{what}: {seen!r}, and {right!r} is right")


def _close(what: str, seen: float, right: float, tolerance: float, absolute: float = 0.0) -> None:
    if not math.isclose(seen, right, rel_tol=tolerance, abs_tol=max(absolute, 1e-5)):
        raise WrongNumber(f"{what} is {seen:.8g}, and {right:.8g} is right")
