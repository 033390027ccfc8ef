"""`tests.debian` finds programs, names the package of what is missing, and installs it only where that is wanted."""

from pathlib import Path

import pytest

from tests import debian

PROGRAMS = {"sh": "dash", "no-such-program": "its-package"}


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that installs its last argument's program, unless the file `fails` exists; its log."""
    log = tmp_path / "log"
    program = tmp_path / "no-such-program"
    (tmp_path / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ ! -e {tmp_path}/fails ] || {{ echo "no network" >&2; exit 100; }}\n'
        f'case "$*" in *install*its-package) echo > {program}; chmod +x {program};; esac\n'
    )
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv(debian.INSTALL, raising=False)
    log.touch()
    return log


def test_what_is_missing_is_named_with_its_package(apt: Path) -> None:
    assert debian.missing({"sh": "dash"}) == ""
    assert debian.missing(PROGRAMS) == (
        "no-such-program: not installed (apt-get install its-package, or SHARDED_LAMB_INSTALL_DEBIAN=1)"
    )
    with pytest.raises(pytest.skip.Exception, match="its-package"):
        debian.need(PROGRAMS)
    assert apt.read_text() == ""


def test_it_is_installed_where_that_is_wanted(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.INSTALL, "1")
    assert debian.missing({"sh": "dash"}) == ""
    assert apt.read_text() == ""
    assert debian.missing(PROGRAMS) == ""
    update, install = apt.read_text().splitlines()
    assert update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends its-package")


def test_a_failed_installation_fails_the_test(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.INSTALL, "1")
    (apt.parent / "fails").touch()
    with pytest.raises(
        (pytest.fail.Exception, pytest.skip.Exception), match="update failed: no net"
    ) as raised:
        debian.need(PROGRAMS)
    assert raised.type is pytest.fail.Exception
