"""The entries of ``optimizer.state``, which a program may remove or replace, as of any optimizer of torch."""

import functools
import operator
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.sharding.buckets import flattened, memory_strides
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.param_store import ParamStore
from sharded_lamb.sharding.placements import local_part
from sharded_lamb.sharding.state import State, check_step

States = MutableMapping[Tensor, dict[str, Any]]


class _Edits:
    """Whether a program has written to entries."""

    __slots__ = ("were_made",)

    def __init__(self) -> None:
        self.were_made = False


def _noting(edit: Callable[..., Any]) -> Any:
    @functools.wraps(edit)
    def noted(entry: "_Entry", *args: Any, **keywords: Any) -> Any:
        if entry.edits is not None:
            entry.edits.were_made = True
        return edit(entry, *args, **keywords)

    return noted


class _Entry(dict[str, Any]):
    """A parameter's entry, which notes edits: to compare all values at each step would read each into the cache.

    Copies and pickles are plain dicts. ``setdefault`` needs no note: what it may replace was removed before.
    """

    __slots__ = ("edits",)

    def __init__(self, items: Mapping[str, Any], edits: _Edits | None = None) -> None:
        """``edits``: None where other code makes one of this type, as some copy nested dicts."""
        super().__init__(items)
        self.edits = edits

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    __setitem__ = _noting(dict.__setitem__)
    __delitem__ = _noting(dict.__delitem__)
    __ior__ = _noting(dict.__ior__)
    clear = _noting(dict.clear)
    pop = _noting(dict.pop)
    popitem = _noting(dict.popitem)
    update = _noting(dict.update)


class StateEntries:
    """What a `ShardedLamb` wrote: an entry for each registered parameter, whose tensors are views of its memory."""

    def __init__(self) -> None:
        self._own: dict[int, State] = {}
        self._entries: list[Any] = []  # all that optimizer.state had when they were last compared
        self._foreign: list[Any] = []  # those of them that a program made
        self._values: list[Any] = []  # of these
        self._edits = _Edits()  # of the others

    def write(self, store: ParamStore, states: States, own: Mapping[int, State]) -> None:
        """Write the entries ``own`` of all registered parameters."""
        self._own = {param: dict(entry) for param, entry in sorted(own.items())}
        for param, entry in self._own.items():
            states[store.params[param]] = _Entry(entry, self._edits)
        self._note(states)

    def forget(self) -> None:
        """Hold no memory any more."""
        self._own, self._entries, self._foreign, self._values = {}, [], [], []

    def look_again(self) -> None:
        """Compare all entries next time: one was edited, or other parameters have a group."""
        self._edits.were_made = True

    def take_edits(self, store: ParamStore, states: States, grouped: Callable[[int], bool]) -> int:
        """Bring what a program removed or replaced into the memory of ``store``: removed state begins anew.

        ``grouped``: whether a parameter has a group; others need no entry. Where an entry has encoded state, values
        under the kind's own key replace it ("exp_avg" beside "exp_avg_codes").

        Returns:
            A hash of what was edited, 0 if nothing was. Ranks must edit alike.

        Raises:
            ValueError: a tensor of another shape, or a step that is no count; nothing was changed.
        """
        if self._is_unchanged(states):
            return 0
        edits: dict[tuple[int, str], Any] = {}
        for param, own in self._own.items():
            entry: Mapping[str, Any] = states.get(store.params[param], {})
            if not entry and not grouped(param):
                continue
            edits |= {(param, key): entry.get(key) for key in own if entry.get(key) is not own[key]}
            encoded = [state.kind for state in store.states_of(param) if state.key != state.kind]
            edits |= {(param, kind): entry[kind] for kind in encoded if kind in entry}
        for (param, key), value in edits.items():
            _check(store, param, key, value)
        # An entry of another parameter is memory that is written here.
        copies = {at: value.clone() if isinstance(value, Tensor) else value for at, value in edits.items()}
        for (param, key), value in copies.items():
            _take(store, param, key, value)
            p = store.params[param]
            if p not in states:
                states[p] = _Entry({}, self._edits)
            if key in self._own[param]:
                states[p][key] = self._own[param][key]
            else:
                del states[p][key]
        self._note(states)
        edited = [(*place, value is None) for place, value in edits.items()]
        # hash() of a string differs between processes.
        return zlib.crc32(repr(edited).encode()) if edits else 0

    def _note(self, states: States) -> None:
        self._entries = [*states.values()]
        self._foreign = [entry for entry in self._entries if getattr(entry, "edits", None) is not self._edits]
        self._values, self._edits.were_made = _values(self._foreign), False

    def _is_unchanged(self, states: States) -> bool:
        if self._edits.were_made or len(states) != len(self._entries):
            return False
        if not all(map(operator.is_, states.values(), self._entries)):
            return False
        values = _values(self._foreign)
        return len(values) == len(self._values) and all(map(operator.is_, values, self._values))


def _values(entries: list[Any]) -> list[Any]:
    return [value for entry in entries if isinstance(entry, dict) for value in entry.values()]


def _check(store: ParamStore, param: int, key: str, value: Any) -> None:
    """``key``: of an entry, or a kind of encoded state."""
    if value is None or key == "shard":
        return
    name, p = store.names[param], store.params[param]
    if key == "step":
        check_step(name, {"step": value})
        return
    state = next(state for state in store.states_of(param) if key in (state.key, state.kind))
    fitting = [p.shape, torch.Size([state.numel])]
    if key == state.key:
        fitting.append(state.stored.shape)
    if is_dtensor(p):
        fitting.append(local_part(p).shape)
    if not isinstance(value, Tensor) or value.shape not in fitting:
        actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"optimizer.state has {actual} as {key} of {name!r}, which has shape {tuple(p.shape)}: write a tensor of "
            f"that shape, or this rank's slice of {state.numel} elements"
        )


def _take(store: ParamStore, param: int, key: str, value: Any) -> None:
    """``value``: None, or as checked."""
    if key == "step":
        store.step[param] = 0 if value is None else as_tensor(value).reshape(())
    for state in store.states_of(param):
        if key not in (state.key, state.kind):
            continue
        p = store.params[param]
        if value is None:
            state.reset()
        elif key == state.key and (value.shape, value.dtype) == (state.stored.shape, state.stored.dtype):
            state.stored.copy_(value)
        elif is_dtensor(value) and is_dtensor(p):
            state.store(flattened(local_part(value), memory_strides(local_part(p))))
        elif value.shape == p.shape:
            state.store(store.part_of_whole(param, value))
        else:
            state.store(value.reshape(-1))
