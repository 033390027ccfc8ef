"""Wheels carry the kernel for every level of processor: one command builds them, and they need no compiler."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels import (
    FlatShard,
    Kernel,
    ReceivedShards,
    ReferenceKernel,
    compiling,
    native,
    prebuilt,
)
from tests import interpreter
from tests.kernels.kernel_memory import SPLIT, Form, assert_same, made, stepped

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {level.name: level for level in prebuilt.LEVELS["x86_64"]}
SOURCE = 'extern "C" int answer() { return 42; }\n'

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="wheels are tried on Linux on x86-64",
)


def launch(folder: Path, *programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`launch/wheel` with this environment's Python, and ``programs``' folders before it on PATH."""
    path = [*map(str, programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    return subprocess.run(
        [ROOT / "launch" / "wheel", "--use-current-env", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(path), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    verify = f'[[ "$1 $2" != "-m sharded_lamb" ]] || exec {interpreter.python()} "$@"'
    python = stand_in(tmp_path_factory.mktemp("python"), "python", f'{verify}\nexec {sys.executable} "$@"')
    done = launch(tmp_path_factory.mktemp("dist"), python)
    assert done.returncode == 0, done.stderr + done.stdout
    *_, verdict, path = done.stdout.splitlines()
    assert verdict == "PASS"
    return Path(path)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip unpacks it."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


# -- the wheel ----------------------------------------------------------------------------------------


def test_the_wheel_is_tagged_for_its_platform_and_carries_every_level(wheel: Path) -> None:
    assert re.fullmatch(r"sharded_lamb-[\d.]+-py3-none-manylinux_2_17_x86_64\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    kernels = [Path(name).name for name in names if name.startswith("sharded_lamb/kernels/")]
    assert {"lamb.cpp", "blocks.h", "native.py"} <= set(kernels)
    libraries = [name for name in kernels if name.endswith(".so")]
    assert sorted(re.sub(r"^lamb-[0-9a-f]{16}-|\.so$", "", name) for name in libraries) == sorted(LEVELS)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sharded_lamb"}
    configs = {Path(name).suffix for name in names if name.startswith("sharded_lamb/configs/")}
    assert configs == {".yaml", ".json"}


def test_twine_accepts_the_wheel(wheel: Path) -> None:
    check = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", wheel]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert "PASSED" in done.stdout, done.stdout + done.stderr


def test_libraries_need_a_libc_of_2014_and_nothing_else(installed: Path) -> None:
    for library in sorted(installed.glob("sharded_lamb/kernels/prebuilt/*.so")):
        read = ["readelf", "--dynamic", "--version-info", "--wide", library]
        said = subprocess.run(read, capture_output=True, text=True, check=True, timeout=60).stdout
        assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", said)) <= {"libc.so.6", "libm.so.6"}
        versions = {tuple(map(int, number.split("."))) for number in re.findall(r"GLIBC_([\d.]+)", said)}
        assert max(versions) <= (2, 17)
        assert "CXXABI" not in said


# -- bits ---------------------------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LENGTHS = (700, 1, 256, 5000, 255)
KINDS = (  # weight, model, gradient, moments
    (F32, None, F32, F32),
    (F32, BF16, BF16, F32),
    (F32, F16, F16, BF16),
    (SPLIT, BF16, F32, F32),
    (BF16, None, F16, F16),
)


def results(kernel: Kernel, compute: torch.dtype) -> list[Tensor]:
    """Both passes over flat and scattered memory, and averages."""
    wide = compute == F64
    kinds = [(F64, model, grad, state) for _, model, grad, state in KINDS[:3]] if wide else KINDS
    forms = [
        Form(flat, LENGTHS, weight, model, grad, state, state, gap=0 if flat else 3, written=5)
        for weight, model, grad, state in kinds
        for flat in (True, False)
    ]
    found = stepped(kernel, forms, seed=1, bad=False)
    for dtype in (F32, BF16, F16):
        shard = made(Form(True, (700,), compute, None, compute, F32, F32), 0, 2, bad=False)
        assert isinstance(shard, FlatShard)
        parts = torch.randn(3, 768, generator=torch.Generator().manual_seed(3)).to(dtype)
        parts[:, 700:] = 0
        sums = torch.zeros(1, dtype=F64)
        kernel.average(shard, (Segment(0, 0, 700, 0),), ReceivedShards(parts, 3, None), sums, add=True)
        found += [shard.grad, sums]
    return found


def kernel_of(installed: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    if not LEVELS[level].needs <= prebuilt._features():
        pytest.skip(f"this processor lacks {', '.join(sorted(LEVELS[level].needs - prebuilt._features()))}")
    (path,) = installed.glob(f"sharded_lamb/kernels/prebuilt/lamb-*-{level}.so")
    library = native.typed(compiling.opened(path))
    monkeypatch.setattr(native, "library", lambda: library)
    return native.CppKernel()


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_the_bits_of_the_reference(
    installed: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(results(kernel_of(installed, level, monkeypatch), F32), results(ReferenceKernel(), F32))


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "x86-64"])
def test_every_level_has_the_same_bits_in_fp64(
    installed: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the reference's square root, which is MKL's, may be off by a unit in the last place."""
    found = results(kernel_of(installed, level, monkeypatch), F64)
    assert_same(found, results(kernel_of(installed, "x86-64", monkeypatch), F64))


# -- the choice ---------------------------------------------------------------------------------------

# Of /proc/cpuinfo, without what says nothing about levels.
SKYLAKE_SP = """
processor	: 0
model name	: Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz
flags		: fpu cx8 cmov fxsr mmx sse sse2 ht syscall nx lm pni pclmulqdq monitor vmx ssse3 sdbg fma cx16 pcid \
sse4_1 sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand lahf_lm abm 3dnowprefetch fsgsbase bmi1 hle avx2 smep bmi2 \
erms rtm avx512f avx512dq rdseed adx clflushopt clwb avx512cd avx512bw avx512vl xsaveopt xsavec
vmx flags	: vnmi preemption_timer ept
"""
HASWELL = re.sub(r" avx512\w+", "", SKYLAKE_SP)
PROCESSORS = {
    "Skylake-SP": (SKYLAKE_SP, "x86-64-v4"),
    "Knights Landing": (SKYLAKE_SP.replace(" avx512bw", "").replace(" avx512vl", ""), "x86-64-v3"),
    "Haswell": (HASWELL, "x86-64-v3"),
    "Ivy Bridge": (re.sub(r" (avx2|fma|bmi1|bmi2|movbe|abm)\b", "", HASWELL), "x86-64"),
    "no flags": ("processor\t: 0\n", "x86-64"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "answer.cpp").write_text(SOURCE)
    assert len(prebuilt.build(folder / "answer.cpp")) == len(LEVELS)
    return folder


@pytest.fixture
def source(built: Path, tmp_path: Path) -> Path:
    """A source with libraries beside it, at paths that nothing has loaded yet."""
    return shutil.copytree(built, tmp_path / "copy") / "answer.cpp"


def level_of(source: Path) -> str:
    library = prebuilt.load(source)
    assert library is not None
    assert library.answer() == 42
    return re.sub(r".*/answer-[0-9a-f]{16}-|\.so$", "", library._name)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_choice_follows_the_processor(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, level = PROCESSORS[name]
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(prebuilt, "CPUINFO", str(tmp_path / "cpuinfo"))
    assert level_of(source) == level


@pytest.mark.parametrize(
    ("level", "flags"),
    [
        ("x86-64", "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe"),
        ("x86-64-v3", "avx512f avx512bw avx512cd avx512dq avx512vl"),
    ],
)
def test_a_processor_that_lacks_one_feature_has_the_level_below(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, flags: str
) -> None:
    """Features as the psABI lists them: without one of ``flags`` the best level is ``level``."""
    monkeypatch.setattr(prebuilt, "CPUINFO", str(tmp_path / "cpuinfo"))
    for flag in flags.split():
        (tmp_path / "cpuinfo").write_text(re.sub(rf" {flag}\b", "", SKYLAKE_SP))
        assert level_of(source) == level, flag


def test_an_unreadable_cpuinfo_leaves_the_level_that_every_processor_has(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prebuilt, "CPUINFO", str(tmp_path / "none"))
    assert level_of(source) == "x86-64"


def test_the_choice_is_that_of_the_system_loader(source: Path) -> None:
    """glibc (2.33 and later) asks the processor itself."""
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    said = subprocess.run([loader, "--help"], capture_output=True, text=True, timeout=60).stdout
    supported = re.findall(r"^ +(x86-64-v\d) \(supported", said, re.MULTILINE)
    if "x86-64-v" not in said:
        pytest.skip("this glibc does not list levels")
    assert level_of(source) == max({"x86-64", *supported} & set(LEVELS), key=list(reversed(LEVELS)).index)


def test_a_library_that_does_not_load_leaves_the_next(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(SKYLAKE_SP)
    monkeypatch.setattr(prebuilt, "CPUINFO", str(tmp_path / "cpuinfo"))
    paths = [prebuilt.path_of(source, level) for level in LEVELS.values()]
    paths[0].write_bytes(paths[0].read_bytes()[: paths[0].stat().st_size // 2])
    assert level_of(source) == "x86-64-v3"
    shutil.copytree(source.parent, tmp_path / "next")
    source = tmp_path / "next" / source.name
    paths = [prebuilt.path_of(source, level) for level in LEVELS.values()]
    paths[1].unlink()
    paths[1].write_bytes(b"no library")
    assert level_of(source) == "x86-64"
    paths[2].unlink()
    assert prebuilt.load(source) is None


@pytest.mark.parametrize("edited", ["source", "flags"])
def test_another_source_or_other_flags_leave_the_library_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    if edited == "source":
        source.write_text(SOURCE.replace("42", "43"))
    else:
        monkeypatch.setattr(prebuilt, "FLAGS", (*prebuilt.FLAGS, "-O1"))
    assert prebuilt.load(source) is None


# -- without a compiler -------------------------------------------------------------------------------

RUN = """
import sys, torch, sharded_lamb
from sharded_lamb.__main__ import main
from sharded_lamb.kernels import choice, native
print(sharded_lamb.__file__)
print(choice.choose("auto", torch.device("cpu")).name)
print(native.library()._name)
sys.exit(main(["verify", "--device", "cpu", "--steps", "3"]))
"""


def run_without_compiler(package: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "elsewhere").mkdir()
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CXX", "SHARDED_LAMB_KERNEL")
    }
    where = {"PATH": "/nowhere", "PYTHONPATH": str(package), compiling.CACHE: str(folder / "cache")}
    return subprocess.run(
        [interpreter.python(), "-c", RUN],
        cwd=folder / "elsewhere",
        env={**environment, **where},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_runs_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    done = run_without_compiler(installed, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    package, kernel, library, *_, verdict = done.stdout.splitlines()
    assert (Path(package).parent, kernel, verdict) == (installed / "sharded_lamb", "cpp", "PASS")
    assert Path(library).parent == installed / "sharded_lamb" / "kernels" / "prebuilt"
    assert not (tmp_path / "cache").exists(), "something was compiled"
    assert "WARNING" not in done.stderr
    assert "cannot run" not in done.stderr


# -- a new user's first commands -----------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
(COMMANDS,) = re.findall(r"```bash\npip install.*\n((?:.*\n)*?)```", README)
TINY = [
    *("phases.0.steps=4", "phases.0.global_batch=4", "phases.0.sequence_length=32", "model.hidden_size=32"),
    *("model.layers=1", "model.intermediate_size=64", "tokenizer.vocab_size=100", "data.workers=1"),
    *("checkpoint.every_steps=2", "checkpoint.keep=0", "speed.peak_tflops=1", "data.source=[my.txt]"),
]
ELSEWHERE = {
    "sharded-lamb quickstart": "bert/test_command.py",
    "examples.trainer": "integrations/test_huggingface_examples.py",
}
"""{part of a command: the test file that runs it}, since it takes long."""


def typed(installed: Path, folder: Path, command: str) -> str:
    """What a command prints, typed in ``folder`` where the wheel alone is installed; small where it trains BERT."""
    words = shlex.split(command, comments=True)
    words += TINY if "data.source=[my.txt]" in words else []
    path = f"{interpreter.prefix()}/bin:{os.environ['PATH']}"
    settings = {"PYTHON_EXEC": interpreter.python(), "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **settings, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] if "loss" in row else row["heldout_loss"] for row in rows]


def test_the_first_commands_run_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    words = "".join(f"A sentence about the number {n}, which is {n % 7} modulo 7.\n\n" for n in range(400))
    (tmp_path / "my.txt").write_text(words)
    program = README.split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "train.py").write_text(f"{program}\nimport sharded_lamb\nprint(sharded_lamb.__file__)\n")
    run = tmp_path / "runs/mine"
    said = []
    for command in COMMANDS.splitlines():
        if command.startswith("pip install") or any(part in command for part in ELSEWHERE):
            continue
        if "--resume" in command:  # as after an interruption
            first = losses(run)
            shutil.rmtree(run / "checkpoints/step-00000004")
            (run / "checkpoints/latest").write_text("step-00000002\n")
        said.append(typed(installed, tmp_path, command))
    doctor, written, _, resumed, inspected, trained = said
    assert str(installed / "sharded_lamb/kernels/prebuilt") in doctor
    assert written == "bert-quickstart.yaml\n"
    assert "from step 2" in resumed
    assert len(first) == 5
    assert losses(run) == first
    assert "step-00000004: step 4" in inspected
    assert "ok       manifest.json" in inspected
    assert trained.count(str(installed / "sharded_lamb/__init__.py")) == 2


def test_the_wheel_has_the_recipe_s_configurations(installed: Path, tmp_path: Path) -> None:
    said = typed(installed, tmp_path, "sharded-lamb pretrain --config bert-quickstart --dry-run")
    assert "1,500 steps" in said
    assert not (installed / "sharded_lamb" / "configs").is_symlink()


def test_commands_that_others_run_are_in_the_wheel(wheel: Path, installed: Path) -> None:
    assert f"pip install 'dist/{wheel.name}[bert]'\n{COMMANDS}" in README
    assert all((ROOT / "tests" / file).is_file() for file in ELSEWHERE.values())
    assert (installed / "sharded_lamb/integrations/examples/trainer.py").is_file()
    assert any("sharded-lamb quickstart" in command for command in COMMANDS.splitlines())


# -- the command's own checks -------------------------------------------------------------------------


def stand_in(folder: Path, name: str, body: str) -> Path:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(("said", "shown"), [("11", "11"), ("11.4.0", "11.4.0"), ("", "unknown")])
def test_an_old_compiler_is_refused_in_one_line(tmp_path: Path, said: str, shown: str) -> None:
    folder = stand_in(tmp_path, "g++", f"echo {said}" if said else "exit 1")
    done = launch(tmp_path / "dist", folder, CXX="")
    assert done.returncode == 1
    assert done.stderr == (
        f"wheel: error: g++ 12 or newer is needed, the version of 'g++' is {shown}; "
        "install one (Debian and Ubuntu: apt-get install g++) or name it with CXX=/path/to/g++\n"
    )


CONFIRMED = """[[ $* != *show* ]] || echo '{"overall_tag": "manylinux_2_5_x86_64"}'\n"""


@pytest.mark.parametrize(
    ("python", "says"),
    [
        (CONFIRMED, None),
        (f"{CONFIRMED}[[ $* != *'import auditwheel'* ]]", "pip install auditwheel"),
        (f"{CONFIRMED}[[ $* != *verify* ]]", ""),
        (CONFIRMED.replace("2_5", "2_31"), "finds manylinux_2_31_x86_64, manylinux_2_17_x86_64 is expected"),
        (
            CONFIRMED.replace("manylinux_2_5", "linux"),
            "finds linux_x86_64, manylinux_2_17_x86_64 is expected",
        ),
    ],
    ids=["passes", "no-auditwheel", "verify-fails", "newer-glibc", "other-libraries"],
)
def test_a_wheel_that_fails_a_check_is_not_handed_out(tmp_path: Path, python: str, says: str | None) -> None:
    """``python`` stands in for Python, but for reading JSON; its wheel is an empty file."""
    real = f'[[ $* != *json.load* ]] || exec {sys.executable} "$@"'
    build = "for word; do [[ $last != --wheel-dir ]] || touch $word/x.whl; last=$word; done"
    done = launch(tmp_path / "dist", stand_in(tmp_path, "python", f"{real}\n{build}\n{python}"))
    assert done.returncode == (0 if says is None else 1), done.stderr
    assert (says or "") in done.stderr
    assert [path.name for path in tmp_path.glob("dist/*")] == ([] if says is not None else ["x.whl"])
