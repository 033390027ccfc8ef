"""The environment that launch scripts make: remade when what decides it changes, and only then."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def stamp(root: Path, *, active: bool) -> list[str]:
    """The Python that would make the environment, and the stamp."""
    path = f"{root / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}" if active else os.environ["PATH"]
    return subprocess.run(
        [
            "bash",
            "-c",
            'source launch/_env.sh && "$PYTHON" -c "import sys; print(sys.prefix)" && env_stamp dev',
        ],
        cwd=root,
        env={**os.environ, "PATH": path, "PYTHON": "python3" if active else sys.executable},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


def copy_of_launch(root: Path) -> Path:
    files = ("launch/test", "launch/_help.sh", "launch/_env.sh", "configs/constraints.txt", "pyproject.toml")
    for name in files:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def test_an_active_environment_is_not_remade_under_itself(tmp_path: Path) -> None:
    copy_of_launch(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    prefix, active = stamp(tmp_path, active=True)
    assert Path(prefix) != tmp_path / ".venv"
    assert active == stamp(tmp_path, active=False)[1]
    (tmp_path / "configs" / "constraints.txt").write_text("torch==0")
    assert stamp(tmp_path, active=True)[1] != active


def test_a_version_that_pip_does_not_find_is_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"  # whose environment is its own: ensurepip takes seconds
    python.write_text(
        f'#!/usr/bin/env bash\n[[ "$1 $2" == "-m venv" ]] || exec {sys.executable} "$@"\n'
        'mkdir -p "${@: -1}/bin" && ln -s "$0" "${@: -1}/bin/python"\n'
    )
    python.chmod(0o755)
    run = subprocess.run(
        [copy_of_launch(tmp_path) / "launch" / "test", "--torch", "9.9", "--deepspeed", "0.18.9", "-k", "x"],
        env={
            **os.environ,
            "PYTHON": str(python),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": os.devnull,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    installing, error = run.stderr.splitlines()
    assert f"installing into {tmp_path}/.venv-torch-9.9-deepspeed-0.18.9 " in installing
    assert error.startswith("test: error: pip cannot install torch==9.9: ERROR: Could not find a version")
    assert not list(tmp_path.glob(".venv*"))


def test_pins_stay_unless_the_chosen_version_excludes_them(tmp_path: Path) -> None:
    root, bin_folder = copy_of_launch(tmp_path), tmp_path / ".venv-demo-2" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    needs = ("plain", "Odd_Name<2", "old<2", 'other<2; sys_platform == "none"', 'extra<2; extra == "x"')
    (tmp_path / "demo-2.dist-info").mkdir()
    (tmp_path / "demo-2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: demo\nVersion: 2\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    )
    names = ("plain", "odd-name", "old", "other", "extra", "demo", "unnamed")
    (root / "configs" / "constraints.txt").write_text("# pins\n" + "".join(f"{name}==3\n" for name in names))
    command = "PINS=(demo==2); source launch/_env.sh; compatible_constraints demo"
    said = subprocess.run(
        ["bash", "-c", command],
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert said == ["demo==2", "plain==3", "other==3", "extra==3", "unnamed==3"]
