"""safetensors: weights in and out, as one file, a folder or a name of Hugging Face."""

import json
from pathlib import Path

import pytest
import torch

from sharded_lamb import Lamb
from sharded_lamb.checkpoint.in_memory import read_contents
from sharded_lamb.convert import files
from tests.convert import cases


def test_safetensors_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also from tensors that share memory, and into a folder of save_pretrained."""
    flat = torch.arange(10.0)
    weights = {"a": flat[:4].view(2, 2), "b": flat[4:].bfloat16(), "part": flat[1:3], "n": torch.tensor(3)}
    file = {
        "model": {**weights, "tied": weights["a"]},
        "optimizer": Lamb([torch.nn.Parameter(flat[:4].view(2, 2))]).state_dict(),
    }
    torch.save(file, tmp_path / "file")
    (tmp_path / "names").write_text("a")
    (tmp_path / "hub").mkdir()
    target = tmp_path / "hub" / "model.safetensors"
    cases.convert(tmp_path / "file", target, "lamb", "safetensors", "--names", f"{tmp_path}/names")
    for source in (target, tmp_path / "hub"):
        cases.convert(source, tmp_path / "back", "safetensors", "sharded_lamb", "--force")
        contents = read_contents(tmp_path / "back")
        assert contents.weights.keys() == weights.keys()
        assert all(torch.equal(contents.weights[name], value) for name, value in weights.items())
        assert contents.weights["b"].dtype == torch.bfloat16
        assert (contents.states, contents.groups) == ({}, [])
    assert "load the checkpoint with optimizer=None" in capsys.readouterr().out
    missing = (tmp_path / "no.safetensors", tmp_path / "x", "--from", "safetensors", "--to", "lamb")
    assert "does not exist: give a .safetensors file" in cases.refused(capsys, *missing)


def test_an_index_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    cases.convert(tmp_path, tmp_path / "ours", "safetensors", "sharded_lamb")
    assert {n: w.tolist() for n, w in read_contents(tmp_path / "ours").weights.items()} == {
        "a": [1.0] * 2,
        "b": [0.0] * 3,
    }
    index["weight_map"]["a"] = "../one.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    command = (tmp_path, tmp_path / "x", "--from", "safetensors", "--to", "sharded_lamb")
    assert "names files outside its folder" in cases.refused(capsys, *command)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files.write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    cases.convert("somebody/some-model", tmp_path / "ours", "safetensors", "sharded_lamb")
    assert asked == ["somebody/some-model"]
    contents = read_contents(tmp_path / "ours")
    assert contents.weights.keys() == {"a"}
