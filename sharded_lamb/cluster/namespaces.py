"""Several hosts on one machine, joined by links of a given rate: network namespaces and ``tc tbf``. Linux, as root.

    with network(2, rate=1e9) as hosts:
        run_together([Task(host, ["hostname"], {}) for host in hosts], timeout=60)

Every host has one interface, "wire", to a bridge in a namespace of its own; both ends of the link are limited, so a
host sends and receives at ``rate`` at once, as with a network card. The machine's own namespace stays untouched, and
the new ones have no names: each lives as long as a process that waits in it, which ends with this one even if that is
killed. Processes on "hosts" share files, memory, cores and clock.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "wire"
MAX_HOSTS = 200
"""Addresses are 10.111.0.1 … in one /24."""

_END_TIMEOUT = 5.0
_SWEEPS = 20
"""A process that forks during one sweep is found by the next."""
_BURST_SECONDS = 1e-3
_SMALLEST_BURST = 2 * 65536
"""Bytes: a segment of the kernel's offload is up to 64 KiB, and one larger than the burst is split again."""
_QUEUE = "50ms"


class NetworkError(OSError):
    """This machine cannot make such a network; the message names what is missing."""


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    index: int
    holder: int  # pid of the process that keeps it
    address: str  # of its interface "wire"

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` on this host; the kernel kills it when its parent ends."""
        return ["setpriv", "--pdeathsig", "KILL", *_inside(self.holder), *command]

    def cut(self) -> None:
        """Pull its cable: packets no longer arrive, and neither side gets an error."""
        _run([*_inside(self.holder), "ip", "link", "set", INTERFACE, "down"])

    def mend(self) -> None:
        """Plug its cable in again."""
        _run([*_inside(self.holder), "ip", "link", "set", INTERFACE, "up"])

    def links(self) -> list[dict[str, Any]]:
        """Counters of its outgoing limit, from ``tc -s -j``: bytes, packets, overlimits, drops."""
        text = _run([*_inside(self.holder), "tc", "-s", "-j", "qdisc", "show", "dev", INTERFACE])
        counters: list[dict[str, Any]] = json.loads(text)
        return counters


@dataclass(frozen=True)
class Task:
    """One process on one host."""

    host: Host
    command: Sequence[str]
    environment: Mapping[str, str]  # added to this process's own, without torchrun's part


def one_rank_a_host(hosts: Sequence[Host], command: Sequence[str], *, port: int = 29500) -> list[Task]:
    """``command`` on every host as one rank of a process group, with the environment that torchrun would set.

    torchrun itself: ``Task(host, ["torchrun", "--nnodes", …, "--master-addr", hosts[0].address, …], sockets())``.
    """
    ranks = {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port)}
    return [
        Task(host, command, {**sockets(), **ranks, "RANK": str(host.index), "LOCAL_RANK": "0"})
        for host in hosts
    ]


def sockets() -> dict[str, str]:
    """The environment that puts gloo and NCCL on the limited link."""
    return {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE}


@contextmanager
def network(count: int, *, rate: float) -> Iterator[list[Host]]:
    """``count`` hosts, each linked at ``rate`` bits a second. On exit it removes them and kills processes on them.

    Raises:
        ValueError: ``count`` or ``rate`` is out of range.
        NetworkError: this machine cannot make it; names the reason.
    """
    if not 1 <= count <= MAX_HOSTS:
        raise ValueError(f"count must be 1 to {MAX_HOSTS} hosts, got {count!r}")
    if not rate >= 1e5:
        raise ValueError(f"rate must be >= 1e5 bits a second (1e9 is 1 Gbit/s), got {rate!r}")
    check_possible()
    holders: list[subprocess.Popen[bytes]] = []
    try:
        switch = _new_namespace(holders)
        _run([*_inside(switch), "ip", "link", "add", "bridge", "type", "bridge"])
        _run([*_inside(switch), "ip", "link", "set", "bridge", "up"])
        hosts = [Host(index, _new_namespace(holders), f"10.111.0.{index + 1}") for index in range(count)]
        for host in hosts:
            _link(switch, host, rate)
        yield hosts
    finally:
        _remove(holders)


def check_possible() -> None:
    """Check that `network` can work here.

    Raises:
        NetworkError: it cannot; names the remedy.
    """
    if sys.platform != "linux":
        raise NetworkError(f"network namespaces are Linux's, and this is {sys.platform}")
    packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
    for tool, package in {**packages, "setpriv": "util-linux"}.items():
        if shutil.which(tool) is None:
            raise NetworkError(f"{tool!r} is not installed: apt-get install {package}")
    if os.geteuid() != 0:
        raise NetworkError(
            "network namespaces need root: run this with sudo, or in a container with --privileged"
        )


def _inside(holder: int) -> list[str]:
    return ["nsenter", "--net", "--target", str(holder), "--"]


def _new_namespace(holders: list[subprocess.Popen[bytes]]) -> int:
    """The pid of a process in a namespace of its own. It ends with its input, which ends with this process."""
    command = ["unshare", "--net", "cat"]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    holders.append(holder)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # it failed: stdout is empty
        holder.stdin.write(b"\n")
        holder.stdin.flush()
    if holder.stdout.readline() != b"\n":  # it echoes once the namespace exists
        problem = holder.stderr.read().decode().strip()
        raise NetworkError(
            f"a network namespace cannot be made: {problem} (in a container: it needs --privileged, or "
            f"--cap-add SYS_ADMIN --cap-add NET_ADMIN)"
        )
    _run([*_inside(holder.pid), "ip", "link", "set", "lo", "up"])
    return holder.pid


def _link(switch: int, host: Host, rate: float) -> None:
    """Make a pair of interfaces between host and bridge, limited at both ends."""
    port = f"port{host.index}"
    ends = ["ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(host.holder)]
    _run([*_inside(switch), *ends])
    _run([*_inside(switch), "ip", "link", "set", port, "master", "bridge", "up"])
    _run([*_inside(host.holder), "ip", "address", "add", f"{host.address}/24", "dev", INTERFACE])
    _run([*_inside(host.holder), "ip", "link", "set", INTERFACE, "up"])
    burst = max(_SMALLEST_BURST, int(rate / 8 * _BURST_SECONDS))
    limit = ["root", "tbf", "rate", f"{rate:.0f}bit", "burst", str(burst), "latency", _QUEUE]
    for holder, device in ((switch, port), (host.holder, INTERFACE)):
        _run([*_inside(holder), "tc", "qdisc", "add", "dev", device, *limit])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)!r} failed: {done.stderr.strip()}")
    return done.stdout


def _remove(holders: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the processes in the namespaces; these and their interfaces end with their last process."""
    spaces = {space for holder in holders if (space := _namespace(holder.pid)) is not None}
    spaces.discard(_namespace(os.getpid()))  # the namespace of a holder without one
    for _ in range(_SWEEPS):
        inside = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        inside = [process for process in inside if _namespace(process) in spaces]
        for process in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if not inside:
            break
    for holder in holders:
        holder.kill()
        holder.communicate()


def _namespace(process: int) -> str | None:
    """The process's network namespace; None if it has ended."""
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:
        return None


def run_together(tasks: Sequence[Task], *, timeout: float) -> list[int]:
    """Run all tasks at once and wait for them; the first that fails ends the others. They share this process's output.

    Returns:
        exit codes by task; negative for tasks that a failure ended.

    Raises:
        TimeoutError: tasks still ran after ``timeout`` seconds; they are killed.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for task in tasks:
            environment = {**_without_launcher(), **task.environment}
            command = task.host.command(task.command)
            started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        until = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            if time.monotonic() > until:
                late = [index for index, code in enumerate(codes) if code is None]
                raise TimeoutError(f"tasks {late} were still running after {timeout:g} s")
            time.sleep(0.05)
    finally:
        for process in started:
            _end(process)
    return [process.returncode for process in started]


def _without_launcher() -> dict[str, str]:
    """This process's environment without torchrun's part, with which ranks would look for torchrun's store."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End its session: SIGTERM first, so that a launcher can end its workers."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT)
