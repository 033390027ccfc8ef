"""One rank's report of its code, versions, files and disk, and the comparison of all ranks' reports."""

import hashlib
import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sharded_lamb.watchdog.diagnosis import rank_ranges

VERSIONED = ("sharded-lamb", "torch", "numpy", "transformers", "deepspeed", "triton")
_SOURCES = (".py", ".cpp", ".h")


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's state before a job."""

    rank: int
    host: str
    same: Mapping[str, str] = field(default_factory=dict)  # {name: value}, equal on all ranks of a sound job
    free: int | None = None  # bytes on the disk of the run's folder
    problem: str | None = None  # a path that this rank cannot use, and why


def collect(
    rank: int, device: torch.device, configs: Sequence[Path], data: Sequence[Path], writes: Path | None
) -> RankReport:
    """This rank's report. An unreadable path becomes its ``problem``, so that every rank reports."""
    same = {"code": _digest_of_tree(Path(__file__).parent.parent), "device": _device(device)}
    same |= {f"version of {name}": number for name, number in versions().items()}
    free, problem = None, None
    try:
        same |= {f"config {path}": _digest(path) for path in configs}
        same |= {f"data {path}": digest_of_data(path) for path in data}
        if writes is not None:
            free = _writable(writes)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    return RankReport(rank, socket.gethostname(), same, free, problem)


def versions() -> dict[str, str]:
    """{distribution: its version, or "none"}, and Python's and CUDA's."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    return found


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    return torch.cuda.get_device_name(device)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _digest_of_tree(folder: Path) -> str:
    """A digest of a package's sources, since an installed package may have been edited."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
        hashed.update(f"{path.relative_to(folder)} {_digest(path)}\n".encode())
    return hashed.hexdigest()[:16]


def digest_of_data(folder: Path) -> str:
    """A digest of a data set: its files' names and sizes, and the content of its manifests (JSON files)."""
    if folder.is_file():
        return _digest(folder)
    hashed = hashlib.sha256()
    for path in sorted(path for path in _files(folder)):
        size, content = path.stat().st_size, _digest(path) if path.suffix == ".json" else ""
        hashed.update(f"{path.relative_to(folder)} {size} {content}\n".encode())
    return hashed.hexdigest()[:16]


def _files(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such file or folder", str(folder))
    return (path for path in folder.rglob("*") if path.is_file())


def _writable(folder: Path) -> int:
    """Free bytes.

    Raises:
        OSError: this rank cannot write to ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
    return shutil.disk_usage(folder).free


def problems_of(reports: Sequence[RankReport], free_needed: int) -> list[str]:
    """A line for each problem, with its hosts; [] without problems. The majority's value counts as the right one."""
    problems = dict.fromkeys(report.problem for report in reports if report.problem)
    lines = [
        f"{hosts_of([report for report in reports if report.problem == problem])} cannot use {problem}"
        for problem in problems
    ]
    for name in dict.fromkeys(name for report in reports for name in report.same):
        values = Counter(report.same[name] for report in reports if name in report.same)
        (common, count), *others = values.most_common()
        for value, _ in others:
            mismatched = [report for report in reports if report.same.get(name) == value]
            lines.append(f"{name} differs: {hosts_of(mismatched)} has {value}, {count} ranks have {common}")
    short = [report for report in reports if report.free is not None and report.free < free_needed]
    for host in dict.fromkeys(report.host for report in short):
        least = min(report.free or 0 for report in short if report.host == host)
        lines.append(
            f"{hosts_of([report for report in short if report.host == host])} has {least / 1e9:.1f} GB free, "
            f"{free_needed / 1e9:.1f} are needed"
        )
    return lines


def hosts_of(reports: Sequence[RankReport]) -> str:
    """``host a (ranks 0-3, 5)``, hosts by their first rank."""
    by_host: dict[str, list[int]] = {}
    for report in reports:
        by_host.setdefault(report.host, []).append(report.rank)
    named = [f"host {host} (rank{'s' * (len(own) > 1)} {rank_ranges(own)})" for host, own in by_host.items()]
    shown = ", ".join(named[:8])
    return shown if len(named) <= 8 else f"{shown} and {len(named) - 8} more hosts"
