"""How much communication overlaps with computation on a slow network: two hosts on one machine, their link limited.

    OMP_NUM_THREADS=1 sharded-lamb bench overlap --rate 1e9

Stage 2 trains a small BERT on hosts of `sharded_lamb.cluster.namespaces` under three configurations, in turn: exchange
gradients after backward (``overlap=False``), during it, and also gather parameters during the next forward
(``overlap_forward``). All send the same bytes and end at bit-equal weights, which is checked. Needs root.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sharded_lamb.bench.overlapped import CONFIGURATIONS, Work, compare
from sharded_lamb.bench.report import about, add_output_arguments, dumped
from sharded_lamb.cluster.namespaces import network, one_rank_a_host, run_together
from sharded_lamb.comm.wire_formats import GATHER_DTYPES

TIMEOUT = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options, except those of its output."""
    parser.add_argument("--hosts", type=int, default=2, help="one rank on each")
    parser.add_argument(
        "--rate", type=float, default=1e9, help="rate of a host's link, bits a second each way"
    )
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=4096, help="pieces")
    parser.add_argument("--batch", type=int, default=8, help="sequences a rank")
    parser.add_argument("--sequence", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--bucket-mb", type=float, default=2, help="MiB of parameters a bucket")
    parser.add_argument(
        "--gather-dtype",
        choices=("none", *GATHER_DTYPES),
        default="none",
        help="of updated parameters on the link",
    )
    parser.add_argument(
        "--reduce-dtype", choices=("none", *GATHER_DTYPES), default="none", help="of gradients on the link"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every configuration")
    parser.add_argument("--iterations", type=int, default=4, help="of a turn")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="write Chrome traces of all ranks to FOLDER"
    )


def run(chosen: argparse.Namespace) -> int:
    """Prints the table; returns 0, or 1 if the weights differ or a rank failed.

    Raises:
        ValueError: under torchrun, a wrong argument, or a missing package.
        NetworkError: this machine cannot make such a network.
    """
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"overlap starts its own ranks, one per host: run it without torchrun (WORLD_SIZE is {ranks})"
        )
    work = _work(chosen)
    if chosen.hosts < 2:
        raise ValueError(f"--hosts must be >= 2, got {chosen.hosts}: one host sends nothing")
    for module, wanted in (("transformers", True), ("matplotlib", chosen.png is not None)):
        if wanted and importlib.util.find_spec(module) is None:
            raise ValueError(f"{module} is needed and not installed: pip install {module}")
    with tempfile.TemporaryDirectory(prefix="sharded-lamb-overlap-") as name:
        folder = Path(name)
        command = [
            sys.executable,
            "-m",
            "sharded_lamb.bench.overlap",
            "--rank-writes-to",
            name,
            *_spelled(work),
        ]
        with network(chosen.hosts, rate=chosen.rate) as hosts:
            codes = run_together(one_rank_a_host(hosts, command), timeout=TIMEOUT)
        if any(codes):
            print(f"ranks ended with exit codes {codes}", file=sys.stderr)
            return 1
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        _publish(chosen, work, result, folder)
    return 0 if result["same_weights"] else 1


def _work(chosen: argparse.Namespace) -> Work:
    return Work(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Work)})


def _spelled(work: Work) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(work).items()]


# -- output ------------------------------------------------------------------------------------


def _publish(chosen: argparse.Namespace, work: Work, result: Mapping[str, Any], folder: Path) -> None:
    summary = summarize(result["rounds"], chosen.rate)
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {chosen.hosts} hosts, {chosen.rate / 1e9:g} Gbit/s\n"
    )
    print(table(summary))
    print(f"\nfinal weights of the three are {'bit-equal' if result['same_weights'] else 'NOT EQUAL'}")
    if chosen.json is not None:
        content = {
            **about(torch.device("cpu")),
            "command": _command(),
            "backend": "gloo",
            "ranks": chosen.hosts,
            "rate": chosen.rate,
            **dataclasses.asdict(work),
            "summary": summary,
            **result,
        }
        chosen.json.write_text(dumped(content))
    if chosen.png is not None:
        chosen.png.write_bytes((folder / "overlap.png").read_bytes())
    if chosen.traces is not None:
        chosen.traces.mkdir(parents=True, exist_ok=True)
        for trace in folder.glob("*.trace.json"):
            (chosen.traces / trace.name).write_text(trace.read_text(encoding="utf-8"))


def _command() -> str:
    by_itself = Path(sys.argv[0]).stem == "overlap"
    return shlex.join(
        [*(["python", "-m", "sharded_lamb.bench.overlap"] if by_itself else ["sharded-lamb"]), *sys.argv[1:]]
    )


def summarize(rounds: Sequence[Mapping[str, Any]], rate: float) -> dict[str, dict[str, Any]]:
    """Medians over rounds of each configuration on the first rank; ``…_ratio``: medians of the rounds' ratios to none.

    ``hidden``: the share of the link's least time (bytes over rate) in which the host was not blocked.
    """

    def values(*path: str) -> list[float]:
        nested: list[Any] = list(rounds)
        for key in path:
            nested = [each[key] for each in nested]
        return nested

    def median(*path: str) -> float:
        return statistics.median(values(*path))

    def ratio(name: str, *path: str) -> float:
        pairs = zip(values(name, *path), values("none", *path), strict=True)
        return statistics.median(value / without for value, without in pairs)

    summary: dict[str, dict[str, Any]] = {}
    for name in CONFIGURATIONS:
        collectives: dict[str, dict[str, float]] = {}
        for kind in rounds[0][name]["collectives"]:
            path = (name, "collectives", kind)
            parts = {part: median(*path, part) for part in ("calls", "bytes", "wire", "exposed")}
            collectives[kind] = {
                **parts,
                "bytes_over_rate": (least := 8 * parts["bytes"] / rate),
                "hidden": max(0.0, 1 - parts["exposed"] / least),
                "exposed_ratio": ratio(*path, "exposed"),
            }
        parts = {part: median(name, part) for part in ("iteration", "forward", "backward", "step")}
        summary[name] = {**parts, "iteration_ratio": ratio(name, "iteration"), "collectives": collectives}
    return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Two Markdown tables, in milliseconds per iteration."""
    head = ["iteration", "forward", "backward", "step"]
    lines = [f"| ms | {' | '.join(head)} | of no overlap |", "|---|" + "---:|" * 5]
    for name, row in summary.items():
        cells = " | ".join(f"{1e3 * row[part]:.0f}" for part in head)
        lines.append(f"| {CONFIGURATIONS[name]} | {cells} | {row['iteration_ratio']:.2f} |")
    lines += [
        "",
        "| ms | bytes / rate | in flight | exposed | of no overlap | hidden |",
        "|---|" + "---:|" * 5,
    ]
    for name, row in summary.items():
        for kind, collective in row["collectives"].items():
            parts = ("bytes_over_rate", "wire", "exposed")
            cells = " | ".join(f"{1e3 * collective[part]:.1f}" for part in parts)
            lines.append(
                f"| {kind}: {CONFIGURATIONS[name]} | {cells} | {collective['exposed_ratio']:.2f} | "
                f"{collective['hidden']:.0%} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 passed, 1 failed, 2 wrong usage or no such network here."""
    parser = argparse.ArgumentParser(
        prog="sharded_lamb.bench.overlap", description=__doc__.partition("\n")[0]
    )
    add_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument("--rank-writes-to", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.rank_writes_to is not None:
            compare(_work(chosen), chosen.rank_writes_to)
            return 0
        return run(chosen)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
