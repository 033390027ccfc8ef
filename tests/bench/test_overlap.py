"""The benchmark of overlap: its sums on hand-made rounds, and one small run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb.bench.overlap import main, summarize, table
from sharded_lamb.bench.overlapped import CONFIGURATIONS, Configured, Work
from sharded_lamb.cluster.namespaces import NetworkError, network
from sharded_lamb.timeline import Span, Timeline
from tests import interpreter
from tests.harness import run_ranks


def _block(iteration: float, exposed: float) -> dict[str, Any]:
    row = {"calls": 3, "bytes": 1_000_000, "wire": 0.05, "exposed": exposed, "hidden": 1 - exposed / 0.05}
    marks = {"forward": 0.01, "backward": 0.02, "step": 0.03}
    return {"iteration": iteration, **marks, "collectives": {"all_gather": row, "total": row}}


def _round(scale: float) -> dict[str, Any]:
    times = {"none": (0.4, 0.04), "backward": (0.3, 0.02), "both": (0.2, 0.01)}
    return {name: _block(scale * whole, scale * exposed) for name, (whole, exposed) in times.items()}


def test_ratios_are_taken_within_a_round() -> None:
    """The second round's machine was twice as slow: a ratio of medians over unlike rounds would show it."""
    rounds = [_round(1), _round(2), _round(1)]
    rounds[0]["both"]["iteration"] = 0.1
    results = summarize(rounds, rate=1e9)
    assert [results[name]["iteration_ratio"] for name in CONFIGURATIONS] == pytest.approx([1, 0.75, 0.5])
    assert [results[name]["iteration"] for name in CONFIGURATIONS] == pytest.approx([0.4, 0.3, 0.2])
    gather = results["both"]["collectives"]["all_gather"]
    assert gather["exposed_ratio"] == pytest.approx(0.25)
    assert gather["bytes_over_rate"] == pytest.approx(0.008)
    assert (gather["calls"], gather["bytes"]) == (3, 1_000_000)
    text = table(results)
    assert "| and parameters behind the next forward | 200 | 10 | 20 | 30 | 0.50 |" in text
    assert "| all_gather: no overlap | 8.0 | 50.0 | 40.0 | 1.00 | 0% |" in text
    assert gather["hidden"] == 0
    assert summarize(rounds, rate=1e8)["both"]["collectives"]["all_gather"]["hidden"] == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "100"], "--hidden must be a multiple of 64"),
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--hosts", "1"], "--hosts must be >= 2, got 1"),
        (["--rate", "1"], "rate must be >= 1e5"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_under_torchrun_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On every rank, at once: each would start hosts of its own."""
    launch = [interpreter.python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*launch, "sharded_lamb", "bench", "overlap"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "run it without torchrun (WORLD_SIZE is 2)" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([]) == 2
    assert "run it without torchrun (WORLD_SIZE is 2)" in capsys.readouterr().err


def _order(rank: int, name: str) -> tuple[int, int, int, int]:
    """Counts in the last of three iterations: exchanges, exchanges launched before the last gradient, gathers of the
    previous step, gathers whose wait is in forward."""
    small = {"layers": 1, "hidden": 64, "vocabulary": 64, "batch": 1, "sequence": 8, "bucket_mb": 0.05}
    configured = Configured(name, Work(**small, rounds=1, iterations=1, seed=0))
    timeline, gradients = Timeline(), [0.0]
    for p in configured.model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: gradients.append(timeline.clock()))
    with configured.optimizer.record(timeline):
        for _ in range(3):
            configured.iterate(timeline)
        configured.optimizer.synchronize()

    def of(kind: str, lane: str) -> list[Span]:
        return [span for span in timeline.spans if (span.name, span.lane) == (kind, lane)]

    forward, backward = of("forward", "marks")[-1], of("backward", "marks")[-1]
    launched = [span.start for span in of("reduce_scatter", "wire") if span.start > backward.start]
    gathers = [span for span in of("all_gather", "exposed") if span.end < backward.start]
    waited = [span for span in gathers if forward.start <= span.start and span.end <= forward.end]
    early = [start for start in launched if start < gradients[-1]]
    return len(launched), len(early), len(gathers) // 2, len(waited)


def test_configurations_overlap_what_they_say() -> None:
    pytest.importorskip("transformers")
    for buckets, early, gathers, waited in run_ranks(2, _order, "none"):
        assert buckets == gathers > 2
        assert (early, waited) == (0, 0)
    for buckets, early, gathers, waited in run_ranks(2, _order, "backward"):
        assert buckets == gathers
        assert early > 0
        assert waited == 0
    for buckets, early, gathers, waited in run_ranks(2, _order, "both"):
        assert buckets == gathers == waited
        assert early > 0


def test_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    try:
        with network(1, rate=1e9):
            pass
    except NetworkError as error:
        pytest.skip(str(error))
    small = ["--layers=1", "--hidden=64", "--vocabulary=64", "--batch=1", "--sequence=8", "--bucket-mb=0.05"]
    outputs = [f"--json={tmp_path}/r.json", f"--png={tmp_path}/r.png", f"--traces={tmp_path}/traces"]
    monkeypatch.setattr("sys.executable", interpreter.python())
    assert main([*small, "--rounds=2", "--iterations=2", *outputs]) == 0
    assert "final weights of the three are bit-equal" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    assert {"command", "date", "machine", "rate", "summary", "same_weights"} <= results.keys()
    sent = {
        name: {kind: (row["calls"], row["bytes"]) for kind, row in of["collectives"].items()}
        for name, of in results["summary"].items()
    }
    assert sent["none"] == sent["backward"] == sent["both"]
    assert sent["none"]["all_gather"] == sent["none"]["reduce_scatter"]
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    for name in CONFIGURATIONS:
        trace = json.loads((tmp_path / "traces" / f"{name}.trace.json").read_text())["traceEvents"]
        assert {event["pid"] for event in trace} == {0, 1}
        assert {"forward", "backward", "step", "all_gather"} <= {event["name"] for event in trace}
