"""Small plain data as JSON, bit for bit: dicts, lists, tuples, strings, numbers, None. Tensors go to files.

Tags mark types that JSON lacks: ``{"__tuple__": [...]}``, ``{"__items__": [[key, value], ...]}`` for keys that
are not strings, ``{"__tensor__": name}`` for a tensor among the checkpoint's, ``{"__sparse__": …}`` for a sparse one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.checkpoint import sparse

_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_TAGS = ("__tuple__", "__items__", "__tensor__", "__sparse__", "__float__", "__dtype__")


def encoded(value: Any, path: str, keep: Callable[[str, Tensor], str]) -> Any:
    """Returns ``value`` in the types of JSON.

    Args:
        path: the value's name in error messages.
        keep: stores a tensor; takes a suggested name and returns the final one.

    Raises:
        TypeError: a value is neither plain data nor a tensor.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if sparse.is_sparse(value):
        return {"__sparse__": sparse.encoded(value, lambda part, t: encoded(t, f"{path}.{part}", keep))}
    if isinstance(value, Tensor):
        return {"__tensor__": keep(path, value)}
    if isinstance(value, torch.dtype):
        return {"__dtype__": str(value).removeprefix("torch.")}
    if type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, list):
        return [encoded(entry, f"{path}.{i}", keep) for i, entry in enumerate(value)]
    if isinstance(value, tuple):
        return {"__tuple__": [encoded(entry, f"{path}.{i}", keep) for i, entry in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [(key, encoded(entry, f"{path}.{key}", keep)) for key, entry in value.items()]
        if all(isinstance(key, str) and key not in _TAGS for key, _ in pairs):
            return dict(pairs)
        return {"__items__": [[encoded(key, f"{path} (a key)", keep), entry] for key, entry in pairs]}
    raise TypeError(
        f"{path} is {type(value).__name__}, but a checkpoint holds plain data (None, bool, int, float, str, list, "
        f"tuple, dict), tensors, and objects with state_dict() and load_state_dict(): convert it, or leave it out"
    )


def decoded(value: Any, tensor: Callable[[str], Any]) -> Any:
    """Reverses `encoded`; ``tensor`` returns the tensor of a name. A sparse tensor of other things becomes None."""
    if isinstance(value, list):
        return [decoded(entry, tensor) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "__tuple__":
            return tuple(decoded(entry, tensor) for entry in content)
        if tag == "__items__":
            return {decoded(key, tensor): decoded(entry, tensor) for key, entry in content}
        if tag == "__tensor__":
            return tensor(content)
        if tag == "__sparse__":
            dense = decoded(content["parts"], tensor)
            return sparse.put_together(content, dense) if all(isinstance(p, Tensor) for p in dense) else None
        if tag == "__float__":
            return float(content)
        if tag == "__dtype__":
            return _DTYPES[content]
    return {key: decoded(entry, tensor) for key, entry in value.items()}


def tensor_names(value: Any) -> list[str]:
    """Returns the names of the tensors in encoded data."""
    if isinstance(value, list):
        return [name for entry in value for name in tensor_names(entry)]
    if not isinstance(value, dict):
        return []
    if set(value) == {"__tensor__"}:
        return [value["__tensor__"]]
    return [name for entry in value.values() for name in tensor_names(entry)]
