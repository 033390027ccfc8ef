"""``sharded-lamb inspect`` shows the saved state, and verifies files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.__main__ import main
from tests.convert import cases
from tests.harness import run_ranks


def written(rank: int, folder: str) -> dict[str, Any]:
    model = cases.net()
    optimizer = ShardedLamb(model.named_parameters(), **cases.LAMB, stage=1, max_grad_norm=2.0)
    cases.train(model, optimizer, range(3))
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(3, model, optimizer, {"position": {"epoch": 2}})
    full = optimizer.full_state_dict()
    return {} if full is None else {"weights": dict(model.state_dict()), "states": full["state"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    held, _ = run_ranks(2, written, str(folder))
    return folder, held


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


def test_the_saved_state_is_shown(
    run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a run's folder, it follows ``latest``."""
    folder, held = run
    code, out = inspect(capsys, folder, "--json", "--check")
    summary = json.loads(out)
    assert code == 0
    assert summary["path"] == str(folder / "step-00000003")
    assert (summary["step"], summary["parameters"], summary["with_state"], summary["with_masters"]) == (
        3,
        7,
        7,
        0,
    )
    assert summary["written_by"]["ranks"] == 2
    assert summary["written_by"]["torch"] == torch.__version__
    assert summary["aliases"] == {"head.weight": "embed.weight"}
    assert summary["extra"] == {"position": {"epoch": 2}}
    assert summary["optimizer"]["max_grad_norm"] == 2.0
    assert (summary["groups"][0]["lr"], summary["groups"][0]["parameters"]) == (0.02, 7)
    files = {path.name: path.stat().st_size for path in (folder / "step-00000003").iterdir()}
    assert {**summary["files"], "SHA256SUMS": files["SHA256SUMS"]} == files
    assert len(files) == 4
    assert summary["check"] == {name: "ok" for name in files if name != "SHA256SUMS"}

    names = [name for name, _ in cases.net().named_parameters()]
    weights = {name: value for name, value in held["weights"].items() if name != "head.weight"}
    assert summary["norms"]["weights"] == pytest.approx(norm(list(weights.values())), rel=1e-12)
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = [held["states"][place][kind] for place in range(len(names))]
        assert summary["norms"][kind] == pytest.approx(norm(moments), rel=1e-12)
        for name, moment in zip(names, moments, strict=True):
            shown = summary["tensors"][f"optimizer.{name}.{kind}"]
            assert shown["shape"] == list(moment.shape)
            assert shown["norm"] == pytest.approx(norm([moment]), rel=1e-12)
    embed = summary["tensors"]["model.embed.weight"]
    assert (embed["dtype"], embed["bytes"]) == ("float32", 29 * 40 * 4)
    assert any(tensor["chunks"] > 1 for tensor in summary["tensors"].values())


def test_text(run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    path = run[0] / "step-00000003"
    code, short = inspect(capsys, path)
    assert code == 0
    assert f"{path}: step 3" in short
    assert "7 parameters, 7 with moments, 0 with masters" in short
    assert "model.embed.weight" in short
    assert "more (--all)" in short
    _, long = inspect(capsys, path, "--all", "--no-norms")
    assert "more (--all)" not in long
    assert "norms:" not in long
    assert long.count("optimizer.") == 21


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"])
def test_a_flipped_bit_is_found(
    name: str,
    form: list[str],
    run: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = shutil.copytree(run[0] / "step-00000003", tmp_path / "broken")
    content = bytearray((broken / name).read_bytes())
    content[-3] ^= 4
    (broken / name).write_bytes(content)
    code, out = inspect(capsys, broken, "--check", *form)
    assert code == 1
    assert f"{broken / name}: not the hash it was written with" in out
    others = {"manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"} - {name}
    for other in others:
        assert (f"ok       {other}" in out) is not bool(form)
    if form:
        assert json.loads(out)["files"] == {
            name: "not the hash it was written with",
            **dict.fromkeys(others, "ok"),
        }


def test_missing_and_foreign_files_are_found(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(run[0] / "step-00000003", tmp_path / "broken")
    (broken / "note.txt").write_text("x")
    code, out = inspect(capsys, broken, "--check")
    assert (code, "note.txt: not listed in SHA256SUMS" in out) == (1, True)
    (broken / "note.txt").unlink()
    (broken / "shard-00001.safetensors").unlink()
    code, out = inspect(capsys, broken, "--check")
    assert (code, "shard-00001.safetensors: cannot be read: No such file" in out) == (1, True)
    (broken / "SHA256SUMS").unlink()
    code, out = inspect(capsys, broken, "--check")
    assert (code, "has no SHA256SUMS" in out) == (1, True)


def test_other_folders_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in (
        (tmp_path, "has neither manifest.json nor latest"),
        (tmp_path / "x", "is not a folder"),
    ):
        assert main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_a_runs_folder_may_hold_checkpoints_in_a_subfolder(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run[0], tmp_path / "checkpoints")
    code, out = inspect(capsys, tmp_path, "--json", "--check")
    assert (code, json.loads(out)["path"]) == (0, str(tmp_path / "checkpoints" / "step-00000003"))


def test_without_latest_the_newest_is_shown_and_nothing_is_renamed(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(run[0], tmp_path / "checkpoints")
    (root / "latest").unlink()
    shutil.copytree(root / "step-00000003", root / "step-00000004")
    (root / "step-00000003").rename(root / ".step-00000003.old")  # as a crash leaves it
    before = sorted(root.iterdir())
    for path in (tmp_path, root):
        capsys.readouterr()
        assert main(["inspect", str(path), "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["path"] == str(root / "step-00000004")
        assert printed.err == f"{root}/latest is missing, or names no step: showing step-00000004\n"
    assert sorted(root.iterdir()) == before


def test_norms_are_of_numbers_and_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 1)
    model.register_buffer("angles", torch.full((4,), 3 + 4j))
    model.register_buffer("steps", torch.tensor(1000))
    torch.nn.init.constant_(model.weight, 3.0)
    torch.nn.init.constant_(model.bias, 0.0)
    checkpoint.save(tmp_path / "saved", model, Lamb(model.named_parameters()))
    code, out = inspect(capsys, tmp_path / "saved", "--json")
    assert json.loads(out)["norms"]["weights"] == pytest.approx(118**0.5)
    model.register_buffer("unknown", torch.tensor([torch.nan, torch.inf]))
    checkpoint.save(tmp_path / "other", model, Lamb(model.named_parameters()))
    code, out = inspect(capsys, tmp_path / "other", "--json")
    shown = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == 0
    assert shown["tensors"]["model.angles"]["norm"] == pytest.approx(10.0)
    assert shown["tensors"]["model.unknown"]["norm"] == "nan"
    assert shown["norms"]["weights"] == "nan"
