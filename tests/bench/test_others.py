"""`bench kernels`, `bench comm` and `bench memory`: what they record, what follows from it, what they refuse."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from sharded_lamb import shapes
from sharded_lamb.__main__ import main
from sharded_lamb.bench import comm, functions, host, kernels, peak_memory, report
from tests import interpreter
from tests.harness import run_ranks

CPU = torch.device("cpu")


def spread(values: np.ndarray) -> Any:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return pytest.approx({"median": median, "low": low, "high": high}, rel=1e-9)


def recorded(turns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.median(np.array(of_one), axis=1) for name, of_one in turns.items()}


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "_SCALED", {"cpu": 1 << 16})
    where = tmp_path / "kernels.json"
    given = ["--shapes", "tiny", "--threads", "1", "--rounds", "3", "--device", "cpu", "--json", str(where)]
    assert main(["bench", "kernels", *given]) == 0
    results = json.loads(where.read_text())
    assert results["machine"].keys() >= {"cpu", "cores", "memory_gib", "threads"}
    assert "torch" in results["backends"]
    assert results["shapes"] == {"tiny": {"tensors": 36, "elements": 37_304}}
    assert set(results["summary"]) == set(results["rounds_ms"]) == {"tiny, 1 threads"}
    for key, rows in results["summary"].items():
        times = recorded(results["rounds_ms"][key])
        bandwidth = 8 * 65_536 / times["in-place scale"]  # bytes a ms
        expected = spread(100 * (40 * 37_304 / times["torch"]) / bandwidth)
        assert rows["torch"]["roofline_percent"] == expected
        expected = spread(100 * (28 * 37_304 / times["fused AdamW"]) / bandwidth)
        assert rows["fused AdamW"]["roofline_percent"] == expected
        assert rows["torch"]["to_adamw"] == spread(times["torch"] / times["fused AdamW"])
        step = times["ShardedLamb.step(), cpp"]
        assert rows["ShardedLamb.step(), cpp"]["us_per_tensor"] == spread(1e3 * step / 36)
        assert rows["Lamb.step()"]["us_per_tensor"] == spread(1e3 * times["Lamb.step()"] / 36)
        assert rows["Lamb.step()"]["roofline_percent"] is None
        assert rows["ShardedLamb.step(), cpp"]["ns_per_element"] == spread(1e6 * step / 37_304)
    assert "µs a tensor" in capsys.readouterr().out


def test_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(functions, "ELEMENTS", 1 << 12)
    monkeypatch.setattr(functions, "CACHED", 1 << 10)
    monkeypatch.setattr(functions, "REPEATED", 2)
    where = tmp_path / "functions.json"
    given = ["--backend", "torch", "--rounds", "3", "--device", "cpu", "--json", str(where)]
    assert main(["bench", "functions", *given]) == 0
    results = json.loads(where.read_text())
    times, summary = recorded(results["rounds_ms"]), results["summary"]
    assert set(summary) == {"in-place scale", "sum", "a + b into c", "a += b c", *functions.CASES}
    assert summary["sum"]["gb_per_s"] == spread(4 * 4096 / times["sum"] / 1e6)
    assert summary["a += b c"]["gb_per_s"] == spread(16 * 4096 / times["a += b c"] / 1e6)
    expected = spread(100 * (24 / times["pass 1, fp32"]) / (8 / times["in-place scale"]))
    assert summary["pass 1, fp32"]["roofline_percent"] == expected
    expected = spread(100 * (8 / times["average of 2, bf16"]) / (12 / times["a + b into c"]))
    assert summary["average of 2, bf16"]["roofline_percent"] == expected
    cached = times["square_sums, fp16, in cache"]
    assert summary["square_sums, fp16"]["ns_in_cache"] == spread(1e6 * cached / 2048)
    assert "% of in-place scale" in capsys.readouterr().out


def test_plan_takes_what_kernels_and_comm_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds from the recorded rounds, of the list with most elements, the first threads and the largest size."""
    monkeypatch.setattr(kernels, "_SCALED", {"cpu": 1 << 16})
    (tmp_path / "small.json").write_text(json.dumps({"w": [7, 11]}))
    lists = f"{tmp_path}/small.json,tiny"
    given = ["--shapes", lists, "--threads", "2,1", "--rounds", "3", "--device", "cpu"]
    assert main(["bench", "kernels", *given, "--json", f"{tmp_path}/kernels.json"]) == 0
    run_ranks(2, compared, str(tmp_path))
    measured = [str(tmp_path / name) for name in ("kernels.json", "comm.json")]
    plan = ["plan", "--world-sizes", "2", "--json", f"{tmp_path}/plan.json", "--calibrate", *measured]
    assert main(plan) == 0
    machine = json.loads((tmp_path / "plan.json").read_text())["machine"]
    updates, exchanges = (json.loads(Path(path).read_text()) for path in measured)
    passes = recorded(updates["rounds_ms"]["tiny, 2 threads"])[updates["kernel"]]
    assert machine["update_bytes_per_second"] == pytest.approx(40 * 37_304 / np.median(passes) * 1e3)
    pairs = recorded(exchanges["rounds_ms"]["0.3"])["point to point"]
    wire = pytest.approx(np.median(0.3e6 / 2 / pairs) * 1e3)
    assert machine["intra_bytes_per_second"] == machine["inter_bytes_per_second"] == wire
    latency = pytest.approx(np.median(exchanges["smallest_rounds_ms"]) / 1e3)
    assert machine["intra_latency"] == machine["inter_latency"] == latency


def test_a_kernel_that_was_not_measured_has_no_speed() -> None:
    summary = {"tiny, 1 threads": {"torch": {"ms": {"median": 2.0}}}}
    sizes = {"tiny": {"tensors": 1, "elements": 100}}
    assert kernels.kernel_speed(summary, sizes, "cpp") == {}
    assert kernels.kernel_speed(summary, sizes, "torch") == {"kernel_bytes_per_second": 2e6}


def test_threads_are_set_and_set_back() -> None:
    before = torch.get_num_threads()
    with kernels._threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert kernels._threads("1, 2") == [1, 2]


def test_two_passes_are_a_step() -> None:
    """The timed action of a kernel moves every weight and every moment, with the kernel that it names."""
    from sharded_lamb import ShardedLamb
    from sharded_lamb.bench.candidates import LAMB
    from sharded_lamb.bench.workload import Workload
    from sharded_lamb.kernels import ReferenceKernel

    model = Workload({"w": (31, 37), "b": (300,)}, 0, CPU).model()
    model().backward()
    optimizer = ShardedLamb(model.named_parameters(), **LAMB)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    kernels._two_passes(optimizer, ReferenceKernel())()
    for p, was in zip(model.parameters(), before, strict=True):
        assert (p != was).double().mean() > 0.99
    for state, was in zip(optimizer.state.values(), moments, strict=True):
        assert (state["exp_avg"] != was).double().mean() > 0.99


def compared(rank: int, folder: str) -> dict[str, Any]:
    chosen = argparse.Namespace(mb="0.01,0.3", rounds=3, json=Path(folder, "comm.json"), png=None)
    return comm.measure(chosen, CPU)


def timed_steps(rank: int, world: int, folder: str) -> dict[str, Any]:
    chosen = argparse.Namespace(tensors=5, elements=30, rounds=3, iterations=2, png=None)
    chosen.json = Path(folder, f"host-{world}.json")
    return host.measure(chosen, CPU)


@pytest.mark.parametrize("world", [1, 2])
def test_host(world: int, tmp_path: Path) -> None:
    run_ranks(world, timed_steps, world, str(tmp_path))
    results = json.loads((tmp_path / f"host-{world}.json").read_text())
    times, summary = recorded(results["rounds_ms"]), results["summary"]
    torchs = {"fused AdamW", "foreach AdamW"}
    if world == 1:
        assert set(summary) == {f"plain: {name}" for name in ("ShardedLamb", "Lamb", *torchs)}
    else:
        own = {f"{kind}: {name}" for kind in ("plain", "FSDP2") for name in ("ShardedLamb", *torchs)}
        assert set(summary) == {*own, "two all-reduces"}
        assert summary["two all-reduces"]["to_ours"] is None
        ratio = times["FSDP2: fused AdamW"] / times["FSDP2: ShardedLamb"]
        assert summary["FSDP2: fused AdamW"]["to_ours"] == spread(ratio)
    for name, row in summary.items():
        assert row["ms"] == spread(times[name])
        assert row["us_per_tensor"] == pytest.approx(1e3 * float(np.median(times[name])) / 5)


def test_what_host_times_is_sharded_under_fsdp2() -> None:
    assert run_ranks(2, kinds_of_parameters) == [[(30, "Parameter"), (15, "DTensor")]] * 2


def kinds_of_parameters(rank: int) -> list[tuple[int, str]]:
    plain, sharded = (host._parameters(1, 30, CPU, is_sharded=flag)[0] for flag in (False, True))
    assert isinstance(sharded, DTensor)
    assert isinstance(sharded.grad, DTensor)
    return [(plain.numel(), type(plain).__name__), (sharded.to_local().numel(), type(sharded.data).__name__)]


def test_comm(tmp_path: Path) -> None:
    run_ranks(2, compared, str(tmp_path))
    results = json.loads((tmp_path / "comm.json").read_text())
    assert results["ranks"] == 2
    assert results["backend"] == "gloo"
    assert set(results["summary"]) == {"0.01", "0.3"}
    for size, rows in results["summary"].items():
        times = recorded(results["rounds_ms"][size])
        assert set(rows) == set(times) >= {"all_reduce", "ours: reduce-scatter", "ours: all-gather"}
        for name, row in rows.items():
            moved = float(size) / 2 if name == "point to point" else float(size)
            assert row["mb_per_s"] == spread(1e3 * moved / times[name])
            assert row["ratio"] == spread(times[name] / times["all_reduce"])


def exchanged(rank: int) -> dict[str, list[float]]:
    """The result of every action of `comm` on memory filled with the rank's number + 1."""
    from sharded_lamb.comm.collectives import Collectives
    from sharded_lamb.comm.topology import Topology

    made = comm.Exchanges(Collectives(Topology.of(None, None), CPU), 0.8, CPU)
    positions = {
        "ours: reduce-scatter": made.bucket.shard.grad[:300],
        "reduce_scatter_tensor": made.shard,
        "ours: all-gather": made.bucket.flat,
        "all_gather_into_tensor": made.full,
        "all_reduce": made.full,
        "point to point": made.arrived,
    }
    results = {}
    for name, action in made.actions().items():
        for filled in (made.bucket.flat, made.grad, made.full, made.shard, made.sent):
            filled.fill_(rank + 1)
        action()
        results[name] = positions[name].unique().tolist()
    return results


def test_comm_moves_what_it_says() -> None:
    for rank, results in enumerate(run_ranks(2, exchanged)):
        assert results == {
            "all_reduce": [3.0],
            "point to point": [2.0 - rank],
            "ours: reduce-scatter": [1.5],
            "reduce_scatter_tensor": [1.5],
            "all_gather_into_tensor": [1.0, 2.0],
            "ours: all-gather": [1.0, 2.0],
        }


def remembered(rank: int, folder: str, python: str) -> dict[str, Any]:
    sizes = Path(folder, "sizes.json")
    chosen = argparse.Namespace(
        shapes=str(sizes),
        peers="",
        stage="2",
        bucket_mb=4,
        steps=2,
        json=Path(folder, "memory.json"),
        png=None,
    )
    with mock.patch.object(sys, "executable", python):
        return peak_memory.measure(chosen, CPU)


def test_memory(tmp_path: Path) -> None:
    """8 M elements: the bare backward needs 8 B of each, ours on two ranks what the formula says, to some MB."""
    elements = 8 * 1024 * 1024
    (tmp_path / "sizes.json").write_text(json.dumps({f"w{i}": [1024, 1024] for i in range(8)}))
    run_ranks(2, remembered, str(tmp_path), interpreter.python())
    results = json.loads((tmp_path / "memory.json").read_text())
    assert results["shapes"]["elements"] == elements
    assert set(results["summary"]) == {"bare", "ours-2"}
    for name, row in results["summary"].items():
        ranks = results["ranks_bytes"][name]
        assert len(ranks) == 2
        assert row["peak"] == max(rank["peak"] for rank in ranks)
        assert row["own"] == row["peak"] - row["baseline"]
    bare, ours = results["summary"]["bare"], results["summary"]["ours-2"]
    assert bare["own"] == pytest.approx(8 * elements, abs=20e6)
    held = results["ranks_bytes"]["ours-2"][0]["by_kind"]
    assert ours["formula"] == elements * 14 + held["staging"]
    assert ours["held_by_optimizer"] == sum(held.values())
    assert held["parameters"] == 4 * elements
    assert held["moments"] == 4 * elements
    assert ours["held_by_optimizer"] < ours["own"] < ours["formula"] + 60e6


def test_a_child_that_fails_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho something else >&2\necho out of memory >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    assert main(["bench", "memory", "--shapes", "tiny", "--device", "cpu"]) == 2
    assert "bare failed on rank 0: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["kernels", "--backends", "torch,abacus"], "'abacus' is none of those that run here"),
        (["kernels", "--threads", "0"], "whole numbers > 0"),
        (["functions", "--backend", "triton"], "--backend: kernel 'triton' cannot run on cpu"),
        (["kernels", "--shapes", "nothing"], "must be one of"),
        (["comm"], "under torchrun"),
        (["comm", "--mb", "1,much"], "numbers > 0"),
        (["memory", "--peers", "nobody"], "'nobody' is none of"),
        (["memory", "--steps", "0"], "steps must be >= 1"),
    ],
)
def test_mistakes_are_exit_code_2(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given, "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_an_unknown_benchmark_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_json_has_one_row_a_line() -> None:
    rows = [{"seed": seed, "message": "m" * report.ROW_WIDTH} for seed in range(3)]
    content = {"machine": {"cores": 2}, "summary": {"a": {"ms": {"median": 1.5}}}, "rows": rows, "none": []}
    written = report.dumped(content)
    assert json.loads(written) == content
    assert written.splitlines() == [
        "{",
        ' "machine": {"cores": 2},',
        ' "summary": {"a": {"ms": {"median": 1.5}}},',
        ' "rows": [',
        f"  {json.dumps(rows[0])},",
        f"  {json.dumps(rows[1])},",
        f"  {json.dumps(rows[2])}",
        " ],",
        ' "none": []',
        "}",
    ]
    assert written.endswith("}\n")


def test_the_table_is_markdown() -> None:
    lines = report.table(["what", "ms"], [["a", "1"], ["longer", "12.5"]]).splitlines()
    assert lines == ["| what   |   ms |", "|--------|-----:|", "| a      |    1 |", "| longer | 12.5 |"]


def test_the_formula_is_the_documented_one() -> None:
    """BERT-base on 2 ranks: 4 + 4 + 4 + 2 B an element."""
    elements = sum(torch.Size(shape).numel() for shape in shapes.named("bert-base").values())
    assert peak_memory.formula(elements, 2, staging=7) == 14 * elements + 7
