"""``sharded-lamb inspect``: show a checkpoint without a model, and verify its files."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.checkpoint import plain, problem_with, tensorfile
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.folder import LATEST, Checkpoints
from sharded_lamb.checkpoint.in_memory import read_tensor
from sharded_lamb.checkpoint.manifest import (
    MANIFEST,
    SUMS,
    SavedTensor,
    read_manifest,
    read_sums,
    replaced,
    unlisted_files,
)
from sharded_lamb.comm.progress import with_progress

SHOWN = 24
"""Maximal lines of a shortened table."""

_FEW = 16
"""Maximal entries of a dict or list of ``extra`` to show."""

_PIECE = 1 << 24  # elements converted to fp64 at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``inspect``."""
    parser.description = "Shows a checkpoint: step, writer, files, tensors and their norms, options."
    parser.add_argument(
        "path",
        type=Path,
        help="a checkpoint's folder, or a run's folder or its checkpoints/, whose latest checkpoint is shown",
    )
    parser.add_argument("--check", action="store_true", help="verify all hashes; exit 1 if one is wrong")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--all", action="store_true", help="do not shorten tables")
    parser.add_argument("--no-norms", action="store_true", help="do not read the tensors")


def run(chosen: argparse.Namespace) -> int:
    """Returns the exit code. Under torchrun only the first rank runs.

    Raises:
        ValueError: there is no checkpoint, or it is damaged and ``--check`` was not given.
    """
    if int(os.environ.get("RANK", "0")):
        return 0
    folder = checkpoint_of(chosen.path)
    verdicts: dict[str, str] = {}
    if chosen.check:
        verdicts, problem = verified(folder)
        if problem is not None:
            wrong = {"path": str(folder), "files": verdicts, "problem": problem}
            print(
                json.dumps(wrong, indent=1)
                if chosen.json
                else "\n".join([*_verdicts(verdicts), f"broken: {problem}"])
            )
            return 1
    summary = summary_of(folder, norms=not chosen.no_norms)
    if chosen.check:
        summary["check"] = verdicts
    print(_json(summary) if chosen.json else text(summary, all_lines=chosen.all))
    return 0


def checkpoint_of(path: Path) -> Path:
    """Returns ``path`` if it is a checkpoint, else the latest of the run in ``path`` or its checkpoints/.

    Without ``latest`` it returns the newest checkpoint, and prints a warning.

    Raises:
        ValueError: there is no checkpoint.
    """
    if not path.is_dir():
        if replaced(path).is_dir():
            read_sums(path)  # raises with the remedy
        raise ValueError(
            f"{path} is not a folder: name a checkpoint's folder, such as RUN/checkpoints/step-00001000, or the run's"
        )
    if (path / MANIFEST).exists() or (path / SUMS).exists():
        return path
    for root in (path, path / "checkpoints"):
        checkpoints = Checkpoints(root)
        latest = checkpoints.latest()
        if latest is not None:
            return latest
        candidates = checkpoints.candidates()
        if candidates:
            print(
                f"{root / LATEST} is missing, or names no step: showing {candidates[0].name}",
                file=sys.stderr,
            )
            return candidates[0]
    raise ValueError(
        f"{path} has neither {MANIFEST} nor {LATEST} nor step-*, nor has its checkpoints/: name a checkpoint or a "
        f"run's folder"
    )


def verified(folder: Path) -> tuple[dict[str, str], str | None]:
    """Returns ({file: verdict}, why the checkpoint cannot be used or None). Reads every file."""
    try:
        sums = read_sums(folder)
    except CheckpointError as error:
        return {}, str(error)
    verdicts = {}
    for name, digest in with_progress(sorted(sums.items()), "check", lambda file: file[0]):
        try:
            verdicts[name] = (
                "ok" if tensorfile.sha256(folder / name) == digest else "not the hash it was written with"
            )
        except OSError as error:
            verdicts[name] = f"cannot be read: {error.strerror}"
    verdicts |= dict.fromkeys(unlisted_files(folder, sums), f"not listed in {SUMS}")
    wrong = next(
        (f"{folder / name}: {verdict}" for name, verdict in verdicts.items() if verdict != "ok"), None
    )
    return verdicts, wrong or problem_with(folder, hashes=False)


def summary_of(folder: Path, *, norms: bool = True) -> dict[str, Any]:
    """Returns all that is shown, in the types of JSON. Reads one tensor at a time, for its norm."""
    manifest = read_manifest(folder)
    weights_first = sorted(manifest.tensors, key=lambda name: not name.startswith("model."))
    names_read = with_progress(weights_first, "inspect")
    tensors = {name: _tensor(folder, manifest.tensors[name], norms) for name in names_read}
    sizes = {MANIFEST: (folder / MANIFEST).stat().st_size, **manifest.files}
    states = manifest.kinds()
    names = [name for group in manifest.groups for name in group["names"]]
    return {
        "path": str(folder),
        "step": manifest.optimizer.get("step"),
        "written_by": dict(manifest.written_by),
        "files": sizes,
        "bytes": sum(sizes.values()),
        "parameters": len(names) or len(manifest.model_names),
        "elements": sum(math.prod(manifest.tensors[f"model.{n}"].shape) for n in manifest.model_names),
        "with_state": len(states),
        "with_masters": sum("master" in kinds for kinds in states.values()),
        "aliases": dict(manifest.aliases),
        "tensors": tensors,
        "norms": _norms(tensors) if norms else None,
        "groups": [
            {**_plain(group["options"]), "parameters": len(group["names"])} for group in manifest.groups
        ],
        "optimizer": {k: _plain(v) for k, v in manifest.optimizer.items() if k not in ("step", "model")},
        "extra": _brief(_plain(manifest.extra)),
    }


def _tensor(folder: Path, tensor: SavedTensor, norms: bool) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.bytes,
        "chunks": len(tensor.chunks),
        "norm": _norm(read_tensor(folder, tensor)) if norms else None,
    }


def _norm(value: Tensor) -> float:
    """Returns the 2-norm, computed in fp64 a piece at a time."""
    flat = (torch.view_as_real(value) if value.is_complex() else value).reshape(-1)
    pieces = (flat[at : at + _PIECE] for at in range(0, len(flat), _PIECE))
    return math.sqrt(sum(float(piece.double().square().sum()) for piece in pieces))


def _norms(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns {kind: norm over all its tensors}; weights without buffers of integers, which count."""
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        kind = _kind(name)
        if kind == "weights" and not tensor["dtype"].startswith(("float", "bfloat", "complex")):
            continue
        if kind is not None:
            squares[kind] = squares.get(kind, 0.0) + tensor["norm"] ** 2
    return {kind: math.sqrt(total) for kind, total in squares.items()}


def _kind(name: str) -> str | None:
    if name.startswith("model."):
        return "weights"
    kind = name.rsplit(".", 1)[-1]
    return kind if name.startswith("optimizer.") and kind != "step" else None


def _plain(value: Any) -> Any:
    """Decodes the tags of `sharded_lamb.checkpoint.plain`; tensors become their names."""
    return plain.decoded(value, lambda name: f"tensor {name}")


def _brief(value: Any) -> Any:
    """Replaces large dicts and lists by their size."""
    if isinstance(value, dict):
        if len(value) > _FEW:
            return f"{len(value)} entries: {', '.join(map(str, list(value)[:_FEW]))}, …"
        return {str(key): _brief(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and len(value) > _FEW:
        return f"{len(value)} entries"
    return value


def _json(summary: Mapping[str, Any]) -> str:
    return json.dumps(_finite(summary), indent=1, default=str)


def _finite(value: Any) -> Any:
    """With "nan", "inf" and "-inf" in place of what JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -- text ----------------------------------------------------------------------------------------------------


def text(summary: Mapping[str, Any], *, all_lines: bool = False) -> str:
    """Returns a summary of `summary_of` as text."""
    limit = None if all_lines else SHOWN
    return "\n".join(
        [
            f"{summary['path']}: step {summary['step']}",
            f"written by {_pairs(summary['written_by'])}",
            f"{summary['parameters']} parameters, {summary['with_state']} with moments, {summary['with_masters']} with "
            f"masters; {summary['elements']:,} elements; {summary['bytes']:,} bytes",
            *([f"tied: {_pairs(summary['aliases'])}"] if summary["aliases"] else []),
            *([f"norms: {_norm_pairs(summary['norms'])}"] if summary["norms"] else []),
            "",
            *_shortened([f"{size:>16,}  {name}" for name, size in summary["files"].items()], limit),
            "",
            *_shortened(list(_table(summary["tensors"])), limit),
            "",
            *[f"group {i}: {_pairs(group)}" for i, group in enumerate(summary["groups"])],
            f"optimizer: {_pairs(summary['optimizer'])}",
            f"extra: {json.dumps(summary['extra'], default=str)}",
            *(["", *_verdicts(summary["check"])] if "check" in summary else []),
        ]
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "-"


def _norm_pairs(norms: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {norm:.6g}" for kind, norm in norms.items())


def _table(tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    width = max((len(name) for name in tensors), default=4)
    yield f"{'tensor':<{width}}  {'shape':<14} {'dtype':<9} {'bytes':>14} {'chunks':>6}  norm"
    for name, tensor in tensors.items():
        shape = "x".join(map(str, tensor["shape"])) or "()"
        norm = "" if tensor["norm"] is None else f"{tensor['norm']:.6g}"
        yield (
            f"{name:<{width}}  {shape:<14} {tensor['dtype']:<9} {tensor['bytes']:>14,} {tensor['chunks']:>6}  {norm}"
        ).rstrip()


def _shortened(lines: list[str], limit: int | None) -> list[str]:
    if limit is None or len(lines) <= limit:
        return lines
    return [*lines[: limit - 4], f"… {len(lines) - limit + 1:,} more (--all)", *lines[-3:]]


def _verdicts(verdicts: Mapping[str, str]) -> list[str]:
    return [f"{verdict:<8} {name}" for name, verdict in verdicts.items()]
