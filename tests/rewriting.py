"""Assertions of the test files rewritten once, for all processes of pytest-xdist, which would each rewrite all files.

That takes a process eight seconds in a clean clone, where no file is cached. The fork server starts meanwhile.
"""

import sys
from pathlib import Path

import pytest
from _pytest.assertion import rewrite


def write(config: pytest.Config, folder: Path) -> None:
    """Write the files that pytest's import hook would write, where they are missing or out of date."""
    if sys.dont_write_bytecode:
        return
    for path in sorted([*folder.rglob("test_*.py"), *folder.rglob("conftest.py")]):
        cached = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
        if rewrite._read_pyc(path, cached) is None:
            cached.parent.mkdir(exist_ok=True)
            source, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source, cached)
