"""A preflight names the hosts that are not as the others, and passes where all are."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sharded_lamb.__main__ import main
from sharded_lamb.plan.machine import PRESETS, Machine
from sharded_lamb.preflight import network, rank_report
from sharded_lamb.preflight.network import Speeds
from sharded_lamb.preflight.rank_report import RankReport
from sharded_lamb.watchdog.diagnosis import rank_ranges
from tests import interpreter
from tests.forked import forked

ROOT = Path(__file__).resolve().parents[2]


def cluster(hosts: int, each: int = 8) -> list[RankReport]:
    same = {"code": "c0de", "config a.yaml": "c0nf", "data d": "da7a"}
    return [RankReport(rank, f"node{rank // each}", same, 10**12) for rank in range(hosts * each)]


def test_512_ranks_that_agree() -> None:
    assert rank_report.problems_of(cluster(64), 10**9) == []


@pytest.mark.parametrize("name", ["code", "config a.yaml", "data d"])
def test_a_host_that_differs_is_named_with_its_ranks(name: str) -> None:
    reports = cluster(64)
    for rank in range(88, 96):
        reports[rank] = replace(reports[rank], same={**reports[rank].same, name: "0dd"})
    (line,) = rank_report.problems_of(reports, 10**9)
    assert line.startswith(f"{name} differs: host node11 (ranks 88-95) has 0dd, 504 ranks have ")


def test_full_disks_and_what_cannot_be_read() -> None:
    results = cluster(4)
    results[9] = replace(results[9], free=5 * 10**8)
    results[17] = replace(results[17], problem="/data: Permission denied")
    results[30] = replace(results[30], problem="/data: Permission denied")
    assert rank_report.problems_of(results, 10**9) == [
        "host node2 (rank 17), host node3 (rank 30) cannot use /data: Permission denied",
        "host node1 (rank 9) has 0.5 GB free, 1.0 are needed",
    ]


def test_many_hosts_are_counted() -> None:
    results = [replace(one, same={"code": str(one.rank // 8)}) for one in cluster(40)]
    lines = rank_report.problems_of(results, 0)
    assert len(lines) == 39
    mismatched = [replace(one, same={"code": "x" if one.rank >= 168 else "y"}) for one in cluster(40)]
    (line,) = rank_report.problems_of(mismatched, 0)
    assert "and 11 more hosts has x, 168 ranks have y" in line


def test_slow_links_are_named() -> None:
    hosts = [f"node{rank // 4}" for rank in range(16)]
    links = [1e9] * 16
    links[7] = 1e8  # from node1 to node2; its like are between other hosts
    for rank in (3, 11, 15):
        links[rank] = 4e8
    speeds = Speeds(0.01, 10**6, tuple(links))
    (line,) = network.problems_of(speeds, hosts, None, at_least=0.5)
    assert line == (
        "from host node1 (rank 7) to host node2 (rank 8) 100 MB/s arrive, over links like it 400 are usual"
    )
    assert network.problems_of(replace(speeds, links=(1e9,) * 16), hosts, None, at_least=0.5) == []


def test_a_network_below_the_plan() -> None:
    machine = Machine(1e11, 1e10, 1e9, 0.0, 0.0, 1)
    hosts = ["a", "b"]
    planned = 2 * 0.5e6 / 1e9  # a reduce-scatter and an all-gather of half of it each
    slow, right = (Speeds(seconds, 10**6, (1e9, 1e9)) for seconds in (planned / 0.4, planned / 0.6))
    (line,) = network.problems_of(slow, hosts, machine, at_least=0.5)
    assert line == "an all-reduce of 1 MB takes 2.5 ms over 2 ranks, and the plan says 1.0 ms"
    assert network.problems_of(right, hosts, machine, at_least=0.5) == []


@pytest.mark.parametrize("machine", [*PRESETS.values(), Machine(1e10, 1e9, 1.25e8, 1e-4, 1e-4, 8)])
def test_512_ranks_take_less_than_a_minute_by_their_own_count(machine: Machine) -> None:
    """The last: 1 Gbit/s and 100 us a hop."""
    assert network.seconds(machine, 512, 32 * 10**6) < 60


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([7, 6], "6-7")]
)
def test_rank_ranges(numbers: list[int], text: str) -> None:
    assert rank_ranges(numbers) == text


def test_the_report_of_a_rank(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.bin").write_bytes(b"1234")
    (tmp_path / "data" / "manifest.json").write_text("{}")
    config = tmp_path / "config.yaml"
    config.write_text("a: 1")

    def collected() -> dict[str, str]:
        results = rank_report.collect(0, torch.device("cpu"), [config], [tmp_path / "data"], tmp_path)
        assert results.problem is None
        assert results.free
        return dict(results.same)

    before = collected()
    assert before == collected()
    config.write_text("a: 2")
    (tmp_path / "data" / "manifest.json").write_text("[]")
    after = collected()
    assert {name for name in before if before[name] != after[name]} == {
        f"config {config}",
        f"data {tmp_path / 'data'}",
    }
    (tmp_path / "data" / "shard.bin").write_bytes(b"12345")
    assert collected()[f"data {tmp_path / 'data'}"] != after[f"data {tmp_path / 'data'}"]
    missing = rank_report.collect(0, torch.device("cpu"), [tmp_path / "none"], [], None)
    assert missing.problem == f"{tmp_path / 'none'}: No such file or directory"


# -- for real ------------------------------------------------------------------------------------------------------


def preflight(*arguments: str) -> None:
    sys.exit(main(["preflight", "--device", "cpu", *arguments]))


def run_forked(
    *arguments: str, ranks: Sequence[int], world: int, port: int | None = None
) -> list[tuple[int, str]]:
    """(exit code, output) of ``ranks`` of a job of ``world`` ranks, without a launcher."""
    job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or _free_port())}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(forked(preflight, *arguments, **job, RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank in ranks
        ]
        return [process.ended() for process in processes]


def test_all_is_well_on_two_ranks(tmp_path: Path) -> None:
    writes = tmp_path / "run"
    arguments = [
        "--config",
        "pyproject.toml",
        "--writes",
        str(writes),
        "--mb",
        "1",
        "--json",
        str(tmp_path / "j"),
    ]
    launcher = [interpreter.python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "sharded_lamb", "preflight", "--device", "cpu", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "preflight: 2 ranks on 1 hosts" in done.stdout
    assert "ok in " in done.stdout
    assert list(writes.iterdir()) == []
    results = json.loads((tmp_path / "j").read_text())
    assert [one["rank"] for one in results["ranks"]] == [0, 1]
    assert all(link > 0 for link in results["network"]["links"])
    assert results["problems"] == []


def test_problems_fail_with_their_names() -> None:
    wrong = ["--config", "nowhere.yaml", "--mb", "1", "--gbits", "1000000", "--at-least", "0.9"]
    ended = run_forked(*wrong, ranks=[0, 1], world=2)
    assert [code for code, _ in ended] == [1, 1]
    assert "(ranks 0-1) cannot use nowhere.yaml: No such file" in ended[0][1]  # rank 0 reports for all
    ended = run_forked("--world-size", "3", "--mb", "0", ranks=[0, 1], world=2)
    assert [code for code, _ in ended] == [1, 1]
    assert "there are 2 ranks and 3 were expected" in "".join(output for _, output in ended)


def test_ranks_that_do_not_come_are_named() -> None:
    ((code, output),) = run_forked("--timeout-s", "1", ranks=[0], world=3)
    assert code == 1
    assert "ranks 1-2 did not come in 1 s" in output


def test_a_store_that_does_not_exist_is_named() -> None:
    with socket.socket() as held:  # bound, not listening: no other process receives the port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        ((code, output),) = run_forked("--timeout-s", "1", ranks=[1], world=2, port=port)
    assert code == 1
    assert "does not reach the store at 127.0.0.1:" in output
    assert "Traceback" not in output


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_one_process_needs_no_launcher() -> None:
    with forked(preflight) as process:
        code, output = process.ended()
    assert code == 0, output
    assert "preflight: 1 ranks on 1 hosts" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout-s", "0"], "--timeout-s must be > 0, got 0.0"),
        (["--gbits", "-1"], "--gbits must be > 0, got -1.0"),
        (["--calibrate", "missing.json"], "missing.json"),
        (["--free-gb", "5"], "--free-gb 5.0 must be a number >= 0, and needs --writes FOLDER"),
        (["--writes", ".", "--free-gb", "nan"], "--free-gb nan must be a number >= 0"),
    ],
)
def test_wrong_arguments_are_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", *arguments]) == 2
    assert message in capsys.readouterr().err
