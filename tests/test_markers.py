"""Every test is either `unit` or `system`, by its file."""

import re

import pytest

from tests.conftest import COMPUTING, SYSTEM, TESTS

PROGRAMS = re.compile(r"subprocess\.(run|Popen)\(|\bcluster\.tasks\(|\bslurm\(\)")
UNIT_ALL_THE_SAME = {
    "checkpoint/test_folder.py",  # sha256sum, mount
    "convert/test_command.py",  # one of each command
    "checkpoint/test_saving.py",
    "test_architecture.py",  # git
    "test_commands.py",  # help
    "test_harness.py",
    "test_verify.py",  # one command among its tests
}


def test_files_that_start_programs_are_system_tests() -> None:
    results = {
        path.relative_to(TESTS).as_posix()
        for path in TESTS.rglob("test_*.py")
        if PROGRAMS.search(path.read_text()) and path.name != "test_markers.py"
    }
    assert results - UNIT_ALL_THE_SAME <= set(SYSTEM), "add them to tests/conftest.py"


def test_system_files_are_there() -> None:
    assert [file for file in (*SYSTEM, *COMPUTING) if not (TESTS / file).is_file()] == []


def test_this_one_is_a_unit_test(request: pytest.FixtureRequest) -> None:
    assert {"unit", "system"} & {mark.name for mark in request.node.iter_markers()} == {"unit"}
