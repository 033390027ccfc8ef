"""Saves and loads a `ShardedLamb`: one rank's slices, or whole tensors on the first rank."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm.collectives import Traffic
from sharded_lamb.comm.consistency import Description, propagate_errors
from sharded_lamb.core.host_values import to_device
from sharded_lamb.optim.agreed_options import collective
from sharded_lamb.optim.base import States
from sharded_lamb.optim.parts import Consolidated, PartsOptimizer
from sharded_lamb.sharding import state
from sharded_lamb.sharding.dcp_tensors import asked_by_dcp
from sharded_lamb.sharding.shard_plan import Settings
from sharded_lamb.timeline import Timeline

LOAD_TIMEOUT_S = 900.0
"""Seconds that a rank which loads a state dict waits for the others, which may still read theirs."""


class ShardedOptimizer(PartsOptimizer):
    """State dicts and reports of a `ShardedLamb`, without its step."""

    def _gradient_edits(self) -> Tensor | None:
        return self._gradients.edits()

    def _described_edits(self) -> Description:
        return self._gradients.described_edits()

    def synchronize(self) -> None:
        """Wait until every parameter is gathered."""
        raise NotImplementedError

    # -- the factor of clip_grad_norm_ --------------------------------------------------------------

    def _clip_by(self, factor: Tensor, max_norm: float | None) -> None:
        live = self._live
        live.clip, live.max_norm = factor, (*live.max_norm, max_norm)
        self._note_clipped()

    def _note_clipped(self) -> None:
        """The factor is of the gradients as they are now."""
        self._live.clip_of = list(self._gradients.identities())

    def _drop_clip(self) -> None:
        live = self._live
        live.clip, live.max_norm, live.clip_of = None, (), []

    def _clip_factor(self, *, for_step: bool) -> Tensor | None:
        """fp64 scalar, or [P]: 1 for gradients that are not those that were clipped; None: no gradient was.

        Raises:
            RuntimeError: ``for_step``, and gradients were changed in place after they were clipped.
        """
        live = self._live
        if live.clip is None:
            return None
        is_new, grads = [], self._gradients.identities()
        for name, grad, clipped in zip_longest(self._store.names, grads, live.clip_of):
            if grad is None or clipped is None or clipped[0] is not grad[0]:
                is_new.append(grad is not None)
                continue
            is_changed = grad[1] != clipped[1]
            if is_changed and for_step:
                raise RuntimeError(
                    f"the gradient of {name!r} was changed in place after clip_grad_norm_(): call it again after the "
                    f"last change, or zero gradients with set_to_none=True"
                )
            is_new.append(is_changed)
        if not any(is_new):
            return live.clip
        if all(new or grad is None for new, grad in zip(is_new, grads, strict=True)):
            return None
        mask = to_device(is_new, None, live.clip.device)
        return torch.where(mask, torch.ones_like(live.clip), live.clip)

    def _refresh_state(self) -> None:
        """Set ``self.state`` of all parameters to views of the store's current memory."""
        store, topology = self._store, self._store.topology
        states = state.local_states(store.layout, store.buckets, store.step)
        states |= state.dtensor_states(
            store.layout, store.dtensors, store.specs, topology.rank, len(topology.everyone), store.step
        )
        self._live.entries.write(store, self.state, states)

    def _check_states(self, states: States) -> None:
        if self._settings.gather_dtype is None:
            state.warn_of_masters(states)
        if state.is_whole(states.values()):
            rows = ((name, p.shape, states[p]) for name, p, _ in self._named_parameters() if p in states)
            state.check_full(rows, self.moments)
            return
        store, grouped = self._store, {p for group in self.param_groups for p in group["params"]}
        self._take_state_edits()
        for param, (name, p) in enumerate(zip(store.names, store.params, strict=True)):
            if p in states:
                state.check_local(name, p, self.state[p], store.states_of(param), states[p])
            elif (
                p.requires_grad and p in grouped
            ):  # get_state_dict may leave out frozen ones, whose state remains
                raise ValueError(f"the state dict has no state of {name!r}: it is of another model")
        absent = [name for name, p, _ in self._named_parameters() if p in states and p not in store.index]
        if absent:
            raise ValueError(
                f"the state dict has slices of {absent[0]!r}, which is frozen here and has no slice: {state.REMEDY}"
            )

    def _load_states(self, states: States) -> None:
        store = self._store
        if self._settings.ema_decay is None:
            state.warn_of_average(states.values())
        if not state.is_whole(states.values()):
            for param, p in enumerate(store.params):
                if p in states:
                    state.load_local(p, self.state[p], store.states_of(param), states[p])
            return
        self.register_stateful([p for p, saved in states.items() if state.steps_of(saved)])
        for param, p in enumerate(store.params):
            store.load_whole(param, states.get(p))

    def register_stateful(self, params: Iterable[Tensor]) -> None:
        """Register those of ``params`` that are frozen and have no memory yet, so that their state can be loaded.

        Collective, like the registration of parameters that were unfrozen, if there are any.
        """
        new = [p for p in params if p not in self._store.index]
        frozen = [p for p in new if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)  # hooks need it; a parameter keeps them when it is frozen
            if new:
                self._register_new()
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def _register_new(self) -> None:
        """Register parameters that require gradients and are not in the store yet. Collective."""
        raise NotImplementedError

    def _follow(self) -> None:
        """Register all parameters anew if the model was moved, or its parameters replaced. Collective then."""
        raise NotImplementedError

    def _successors(self) -> dict[int, Tensor]:
        """{registered parameter: the new one that replaced it in its group}."""
        raise NotImplementedError

    def register_replaced(self) -> None:
        """Register parameters that replaced others in the groups, as the next step would. Collective if there are any.

        Raises as the registration at construction.
        """
        self._check_shows_weights()
        if self._successors():
            self._follow()

    def _check_shows_weights(self) -> None:
        """Raises RuntimeError inside `averaged`."""
        if self._live.own_weights is not None:
            raise RuntimeError(
                "parameters hold the average of their values: leave `with optimizer.averaged():` before a step, a "
                "checkpoint or a load"
            )

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        super()._load_groups(saved_groups)
        self._skips.reset()
        self._state_changed()

    def _state_changed(self) -> None:
        """Forget the consolidated state."""
        self._live.consolidated, self._live.is_new = None, False

    def state_dict(self) -> dict[str, Any]:
        """This rank's slices with stamps; after `consolidate_state_dict`, whole tensors on the rank that has them.

        Slices are for this rank of as many ranks: save every rank's. Warns about slices, since a framework that saves
        one rank's loses the others'; `local_state_dict` does not. torch.distributed.checkpoint receives slices and
        saves all ranks', or gathers whole tensors (``full_state_dict=True``; collective). Tensors are the memory that
        steps update, but copies where it holds no values: fp32 of masters stored as remainders, bfloat16 of 8-bit
        moments.

        Raises:
            RuntimeError: parameters were replaced in the groups of several ranks.
        """
        asked = asked_by_dcp()
        if asked is not None or self._collectives.world_size == 1:
            self.register_replaced()  # torch.distributed.checkpoint asks every rank
        if asked is not None and asked.whole and self._store.buckets:
            return self._whole(range(1 if asked.on_first else self._collectives.world_size))
        if asked is None and self._live.consolidated is not None:
            if self._live.consolidated.whole is None:
                return self.local_state_dict()
            whole = {position: dict(entry) for position, entry in self._live.consolidated.whole.items()}
            return {**super().local_state_dict(), "state": whole}
        packed = self.local_state_dict()
        if self._collectives.world_size == 1:
            return packed
        if asked is None and not self._live.is_new and not asked_by_accelerates_prepare():
            warnings.warn(
                f"state_dict() of a ShardedLamb over {self._collectives.world_size} ranks is this rank's slices, and "
                f"the slices of rank 0 alone cannot resume a run: save every rank's, or {state.REMEDY}",
                UserWarning,
                stacklevel=2,
            )
        if asked is not None and asked.whole:
            return _without_stamps(packed)  # torch makes the slices whole
        return packed

    def _whole(self, ranks: range) -> dict[str, Any]:
        """`state_dict` with whole tensors on ``ranks``, and without state on others. Collective."""
        gathered = [whole for whole in map(self._gathered, ranks) if whole is not None]
        return {**super().local_state_dict(), "state": gathered[0] if gathered else {}}

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's slices, as `state_dict`, whoever asks for them."""
        if self._successors():
            raise RuntimeError(
                "parameters were replaced in the groups, and a local call cannot move their state to the new ones: "
                "call register_replaced() on every rank before it"
            )
        packed = super().local_state_dict()
        self._decode(packed["state"])
        return packed

    @collective
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load whole tensors, of which every rank takes its slices, or the slices that this rank saved. Collective.

        Whole tensors are those of `full_state_dict`, of `state_dict` after `consolidate_state_dict`, and of
        `Lamb.state_dict`; every rank passes them, and any number of ranks may have saved them. State of frozen
        parameters is kept for the steps after they are unfrozen, also where slices lack it. Collectives: a comparison
        over ranks; those of a registration if frozen parameters have state.

        Raises:
            ValueError: groups, parameters or shapes differ from this optimizer's, slices are another rank's or of
                another number of ranks, or ranks load different states; on every rank, and nothing was loaded.
            RuntimeError: a rank does not call it.
        """
        self._follow()
        topology = self._store.topology
        asked = asked_by_dcp()
        if asked is not None and asked.whole and self._store.buckets:
            state_dict = _without_stamps(state_dict)  # torch leaves this rank's beside whole tensors
        with propagate_errors(
            topology, always=True, what="load_state_dict", timeout_s=LOAD_TIMEOUT_S
        ) as description:
            groups, states = self._checked(self._after_pre_hooks(state_dict))
            sizes = ((f"saved group {i}", len(group["params"])) for i, group in enumerate(groups))
            description += [("step counts", [state.steps_of(saved) for saved in states.values()]), *sizes]
        self._load(groups, states)

    @collective
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state on rank ``to`` of this optimizer's ranks, as ZeroRedundancyOptimizer does. Collective.

        Until the next step, load or new group, `state_dict` there is whole, with whole tensors on the CPU in the format
        of `full_state_dict`, and other ranks' `state_dict` is their slices. `load_state_dict` takes both.

        Raises:
            ValueError: ``to`` is no rank of this optimizer.
        """
        world = self._collectives.world_size
        if not 0 <= to < world:
            raise ValueError(f"to must be one of this optimizer's ranks 0 to {world - 1}, got {to!r}")
        self._live.consolidated = Consolidated(self._gathered(to))

    def _gathered(self, to: int) -> dict[int, state.State] | None:
        """{position in the groups: whole state} on rank ``to``, else None. Collective."""
        self.register_replaced()
        store, states = self._store, self._gather(to)
        if states is None:
            return None
        order = [p for group in self.param_groups for p in group["params"]]
        return {position: states[store.index[p]] for position, p in enumerate(order) if p in store.index}

    def _gather(self, to: int) -> dict[int, state.State] | None:
        """{registered parameter: whole state} on rank ``to``, else None. Collective."""
        store = self._store
        return state.gather_full(
            self._collectives, store.layout, store.buckets, store.dtensors, store.step, to
        )

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

    @collective
    def full_state_dict(self) -> dict[str, Any] | None:
        """Whole state tensors on the first rank's CPU, in the format of `Lamb.load_state_dict`; None elsewhere.

        Collective; streamed, so that only the first rank holds more than one bucket of other ranks' state.
        Includes ``master`` entries (fp32 weights of fp16 and bf16 parameters, and of all under ``gather_dtype``) beside
        the moments.
        """
        whole = self._gathered(0)
        if whole is None:
            return None
        return {"state": whole, "param_groups": super().local_state_dict()["param_groups"]}

    @collective
    def load_full_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Load the result of `full_state_dict` or `Lamb.state_dict`, on any number of ranks. Collective.

        Args:
            state_dict: on the first rank; the other ranks pass None.

        Raises:
            ValueError: the first rank's state does not fit; on every rank.
        """
        self._check_shows_weights()
        self._follow()
        store = self._store
        first = store.topology.rank == 0
        order = [p for group in self.param_groups for p in group["params"]]
        states: States = {}
        sent: list[Any] = [None, []]  # groups; positions of parameters with state
        with propagate_errors(store.topology, always=True, what="load_full_state_dict"):
            if first:
                sent[0], states = self._checked(state.check_complete(state_dict))
                named = self._named_parameters()
                rows = ((name, p.shape, states[p]) for name, p, _ in named if p in states)
                state.check_full(rows, self.moments)
                sent[1] = [i for i, p in enumerate(order) if p in states and state.steps_of(states[p])]
        if self._collectives.everyone is not None:
            dist.broadcast_object_list(sent, store.topology.everyone[0], group=self._collectives.everyone.pg)
        groups, stateful = sent
        self.register_stateful([order[position] for position in stateful])
        self._scatter(states if first else None)
        self._load_groups(groups)

    def _scatter(self, states: States | None) -> None:
        """Store whole states of registered parameters, which the first rank passes. Collective."""
        store = self._store
        by_index = None
        if states is not None:
            by_index = {store.index[p]: saved for p, saved in states.items() if p in store.index}
        state.scatter_full(self._collectives, store.buckets, store.dtensors, store.step, by_index)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's averaged gradients, unscaled, before clipping; or None. Reads the device."""
        return self._live.results.grad_norm

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that this rank has sent since construction, by collective."""
        return self._collectives.traffic

    @contextmanager
    def record(self, timeline: Timeline) -> Iterator[None]:
        """Record on ``timeline`` the sends, waits and computation inside, of this rank only. Not collective."""
        traffic = self._collectives.traffic
        before, traffic.timeline = traffic.timeline, timeline
        try:
            yield
        finally:
            traffic.timeline = before

    def expected_bytes(self) -> dict[str, int]:
        """Predicted bytes that this rank sends per step, by the names of `traffic`.

        The first two steps add 2 W fp64 to the small all-reduces for each kind of replicated gradients (stage 1's
        plain ones; replicated DTensors). Excludes all-reduces of gradients with ``Partial`` placements.
        """
        needs_summary = self.max_grad_norm is not None or self._any("normalize_grad")
        return self._store.bytes_on_wire(len(self._sums), needs_summary=needs_summary)

    def memory(self) -> dict[str, int]:
        """Bytes on this rank: parameters, masters, moments, gradient_shards, staging; averages with ``ema_decay``."""
        messages = sum(gather.message_bytes() for gather in self._store.gathers)
        return {**self._store.bytes_by_kind(), "staging": self._gradients.staging_bytes() + messages}

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks that share the state."""
        return self._store.topology.everyone

    @property
    def stages(self) -> str:
        """ "1", "2", "3", "1 and 3" or "2 and 3": see ``stage``."""
        return self._store.stages

    @property
    def gather_dtype(self) -> torch.dtype | None:
        """The option."""
        return self._settings.gather_dtype

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
            "wide": {"max_grad_norm": self.max_grad_norm, "ratio_blocks": self.ratio_blocks},
            "param_groups": self.param_groups,
            "full": self.full_state_dict(),
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        settings: Settings = pickled["settings"]
        defaults = dict(pickled["defaults"])
        keywords = {name: getattr(settings, name) for name in settings.__slots__}
        self.__init__(pickled["param_groups"], **{**keywords, **defaults, **pickled["wide"]})  # type: ignore[misc]
        self.load_full_state_dict(pickled["full"])


def _without_stamps(state_dict: dict[str, Any]) -> dict[str, Any]:
    states = {
        position: {key: value for key, value in entry.items() if key != "shard"}
        for position, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def asked_by_accelerates_prepare() -> bool:
    """Whether Accelerate's wrapper, at its construction, asks for a state that it loads again."""
    code, module = sys._getframe(2).f_code, sys._getframe(2).f_globals.get("__name__")
    return module == "accelerate.optimizer" and code.co_name == "__init__"
