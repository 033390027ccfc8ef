"""The same gradients for `ShardedLamb` on all ranks and for `Reference` on rank 0, and the comparison of the two."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from sharded_lamb.comm.collectives import Traffic
from sharded_lamb.comm.progress import with_progress
from sharded_lamb.comm.wire_formats import of_reduce
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.core.parameters import check_parameter
from sharded_lamb.kernels.block_codes import random_bits
from sharded_lamb.optim.sharded import ShardedLamb
from sharded_lamb.sharding.buckets import flattened, memory_strides
from sharded_lamb.verify.reference import Reference, relative

TOLERANCE = 2e-6
"""Relative, norm-wise, of fp32 masters after 20 steps; moments and ratios have their own."""
MOMENT_TOLERANCE = 1e-5
RATIO_TOLERANCE = 1e-5
MAX_SMALL_ALL_REDUCES = 2
STATE_DTYPES = {
    "float32": (torch.float32, MOMENT_TOLERANCE),
    "bfloat16": (torch.bfloat16, 2.0**-7),
    "int8": (torch.int8, 2.0**-4),
}
"""{name: (dtype of moments, norm-wise relative tolerance of one step's rounding)}. The reference continues from the
rounded moments, so that weights and ratios have the same tolerance with each."""


@dataclass(frozen=True)
class ParameterError:
    """One parameter's errors to the reference, relative and norm-wise, and its two trust ratios."""

    name: str
    numel: int
    weight: float
    exp_avg: float
    exp_avg_sq: float
    ratio: float
    expected_ratio: float

    @property
    def ok(self) -> bool:
        """Whether all errors are within tolerance; nan is not."""
        return (
            self.weight <= TOLERANCE
            and max(self.exp_avg, self.exp_avg_sq) <= MOMENT_TOLERANCE
            and abs(self.ratio - self.expected_ratio) <= RATIO_TOLERANCE * max(1.0, abs(self.expected_ratio))
        )


@dataclass(frozen=True)
class Report:
    """The outcome: the same verdict on every rank; ``parameters`` on rank 0 only."""

    setting: str
    problems: tuple[str, ...]
    parameters: tuple[ParameterError, ...] = ()
    per_step: Mapping[str, float] = field(default_factory=dict)  # calls and bytes a step by collective
    bits: str = ""  # whether parameters have the same bits on all ranks; "": not compared

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"verify: {self.setting}", ""]
        if self.parameters:
            lines.append(f"{'':<65}{'relative error of':^26}")
            lines.append(
                f"{'parameter':<52} {'elements':>11} {'weight':>8} {'m':>8} {'v':>8} {'trust ratio':>12}"
            )
            worst = sorted(self.parameters, key=lambda p: -max(p.weight, p.exp_avg, p.exp_avg_sq))
            for p in worst[:20]:
                lines.append(
                    f"{p.name:<52.52} {p.numel:>11,} {p.weight:>8.1e} {p.exp_avg:>8.1e} {p.exp_avg_sq:>8.1e} "
                    f"{p.ratio:>12.4g}"
                )
            if len(worst) > 20:
                lines.append(f"… and {len(worst) - 20} more with smaller errors")
            lines.append("")
        lines += [f"{name + ' a step':<35} {value:>16,.10g}" for name, value in self.per_step.items()]
        lines += [f"bits of the parameters: {self.bits}"] if self.bits else []
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "PASS" if self.passed else "FAIL"])


def verify(
    parameters: nn.Module | Mapping[str, Sequence[int]],
    *,
    steps: int = 20,
    stage: Literal[1, 2] = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bucket_mb: float = 32,
    lr: float = 1e-2,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    variant: Literal["lamb", "lans", "lars"] = "lamb",
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32",
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Report:
    """Run ``steps`` steps on synthetic gradients and compare with the reference. Collective over the default group.

    Args:
        parameters: a model, which is moved to ``device`` and ``dtype`` and trained in place, or {name: shape}.
        stage: ZeRO stage, 1 or 2.
        dtype: of the parameters; the masters are fp32.
        variant: of the optimizer and the reference.
        state_dtype: of the moments, see `STATE_DTYPES`; with "lars" float32.
        gather_dtype: of `ShardedLamb`: masters are compared with the reference, and weights with masters.
        reduce_dtype: of `ShardedLamb`; None: float32. The reference averages gradients that are rounded likewise.

    Returns:
        A report with the same verdict on every rank. A ValueError or RuntimeError of the optimizer is one of its
        problems.

    Raises:
        TypeError: a parameter that LAMB cannot update, such as a complex one.
    """
    comparison = _Comparison(parameters, dtype, torch.device(device), seed, gather_dtype, reduce_dtype)
    if variant == "lars" and state_dtype != "float32":
        raise ValueError(f"state_dtype={state_dtype!r} is compared with lamb and lans only")
    setting = (
        f"{variant}, stage {stage}, {comparison.world_size} ranks, {str(dtype).removeprefix('torch.')}, "
        f"{state_dtype} moments, {_backend(comparison.device)}, "
        f"{len(comparison.params)} tensors, {sum(p.numel() for p in comparison.params):,} elements, {steps} steps"
    )
    try:
        problems, rows, per_step = comparison.compare(
            steps, stage, bucket_mb, lr, max_grad_norm, variant, state_dtype
        )
    except (ValueError, RuntimeError) as error:
        problems, rows, per_step = [f"{type(error).__name__}: {error}"], [], {}
    problems = comparison.all_problems(problems)
    return Report(setting, tuple(problems), tuple(rows), per_step, comparison.bits)


class _Comparison:
    def __init__(
        self,
        parameters: nn.Module | Mapping[str, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        gather_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.seed, self.device, self.gather_dtype = seed, device, gather_dtype
        self.reduce_dtype = reduce_dtype or torch.float32
        if isinstance(parameters, nn.Module):
            for name, p in parameters.named_parameters():
                check_parameter(name, p)  # .to(dtype) drops imaginary parts
            trained = parameters.to(device, dtype).named_parameters()
            named = {name: p for name, p in trained if p.requires_grad}
            if not named:
                raise ValueError("no parameter of the model requires gradients: there is nothing to compare")
        else:
            named = {
                name: nn.Parameter(self._random("weights", index, tuple(shape)).to(device, dtype))
                for index, (name, shape) in enumerate(parameters.items())
            }
        self.names, self.params = list(named), list(named.values())
        self.bits = ""

    def _random(self, what: str, index: int, shape: tuple[int, ...]) -> Tensor:
        """[shape] fp32 random numbers, the same on every rank; each parameter has a scale of its own."""
        key = hashlib.sha256(f"{self.seed}/{what}/{index}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        return torch.randn(shape, generator=generator, device="cpu") * 10.0 ** (-(index % 4))

    def gradient(self, step: int, rank: int, index: int) -> Tensor:
        """The gradient of ``rank``, in the parameter's shape, strides and dtype, on the CPU.

        Signs stay over steps, with noise on top: if a moment of a small tensor cancels to nothing, its ratio is
        ill-conditioned, which says nothing about the optimizer.
        """
        p = self.params[index]
        shape = tuple(p.shape)
        scale = 10.0 ** (-(index % 4))
        noise = self._random(f"gradient {step} {rank}", index, shape)
        signs = self._random("signs", index, shape).sign()
        grad = torch.empty_strided(shape, memory_strides(p), dtype=p.dtype, device="cpu")
        return grad.copy_(signs * (scale + 0.2 * noise))

    def averaged(self, step: int, index: int) -> Tensor:
        """The mean of `gradient` over ranks, as they travel, fp64."""
        total = sum(self._sent(self.gradient(step, rank, index), step) for rank in range(self.world_size))
        return as_tensor(total) / self.world_size

    def _sent(self, grad: Tensor, step: int) -> Tensor:
        """``grad``, of a parameter that has had ``step`` steps, as its owner reads it: fp64."""
        format = of_reduce(self.reduce_dtype, grad.dtype)
        if format is None:
            return grad.double()
        strides = memory_strides(grad)
        flat = flattened(grad, strides).float()
        blocks, salt = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK), as_tensor(float(step))
        read = format.decode(format.encode(blocks, random_bits(blocks, salt)), torch.float32)
        return read.flatten()[: len(flat)].as_strided(grad.shape, strides).double()

    def give_gradients(self, step: int, stage: int) -> None:
        """Stage 1: set ``.grad`` to the averages. Stage 2: run a backward that yields this rank's gradients."""
        if stage == 1:
            for index, p in enumerate(self.params):
                p.grad = self.averaged(step, index).to(p.device, p.dtype)
            return
        terms = [
            (p * self.gradient(step, self.rank, index).to(p.device)).float().sum()
            for index, p in enumerate(self.params)
        ]
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    def compare(
        self,
        steps: int,
        stage: Literal[1, 2],
        bucket_mb: float,
        lr: float,
        max_grad_norm: float | None,
        variant: str,
        state_dtype: str,
    ) -> tuple[list[str], list[ParameterError], dict[str, float]]:
        first = self.rank == 0
        stored_dtype, moment_tolerance = STATE_DTYPES[state_dtype]
        optimizer = ShardedLamb(
            zip(self.names, self.params, strict=True),
            lr=lr,
            variant=variant,
            stage=stage,
            bucket_mb=bucket_mb,
            max_grad_norm=max_grad_norm,
            reduce_dtype=self.reduce_dtype,
            state_dtype=stored_dtype,
            gather_dtype=self.gather_dtype,
        )
        reference = Reference(self.params, lr, max_grad_norm, variant) if first else None
        problems = []
        before = _copy(optimizer.traffic)
        for step in with_progress(range(steps), "verify"):
            optimizer.zero_grad()
            self.give_gradients(step, stage)
            optimizer.step()
            stored = self._stored_moments(optimizer) if stored_dtype != torch.float32 else None
            if reference is not None:
                gradients = [
                    self._reference_gradient(step, index, stage) for index in range(len(self.params))
                ]
                reference.step(gradients, stored)
        per_step = _difference(optimizer.traffic, before, steps)
        problems += self._traffic_problems(per_step, optimizer, stage)
        problems += self._bit_problems()
        full, ratios = optimizer.full_state_dict(), optimizer.trust_ratios()
        rows = []
        if reference is not None and full is not None:
            rows = self._errors(reference, full, ratios)
            problems += [f"{row.name} is off: {row}" for row in rows if not row.ok][:5]
            if reference.moment_error > moment_tolerance:
                problems.append(
                    f"{state_dtype} moments are off by {reference.moment_error:.2g} of themselves after one step, "
                    f"expected at most {moment_tolerance:.2g}"
                )
            problems += self._rounding_problems(full)[:5]
            norm = optimizer.grad_norm or 0.0
            if not math.isclose(norm, reference.grad_norm, rel_tol=1e-5):
                problems.append(f"the global gradient norm is {norm}, expected {reference.grad_norm}")
        return problems, rows, per_step

    def _stored_moments(self, optimizer: ShardedLamb) -> list[tuple[Tensor, Tensor]] | None:
        """Both moments of every parameter, on rank 0. Collective."""
        full = optimizer.full_state_dict()
        if full is None:
            return None
        states = (full["state"][index] for index in range(len(self.params)))
        return [(state["exp_avg"], state["exp_avg_sq"]) for state in states]

    def _reference_gradient(self, step: int, index: int, stage: int) -> Tensor:
        mean = self.averaged(step, index)
        return mean.to(self.params[index].dtype).double() if stage == 1 else mean

    def _errors(
        self, reference: Reference, full: Mapping[str, Any], ratios: Mapping[str, float]
    ) -> list[ParameterError]:
        rows = []
        for index, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            state = full["state"][index]
            weight = state["master"] if "master" in state else p.detach().cpu()
            rows.append(
                ParameterError(
                    name,
                    p.numel(),
                    relative(weight, reference.w[index]),
                    relative(state["exp_avg"], reference.m[index]),
                    relative(state["exp_avg_sq"], reference.v[index]) if "exp_avg_sq" in state else 0.0,
                    ratios.get(name, math.nan),
                    reference.ratios[index],
                )
            )
        return rows

    def _rounding_problems(self, full: Mapping[str, Any]) -> list[str]:
        """A line for each parameter that is not its master rounded to the model's dtype and ``gather_dtype``."""
        problems = []
        for index, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            master = full["state"][index].get("master")
            if master is None or not p.numel():
                continue
            exact = master.double()
            model = torch.finfo(p.dtype).eps / 2  # of normal numbers; below them, `floor`
            wire = 0.0 if self.gather_dtype is None else torch.finfo(self.gather_dtype).eps / 2
            floor = exact.abs().max() * 2.0**-17 + torch.finfo(p.dtype).smallest_normal * 2.0**-10
            allowed = (model + wire + model * wire) * exact.abs() + floor
            gaps = (p.detach().cpu().double() - exact).abs()
            if not bool((gaps <= allowed).all()):
                problems.append(f"{name} is not its rounded master: off by up to {float(gaps.max()):.1e}")
        return problems

    def _traffic_problems(
        self, per_step: Mapping[str, float], optimizer: ShardedLamb, stage: int
    ) -> list[str]:
        small = per_step.get("all_reduce_small calls", 0)
        problems = []
        if small > MAX_SMALL_ALL_REDUCES:
            problems.append(f"{small} small all-reduces a step, expected at most {MAX_SMALL_ALL_REDUCES}")
        for name, expected in optimizer.expected_bytes().items():
            if name == "all_reduce_small" and stage == 1:
                continue  # its first steps also compare gradients over ranks
            sent = per_step.get(f"{name} bytes", 0)
            if sent != expected:
                problems.append(f"{sent} bytes a step sent by {name}, expected {expected}")
        return problems

    def _bit_problems(self) -> list[str]:
        """A line if parameters differ in any bit between ranks. Collective."""
        bits = hashlib.sha256()
        for p in self.params:
            bits.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digests = self._gathered(bits.hexdigest())
        mismatched = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if self.world_size > 1:
            self.bits = "not equal" if mismatched else f"equal on all {self.world_size} ranks"
        return [f"rank {mismatched} holds other bits than rank 0"] if mismatched else []

    def _gathered(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def all_problems(self, problems: list[str]) -> list[str]:
        """All ranks' problems, each once, in rank order. Collective."""
        return list(dict.fromkeys(problem for rank in self._gathered(problems) for problem in rank))


def _backend(device: torch.device) -> str:
    return f"{dist.get_backend()} on {device.type}" if dist.is_initialized() else device.type


def _copy(traffic: Traffic) -> Traffic:
    return Traffic(traffic.calls.copy(), traffic.bytes.copy())


def _difference(after: Traffic, before: Traffic, steps: int) -> dict[str, float]:
    rows = {}
    for name in sorted(after.calls):
        if calls := after.calls[name] - before.calls[name]:
            rows[f"{name} calls"] = calls / steps
            rows[f"{name} bytes"] = (after.bytes[name] - before.bytes[name]) / steps
    return rows
