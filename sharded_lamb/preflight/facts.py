"""What a rank says of itself, and in what ranks must not differ."""

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

VERSIONED = ("sharded-lamb", "torch", "numpy", "transformers", "deepspeed", "triton")
_SOURCES = (".py", ".cpp")


@dataclass(frozen=True, slots=True)
class Facts:
    """One rank's. ``same``: what must not differ, by its name; ``free``: bytes on the disk that is written to."""

    rank: int
    host: str
    same: Mapping[str, str] = field(default_factory=dict)
    free: int | None = None
    problem: str | None = None  # what this rank could not even look at


def collect(
    rank: int, device: torch.device, configs: Sequence[Path], data: Sequence[Path], writes: Path | None
) -> Facts:
    """This rank's. What cannot be read is a ``problem``, so that every rank gets to say its own."""
    same = {"code": _digest_of_tree(Path(__file__).parent.parent), "device": _device(device)}
    same |= {f"version of {name}": found for name, found in _versions().items()}
    free, problem = None, None
    try:
        same |= {f"config {path}": _digest(path) for path in configs}
        same |= {f"data {path}": digest_of_data(path) for path in data}
        if writes is not None:
            free = _writable(writes)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    return Facts(rank, socket.gethostname(), same, free, problem)


def _versions() -> dict[str, str]:
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
    """Of a package's sources: what is installed may have been edited since."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
        hashed.update(f"{path.relative_to(folder)} {_digest(path)}\n".encode())
    return hashed.hexdigest()[:16]


def digest_of_data(folder: Path) -> str:
    """Of a data set: the names and sizes of its files, and what its manifests (JSON files) hold."""
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
    """Free bytes. Raises OSError where this rank cannot write."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
    return shutil.disk_usage(folder).free


def complaints(found: Sequence[Facts], free_needed: int) -> list[str]:
    """What is wrong, hosts named; [] if nothing is. The value of most ranks counts as the right one."""
    problems = dict.fromkeys(one.problem for one in found if one.problem)
    lines = [f"{who([one for one in found if one.problem == what])} cannot use {what}" for what in problems]
    for name in dict.fromkeys(name for one in found for name in one.same):
        values = Counter(one.same[name] for one in found if name in one.same)
        (common, count), *others = values.most_common()
        for value, _ in others:
            odd = [one for one in found if one.same.get(name) == value]
            lines.append(f"{name} differs: {who(odd)} has {value}, {count} ranks have {common}")
    short = [one for one in found if one.free is not None and one.free < free_needed]
    for host in dict.fromkeys(one.host for one in short):
        least = min(one.free or 0 for one in short if one.host == host)
        lines.append(
            f"{who([one for one in short if one.host == host])} has {least / 1e9:.1f} GB free, "
            f"{free_needed / 1e9:.1f} are needed"
        )
    return lines


def who(ranks: Sequence[Facts]) -> str:
    """``host a (ranks 0-3, 5)``, hosts by their first rank."""
    by_host: dict[str, list[int]] = {}
    for one in ranks:
        by_host.setdefault(one.host, []).append(one.rank)
    named = [f"host {host} (rank{'s' * (len(own) > 1)} {spans(own)})" for host, own in by_host.items()]
    shown = ", ".join(named[:8])
    return shown if len(named) <= 8 else f"{shown} and {len(named) - 8} more hosts"


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → ``0-2, 5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)
