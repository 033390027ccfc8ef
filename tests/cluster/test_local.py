"""`cluster.local` outside a checkout."""

from pathlib import Path

import pytest

from sharded_lamb.cluster import local


def test_a_missing_script_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "launch" / "torchrun.sh"
    monkeypatch.setattr(local, "SCRIPT", missing)
    assert local.main(["--dry-run", "-m", "sharded_lamb", "verify"]) == 2
    error = capsys.readouterr().err
    assert f"cluster-local: no file {missing}: run it from a checkout, wheels lack launch/" in error


def test_no_program_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        local.main(["--hosts", "2"])
    assert "expected a program, e.g. launch/cluster-local -m" in capsys.readouterr().err
