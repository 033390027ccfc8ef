"""Programs of the battery that need processes of their own, and the rows that they print."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb.comm import devices
from sharded_lamb.gpu_check.battery import LeftOut

_MARK = "row of the battery: "


def print_row(row: Mapping[str, Any]) -> None:
    """For `rows_of`, which finds it among other output."""
    print(f"{_MARK}{json.dumps(row)}", flush=True)


def rows_of(module: str, device: torch.device, world_size: int, timeout: float) -> list[dict[str, Any]]:
    """Run ``python -m module DEVICE`` on ``world_size`` ranks that share ``device``.

    NCCL refuses two ranks of one host on one device, so that each rank is a host of its own (NCCL_HOSTID), which
    sockets connect: NCCL's semantics, streams and dtypes, at the speed of a socket.

    Returns:
        What rank 0 has printed by `print_row`, until the end, a rank's failure or ``timeout`` seconds.

    Raises:
        LeftOut: rank 0 cannot import a module.
        RuntimeError: no row; the message is the end of the failed rank's output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, device.type]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(world_size)]
        ranks = []
        try:
            for rank, log in enumerate(logs):
                with log.open("w", encoding="utf-8") as file:
                    environment = os.environ | _environment(rank, world_size, port)
                    ranks.append(
                        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                    )
            failed = _failed(ranks, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    if failed is not None:
        print(outputs[failed][-4000:], file=sys.stderr)
    rows = [
        json.loads(line.removeprefix(_MARK)) for line in outputs[0].splitlines() if line.startswith(_MARK)
    ]
    if not rows:
        lines = outputs[failed or 0].strip().splitlines() or ["no output"]
        if "No module named" in lines[-1] or "ImportError" in lines[-1]:
            raise LeftOut(f"not importable: {lines[-1]}")
        raise RuntimeError(" ".join(lines[-4:])[-400:])
    return rows


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NCCL_HOSTID": f"rank {rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _failed(ranks: list["subprocess.Popen[bytes]"], timeout: float) -> int | None:
    """The first rank that failed, or one that has not ended; None once all have ended well."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(0.1)


def joined_group(kind: str) -> torch.device:
    """Join the default group of the ranks of `rows_of`; the device that they share."""
    device = devices.of_this_rank(kind)
    dist.init_process_group(devices.backends(device))
    return device
