"""C++ programs that call the kernel's C interface without Python."""

import os
import shutil
import subprocess
from pathlib import Path

from sharded_lamb.core.layout import BLOCK
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import compiling, native

FOLDER = Path(__file__).parent
SHORT = {
    "FLOAT32": "F32",
    "BFLOAT16": "BF16",
    "FLOAT16": "F16",
    "FLOAT64": "F64",
    "INT16": "REMAINDER",
    "INT8": "REMAINDER8",
    "UINT8": "CODES",
}


def structs() -> str:
    """C++ declarations of what `native` passes."""
    fields = {
        name: ", ".join(dtype.names or ()) for name, dtype in (("Run", native.RUN), ("Slice", native.SLICE))
    }
    dtypes = {str(dtype).removeprefix("torch.").upper(): code for dtype, code in native.DTYPES.items()}
    numbers = {SHORT[name]: code for name, code in dtypes.items()}
    numbers |= {"NONE": native.NO_MODEL, "BLOCK": BLOCK, "COLUMNS": len(COLUMNS)}
    return "".join(
        [
            *(f"struct {name} {{ int64_t {names}; }};\n" for name, names in fields.items()),
            *(f"constexpr int64_t {name} = {number};\n" for name, number in numbers.items()),
        ]
    )


def compiled(driver: str, command: list[str], folder: Path, *flags: str) -> Path:
    """The driver, a file of this folder, with the kernel, without OpenMP; in the kernel's cache for later runs."""
    folder.mkdir()
    (folder / "structs.h").write_text(structs())
    files = [FOLDER / driver, folder / "structs.h", *compiling.sources(native.SOURCE)]
    program = (compiling.cache_folder() or folder) / f"{driver}-{compiling.key(files, command, flags)}"
    if not program.exists():
        done = subprocess.run(
            [
                *command,
                *compiling.BASE,
                *flags,
                f"-I{folder}",
                files[0],
                native.SOURCE,
                "-o",
                folder / "driver",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        shutil.move(folder / "driver", f"{program}.{os.getpid()}")  # the cache may be on another file system
        os.replace(f"{program}.{os.getpid()}", program)
    return program
