"""A cluster on one machine: `launch/torchrun.sh` on network namespaces, joined by slow links.

launch/cluster-local --hosts 2 --gbits 1 -m sharded_lamb.bert --config configs/bert-quickstart.yaml

Needs a checkout: wheels lack launch/.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sharded_lamb.cluster.namespaces import INTERFACE, Host, Task, network, run_together, sockets

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


def tasks(
    hosts: Sequence[Host], program: Sequence[str], *, ranks: int, rendezvous: str = "c10d"
) -> list[Task]:
    """``launch/torchrun.sh`` on every host, with its settings in the environment.

    Raises:
        FileNotFoundError: this is not a checkout.
    """
    if not SCRIPT.is_file():
        raise FileNotFoundError(f"no file {SCRIPT}: run it from a checkout, wheels lack launch/")
    settings = {
        "NNODES": str(len(hosts)),
        "NPROC_PER_NODE": str(ranks),
        "MASTER_ADDR": hosts[0].address,
        "RDZV": rendezvous,
        "INTERFACE": INTERFACE,
    }
    return [
        Task(
            host,
            [str(SCRIPT), *program],
            {
                **sockets(),
                **settings,
                # All hosts share one host name, so none recognizes its own by name.
                "LOCAL_ADDR": host.address,
                "IS_HOST": str(int(host.index == 0)),
                "NODE_RANK": str(host.index),
            },
        )
        for host in hosts
    ]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(our options, the program and its arguments); the program is the first word that is no option."""
    own = list(arguments)
    at = 0
    while at < len(own) and own[at].startswith("--"):
        flag = "=" in own[at] or own[at] in ("--dry-run", "--help")
        at += 1 if flag else 2
    at = own.index("-h") + 1 if own[:1] == ["-h"] else at
    return own[:at], own[at:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every host's program returned 0, else the first exit code > 0; 2 if the network cannot be made."""
    parser = argparse.ArgumentParser(prog="launch/cluster-local", description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--gbits", type=float, default=1.0, help="rate of every host's link, each way")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on every host")
    parser.add_argument("--rdzv", choices=("c10d", "static"), default="c10d")
    parser.add_argument("--timeout-s", type=float, default=86400.0)
    parser.add_argument("--dry-run", action="store_true", help="print the command of every host")
    parser.usage = "launch/cluster-local [options] PROGRAM ..., PROGRAM as torchrun takes it"
    own, program = _split(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(own)
    if not program:
        parser.error("expected a program, e.g. launch/cluster-local -m sharded_lamb verify")
    try:
        if chosen.dry_run:
            hosts = [Host(index, 0, f"10.111.0.{index + 1}") for index in range(chosen.hosts)]
            for task in tasks(hosts, program, ranks=chosen.ranks, rendezvous=chosen.rdzv):
                settings = [f"{name}={value}" for name, value in sorted(task.environment.items())]
                print(f"host {task.host.index}:", shlex.join(["env", *settings, *task.command]))
            return 0
        with network(chosen.hosts, rate=chosen.gbits * 1e9) as hosts:
            started = tasks(hosts, program, ranks=chosen.ranks, rendezvous=chosen.rdzv)
            codes = run_together(started, timeout=chosen.timeout_s)
    except (OSError, ValueError) as error:
        print(f"cluster-local: {error}", file=sys.stderr)
        return 2
    return next((code for code in codes if code > 0), next((1 for code in codes if code), 0))


if __name__ == "__main__":
    sys.exit(main())
