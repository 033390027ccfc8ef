"""``sharded-lamb gpu-check``: the sections and the command's arguments."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from sharded_lamb.bench import report
from sharded_lamb.gpu_check import battery, correctness, host, integrations, memory, ranks, recipe, speed
from sharded_lamb.gpu_check.battery import Results, Section, Setting

SECTIONS: tuple[Section, ...] = (
    speed.ENVIRONMENT,
    *correctness.SECTIONS,
    ranks.SECTION,
    *integrations.SECTIONS,
    *host.SECTIONS,
    *memory.SECTIONS,
    *speed.SECTIONS,
    *recipe.SECTIONS,
    host.NCCL_GRAPH,
)
"""In the order in which they run: the cheap and the decisive first."""

BUDGET_S = 480.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sharded-lamb gpu-check``."""
    parser.description = (
        "Checks and measures everything on one GPU in at most --budget seconds. Writes gpu_check.json and gpu_check.md "
        "to --out; run again on that folder, it runs the sections that have no result yet. Exit code 1 if a check "
        "failed, 2 without a GPU."
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help="run these, whether or not they have a result; default: all that have none",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of results")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        help="seconds; a section that needs more than is left is left out",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, at tiny sizes, whatever can run there"
    )
    parser.add_argument("--list", action="store_true", help="print the sections and exit")


def run(chosen: argparse.Namespace) -> int:
    """Returns 0, 1 if a check failed, or 2 if there is no GPU.

    Raises:
        ValueError: a wrong argument.
    """
    if chosen.list:
        for section in SECTIONS:
            print(f"{section.name:<15} {section.title}{' (GPU only)' if section.needs_gpu else ''}")
        return 0
    if not chosen.budget > 0:
        raise ValueError(f"--budget must be > 0, got {chosen.budget}")
    names = [section.name for section in SECTIONS]
    unknown = [name for name in chosen.sections if name not in names]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; expected one of {', '.join(names)}")
    if not chosen.rehearse and not torch.cuda.is_available():
        print("sharded-lamb gpu-check: no GPU here; --rehearse runs what a CPU can", file=sys.stderr)
        return 2
    return _run(chosen, names)


def _run(chosen: argparse.Namespace, names: list[str]) -> int:
    setting = _setting(chosen.rehearse, chosen.budget)
    device = f"rehearsal on a CPU, kernel {setting.kernel}"
    if setting.on_gpu:
        device = torch.cuda.get_device_name(setting.device)
    results = Results(chosen.out, f"{device}, torch {torch.__version__}", report.about(setting.device))
    todo = [
        section
        for section in SECTIONS
        if (section.name in chosen.sections if chosen.sections else not results.is_complete(section.name))
    ]
    battery.run(todo, setting, results, names)
    print(f"\n{results.publish(names)}")
    failed = results.failed()
    missing = [name for name in names if not results.is_complete(name)]
    part = f" ({len(names) - len(missing)} of {len(names)} sections)" if missing else ""
    print(f"FAIL: {', '.join(failed)}" if failed else f"PASS{part}", end="")
    print(f"; without a result: {', '.join(missing)}" if missing else "")
    return 1 if failed else 0


def _setting(rehearse: bool, budget: float) -> Setting:
    """The GPU with Triton; in a rehearsal the CPU with stock operations, or with Triton's interpreter."""
    deadline = time.monotonic() + budget
    if not rehearse:
        torch.cuda.set_device(0)
        return Setting(torch.device("cuda", 0), "triton", deadline, "bert-large")
    kernel = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
    return Setting(torch.device("cpu"), kernel, deadline)
