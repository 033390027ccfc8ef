"""Network namespaces as hosts: they exchange data, their link is limited, and none of them remains."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_lamb.cluster import namespaces
from sharded_lamb.cluster.namespaces import Host, NetworkError, Task, network, one_rank_a_host, run_together

RATE = 1e8
PAYLOAD = 4_000_000

SENDER = """
import socket, sys
with socket.create_connection((sys.argv[1], 7001), timeout=20) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
"""
RECEIVER = """
import socket, sys
with socket.create_server((sys.argv[1], 7001)) as server:
    server.settimeout(20)
    peer, _ = server.accept()
    count = 0
    while part := peer.recv(65536):
        count += len(part)
sys.exit(0 if count == int(sys.argv[2]) else 4)
"""
RETRY = f"""
import time
for attempt in range(100):
    try:
        exec({SENDER!r})
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
else:
    sys.exit(5)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    _need_networks()
    with network(2, rate=RATE) as made:
        yield made


def _need_networks() -> None:
    try:
        with network(1, rate=RATE):
            pass
    except NetworkError as error:
        pytest.skip(str(error))


def _space(process: int) -> str:
    return os.readlink(f"/proc/{process}/ns/net")


def _processes_in(spaces: set[str]) -> list[str]:
    results = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if _space(int(path.name)) in spaces:
                results.append(path.name)
        except OSError:
            continue
    return results


def test_two_hosts_talk_and_the_limit_holds_bytes_back(hosts: list[Host]) -> None:
    before = [host.links()[0] for host in hosts]
    first, second = hosts
    tasks = [
        Task(first, [sys.executable, "-c", RECEIVER, first.address, str(PAYLOAD)], {}),
        Task(second, [sys.executable, "-c", RETRY, first.address, str(PAYLOAD)], {}),
    ]
    assert run_together(tasks, timeout=30) == [0, 0]
    for limit, was, host in zip([host.links()[0] for host in hosts], before, hosts, strict=True):
        assert limit["kind"] == "tbf"
        assert limit["options"]["rate"] == RATE / 8
        sent, held_back = limit["bytes"] - was["bytes"], limit["overlimits"] - was["overlimits"]
        if host is second:
            assert PAYLOAD < sent < 1.2 * PAYLOAD  # headers; what was lost goes again
            assert held_back > 10
        else:
            assert 0 < sent < 0.2 * PAYLOAD  # acknowledgements


def test_hosts_are_apart_from_the_machine_and_each_other(hosts: list[Host]) -> None:
    assert len({_space(os.getpid()), *(_space(host.holder) for host in hosts)}) == 3
    assert "wire" not in os.listdir("/sys/class/net")


def test_one_that_fails_ends_the_others(hosts: list[Host]) -> None:
    fails = Task(hosts[0], ["sh", "-c", "exit 3"], {})
    codes = run_together([Task(hosts[1], ["sleep", "60"], {}), fails], timeout=30)
    assert codes == [-signal.SIGTERM, 3]


def test_those_that_hang_are_killed(hosts: list[Host]) -> None:
    with pytest.raises(TimeoutError, match=r"tasks \[1\] were still running after 0.5 s"):
        run_together([Task(hosts[0], ["true"], {}), Task(hosts[1], ["sleep", "60"], {})], timeout=0.5)
    assert len(_processes_in({_space(hosts[1].holder)})) == 1  # the holder


def test_a_rank_on_every_host_knows_where_the_first_is(hosts: list[Host]) -> None:
    check = """
        test "$RANK" = "$WANTED" -a "$WORLD_SIZE" = 2 -a "$MASTER_ADDR:$MASTER_PORT" = 10.111.0.1:29511 -a \
            "$GLOO_SOCKET_IFNAME" = wire -a -n "$PATH"
    """
    tasks = one_rank_a_host(hosts, ["sh", "-c", check], port=29511)
    wanted = [
        Task(task.host, task.command, {**task.environment, "WANTED": str(index)})
        for index, task in enumerate(tasks)
    ]
    assert run_together(wanted, timeout=20) == [0, 0]


def test_ranks_do_not_take_the_launcher_for_theirs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With TORCHELASTIC_USE_AGENT_STORE a first rank waits for a store that does not exist."""
    monkeypatch.setattr(Host, "command", lambda self, command: list(command))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("OF_THE_USER", "kept")
    assert run_together([Task(Host(0, 0, "127.0.0.1"), ["env"], {"OF_THE_TASK": "set"})], timeout=20) == [0]
    results = capfd.readouterr().out
    assert "TORCHELASTIC" not in results
    assert {"OF_THE_USER=kept", "OF_THE_TASK=set"} <= set(results.splitlines())


def test_nothing_stays_when_the_body_raises() -> None:
    _need_networks()
    links, spaces, left = os.listdir("/sys/class/net"), set(), []

    def body() -> None:
        with network(2, rate=RATE) as made:
            spaces.update(_space(host.holder) for host in made)
            command = made[0].command(["sh", "-c", "echo; exec sleep 60"])
            left.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            assert left[0].stdout.read(1) == b"\n"  # it is on the host
            raise KeyError

    with pytest.raises(KeyError):
        body()
    with left[0]:
        assert left[0].wait(timeout=10) == -signal.SIGKILL
    assert len(spaces) == 2
    assert _processes_in(spaces) == []
    assert os.listdir("/sys/class/net") == links


def test_nothing_stays_when_the_process_is_killed() -> None:
    _need_networks()
    code = """
import os, subprocess, sys, time
from sharded_lamb.cluster.namespaces import network
with network(2, rate=1e8) as hosts:
    subprocess.Popen(hosts[1].command(["sleep", "60"]))
    print(*(os.readlink(f"/proc/{host.holder}/ns/net") for host in hosts), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        spaces = set(maker.stdout.readline().split())
        assert len(spaces) == 2
        maker.kill()
    for _ in range(100):  # holders read the end of their input, and end
        if not _processes_in(spaces):
            break
        time.sleep(0.1)
    assert _processes_in(spaces) == []


@pytest.mark.parametrize(
    ("count", "rate", "message"),
    [
        (0, 1e9, "count must be 1 to 200 hosts, got 0"),
        (201, 1e9, "count must be 1 to 200 hosts, got 201"),
        (2, 1.0, "rate must be >= 1e5 bits a second"),
        (2, float("nan"), "rate must be >= 1e5 bits a second"),
    ],
)
def test_wrong_networks_are_refused(count: int, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message), network(count, rate=rate):
        pass


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    with (
        pytest.raises(NetworkError, match="'tc' is not installed: apt-get install iproute2"),
        network(2, rate=1e9),
    ):
        pass
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="need root: run this with sudo"), network(2, rate=1e9):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NetworkError, match="Linux's"):
        namespaces.check_possible()
