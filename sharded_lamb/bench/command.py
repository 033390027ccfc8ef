"""``sharded-lamb bench BENCHMARK``: the benchmarks and their arguments."""

import argparse
import importlib

import torch

from sharded_lamb.bench import overlap
from sharded_lamb.bench.report import add_output_arguments
from sharded_lamb.comm import devices

_HELP = {
    "step": "a whole iteration, from each rank's gradients to updated weights on every rank, of ours and of others",
    "kernels": "the two passes of every kernel on one rank, against memory bandwidth",
    "functions": "each function of the CPU's kernel over each kind of memory, against stock operations",
    "host": "step() alone over many small tensors, plain and under FSDP2, beside torch's AdamW",
    "comm": "our exchanges against torch's collectives, by bucket size",
    "overlap": "how much of a slow link between two hosts (network namespaces) is hidden; not under torchrun",
    "memory": "peak memory of every candidate, each in processes of its own, against the formula",
    "formats": "bytes a parameter and time of a step for every format of state, beside other 8-bit optimizers",
}

_ROUNDS = "turns of every candidate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks as subcommands of ``parser``."""
    parser.description = (
        "Prints a table; --json and --png also write a file and a picture. Run under torchrun for several ranks, e.g. "
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sharded_lamb bench step."
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, text in _HELP.items():
        one = benchmarks.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        _ARGUMENTS[name](one)
        one.add_argument("--device", help=devices.OF_HERE)
        add_output_arguments(one)


def _add_candidates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        default="bert-base",
        help="tiny, bert-base, bert-large, many-small, many-tiny, or a JSON file {name: shape}",
    )
    parser.add_argument("--peers", help="comma-separated names; default: all that can run here")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both", help="of ours")
    parser.add_argument("--bucket-mb", type=float, default=32, help="MiB of parameters a bucket, of ours")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_candidates(parser)
    parser.add_argument("--rounds", type=int, default=3, help=_ROUNDS)
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations of a turn")
    parser.add_argument(
        "--alive", choices=("auto", "all", "one"), default="auto", help="candidates in memory at once"
    )


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", default="bert-base,many-small,many-tiny", help="comma-separated names or JSON files"
    )
    parser.add_argument("--backends", help="comma-separated names; default: all that run here")
    parser.add_argument("--threads", default="1", help="comma-separated numbers (CPU)")
    parser.add_argument("--rounds", type=int, default=9, help=_ROUNDS)


def _add_functions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="cpp", help="the kernel")
    parser.add_argument("--rounds", type=int, default=9, help=_ROUNDS)


def _add_host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensors", type=int, default=384, help="number of tensors")
    parser.add_argument("--elements", type=int, default=1024, help="of each tensor")
    parser.add_argument("--rounds", type=int, default=9, help=_ROUNDS)
    parser.add_argument("--iterations", type=int, default=10, help="timed steps of a turn")


def _add_comm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb", default="1,2,4,8,16,32,64,128", help="comma-separated bucket sizes in MB")
    parser.add_argument("--rounds", type=int, default=7, help=_ROUNDS)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_candidates(parser)
    parser.add_argument("--steps", type=int, default=3, help="steps of each candidate")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", default="bert-base", help="tiny, bert-base, …, or a JSON file {name: shape}"
    )
    parser.add_argument("--rounds", type=int, default=5, help=_ROUNDS)
    parser.add_argument("--iterations", type=int, default=2, help="timed steps of a turn")


_MODULES = {"memory": "peak_memory", "formats": "state_formats"}
_ARGUMENTS = {
    "step": _add_step,
    "kernels": _add_kernels,
    "functions": _add_functions,
    "host": _add_host,
    "comm": _add_comm,
    "overlap": overlap.add_arguments,
    "memory": _add_memory,
    "formats": _add_formats,
}


def run(chosen: argparse.Namespace, device: torch.device) -> int:
    """Returns 0, or 1 if a check failed.

    Raises:
        ValueError: a wrong argument.
    """
    for name in ("rounds", "iterations", "steps", "tensors", "elements"):
        if getattr(chosen, name, 1) < 1:
            raise ValueError(f"--{name} must be >= 1, got {getattr(chosen, name)}")
    if chosen.benchmark == "overlap":
        return overlap.run(chosen)
    module = _MODULES.get(chosen.benchmark, chosen.benchmark)
    importlib.import_module(f"sharded_lamb.bench.{module}").measure(chosen, device)
    return 0
