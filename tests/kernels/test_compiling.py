"""Kernels are compiled once per machine, by one process at a time; without a compiler, stock operations run."""

import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sharded_lamb import ShardedLamb
from sharded_lamb.kernels import choice, compiling
from tests.forked import forked

SOURCE = 'extern "C" int answer() { return 42; }\n'

# Imported by path: importing the package would import torch, which is slow.
COMPILE = f"""
import runpy, sys
from pathlib import Path
compiling = runpy.run_path({compiling.__file__!r})
print(compiling["load"](Path(sys.argv[1])).answer())
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def counted_compiler(folder: Path, body: str = "") -> tuple[Path, Path]:
    """A compiler that logs a line per compilation, and the log file."""
    log, script = folder / "log", folder / "counted-c++"
    script.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            case "$*" in *" -c "*) echo compiled >> {log}; {body} ;; esac
            exec c++ "$@"
            """
        )
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    log.touch()
    return script, log


def libraries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*.so"))


def test_a_second_load_compiles_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, log = counted_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(script))
    for _ in range(2):
        assert compiling.load(source).answer() == 42
    assert log.read_text().split() == ["compiled"]
    assert len(libraries(tmp_path)) == 1


@pytest.mark.parametrize("what", ["source", "header", "header of a header", "compiler", "processor"])
def test_a_changed_dependency_makes_another_library(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    first, second = tmp_path / "first.h", tmp_path / "second.h"
    first.write_text('#include "second.h"\n')
    second.write_text("#define ANSWER 42\n")
    if what.startswith("header"):
        source.write_text('#include "first.h"\n' + SOURCE.replace("42", "ANSWER"))
    compiling.load(source)
    if what == "header":
        first.write_text("#define ANSWER 43\n")
    elif what == "header of a header":
        second.write_text("#define ANSWER 43\n")
    elif what == "source":
        source.write_text(SOURCE.replace("42", "43"))
    elif what == "compiler":
        script = tmp_path / "other-c++"
        script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo another && exit\nexec c++ "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    else:
        monkeypatch.setattr(compiling, "_processor", lambda: "another")
    assert compiling.load(source).answer() == (42 if what in ("compiler", "processor") else 43)
    assert len(libraries(tmp_path)) == 2


def test_processes_that_start_at_once_compile_once(source: Path, tmp_path: Path) -> None:
    script, log = counted_compiler(tmp_path, "sleep 1")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE, str(source)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CXX": str(script)},
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42"] * 3
    assert log.read_text().split() == ["compiled"]


def test_a_process_killed_while_compiling_blocks_no_other(source: Path, tmp_path: Path) -> None:
    script, log = counted_compiler(tmp_path, "kill -9 $PPID; sleep 1")
    killed = subprocess.run(
        [sys.executable, "-c", COMPILE, str(source)],
        env={**os.environ, "CXX": str(script)},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert log.read_text()
    assert compiling.load(source).answer() == 42


@pytest.mark.parametrize("where", ["a file", "a folder that cannot be made"])
def test_without_a_cache_folder_the_process_compiles_for_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Root can write everywhere, so a path on which no folder can be created replaces a read-only folder."""
    blocked = tmp_path / "blocked"
    blocked.touch()
    monkeypatch.setenv(compiling.CACHE, str(blocked if where == "a file" else blocked / "cache"))
    assert compiling.load(source).answer() == 42
    assert blocked.read_bytes() == b""


@pytest.mark.parametrize("left", ["nothing", "no library", "half"])
def test_a_library_that_does_not_load_is_compiled_again(source: Path, tmp_path: Path, left: str) -> None:
    """A crash may truncate a library, and another system may build one with missing dependencies."""
    compiling.load(source)
    (name,) = libraries(tmp_path)
    broken = tmp_path / "cache" / name
    whole = broken.read_bytes()
    broken.unlink()  # this process has it loaded: it must not be overwritten
    broken.write_bytes({"nothing": b"", "no library": b"no library", "half": whole[: len(whole) // 2]}[left])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(source)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "42"
    assert broken.read_bytes() == whole


def test_a_compiler_may_come_with_arguments(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++")
    assert compiling.load(source).answer() == 42


def test_a_full_disk_raises_compile_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiling.tempfile, "mkstemp", full)
    with pytest.raises(compiling.CompileError, match="No space left"):
        compiling.load(source)


def test_a_folder_without_permission_to_write(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compiling.tempfile, "TemporaryFile", refused)
    assert compiling.load(source).answer() == 42
    assert libraries(tmp_path) == []


def test_a_file_system_without_locks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(compiling.fcntl, "flock", refused)
    assert compiling.load(source).answer() == 42


def test_flags_unknown_to_the_compiler_are_omitted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "plain-c++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *native*|*openmp*) echo "error: unknown flag" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert compiling.load(source).answer() == 42


def test_an_undefined_symbol_fails_the_build(source: Path) -> None:
    """It does not fail later, at the first call."""
    source.write_text('extern "C" int nowhere(); extern "C" int answer() { return nowhere(); }\n')
    with pytest.raises(compiling.CompileError, match="nowhere"):
        compiling.load(source)


def test_a_failed_build_quotes_the_compiler(source: Path, tmp_path: Path) -> None:
    source.write_text("int answer() { return undeclared; }\n")
    with pytest.raises(compiling.CompileError, match="undeclared"):
        compiling.load(source)
    assert libraries(tmp_path) == []
    assert not list((tmp_path / "cache").glob("*.o"))


@pytest.mark.parametrize(
    ("cxx", "says"),
    [
        ("no-such-compiler", "no C\\+\\+ compiler.*apt-get install g\\+\\+.*the wheel"),
        ("false", "false failed.*CXX.*the wheel"),
    ],
)
def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, says: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(compiling.CompileError, match=says):
        compiling.load(source)


def train() -> None:
    logging.basicConfig(format="%(levelname)s %(message)s")
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = ShardedLamb([p])
        p.grad = torch.ones(3)
        optimizer.step()
        print("kernel", optimizer._kernel.name)


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_training_without_a_compiler_warns_once(tmp_path: Path, cxx: str) -> None:
    with forked(train, **{"CXX": cxx, compiling.CACHE: str(tmp_path)}) as process:
        code, output = process.ended()
    assert code == 0, output
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("kernel")] == ["kernel torch"] * 2
    (warning,) = (line for line in lines if "WARNING" in line)
    assert "cpp kernel cannot run" in warning
    assert cxx in warning
    assert "install the wheel" in warning


def test_the_environment_variable_selects_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.ENVIRONMENT, "")
    assert choice.choose("auto", choice.CPU).name == "cpp"
    monkeypatch.setenv(choice.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match=f"{choice.ENVIRONMENT} must name one of .*'fastest'"):
        choice.choose("auto", choice.CPU)
    monkeypatch.setenv(choice.ENVIRONMENT, "torch")
    assert choice.choose("auto", choice.CPU).name == "torch"
    assert choice.choose("cpp", choice.CPU).name == "cpp"
