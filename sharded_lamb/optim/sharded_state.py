"""Saves and loads a `ShardedLamb`: one rank's slices, or whole tensors on the first rank."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.consistency import propagate_errors
from sharded_lamb.core.options import OptionTable
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.sharding import state
from sharded_lamb.sharding.param_store import ParamStore
from sharded_lamb.sharding.shard_plan import Settings


class ShardedOptimizer(LambOptimizer):
    """State dicts of a `ShardedLamb`, without its step."""

    _settings: Settings
    _store: ParamStore
    _collectives: Collectives
    _skips: SkipCounter
    _table: OptionTable

    def synchronize(self) -> None:
        """Wait until every parameter is gathered."""
        raise NotImplementedError

    def _refresh_state(self) -> None:
        """Set ``self.state`` of all parameters to views of the store's current memory."""
        store, topology = self._store, self._store.topology
        states = state.local_states(store.layout, store.buckets, store.step)
        states |= state.dtensor_states(
            store.layout, store.dtensors, store.specs, topology.rank, len(topology.everyone), store.step
        )
        for param, entry in sorted(states.items()):
            self.state[store.params[param]] = entry

    def _load_tensors(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        store = self._store
        for param, (name, p) in enumerate(zip(store.names, store.params, strict=True)):
            if p not in states:
                raise ValueError(f"the state dict has no state of {name!r}: it is of another model")
            state.check_local(name, self.state[p], store.states_of(param), states[p])
        for param, p in enumerate(store.params):
            state.load_local(self.state[p], store.states_of(param), states[p])

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        super()._load_groups(saved_groups)
        self._table = self._option_table(self._store.rows, self._store.device)  # patterns may have changed
        self._skips.reset()

    def state_dict(self) -> dict[str, Any]:
        """This rank's slices with stamps: save every rank's, and load each on the same rank of as many ranks.

        Tensors are the memory that steps update, except masters stored as remainders: fp32, in new memory.
        Warns if the calling framework saves the first rank's slices only (Hugging Face's Trainer).

        Raises:
            TypeError: torch.distributed.checkpoint asks for whole tensors of plain parameters.
        """
        if self._collectives.world_size > 1 and called_by("transformers.trainer"):
            warnings.warn(
                "transformers' Trainer saves the optimizer of rank 0 only, and state_dict() of a ShardedLamb over "
                f"{self._collectives.world_size} ranks holds rank 0's slices only: this checkpoint cannot resume the "
                "optimizer. Save full_state_dict() in a TrainerCallback, or set save_only_model=True",
                UserWarning,
                stacklevel=2,
            )
        packed = super().state_dict()
        self._decode(packed["state"])
        if self._collectives.world_size > 1 and full_state_requested():
            if self._store.buckets:
                raise TypeError(
                    "StateDictOptions(full_state_dict=True) would read this rank's slices as whole tensors: use "
                    "ShardedLamb.full_state_dict() and load_full_state_dict(), or omit the option"
                )
            # A stamp identifies a slice; the result will be whole.
            packed["state"] = {
                position: {key: value for key, value in entry.items() if key != "shard"}
                for position, entry in packed["state"].items()
            }
        return packed

    def _decode(self, entries: dict[int, dict[str, Any]]) -> None:
        """Replace encoded state by its values. ``entries``: of a packed state, by position in the groups."""
        store = self._store
        decoded = state.decoded_states(store.buckets, store.dtensors)
        order = [p for group in self.param_groups for p in group["params"]]
        for position, p in enumerate(order):
            if p not in store.index or position not in entries:
                continue
            param = store.index[p]
            kinds = {stored.key: stored.kind for stored in store.states_of(param)}
            named = {kinds.get(key, key): value for key, value in entries[position].items()}
            entries[position] = {**named, **decoded[param]}

    def full_state_dict(self) -> dict[str, Any] | None:
        """Whole state tensors on the first rank's CPU, in the format of `Lamb.load_state_dict`; None elsewhere.

        Collective; streamed, so that only the first rank holds more than one bucket of other ranks' state.
        Includes ``master`` entries (fp32 weights of fp16 and bf16 parameters) beside the moments.
        """
        store = self._store
        states = state.gather_full(self._collectives, store.layout, store.buckets, store.dtensors, store.step)
        if states is None:
            return None
        packed = super().state_dict()
        order = [p for group in self.param_groups for p in group["params"]]
        whole = {position: states[store.index[p]] for position, p in enumerate(order) if p in store.index}
        return {"state": whole, "param_groups": packed["param_groups"]}

    def load_full_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Load the result of `full_state_dict` or `Lamb.state_dict`, on any number of ranks. Collective.

        Args:
            state_dict: on the first rank; the other ranks pass None.

        Raises:
            ValueError: the first rank's state does not fit; on every rank.
        """
        store = self._store
        first = store.topology.rank == 0
        with propagate_errors(store.topology, always=True):
            if first:
                saved = state.check_complete(state_dict)
                self._check_saved_groups(saved["param_groups"])
                order = [p for group in self.param_groups for p in group["params"]]
                states = state.by_index(saved["state"], [store.index.get(p) for p in order])
                state.check_full(store.names, [tuple(p.shape) for p in store.params], states)
        groups: list[Any] = [state_dict["param_groups"] if first and state_dict is not None else None]
        if self._collectives.everyone is not None:
            first_rank = store.topology.everyone[0]
            dist.broadcast_object_list(groups, first_rank, group=self._collectives.everyone.pg)
        state.scatter_full(
            self._collectives, store.buckets, store.dtensors, store.step, states if first else None
        )
        self._load_groups(groups[0])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks that share the state."""
        return self._store.topology.everyone

    @property
    def stages(self) -> str:
        """ "1", "2", "3", "1 and 3" or "2 and 3": see ``stage``."""
        return self._store.stages

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for non-finite gradients, since construction or from a checkpoint. Reads the device."""
        return self._skips.total

    @skipped_steps.setter
    def skipped_steps(self, total: int) -> None:
        self._skips.set_total(total)

    def __getstate__(self) -> dict[str, Any]:
        if self._collectives.world_size > 1:
            raise TypeError(
                "a ShardedLamb over several ranks has one rank's slices and process groups, and cannot be pickled or "
                "copied: use state_dict() on every rank, or full_state_dict()"
            )
        return {
            "settings": self._settings,
            "defaults": self.defaults,
            "max_grad_norm": self.max_grad_norm,
            "param_groups": self.param_groups,
            "full": self.full_state_dict(),
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        settings: Settings = pickled["settings"]
        defaults = dict(pickled["defaults"])
        keywords = {name: getattr(settings, name) for name in settings.__slots__}
        self.__init__(  # type: ignore[misc]
            pickled["param_groups"], **keywords, **defaults, max_grad_norm=pickled["max_grad_norm"]
        )
        self.load_full_state_dict(pickled["full"])


def full_state_requested() -> bool:
    """Whether torch.distributed.checkpoint.state_dict calls with ``StateDictOptions(full_state_dict=True)``."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return bool(getattr(frame.f_locals.get("info"), "full_state_dict", False))
        frame = frame.f_back  # type: ignore[assignment]
    return False


def called_by(module: str) -> bool:
    """Whether a function of ``module`` is on this thread's stack."""
    if module not in sys.modules:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
