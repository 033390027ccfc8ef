"""``sharded-lamb doctor``: what is installed and what this machine can run, on one screen, to paste in a report."""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb.kernels import choice, compiling, native
from sharded_lamb.preflight.rank_report import versions

EXTRAS = {
    "bert": (
        *("datasets", "matplotlib", "omegaconf", "pydantic", "safetensors", "tensorboard", "tokenizers"),
        *("tqdm", "transformers", "yaml"),
    ),
    "deepspeed": ("deepspeed",),
    "gpu": ("triton",),
    "vision": (
        *("datasets", "matplotlib", "omegaconf", "PIL", "pydantic", "safetensors", "sklearn", "tensorboard"),
        *("timm", "torchvision", "tqdm", "yaml"),
    ),
}
"""{extra of the package: the modules that it brings}."""

Facts = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sharded-lamb doctor``."""
    parser.description = (
        "Shows versions, kernels and why another is not used, backends, and the limits of this machine."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Returns 0."""
    report = examine()
    if chosen.json:
        print(json.dumps(report, indent=1))
        return 0
    for section, facts in report.items():
        print(section)
        for name, fact in facts.items():
            print(f"  {name:<20} {fact}")
    return 0


def examine() -> dict[str, Facts]:
    """{section: {name: fact}} of this machine. Never raises for what is missing: that is a fact."""
    return {
        "versions": versions(),
        "machine": _machine(),
        "kernels": _kernels(),
        "torch.distributed": _backends(),
        "extras": {extra: _extra(modules) for extra, modules in EXTRAS.items()},
    }


def _machine() -> Facts:
    shared = Path("/dev/shm")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "system": f"{platform.platform()}, {platform.machine()}",
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {_cores()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "accelerator": _accelerator(),
        "huge pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shared memory": f"{shutil.disk_usage(shared).free / 2**30:.1f} GiB free"
        if shared.is_dir()
        else "none",
        "open files": "unlimited" if files == resource.RLIM_INFINITY else str(files),
        "interfaces": ", ".join(
            f"{name} ({_text(f'/sys/class/net/{name}/operstate')})" for _, name in _interfaces()
        ),
    }


def _processor() -> str:
    for line in _text("/proc/cpuinfo", whole=True).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accelerator() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "none"
    count = torch.accelerator.device_count()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return f"{count} x {name}"


def _interfaces() -> list[tuple[int, str]]:
    with contextlib.suppress(OSError):
        return socket.if_nameindex()
    return []


def _text(path: str, *, whole: bool = False) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return "" if whole else "unknown"
    return text if whole else text.strip()


def _kernels() -> Facts:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices.append(accelerator)
    facts = {}
    for device in devices:
        facts[f"on {device.type}"] = choice.choose("auto", device).name
        for name in choice.NAMES[1:]:
            reason = choice.why_not(name, device)
            if reason is not None:
                facts[f"{name} on {device.type}"] = f"no: {reason}"
    if choice.why_not("cpp") is None:
        facts["library"] = str(native.library()._name)
    facts["compiler"] = _compiler()
    return facts


def _compiler() -> str:
    try:
        command = compiling.compiler()
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (compiling.CompileError, OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return next(iter(done.stdout.splitlines()), " ".join(command))


def _backends() -> Facts:
    if not dist.is_available():
        return {"available": "no"}
    available: dict[str, Any] = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "mpi": dist.is_mpi_available,
    }
    return {name: "yes" if check() else "no" for name, check in available.items()}


def _extra(modules: tuple[str, ...]) -> str:
    missing = [module for module in modules if find_spec(module) is None]
    return f"missing: {', '.join(missing)}" if missing else "complete"
