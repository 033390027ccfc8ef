"""`sharded-lamb gpu-check`: what a CPU can run of it, and what becomes of its results."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from sharded_lamb.__main__ import main
from sharded_lamb.bench.workload import Workload
from sharded_lamb.gpu_check import battery, command, integrations, processes, ranks, recipe, timing
from sharded_lamb.gpu_check.battery import EQUAL, Findings, LeftOut, Section, Setting, difference
from sharded_lamb.gpu_check.training import GivenRun, backward, synthetic
from tests.harness import run_ranks

CPU = Setting(torch.device("cpu"), "torch", time.monotonic() + 3600)


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = json.loads((folder / "gpu_check.json").read_text())["sections"]
    return sections


def rehearse(folder: Path, *arguments: str) -> int:
    return main(["gpu-check", "--rehearse", "--out", str(folder), *arguments])


def rows_of_forks(module: str, device: torch.device, world_size: int, timeout: float) -> list[dict[str, Any]]:
    """`processes.rows_of` in workers that have imported torch, for `ranks`."""
    if module != ranks.__name__:
        raise LeftOut("not importable: ModuleNotFoundError: No module named 'deepspeed'")
    return run_ranks(world_size, rows_of_parts, timeout=timeout)[0]  # type: ignore[no-any-return]


def rows_of_parts(_: int) -> list[dict[str, Any]]:
    return list(ranks.rows(CPU))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """(exit code, folder) of a whole rehearsal, without what imports other frameworks for seconds."""

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'accelerate'")

    folder = tmp_path_factory.mktemp("gpu-check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrations, "_accelerate", missing)
        patch.setattr(integrations, "_trainer", missing)
        patch.setattr(processes, "rows_of", rows_of_forks)
        patch.setattr(
            "sharded_lamb.recipes.training.ranks.threads_per_rank", lambda: 1
        )  # two beside other tests spin
        yield rehearse(folder), folder


def test_every_section_that_a_cpu_can_run_has_a_result(rehearsed: tuple[int, Path]) -> None:
    code, folder = rehearsed
    results = results_in(folder)
    assert code == 0
    assert list(results) == [section.name for section in command.SECTIONS]
    for section in command.SECTIONS:
        entry = results[section.name]
        if section.needs_gpu or section.name in ("deepspeed", "outside"):
            assert entry["status"] == "left out", section.name
        else:
            assert entry["status"] == ("passed" if section.is_check else "measured"), (section.name, entry)


def test_every_check_has_verdicts(rehearsed: tuple[int, Path]) -> None:
    for name, entry in results_in(rehearsed[1]).items():
        if entry["is_check"] and entry["status"] != "left out":
            verdicts = [row["verdict"] for row in entry["rows"].values() if isinstance(row, dict)]
            assert verdicts, name
            assert set(verdicts) == {"pass"}, name
    bits = results_in(rehearsed[1])["bits"]["rows"]
    assert {row["found"] for row in bits.values()} == {EQUAL}


def test_ranks_make_every_check(rehearsed: tuple[int, Path]) -> None:
    rows = results_in(rehearsed[1])["ranks"]["rows"]
    assert list(rows) == [f"{part}, ranks: 2" for part in (*ranks.PARTS, "parts") if part != "graph"]
    bits = rows["bits, ranks: 2"]["found"].values()
    assert {row["found"] for row in bits} == {EQUAL}


def differing(_: Setting, found: Findings) -> None:
    found.equal("row", [torch.ones(3)], [torch.ones(3) + ranks.rank()])


def rows_that_differ(_: int) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "PARTS", {"differing": differing})
        return list(ranks.rows(CPU))


def test_a_difference_on_the_last_rank_is_a_failure() -> None:
    (row,) = run_ranks(2, rows_that_differ)[0]
    assert (row["checks"], row["failures"]) == (1, 1)
    assert row["found"][0].startswith("rank 1: row: 1 of 1 tensors differ")


def test_what_is_not_importable_is_left_out_by_name(rehearsed: tuple[int, Path]) -> None:
    results = results_in(rehearsed[1])
    assert "No module named 'deepspeed'" in results["deepspeed"]["result"]
    assert "No module named 'accelerate'" in results["outside"]["result"]
    assert "not importable" in results["step-time"]["rows"]["apex FusedLAMB"]


def test_the_table_has_a_line_a_section(rehearsed: tuple[int, Path]) -> None:
    lines = (rehearsed[1] / "gpu_check.md").read_text().splitlines()
    assert lines[0].startswith("rehearsal on a CPU")
    assert len(lines) == 4 + len(command.SECTIONS)
    for line, section in zip(lines[4:], command.SECTIONS, strict=True):
        assert line.startswith(f"| {section.title} | ")
        assert line.count("|") == 3


def sections(monkeypatch: pytest.MonkeyPatch, **runs: Callable[[Setting, Findings], str]) -> None:
    """Replace the battery's sections; those named m… measure, the others check."""
    replaced = tuple(
        Section(name, f"The {name}", 1.0, run, is_check=not name.startswith("m"))
        for name, run in runs.items()
    )
    monkeypatch.setattr(command, "SECTIONS", replaced)


def passes(_: Setting, found: Findings) -> str:
    found.check("row", True, "as claimed")
    return "as claimed"


def fails(_: Setting, found: Findings) -> str:
    found.equal("row", [torch.ones(3)], [torch.ones(3) + 1e-6])
    return "as claimed"


def raises(_: Setting, found: Findings) -> str:
    found.check("row before", True, "as claimed")
    raise RuntimeError("out | of order")


def test_results_are_stored_after_each_section_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks(_: Setting, found: Findings) -> str:
        assert results_in(tmp_path)["first"]["status"] == "passed"
        assert "| The first | as claimed |" in (tmp_path / "gpu_check.md").read_text()
        found.check("before", True, 1)
        entry = results_in(tmp_path)["second"]
        assert entry["status"] == "running"
        assert list(entry["rows"]) == ["before"]
        return "seen"

    sections(monkeypatch, first=passes, second=looks)
    assert rehearse(tmp_path) == 0
    assert results_in(tmp_path)["second"]["status"] == "passed"


def test_failures_are_recorded_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections(monkeypatch, failing=fails, raising=raises, passing=passes)
    assert rehearse(tmp_path) == 1
    results = results_in(tmp_path)
    assert [results[name]["status"] for name in ("failing", "raising", "passing")] == [
        "failed",
        "error",
        "passed",
    ]
    assert results["failing"]["result"].startswith("row: 1 of 1 tensors differ in 3 elements")
    assert results["raising"]["result"] == "RuntimeError: out | of order"
    assert list(results["raising"]["rows"]) == ["row before"]
    assert (
        "| The raising | **error**: RuntimeError: out \\| of order |"
        in (tmp_path / "gpu_check.md").read_text()
    )


@pytest.mark.parametrize(("name", "code"), [("checks", 1), ("measures", 0)])
def test_only_checks_decide_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    sections(monkeypatch, **{name: raises})
    assert rehearse(tmp_path) == code


def test_a_check_that_checks_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections(monkeypatch, empty=lambda *_: "fine")
    assert rehearse(tmp_path) == 1
    assert results_in(tmp_path)["empty"]["result"] == "nothing was checked"


def test_a_later_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def counted(name: str, run: Callable[[Setting, Findings], str]) -> Callable[[Setting, Findings], str]:
        def counting(setting: Setting, found: Findings) -> str:
            runs.append(name)
            return run(setting, found)

        return counting

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    def absent(*_: object) -> str:
        raise LeftOut("not importable")

    sections(
        monkeypatch,
        good=counted("good", passes),
        bad=counted("bad", fails),
        absent=counted("absent", absent),
        killed=counted("killed", killed),
    )
    assert rehearse(tmp_path) == 130
    assert results_in(tmp_path)["killed"]["status"] == "running"
    sections(monkeypatch, **{name: counted(name, passes) for name in ("good", "bad", "absent", "killed")})
    runs.clear()
    assert rehearse(tmp_path) == 1  # bad still has its verdict
    assert runs == ["absent", "killed"]
    runs.clear()
    assert rehearse(tmp_path, "bad") == 0
    assert runs == ["bad"]


def test_the_verdict_on_some_sections_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections(monkeypatch, first=passes, second=passes)
    assert rehearse(tmp_path, "first") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "PASS (1 of 2 sections); without a result: second"
    assert rehearse(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "PASS"


def test_a_section_that_needs_more_than_is_left_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections(monkeypatch, first=passes)
    assert rehearse(tmp_path, "--budget", "0.5") == 0
    entry = results_in(tmp_path)["first"]
    assert entry["status"] == "left out"
    assert entry["result"].endswith("of the budget are left, it needs 1 s")


def test_without_a_gpu_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check", "--out", str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sharded-lamb gpu-check: no GPU here; --rehearse runs what a CPU can"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nothing",), "unknown section 'nothing'; expected one of first"), (("--budget", "0"), "must be > 0")],
)
def test_wrong_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    sections(monkeypatch, first=passes)
    assert rehearse(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_results_of_another_device_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections(monkeypatch, first=passes)
    battery.Results(tmp_path, "another", {}).store(command.SECTIONS[0], "passed", "")
    assert rehearse(tmp_path) == 2
    assert "holds results of another, not of rehearsal on a CPU" in capsys.readouterr().err


def test_the_list_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [section.name for section in command.SECTIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("ours", "expected", "found"),
    [
        ([1.0, 2.0], [1.0, 2.0], EQUAL),
        ([1.0, 2.0], [1.0, 2.0000002], "1 of 1 tensors differ in 1 elements"),
        ([1.0, float("nan")], [1.0, 2.0], "1 of 1 tensors differ in 1 elements"),
        ([1.0], [1.0, 2.0], "shapes differ"),
    ],
)
def test_equal_is_to_the_bit(ours: list[float], expected: list[float], found: str) -> None:
    assert difference([torch.tensor(ours)], [torch.tensor(expected)]).startswith(found)
    assert difference([], [torch.ones(1)]) == "0 tensors, expected 1"


@pytest.mark.parametrize(("other", "verdict"), [(1 + 1e-5, "pass"), (1.1, "FAIL"), (float("nan"), "FAIL")])
def test_within_is_norm_wise_and_nan_is_not_within(other: float, verdict: str) -> None:
    found = Findings()
    found.within("row", [torch.ones(4), torch.full((4,), other)], [torch.ones(4), torch.ones(4)], 1e-3)
    assert found.rows["row"]["verdict"] == verdict


def test_a_run_with_another_learning_result_is_not_equal() -> None:
    one, other = (GivenRun(1, steps=steps).trained(CPU.device, "torch") for steps in (1, 2))
    assert difference(one, other) != EQUAL


def test_gradients_are_kept_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    gradient = Workload.gradient

    def recorded(self: Workload, param: int, step: int) -> torch.Tensor:
        fresh = gradient(self, param, step)
        made.append(fresh.data_ptr())
        return fresh

    monkeypatch.setattr(Workload, "gradient", recorded)
    model = synthetic(CPU)
    backward(model)
    kept = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None and p.numel()]
    assert len(kept) == sum(1 for p in model.parameters() if p.numel())
    assert set(kept) <= set(made)


def test_annotations_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, device: DeviceType, microseconds: float, annotated: bool = False) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotated)

    events = [
        event("apply", DeviceType.CUDA, 2000.0),
        event("apply", DeviceType.CUDA, 1000.0),
        event("multi_tensor_apply_kernel", DeviceType.CUDA, 500.0),
        event("Optimizer.step#ShardedLamb.step", DeviceType.CUDA, 9000.0),
        event("pass 1", DeviceType.CUDA, 9000.0, annotated=True),
        event("cudaLaunchKernel", DeviceType.CPU, 9000.0),
    ]

    class Profile:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(timing, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    operations = timing.device_operations(lambda: None)
    assert timing.most_expensive(operations) == [("apply", 2, 3.0), ("multi_tensor_apply_kernel", 1, 0.5)]
    assert recipe._by_kind(operations) == {"optimizer": (2, 3.0), "foreach": (1, 0.5)}


def test_a_way_to_train_that_fails_is_a_failed_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharded_lamb.bert.padding import PaddedLosses

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(PaddedLosses, "_hidden", broken)
    found = Findings()
    assert "tokens/s" in recipe.bert(CPU, found)
    (failure,) = found.failures
    assert failure.endswith("padded: RuntimeError: no kernel")
    assert len([row for row in found.rows.values() if "tokens/s" in row]) == len(recipe.REHEARSED) - 1
