"""The launch scripts: clean shell, refusals of one line, and one environment that is made once.

They run in a copy of the repository with a stand-in for Python, so nothing is installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for folder in ("launch", ".ci")
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.suffix in ("", ".sh", ".sbatch") and path.name != "hostfile"
)

# Behaves as the real one, but for the change put in place of {change}; `-m venv DIR` makes an environment
# whose python writes its arguments to the file `log`.
STAND_IN = """#!/usr/bin/env bash
if [[ $1 == -m && $2 == venv ]]; then
    made=${{@: -1}}/bin/python
    mkdir -p "${{made%/*}}"
    printf '#!/usr/bin/env bash\\necho "$*" >>{log}\\n[[ $* != *"${{FAIL_ON:-nothing}}"* ]]\\n' >"$made"
    chmod +x "$made"
elif [[ $1 == -c ]]; then
    {python} -c {change}"; exec(\\"\\"\\"$2\\"\\"\\")"
else
    exec {python} "$@"
fi
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        self.log = folder / "log"
        for name in ("launch", "configs"):
            shutil.copytree(ROOT / name, self.root / name)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.python = folder / "python"

    def test(self, *args: str, change: str = "'import sys'", **env: str) -> subprocess.CompletedProcess[str]:
        self.python.write_text(STAND_IN.format(python=sys.executable, log=self.log, change=change))
        self.python.chmod(0o755)
        return subprocess.run(
            [self.root / "launch" / "test", *args],
            env={**os.environ, "PYTHON": str(self.python), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def take_log(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    results = subprocess.run(
        [shellcheck, "--external-sources", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert results.returncode == 0, results.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable(script: Path) -> None:
    sourced_only = script.name.startswith("_")
    assert os.access(script, os.X_OK) is not sourced_only


@pytest.mark.parametrize(
    "script",
    [p for p in SCRIPTS if p.parent.name == "launch" and p.name[0] != "_"],
    ids=lambda path: path.name,
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_header_and_installs_nothing(checkout: Checkout, script: Path, option: str) -> None:
    nowhere = {**os.environ, "PYTHON": "/nowhere/python3", "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    path = checkout.root / "launch" / script.name
    helped = subprocess.run(
        [path, option], cwd=checkout.root, env=nowhere, capture_output=True, text=True, timeout=60
    )
    assert (helped.returncode, helped.stderr) == (0, "")
    header = [line for line in script.read_text().split("\nset -")[0].splitlines()[1:] if line[:2] == "# "]
    assert helped.stdout.splitlines() == [line[2:] for line in header]
    assert not list(checkout.root.glob(".venv*"))


@pytest.mark.parametrize(
    ("change", "env", "message"),
    [
        ("'import sys; sys.version_info = (3, 9, 1)'", {}, "Python 3.11 or newer is needed"),
        ("'import sys; sys.modules[\"venv\"] = None'", {}, "apt-get install python3-venv"),
        ("'import sys; sys.modules[\"ensurepip\"] = None'", {}, "apt-get install python3-venv"),
        ("'import sys'", {"CC": "/nowhere/cc"}, "apt-get install build-essential"),
        ("'import sys'", {"PYTHON": "/nowhere/python3"}, "install Python 3.11 or newer"),
    ],
    ids=["old-python", "no-venv", "no-ensurepip", "no-compiler", "no-python"],
)
def test_refusals_are_one_line(checkout: Checkout, change: str, env: dict[str, str], message: str) -> None:
    refused = checkout.test(change=change, **env)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert not (checkout.root / ".venv").exists()


def test_the_environment_is_made_once(checkout: Checkout) -> None:
    first = checkout.test("-k", "foo bar")
    assert first.returncode == 0, first.stderr
    ran = checkout.take_log()
    installs = [line for line in ran if "-m pip" in line]
    run = "-m pytest -n 3 --dist loadfile --no-loadscope-reorder"
    checks = ["-m ruff format --check .", "-m ruff check .", "-m mypy", f"{run} -k foo bar"]
    assert len(installs) == 3
    assert all(f"-c {checkout.root}/configs/constraints.txt" in line for line in installs)
    assert ran == installs + checks

    assert checkout.test().returncode == 0
    assert checkout.take_log() == [*checks[:3], run]


@pytest.mark.parametrize("arguments", [["-p", "no:xdist"], ["-pno:xdist", "-k", "layout"]])
def test_without_xdist_pytest_gets_none_of_its_options(checkout: Checkout, arguments: list[str]) -> None:
    assert checkout.test(*arguments).returncode == 0
    assert checkout.take_log()[-1] == " ".join(["-m pytest", *arguments])


@pytest.mark.parametrize(
    ("file", "text", "installs_again"),
    [
        ("configs/constraints.txt", "\nanother==1.0\n", True),
        ("pyproject.toml", '\n[project.optional-dependencies.more]\nmore = ["another"]\n', True),
        ("pyproject.toml", "\n[tool.another]\nline-length = 3\n", False),
    ],
)
def test_a_change_of_pins_makes_it_again(
    checkout: Checkout, file: str, text: str, installs_again: bool
) -> None:
    assert checkout.test().returncode == 0
    checkout.take_log()
    if ".more]" in text:  # a key of a table that exists already
        changed = (checkout.root / file).read_text().replace("gpu = [", 'more = ["another"]\ngpu = [')
    else:
        changed = (checkout.root / file).read_text() + text
    (checkout.root / file).write_text(changed)
    assert checkout.test().returncode == 0
    assert any("-m pip" in line for line in checkout.take_log()) is installs_again


def test_a_failed_install_is_reported_and_tried_again(checkout: Checkout) -> None:
    failed = checkout.test(FAIL_ON="timm")
    assert failed.returncode != 0
    assert "the environment could not be made" in failed.stderr
    assert not any("-m pytest" in line for line in checkout.take_log())
    assert checkout.test().returncode == 0
    assert any("-m pip" in line for line in checkout.take_log())


@pytest.mark.parametrize("tool", ["ruff format", "ruff check", "mypy", "pytest"])
def test_a_failing_check_fails_the_run(checkout: Checkout, tool: str) -> None:
    assert checkout.test(FAIL_ON=f"-m {tool}").returncode != 0
