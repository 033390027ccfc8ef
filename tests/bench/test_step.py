"""`bench step`: candidates train what they claim to, and what is quoted follows from what was recorded."""

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor

from sharded_lamb import shapes
from sharded_lamb.__main__ import main
from sharded_lamb.bench import candidates, peers, step
from sharded_lamb.bench.candidates import LAMB, OURS, PEERS, Kind, Setting, choose
from sharded_lamb.bench.timing import Spread
from sharded_lamb.bench.workload import LAYER_NUMEL, Workload
from tests.harness import run_ranks
from tests.oracle import OracleLamb

CPU = torch.device("cpu")
FAST = ["allreduce-lamb", "allreduce-timm", "zero-timm", "zero-views-timm", "adamw"]
NEEDS_TIMM = pytest.mark.skipif(not peers.is_installed("timm"), reason="timm is not installed")


def arguments(**more: Any) -> argparse.Namespace:
    given = {
        "shapes": "tiny",
        "peers": ",".join(FAST),
        "stage": "both",
        "bucket_mb": 0.02,
        "json": None,
        "png": None,
    }
    return argparse.Namespace(**{**given, "rounds": 2, "iterations": 2, "alive": "auto", **more})


def trained(kind: Kind, setting: Setting, steps: int = 2) -> list[Tensor]:
    candidate = kind.build(setting)
    for _ in range(steps):
        candidate.iterate()
    weights = candidate.weights()
    candidate.close()
    return weights


def weights_after_two_steps(rank: int, world_size: int, names: Sequence[str]) -> dict[str, list[Tensor]]:
    setting = Setting(Workload(shapes.named("tiny"), rank, CPU), world_size, bucket_mb=0.02)
    kinds = [*OURS.values(), *(PEERS[name] for name in names)]
    existing = [kind for kind in kinds if kind.missing(world_size, [[1]]) is None]
    return {kind.name: trained(kind, setting) for kind in existing}


def oracle_after_two_steps(world_size: int) -> list[np.ndarray]:
    """From the definition, fp64, fed the mean of what the workloads of all ranks give."""
    loads = [Workload(shapes.named("tiny"), rank, CPU) for rank in range(world_size)]
    count = len(loads[0].shapes)
    initial = {str(i): loads[0].weight(i).double().numpy() for i in range(count)}
    oracle = OracleLamb(initial, lr=LAMB["lr"], weight_decay=LAMB["weight_decay"])
    for at in (1, 2):
        means = {
            str(i): np.mean([load.gradient(i, at).double().numpy() for load in loads], axis=0)
            for i in range(count)
        }
        oracle.step(means)
    return [np.asarray(oracle.params[str(i)]) for i in range(count)]


def error(found: Sequence[Tensor], expected: Sequence[np.ndarray], load: Workload) -> float:
    """The largest over parameters, norm-wise, in steps: LAMB's are of length lr ‖w‖.

    A step is a thousandth of the weights, so 1e-3 here is 1e-6 of them, and decay and bias corrections show.
    """
    errors = []
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        step_length = LAMB["lr"] * np.linalg.norm(load.weight(index).double().numpy())
        errors.append(float(np.linalg.norm(a.double().numpy() - b) / max(step_length, 1e-30)))
    return max(errors)


@NEEDS_TIMM
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_that_claim_to_be_lamb_end_with_the_same_weights(world_size: int) -> None:
    """DeepSpeed's take no scalars and no empty tensors, and the one with timm is not LAMB: it is below."""
    expected = oracle_after_two_steps(world_size)
    load = Workload(shapes.named("tiny"), 0, CPU)
    everyone = run_ranks(world_size, weights_after_two_steps, world_size, FAST)
    for results in everyone:
        assert set(results) >= {"ours-1", "ours-2", "allreduce-lamb", "allreduce-timm", "adamw"}
        assert ("zero-views-timm" in results) == (world_size > 1)
        for name, weights in results.items():
            exact = name.startswith("ours") or PEERS[name].exact
            assert (error(weights, expected, load) < 1e-3) is exact, name


def test_two_steps_are_seen() -> None:
    """The comparison above rejects a candidate that does not move, or steps once: its tolerance is tight."""
    setting = Setting(Workload(shapes.named("tiny"), 0, CPU), 1)
    expected = oracle_after_two_steps(1)
    assert error(trained(OURS[2], setting, steps=1), expected, setting.workload) > 0.1
    assert error(trained(candidates.BARE, setting), expected, setting.workload) > 1


def test_the_compiled_one_is_lamb() -> None:
    small = {"w": (31, 37), "b": (257,)}
    setting = Setting(Workload(small, 0, CPU), 1)
    kind = PEERS["compiled"]
    if reason := kind.missing(1, list(small.values())):
        pytest.skip(reason)
    expected = [w.double().numpy() for w in trained(OURS[2], setting)]
    with torch._inductor.config.patch(compile_threads=1):  # others are interpreters
        compiled = trained(kind, setting)
    assert error(compiled, expected, setting.workload) < 1e-3


def engines(rank: int) -> dict[str, list[Tensor]]:
    results = {}
    setting = Setting(Workload(shapes.bert(1, 32, 128), rank, CPU), 2)
    for kind in (OURS[2], PEERS["deepspeed1-timm"], PEERS["deepspeed2-ours"]):
        results[kind.name] = trained(kind, setting)
    return results


@NEEDS_TIMM
@pytest.mark.slow
def test_deepspeed_is_lamb_with_the_plugin_and_not_with_timm() -> None:
    pytest.importorskip("deepspeed")
    load = Workload(shapes.bert(1, 32, 128), 0, CPU)
    for results in run_ranks(2, engines):
        expected = [w.double().numpy() for w in results["ours-2"]]
        assert error(results["deepspeed2-ours"], expected, load) < 1e-3
        assert error(results["deepspeed1-timm"], expected, load) > 0.05  # a ratio for each flat partition


def measured(rank: int, folder: str, alive: str, names: Sequence[str]) -> dict[str, Any]:
    png = (
        Path(folder, "step.png") if dist.get_world_size() == 1 else None
    )  # drawing takes as long as measuring
    chosen = arguments(peers=",".join(names), json=Path(folder, "step.json"), png=png, alive=alive)
    return step.measure(chosen, CPU)


@NEEDS_TIMM
@pytest.mark.parametrize(
    ("world_size", "alive", "names"), [(1, "one", FAST), (2, "all", FAST), (2, "one", ["zero-timm"])]
)
def test_the_json_holds_what_was_promised(
    world_size: int, alive: str, names: Sequence[str], tmp_path: Path
) -> None:
    run_ranks(world_size, measured, str(tmp_path), alive, names)
    results = json.loads((tmp_path / "step.json").read_text())
    assert results["machine"].keys() >= {"cpu", "cores", "memory_gib", "threads", "device"}
    assert results["versions"].keys() >= {"python", "torch"}
    assert results["ranks"] == world_size
    assert results["kernel"]
    assert results["bucket_mb"] == 0.02
    assert results["command"].startswith("sharded-lamb")
    assert results["date"][:2] == "20"
    assert results["alive"] == alive
    assert results["reference"] == "ours-2"
    assert results["shapes"] == {"name": "tiny", "tensors": 36, "elements": 37_304}
    assert set(results["skipped"]) == ({"zero-timm", "zero-views-timm"} if world_size == 1 else set())
    existing = {"bare", "ours-1", "ours-2", *names} - set(results["skipped"])
    assert set(results["rounds_ms"]) == set(results["summary"]) == set(results["titles"]) == existing
    for turns in results["rounds_ms"].values():
        assert [len(turn) for turn in turns] == [2, 2]
        assert min(min(turn) for turn in turns) > 0
    check_summary(results)
    if world_size == 1:
        pytest.importorskip("matplotlib")
        assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def check_summary(found: Mapping[str, Any]) -> None:
    """By numpy, from the recorded rounds."""
    times = {name: np.median(np.array(turns), axis=1) for name, turns in found["rounds_ms"].items()}
    for name, row in found["summary"].items():
        net, ours = times[name] - times["bare"], times["ours-2"] - times["bare"]
        for key, values in (
            ("iteration_ms", times[name]),
            ("net_ms", net),
            ("iteration_ratio", times[name] / times["ours-2"]),
            ("net_ratio", net / ours),
        ):
            if key == "net_ratio" and min(*net, *ours) <= 0:
                assert row[key] is None
                continue
            low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
            assert row[key] == pytest.approx({"median": median, "low": low, "high": high}, rel=1e-9), (
                name,
                key,
            )


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down threefold in between changes no ratio; a quotient of medians would be off."""
    turns = {"bare": [[1.0], [3.0], [3.0]], "ours-2": [[2.0], [6.0], [6.0]], "other": [[5.0], [15.0], [9.0]]}
    row = step.summarize(turns, "ours-2")["other"]
    assert row["iteration_ratio"] == {"median": 2.5, "low": 2.0, "high": 2.5}
    assert row["net_ratio"]["median"] == 4.0
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of([1, 2, 3, 4, 9]).median == statistics.median([1, 2, 3, 4, 9])


def test_a_net_time_that_is_none_has_no_ratio() -> None:
    """In one round "fast" takes less than the bare backward; no candidate has a ratio to such a reference."""
    turns = {"bare": [[2.0], [2.0]], "ours-2": [[4.0], [3.0]], "fast": [[1.0], [2.5]], "slow": [[6.0], [5.0]]}
    results = step.summarize(turns, "ours-2")
    assert (results["fast"]["net_ratio"], results["slow"]["net_ratio"]["median"]) == (None, 2.5)
    assert results["fast"]["iteration_ratio"]["median"] == pytest.approx((1 / 4 + 2.5 / 3) / 2)
    assert {row["net_ratio"] is None for row in step.summarize(turns, "fast").values()} == {True}
    assert step.summarize({**turns, "fast": [[2.0], [2.0]]}, "fast")["slow"]["net_ratio"] is None
    assert step._net(-0.25, None) == step._net(0.0, None) == ["—", "—"]
    assert step._net(3.0, {"median": 2.5}) == ["3", "2.50x"]


def with_room_on_the_first(rank: int, folder: str) -> str:
    with mock.patch.object(step, "_fit", return_value=dist.get_rank() == 0):
        return str(measured(rank, folder, "auto", ["adamw"])["alive"])


def test_all_stay_alive_only_where_every_rank_has_room(tmp_path: Path) -> None:
    assert run_ranks(2, with_room_on_the_first, str(tmp_path)) == ["one", "one"]


def test_backward_gives_what_the_workload_says() -> None:
    """In fresh memory, by rank and step, the same runs however parameters are put in layers."""
    sizes = {"a": (3, 5), "large": (LAYER_NUMEL + 7,), "scalar": (), "empty": (0, 2)}
    load = Workload(sizes, 0, CPU)
    model = load.model()
    assert [list(layer) for layer in model.layers] == [[0, 1], [2, 3]]
    for at in (1, 2):
        model.zero_grad()
        loss = model()
        assert loss.item() == 0
        loss.backward()
        for index, p in enumerate(model.parameters()):
            assert p.grad is not None
            assert torch.equal(p.grad, load.gradient(index, at))
    assert not torch.equal(load.gradient(0, 1), load.gradient(0, 2))
    assert not torch.equal(load.gradient(0, 1), Workload(sizes, 1, CPU).gradient(0, 1))
    assert torch.equal(load.weight(0), Workload(sizes, 1, CPU).weight(0))
    large = load.gradient(1, 1)  # longer than the pool: it begins anew
    assert torch.equal(large[: len(large) - len(load.gradients)], large[len(load.gradients) :])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--shapes", "nothing"], "must be one of"),
        (["--shapes", "missing.json"], "missing.json"),
        (["--peers", "allreduce-timm,nobody"], "'nobody' is none of allreduce-lamb"),
        (["--rounds", "0"], "rounds must be >= 1"),
    ],
)
def test_mistakes_are_exit_code_2(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--device", "cpu", *given]) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_take_part_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: name == "deepspeed")
    existing, missing = choose(None, "2", 2, [(3, 4)])
    assert [kind.name for kind in existing] == [
        "ours-2",
        "allreduce-lamb",
        "deepspeed1-ours",
        "deepspeed2-ours",
        "adamw",
    ]
    assert "timm, which is not installed" in missing["zero-timm"]
    assert "one rank only" in missing["compiled"]
    assert "neither scalars" in choose(None, "2", 2, [()])[1]["deepspeed2-ours"]


def broken(setting: Setting) -> candidates.Candidate:
    made = PEERS["adamw"].build(setting)  # which every rank takes part in
    if dist.get_rank():
        raise RuntimeError("no compiler\nand more of it")
    return made


def with_a_broken_one(rank: int, folder: str, alive: str) -> dict[str, Any]:
    kind = Kind("allreduce-lamb", "broken", broken)
    with mock.patch.dict(PEERS, {kind.name: kind}):
        return measured(rank, folder, alive, ["allreduce-lamb", "adamw"])


@pytest.mark.parametrize("alive", ["all", "one"])
def test_a_peer_that_fails_on_one_rank_is_left_out_on_all(alive: str, tmp_path: Path) -> None:
    for results in run_ranks(2, with_a_broken_one, str(tmp_path), alive):
        assert results["skipped"] == {"allreduce-lamb": "RuntimeError: no compiler"}
        assert set(results["summary"]) == set(results["rounds_ms"]) == {"bare", "ours-1", "ours-2", "adamw"}
        assert [len(turns) for turns in results["rounds_ms"].values()] == [2] * 4


def test_a_compiler_that_does_not_work_costs_its_peer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("c++ cannot run")

    monkeypatch.setattr(peers.CompiledLamb, "step", fails)  # where torch.compile compiles
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    given = ["--shapes", "tiny", "--peers", "compiled,adamw", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", "step", *given]) == 0
    assert "without compiled: OSError: c++ cannot run" in (shown := capsys.readouterr().out)
    assert "fused AdamW" in shown


def test_ours_must_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, closure: None = None) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(candidates.ShardedLamb, "step", fails)
    with pytest.raises(RuntimeError, match="broken"):
        step.measure(arguments(peers="adamw"), CPU)


def test_without_matplotlib_there_is_a_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    where = tmp_path / "x.png"
    given = ["bench", "step", "--shapes", "tiny", "--peers", "adamw", "--rounds", "1", "--device", "cpu"]
    assert main([*given, "--png", str(where)]) == 0
    output = capsys.readouterr()
    assert "| ShardedLamb, stage 2" in output.out
    assert "pip install matplotlib" in output.err
    assert not where.exists()
