"""``sharded-lamb bench formats``: memory and time of a step for every format of state, beside other 8-bit optimizers.

Peak memory is that of a child process for each candidate; times are of one process, in turns.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sharded_lamb import ShardedLamb, shapes
from sharded_lamb.bench import report
from sharded_lamb.bench.peak_memory import MMAP_THRESHOLD, peak_bytes
from sharded_lamb.bench.timing import Clock, Spread, by_round, quotients, take_turns, world
from sharded_lamb.comm.progress import with_progress

COUNTED = (
    "One rank; step() alone, gradients being there, in the parameters' dtype. Bytes a parameter: of weights, masters "
    "and moments, without gradients; computed from the dtypes, as the optimizer's memory() reports them, and the peak "
    "of resident memory in a process of its own with construction and two steps, less that before the optimizer was "
    "made (weights and gradients), plus the weights'. Weights move into buckets, one at a time, so that a peak "
    "holds one bucket more. 'ratio': the trust ratio is exact for the update that is applied."
)

_TIMEOUT_S = 300

Make = Callable[[Sequence[nn.Parameter]], Any]


@dataclass(frozen=True)
class Candidate:
    """An optimizer over parameters of one dtype. ``bytes``: of weights and state, a parameter."""

    make: Make
    bytes: float
    dtype: torch.dtype = torch.float32
    needs: str | None = None  # a package
    ratio: str = "exact"


def _ours(**options: Any) -> Make:
    return lambda params: ShardedLamb(params, lr=1e-6, **options)


def _torchao(params: Sequence[nn.Parameter]) -> Any:
    return importlib.import_module("torchao.optim").AdamW8bit(params, lr=1e-6)


def _bitsandbytes(params: Sequence[nn.Parameter]) -> Any:
    return importlib.import_module("bitsandbytes").optim.AdamW8bit(params, lr=1e-6)


def _fused(params: Sequence[nn.Parameter]) -> Any:
    return torch.optim.AdamW(params, lr=1e-6, fused=True)


CODES = 2 * 260 / 256
BF16 = torch.bfloat16
CANDIDATES = {
    "fp32": Candidate(_ours(), 12),
    "fp32, bf16 moments": Candidate(_ours(state_dtype=BF16), 8),
    "fp32, 8-bit moments": Candidate(_ours(state_dtype=torch.int8), 4 + CODES),
    "bf16, fp32 masters": Candidate(_ours(), 14, BF16),
    "bf16, 16-bit remainders": Candidate(_ours(store_param_remainders=True), 12, BF16),
    "bf16, 16-bit remainders, bf16 moments": Candidate(
        _ours(store_param_remainders=True, state_dtype=BF16), 8, BF16
    ),
    "bf16, 8-bit remainders and moments": Candidate(
        _ours(store_param_remainders=8, state_dtype=torch.int8), 3 + CODES, BF16
    ),
    "torch AdamW, fused, fp32": Candidate(_fused, 12, ratio="none"),
    "torchao AdamW8bit, fp32": Candidate(_torchao, 4 + 2 + 8 / 256, needs="torchao", ratio="none"),
    "bitsandbytes AdamW8bit, fp32": Candidate(
        _bitsandbytes, 4 + 2 + 8 / 256, needs="bitsandbytes", ratio="none"
    ),
}


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON.

    Raises:
        ValueError: there are several ranks, the device is no CPU, or a child process failed.
    """
    if world()[1] > 1 or device.type != "cpu":
        raise ValueError("formats measures the CPU of one rank: run it without torchrun and --device")
    parameters = shapes.load(chosen.shapes)
    numel = sum(math.prod(shape) for shape in parameters.values())
    skipped = [
        name for name, x in CANDIDATES.items() if x.needs and importlib.util.find_spec(x.needs) is None
    ]
    names = [name for name in CANDIDATES if name not in skipped]
    rows: dict[str, dict[str, Any]] = {}
    for name in with_progress(names, "bench formats", lambda name: name):
        rows[name] = _child(name, chosen.shapes)
    optimizers = {name: _made(name, chosen.shapes)[1] for name in names}
    actions = {name: optimizer.step for name, optimizer in optimizers.items()}
    turns = take_turns(actions, Clock(device), rounds=chosen.rounds, iterations=chosen.iterations)
    rounds = {name: by_round(turns[name]) for name in names}
    for name, row in rows.items():
        row["formula_bytes"] = CANDIDATES[name].bytes
        row["ratio"] = CANDIDATES[name].ratio
        row["ms"] = asdict(Spread.of(rounds[name]))
        row["of_fp32"] = asdict(Spread.of(quotients(rounds[name], rounds["fp32"])))
    content = {
        **report.about(device),
        "benchmark": "formats",
        "counted": COUNTED,
        "shapes": {"name": chosen.shapes, "tensors": len(parameters), "elements": numel},
        "summary": rows,
        "rounds_ms": turns,
        "skipped": skipped,
    }
    report.publish(chosen, _text(content), content, _panels(content))
    return content


def _made(name: str, shape_list: str) -> tuple[list[nn.Parameter], Any]:
    """Parameters with gradients, and the optimizer over them."""
    params = _parameters(name, shape_list)
    return params, CANDIDATES[name].make(params)


def _parameters(name: str, shape_list: str) -> list[nn.Parameter]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    params = []
    for shape in shapes.load(shape_list).values():
        value = torch.randn(shape, generator=generator, device="cpu") * 0.02
        params.append(nn.Parameter(value.to(CANDIDATES[name].dtype)))
        params[-1].grad = (value * 0.1).to(CANDIDATES[name].dtype)
    return params


def child(name: str, shape_list: str) -> dict[str, Any]:
    """Runs one candidate in this process; returns bytes a parameter."""
    params = _parameters(name, shape_list)
    numel, itemsize = sum(p.numel() for p in params), params[0].element_size()
    before = peak_bytes(torch.device("cpu"))
    optimizer = CANDIDATES[name].make(params)
    for _ in range(2):
        optimizer.step()
    result = {"peak_bytes": (peak_bytes(torch.device("cpu")) - before) / numel + itemsize}
    if isinstance(optimizer, ShardedLamb):
        held = optimizer.memory()
        result["memory_bytes"] = (held["parameters"] + held["masters"] + held["moments"]) / numel
    return result


def _child(name: str, shape_list: str) -> dict[str, Any]:
    environment = {**os.environ, MMAP_THRESHOLD[0]: MMAP_THRESHOLD[1]}
    command = [sys.executable, "-m", "sharded_lamb.bench.state_formats", name, shape_list]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{name} failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _text(content: Mapping[str, Any]) -> str:
    rows = []
    for name, row in content["summary"].items():
        held = f"{row['memory_bytes']:.2f}" if "memory_bytes" in row else ""
        times = row["of_fp32"]
        rows.append(
            [
                name,
                row["ratio"],
                f"{row['formula_bytes']:.2f}",
                held,
                f"{row['peak_bytes']:.2f}",
                f"{row['ms']['median']:.0f}",
                f"{times['median']:.2f} ({times['low']:.2f}-{times['high']:.2f})",
            ]
        )
    head = [f"{content['shapes']['name']}, one rank", "ratio", "bytes", "memory()", "peak", "ms", "x fp32"]
    lines = [report.table(head, rows), "", COUNTED]
    return "\n".join([*lines, *(f"without {name}: not installed" for name in content["skipped"])])


def _panels(content: Mapping[str, Any]) -> list[report.Panel]:
    bars = {name: (row["peak_bytes"],) * 3 for name, row in content["summary"].items()}
    ours = [name for name in bars if CANDIDATES[name].ratio == "exact"]
    return [report.Panel("peak bytes a parameter, without gradients", "B", bars, ours)]


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
