"""``sharded-lamb plan``: its arguments and its output."""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb import shapes
from sharded_lamb.comm import devices
from sharded_lamb.comm.progress import with_progress
from sharded_lamb.comm.wire_formats import GATHER_DTYPES
from sharded_lamb.core.layers import RatioBlocks, count_blocks, validate_ratio_blocks
from sharded_lamb.core.names import matching
from sharded_lamb.plan.costs import Shapes, costs
from sharded_lamb.plan.machine import PRESETS, Machine, calibrated
from sharded_lamb.plan.models import shapes_of_config
from sharded_lamb.plan.sharding import Choices, shardings
from sharded_lamb.plan.table import NOTES, Row, text_table
from sharded_lamb.plan.times import Computation, times

WORLD_SIZES = [2**power for power in range(13)]
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SPEEDS = {  # option → (field of `Machine`, unit of the option)
    "update_gb_s": ("update_bytes_per_second", 1e9),
    "intra_gb_s": ("intra_bytes_per_second", 1e9),
    "inter_gb_s": ("inter_bytes_per_second", 1e9),
    "intra_us": ("intra_latency", 1e-6),
    "inter_us": ("inter_latency", 1e-6),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.description = (
        "Memory per rank, bytes on the wire and predicted time of a step, from the layout that ShardedLamb would use. "
        "Needs neither ranks nor memory for the model; with --check, run under torchrun to compare with real ranks."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", help="path of a Hugging Face config.json")
    what.add_argument(
        "--shapes",
        help="tiny, bert-base, bert-large (default), many-small, many-tiny, or a JSON file {name: shape}",
    )
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument(
        "--world-sizes", type=int, nargs="+", default=WORLD_SIZES, help="default: 1, 2, 4, … 4096"
    )
    ranks.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    ranks.add_argument(
        "--shard",
        nargs="+",
        default=["all"],
        help="ranks that share one copy of the state: all, node or a number",
    )
    ranks.add_argument("--ranks-per-node", type=int, help="default: the preset's")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the parameters")
    memory.add_argument("--master-dtype", choices=_DTYPES, default="float32")
    memory.add_argument("--state-dtype", choices=[*_DTYPES, "int8"], default="float32")
    memory.add_argument(
        "--reduce-dtype",
        choices=[*_DTYPES, "float8_e4m3fn"],
        help="dtype in which gradients travel in stages 2 and 3; default: the parameters'",
    )
    memory.add_argument(
        "--gather-dtype",
        choices=sorted(GATHER_DTYPES),
        help="dtype in which updated parameters travel in stages 1 and 2; default: the parameters'",
    )
    memory.add_argument(
        "--store-param-remainders",
        nargs="?",
        const=16,
        default=0,
        type=int,
        choices=(8, 16),
        help="of a bfloat16 parameter's master: 16 bits, or 8 of 24",
    )
    memory.add_argument(
        "--ratio-blocks",
        nargs="+",
        default=[],
        metavar="PATTERN=N",
        help="parameters with several ratios: qkv=3 experts=dim0; counts their norms on the wire",
    )
    memory.add_argument("--bucket-mb", type=float, default=32)
    memory.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="staging differs")
    _add_time_arguments(parser.add_argument_group("time"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="write all rows to this file")
    output.add_argument("--png", type=Path, help="draw memory and time over ranks to this file")
    check = parser.add_argument_group("check")
    check.add_argument(
        "--check",
        action="store_true",
        help="under torchrun: compare with the memory and traffic of these ranks (--shapes tiny)",
    )
    check.add_argument("--device", help=devices.OF_HERE)


def _add_time_arguments(group: Any) -> None:
    group.add_argument("--preset", choices=sorted(PRESETS), default="h100-nvlink-ib")
    group.add_argument(
        "--calibrate",
        nargs="+",
        action="extend",
        metavar="JSON",
        help="results of sharded-lamb bench kernels and bench comm, which override the preset",
    )
    group.add_argument("--update-gb-s", type=float, help="memory bandwidth of the two passes, GB/s")
    group.add_argument("--intra-gb-s", type=float, help="a rank's bandwidth inside a node, GB/s")
    group.add_argument("--inter-gb-s", type=float, help="a rank's bandwidth to other nodes, GB/s")
    group.add_argument("--intra-us", type=float, help="latency of a hop inside a node, microseconds")
    group.add_argument("--inter-us", type=float, help="latency of a hop between nodes, microseconds")
    group.add_argument(
        "--forward-ms", type=float, default=0.0, help="computation that may hide gathers (default: 0)"
    )
    group.add_argument(
        "--backward-ms", type=float, default=0.0, help="computation that may hide reductions (default: 0)"
    )
    group.add_argument("--no-overlap", action="store_true", help="stage 2: reduce after backward")
    group.add_argument("--overlap-forward", action="store_true", help="gather behind the next forward")


def run(chosen: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit code. Collective with ``--check``.

    Raises:
        ValueError: a wrong argument.
        OSError: a file cannot be read or written.
        ImportError: transformers (``--config``) or matplotlib (``--png``) is not installed.
    """
    if chosen.check:
        from sharded_lamb.plan.check import check

        parameters = _shapes(chosen, "tiny")
        return check(parameters, _choices(chosen, parameters), _known_machine(chosen), device, chosen.stages)
    if dist.is_initialized() and dist.get_rank():
        return 0
    parameters, machine = _shapes(chosen, "bert-large"), _machine(chosen)
    choices = _choices(chosen, parameters)
    computation = Computation(chosen.forward_ms / 1e3, chosen.backward_ms / 1e3)
    rows = []
    planned = shardings(chosen.world_sizes, chosen.stages, chosen.shard, machine.ranks_per_node)
    for sharding in with_progress(planned, "plan", lambda one: f"stage {one.stage}, {one.mesh} ranks"):
        cost = costs(parameters, choices, sharding)
        rows.append(Row(cost, times(cost, choices, machine, computation)))
    described = _described(parameters, choices, chosen.stages)
    title = f"{chosen.config or chosen.shapes or 'bert-large'}: {described}"
    if chosen.json:
        chosen.json.write_text(json.dumps(_content(title, rows, machine, computation), indent=1) + "\n")
    if chosen.png:
        from sharded_lamb.plan.picture import draw

        draw(rows, title, chosen.png)
    print("\n".join([title, _describe_machine(machine, chosen), "", text_table(rows), "", *NOTES]))
    return 0


def _shapes(chosen: argparse.Namespace, default: str) -> Shapes:
    parameters: Mapping[str, Sequence[int]]
    parameters = shapes_of_config(chosen.config) if chosen.config else shapes.load(chosen.shapes or default)
    for name, shape in parameters.items():
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"the shape of {name!r} must be sizes >= 0, got {shape!r}")
    if not parameters:
        raise ValueError(f"{chosen.config or chosen.shapes} has no parameters: there is nothing to plan")
    return parameters


def _ratio_blocks(given: Sequence[str], parameters: Shapes) -> RatioBlocks:
    """``--ratio-blocks`` as the optimizer's option. Raises ValueError if it is malformed or matches no parameter."""
    blocks: dict[str, Any] = {}
    for text in given:
        pattern, equals, count = text.rpartition("=")
        if not (equals and pattern and (count == "dim0" or (count.isdecimal() and int(count)))):
            raise ValueError(f"--ratio-blocks must be PATTERN=N with N >= 1, or PATTERN=dim0, got {text!r}")
        blocks[pattern] = count if count == "dim0" else int(count)
    for pattern in validate_ratio_blocks(blocks):
        if not any(matching([pattern], name, len(shape)) for name, shape in parameters.items()):
            raise ValueError(
                f"--ratio-blocks: {pattern!r} matches no parameter; the first is {next(iter(parameters))!r}"
            )
    return blocks


def _choices(chosen: argparse.Namespace, parameters: Shapes) -> Choices:
    if not chosen.bucket_mb > 0:
        raise ValueError(f"--bucket-mb must be > 0, got {chosen.bucket_mb:g}")
    reduce, gather, splits = chosen.reduce_dtype, chosen.gather_dtype, chosen.store_param_remainders
    if gather and {*chosen.stages} == {3}:
        raise ValueError(
            f"--gather-dtype {gather} has no effect in stage 3, where fully_shard gathers: leave it out"
        )
    if gather == "float8_e4m3fn" and splits:
        raise ValueError(
            "--gather-dtype float8_e4m3fn leaves no weight beside a remainder: leave one of them out"
        )
    if splits and (chosen.dtype, chosen.master_dtype) != ("bfloat16", "float32"):
        raise ValueError(
            f"--store-param-remainders needs bfloat16 parameters with float32 masters, got --dtype "
            f"{chosen.dtype} --master-dtype {chosen.master_dtype}: leave it out"
        )
    ratio_blocks = _ratio_blocks(chosen.ratio_blocks, parameters)
    return Choices(
        model_dtype=getattr(torch, chosen.dtype),
        master_dtype=getattr(torch, chosen.master_dtype),
        state_dtype=getattr(torch, chosen.state_dtype),
        reduce_dtype=None if reduce is None else getattr(torch, reduce),
        gather_dtype=GATHER_DTYPES.get(gather),
        store_param_remainders=splits,
        ratio_blocks=ratio_blocks,
        bucket_mb=chosen.bucket_mb,
        overlap=not chosen.no_overlap,
        overlap_forward=chosen.overlap_forward,
        sums_here=chosen.backend == "gloo",
    )


def _machine(chosen: argparse.Namespace) -> Machine:
    """The preset, overridden by measurements, overridden by options."""
    machine = PRESETS[chosen.preset]
    if chosen.calibrate:
        machine = calibrated(machine, chosen.calibrate)
    options = {
        name: getattr(chosen, option) * unit
        for option, (name, unit) in _SPEEDS.items()
        if _given(chosen, option)
    }
    if _given(chosen, "ranks_per_node"):
        options["ranks_per_node"] = chosen.ranks_per_node
    return replace(machine, **options)


def _known_machine(chosen: argparse.Namespace) -> Machine | None:
    """This machine's speeds if options or measurements give any, else None: a preset is another machine."""
    return _machine(chosen) if chosen.calibrate or any(_given(chosen, option) for option in _SPEEDS) else None


def _given(chosen: argparse.Namespace, option: str) -> bool:
    return getattr(chosen, option) is not None


def _not_applied(option: str, choices: Choices, stages: Sequence[int]) -> str:
    """ " (not applied to stage 3)" if ``choices`` has the option and some of ``stages`` do not."""
    without = [stage for stage in sorted({*stages}) if getattr(choices.of_stage(stage), option) is None]
    plural = "s" * (len(without) > 1)
    return f" (not applied to stage{plural} {' and '.join(map(str, without))})" if without else ""


def _described(parameters: Shapes, choices: Choices, stages: Sequence[int]) -> str:
    precision = choices.precision
    masters = precision.masters
    names = [
        str(dtype).removeprefix("torch.")
        for dtype in (precision.model, masters.value if masters else precision.model)
    ]
    remainders = " as remainders" if masters and masters.beside_weight else ""
    wire = ""
    for option, verb in (("gather", "gathered"), ("reduce", "reduced")):
        if getattr(precision, option) is not None:
            dtype = str(getattr(choices, f"{option}_dtype")).removeprefix("torch.")
            wire += f", {verb} as {dtype}{_not_applied(f'{option}_dtype', choices, stages)}"
    layers = sum(count_blocks(name, shape, choices.ratio_blocks) for name, shape in parameters.items())
    tensors = f"{len(parameters):,} tensors" + (f" of {layers:,} layers" if choices.ratio_blocks else "")
    return (
        f"{tensors}, {sum(map(prod, parameters.values())):,} elements, {names[0]} with {names[1]} "
        f"masters{remainders} and {precision.moments[0].name} moments{wire}, buckets of {choices.bucket_mb:g} MiB"
    )


def _describe_machine(machine: Machine, chosen: argparse.Namespace) -> str:
    return (
        f"update {machine.update_bytes_per_second / 1e9:,.5g} GB/s, inside a node "
        f"{machine.intra_bytes_per_second / 1e9:,.5g} GB/s and {machine.intra_latency * 1e6:.3g} us, between nodes "
        f"{machine.inter_bytes_per_second / 1e9:,.5g} GB/s and {machine.inter_latency * 1e6:.3g} us, "
        f"{machine.ranks_per_node} ranks a node; forward {chosen.forward_ms:g} ms, backward {chosen.backward_ms:g} ms"
    )


def _content(title: str, rows: Sequence[Row], machine: Machine, computation: Computation) -> dict[str, Any]:
    return {
        "machine": asdict(machine),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": str(date.today()),
        "command": " ".join(["sharded-lamb", *sys.argv[1:]]),
        "model": title,
        "computation": asdict(computation),
        "rows": [row.as_json() for row in rows],
    }
