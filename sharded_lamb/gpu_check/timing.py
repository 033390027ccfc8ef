"""Clocks of the host and of the device, which are different numbers where the host is slower.

- kernels: the device's busy time, summed over the kernels and copies of one run in a profile
- graph: a replay of one run as a CUDA graph: the device with the gaps between kernels, without the host
- back to back: runs without waiting in between; bound by the slower of host and device
- host: from the call of one run until it returns, with an idle device
- alone: the same until the device is done
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from sharded_lamb.bench.gpu_kernels import milliseconds
from sharded_lamb.gpu_check.battery import Setting

Operations = list[tuple[str, float]]
"""(name, milliseconds) of each kernel and copy on the device."""

_ANNOTATIONS = ("Optimizer.", "## Call ", "Torch-Compiled Region", "ProfilerStep")
"""Beginnings of names of ranges that the profiler shows on the device although they are no kernels."""


def back_to_back_ms(setting: Setting, run: Callable[[], object], repeats: int = 10, rounds: int = 5) -> float:
    """Milliseconds of one of ``repeats`` runs without waiting in between; the median of rounds."""
    if not setting.on_gpu:
        return statistics.median(_wall_ms(run) for _ in range(3))
    for _ in range(3):
        run()
    return statistics.median(milliseconds(run, repeats) for _ in range(rounds))


def copy_gb_per_s(setting: Setting) -> float:
    """Bandwidth of a copy on the device, GB/s of bytes read and written."""
    source = torch.empty(1 << (30 if setting.on_gpu else 22), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / back_to_back_ms(setting, lambda: target.copy_(source)) * 1e-6


def host_and_alone_ms(setting: Setting, run: Callable[[], object]) -> tuple[float, float]:
    """Medians of three single runs, from an idle device: until the call returns, and until the device is done."""
    host, alone = [], []
    for _ in range(3):
        setting.synchronize()
        start = time.perf_counter()
        run()
        host.append(1e3 * (time.perf_counter() - start))
        setting.synchronize()
        alone.append(1e3 * (time.perf_counter() - start))
    return statistics.median(host), statistics.median(alone)


def device_operations(run: Callable[[], object]) -> Operations:
    """The kernels and copies of one run, without the ranges that annotate them. GPU only."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in profiled.events() or ()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(_ANNOTATIONS)
    ]


def most_expensive(operations: Operations, count: int = 9) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds), by milliseconds."""
    launches: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, ms in operations:
        launches[name[:60]] += 1
        total[name[:60]] += ms  # type: ignore[assignment]
    return [(name, launches[name], round(float(ms), 3)) for name, ms in total.most_common(count)]


def captured(setting: Setting, run: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """One run on ``stream`` as a CUDA graph. It must have run on that stream before.

    Raises:
        RuntimeError: it cannot be captured.
    """
    setting.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def graph_ms(setting: Setting, run: Callable[[], object]) -> float | str:
    """Milliseconds of a replay; the error if the run cannot be captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        graph = captured(setting, run, stream)
    except RuntimeError as error:
        setting.synchronize()
        return f"{type(error).__name__}: {error}"[:200]
    return round(back_to_back_ms(setting, graph.replay), 3)


def step_times(setting: Setting, run: Callable[[], object], *, graph: bool = False) -> dict[str, Any]:
    """Every clock for one run, milliseconds; on a CPU those of the host.

    ``graph``: also as a CUDA graph. Not for runs that may be impossible to capture: torch's allocator does not recover.
    """
    for _ in range(3):
        run()
    host, alone = host_and_alone_ms(setting, run)
    repeats = max(1, min(10, round(100 / alone)))  # slow ones need no more
    times: dict[str, Any] = {
        "back to back ms": round(back_to_back_ms(setting, run, repeats), 3),
        "host ms": round(host, 3),
        "alone ms": round(alone, 3),
    }
    if setting.on_gpu:
        operations = device_operations(run)
        times["kernels ms"] = round(sum(ms for _, ms in operations), 3)
        times["device operations"] = len(operations)
        if graph:
            times["graph ms"] = graph_ms(setting, run)
    return times


def _wall_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
