"""Files of other formats: read without running pickled code, written aside and renamed when whole."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_lamb.checkpoint.durable import write_aside
from sharded_lamb.checkpoint.manifest import MANIFEST, SUMS, read_sums, unlisted_files


def read_torch(path: Path) -> Mapping[str, Any]:
    """Reads a torch.save file of tensors and plain data, tensors on the CPU; runs nothing in it.

    Raises:
        ValueError: the file holds anything else, or is damaged.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file: expected a file of torch.save")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's and others' settings
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds {foreign[1]}."
        raise ValueError(
            f"{path} cannot be read as tensors and plain data: {reason} Save it anew with "
            f"torch.save({{'model': model.state_dict(), 'optimizer': optimizer.state_dict()}}, …)"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, expected a dict with 'model' and 'optimizer'"
        )
    return content


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz.

    Raises:
        ValueError: the file holds pickled objects, or is damaged.
        OSError: there is no such file.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file: expected an .npz of numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of zipfile, zlib, numpy
        raise ValueError(f"{path} cannot be read as .npz: {type(error).__name__}: {error}") from error


def read_names(path: Path) -> list[str]:
    """Reads a JSON list of strings, or one name per line.

    Raises:
        ValueError: the JSON is damaged, or not a list of strings.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON list of names: {error}") from error
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} must be a list of strings, got {names[:3]!r}")
        return list(names)
    return [line.strip() for line in text.splitlines() if line.strip()]


def check_target(target: Path, sources: Sequence[str | Path | None], is_folder: bool, force: bool) -> None:
    """Raises ValueError if writing ``target`` would damage a checkpoint, a source, or a file without ``force``."""
    for folder in target.resolve().parents:
        if (folder / MANIFEST).is_file() and (folder / SUMS).is_file():
            raise ValueError(
                f"{target} is inside the checkpoint {folder}, which must hold no other files: write elsewhere"
            )
    if not os.path.lexists(target):
        return
    if any(target.resolve() == Path(source).resolve() for source in sources if source is not None):
        raise ValueError(f"{target} is the source itself: write elsewhere")
    if not force:
        raise ValueError(f"{target} already exists: give --force to replace it, or another target")
    if target.is_dir() != is_folder:
        kinds = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise ValueError(f"{target} is a {kinds[0]}, but the format is a {kinds[1]}: write elsewhere")
    if is_folder and any(target.iterdir()):
        _check_only_a_checkpoint(target)


def _check_only_a_checkpoint(folder: Path) -> None:
    """Raises ValueError unless ``folder`` holds a whole checkpoint and nothing else, since it is deleted."""
    if not (folder / MANIFEST).is_file() or not (folder / SUMS).is_file():
        raise ValueError(
            f"{folder} holds no whole checkpoint ({MANIFEST} and {SUMS}), and is not replaced: write elsewhere"
        )
    unexpected = unlisted_files(folder, read_sums(folder))
    if unexpected:
        raise ValueError(
            f"{folder} holds {', '.join(unexpected[:5])}, which {SUMS} does not list and replacing the folder would "
            f"delete: move these files, or write elsewhere"
        )


def write_torch(target: Path, content: Mapping[str, Any]) -> None:
    """Writes a file for torch.load. Raises OSError."""
    write_aside(target, lambda part: torch.save(dict(content), part))


def write_safetensors(target: Path, weights: dict[str, Tensor]) -> None:
    """Writes a .safetensors file. Raises OSError, and ImportError if safetensors is not installed."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"{target} needs safetensors: pip install safetensors ({error})") from None

    write_aside(target, lambda part: save_file(weights, str(part), metadata={"format": "pt"}))
