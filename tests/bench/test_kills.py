"""`bench.kills` outside a checkout."""

from pathlib import Path

import pytest

from sharded_lamb.bench import kills


def test_a_missing_configuration_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kills, "measure", None)  # must not be reached
    missing = tmp_path / "configs" / "bert-quickstart.yaml"
    assert kills.main(["--config", str(missing)]) == 2
    error = capsys.readouterr().err
    assert f"no file {missing}" in error
    assert "run it from a checkout (wheels lack configs/), or pass --config" in error


def test_the_default_configuration_is_the_checkouts() -> None:
    checkout = Path(__file__).parents[2]
    assert kills.CONFIG.relative_to(checkout) == Path("configs", "bert-quickstart.yaml")
    assert kills.CONFIG.is_file()
