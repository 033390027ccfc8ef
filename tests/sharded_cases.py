"""Runs of `ShardedLamb` on random parameters, and the oracle's results of the same runs.

Values and gradients are drawn from a seed, equally in every process. Gradients are multiples of a coarse step, so that
sums over ranks and low-precision dtypes represent them exactly: the comparison tests the optimizer only.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from tests.oracle import OracleLamb, split_blocks

BASE = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
FP32_TOLERANCE = 2e-6
Gradients = dict[str, np.ndarray | None]
Groups = tuple[tuple[tuple[str, ...], dict[str, Any]], ...]


@dataclass(frozen=True)
class Case:
    """One run. `settings`: keywords of ShardedLamb only; `options`: of the oracle too; groups have their own."""

    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    groups: Groups = ()
    no_decay: frozenset[str] = frozenset()
    no_adapt: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # default: float32
    channels_last: frozenset[str] = frozenset()
    blocks: dict[str, int] = field(default_factory=dict)  # ratio blocks
    missing: float = 0.15  # probability of a missing gradient: on all ranks in stage 1, per rank in stage 2
    absent_until: dict[str, int] = field(default_factory=dict)  # steps for which a parameter has no gradient
    drive: str = "assign"  # or "backward": the way gradients get into ``.grad``
    bits: int = 12  # of a gradient element
    seed: int = 0
    steps: int = 6

    @property
    def stage(self) -> int:
        return self.settings.get("stage", 1)

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, torch.float32)


@dataclass
class Outcome:
    """One rank's final parameters, and its reports of every step."""

    params: dict[str, Tensor]
    ratios: list[dict[str, float]]
    grad_norms: list[float | None]
    masters: dict[str, Tensor]  # whole, on the first rank
    memory: dict[str, int]
    sent: dict[str, int]  # bytes of all steps, by collective
    calls: dict[str, int]
    strides: dict[str, tuple[int, ...]]


def exact(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"^{re.escape(name)}$" for name in sorted(names))


def initial_values(case: Case) -> dict[str, Tensor]:
    """CPU tensors in the parameters' dtypes; some are all zeros."""
    rng = np.random.default_rng([case.seed, 0])
    values = {}
    for name, shape in case.shapes.items():
        scale = rng.choice([0.0, 0.1, 1.0, 30.0], p=[0.1, 0.3, 0.3, 0.3])
        value = torch.from_numpy(np.asarray(rng.standard_normal(shape) * scale, dtype=np.float32))
        value = value.to(case.dtype(name))
        values[name] = value.to(memory_format=torch.channels_last) if name in case.channels_last else value
    return values


def rank_gradients(case: Case, step: int, world_size: int) -> list[Gradients]:
    """Every rank's gradients; in stage 1 they are equal, as after averaging."""
    rng = np.random.default_rng([case.seed, 1])
    scales = {name: rng.choice([2.0**-10, 1.0, 16.0]) for name in case.shapes}
    rng = np.random.default_rng([case.seed, 2, step])
    ranks: list[Gradients] = []
    top = 2**case.bits - 1
    for _ in range(world_size if case.stage == 2 else 1):
        grads: Gradients = {}
        for name, shape in case.shapes.items():
            steps = np.clip(np.round(rng.standard_normal(shape) * (top + 1) / 4), -top, top)
            value = np.asarray(steps * 4 / (top + 1) * scales[name])
            missing = rng.random() < case.missing or step < case.absent_until.get(name, 0)
            grads[name] = None if missing else value
        ranks.append(grads)
    return ranks if case.stage == 2 else ranks * world_size


def average(ranks: list[Gradients]) -> Gradients:
    """The average over ranks; None counts as zero on some ranks, and stays None on all."""
    averaged: Gradients = {}
    for name in ranks[0]:
        present = [grads[name] for grads in ranks if grads[name] is not None]
        averaged[name] = np.asarray(sum(present) / len(ranks)) if present else None
    return averaged


def make_parameters(case: Case) -> dict[str, Parameter]:
    return {name: Parameter(value) for name, value in initial_values(case).items()}


def patterns_of(case: Case) -> dict[str, Any]:
    """The options that select parameters by name."""
    excluded = {
        "exclude_from_weight_decay": exact(case.no_decay),
        "exclude_from_layer_adaptation": exact(case.no_adapt),
    }
    patterns: dict[str, Any] = {key: value for key, value in excluded.items() if value}
    if case.blocks:
        patterns["ratio_blocks"] = {exact([name])[0]: count for name, count in case.blocks.items()}
    return patterns


def make_optimizer(case: Case, params: Mapping[str, Tensor], **more: Any) -> ShardedLamb:
    groups = case.groups or ((tuple(case.shapes), {}),)
    return ShardedLamb(
        [{"params": [(name, params[name]) for name in names], **own} for names, own in groups],
        **{**BASE, **case.options, **case.settings, **patterns_of(case), **more},
    )


def to_tensor(grad: np.ndarray, p: Tensor) -> Tensor:
    return torch.from_numpy(np.array(grad)).to(p.dtype)


def give_gradients(case: Case, params: Mapping[str, Tensor], grads: Gradients) -> None:
    """Set this rank's gradients, by assignment or by a backward that produces exactly these."""
    if case.drive == "assign":
        for name, p in params.items():
            g = grads[name]
            p.grad = None if g is None else to_tensor(g, p)
        return
    terms = [(p * to_tensor(grads[n], p)).double().sum() for n, p in params.items() if grads[n] is not None]
    if terms:
        torch.stack(terms).sum().backward()


def take_steps(
    case: Case,
    params: Mapping[str, Tensor],
    opt: ShardedLamb,
    rank: int,
    world: int,
    before_step: Callable[[int], None] = lambda step: None,
) -> Outcome:
    before = dict(opt.traffic.bytes), dict(opt.traffic.calls)
    ratios, norms = [], []
    for step in range(case.steps):
        before_step(step)
        give_gradients(case, params, rank_gradients(case, step, world)[rank])
        opt.step()
        opt.zero_grad()
        ratios.append(opt.trust_ratios())
        norms.append(opt.grad_norm)
    sent = {key: value - before[0].get(key, 0) for key, value in opt.traffic.bytes.items()}
    calls = {key: value - before[1].get(key, 0) for key, value in opt.traffic.calls.items()}
    full = opt.full_state_dict()
    order = [name for names, _ in case.groups or ((tuple(case.shapes), {}),) for name in names]
    masters = (
        {} if full is None else {order[i]: s["master"] for i, s in full["state"].items() if "master" in s}
    )
    return Outcome(
        {name: p.detach().clone() for name, p in params.items()},
        ratios,
        norms,
        masters,
        opt.memory(),
        sent,
        calls,
        {name: p.stride() for name, p in params.items()},
    )


def run(rank: int, case: Case, world: int, threads: int = 1) -> Outcome:
    """The whole run, on one rank."""
    torch.set_num_threads(threads)
    try:
        params = make_parameters(case)
        return take_steps(case, params, make_optimizer(case, params), rank, world)
    finally:
        torch.set_num_threads(1)


@dataclass
class Expected:
    params: dict[str, np.ndarray]
    ratios: list[dict[str, float]]
    grad_norms: list[float]
    sizes: dict[str, float]  # the norm to which an error is relative
    updated: dict[str, bool]
    ratio_slack: list[dict[str, float]]


def norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(value)))


def make_oracle(case: Case) -> OracleLamb:
    values = {name: value.double().numpy() for name, value in initial_values(case).items()}
    return OracleLamb(
        values,
        no_decay=case.no_decay,
        no_adapt=case.no_adapt,
        overrides={name: own for names, own in case.groups for name in names},
        blocks=case.blocks,
        **{**BASE, **case.options},
    )


def expect(case: Case, world: int) -> Expected:
    """The oracle's run on the averaged gradients."""
    oracle = make_oracle(case)
    # A small tensor may pass through zero: errors are relative to its largest norm, or to the length of its path.
    largest = {name: norm(value) for name, value in oracle.params.items()}
    path = dict.fromkeys(oracle.params, 0.0)
    longest = dict.fromkeys(oracle.params, 0.0)
    expected = Expected({}, [], [], {}, {}, [])
    for step in range(case.steps):
        before = dict(oracle.params)
        oracle.step(average(rank_gradients(case, step, world)))
        # ||w|| and ||u|| are less exact where w, or the terms of u, cancelled to much smaller values.
        slack = {}
        for name, ratio in oracle.ratios.items():
            change = norm(oracle.params[name] - before[name])
            longest[name] = max(longest[name], change / ratio)
            w_lost = max(largest[name], path[name]) / (norm(before[name]) or 1.0)
            slack[name] = max(1.0, w_lost) + (longest[name] * ratio / change if change else 0.0)
        expected.ratio_slack.append(slack)
        for name, value in oracle.params.items():
            path[name] += norm(value - before[name])
            largest[name] = max(largest[name], norm(value))
        expected.ratios.append(dict(oracle.ratios))
        expected.grad_norms.append(oracle.grad_norm)
    expected.params = oracle.params
    expected.sizes = {name: max(largest[name], path[name]) for name in largest}
    expected.updated = {name: count > 0 for name, count in oracle.steps.items()}
    return expected


def check_close(params: Mapping[str, Tensor], expected: Expected, tolerance: float = FP32_TOLERANCE) -> None:
    for name, value in params.items():
        gap = norm(value.double().numpy() - expected.params[name])
        size = expected.sizes[name]
        assert gap <= tolerance * size, (
            f"{name}: off by {gap}, which is {gap / (size or 1.0):.2e} of its size"
        )


def check_alike(outcomes: list[Outcome]) -> None:
    """Check that ranks have the same bits and report the same of every step."""
    for rank, outcome in enumerate(outcomes):
        for name, value in outcome.params.items():
            assert torch.equal(value, outcomes[0].params[name]), f"{name} differs on rank {rank}"
        assert outcome.ratios == outcomes[0].ratios
        assert outcome.grad_norms == outcomes[0].grad_norms


def check_run(case: Case, outcomes: list[Outcome]) -> None:
    """Compare parameters, ratios and gradient norms of every step with the oracle's, and ranks with each other."""
    expected = expect(case, len(outcomes))
    check_alike(outcomes)
    first = outcomes[0]
    params, start = split_blocks(first.params, case.blocks), split_blocks(initial_values(case), case.blocks)
    check_close(params, expected)
    for name, updated in expected.updated.items():
        assert updated or torch.equal(params[name], start[name]), f"{name} changed without a gradient"
    for step, ratios in enumerate(expected.ratios):
        assert first.ratios[step].keys() == ratios.keys(), f"step {step}"
        for name, ratio in ratios.items():
            gap, slack = abs(first.ratios[step][name] - ratio), expected.ratio_slack[step][name]
            assert gap <= 1e-5 * slack * ratio, f"step {step}, {name}: {first.ratios[step][name]} for {ratio}"
        actual, exact_norm = first.grad_norms[step], expected.grad_norms[step]
        assert actual is not None
        assert abs(actual - exact_norm) <= 1e-5 * exact_norm, (
            f"step {step}: gradient norm {actual} for {exact_norm}"
        )


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_near(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 4e-6) -> None:
    """Norm-wise: two fp32 runs, each within `FP32_TOLERANCE` of the truth."""
    for name, value in b.items():
        gap = float((a[name].double() - value.double()).norm())
        assert gap <= tolerance * float(value.double().norm()), f"{name}: off by {gap}"


def assert_differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *names: str) -> None:
    assert [name for name in names if torch.equal(a[name], b[name])] == []


def through_lamb(case: Case, world: int, *, zeroes: bool = True) -> dict[str, Tensor]:
    """The result of `Lamb` on one device with the same averaged gradients."""
    params = make_parameters(case)
    groups = [{"params": [(n, params[n]) for n in names], **own} for names, own in case.groups]
    opt = Lamb(groups, **{**BASE, **case.options, **patterns_of(case)})
    for step in range(case.steps):
        for name, g in average(rank_gradients(case, step, world)).items():
            p = params[name]
            more = None if g is None else to_tensor(g, p)
            p.grad = more if zeroes or p.grad is None or more is None else p.grad + more
        opt.step()
    return {name: p.detach() for name, p in params.items()}
