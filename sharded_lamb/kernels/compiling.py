"""Compiles a C++ file on first use and caches the library for all later processes of this machine.

torch.utils.cpp_extension's ``load`` does more than a plain C interface needs: it requires ninja and Python's headers,
compiles torch's headers (20 s instead of 2), and its lock is a file that a killed process leaves behind, so that every
later process waits forever. Here the lock is ``flock``, which the kernel releases when its process ends, and a library
is renamed into place, so it is complete or absent.
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
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

CACHE = "SHARDED_LAMB_CACHE"
"""Environment variable: folder of compiled libraries; default: ``$XDG_CACHE_HOME/sharded_lamb``."""

TIMEOUT_S = 120
"""Timeout of one compiler call, in seconds."""

BASE = (
    "-std=c++17",
    "-O2",
    "-funswitch-loops",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
)
NATIVE = ("-march=native", "-mprefer-vector-width=512")
Attempt = tuple[tuple[str, ...], tuple[str, ...]]  # compile flags, link flags
ATTEMPTS: tuple[Attempt, ...] = (
    # The first resolves OpenMP from the process, i.e. torch's library, so that both use one pool of threads.
    ((*NATIVE, "-fopenmp"), ()),
    ((*NATIVE[:1], "-fopenmp"), ("-fopenmp",)),
    (NATIVE[:1], ()),
    ((), ()),
)
"""The best first."""


WHEEL = "or install the wheel that launch/wheel builds elsewhere, which needs no compiler"


class CompileError(RuntimeError):
    """Compilation failed; the message gives the reason in one line."""


def load(source: Path) -> ctypes.CDLL:
    """The library of ``source``, compiled unless the cache has it.

    Raises:
        CompileError: no compiler, or the build failed.
    """
    try:
        return _load(source)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(str(error)) from error


def _load(source: Path) -> ctypes.CDLL:
    command = compiler()
    path = cached(source, command)
    return _load_private(source, command) if path is None else opened(path)


def cached(source: Path, command: list[str], attempts: Sequence[Attempt] = ATTEMPTS) -> Path | None:
    """The library of ``source`` in the cache folder, built unless it is there; None: no folder can be written.

    Raises:
        CompileError: the build failed.
    """
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{source.stem}-{key(sources(source), command, attempts)}.so"
    if not _usable(path):
        with _locked(folder / f"{path.name}.lock"):
            if not _usable(path):  # another process may have built it meanwhile
                built = build(source, command, folder, attempts)
                built.chmod(0o755)
                os.replace(built, path)
    return path


def _usable(path: Path) -> bool:
    """Whether the library exists and loads: a crash may truncate it, another system may lack its dependencies."""
    return path.exists() and not _load_error(path)


def _load_private(source: Path, command: list[str]) -> ctypes.CDLL:
    """Without a writable cache folder: compile for this process only."""
    with tempfile.TemporaryDirectory(prefix="sharded_lamb-") as folder:
        return opened(build(source, command, Path(folder)))


def compiler() -> list[str]:
    """The command of the C++ compiler. Raises: CompileError."""
    cxx = os.environ.get("CXX")
    for candidate in [cxx] if cxx else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)  # CXX may be "ccache g++"
        if command and shutil.which(command[0]):
            return command
    candidates = f"CXX={cxx}" if cxx else "c++, g++, clang++"
    raise CompileError(
        f"no C++ compiler was found ({candidates}): install one (Debian and Ubuntu: apt-get install g++), {WHEEL}"
    )


def key(files: Sequence[Path], command: list[str], flags: object) -> str:
    """Hash of everything that a build depends on: sources, flags, compiler and processor (-march=native)."""
    version = subprocess.run([*command, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False)
    parts = [path.read_bytes() for path in files]
    parts += [repr((BASE, flags)).encode(), version.stdout, _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def sources(source: Path) -> list[Path]:
    """The file and, recursively, the files that it includes by relative paths."""
    paths = [source]
    for path in paths:  # grows while it is iterated
        for name in re.findall(r'^\s*#include\s+"(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            if path.parent / name not in paths:
                paths.append(path.parent / name)
    return paths


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    return platform.machine() + platform.processor()


def cache_folder() -> Path | None:
    """The cache folder; None if it is not writable."""
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
    """Hold an exclusive lock; on a file system without locks several processes compile, and the last rename wins."""
    with open(path, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(source: Path, command: Sequence[str], folder: Path, attempts: Sequence[Attempt] = ATTEMPTS) -> Path:
    """Build a library with a unique name in ``folder``, with the first flags that work. Raises: CompileError."""
    error = ""
    for compile_flags, link_flags in attempts:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        object_file = f"{name}.o"
        try:
            error = _run([*command, *BASE, *compile_flags, "-c", str(source), "-o", object_file])
            # Undefined symbols must fail here, not at the first call.
            error = error or _run([*command, "-shared", "-Wl,-z,now", *link_flags, object_file, "-o", name])
            error = error or _load_error(Path(name))
            if not error:
                return Path(name)
            os.unlink(name)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(object_file)
    raise CompileError(f"{shlex.join(command)} failed: {error}; name another compiler in CXX, {WHEEL}")


def _run(command: Sequence[str]) -> str:
    """Run a command. Returns the error in one line; empty on success."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode == 0:
        return ""
    errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
    return errors[0].strip() if errors else f"exit code {result.returncode}"


def opened(path: Path) -> ctypes.CDLL:
    """A library. Raises: OSError: it does not load, or is cut short: then the loader would die of SIGBUS."""
    with open(path, "rb") as file:
        header, size = file.read(64), os.fstat(file.fileno()).st_size
    if len(header) == 64 and header.startswith(
        b"\x7fELF\x02"
    ):  # 64 bits; the table of sections is at the end
        (table,), (entry, entries) = (
            struct.unpack_from("=Q", header, 40),
            struct.unpack_from("=HH", header, 58),
        )
        if table + entry * entries > size:
            raise OSError(f"{path} is cut short")
    return ctypes.CDLL(str(path))


def _load_error(path: Path) -> str:
    """The error of loading a library; empty on success."""
    try:
        opened(path)
    except OSError as error:
        return str(error)
    return ""
