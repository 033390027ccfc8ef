"""``sharded-lamb bench kernels``: times the two passes of every kernel on one rank, against memory bandwidth."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb, kernels, shapes
from sharded_lamb.bench import report
from sharded_lamb.bench.candidates import LAMB
from sharded_lamb.bench.timing import Clock, Spread, Turns, by_round, quotients, take_turns, world
from sharded_lamb.bench.workload import Workload
from sharded_lamb.core import rule
from sharded_lamb.gradients.averaged import AveragedGradients
from sharded_lamb.kernels import Kernel

SCALE, ADAMW, WHOLE = "in-place scale", "fused AdamW", "Lamb.step()"
STEP = "ShardedLamb.step(), "  # and the kernel's name

BYTES = {SCALE: 8, ADAMW: 28}
"""Memory traffic, bytes per fp32 element. Scale: one read, one write. AdamW reads w, g, m, v and writes w, m, v."""

LAMB_BYTES = 40
"""Bytes per fp32 element: pass 1 reads w, g, m, v and writes m, v; pass 2 reads w, m, v and writes w."""

COUNTED = (
    "roofline: an in-place scale of a tensor larger than the caches, at 8 B an element. A kernel's row is its two "
    "passes over all shards of one rank, at 40 B; fused AdamW's step counts 28 B. ShardedLamb.step() is a whole step "
    "on one rank, Python included, from gradients in .grad, with the search for non-finite ones; Lamb.step() likewise."
)

_SCALED = {"cpu": 1 << 28, "cuda": 1 << 29}
"""Elements of the roofline's tensor: 1 GiB on a CPU, which no cache holds."""


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON.

    Raises:
        ValueError: there are several ranks, or a shape list or a backend is unknown.
    """
    if world()[1] > 1:
        raise ValueError("kernels measures one rank: run it without torchrun")
    names = _names(chosen.backends, device)
    lists = {name: shapes.load(name) for name in chosen.shapes.split(",")}
    threads = _threads(chosen.threads) if device.type == "cpu" else [torch.get_num_threads()]
    loaded = [kernels.load(name, device) for name in names]
    turns: dict[str, dict[str, Turns]] = {}
    sizes = {
        name: {"tensors": len(listed), "elements": Workload(listed, 0, device).numel}
        for name, listed in lists.items()
    }
    for name, listed in lists.items():
        actions = _actions(Workload(listed, 0, device), loaded, device)
        for count in threads:
            title = f"{name}, {count} threads"
            with _threads_set(count):
                turns[title] = take_turns(actions, Clock(device), rounds=chosen.rounds, title=title)
    summary = {key: summarize(each, sizes[key.rpartition(", ")[0]], device) for key, each in turns.items()}
    automatic = kernels.choose("auto", device).name
    content = {
        **report.about(device),
        "benchmark": "kernels",
        "counted": COUNTED,
        "backends": names,
        "kernel": automatic,
        "shapes": sizes,
        "scaled_elements": _SCALED[device.type],
        "reference": SCALE,
        **kernel_speed(summary, sizes, automatic),
        "summary": summary,
        "rounds_ms": turns,
    }
    report.publish(chosen, _text(content), content, _panels(content))
    return content


def _names(text: str | None, device: torch.device) -> list[str]:
    available = kernels.available(device)
    names = available if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(f"--backends: {unknown[0]!r} is none of those that run here: {', '.join(available)}")
    return names


def _threads(text: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"--threads {text!r}: expected whole numbers > 0 with commas, such as 1,2")
    return [int(part) for part in text.split(",")]


@contextmanager
def _threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _actions(
    workload: Workload, loaded: Sequence[Kernel], device: torch.device
) -> dict[str, Callable[[], None]]:
    """The timed actions on one list of shapes, by name. All share one set of gradients."""
    model = workload.model()
    model().backward()
    optimizer = ShardedLamb(model.named_parameters(), **LAMB)
    optimizer.step()
    adamw = torch.optim.AdamW(_clones(model), lr=1e-3, fused=True)
    whole = Lamb(_clones(model), **LAMB)
    scaled = torch.ones(_SCALED[device.type], device=device)
    actions: dict[str, Callable[[], None]] = {SCALE: lambda: _discard(scaled.mul_(1.0001))}
    actions |= {kernel.name: _two_passes(optimizer, kernel) for kernel in loaded}
    actions[ADAMW] = lambda: _discard(adamw.step())
    actions |= {STEP + kernel.name: _step(optimizer, kernel) for kernel in loaded}
    return {**actions, WHOLE: lambda: _discard(whole.step())}


def _clones(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters, with the same gradients."""
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for copy, p in zip(copies, model.parameters(), strict=True):
        copy.grad = p.grad
    return copies


def _step(optimizer: ShardedLamb, kernel: Kernel) -> Callable[[], None]:
    gradients = optimizer._gradients
    assert isinstance(gradients, AveragedGradients)

    def run() -> None:
        optimizer._live.kernel = gradients.kernel = kernel
        optimizer.step()

    return run


def _discard(_: object) -> None:
    """Turn a lambda's value into None."""


def _two_passes(optimizer: ShardedLamb, kernel: Kernel) -> Callable[[], None]:
    """Passes 1 and 2 with coefficients that are computed once, as in a step."""
    store, table = optimizer._store, optimizer._table
    shards = [replace(bucket.shard, grad=torch.randn_like(bucket.shard.weight)) for bucket in store.buckets]
    active = torch.ones(len(store.params), dtype=torch.bool, device=store.device)
    one = torch.ones((), dtype=torch.float64, device=store.device)
    vectors = rule.coefficients(table.options(), store.step + 1, active, one)
    rows = rule.table(vectors, torch.float32)
    sizes = torch.full((len(store.params),), 1e-4, device=store.device)

    @torch.no_grad()
    def run() -> None:
        sums: Tensor = torch.zeros(2, len(sizes), dtype=torch.float64, device=store.device)
        kernel.moments_and_norms(shards, rows, sums)
        kernel.apply(shards, rows, sizes[None])

    return run


def summarize(
    turns: Mapping[str, Turns], size: Mapping[str, int], device: torch.device
) -> dict[str, dict[str, Any]]:
    """For each action: spreads of the time, ns an element, µs a tensor, and percent of the roofline by round."""
    rounds = {name: by_round(each) for name, each in turns.items()}
    scaled = _SCALED[device.type]
    least = [ms / (scaled * BYTES[SCALE]) for ms in rounds[SCALE]]  # ms a byte, by round
    summary: dict[str, dict[str, Any]] = {}
    for name, times in rounds.items():
        elements = scaled if name == SCALE else size["elements"]
        row: dict[str, Any] = {"ms": asdict(Spread.of(times)), "to_adamw": None, "roofline_percent": None}
        row["ns_per_element"] = asdict(Spread.of([ms * 1e6 / elements for ms in times]))
        if name == SCALE:
            row["gb_per_s"] = asdict(Spread.of([scaled * BYTES[SCALE] / ms / 1e6 for ms in times]))
        else:
            row["us_per_tensor"] = asdict(Spread.of([ms * 1e3 / size["tensors"] for ms in times]))
            row["to_adamw"] = asdict(Spread.of(quotients(times, rounds[ADAMW])))
        if name not in (SCALE, WHOLE) and not name.startswith(STEP):
            moved = elements * BYTES.get(name, LAMB_BYTES)
            percents = [100 * a for a in quotients([moved * ms for ms in least], times)]
            row["roofline_percent"] = asdict(Spread.of(percents))
        summary[name] = row
    return summary


def kernel_speed(
    summary: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, int]], kernel: str
) -> dict[str, float]:
    """``kernel_bytes_per_second`` of ``kernel`` on the list with most elements, with the first number of threads.

    Empty if it was not measured.
    """
    largest = max(sizes, key=lambda name: sizes[name]["elements"])
    rows = next(rows for key, rows in summary.items() if key.rpartition(", ")[0] == largest)
    if kernel not in rows:
        return {}
    seconds = float(rows[kernel]["ms"]["median"]) / 1e3
    return {"kernel_bytes_per_second": sizes[largest]["elements"] * LAMB_BYTES / seconds}


def _text(content: Mapping[str, Any]) -> str:
    blocks = []
    for key, summary in content["summary"].items():
        rows = []
        for name, row in summary.items():
            percent, tensor, ratio = row["roofline_percent"], row.get("us_per_tensor"), row["to_adamw"]
            rows.append(
                [
                    f"{name}, {row['gb_per_s']['median']:.1f} GB/s" if name == SCALE else name,
                    f"{row['ms']['median']:.1f}",
                    f"{row['ms']['low']:.1f}-{row['ms']['high']:.1f}",
                    f"{percent['median']:.0f} %" if percent else "",
                    f"{row['ns_per_element']['median']:.2f}",
                    f"{tensor['median']:.2f}" if tensor else "",
                    f"{ratio['median']:.2f}x" if ratio else "",
                ]
            )
        head = [key, "ms", "quartiles", "of roofline", "ns an element", "µs a tensor", "to fused AdamW"]
        blocks.append(report.table(head, rows) + "\n")
    return "\n".join([*blocks, COUNTED])


def _panels(content: Mapping[str, Any]) -> list[report.Panel]:
    panels = []
    for key, summary in content["summary"].items():
        bars = {}
        for name, row in summary.items():
            if row["roofline_percent"] is not None:
                bars[name] = tuple(row["roofline_percent"][at] for at in ("median", "low", "high"))
        panels.append(
            report.Panel(f"{key}: percent of the in-place roofline", "%", bars, content["backends"])
        )
    return panels
