"""The C++ kernel has the same bits on aarch64 (NEON): one driver, cross-compiled and run under an emulator."""

import subprocess
from pathlib import Path

from sharded_lamb.core.layout import BLOCK
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import compiling, native, prebuilt
from tests import debian

DRIVER = Path(__file__).with_name("driver.cpp")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROGRAMS = {CROSS: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}


def structs() -> str:
    """C++ declarations of what `native` passes."""
    fields = {
        name: ", ".join(dtype.names or ()) for name, dtype in (("Run", native.RUN), ("Slice", native.SLICE))
    }
    dtypes = {str(dtype).removeprefix("torch.").upper(): code for dtype, code in native.DTYPES.items()}
    short = {"FLOAT32": "F32", "BFLOAT16": "BF16", "FLOAT16": "F16", "FLOAT64": "F64", "INT16": "REMAINDER"}
    numbers = {short[name]: code for name, code in dtypes.items()}
    numbers |= {"NONE": native.NO_MODEL, "BLOCK": BLOCK, "COLUMNS": len(COLUMNS)}
    return "".join(
        [
            *(f"struct {name} {{ int64_t {names}; }};\n" for name, names in fields.items()),
            *(f"constexpr int64_t {name} = {number};\n" for name, number in numbers.items()),
        ]
    )


def compiled(command: list[str], folder: Path, *flags: str) -> Path:
    """The driver with the kernel, without OpenMP."""
    folder.mkdir()
    (folder / "structs.h").write_text(structs())
    program = folder / "driver"
    flags = (*compiling.BASE, *flags, f"-I{folder}")
    done = subprocess.run(
        [*command, *flags, DRIVER, native.SOURCE, "-o", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return program


def hashes(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_aarch64_has_the_bits_of_this_machine(tmp_path: Path) -> None:
    """Which are those of the reference: `test_kernels`."""
    debian.need(PROGRAMS)
    (level,) = prebuilt.LEVELS["aarch64"]
    here = hashes(compiled(compiling.compiler(), tmp_path / "here"))
    there = hashes(EMULATOR, compiled([CROSS], tmp_path / "there", *level.flags, "-static"))
    assert len(here) == len(set(here)) > 100
    assert [line for line in there if line not in here] == []
    assert there == here
