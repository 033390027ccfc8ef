"""Compiles a C++ file on first use and keeps the library for all later processes of this machine.

torch.utils.cpp_extension's ``load`` was tried and does more than a plain C interface needs: it wants ninja and Python's
headers, compiles torch's headers (20 s instead of 2), and its lock is a file that a killed process leaves behind, for
which every later one waits forever. Here the lock is the kernel's (``flock``), which dies with its process, and a
library appears by renaming, whole or not at all.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

CACHE = "SHARDED_LAMB_CACHE"
"""Environment variable: the folder that compiled libraries are kept in; default: ``$XDG_CACHE_HOME/sharded_lamb``."""

TIMEOUT_S = 120
"""Seconds that a compiler may take."""

BASE = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NATIVE = ("-march=native", "-mprefer-vector-width=512")
ATTEMPTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    # The first takes OpenMP from the process: torch's own library, so that both use one pool of threads.
    ((*NATIVE, "-fopenmp"), ()),
    ((*NATIVE[:1], "-fopenmp"), ("-fopenmp",)),
    (NATIVE[:1], ()),
    ((), ()),
)
"""Flags to compile and to link with, the best first."""


class CompileError(RuntimeError):
    """No library could be made; the message says why in one line."""


def load(source: Path) -> ctypes.CDLL:
    """The library of ``source``, compiled if no cached one is as new.

    Raises:
        CompileError: no compiler, or a failed build.
    """
    try:
        return _load(source)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(str(error)) from error


def _load(source: Path) -> ctypes.CDLL:
    compiler = _compiler()
    name = f"{source.stem}-{_key(source, compiler)}.so"
    folder = _folder()
    if folder is None:
        return _load_private(source, compiler)
    path = folder / name
    if not _usable(path):
        with _locked(folder / f"{name}.lock"):
            if not _usable(path):  # another process may have made it meanwhile
                built = _build(source, compiler, folder)
                built.chmod(0o755)
                os.replace(built, path)
    return ctypes.CDLL(str(path))


def _usable(path: Path) -> bool:
    """Whether there is a library that loads: a crash may have left less, or another system more than this one knows."""
    return path.exists() and not _loads(str(path))


def _load_private(source: Path, compiler: list[str]) -> ctypes.CDLL:
    """Without a folder to keep it in: compiled for this process alone."""
    with tempfile.TemporaryDirectory(prefix="sharded_lamb-") as folder:
        return ctypes.CDLL(str(_build(source, compiler, Path(folder))))


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)  # CXX may be "ccache g++"
        if command and shutil.which(command[0]):
            return command
    looked = f"CXX={named}" if named else "c++, g++, clang++"
    raise CompileError(f"no C++ compiler was found ({looked}): install one, e.g. apt-get install g++")


def _key(source: Path, compiler: list[str]) -> str:
    """What the library depends on: sources, flags, compiler and, since it is compiled for it, the processor."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False)
    parts = [path.read_bytes() for path in _sources(source)]
    parts += [repr((BASE, ATTEMPTS)).encode(), version.stdout, _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _sources(source: Path) -> list[Path]:
    """The file and what it includes by relative paths, or what is included does."""
    found = [source]
    for path in found:  # which grows
        for name in re.findall(r'^\s*#include\s+"(.+)"', path.read_text(), re.MULTILINE):
            if path.parent / name not in found:
                found.append(path.parent / name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    return platform.machine() + platform.processor()


def _folder() -> Path | None:
    """Where libraries are kept; None where nothing can be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get(CACHE) or os.path.join(base, "sharded_lamb"))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; on a file system without locks several compile, and the last one's rename stands."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(source: Path, compiler: list[str], folder: Path) -> Path:
    """A library with a name of its own in ``folder``, made with the first flags that work."""
    said = ""
    for compile_flags, link_flags in ATTEMPTS:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        object_file = f"{name}.o"
        try:
            said = _run([*compiler, *BASE, *compile_flags, "-c", str(source), "-o", object_file])
            # Symbols that nobody has must show now, not at the first call.
            said = said or _run([*compiler, "-shared", "-Wl,-z,now", *link_flags, object_file, "-o", name])
            said = said or _loads(name)
            if not said:
                return Path(name)
            os.unlink(name)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(object_file)
    raise CompileError(f"{shlex.join(compiler)} failed: {said}")


def _run(command: Sequence[str]) -> str:
    """What went wrong, in one line; empty if nothing did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return errors[0].strip() if errors else f"exit code {done.returncode}"


def _loads(path: str) -> str:
    try:
        ctypes.CDLL(path)
    except OSError as error:
        return str(error)
    return ""
