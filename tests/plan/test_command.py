"""`sharded-lamb plan` as it is called."""

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb.__main__ import main
from sharded_lamb.plan.command import add_arguments, run
from sharded_lamb.plan.machine import PRESETS, calibrated
from sharded_lamb.plan.models import shapes_of_config
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent


def rows_of(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    assert {"machine", "versions", "date", "command", "rows"} <= content.keys()
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["--shapes", "bert-base", "--shard", "all", "node", "--json", str(out), "--png", str(png)]
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = rows_of(out)
    assert len(rows) == 3 * (13 + 9)
    for row in rows:
        shown = f"{row['stage']} {row['world_size']:,} "
        assert any(" ".join(line.split()).startswith(shown) for line in lines)
        assert row["memory_bytes_in_all"] == sum(row["memory_bytes"].values())
        assert row["mesh"][0] * row["mesh"][1] == row["world_size"]
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png.read_bytes()[at : at + 4]) for at in (16, 20))
    assert width > 800
    assert height > 300


def test_a_picture_without_matplotlib_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", "--world-sizes", "2", "--png", str(tmp_path / "plan.png")]) == 2
    assert "a picture needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_a_hugging_face_config_without_its_memory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, intermediate_size=64, architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path)
    model = transformers.BertForMaskedLM(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes_of_config(str(tmp_path / "config.json")) == expected
    assert shapes_of_config(str(tmp_path)) == expected
    assert main(["plan", "--config", str(tmp_path / "config.json"), "--world-sizes", "2"]) == 0


def test_a_model_larger_than_any_memory_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1.6 T parameters: only a meta device holds them."""
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 2**16,
        "intermediate_size": 2**19,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
    }
    transformers.LlamaConfig(**size, num_hidden_layers=12).save_pretrained(tmp_path)
    assert main(["plan", "--config", str(tmp_path), "--dtype", "bfloat16", "--world-sizes", "4096"]) == 0
    elements = re.search(r"([\d,]+) elements", capsys.readouterr().out)
    assert elements is not None
    assert int(elements[1].replace(",", "")) > 1e12


def test_options_reach_the_prediction(tmp_path: Path) -> None:
    def row(*arguments: str) -> dict[str, Any]:
        out = tmp_path / "row.json"
        assert main(["plan", "--world-sizes", "16", "--stages", "2", "--json", str(out), *arguments]) == 0
        (results,) = rows_of(out)
        return results

    plain = row()
    changes = {
        ("--dtype", "bfloat16"): "memory_bytes",
        ("--dtype", "bfloat16", "--master-dtype", "bfloat16"): "memory_bytes",
        ("--state-dtype", "bfloat16"): "memory_bytes",
        ("--reduce-dtype", "bfloat16"): "wire_bytes",
        ("--reduce-dtype", "float8_e4m3fn"): "wire_bytes",
        ("--gather-dtype", "float8_e4m3fn"): "wire_bytes",
        ("--ratio-blocks", r"query\.weight=4"): "wire_bytes",
        ("--bucket-mb", "8"): "calls",
        ("--backend", "gloo"): "memory_bytes",
        ("--shapes", "bert-base"): "memory_bytes",
        ("--shard", "node"): "mesh",
        ("--shard", "4"): "mesh",
        ("--ranks-per-node", "4"): "seconds",
        ("--preset", "a100-nvlink-ib"): "seconds",
        ("--update-gb-s", "10"): "seconds",
        ("--intra-gb-s", "10"): "seconds",
        ("--inter-gb-s", "10"): "seconds",
        ("--intra-us", "10"): "seconds",
        ("--inter-us", "10"): "seconds",
        ("--backward-ms", "100"): "seconds",
        ("--overlap-forward", "--forward-ms", "100"): "seconds",
    }
    for arguments, key in changes.items():
        assert row(*arguments)[key] != plain[key], arguments
    split = row("--dtype", "bfloat16", "--store-param-remainders")
    assert split["memory_bytes"] != row("--dtype", "bfloat16")["memory_bytes"]
    hidden, late = row("--backward-ms", "100"), row("--backward-ms", "100", "--no-overlap")
    assert hidden["seconds"]["exposed"] < late["seconds"]["exposed"]


def test_what_a_rank_sends_of_an_all_reduce_is_a_ring_s(tmp_path: Path) -> None:
    """4,096 elements, 16 KiB: gathered and scattered over 4 ranks 12 KiB leave each; a shard has 4 KiB, facts 96 B."""
    sizes, out = tmp_path / "sizes.json", tmp_path / "plan.json"
    sizes.write_text(json.dumps({"w": [4096]}))

    def sent(stage: int, world: int) -> int:
        where = ["--stages", str(stage), "--world-sizes", str(world), "--shard", "4", "--json", str(out)]
        assert main(["plan", "--shapes", str(sizes), *where]) == 0
        (results,) = rows_of(out)
        return int(results["sent_bytes"])

    assert sent(1, 4) == 12_288 + 2 * 16_384 * 3 // 4 + 2 * 96 * 3 // 4
    assert sent(2, 4) == 2 * 12_288 + 2 * 96 * 3 // 4
    assert sent(2, 12) == 2 * 12_288 + 2 * 4_096 * 2 // 3 + 2 * 96 * 11 // 12
    assert sent(3, 12) == 3 * 12_288 + 2 * 4_096 * 2 // 3 + 2 * 96 * 11 // 12


def test_calibration_goes_over_the_preset_and_options_over_it(tmp_path: Path) -> None:
    measured = tmp_path / "bench.json"
    preset = PRESETS["h100-nvlink-ib"]
    measured.write_text(
        json.dumps({"rows": [], "kernel_bytes_per_second": 5e9, "wire_bytes_per_second": 2e9})
    )
    results = calibrated(preset, [str(measured)])
    assert (
        results.update_bytes_per_second,
        results.intra_bytes_per_second,
        results.inter_bytes_per_second,
    ) == (
        5e9,
        2e9,
        2e9,
    )
    assert (results.intra_latency, results.ranks_per_node) == (preset.intra_latency, 8)
    measured.write_text(json.dumps({"latency_seconds": 1e-3}))
    results = calibrated(preset, [str(measured)])
    assert (results.intra_latency, results.inter_latency) == (1e-3, 1e-3)
    assert results.update_bytes_per_second == preset.update_bytes_per_second
    out = tmp_path / "plan.json"
    arguments = ["--calibrate", str(measured), "--intra-us", "7", "--world-sizes", "2", "--json", str(out)]
    assert main(["plan", *arguments]) == 0
    machine = json.loads(out.read_text())["machine"]
    assert machine["intra_latency"] == pytest.approx(7e-6)
    assert machine["inter_latency"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shapes", "nothing"], "must be one of"),
        (["--shapes", "missing.json"], "missing.json"),
        (["--config", "missing.json"], "Give the path of a Hugging Face config.json"),
        (["--store-param-remainders"], "got --dtype float32 --master-dtype float32: leave it out"),
        (
            ["--dtype", "bfloat16", "--gather-dtype", "float8_e4m3fn", "--store-param-remainders"],
            "leaves no weight beside a remainder",
        ),
        (["--ratio-blocks", "qkv"], "--ratio-blocks must be PATTERN=N .*, got 'qkv'"),
        (["--ratio-blocks", "qkv=0"], "got 'qkv=0'"),
        (["--ratio-blocks", "qkv=3"], "'qkv' matches no parameter"),
        (["--ratio-blocks", "[=3"], "not a regular expression"),
        (["--ratio-blocks", "query.weight=3"], "3 does not divide its first dimension, 1024"),
        (["--ratio-blocks", "query.bias=8", "--state-dtype", "int8"], "begin at a multiple of 128"),
        (["--world-sizes", "0"], "--world-sizes must be >= 1, got 0"),
        (["--shard", "some"], "--shard must be all, node or a number"),
        (["--shard", "3", "--world-sizes", "4"], "4 ranks do not divide into replicas of 3"),
        (["--shard", "8", "--world-sizes", "4"], "no world size has as many ranks"),
        (["--ranks-per-node", "0"], "--ranks-per-node must be >= 1, got 0"),
        (["--bucket-mb", "0"], "--bucket-mb must be > 0"),
        (
            ["--stages", "3", "--gather-dtype", "bfloat16"],
            "has no effect in stage 3, where fully_shard gathers",
        ),
        (["--intra-gb-s", "0"], "intra_bytes_per_second must be > 0"),
        (["--inter-us", "-1"], "inter_latency must be >= 0"),
        (["--forward-ms", "-1"], "--forward-ms must be >= 0"),
        (
            ["--calibrate", "missing.json"],
            "--calibrate missing.json: No such file or directory; write it with",
        ),
        (["--check", "--device", "cpu"], "torchrun"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "content", "says"),
    [
        ("--shapes", "[1, 2]", "must hold a JSON object"),
        ("--shapes", "{}", "has no parameters"),
        ("--shapes", '{"w": [-1]}', "the shape of 'w' must be sizes >= 0"),
        ("--shapes", '{"w": ["a"]}', "the shape of 'w' must be sizes >= 0"),
        ("--config", "{}", "no model_type"),
        ("--config", "[]", "no model_type"),
        ("--config", '{"model_type": "bert", "architectures": ["Nothing"]}', "no model 'Nothing'"),
        ("--calibrate", "[]", "has none of kernel_bytes_per_second"),
        ("--calibrate", "nonsense", "file.json is not JSON: Expecting value: line 1 column 1"),
        ("--config", "nonsense", "file.json is not JSON: Expecting value: line 1 column 1"),
        ("--shapes", '{"w": [1}', "file.json is not JSON: Expecting ',' delimiter: line 1 column 9"),
        ("--calibrate", '{"latency_seconds": -1}', "latency_seconds must be a number > 0, got -1"),
        (
            "--calibrate",
            '{"wire_bytes_per_second": "fast"}',
            "wire_bytes_per_second must be a number > 0, got 'fast'",
        ),
    ],
)
def test_files_that_are_not_what_they_should_be(
    option: str, content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.json").write_text(content)
    assert main(["plan", option, str(tmp_path / "file.json")]) == 2
    assert says in capsys.readouterr().err


def test_argparse_refuses_with_the_same_code() -> None:
    for arguments in (
        ["--stages", "4"],
        ["--preset", "abacus"],
        ["--dtype", "int8"],
        ["--config", "a", "--shapes", "b"],
    ):
        with pytest.raises(SystemExit) as left:
            main(["plan", *arguments])
        assert left.value.code == 2


def test_the_title_says_where_an_option_is_not_applied(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--world-sizes", "2", "--gather-dtype", "bfloat16", "--reduce-dtype", "float8_e4m3fn"]
    assert main(["plan", *arguments]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    assert "gathered as bfloat16 (not applied to stage 3), " in title
    assert "reduced as float8_e4m3fn (not applied to stages 1 and 3), " in title
    assert main(["plan", *arguments, "--stages", "2"]) == 0
    assert "not applied" not in capsys.readouterr().out


def check_printed(rank: int) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    chosen = parser.parse_args(["--check", "--bucket-mb", "0.02", "--stages", "2", "3"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run(chosen, torch.device("cpu"))
    return code, printed.getvalue()


def test_check_prints_predicted_and_measured_once() -> None:
    (code, printed), other = run_ranks(2, check_printed)
    assert code == 0
    assert other == (0, "")
    assert printed.rstrip().endswith("2 ranks: PASS (bytes and calls; not times)")
    blocks = printed.split("\n\n")[:-1]
    assert [" ".join(block.split()[:4]) for block in blocks] == ["stage 2, mesh 2", "stage 3, mesh 2"]
    for block in blocks:
        *rows, timed = block.splitlines()[1:]
        predicted, measured, ratio = (float(value.replace(",", "")) for value in timed.split()[-3:])
        assert ratio == pytest.approx(measured / predicted, abs=0.02 + 0.01 * ratio)
        assert len(rows) >= 9
        assert all(row.endswith("1.0000") for row in rows)


def test_readme_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "sharded_lamb" / "plan" / "README.md").read_text()
    command = re.search(r"^python -m sharded_lamb (plan .*?[^\\])$", section, flags=re.MULTILINE | re.DOTALL)
    assert command is not None
    assert main(shlex.split(command[1].replace("\\\n", " "))) == 0
    printed = capsys.readouterr().out.split("\n\nMiB")[0]
    assert printed in section
    assert torch.get_default_device().type == "cpu"  # the meta device was for the model alone
