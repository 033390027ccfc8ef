"""``python -m sharded_lamb.bert.compare``."""

import json
from pathlib import Path

import pytest

from sharded_lamb.bert.compare import main


def run_folder(folder: Path, last: float, steps: int = 100) -> str:
    folder.mkdir()
    rows = [{"step": step, "loss": 10 - step / steps} for step in range(1, steps + 1)]
    rows.append({"step": steps, "heldout_loss": last})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_it_compares_held_out_losses_and_draws_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (run_folder(tmp_path / name, last) for name, last in (("a", 5.0), ("b", 5.5), ("c", 6.0)))
    png, out = tmp_path / "runs.png", tmp_path / "runs.json"
    assert main([f"fp32={a},{b}", f"8-bit={c}", "--png", str(png), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| fp32 | 5.000, 5.500 | 5.250 | 5.000 to 5.500 |" in text
    assert "| 8-bit | 6.000 | 6.000 | 6.000 to 6.000 |" in text
    assert png.stat().st_size > 1000
    first = json.loads(out.read_text())["fp32"][0]
    assert first["heldout_loss"] == 5.0
    assert len(first["curve"]) == 50
    assert first["curve"][-1] == [100, 10 - 0.995]


def test_evaluations_on_the_way_are_points_of_a_curve(tmp_path: Path) -> None:
    folder, out = Path(run_folder(tmp_path / "a", 5.0)), tmp_path / "runs.json"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] in (50, 100):
            row |= {"heldout_loss": row["step"] / 10, "heldout_causal_loss": row["step"] / 5}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([f"mixed={folder}", "--json", str(out), "--png", str(tmp_path / "runs.png")]) == 0
    [run] = json.loads(out.read_text())["mixed"]
    assert run["heldout_curve"] == [[50, 5.0], [100, 10.0]]
    assert run["heldout_causal_curve"] == [[50, 10.0], [100, 20.0]]


def test_a_cut_off_line_and_a_file_that_cannot_be_written_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "heldout_loss": 3.0}\n{"step": 2, "lo')
    assert main([f"a={tmp_path}"]) == 1
    assert f"error: {tmp_path / 'metrics.jsonl'}, line 2: cut off" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "heldout_loss": 3.0}\n')
    assert main([f"a={tmp_path}", "--json", str(tmp_path / "none" / "x.json")]) == 1
    assert "none/x.json" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["runs/a", "=runs/a", "fp32=", "fp32=nowhere"])
def test_what_is_no_run_is_named(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 1
    assert "error: " in capsys.readouterr().err
