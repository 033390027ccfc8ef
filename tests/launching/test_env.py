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


def test_an_active_environment_is_not_remade_under_itself(tmp_path: Path) -> None:
    for name in ("launch/_env.sh", "configs/constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    prefix, active = stamp(tmp_path, active=True)
    assert Path(prefix) != tmp_path / ".venv"
    assert active == stamp(tmp_path, active=False)[1]
    (tmp_path / "configs" / "constraints.txt").write_text("torch==0")
    assert stamp(tmp_path, active=True)[1] != active
