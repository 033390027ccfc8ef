"""safetensors: weights only, in a file or in a folder of Hugging Face's ``save_pretrained``."""

from pathlib import Path

from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert.common import Converted, left_out, weights_of, widest_weights
from sharded_lamb.shapes import read_json

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(source: str) -> dict[str, Tensor]:
    """Reads a .safetensors file, a folder that holds one or an index of several, or a name on the Hub.

    Raises:
        ImportError: safetensors is not installed, or for a name huggingface_hub.
        ValueError, OSError: there is no such file or folder, or it is damaged.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_file(path)
    if source.count("/") > 1 or source.startswith((".", "/")) or source.endswith(".safetensors"):
        raise OSError(
            f"{source} does not exist: give a .safetensors file, a folder that holds one, or a name on the Hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{source} is not a path, and names on the Hub need huggingface_hub: {error}"
        ) from None
    return _of_folder(Path(snapshot_download(source, allow_patterns=["*.safetensors", INDEX])))


def _of_folder(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX} has no weight_map: it is no index of safetensors files")
        files = sorted(set(index["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise ValueError(f"{folder / INDEX} names files outside its folder: {files}")
        return {name: value for file in files for name, value in _of_file(folder / file).items()}
    if (folder / ONE).is_file():
        return _of_file(folder / ONE)
    raise ValueError(f"{folder} has neither {ONE} nor {INDEX}")


def _of_file(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install safetensors ({error})") from None
    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    return tensors


def from_weights(weights: dict[str, Tensor]) -> Converted[InMemoryCheckpoint]:
    """Weights → contents without an optimizer."""
    named, aliases, notes = weights_of(weights)
    notes.append("weights only: load the checkpoint with optimizer=None, and start with a new optimizer")
    wide = {"max_grad_norm": None, "skipped_steps": 0}
    return InMemoryCheckpoint(named, {}, [], wide, {}, aliases), notes


def to_weights(contents: InMemoryCheckpoint) -> Converted[dict[str, Tensor]]:
    """InMemoryCheckpoint → weights for one .safetensors file, no two sharing memory."""
    weights, notes = widest_weights(contents)
    if contents.states:
        notes.append("safetensors holds weights only: moments, steps and options are left out")
    if contents.aliases:
        pairs = ", ".join(f"{name} = {first}" for name, first in list(contents.aliases.items())[:3])
        notes.append(f"tied weights are written once ({pairs}): load with strict=False, and tie them again")
    notes += left_out(contents)
    return {name: _alone(value) for name, value in weights.items()}, notes


def _alone(value: Tensor) -> Tensor:
    """Returns the tensor row-major in its own memory: safetensors rejects shared memory."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
