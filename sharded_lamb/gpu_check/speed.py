"""Environment, bandwidth of the kernels, and times of a step beside other optimizers."""

import platform
from collections.abc import Callable
from typing import Any

import numpy
import torch

import sharded_lamb
from sharded_lamb import kernels
from sharded_lamb.bench import gpu_kernels, peers
from sharded_lamb.core.rule import SUMS
from sharded_lamb.gpu_check import timing
from sharded_lamb.gpu_check.battery import Findings, Section, Setting
from sharded_lamb.gpu_check.training import STAGES, gradients_alone, large, set_gradients, synthetic

FORMS: tuple[tuple[str, torch.dtype, bool], ...] = (
    ("fp32", torch.float32, False),
    ("bf16, fp32 masters", torch.bfloat16, False),
    ("bf16, remainders", torch.bfloat16, True),
)
"""(name, dtype of weights, 16-bit remainders)."""


def environment(setting: Setting, found: Findings) -> str:
    """Versions, the device, and the bandwidth of a copy on it."""
    versions = {
        "sharded_lamb": sharded_lamb.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError as error:
        versions["triton"] = f"not importable: {error}"
    found.note("versions", versions)
    if setting.on_gpu:
        device = torch.cuda.get_device_properties(setting.device)
        found.note("device", device.name)
        found.note("multiprocessors", device.multi_processor_count)
        found.note("memory GiB", round(device.total_memory / 2**30, 1))
        found.note("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    copy = timing.copy_gb_per_s(setting)
    found.note("copy GB/s", round(copy))
    return f"torch {versions['torch']}, triton {versions['triton']}; copy {copy:,.0f} GB/s"


def bandwidth(setting: Setting, found: Findings) -> str:
    """Pass 1, pass 2 (as a step calls it, and in one call) and the sums of squares: ms, and % of a copy's bandwidth."""
    kernel = kernels.load(setting.kernel, setting.device)
    results = []
    for name, dtype, splits in FORMS:
        model = None if dtype == torch.float32 else dtype
        work = gpu_kernels.work(setting.shapes, model, 1, setting.device, splits=splits)
        rows = _bandwidths(setting, kernel, work)
        found.note(name, rows)
        results.append(f"{name} {rows['pass 1']['% of copy']} and {rows['pass 2']['% of copy']} %")
        del work
    return f"passes 1 and 2 of {setting.kernel}, of a copy's: {'; '.join(results)}"


def _bandwidths(
    setting: Setting, kernel: kernels.Kernel, work: gpu_kernels.Work
) -> dict[str, dict[str, float]]:
    """{what: {ms, % of copy}}; the copy is measured beside them."""
    sums = torch.zeros(work.sums.shape[1], dtype=torch.float64, device=setting.device)
    assert work.sums.shape[0] == len(SUMS)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "pass 1": (lambda: work.pass_1(kernel), work.bytes_of(1)),
        "pass 2": (lambda: work.pass_2(kernel), work.bytes_of(2)),
        "pass 2 in one call": (
            lambda: kernel.apply(work.shards, work.table, work.step_sizes),
            work.bytes_of(2),
        ),
        "sums of squares": (lambda: kernel.square_sums(work.shards, sums), 4 * work.elements),
    }
    copy = timing.copy_gb_per_s(setting)
    rows = {}
    for name, (run, moved) in runs.items():
        ms = timing.back_to_back_ms(setting, run)
        rows[name] = {"ms": round(ms, 3), "% of copy": round(100 * moved / ms * 1e-6 / copy)}
    return rows


def step_time(setting: Setting, found: Findings) -> str:
    """A step on the same shapes: ours by form and kernel, and other optimizers; see `timing` for the clocks."""
    clock = "kernels ms" if setting.on_gpu else "back to back ms"
    results = []
    for name, dtype, splits in FORMS:
        for kernel in dict.fromkeys(
            (setting.kernel, "torch") if dtype == torch.float32 else (setting.kernel,)
        ):
            ours = large(setting, 1, dtype, kernel=kernel, remainders=splits)
            set_gradients(list(ours.model.parameters()))
            row = timing.step_times(setting, ours.optimizer.step, graph=kernel == "triton")
            found.note(f"ShardedLamb stage 1, {name}, {kernel}", row)
            if kernel == setting.kernel:
                results.append(f"{name} {row[clock]:.2f}")
            del ours
    _whole_iterations(setting, found)
    for name, construct in PEERS.items():
        try:
            row = _peer(setting, construct)
        except ImportError as error:
            found.note(name, f"left out, not importable: {error}")
            continue
        except Exception as error:  # another program's
            found.note(name, f"{type(error).__name__}: {error}"[:300])
            continue
        found.note(name, row)
        results.append(f"{name} {row[clock]:.2f}")
    return f"{clock}: {'; '.join(results)}"


def _whole_iterations(setting: Setting, found: Findings) -> None:
    """Gradients in fresh memory, backward's hooks and the step; the first row is without an optimizer."""
    found.note("gradients alone", timing.step_times(setting, gradients_alone(setting)))
    for stage in STAGES:
        run = large(setting, stage)
        found.note(f"gradients and stage {stage}", timing.step_times(setting, run.iterate))
        del run


def _peer(setting: Setting, construct: Callable[[Any, bool], Any]) -> dict[str, Any]:
    """Times of another optimizer's step; `_fused_adamw` is made for graphs."""
    params = list(synthetic(setting).parameters())
    set_gradients(params)
    return timing.step_times(setting, construct(params, setting.on_gpu).step, graph=construct is _fused_adamw)


def _fused_adamw(params: Any, on_gpu: bool) -> Any:
    return torch.optim.AdamW(params, lr=1e-4, fused=True, capturable=on_gpu)


def _timm(params: Any, on_gpu: bool) -> Any:
    timm: Any = peers.timm_lamb()
    return timm(params, lr=1e-4, max_grad_norm=1.0, foreach=True)


def _apex(params: Any, on_gpu: bool) -> Any:
    if not on_gpu:
        raise ImportError("apex needs a GPU")
    from apex.optimizers import FusedLAMB

    return FusedLAMB(params, lr=1e-4, max_grad_norm=1.0)


PEERS: dict[str, Callable[[Any, bool], Any]] = {
    "torch fused AdamW": _fused_adamw,
    "timm Lamb, foreach": _timm,
    "apex FusedLAMB": _apex,
}

ENVIRONMENT = Section("environment", "Environment", 3, environment, is_check=False)
SECTIONS = (
    Section("bandwidth", "Bandwidth of the passes", 25, bandwidth, is_check=False),
    Section("step-time", "A step over BERT-large's tensors", 30, step_time, is_check=False),
)
