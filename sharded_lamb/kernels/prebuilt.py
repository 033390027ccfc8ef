"""The libraries that a wheel carries: a C++ file compiled for each level of an architecture's processors.

Levels differ in speed, not in bits (`-ffp-contract=off`). A library's name holds a hash of its sources and flags, so
that edited sources never meet an old library; without one that fits, `compiling` compiles on first use.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from sharded_lamb.kernels import compiling

FOLDER = "prebuilt"
"""Beside the source."""

CPUINFO = "/proc/cpuinfo"

FLAGS = ("-fno-exceptions", "-fopenmp")  # exceptions would need libstdc++
# OpenMP comes from the process, i.e. torch's library, as in the first of compiling.ATTEMPTS.
LINK_FLAGS = ("-static-libgcc", "-Wl,--as-needed")


@dataclass(frozen=True)
class Level:
    """A set of instructions: compiler flags, and what /proc/cpuinfo lists for processors that have it."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


# System V ABI, AMD64 supplement, "Micro-Architecture Levels" (gitlab.com/x86-psABIs/x86-64-ABI), in Linux's names
# (arch/x86/include/asm/cpufeatures.h): pni is SSE3, abm LZCNT. Linux lists avx only where it saves its registers.
_V2 = frozenset(["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
LEVELS: dict[str, tuple[Level, ...]] = {
    "x86_64": (
        Level("x86-64-v4", ("-march=x86-64-v4", "-mprefer-vector-width=512"), _V4),
        Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
        Level("x86-64", ("-march=x86-64",)),
    ),
    "aarch64": (Level("aarch64", ("-march=armv8-a",)),),
}
"""By machine, the best first."""


def load(source: Path) -> ctypes.CDLL | None:
    """The best library of ``source`` that this processor runs and that loads; None: there is none."""
    features = _features()
    for level in LEVELS.get(platform.machine(), ()):
        path = path_of(source, level)
        if level.needs <= features and path.exists():
            with contextlib.suppress(OSError):
                return compiling.opened(path)
    return None


def build(source: Path) -> list[Path]:
    """Compiles ``source`` for every level of this machine's architecture; the libraries' paths.

    Raises:
        compiling.CompileError: no compiler, or the build failed.
    """
    compiler, paths = compiling.compiler(), []
    for level in LEVELS[platform.machine()]:
        path = path_of(source, level)
        path.parent.mkdir(exist_ok=True)
        attempts = (((*FLAGS, *level.flags), LINK_FLAGS),)
        cached = compiling.cached(source, compiler, attempts)
        if cached is None:
            built = compiling.build(source, compiler, path.parent, attempts)
        else:
            built = Path(shutil.copyfile(cached, path.with_suffix(f".{os.getpid()}")))
        built.chmod(0o755)
        os.replace(built, path)
        paths.append(path)
    return paths


def path_of(source: Path, level: Level) -> Path:
    """The library of ``source`` for ``level``, whether it exists or not."""
    parts = [path.read_bytes() for path in compiling.sources(source)]
    parts.append(repr((compiling.BASE, FLAGS, LINK_FLAGS, level.flags)).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return source.parent / FOLDER / f"{source.stem}-{key}-{level.name}.so"


def _features() -> frozenset[str]:
    """The flags of the processor; none where they are unreadable, which leaves the level that needs none."""
    with contextlib.suppress(OSError), open(CPUINFO, encoding="utf-8") as file:
        for line in file:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
