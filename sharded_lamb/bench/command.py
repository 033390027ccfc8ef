"""``sharded-lamb bench WHAT``: what is measured, and with which arguments."""

import argparse
import importlib

import torch

from sharded_lamb.bench import overlap
from sharded_lamb.bench.report import add_output_arguments

_HELP = {
    "step": "a whole iteration, from each rank's gradients to updated weights everywhere, of ours and of others",
    "kernels": "the two passes of every kernel on one rank, against what memory can do",
    "comm": "our exchanges against torch's collectives, by bucket size",
    "overlap": "what a slow link between two hosts (network namespaces) hides and exposes; not under torchrun",
    "memory": "peak memory of every contestant, each in processes of its own, against the formula",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks as subcommands of ``parser``."""
    parser.description = (
        "Prints a table, and writes JSON and a picture where asked. Run under torchrun for several ranks, e.g. "
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sharded_lamb bench step."
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, text in _HELP.items():
        one = benchmarks.add_parser(name, help=text, description=text)
        _ARGUMENTS[name](one)
        one.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        add_output_arguments(one)


def _add_contestants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        default="bert-base",
        help="tiny, bert-base, bert-large, many-small, many-tiny, or a JSON file {name: shape}",
    )
    parser.add_argument("--peers", help="names with commas; default: all that can take part here")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both", help="of ours")
    parser.add_argument("--bucket-mb", type=float, default=32, help="of ours")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_contestants(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="timed ones in a turn")
    parser.add_argument(
        "--alive", choices=("auto", "all", "one"), default="auto", help="contestants in memory at once"
    )


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", default="bert-base,many-small,many-tiny", help="names or JSON files, with commas"
    )
    parser.add_argument("--backends", help="names with commas; default: all there are here")
    parser.add_argument("--threads", default="1", help="numbers with commas (CPU)")
    parser.add_argument("--rounds", type=int, default=9)


def _add_comm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb", default="1,2,4,8,16,32,64,128", help="bucket sizes in MB, with commas")
    parser.add_argument("--rounds", type=int, default=7)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_contestants(parser)
    parser.add_argument("--steps", type=int, default=3)


_ARGUMENTS = {
    "step": _add_step,
    "kernels": _add_kernels,
    "comm": _add_comm,
    "overlap": overlap.add_arguments,
    "memory": _add_memory,
}


def run(chosen: argparse.Namespace, device: torch.device) -> int:
    """Returns 0, or 1 where a check failed. Raises ValueError for wrong arguments."""
    for name in ("rounds", "iterations", "steps"):
        if getattr(chosen, name, 1) < 1:
            raise ValueError(f"--{name} must be >= 1, got {getattr(chosen, name)}")
    if chosen.benchmark == "overlap":
        return overlap.run(chosen)
    importlib.import_module(f"sharded_lamb.bench.{chosen.benchmark}").measure(chosen, device)
    return 0
