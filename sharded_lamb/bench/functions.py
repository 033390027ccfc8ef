"""``sharded-lamb bench functions``: each function of a CPU's kernel over each kind of memory, and stock operations."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.bench import report
from sharded_lamb.bench.timing import Clock, Spread, Turns, by_round, quotients, take_turns, world
from sharded_lamb.core.layout import BLOCK, Segment
from sharded_lamb.core.rule import CAUTION_SUMS, COLUMNS, NESTEROV_SUMS, SUMS, Coefficients
from sharded_lamb.kernels import FlatShard, Kernel, LocalContribution, ReceivedShards, ScatteredShard, formats
from sharded_lamb.kernels.block_codes import BlockFormat
from sharded_lamb.kernels.remainders import STORAGE
from sharded_lamb.sharding import flat_memory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REMAINDER, REMAINDER8, CODES = STORAGE[16], STORAGE[8], BlockFormat.storage

COUNTED = (
    "Each function on one contiguous range, one rank. Bytes: every kind of memory that it reads, and once more every "
    "kind that it writes, per element. Roofline: the stock operation on torch's memory that moves bytes likewise: an "
    "in-place scale (8 an element) for the passes, a sum (4) for norms, an addition of two tensors into a third "
    "(12) for average. a += b c reads three tensors and writes one, as pass 2 of fp32 does; a scale writes as much as "
    "it reads. In cache, with one thread: the same on 16,384 elements, again and again."
)

SCALE, SUM, ADDITION, PRODUCT = "in-place scale", "sum", "a + b into c", "a += b c"
ROOFLINES = {SCALE: 8, SUM: 4, ADDITION: 12, PRODUCT: 16}

LANES = ("weight", "model", "exp_avg", "exp_avg_sq")
"""Kinds that are in flat memory, as in training; gradients and received parts are in torch's."""

ELEMENTS, CACHED, REPEATED = 1 << 25, 1 << 14, 512


@dataclass(frozen=True, slots=True)
class Case:
    """One function over one kind of memory."""

    roofline: str
    bytes: int  # an element
    run: Callable[["Memory"], None]
    in_cache: bool = True  # whether it is also measured there; averages are written past it


@dataclass(frozen=True)
class Memory:
    """``numel`` elements of every kind of memory that a case may want, each made once."""

    kernel: Kernel
    numel: int
    calls: int  # so often does one call of a function visit it
    made: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    joined: dict[tuple[torch.dtype | None, ...], list[ScatteredShard]] = field(default_factory=dict)

    def of(self, kind: str, dtype: torch.dtype) -> Tensor:
        if (kind, dtype) not in self.made:
            lane = LANES.index(kind) if kind in LANES else len(LANES)
            memory = torch.empty(0, dtype=dtype, device="cpu")
            if lane < len(LANES):
                memory = flat_memory.zeros(self.numel, dtype, memory.device, lane)
            if memory.numel() == 0 or memory.nbytes < flat_memory.MIN_BYTES:
                behind = lane * flat_memory.LANE_BYTES // dtype.itemsize  # as in memory that is large enough
                memory = torch.empty(self.numel + behind, dtype=dtype, device="cpu")[behind:]
            memory.fill_(0.01 if dtype.is_floating_point else 0)
            if dtype == CODES:
                form = formats.of_moment(kind, dtype)
                codes, _ = form.encode(torch.full((BLOCK,), 0.01, device="cpu"))
                memory = codes.repeat(form.shape(self.numel)[0], 1)
            self.made[kind, dtype] = memory
        return self.made[kind, dtype]

    def shards(
        self, weight: torch.dtype, model: torch.dtype | None, grad: torch.dtype, moments: torch.dtype
    ) -> list[ScatteredShard]:
        """Made once, so that no time is Python's: a kernel derives its tables on the first call."""
        dtypes = weight, model, grad, moments
        if dtypes not in self.joined:
            kinds = {
                "weight": weight,
                "grad": grad,
                "exp_avg": moments,
                "exp_avg_sq": moments,
                "model": model,
            }
            pieces = {
                kind: None if dtype is None else [self.of(kind, dtype)] * self.calls
                for kind, dtype in kinds.items()
            }
            self.joined[dtypes] = [ScatteredShard((0,) * self.calls, **pieces)]  # type: ignore[arg-type]
        return self.joined[dtypes]


def _table(dtype: torch.dtype) -> Tensor:
    row = Coefficients(1.0, 0.0, 0.9, 0.1, 0.999, 0.001, 1.0, 1.0, 0.0, 1e-6, 0.01, 1.0, 3.0)
    return torch.tensor([[getattr(row, name) for name in COLUMNS]], dtype=dtype, device="cpu")


def _pass_1(rows: int, *dtypes: Any) -> Callable[[Memory], None]:
    def run(memory: Memory) -> None:
        sums = torch.zeros(rows, 1, dtype=torch.float64, device="cpu")
        memory.kernel.moments_and_norms(memory.shards(*dtypes), _table(F32), sums)

    return run


def _pass_2(rows: int, *dtypes: Any) -> Callable[[Memory], None]:
    directions, caution = 2 if rows == len(NESTEROV_SUMS) else 1, rows == len(CAUTION_SUMS)

    def run(memory: Memory) -> None:
        step_sizes = torch.full((directions, 1), 1e-6, device="cpu")
        memory.kernel.apply(memory.shards(*dtypes), _table(F32), step_sizes, caution=caution)

    return run


def _weight_norms(*dtypes: Any) -> Callable[[Memory], None]:
    def run(memory: Memory) -> None:
        memory.kernel.weight_norms(memory.shards(*dtypes), torch.zeros(1, dtype=torch.float64, device="cpu"))

    return run


def _momentum(*dtypes: Any) -> Callable[[Memory], None]:
    def run(memory: Memory) -> None:
        shards = [replace(shard, exp_avg_sq=None) for shard in memory.shards(*dtypes)]
        memory.kernel.apply_momentum(shards, _table(F32), torch.full((2, 1), 1e-6, device="cpu"))

    return run


def _square_sums(grad: torch.dtype) -> Callable[[Memory], None]:
    def run(memory: Memory) -> None:
        memory.kernel.square_sums(
            memory.shards(F32, None, grad, F32), torch.zeros(1, dtype=torch.float64, device="cpu")
        )

    return run


def _average(wire: torch.dtype) -> Callable[[Memory], None]:
    def run(memory: Memory) -> None:
        unused, blocks = memory.of("exp_avg", F32), memory.numel // BLOCK
        shard = FlatShard(
            unused,
            None,
            memory.of("average", F32),
            unused,
            unused,
            torch.zeros(blocks, dtype=torch.int64, device="cpu"),
        )
        own = LocalContribution(0, [memory.of("grad", wire)])
        received = ReceivedShards(memory.of("row", wire).unsqueeze(0), 2, own)
        segments = [Segment(0, 0, memory.numel, 0)]
        sums = torch.zeros(1, dtype=torch.float64, device="cpu")
        memory.kernel.average(shard, segments, received, sums, add=False)

    return run


def _passes(
    name: str, bytes_1: int, bytes_2: int, *dtypes: Any, sums: Sequence[str] = SUMS
) -> dict[str, Case]:
    return {
        f"pass 1, {name}": Case(SCALE, bytes_1, _pass_1(len(sums), *dtypes)),
        f"pass 2, {name}": Case(SCALE, bytes_2, _pass_2(len(sums), *dtypes)),
    }


CASES: dict[str, Case] = {
    **_passes("fp32", 24, 16, F32, None, F32, F32),
    **_passes("bf16 weights, fp32 masters", 24, 18, F32, BF16, BF16, F32),
    **_passes("fp16 weights, fp32 masters", 24, 18, F32, F16, F16, F32),
    **_passes("bf16 weights, 16-bit remainders", 22, 16, REMAINDER, BF16, BF16, F32),
    **_passes("bf16 weights, 8-bit remainders", 21, 14, REMAINDER8, BF16, BF16, F32),
    **_passes("bf16 weights and moments, fp32 masters", 16, 14, F32, BF16, BF16, BF16),
    **_passes("everything in bf16", 12, 8, BF16, None, BF16, BF16),
    **_passes("fp32, 8-bit moments", 12, 10, F32, None, F32, CODES),
    **_passes("bf16 weights, 8-bit remainders and moments", 9, 8, REMAINDER8, BF16, BF16, CODES),
    **_passes("LANS, fp32", 24, 20, F32, None, F32, F32, sums=NESTEROV_SUMS),
    **_passes("caution, fp32", 24, 20, F32, None, F32, F32, sums=CAUTION_SUMS),
    "pass 1, LARS, fp32": Case(SUM, 4, _weight_norms(F32, None, F32, F32)),
    "pass 2, LARS, fp32": Case(SCALE, 20, _momentum(F32, None, F32, F32)),
    "pass 1, LARS, bf16 weights, fp32 masters": Case(SUM, 6, _weight_norms(F32, BF16, BF16, F32)),
    "pass 2, LARS, bf16 weights, fp32 masters": Case(SCALE, 20, _momentum(F32, BF16, BF16, F32)),
    "square_sums, fp32": Case(SUM, 4, _square_sums(F32)),
    "square_sums, bf16": Case(SUM, 2, _square_sums(BF16)),
    "square_sums, fp16": Case(SUM, 2, _square_sums(F16)),
    "average of 2, fp32": Case(ADDITION, 12, _average(F32), in_cache=False),
    "average of 2, bf16": Case(ADDITION, 8, _average(BF16), in_cache=False),
    "average of 2, fp16": Case(ADDITION, 8, _average(F16), in_cache=False),
}


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON.

    Raises:
        ValueError: there are several ranks, the device is no CPU, or the backend does not work.
    """
    if world()[1] > 1 or device.type != "cpu":
        raise ValueError("functions measures the CPU of one rank: run it without torchrun and --device")
    try:
        kernel = kernels.load(chosen.backend, device)
    except RuntimeError as error:
        raise ValueError(f"--backend: {error}") from error
    large, cached = Memory(kernel, ELEMENTS, 1), Memory(kernel, CACHED, REPEATED)
    a, b, c = (large.of(kind, F32) for kind in ("weight", "exp_avg", "average"))
    actions: dict[str, Callable[[], object]] = {
        SCALE: lambda: a.mul_(1.0000001),
        SUM: lambda: a.sum(),
        ADDITION: lambda: torch.add(a, b, out=c),
        PRODUCT: lambda: a.addcmul_(b, c, value=1e-9),
    }
    for name, case in CASES.items():
        actions[name] = partial(case.run, large)
        if case.in_cache and torch.get_num_threads() == 1:  # several would write the same lines
            actions[f"{name}, in cache"] = partial(case.run, cached)
    with torch.no_grad():
        turns = take_turns(actions, Clock(device), rounds=chosen.rounds, iterations=5)
    summary = summarize(turns)
    content = {
        **report.about(device),
        "benchmark": "functions",
        "counted": COUNTED,
        "kernel": kernel.name,
        "elements": ELEMENTS,
        "summary": summary,
        "rounds_ms": turns,
    }
    report.publish(chosen, _text(summary), content, _panels(summary))
    return content


def summarize(turns: Mapping[str, Turns]) -> dict[str, dict[str, Any]]:
    """For each function: ns an element in memory and in cache, and percent of its roofline, round by round."""
    rounds = {name: by_round(each) for name, each in turns.items()}
    summary: dict[str, dict[str, Any]] = {}
    for name, bytes_ in ROOFLINES.items():
        rates = [ELEMENTS * bytes_ / ms / 1e6 for ms in rounds[name]]
        summary[name] = {"gb_per_s": asdict(Spread.of(rates))}
    for name, case in CASES.items():
        best = [ms / ROOFLINES[case.roofline] * case.bytes for ms in rounds[case.roofline]]
        summary[name] = {
            "bytes": case.bytes,
            "ns_per_element": asdict(Spread.of([ms * 1e6 / ELEMENTS for ms in rounds[name]])),
            "roofline_percent": asdict(Spread.of([100 * q for q in quotients(best, rounds[name])])),
        }
        if f"{name}, in cache" in rounds:
            in_cache = [ms * 1e6 / (CACHED * REPEATED) for ms in rounds[f"{name}, in cache"]]
            summary[name]["ns_in_cache"] = asdict(Spread.of(in_cache))
    return summary


def _text(summary: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [f"{name}, {summary[name]['gb_per_s']['median']:.1f} GB/s", f"{bytes_}", "", "", ""]
        for name, bytes_ in ROOFLINES.items()
    ]
    for name, case in CASES.items():
        row = summary[name]
        percent, ns, cached = row["roofline_percent"], row["ns_per_element"], row.get("ns_in_cache")
        rows.append(
            [
                name,
                f"{case.bytes}",
                f"{ns['median']:.2f}",
                f"{percent['median']:.0f} ({percent['low']:.0f}-{percent['high']:.0f}) % of {case.roofline}",
                f"{cached['median']:.2f}" if cached else "",
            ]
        )
    head = ["", "bytes an element", "ns an element", "of roofline", "ns in cache"]
    return report.table(head, rows) + "\n\n" + COUNTED


def _panels(summary: Mapping[str, Mapping[str, Any]]) -> list[report.Panel]:
    bars = {
        name: tuple(summary[name]["roofline_percent"][at] for at in ("median", "low", "high"))
        for name in CASES
    }
    return [report.Panel("percent of the roofline", "%", bars, list(CASES))]
