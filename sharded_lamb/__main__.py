"""``python -m sharded_lamb COMMAND``: the package's commands, alone or under torchrun."""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from sharded_lamb import shapes
from sharded_lamb.comm import devices
from sharded_lamb.verify import verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 passed, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="sharded-lamb", description="ZeRO-sharded LAMB with exact trust ratios."
    )
    from sharded_lamb.bench import command as bench
    from sharded_lamb.convert import command as convert
    from sharded_lamb.convert import inspect
    from sharded_lamb.gpu_check import command as gpu_check
    from sharded_lamb.plan import command as plan
    from sharded_lamb.preflight import command as preflight

    commands = parser.add_subparsers(dest="command", required=True)
    _add_verify(commands.add_parser("verify", help="compare with a single-process fp64 LAMB on this machine"))
    plan.add_arguments(
        commands.add_parser("plan", help="memory, bytes and time for a model, up to thousands of ranks")
    )
    bench.add_arguments(commands.add_parser("bench", help="measure against other optimizers on this machine"))
    preflight.add_arguments(
        commands.add_parser(
            "preflight",
            help="before a job: compare code, config and data of all ranks, and measure the network",
        )
    )
    convert.add_arguments(
        commands.add_parser("convert", help="convert checkpoints from and to other programs")
    )
    inspect.add_arguments(
        commands.add_parser("inspect", help="show the content of a checkpoint and verify it")
    )
    gpu_check.add_arguments(
        commands.add_parser("gpu-check", help="check and measure everything on one GPU, in minutes")
    )
    collective = {"verify": _verify, "plan": plan.run, "bench": bench.run}
    # These join the ranks themselves, or need none.
    others = {
        "preflight": preflight.run,
        "convert": convert.run,
        "inspect": inspect.run,
        "gpu-check": gpu_check.run,
    }
    chosen = parser.parse_args(arguments)
    device = _join_ranks(chosen.device) if chosen.command in collective else None
    try:
        if device is None:
            return others[chosen.command](chosen)
        return collective[chosen.command](chosen, device)
    except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        print(f"sharded-lamb {chosen.command}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run under torchrun for several ranks, e.g. torchrun --nproc-per-node 2 -m sharded_lamb verify."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes",
        default="tiny",
        help="tiny, bert-base, bert-large, many-small, many-tiny, or a JSON file {name: shape}",
    )
    what.add_argument(
        "--model", help="module:function that returns a torch.nn.Module, e.g. mypackage.models:build"
    )
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", help=devices.OF_HERE)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bucket-mb", type=float, default=32)
    parser.add_argument("--seed", type=int, default=0)


def _join_ranks(device: str | None) -> torch.device:
    """Join torchrun's process group, if there is one; returns this rank's device. Collective."""
    here = devices.of_this_rank(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(devices.backends(here))
    return here


def _verify(chosen: argparse.Namespace, device: torch.device) -> int:
    parameters: nn.Module | Mapping[str, Sequence[int]]
    parameters = _model(chosen.model) if chosen.model else shapes.load(chosen.shapes)
    if chosen.steps < 1:
        raise ValueError(f"--steps must be >= 1, got {chosen.steps}")
    report = verify(
        parameters,
        steps=chosen.steps,
        stage=chosen.stage,
        dtype=DTYPES[chosen.dtype],
        device=device,
        bucket_mb=chosen.bucket_mb,
        seed=chosen.seed,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(report)
    return 0 if report.passed else 1


def _model(path: str) -> nn.Module:
    module, separator, function = path.partition(":")
    if not separator:
        raise ValueError(f"--model must be module:function, got {path!r}")
    sys.path.insert(0, os.getcwd())
    model = getattr(importlib.import_module(module), function)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {path} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


if __name__ == "__main__":
    sys.exit(main())
