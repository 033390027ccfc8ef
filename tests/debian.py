"""Programs from Debian's packages that some tests need. SHARDED_LAMB_INSTALL_DEBIAN=1 installs those that are missing
and makes it a failure if they cannot be; without it, tests that miss one are skipped.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

INSTALL = "SHARDED_LAMB_INSTALL_DEBIAN"
_SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"  # daemons are not on everybody's PATH
_APT = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=200")


def path() -> str:
    """PATH, with the folders of daemons."""
    return f"{os.environ.get('PATH', '')}:{_SYSTEM}"


def wanted() -> bool:
    """Whether missing packages are installed, and none may be missing."""
    return os.environ.get(INSTALL) == "1"


def missing(programs: Mapping[str, str]) -> str:
    """Why one of ``programs`` ({program: its package}) is missing, and the remedy; "" where none is."""
    failure = _install(programs) if wanted() and _absent(programs) else ""
    absent = _absent(programs)
    if not absent:
        return ""
    packages = " ".join(sorted({programs[name] for name in absent}))
    return failure or f"{', '.join(absent)}: not installed (apt-get install {packages}, or {INSTALL}=1)"


def need(programs: Mapping[str, str]) -> None:
    """Skips the test where one of ``programs`` is missing; fails it where they are `wanted`."""
    if reason := missing(programs):
        (pytest.fail if wanted() else pytest.skip)(reason)


def _absent(programs: Mapping[str, str]) -> list[str]:
    return [name for name in programs if shutil.which(name, path=path()) is None]


def _install(programs: Mapping[str, str]) -> str:
    """Installs the packages, one process at a time; the error, "" on success."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = sorted({programs[name] for name in _absent(programs)})
    with open(Path(tempfile.gettempdir(), "sharded-lamb-apt.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
            done = subprocess.run(
                [*_APT, *command], env=environment, capture_output=True, text=True, timeout=240
            )
            if done.returncode:
                return f"{' '.join([*_APT, *command])} failed: {done.stderr[-500:]}"
    return ""
