"""Files that formats live in: read without pickle's powers, written aside and renamed when whole."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_lamb.checkpoint.manifest import MANIFEST, SUMS, read_sums


def read_torch(path: Path) -> Mapping[str, Any]:
    """A torch.save file, tensors on the CPU; nothing in it is run.

    Raises:
        ValueError: it holds more than tensors and plain data, or is damaged.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file: expected what torch.save wrote")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged ones can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as tensors and plain data: {reason} Save it anew with "
            f"torch.save({{'model': model.state_dict(), 'optimizer': optimizer.state_dict()}}, …)"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, expected a dict with 'model' and 'optimizer'"
        )
    return found


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz. Raises ValueError for objects in it, OSError where it cannot be read."""
    if not path.is_file():
        raise OSError(f"{path} is not a file: expected an .npz, as numpy.savez writes it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of zipfile, zlib, numpy
        raise ValueError(f"{path} cannot be read as .npz: {type(error).__name__}: {error}") from error


def read_names(path: Path) -> list[str]:
    """A JSON list of strings, or a name a line. Raises ValueError, OSError."""
    text = path.read_text()
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON list of names: {error}") from error
        if not all(isinstance(name, str) for name in found):
            raise ValueError(f"{path} must be a list of strings, got {found[:3]!r}")
        return list(found)
    return [line.strip() for line in text.splitlines() if line.strip()]


def check_target(target: Path, source: str, is_folder: bool, force: bool) -> None:
    """Raises ValueError where writing would destroy, or damage, what nobody asked to have destroyed."""
    for folder in target.resolve().parents:
        if (folder / MANIFEST).is_file() and (folder / SUMS).is_file():
            raise ValueError(
                f"{target} is inside the checkpoint {folder}, whose check would find a file too many: write elsewhere"
            )
    if not os.path.lexists(target):
        return
    if Path(source).exists() and target.resolve() == Path(source).resolve():
        raise ValueError(f"{target} is the source itself: write elsewhere")
    if not force:
        raise ValueError(f"{target} is there already: give --force to replace it, or another target")
    if target.is_dir() != is_folder:
        kinds = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise ValueError(f"{target} is a {kinds[0]} and the format is a {kinds[1]}: write elsewhere")
    if is_folder and any(target.iterdir()):
        _check_replaceable(target)


def _check_replaceable(folder: Path) -> None:
    """A checkpoint is deleted with its folder: there must be nothing but it in there."""
    if not (folder / MANIFEST).is_file() or not (folder / SUMS).is_file():
        raise ValueError(
            f"{folder} is a folder that holds no whole checkpoint ({MANIFEST} and {SUMS}), and is not replaced: write "
            f"elsewhere"
        )
    own = {*read_sums(folder), SUMS}
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if strangers:
        raise ValueError(
            f"{folder} holds {', '.join(strangers[:5])}, which {SUMS} does not list and replacing the folder would "
            f"delete: move what you need elsewhere, or write elsewhere"
        )


def write_aside(target: Path, write: Callable[[Path], None]) -> None:
    """``write`` a file under another name, then rename it: a target is whole or as it was. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_torch(target: Path, content: Mapping[str, Any]) -> None:
    write_aside(target, lambda part: torch.save(dict(content), part))


def write_safetensors(target: Path, weights: dict[str, Tensor]) -> None:
    """Raises ImportError where safetensors is not installed, OSError."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"{target} needs safetensors: pip install safetensors ({error})") from None

    write_aside(target, lambda part: save_file(weights, str(part), metadata={"format": "pt"}))
