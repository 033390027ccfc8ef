"""Stage 2: buckets are reduce-scattered while backward runs, and full gradients freed.

One *round* reduces every bucket once, in bucket order on every rank: gloo matches operations by order alone, and
ranks' hooks may fire in different orders. A bucket is launched once all its parameters have fired and all buckets
before it are launched; a callback at the end of backward launches the rest, missing gradients as zeros. Rounds add up
until the gradients are zeroed, as ``.grad`` does.
"""

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import faults
from sharded_lamb.comm.collectives import Collectives, Pending
from sharded_lamb.core.parameters import check_gradient
from sharded_lamb.gradients.exchange import Staging
from sharded_lamb.gradients.sentinel import Sentinel
from sharded_lamb.gradients.source import Registration
from sharded_lamb.gradients.summary import GradientSummary, agree, spoil_on_purpose
from sharded_lamb.kernels import Kernel, ReceivedShards
from sharded_lamb.kernels.incoming import with_local_contribution
from sharded_lamb.sharding.buckets import FlatBucket

IN_FLIGHT = 2
"""Buckets whose exchange may be under way at once: one on the wire and one behind it. A third was not faster on two
ranks of BERT-base, and held 55 MB more."""

SYNCED_ROUNDS = 2
"""On a GPU the host reads left-over gradients in the first rounds only; late parameters are known by then."""


class ReducerState(Enum):
    """What a `BackwardReducer` holds between two calls, and what each call makes of it.

    ======== ==================== ========= ========== =======
    state    gradient, or `flush` `flush`   `stepped`  `zero`
             opens a round        closes it
    ======== ==================== ========= ========== =======
    EMPTY    ROUND                                     EMPTY
    ROUND                         REDUCED              REDUCED, then EMPTY
    REDUCED  ROUND                          USED       EMPTY
    USED     ROUND                          USED       EMPTY
    ======== ==================== ========= ========== =======

    ``model.zero_grad()`` reaches none of it: the sentinel tells of that when the next round opens.
    """

    EMPTY = auto()  # no reduced gradients are held: none yet, or they were zeroed
    ROUND = auto()  # a round is open: buckets travel as their gradients arrive
    REDUCED = auto()  # every gradient is in its shard, and no step has used it
    USED = auto()  # a step has used the gradients; a round that follows adds to them unless they are zeroed


TRANSITIONS = {
    ReducerState.EMPTY: {ReducerState.ROUND, ReducerState.EMPTY},
    ReducerState.ROUND: {ReducerState.REDUCED},
    ReducerState.REDUCED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
    ReducerState.USED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
}


@dataclass(slots=True)
class _InFlight:
    """One bucket's exchange under way."""

    index: int  # of the bucket
    pending: Pending
    staging: Staging
    grads: list[Tensor | None]  # may be sent from where they lie


@dataclass(slots=True)
class _Round:
    """One round; none between rounds."""

    fresh: bool  # its gradients replace those of rounds before, else they add up
    square_sums: Tensor  # [P] fp64 Σg² of this rank's shards
    missing: list[int]  # [buckets] gradients that each bucket still waits for
    next: int = 0  # the bucket to launch next
    fired: set[int] = field(default_factory=set)  # parameters whose gradient has arrived
    in_flight: deque[_InFlight] = field(default_factory=deque)
    is_callback_queued: bool = False  # at the end of the backward that runs


class BackwardReducer:
    """A `GradientSource`: owns the hooks, the order and the staging memory of one optimizer's gradient reduction."""

    def __init__(self, collectives: Collectives, kernel: Kernel, *, overlap: bool) -> None:
        self.collectives, self.kernel, self.overlap = collectives, kernel, overlap
        self.enabled = True
        self.state = ReducerState.EMPTY
        self.buckets: list[FlatBucket] = []
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.bucket_of: dict[int, int] = {}  # of the members
        self.present: list[bool] = []  # [P] whether this rank had a gradient since they were zeroed
        self.late: set[int] = set()  # parameters whose hook fires more than once in a backward
        self.summary: GradientSummary | None = None
        self.rounds = 0
        self.sentinel: Sentinel | None = None
        self._owner_mask = torch.zeros(0, dtype=torch.float64)
        self._round: _Round | None = None
        self._free_staging: list[Staging] = []

    def extend(self, added: Registration) -> None:
        """See `GradientSource`. The smallest of the first parameters that have elements carries the sentinel."""
        assert self._round is None, "parameters cannot join in the middle of a round"
        self.summary = None  # of fewer parameters
        self.names.extend(added.names)
        self.params.extend(added.params)
        self.present.extend([False] * len(added.params))
        self._owner_mask = added.owner_mask
        for index, bucket in enumerate(added.buckets, start=len(self.buckets)):
            self.bucket_of.update(dict.fromkeys(bucket.plan.params, index))
        self.buckets.extend(added.buckets)
        self._free_staging.clear()  # new buckets may be larger
        self._register_hooks(sorted(added.members))
        sized = [index for index in sorted(self.bucket_of) if self.params[index].numel() > 0]
        if self.sentinel is None and sized:
            param = min(sized, key=lambda index: self.params[index].numel())
            self.sentinel = Sentinel(self.names[param], self.params[param])
            self._register_sentinel_hook(self.params[param])

    def _register_hooks(self, members: Sequence[int]) -> None:
        """Hooks hold this object weakly: a model outlives its optimizer unharmed."""
        this = weakref.ref(self)

        def after_accumulation(index: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                reducer = this()
                if reducer is not None:
                    reducer._on_gradient(index)

            return hook

        for index in members:
            register: Any = self.params[index].register_post_accumulate_grad_hook
            register(after_accumulation(index))

    def _register_sentinel_hook(self, p: Tensor) -> None:
        this = weakref.ref(self)

        def before_accumulation(_: tuple[Tensor, ...]) -> None:
            reducer = this()
            if reducer is not None:
                reducer._before_sentinel_gradient()

        # On the accumulation, not on the tensor: a tensor's hook fires under torch.autograd.grad too.
        edge = torch.autograd.graph.get_gradient_edge(p)
        self._accumulation = edge.node  # the parameter holds it weakly
        self._accumulation.register_prehook(before_accumulation)

    def _enter(self, state: ReducerState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state.name} does not lead to {state.name}"
        self.state = state

    # -- the sentinel -------------------------------------------------------------------------------

    def _has_reduced(self) -> bool:
        """Whether reduced gradients are held that no one has zeroed. Raises as `Sentinel.tells_of_gradients`."""
        used = self.state is ReducerState.USED
        return self.sentinel is not None and self.sentinel.tells_of_gradients(used=used)

    def _is_gradient(self, grad: Tensor | None) -> bool:
        return grad is not None and not (self.sentinel is not None and self.sentinel.is_grad(grad))

    def _before_sentinel_gradient(self) -> None:
        """Autograd is about to add to the ``.grad`` that may be the sentinel: it must be out of the way."""
        assert self.sentinel is not None
        if (
            self.sentinel.p.grad is None and self._round is None
        ):  # zeroed by the model, whatever was set aside
            self.sentinel.drop()
        if self.enabled:
            self._opened_round()
        self.sentinel.set_aside(used=self.state is ReducerState.USED)

    def _drop_sentinel(self) -> None:
        if self.sentinel is not None:
            self.sentinel.drop()

    def unscale_factor(self) -> Tensor | None:
        """See `GradientSource`; fp64 scalar. Raises as `Sentinel.unscale_factor`."""
        return None if self.sentinel is None else self.sentinel.unscale_factor()

    # -- a round ------------------------------------------------------------------------------------

    def _opened_round(self) -> _Round:
        """The round that is open; a new one where none is."""
        if self._round is not None:
            return self._round
        if self.sentinel is not None and self.sentinel.is_set_aside and self.sentinel.p.grad is None:
            self.sentinel.drop()  # zeroed by the model after a backward in no_sync
        fresh = not self._has_reduced()
        if fresh:
            self._drop_sentinel()
            self.present = [False] * len(self.params)
        missing = [len(bucket.params) for bucket in self.buckets]
        for param in self.late:  # never early: its gradient may not be whole before backward ends
            missing[self.bucket_of[param]] += 1
        sums = torch.zeros(len(self.params), dtype=torch.float64, device=self.params[0].device)
        self._round, self.summary = _Round(fresh, sums, missing), None
        self._enter(ReducerState.ROUND)
        return self._round

    def _on_gradient(self, param: int) -> None:
        """Autograd has put the gradient of ``param`` into ``.grad``."""
        if not self.enabled:
            return
        current = self._opened_round()
        if not current.is_callback_queued:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            current.is_callback_queued = True
        if param in current.fired:
            self.late.add(param)
            return
        current.fired.add(param)
        current.missing[self.bucket_of[param]] -= 1
        if self.overlap:
            while current.next < len(self.buckets) and current.missing[current.next] == 0:
                self._launch(current, current.next)
                current.next += 1

    def _end_of_backward(self) -> None:
        if self._round is not None:
            self._round.is_callback_queued = False
        # A callback queued inside a reentrant checkpoint's own backward comes while the outer one still
        # evaluates that checkpoint's node: more gradients follow, and `step` flushes at the latest.
        if torch._C._current_autograd_node() is None:
            self.flush()

    @torch.no_grad()  # backward(create_graph=True) makes gradients that require gradients
    def _launch(self, current: _Round, index: int) -> None:
        """Start the exchange of a bucket: gradients into staging memory, ``.grad`` freed."""
        bucket = self.buckets[index]
        faults.point("mid-backward")
        if len(current.in_flight) == IN_FLIGHT:
            self._finish_oldest(current)
        staging = self._take_staging(index)
        grads: list[Tensor | None] = []
        for param, p in zip(bucket.plan.params, bucket.params, strict=True):
            grad = p.grad
            if grad is None or not self._is_gradient(grad):
                grads.append(None)
                continue
            check_gradient(self.names[param], grad)
            grads.append(grad)
            p.grad = None
            self.present[param] = True
        if faults.point("gradient"):
            spoil_on_purpose(grads)
        pending = staging.exchange(index, bucket).start(grads)
        # A fused exchange has copied them already.
        current.in_flight.append(
            _InFlight(index, pending, staging, grads if self.collectives.uses_p2p else [])
        )

    @torch.no_grad()  # as `_launch`
    def _finish_oldest(self, current: _Round) -> None:
        arrived = current.in_flight.popleft()
        arrived.pending.wait()
        bucket = self.buckets[arrived.index]
        shard, exchange = bucket.shard, arrived.staging.exchange(arrived.index, bucket)
        own = exchange.own(arrived.grads)
        parts = self.collectives.parts_of_sum(exchange.full, exchange.received)
        if self.collectives.has_replicas:
            rows = with_local_contribution(parts, bucket.segments, own, shard.compute)
            parts, own = self.collectives.summed_over_replicas(rows, shard.compute), None
        with self.collectives.traffic.computing("average"):
            received = ReceivedShards(parts, self.collectives.world_size, own)
            self.kernel.average(shard, bucket.segments, received, current.square_sums, add=not current.fresh)
        self._free_staging.append(arrived.staging)

    def _take_staging(self, index: int) -> Staging:
        """The one that this bucket went through before, if it is free: pages of it are those that it needs."""
        if not self._free_staging:
            return Staging(self.buckets, self.collectives)
        known = [place for place, staging in enumerate(self._free_staging) if staging.knows(index)]
        return self._free_staging.pop(known[0] if known else 0)

    def flush(self) -> GradientSummary:
        """Reduce what has not been, on every rank alike, and sum the summaries (small all-reduce a).

        A second pass follows where any rank has gradients that came after their bucket went.
        """
        if self.rounds == 0:
            refuse_ddp([self.params[index] for index in self.bucket_of])
        current = self._opened_round()
        for index in range(current.next, len(self.buckets)):
            self._launch(current, index)
        self._drain(current)
        summary = self._agree(current, self._left_over())
        if summary.left_over.device.type == "cpu" or self.rounds < SYNCED_ROUNDS:
            again = {self.bucket_of[param] for param in summary.left_over.nonzero().flatten().tolist()}
            if again:
                current.fresh = False
                for index in sorted(again):
                    current.square_sums[list(self.buckets[index].plan.params)] = 0  # they are summed anew
                    self._launch(current, index)
                self._drain(current)
                summary = self._agree(current, [False] * len(self.params))
        self._round, self.rounds, self.summary = None, self.rounds + 1, summary
        self._enter(ReducerState.REDUCED)
        if self.sentinel is not None:
            self.sentinel.attach(summary)
        return summary

    def _agree(self, current: _Round, left_over: list[bool]) -> GradientSummary:
        return agree(self.collectives, current.square_sums * self._owner_mask, self.present, left_over)

    def _drain(self, current: _Round) -> None:
        while current.in_flight:
            self._finish_oldest(current)

    def _left_over(self) -> list[bool]:
        return [index in self.bucket_of and self._is_gradient(p.grad) for index, p in enumerate(self.params)]

    def ready(self, found_inf: Tensor | None, *, may_wait: bool = False) -> GradientSummary:
        """See `GradientSource`: the summary of the last round, or of one that is made now.

        ``found_inf`` (GradScaler's) was made of the sentinel, so all ranks have the same.

        Raises:
            RuntimeError: GradScaler has looked at gradients that were not reduced yet.
        """
        if found_inf is not None and any(self._left_over()):
            raise RuntimeError(
                "GradScaler saw gradients that stage=2 had not reduced, and would unscale them apart from the others: "
                "run the last backward before a step outside no_sync()"
            )
        is_attached = self.sentinel is not None and self.sentinel.is_attached
        if self._round is not None or self.summary is None or not is_attached or any(self._left_over()):
            return self.flush()
        return self.summary

    def settle(self) -> None:
        """End an open round, on every rank alike."""
        if self._round is not None:
            self.flush()

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """False: a gradient that some ranks lack counts as zero there."""
        return torch.zeros((), dtype=torch.bool, device=summary.present.device)

    def stepped(self) -> None:
        """A step has used the gradients; they stay, as ``.grad`` would, until they are zeroed."""
        self._enter(ReducerState.USED)

    def zero(self) -> None:
        """Wait for what is in flight, on every rank alike, and forget reduced gradients."""
        self.settle()  # where backward broke off; where it did not, the round was finished, and waits for us
        self._drop_sentinel()
        self.summary = None
        self._enter(ReducerState.EMPTY)

    def staging_bytes(self) -> int:
        """Bytes of the staging memory made so far."""
        return sum(staging.nbytes for staging in self._free_staging)


def refuse_ddp(params: Sequence[Tensor]) -> None:
    """Raises ValueError if a DistributedDataParallel reduces gradients of ``params`` too.

    DDP leaves no mark on parameters, so its instances are looked for, once.
    """
    ours = set(map(id, params))
    for found in _instances(DistributedDataParallel):
        if any(id(p) in ours for p in found.parameters()):
            raise ValueError(
                "stage=2 reduces gradients itself, and the model is wrapped in DistributedDataParallel, which "
                "reduces them too: pass the bare model, or use stage=1 with DistributedDataParallel"
            )


def _instances(kind: type[Any]) -> Iterator[Any]:
    """All objects of a class and its subclasses.

    Objects refer to their class. Not `gc.get_objects`: to hold every object, if briefly, breaks another thread's
    ``tuple(… for …)``, which CPython builds in place and will not finish once somebody else refers to it.
    """
    yield from (found for found in gc.get_referrers(kind) if type(found) is kind)
    subclasses: list[type[Any]] = kind.__subclasses__()
    for sub in subclasses:
        yield from _instances(sub)
