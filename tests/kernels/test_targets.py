"""The C++ kernel has the same bits from another compiler and on aarch64 (NEON): one driver, compiled for each."""

import subprocess
from pathlib import Path

import pytest

from sharded_lamb.kernels import compiling, prebuilt
from tests import debian
from tests.kernels.drivers import compiled

CROSS, EMULATOR, CLANG = "aarch64-linux-gnu-g++", "qemu-aarch64", "clang++"


def hashes(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """With this machine's compiler, whose bits are the reference's: `test_kernels`."""
    folder = tmp_path_factory.mktemp("here") / "build"
    lines = hashes(compiled("hashes.cpp", compiling.compiler(), folder))
    assert len(lines) == len(set(lines)) > 100
    return lines


def test_aarch64_has_the_same_bits(here: list[str], tmp_path: Path) -> None:
    debian.need({CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"})
    (level,) = prebuilt.LEVELS["aarch64"]
    program = compiled("hashes.cpp", [CROSS], tmp_path / "there", *level.flags, "-static")
    assert hashes(EMULATOR, program) == here


def test_clang_has_the_same_bits(here: list[str], tmp_path: Path) -> None:
    """Vectors at addresses of any alignment: clang takes a vector type's word for it."""
    debian.need({CLANG: "clang"})
    program = compiled("hashes.cpp", [CLANG], tmp_path / "clang", *compiling.NATIVE)
    assert hashes(program) == here
