"""Why a run diverges, as far as the last steps tell: causes, the parameters that show them, and remedies.

Plain numbers of the host; makes no collective.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sharded_lamb.core.names import matching
from sharded_lamb.core.options import effective_patterns
from sharded_lamb.core.parameters import NamedParameter, ndim_of
from sharded_lamb.optim.step_results import LayerNorms, ParameterResult, PendingResults, StepResults, Steps

JUMP = 10.0
"""A gradient's norm over its norm in the step before, from which on it counts as a jump."""
FAR = 100.0
"""A ratio over the median ratio, or the median over it, from which on it is far from the others."""
_NAMED = 5  # parameters that a text names for each cause

Results = Mapping[str, ParameterResult]

CAUSES = {
    "non-finite gradient": (
        "these gradients had an element that is nan or inf, or a square that overflows",
        "a lower lr or a longer warmup, max_grad_norm=1.0, a smaller init_scale of GradScaler; else look for the "
        "layer whose output overflows",
    ),
    "all gradients non-finite": (
        "every gradient was nan or inf: the loss itself was",
        "look at the loss and its inputs; a lower lr or a longer warmup, a smaller init_scale of GradScaler",
    ),
    "skipped without a non-finite gradient": (
        "GradScaler found an inf, or only some ranks had a gradient",
        "a smaller init_scale of GradScaler",
    ),
    "non-finite weight": (
        "an earlier step wrote nan or inf",
        "load a checkpoint from before it; skip_nonfinite=True, the default, skips such steps",
    ),
    "gradient jumped": (
        f"‖g‖ is more than {JUMP:g} times that of the step before",
        "max_grad_norm=1.0; a lower lr or a longer warmup",
    ),
    "update is decay alone": (
        "u is λ w, since gradients are far below eps, weights large or all elements masked by caution: every step "
        "shrinks w by the share lr",
        "a smaller eps; trust_clip=(0.0, 10.0); exclude_from_weight_decay",
    ),
    "ratio of a bias or norm far from the others": (
        f"the ratio is more than {FAR:g} times above or below the median of all that adapt",
        'exclude_from_weight_decay and exclude_from_layer_adaptation: ["bias$", "ndim<=1"]',
    ),
    "ratio far from the others": (
        f"the ratio is more than {FAR:g} times above or below the median of all that adapt",
        "exclude_from_layer_adaptation, or weight_norm_clip=(0.01, 10.0) where weights start near 0",
    ),
    "ratio at trust_clip": ("the ratio is outside trust_clip", "a wider trust_clip, or a longer warmup"),
    "norm at weight_norm_clip": ("‖w‖ is outside weight_norm_clip", "a wider weight_norm_clip"),
    "ratio 1: ‖w‖ is 0": (
        "weights of 0 have no ratio; the next step has one",
        "exclude them, if they stay 0",
    ),
    "ratio 1: ‖g‖ is 0": (
        "the gradient is 0, and LARS's ratio undefined",
        "check that the loss uses the parameter",
    ),
    "ratio 1: ‖u‖ is 0": (
        "the gradient (or what caution leaves of the update) and decay are 0",
        "check that the loss uses the parameter",
    ),
    "ratio 1: excluded": ("exclude_from_layer_adaptation matches", ""),
    "ratio 1: excluded as from decay": (
        "exclude_from_layer_adaptation is None, and exclude_from_weight_decay matches",
        "",
    ),
    "ratio 1: no decay": ("adapt_without_decay=False, and there is no decay", ""),
}
"""{cause: (its meaning, what helps)}, the most urgent first."""


@dataclass(frozen=True)
class Finding:
    """One cause and the parameters that show it.

    Attributes:
        cause: a key of `CAUSES`.
        parameters: {name: its norms}: of the last step; for non-finite gradients, which have none, of the last step
            before that updated the parameter (None: no step has).
    """

    cause: str
    parameters: Mapping[str, LayerNorms | None]

    @property
    def meaning(self) -> str:
        return CAUSES[self.cause][0]

    @property
    def remedy(self) -> str:
        return CAUSES[self.cause][1]

    def __str__(self) -> str:
        count = len(self.parameters)
        number = f" ({count} parameter{'s' * (count > 1)})" if count else ""
        lines = [f"{self.cause}{number}: {self.meaning}{'. Try: ' * bool(self.remedy)}{self.remedy}"]
        lines += [f"  {name}: {_described(norms)}" for name, norms in list(self.parameters.items())[:_NAMED]]
        return "\n".join([*lines, *([f"  and {count - _NAMED} more"] if count > _NAMED else [])])


def _described(norms: LayerNorms | None) -> str:
    if norms is None:
        return "no step has updated it"
    weight, update, gradient, ratio = norms
    return f"‖w‖ {weight:.3g}, ‖u‖ {update:.3g}, ‖g‖ {gradient:.3g}, ratio {ratio:.3g}"


@dataclass(frozen=True)
class Explanation:
    """What the last steps show, the most urgent first; ``str()`` is the text."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "the last step shows no sign of divergence"


def explain(results: Iterable[StepResults]) -> Explanation:
    """Read the steps of ``results``, and their parameters' present options. Waits for the device."""
    found: _Found = {}
    suspects: dict[str, ParameterResult] = {}
    before: dict[str, LayerNorms] = {}
    rows: dict[str, NamedParameter] = {}
    updated: dict[str, LayerNorms] = {}
    for history in results:
        last = history.read()
        is_skipped = any(result.skipped for result in last.values())
        suspects |= _read(history.first_skipped) if is_skipped and history.first_skipped else last
        before |= {name: result.norms for name, result in _read(history.updating).items() if result.updated}
        for step in history.last:
            rows |= step.table.parameter_of
        updated |= {name: result.norms for name, result in last.items() if result.updated and not result.bad}
    _find_bad(suspects, before, found)
    _find_jumps(updated, before, found)
    _find_ratios(rows, updated, found)
    return Explanation(tuple(Finding(cause, found[cause]) for cause in CAUSES if cause in found))


_Found = dict[str, dict[str, LayerNorms | None]]


def _read(steps: Steps) -> Results:
    return PendingResults(steps).read()


def _find_bad(results: Results, before: Mapping[str, LayerNorms], found: _Found) -> None:
    bad = [name for name, result in results.items() if result.bad]
    if bad:
        cause = "all gradients non-finite" if len(bad) == len(results) > 1 else "non-finite gradient"
        found[cause] = {name: before.get(name) for name in bad}
    elif any(result.skipped for result in results.values()):
        found["skipped without a non-finite gradient"] = {}


def _find_jumps(updated: Mapping[str, LayerNorms], before: Mapping[str, LayerNorms], found: _Found) -> None:
    for name, norms in updated.items():
        if name in before and norms.gradient > JUMP * before[name].gradient > 0:
            found.setdefault("gradient jumped", {})[name] = norms


def _find_ratios(
    rows: Mapping[str, NamedParameter], updated: Mapping[str, LayerNorms], found: _Found
) -> None:
    """``rows``: {layer's name: its parameter}."""
    adapting = []
    for name, norms in updated.items():
        parameter, p, group = rows[name]
        causes = list(_causes_of_ratio(parameter, p, group, norms))
        for cause in causes:
            found.setdefault(cause, {})[name] = norms
        if not any(cause.startswith(("ratio 1", "non-finite")) for cause in causes):
            adapting.append((name, ndim_of(p), norms))
    median = statistics.median(norms.ratio for _, _, norms in adapting) if adapting else 1.0
    for name, ndim, norms in adapting:
        if not median <= FAR * norms.ratio or norms.ratio > FAR * median:
            kind = "ratio of a bias or norm" if ndim <= 1 else "ratio"
            found.setdefault(f"{kind} far from the others", {})[name] = norms


def _causes_of_ratio(name: str, p: Any, group: Mapping[str, Any], norms: LayerNorms) -> Iterator[str]:
    """Causes that a parameter's own norms and options tell."""

    def excluded(option: str) -> bool:
        return bool(matching(effective_patterns(group, option), name, ndim_of(p)))

    if not math.isfinite(norms.weight):
        yield "non-finite weight"
        return
    decay = 0.0 if excluded("exclude_from_weight_decay") else group["weight_decay"]
    if excluded("exclude_from_layer_adaptation"):
        yield "ratio 1: excluded" + " as from decay" * (group["exclude_from_layer_adaptation"] is None)
    elif not decay and not group["adapt_without_decay"]:
        yield "ratio 1: no decay"
    elif norms.weight == 0:
        yield "ratio 1: ‖w‖ is 0"
    elif group["lars"] and norms.gradient == 0:
        yield "ratio 1: ‖g‖ is 0"
    elif norms.update == 0:
        yield "ratio 1: ‖u‖ is 0"
    else:
        low, high = group["weight_norm_clip"] or (0.0, math.inf)
        clamped = min(max(norms.weight, low), high)
        if clamped != norms.weight:
            yield "norm at weight_norm_clip"
        low, high = group["trust_clip"] or (0.0, math.inf)
        if not low < norms.ratio < high:
            yield "ratio at trust_clip"
    alone = decay * norms.weight if group["adam_w_mode"] and not group["decoupled_decay"] else 0.0
    if alone and abs(norms.update - alone) <= 0.01 * norms.update:
        yield "update is decay alone"
