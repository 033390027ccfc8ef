"""The source distribution holds the repository, and its tests run. Wheels: kernels/test_wheel.py."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.test_architecture import TOP_LEVEL

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns("*.egg-info", "__pycache__", "*.py[cod]", "*.so", ".*")
RUN = """
import pathlib, sys, pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_readme.py", "-k", "links or short or options"])
import sharded_lamb
print(pathlib.Path(sharded_lamb.__file__).parent)
sys.exit(code)
"""


def call(folder: Path, *arguments: str | Path) -> str:
    """What this Python prints, run in ``folder`` without a way to this checkout's package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in TOP_LEVEL:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT, symlinks=True)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(checkout, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ".")
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def files_of(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """{path: its bytes, and whether it is executable}."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), os.access(path, os.X_OK)) for path in paths
    }


def test_the_sdist_holds_the_repository(checkout: Path, unpacked: Path) -> None:
    held, wanted = files_of(unpacked), files_of(checkout)
    assert len(wanted) > 500
    assert sorted(wanted.keys() - held.keys()) == []
    assert [name for name, content in wanted.items() if held[name] != content] == []
    added = {name for name in held.keys() - wanted.keys() if ".egg-info/" not in name}
    shipped = {path for path in wanted if re.fullmatch(r"configs/([\w-]+\.yaml|deepspeed/.*\.json)", path)}
    assert added == {"PKG-INFO", "setup.cfg"} | {f"sharded_lamb/{path}" for path in shipped}


def test_twine_accepts_the_sdist(sdist: Path) -> None:
    assert "PASSED" in call(sdist.parent, "-m", "twine", "--no-color", "check", "--strict", sdist)


def test_tests_of_the_sdist_run_with_its_package(unpacked: Path) -> None:
    assert call(unpacked, "-c", RUN).splitlines()[-1] == str(unpacked / "sharded_lamb")


def test_the_long_description_has_no_relative_links_or_pictures(unpacked: Path) -> None:
    _, text = (unpacked / "PKG-INFO").read_text().split("\n\n", 1)
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"\]\((?!https://)", text) == []
    assert text.count("](https://") == readme.count("](https://")
    assert re.findall(r"\w+", text) == re.findall(
        r"\w+", re.sub(r"!\[.*\n|(?<=\])\((?!https:)\S+?\)", "", readme)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md#c) and [`d`](e/f)", "a and `d`"),
        ("[a](https://x.org/y)", "[a](https://x.org/y)"),
        ("a\n\n![b](c.png)\n\nd", "a\n\nd"),
        ("![b](https://x.org/c.png)", "![b](https://x.org/c.png)"),
    ],
)
def test_links_to_files_become_text(text: str, expected: str) -> None:
    assert runpy.run_path(str(ROOT / "configs" / "build_backend.py"))["long_description"](text) == expected
