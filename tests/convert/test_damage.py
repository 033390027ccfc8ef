"""Damaged files and files of another format: a one-line error that names them, and no target."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sharded_lamb import checkpoint
from tests.convert import cases


def npz(path: Path, **arrays: Any) -> Path:
    own = {"kernel": np.ones((2, 2)), "kernel/lamb_m": np.ones((2, 2)), "kernel/lamb_v": np.ones((2, 2))}
    np.savez(path, **{**own, "global_step": np.array(3), **arrays})  # type: ignore[arg-type]
    return path


def truncated(path: Path) -> None:
    npz(path)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    """Flips a bit of the first array."""
    npz(path)
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[0].header_offset + 150
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def no_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


@pytest.mark.parametrize("damage", [truncated, flipped, no_archive, Path.touch], ids=lambda f: f.__name__)
def test_an_npz(damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "tf.npz"
    damage(source)
    said = cases.refused(capsys, source, tmp_path / "c", "--from", "tensorflow", "--to", "sharded_lamb")
    assert f"{source} cannot be read as .npz" in said
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({}, ("--rename", "(=x"), "--rename (=x: missing )"),
        ({}, ("--rename", r"k=\9"), r"--rename k=\9: invalid group reference"),
        ({"global_step": np.ones(2)}, (), "global_step has shape (2,), expected one number"),
        (
            {"kernel": np.ones((3, 3, 4, 8))},
            (),
            "kernel has shape (3, 3, 4, 8): kernels of more than two dimensions",
        ),
    ],
    ids=["regex", "group", "step", "convolution"],
)
def test_arrays_that_cannot_be_converted(
    arrays: Any, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = npz(tmp_path / "tf.npz", **arrays)
    command = (source, tmp_path / "c", "--from", "tensorflow", "--to", "sharded_lamb", *options)
    assert message in cases.refused(capsys, *command)


def test_arrays_of_another_byte_order_are_converted(tmp_path: Path) -> None:
    weights = np.arange(6.0, dtype=">f4").reshape(2, 3)
    slots = {f"kernel/lamb_{kind}": np.ones((2, 3), dtype=">f4") for kind in "mv"}
    cases.convert(
        npz(tmp_path / "tf.npz", kernel=weights, **slots), tmp_path / "c", "tensorflow", "sharded_lamb"
    )
    (weight,) = checkpoint.read_contents(tmp_path / "c").weights.values()
    assert torch.equal(weight, torch.arange(6.0).reshape(2, 3).t())


def test_other_optimizers_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 2)
    peer = torch.optim.Rprop(model.parameters())
    cases.train(model, peer, range(1))
    source = tmp_path / "file"
    for change in ("none", "no params"):
        state = peer.state_dict()
        if change == "no params":
            del state["param_groups"][0]["params"]
        torch.save({"model": model.state_dict(), "optimizer": state}, source)
        said = cases.refused(capsys, source, tmp_path / "c", "--from", "adam", "--to", "sharded_lamb")
        assert str(source) in said
        assert len(said.splitlines()) == 1


def test_damaged_files_of_torchs_old_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "file"
    torch.save({"model": {"a": torch.ones(3)}}, source, _use_new_zipfile_serialization=False)
    whole = source.read_bytes()
    for at in range(0, len(whole), 7):
        source.write_bytes(whole[:at])
        said = cases.refused(capsys, source, tmp_path / "c", "--from", "lamb", "--to", "sharded_lamb")
        assert str(source) in said


def test_damaged_lists_of_names_and_indexes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 2)
    torch.save(
        {"model": model.state_dict(), "optimizer": torch.optim.Adam(model.parameters()).state_dict()},
        tmp_path / "f",
    )
    (tmp_path / "names.json").write_text('["weight", ')
    command = ("--from", "adam", "--to", "sharded_lamb", "--names", tmp_path / "names.json")
    said = cases.refused(capsys, tmp_path / "f", tmp_path / "c", *command)
    assert f"{tmp_path / 'names.json'} is not a JSON list of names" in said
    (tmp_path / "hub").mkdir()
    index = tmp_path / "hub" / "model.safetensors.index.json"
    for content, what in (
        (json.dumps({"metadata": {}}), "has no weight_map: it is no index of safetensors files"),
        ("[1, ", "is not JSON: Expecting value"),
    ):
        index.write_text(content)
        said = cases.refused(
            capsys, tmp_path / "hub", tmp_path / "c", "--from", "safetensors", "--to", "sharded_lamb"
        )
        assert f"{index} {what}" in said


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x1e", "\r", ""])
def test_every_byte_of_sha256sums_counts(character: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", nn.Linear(2, 2))
    sums = tmp_path / "c" / "SHA256SUMS"
    whole = sums.read_bytes()
    for place in (place for place, byte in enumerate(whole) if byte == ord("\n")):
        sums.write_bytes(whole[:place] + character.encode() + whole[place + 1 :])
        assert checkpoint.problem_with(tmp_path / "c") is not None
    sums.write_bytes(whole)
    assert checkpoint.problem_with(tmp_path / "c") is None
