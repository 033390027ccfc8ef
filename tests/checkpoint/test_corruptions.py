"""Damaged checkpoints are rejected by name or load correctly. All 500: python -m sharded_lamb.bench.corruptions."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb import checkpoint
from sharded_lamb.bench.corruptions import DAMAGES, GOOD, Trial, _build
from tests.harness import run_ranks


def trials(rank: int, folder: Path, seeds: range) -> list[dict[str, Any]]:
    trial = Trial(folder)
    return [trial.run(seed) for seed in seeds]


def test_a_tenth_of_them_on_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, trials, tmp_path, range(50))
    for one, two in zip(first, second, strict=True):
        assert one["outcome"] in GOOD, one
        assert two["outcome"] == one["outcome"], (one, two)
    assert {row["outcome"] for row in first} == {*GOOD}
    assert len({row["did"].split()[0] for row in first}) > 4


@pytest.mark.parametrize("damage", dict.fromkeys(DAMAGES), ids=lambda damage: damage.__name__)
def test_every_kind_alone(damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharded_lamb.bench.corruptions.DAMAGES", (damage,))
    trial = Trial(tmp_path)
    outcomes = {trial.run(seed)["outcome"] for seed in range(3)}
    assert outcomes <= {*GOOD}
    assert outcomes == ({"loaded right"} if damage.__name__ == "unexpected_file" else {"refused"})


def test_sizes_alone_show_a_truncation(tmp_path: Path) -> None:
    model, opt = _build()
    checkpoint.save(tmp_path / "c", model, opt)
    path = tmp_path / "c" / "shard-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "it is truncated" in str(checkpoint.problem_with(tmp_path / "c", hashes=False))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert checkpoint.problem_with(tmp_path / "c", hashes=False) is None
    assert "does not have the hash" in str(checkpoint.problem_with(tmp_path / "c"))


# -- manifests rewritten with matching hashes ---------------------------------------------------------------------


def rewrite_hashes(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    names = [line.split("  ")[1] for line in lines]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    paths = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return paths + [place for key, entry in inside for place in paths_of(entry, (*path, key))]


STRANGE: list[Any] = [
    None,
    -1,
    0,
    10**9,
    2.5,
    "x",
    "../../etc/passwd",
    [],
    {},
    True,
    [1, 2],
    {"__tensor__": "x"},
]


def rewrite(rng: random.Random, folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    place = rng.choice(paths_of(manifest))
    holder = manifest
    for key in place[:-1]:
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[place[-1]]
        did = f"{place} deleted"
    else:
        holder[place[-1]] = value = rng.choice(STRANGE)
        did = f"{place} = {value!r}"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rewrite_hashes(folder)
    return did


def kind_of(did: str) -> str:
    """The same for any tensor and any place in a list."""
    place, value = did.split(") ", 1)
    return re.sub(r"\b\d+\b", "*", re.sub("'tensors', '[^']*'", "'tensors'", place)) + value


def test_rewritten_manifests_are_rejected_by_name_or_load(tmp_path: Path) -> None:
    """One rewriting of a kind."""
    refused, unclear, kinds = 0, [], set()
    model, opt = _build()
    checkpoint.save(tmp_path / "c", model, opt, {"position": {"step": 3, "pair": (1, 2)}})
    manifest = (tmp_path / "c" / "manifest.json").read_bytes()
    for seed in range(400):
        (tmp_path / "c" / "manifest.json").write_bytes(manifest)
        did = rewrite(random.Random(seed), tmp_path / "c")
        if kind_of(did) in kinds:
            continue
        kinds.add(kind_of(did))
        model, opt = _build()
        try:
            checkpoint.load(tmp_path / "c", model, opt, {"position": {}})
        except Exception as error:
            refused += 1
            if not isinstance(error, ValueError) or str(tmp_path / "c") not in str(error):
                unclear.append(f"{did}: {type(error).__name__}: {error}")
    assert not unclear, "\n".join(unclear)
    assert len(kinds) > 180
    assert refused > len(kinds) / 2


def test_a_newer_format_is_rejected_by_its_version(tmp_path: Path) -> None:
    model, opt = _build()
    checkpoint.save(tmp_path / "c", model, opt)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    (tmp_path / "c" / "manifest.json").write_text(
        json.dumps({**manifest, "version": 2, "tensors": "in another way"})
    )
    rewrite_hashes(tmp_path / "c")
    with pytest.raises(checkpoint.CheckpointError, match=r"format version 2.*up to version 1: upgrade"):
        checkpoint.load(tmp_path / "c", model, opt)


@pytest.mark.parametrize("chunks", ["none", "one twice", "beyond"])
def test_a_tensor_that_is_not_covered_is_rejected(chunks: str, tmp_path: Path) -> None:
    """Elements that no part covers would silently keep their old values."""
    model, opt = _build()
    checkpoint.save(tmp_path / "c", model, opt)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    entry = manifest["tensors"]["model.0.bias"]
    (part,) = entry["chunks"]
    if chunks == "none":
        entry["chunks"] = []
    elif chunks == "one twice":
        half = {**part, "shape": [8], "bytes": [part["bytes"][0], part["bytes"][0] + 32]}
        entry["shape"], entry["chunks"] = [16], [half, half]
    else:
        entry["chunks"] = [{**part, "at": [1]}]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    rewrite_hashes(tmp_path / "c")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"parts of 'model.0.bias' hold|a part of 'model.0.bias'"
    ):
        checkpoint.load(tmp_path / "c", model, opt)


@pytest.mark.parametrize("name", ["../shard", "/etc/hostname", "a/b", "", ".."])
def test_files_outside_the_folder_are_not_read(name: str, tmp_path: Path) -> None:
    model, opt = _build()
    checkpoint.save(tmp_path / "c", model, opt)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    manifest["tensors"]["model.0.weight"]["chunks"][0]["file"] = name
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    rewrite_hashes(tmp_path / "c")
    with pytest.raises(checkpoint.CheckpointError, match="not in its own folder"):
        checkpoint.load(tmp_path / "c", model, opt)
