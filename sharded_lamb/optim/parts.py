"""What a `ShardedLamb` is made of on one device."""

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.forward_gathers import ForwardGathers
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import Grouping
from sharded_lamb.gradients.source import GradientSource, Identity
from sharded_lamb.kernels import Kernel
from sharded_lamb.optim.agreed_options import AgreedLive, AgreedOptions
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.optim.state_entries import StateEntries
from sharded_lamb.optim.step_results import StepResults
from sharded_lamb.sharding import state
from sharded_lamb.sharding.param_store import ParamStore
from sharded_lamb.sharding.shard_plan import Settings


@dataclass(frozen=True)
class Consolidated:
    """The state that `ShardedOptimizer.consolidate_state_dict` gathered."""

    whole: dict[int, state.State] | None  # by position in the groups; None: on another rank


@dataclass(slots=True)
class ShardedLive(AgreedLive):
    """See `sharded_lamb.optim.base.Live`."""

    table: OptionTable = field(init=False, repr=False)
    store: ParamStore = field(init=False, repr=False)
    kernel: Kernel = field(init=False, repr=False)
    collectives: Collectives = field(init=False, repr=False)
    gradients: GradientSource = field(init=False, repr=False)
    skips: SkipCounter = field(init=False, repr=False)
    gathers: ForwardGathers = field(default_factory=ForwardGathers)
    clip: Tensor | None = None  # the factor of `clip_grad_norm_` for the next step
    clip_of: list[Identity | None] = field(default_factory=list)  # the clipped gradients
    max_norm: tuple[float | None, ...] = ()  # its arguments
    scanned: Grouping | None = None  # at the last scan
    frozen_params: list[Tensor] = field(default_factory=list)  # those of them that the store lacked
    removed: list[int] = field(default_factory=list)  # registered parameters that were then in no group
    grouped: int = 0  # a hash of the index of each registered parameter's group
    own_weights: list[Tensor] | None = None  # this rank's, while parameters hold their averages
    results: StepResults = field(default_factory=StepResults)
    entries: StateEntries = field(default_factory=StateEntries)
    bad_edit: ValueError | None = None  # an edit of the groups or of ``optimizer.state`` that does not fit
    edits: int = 0  # a hash of what was edited in ``optimizer.state`` since the last step
    is_summarized: bool = False
    closed: str | None = None  # why
    ddp: "list[weakref.ref[Any]] | None" = None  # models that hold parameters of this optimizer
    has_joined: bool = False  # this rank, inside `Join`
    consolidated: Consolidated | None = None
    is_new: bool = True  # no step and no load yet: no state to lose
    may_defer: bool = False  # whether the last step needed no agreed summary of gradients
    has_deferred: bool = False  # whether it summed the summary with the norms


class PartsOptimizer(AgreedOptions):
    """An `AgreedOptions` with the parts of a `ShardedLamb`, which a move of its model to another device replaces."""

    _settings: Settings
    _live: ShardedLive
    _live_class = ShardedLive

    def _take_state_edits(self) -> None:
        """See `StateEntries.take_edits`."""
        live, removed = self._live, {*self._live.removed}
        edits = live.entries.take_edits(self._store, self.state, lambda param: param not in removed)
        if edits:
            live.edits += edits
            live.consolidated = None

    @property
    def _store(self) -> ParamStore:
        return self._live.store

    @property
    def _kernel(self) -> Kernel:
        return self._live.kernel

    @property
    def _collectives(self) -> Collectives:
        return self._live.collectives

    @property
    def _gradients(self) -> GradientSource:
        return self._live.gradients

    @property
    def _gathers(self) -> ForwardGathers:
        return self._live.gathers

    @property
    def _skips(self) -> SkipCounter:
        return self._live.skips

    def _step_results(self) -> list[StepResults]:
        return [self._live.results]

    @property
    def _table(self) -> OptionTable:
        return self._live.table
