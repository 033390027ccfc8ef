"""`sharded-lamb configs` and the names of shipped configurations in `--config`."""

from pathlib import Path

import pytest

from sharded_lamb.__main__ import main
from sharded_lamb.bert.config import load_config
from sharded_lamb.recipes.training.shipped import names, path_of

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_file_of_configs_is_shipped_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.stem for path in CONFIGS.glob("*.yaml")}
    files |= {f"deepspeed/{path.stem}" for path in (CONFIGS / "deepspeed").glob("*.json")}
    assert set(names()) == files
    assert main(["configs"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == names()
    assert any("English prose in every CPython" in line for line in shown)
    for name in names():
        assert (
            path_of(name).read_bytes()
            == (CONFIGS / path_of(name).relative_to(path_of("bert-base").parent)).read_bytes()
        )


def test_a_name_is_the_shipped_file_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("bert-quickstart") == load_config(CONFIGS / "bert-quickstart.yaml")
    shipped = (CONFIGS / "bert-quickstart.yaml").read_text()
    (tmp_path / "bert-quickstart").write_text(shipped.replace("seed: 1", "seed: 7"))
    assert load_config("bert-quickstart").seed == 7


def test_a_written_configuration_is_whole_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "--write", "bert-quickstart-adamw"]) == 0
    assert capsys.readouterr().out.split() == ["bert-quickstart-adamw.yaml", "bert-quickstart.yaml"]
    assert load_config("bert-quickstart-adamw.yaml") == load_config("bert-quickstart-adamw")
    assert main(["configs", "--write", "deepspeed/zero1", "--to", "ds"]) == 0
    assert (tmp_path / "ds" / "zero1.json").read_text() == (CONFIGS / "deepspeed" / "zero1.json").read_text()
    (tmp_path / "bert-quickstart.yaml").write_text("mine")
    assert main(["configs", "--write", "bert-quickstart"]) == 2
    assert "bert-quickstart.yaml exists already" in capsys.readouterr().err
    assert (tmp_path / "bert-quickstart.yaml").read_text() == "mine"


def test_unknown_names_list_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "--write", "bert-huge"]) == 2
    assert "no configuration 'bert-huge' is shipped; there are: bert-base, " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--config bert-huge: no such file; .*shipped \(bert-base, "):
        load_config("bert-huge")


def test_pretrain_rejects_settings_before_it_starts_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "bert-quickstart", "--ranks", "1", "phases.0.lr=-1"]) == 2
    assert "lr" in capsys.readouterr().err
    assert main(["pretrain", "--config", "bert-quickstart", "--ranks", "0"]) == 2
    assert "--ranks must be >= 1, got 0" in capsys.readouterr().err


def test_a_dry_run_needs_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "bert-large-phase1", "--dry-run"]) == 0
    assert "336,232,258 parameters" in capsys.readouterr().out
