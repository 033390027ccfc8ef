"""``sharded-lamb verify``."""

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
from sharded_lamb.comm.wire_formats import GATHER_DTYPES
from sharded_lamb.verify.comparison import STATE_DTYPES, verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sharded-lamb verify``."""
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
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="of ZeRO")
    parser.add_argument("--variant", choices=("lamb", "lans", "lars"), default="lamb", help="of the rule")
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, default="float32", help="of the moments")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the parameters")
    parser.add_argument(
        "--gather-dtype", choices=sorted(GATHER_DTYPES), help="of updated parameters on the wire"
    )
    parser.add_argument(
        "--reduce-dtype", choices=sorted(GATHER_DTYPES), help="of gradients on the wire, in stage 2"
    )
    parser.add_argument("--device", help=devices.OF_HERE)
    parser.add_argument("--steps", type=int, default=20, help="steps to compare")
    parser.add_argument("--bucket-mb", type=float, default=32, help="MiB of parameters a bucket")
    parser.add_argument("--seed", type=int, default=0, help="of weights and gradients")


def run(chosen: argparse.Namespace, device: torch.device) -> int:
    """Returns 0, or 1 if a check failed. Collective.

    Raises:
        ValueError: a wrong argument.
    """
    parameters: nn.Module | Mapping[str, Sequence[int]]
    parameters = _model(chosen.model) if chosen.model else shapes.load(chosen.shapes)
    if chosen.steps < 1:
        raise ValueError(f"--steps must be >= 1, got {chosen.steps}")
    if not chosen.bucket_mb > 0:
        raise ValueError(f"--bucket-mb must be > 0, got {chosen.bucket_mb:g}")
    if chosen.reduce_dtype and chosen.stage == 1:
        raise ValueError(
            f"--reduce-dtype {chosen.reduce_dtype} needs --stage 2: in stage 1 DistributedDataParallel reduces"
        )
    report = verify(
        parameters,
        steps=chosen.steps,
        stage=chosen.stage,
        dtype=DTYPES[chosen.dtype],
        device=device,
        bucket_mb=chosen.bucket_mb,
        seed=chosen.seed,
        variant=chosen.variant,
        state_dtype=chosen.state_dtype,
        gather_dtype=GATHER_DTYPES.get(chosen.gather_dtype),
        reduce_dtype=GATHER_DTYPES.get(chosen.reduce_dtype),
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
