"""The host's part of a step: whether it waits for the device, what it launches, and CUDA graphs without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sharded_lamb.gpu_check import timing
from sharded_lamb.gpu_check.battery import Findings, Section, Setting
from sharded_lamb.gpu_check.training import (
    STAGES,
    Large,
    Stage,
    gradients_alone,
    group_of_one,
    large,
    recorded_warnings,
)

_TORCHS_OWN = "torch/cuda/__init__.py"
"""Where torch warns about its debug mode itself."""


def host_syncs(setting: Setting, found: Findings) -> str:
    """Backward and step with a learning rate that changes: the host waits for nothing."""
    for stage in STAGES:
        run = large(setting, stage)
        for _ in range(4):
            run.iterate()
        with recorded_warnings() as recorded:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for number in range(2):
                    run.optimizer.param_groups[0]["lr"] = 1e-3 / (2 + number)
                    run.iterate()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = sorted(
            {
                f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
                for w in recorded
                if "synchroniz" in str(w.message) and not w.filename.endswith(_TORCHS_OWN)
            }
        )
        found.check(f"stage {stage}", not places, ", ".join(places) or "none")
        del run
    return "none in backward and step of either stage"


def launches(setting: Setting, found: Findings) -> str:
    """Kernels and copies on the device, by part of an iteration; gradients alone are backward without an optimizer."""
    alone = gradients_alone(setting)
    alone()
    found.note("gradients alone", _operations(alone))
    del alone
    results = []
    for stage in STAGES:
        run = large(setting, stage)
        for _ in range(3):
            run.iterate()
        parts: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("backward", run.backward),
            ("step", run.optimizer.step),
        )
        for part, call in parts:
            row = _operations(call)
            found.note(f"stage {stage} {part}", row)
            if part == "step":
                results.append(
                    f"stage {stage}: {row['device operations']} device operations, {row['kernels ms']:.2f} ms"
                )
        run.optimizer.zero_grad()
        del run
    return "; ".join(results)


def _operations(run: Callable[[], object]) -> dict[str, Any]:
    operations = timing.device_operations(run)
    return {
        "device operations": len(operations),
        "kernels ms": round(sum(ms for _, ms in operations), 3),
        "most expensive": timing.most_expensive(operations),
    }


def graphs(setting: Setting, found: Findings) -> str:
    """A step alone, and backward with a step (both stages), in one CUDA graph, against eager twins."""
    replays = [captured_and_eager(setting, found, 1, alone=True)]
    replays += [captured_and_eager(setting, found, stage, alone=False) for stage in STAGES]
    return f"equal to the bit to eager twins; replays: {', '.join(replays)}"


def nccl_graph(setting: Setting, found: Findings) -> str:
    """Backward with a step of stage 2 in one CUDA graph: NCCL's collectives, on the stream of reductions, are in it."""
    with group_of_one(setting):
        return (
            f"equal to the bit to an eager twin; replay: {captured_and_eager(setting, found, 2, alone=False)}"
        )


def captured_and_eager(setting: Setting, found: Findings, stage: Stage, *, alone: bool) -> str:
    """Replays of a graph beside an eager twin; what was captured, and the milliseconds of a replay.

    ``alone``: the step, on gradients that stay; else a whole iteration, whose gradients have the graph's addresses.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        ours, twin = large(setting, stage), large(setting, stage)
        parts = [_step_alone(run) if alone else run.iterate for run in (ours, twin)]
        for part in parts:
            for _ in range(3):
                part()
    name = "step" if alone else "backward and step"
    try:
        graph = timing.captured(setting, parts[0], stream)
    except RuntimeError as error:
        found.check(f"stage {stage}, {name}", False, f"{type(error).__name__}: {error}"[:300])
        return f"{name} refused"
    for _ in range(3):
        graph.replay()
        with torch.cuda.stream(stream):
            parts[1]()
        setting.synchronize()
    weights = ([p.detach().cpu() for p in run.model.parameters()] for run in (ours, twin))
    found.equal(f"stage {stage}, {name}", *weights)
    replay = timing.back_to_back_ms(setting, graph.replay)
    found.note(f"stage {stage}, {name}: replay ms", round(replay, 3))
    graph.reset()
    return f"{name} {replay:.2f} ms"


def _step_alone(run: Large) -> Callable[[], object]:
    run.backward()
    return run.optimizer.step


SECTIONS = (
    Section("host-syncs", "Host synchronizations", 15, host_syncs, needs_gpu=True),
    Section("launches", "Launches a step", 15, launches, is_check=False, needs_gpu=True),
    Section("graphs", "CUDA graphs", 20, graphs, needs_gpu=True),
)
NCCL_GRAPH = Section("nccl-graph", "A CUDA graph over NCCL", 10, nccl_graph, needs_gpu=True)
"""Last: a capture that NCCL refuses may leave a device that nothing runs on."""
