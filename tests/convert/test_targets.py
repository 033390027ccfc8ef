"""Targets that the command may replace; a target is whole or unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb.__main__ import main
from sharded_lamb.checkpoint import problem_with
from tests.convert import cases


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return cases.saved(tmp_path / "ours", *cases.trained(max_grad_norm=2.0), epoch=3)


def test_a_target_is_not_replaced_without_force(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "file"
    target.write_text("precious")
    command = (ours, target, "--from", "sharded_lamb", "--to", "lamb")
    assert "already exists: give --force" in cases.refused(capsys, *command)
    assert target.read_text() == "precious"
    cases.convert(ours, target, "sharded_lamb", "lamb", "--force")
    assert cases.load_file(target)["skipped_steps"] == 0


def test_targets_that_force_does_not_replace(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "precious").write_text("x")
    command = ("--from", "sharded_lamb", "--force", "--to")
    assert "holds no whole checkpoint" in cases.refused(capsys, ours, folder, *command, "sharded_lamb")
    assert "is a folder, but the format is a file" in cases.refused(capsys, ours, folder, *command, "lamb")
    assert "is the source itself" in cases.refused(capsys, ours, ours, *command, "sharded_lamb")
    assert (folder / "precious").read_text() == "x"
    assert problem_with(ours) is None


def test_force_deletes_nothing_but_a_checkpoint(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many folders hold a manifest.json: browsers' extensions, datasets."""
    folder = tmp_path / "extension"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    command = ("--from", "sharded_lamb", "--to", "sharded_lamb", "--force")
    assert "holds no whole checkpoint" in cases.refused(capsys, ours, folder, *command)
    (folder / "SHA256SUMS").write_text("0" * 64 + "  manifest.json\n")
    (folder / "notes").mkdir()
    (folder / "code.js").write_text("precious")
    said = cases.refused(capsys, ours, folder, *command)
    assert f"{folder} holds code.js, notes, which SHA256SUMS does not list" in said
    assert (folder / "code.js").read_text() == "precious"
    (folder / "code.js").unlink()
    (folder / "notes").rmdir()
    cases.convert(ours, folder, "sharded_lamb", "sharded_lamb", "--force")
    assert problem_with(folder) is None


def test_nothing_is_written_into_a_checkpoint(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither into the source nor into another checkpoint."""
    monkeypatch.chdir(ours)
    cases.convert(ours, tmp_path / "file", "sharded_lamb", "lamb")
    for source, form, target, to in (
        (ours, "sharded_lamb", ours / "lamb.pt", "lamb"),
        (".", "sharded_lamb", "lamb.pt", "lamb"),
        (ours, "sharded_lamb", ours / "new" / "ours", "sharded_lamb"),
        (tmp_path / "file", "lamb", ours / "timm.pt", "timm"),
    ):
        said = cases.refused(capsys, source, target, "--from", form, "--to", to)
        assert f"{target} is inside the checkpoint {ours}" in said
    assert main(["inspect", str(ours), "--check"]) == 0


@pytest.mark.parametrize("to", ["lamb", "safetensors"])
def test_a_target_is_whole_or_unchanged(
    to: str, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(content: Any, path: Any, **keywords: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    target = tmp_path / "file"
    target.write_text("before")
    monkeypatch.setattr(torch, "save", fails)
    monkeypatch.setattr("safetensors.torch.save_file", fails)
    command = (ours, target, "--from", "sharded_lamb", "--to", to, "--force")
    assert "No space left on device" in cases.refused(capsys, *command)
    assert target.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ours"]


def test_a_source_that_is_damaged_leaves_no_target(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = ours / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    said = cases.refused(capsys, ours, tmp_path / "file", "--from", "sharded_lamb", "--to", "timm")
    assert "shard-00000.safetensors" in said
    assert not (tmp_path / "file").exists()


def test_only_the_first_rank_runs(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    cases.convert(ours, tmp_path / "file", "sharded_lamb", "lamb")
    assert main(["inspect", str(ours)]) == 0
    assert not (tmp_path / "file").exists()
    assert capsys.readouterr().out == ""
