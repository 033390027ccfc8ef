"""A preflight names the hosts that are not as the others, and passes where all are."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sharded_lamb.plan.machine import PRESETS, Machine
from sharded_lamb.preflight import facts, network
from sharded_lamb.preflight.facts import Facts
from sharded_lamb.preflight.network import Speeds

ROOT = Path(__file__).resolve().parents[2]


def cluster(hosts: int, each: int = 8) -> list[Facts]:
    same = {"code": "c0de", "config a.yaml": "c0nf", "data d": "da7a"}
    return [Facts(rank, f"node{rank // each}", same, 10**12) for rank in range(hosts * each)]


def test_512_ranks_that_agree() -> None:
    assert facts.complaints(cluster(64), 10**9) == []


@pytest.mark.parametrize("name", ["code", "config a.yaml", "data d"])
def test_a_host_that_differs_is_named_with_its_ranks(name: str) -> None:
    found = cluster(64)
    for rank in range(88, 96):
        found[rank] = replace(found[rank], same={**found[rank].same, name: "0dd"})
    (line,) = facts.complaints(found, 10**9)
    assert line.startswith(f"{name} differs: host node11 (ranks 88-95) has 0dd, 504 ranks have ")


def test_full_disks_and_what_cannot_be_read() -> None:
    found = cluster(4)
    found[9] = replace(found[9], free=5 * 10**8)
    found[17] = replace(found[17], problem="/data: Permission denied")
    found[30] = replace(found[30], problem="/data: Permission denied")
    assert facts.complaints(found, 10**9) == [
        "host node2 (rank 17), host node3 (rank 30) cannot use /data: Permission denied",
        "host node1 (rank 9) has 0.5 GB free, 1.0 are needed",
    ]


def test_many_hosts_are_counted() -> None:
    found = [replace(one, same={"code": str(one.rank // 8)}) for one in cluster(40)]
    lines = facts.complaints(found, 0)
    assert len(lines) == 39
    odd = [replace(one, same={"code": "x" if one.rank >= 168 else "y"}) for one in cluster(40)]
    (line,) = facts.complaints(odd, 0)
    assert "and 11 more hosts has x, 168 ranks have y" in line


def test_slow_links_are_named() -> None:
    hosts = [f"node{rank // 4}" for rank in range(16)]
    links = [1e9] * 16
    links[7] = 1e8  # from node1 to node2; its like are between other hosts
    for rank in (3, 11, 15):
        links[rank] = 4e8
    speeds = Speeds(0.01, 10**6, tuple(links))
    (line,) = network.complaints(speeds, hosts, None, at_least=0.5)
    assert line == (
        "from host node1 (rank 7) to host node2 (rank 8) 100 MB/s arrive, over links like it 400 are usual"
    )
    assert network.complaints(replace(speeds, links=(1e9,) * 16), hosts, None, at_least=0.5) == []


def test_a_network_below_the_plan() -> None:
    machine = Machine(1e11, 1e10, 1e9, 0.0, 0.0, 1)
    hosts = ["a", "b"]
    planned = 2 * 0.5e6 / 1e9  # a reduce-scatter and an all-gather of half of it each
    slow, right = (Speeds(seconds, 10**6, (1e9, 1e9)) for seconds in (planned / 0.4, planned / 0.6))
    (line,) = network.complaints(slow, hosts, machine, at_least=0.5)
    assert line == "an all-reduce of 1 MB takes 2.5 ms over 2 ranks, and the plan says 1.0 ms"
    assert network.complaints(right, hosts, machine, at_least=0.5) == []


@pytest.mark.parametrize("machine", [*PRESETS.values(), Machine(1e10, 1e9, 1.25e8, 1e-4, 1e-4, 8)])
def test_512_ranks_take_less_than_a_minute_by_their_own_count(machine: Machine) -> None:
    """The last: 1 Gbit/s and 100 us a hop."""
    assert network.seconds(machine, 512, 32 * 10**6) < 60


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([7, 6], "6-7")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert facts.spans(numbers) == text


def test_what_a_rank_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.bin").write_bytes(b"1234")
    (tmp_path / "data" / "manifest.json").write_text("{}")
    config = tmp_path / "config.yaml"
    config.write_text("a: 1")

    def collected() -> dict[str, str]:
        found = facts.collect(0, torch.device("cpu"), [config], [tmp_path / "data"], tmp_path)
        assert found.problem is None
        assert found.free
        return dict(found.same)

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
    missing = facts.collect(0, torch.device("cpu"), [tmp_path / "none"], [], None)
    assert missing.problem == f"{tmp_path / 'none'}: No such file or directory"


# -- for real ------------------------------------------------------------------------------------------------------


def call(*arguments: str, ranks: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sharded_lamb", "preflight", "--device", "cpu", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_all_is_well_on_two_ranks(tmp_path: Path) -> None:
    writes = tmp_path / "run"
    done = call(
        "--config", "pyproject.toml", "--writes", str(writes), "--mb", "1", "--json", str(tmp_path / "j")
    )
    assert done.returncode == 0, done.stderr
    assert "preflight: 2 ranks on 1 hosts" in done.stdout
    assert "ok in " in done.stdout
    assert list(writes.iterdir()) == []
    found = json.loads((tmp_path / "j").read_text())
    assert [one["rank"] for one in found["ranks"]] == [0, 1]
    assert all(link > 0 for link in found["network"]["links"])
    assert found["problems"] == []


def test_problems_fail_with_their_names() -> None:
    failed = call("--config", "nowhere.yaml", "--mb", "1", "--gbits", "1000000", "--at-least", "0.9")
    assert failed.returncode != 0
    assert "(ranks 0-1) cannot use nowhere.yaml: No such file" in failed.stderr
    failed = call("--world-size", "3", "--mb", "0")
    assert failed.returncode != 0
    assert "there are 2 ranks and 3 were expected" in failed.stderr


def test_ranks_that_do_not_come_are_named() -> None:
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "LOCAL_RANK": "0",
    }
    with_port = {**alone, "MASTER_PORT": str(_free_port())}
    failed = call("--timeout-s", "1", ranks=0, **with_port)
    assert failed.returncode != 0
    assert "ranks 1-2 did not come in 1 s" in failed.stderr, failed.stderr


def test_a_store_that_is_not_there_is_named() -> None:
    there = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    failed = call("--timeout-s", "1", ranks=0, **there)
    assert failed.returncode != 0
    assert "does not reach the store at 127.0.0.1:" in failed.stderr
    assert "Traceback" not in failed.stderr


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_one_process_needs_no_launcher() -> None:
    done = call(ranks=0)
    assert done.returncode == 0, done.stderr
    assert "preflight: 1 ranks on 1 hosts" in done.stdout
