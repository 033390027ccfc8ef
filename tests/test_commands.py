"""`sharded-lamb`: help and mistakes without waiting for torch, every command behind one table."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sharded_lamb
from sharded_lamb.__main__ import COLLECTIVE, COMMANDS, _parser, main
from sharded_lamb.recipes.training import shipped

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = """
import sys
from sharded_lamb.__main__ import main
try:
    main({arguments!r})
except SystemExit:
    pass
print("torch" in sys.modules)
"""


IMPORTING = """
import sys
from sharded_lamb import ShardedLamb
print(sorted({"torch.distributed.tensor", "torch.distributed.checkpoint", "sympy"} & set(sys.modules)))
"""


def test_importing_the_optimizer_imports_no_dtensors() -> None:
    """They take half as long to import as torch, which imports them when the first optimizer is constructed."""
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["verfy"]])
def test_help_and_mistakes_do_not_import_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(arguments=arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_locale_without_utf8_shows_escapes() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "sharded_lamb", "configs"]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2026" in done.stdout
    assert "deepspeed/zero1" in done.stdout


@pytest.mark.parametrize("before", [[], ["seed=1"]])
def test_settings_may_follow_options(before: list[str]) -> None:
    for command in (["pretrain"], ["vision", "train"]):
        arguments = [*command, "--config", "x", *before, "--resume", "auto", "a.b=2", "--resume=y", "c=[3]"]
        chosen = _parser(command[0])[0].parse_args(arguments)
        assert (chosen.resume, chosen.overrides) == ("y", [*before, "a.b=2", "c=[3]"])
        with pytest.raises(SystemExit):
            _parser(command[0])[0].parse_args([*arguments, "word"])


COMPLETING = """
import sys
sys.modules["torch"] = None
from sharded_lamb.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sharded-lamb pre", ["preflight", "pretrain"]),
        ("sharded-lamb pretrain --dry-run --re", ["--resume"]),
        (
            "sharded-lamb pretrain --config bert-quick",
            ["bert-quickstart", "bert-quickstart-adamw", "bert-quickstart-gpt-bert"],
        ),
        ("sharded-lamb pretrain --config ./mi", ["./mine.yaml"]),
        ("sharded-lamb configs --write deepspeed/zero1", ["deepspeed/zero1"]),
    ],
)
def test_argcomplete_completes_without_torch(line: str, expected: list[str], tmp_path: Path) -> None:
    """By its protocol: the shell's function sets these variables and reads the file."""
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "minutes.txt").touch()
    said = tmp_path / "said"
    protocol = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    protocol |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(said)}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETING],
        cwd=tmp_path,
        env={**os.environ, **protocol, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(said.read_text().rstrip(" ").split("\n")) == expected


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sharded-lamb {sharded_lamb.__version__}\n"


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_an_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["verfy"])
    error = capsys.readouterr().err
    assert "invalid choice: 'verfy'" in error
    assert all(name in error for name in COMMANDS)


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(chosen: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(shipped, "run", interrupted)
    assert main(["configs"]) == 130
    assert capsys.readouterr().err == "sharded-lamb configs: interrupted\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"usage: sharded-lamb {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("verify", "--seed SEED of weights and gradients (default: 0)"),
        ("bench step", "--rounds ROUNDS turns of every candidate (default: 3)"),
        ("preflight", "seconds to wait for ranks (default: 60.0)"),
        (
            "preflight",
            "--writes WRITES the run's folder, which is created if missing; all ranks must see it --",
        ),
    ],
)
def test_help_shows_defaults(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert shown in text
    assert "default: None" not in text


@pytest.mark.parametrize("name", ["verify", "plan"])
def test_a_device_that_is_not_there_is_an_error_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in COLLECTIVE
    assert main([name, "--device", "npu"]) == 2
    assert capsys.readouterr().err.startswith(f"sharded-lamb {name}: --device npu: expected cpu")


def test_the_public_names_are_imported_on_first_use() -> None:
    spec = importlib.util.find_spec("sharded_lamb")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.__all__) <= set(dir(module))
    assert "ShardedLamb" not in vars(module)
    assert module.ShardedLamb.__module__ == "sharded_lamb.optim.sharded"
    assert vars(module)["ShardedLamb"] is module.ShardedLamb
    with pytest.raises(AttributeError, match="no attribute 'ShardedLomb'"):
        _ = module.ShardedLomb


MISSING = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
PROGRAM = """
sys.argv = {arguments!r}
runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
"""


def without(module: str, code: str) -> subprocess.CompletedProcess[str]:
    code = MISSING.format(module=module) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_plugin_without_deepspeed_says_what_to_install() -> None:
    done = without("deepspeed", "import sharded_lamb.deepspeed")
    said = (
        "ModuleNotFoundError: sharded_lamb.deepspeed needs DeepSpeed: pip install 'sharded-lamb[deepspeed]'"
    )
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("program", "arguments", "module", "extra"),
    [
        ("sharded_lamb.bert", ["--config", "bert-quickstart"], "omegaconf", "bert"),
        ("sharded_lamb", ["quickstart"], "omegaconf", "bert"),
        ("sharded_lamb", ["configs"], "yaml", "bert"),
        ("sharded_lamb.recipes.vision", ["train", "--config", "vision-rsb-a2"], "omegaconf", "vision"),
        ("sharded_lamb.bench.naive_ratios", [], "deepspeed", "deepspeed,bert"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(
    program: str, arguments: list[str], module: str, extra: str
) -> None:
    done = without(module, PROGRAM.format(arguments=["program", *arguments], program=program))
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(f"{module!r}; pip install 'sharded-lamb[{extra}]'")
    assert "Traceback" not in done.stderr
