"""The C++ kernel has the same bits on aarch64 (NEON): one driver, cross-compiled and run under an emulator."""

import subprocess
from pathlib import Path

from sharded_lamb.kernels import compiling, prebuilt
from tests import debian
from tests.kernels.drivers import compiled

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROGRAMS = {CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}


def hashes(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_aarch64_has_the_bits_of_this_machine(tmp_path: Path) -> None:
    """Which are those of the reference: `test_kernels`."""
    debian.need(PROGRAMS)
    (level,) = prebuilt.LEVELS["aarch64"]
    here = hashes(compiled("hashes.cpp", compiling.compiler(), tmp_path / "here"))
    there = hashes(EMULATOR, compiled("hashes.cpp", [CROSS], tmp_path / "there", *level.flags, "-static"))
    assert len(here) == len(set(here)) > 100
    assert [line for line in there if line not in here] == []
    assert there == here
