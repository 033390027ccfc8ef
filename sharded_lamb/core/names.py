"""Parameter names: wrappers' prefixes, and patterns that select parameters by name or shape.

Strings and integers; imports no torch.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

WRAPPER_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""Inserted anywhere in a name by torch.compile, activation checkpointing and FSDP."""

BY_SHAPE: dict[str, Callable[[int], bool]] = {"ndim<=1": lambda ndim: ndim <= 1, "all": lambda ndim: True}
"""Patterns that need no names: biases and norm weights by shape, or every parameter."""


def normalize(name: str) -> str:
    """The name in the unwrapped module: ``module._orig_mod.fc.bias`` → ``fc.bias``; without what `unique` added."""
    for infix in WRAPPER_INFIXES:
        name = name.replace(infix, "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return _ADDED.sub("", name)


_ADDED = re.compile(r" \(group \d+, parameter \d+\)")


def unique(name: str, group: int, position: int) -> str:
    """A name for a parameter whose own ``name`` an earlier one has: two models in one optimizer."""
    return f"{name} (group {group}, parameter {position})"


def validate_patterns(option: str, patterns: Any) -> tuple[str, ...]:
    """``patterns`` as a tuple, each checked once.

    Raises:
        ValueError: a pattern is not a regular expression.
        TypeError: ``patterns`` is not a sequence of strings.
    """
    is_sequence = hasattr(patterns, "__len__") and hasattr(patterns, "__getitem__")
    if not is_sequence or isinstance(patterns, (str, bytes, Mapping)):
        raise TypeError(
            f"{option} must be a sequence of patterns, got {patterns!r}; write {option}=({patterns!r},)"
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} must hold strings, got {pattern!r}")
        if pattern in BY_SHAPE:
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{option}: {pattern!r} is not a regular expression ({error}); "
                f"patterns are searched with re.search over parameter names"
            ) from error
    return tuple(map(str, patterns))


def matching(patterns: Iterable[str], name: str | None, ndim: int) -> set[str]:
    """The subset of ``patterns`` that match the parameter ``name`` with ``ndim`` dimensions."""
    matches = set()
    for pattern in patterns:
        if pattern in BY_SHAPE:
            if BY_SHAPE[pattern](ndim):
                matches.add(pattern)
        elif name is not None and re.search(pattern, normalize(name)):
            matches.add(pattern)
    return matches


def needs_names(patterns: Iterable[str]) -> bool:
    """Whether any of ``patterns`` matches by name rather than by shape."""
    return any(pattern not in BY_SHAPE for pattern in patterns)


def check_use(option: str, patterns: tuple[str, ...], used: set[str], example: str | None) -> None:
    """Raise if no pattern matches a parameter; warn about each one that matches none.

    Raises:
        ValueError: none of ``patterns`` matches a parameter.
    """
    unused = [pattern for pattern in patterns if pattern not in used]
    if not unused:
        return
    hint = f"; a name here looks like {normalize(example)!r}" if example is not None else ""
    if not used:
        raise ValueError(
            f"{option}={patterns!r} matches no parameter{hint}. Patterns are searched with re.search in the "
            f"names that named_parameters() gives, wrappers' prefixes removed"
        )
    warnings.warn(f"{option}: {unused!r} matches no parameter{hint}", UserWarning, stacklevel=2)


def check_same_order(saved: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if two names in the same place of two groups differ; names may be missing."""
    for saved_name, own_name in zip(
        saved.get("param_names") or (), own.get("param_names") or (), strict=False
    ):
        if None not in (saved_name, own_name) and normalize(str(saved_name)) != normalize(str(own_name)):
            raise ValueError(
                f"{where} has {saved_name!r} where this optimizer has {own_name!r}: pass the parameters in the order "
                f"in which they were saved"
            )
