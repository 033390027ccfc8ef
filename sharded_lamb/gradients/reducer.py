"""Stage 2: reduce-scatters buckets while backward runs, and frees full gradients.

One *round* reduces every bucket once, in bucket order on every rank: gloo matches operations by order alone, and
ranks' hooks may fire in different orders. A bucket launches once the hooks of all its parameters have fired and all
buckets before it have launched; a callback at the end of backward launches the rest, with zeros for missing gradients.
Like ``.grad``, rounds accumulate until the gradients are zeroed.
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
from sharded_lamb.gradients.summary import GradientSummary, agree, inject_nan
from sharded_lamb.kernels import Kernel, ReceivedShards
from sharded_lamb.kernels.incoming import with_local_contribution
from sharded_lamb.sharding.buckets import FlatBucket

IN_FLIGHT = 2
"""Buckets in flight at once: one on the wire and one queued. A third was not faster on two ranks of BERT-base, and
used 55 MB more."""

SYNCED_ROUNDS = 2
"""On a GPU the host reads left-over gradients in the first rounds only; later, `BackwardReducer.late` is complete."""


class ReducerState(Enum):
    """The state of a `BackwardReducer` between two calls, and the transition that each call makes.

    ======== ==================== ========= ========== =======
    state    gradient, or `flush` `flush`   `stepped`  `zero`
             opens a round        closes it
    ======== ==================== ========= ========== =======
    EMPTY    ROUND                                     EMPTY
    ROUND                         REDUCED              REDUCED, then EMPTY
    REDUCED  ROUND                          USED       EMPTY
    USED     ROUND                          USED       EMPTY
    ======== ==================== ========= ========== =======

    ``model.zero_grad()`` changes no state: the sentinel reports it when the next round opens.
    """

    EMPTY = auto()  # no reduced gradients: none yet, or they were zeroed
    ROUND = auto()  # a round is open: buckets launch as their gradients arrive
    REDUCED = auto()  # every gradient is in its shard, and no step has used it
    USED = auto()  # a step has used the gradients; the next round adds to them unless they are zeroed


TRANSITIONS = {
    ReducerState.EMPTY: {ReducerState.ROUND, ReducerState.EMPTY},
    ReducerState.ROUND: {ReducerState.REDUCED},
    ReducerState.REDUCED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
    ReducerState.USED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
}


@dataclass(slots=True)
class _InFlight:
    """One bucket's exchange in flight."""

    index: int  # of the bucket
    pending: Pending
    staging: Staging
    grads: list[Tensor | None]  # sent from their own memory, so they must stay alive


@dataclass(slots=True)
class _Round:
    """The open round; None between rounds."""

    fresh: bool  # its gradients replace those of earlier rounds, else they add to them
    square_sums: Tensor  # [P] fp64 Σg² of this rank's shards
    missing: list[int]  # [buckets] gradients that each bucket still waits for
    next: int = 0  # the bucket to launch next
    fired: set[int] = field(default_factory=set)  # parameters whose gradient has arrived
    in_flight: deque[_InFlight] = field(default_factory=deque)
    is_callback_queued: bool = False  # for the end of the running backward


class BackwardReducer:
    """A `GradientSource`: owns the hooks, the order and the staging memory of one optimizer's gradient reduction."""

    def __init__(self, collectives: Collectives, kernel: Kernel, *, overlap: bool) -> None:
        self.collectives, self.kernel, self.overlap = collectives, kernel, overlap
        self._handles: list[Any] = []  # of hooks on parameters
        self.enabled = True
        self.state = ReducerState.EMPTY
        self.buckets: list[FlatBucket] = []
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.bucket_of: dict[int, int] = {}  # members only
        self.present: list[bool] = []  # [P] whether this rank had a gradient since zeroing
        self.late: set[int] = set()  # parameters whose hook fires more than once in a backward
        self.summary: GradientSummary | None = None
        self.rounds = 0
        self.sentinel: Sentinel | None = None
        self._owner_mask = torch.zeros(0, dtype=torch.float64)
        self._round: _Round | None = None
        self._free_staging: list[Staging] = []

    def extend(self, added: Registration) -> None:
        """See `GradientSource`. The smallest non-empty one of the first parameters carries the sentinel."""
        assert self._round is None, "parameters cannot be added during a round"
        self.summary = None  # it lacks the new parameters
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
        """Hooks reference this object weakly: a model may outlive its optimizer."""
        this = weakref.ref(self)

        def after_accumulation(index: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                reducer = this()
                if reducer is not None:
                    reducer._on_gradient(index)

            return hook

        for index in members:
            register: Any = self.params[index].register_post_accumulate_grad_hook
            self._handles.append(register(after_accumulation(index)))

    def _register_sentinel_hook(self, p: Tensor) -> None:
        this = weakref.ref(self)

        def before_accumulation(_: tuple[Tensor, ...]) -> None:
            reducer = this()
            if reducer is not None:
                reducer._before_sentinel_gradient()

        # On the AccumulateGrad node, not on the tensor: a tensor's hook fires under torch.autograd.grad too.
        edge = torch.autograd.graph.get_gradient_edge(p)
        self._accumulation = edge.node  # the parameter references it weakly
        self._handles.append(self._accumulation.register_prehook(before_accumulation))

    def _enter(self, state: ReducerState) -> None:
        assert state in TRANSITIONS[self.state], f"no transition from {self.state.name} to {state.name}"
        self.state = state

    # -- the sentinel -------------------------------------------------------------------------------

    def _has_reduced(self) -> bool:
        """Whether there are reduced gradients that are not zeroed. Raises as `Sentinel.has_gradients`."""
        used = self.state is ReducerState.USED
        return self.sentinel is not None and self.sentinel.has_gradients(used=used)

    def _is_gradient(self, grad: Tensor | None) -> bool:
        return grad is not None and not (self.sentinel is not None and self.sentinel.is_grad(grad))

    def _before_sentinel_gradient(self) -> None:
        """Remove the sentinel from ``.grad`` before autograd adds a gradient to it."""
        assert self.sentinel is not None
        if self.sentinel.p.grad is None and self._round is None:
            self.sentinel.drop()  # the model zeroed it; drops a sentinel set aside too
        if self.enabled:
            self._open_round()
        self.sentinel.set_aside(used=self.state is ReducerState.USED)

    def _drop_sentinel(self) -> None:
        if self.sentinel is not None:
            self.sentinel.drop()

    def unscale_factor(self) -> Tensor | None:
        """See `GradientSource`; fp64 scalar. Raises as `Sentinel.unscale_factor`."""
        return None if self.sentinel is None else self.sentinel.unscale_factor()

    # -- a round ------------------------------------------------------------------------------------

    def _open_round(self) -> _Round:
        """Return the open round; open a new one if there is none."""
        if self._round is not None:
            return self._round
        if self.sentinel is not None and self.sentinel.is_set_aside and self.sentinel.p.grad is None:
            self.sentinel.drop()  # the model zeroed it after a backward in no_sync
        fresh = not self._has_reduced()
        if fresh:
            self._drop_sentinel()
            self.present = [False] * len(self.params)
        missing = [len(bucket.params) for bucket in self.buckets]
        for param in self.late:  # launch at the end: its gradient may be incomplete before
            missing[self.bucket_of[param]] += 1
        sums = torch.zeros(len(self.params), dtype=torch.float64, device=self.params[0].device)
        self._round, self.summary = _Round(fresh, sums, missing), None
        self._enter(ReducerState.ROUND)
        return self._round

    def _on_gradient(self, param: int) -> None:
        """Count the gradient of ``param``, which autograd has accumulated, and launch complete buckets."""
        if not self.enabled:
            return
        current = self._open_round()
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
        # A callback queued inside a reentrant checkpoint's backward runs while the outer backward still
        # evaluates the checkpoint's node: more gradients follow, and `step` flushes at the latest.
        if torch._C._current_autograd_node() is None:
            self.flush()

    @torch.no_grad()  # after backward(create_graph=True) gradients require gradients
    def _launch(self, current: _Round, index: int) -> None:
        """Start the exchange of a bucket and free its gradients' ``.grad``."""
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
            inject_nan(grads)
        pending = staging.exchange(index, bucket).start(grads)
        # A fused exchange has already copied them.
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
        """A free staging memory, if possible one that this bucket used before: its pages are already mapped."""
        if not self._free_staging:
            return Staging(self.buckets, self.collectives)
        reusable = [i for i, staging in enumerate(self._free_staging) if staging.has_exchanged(index)]
        return self._free_staging.pop(reusable[0] if reusable else 0)

    def flush(self) -> GradientSummary:
        """Reduce the remaining buckets, on every rank, and sum the summaries (small all-reduce a).

        A second pass follows if any rank has gradients that arrived after their bucket's launch.
        """
        if self.rounds == 0:
            reject_ddp([self.params[index] for index in self.bucket_of])
        current = self._open_round()
        for index in range(current.next, len(self.buckets)):
            self._launch(current, index)
        self._drain(current)
        summary = self._agree(current, self._left_over())
        if summary.left_over.device.type == "cpu" or self.rounds < SYNCED_ROUNDS:
            late_buckets = {self.bucket_of[param] for param in summary.left_over.nonzero().flatten().tolist()}
            if late_buckets:
                current.fresh = False
                for index in sorted(late_buckets):
                    current.square_sums[list(self.buckets[index].plan.params)] = 0  # summed again
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

    def ready(self, found_inf: Tensor | None, *, may_defer: bool = False) -> GradientSummary:
        """See `GradientSource`: the summary of the last round, or of a new one.

        GradScaler computed ``found_inf`` from the sentinel, so it is equal on all ranks.

        Raises:
            RuntimeError: GradScaler read gradients that were not reduced yet.
        """
        if found_inf is not None and any(self._left_over()):
            raise RuntimeError(
                "GradScaler read gradients that stage=2 had not reduced, and would unscale them separately from the "
                "reduced ones: run the last backward before a step outside no_sync()"
            )
        is_attached = self.sentinel is None or self.sentinel.is_attached  # None: no parameter has elements
        if self._round is not None or self.summary is None or not is_attached or any(self._left_over()):
            return self.flush()
        return self.summary

    def settle(self) -> None:
        """Close an open round, on every rank."""
        if self._round is not None:
            self.flush()

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """False: a gradient that some ranks lack counts as zero on them."""
        return torch.zeros((), dtype=torch.bool, device=summary.present.device)

    def stepped(self) -> None:
        """Mark the gradients as used; like ``.grad`` they stay until they are zeroed."""
        self._enter(ReducerState.USED)

    def zero(self) -> None:
        """Wait for exchanges in flight, on every rank, and drop reduced gradients."""
        self.settle()  # after an exception in backward; ranks without one have closed the round and wait for this one
        self._drop_sentinel()
        self.summary = None
        self._enter(ReducerState.EMPTY)

    def close(self) -> None:
        """See `GradientSource`. Exchanges in flight are abandoned."""
        while self._handles:
            self._handles.pop().remove()
        self._drop_sentinel()
        self._round = None

    def staging_bytes(self) -> int:
        """Bytes of the staging memory made so far."""
        return sum(staging.nbytes for staging in self._free_staging)


def reject_ddp(params: Sequence[Tensor]) -> None:
    """Raises ValueError if a DistributedDataParallel also reduces gradients of ``params``.

    DDP does not mark its parameters, so this searches for its instances, once.
    """
    reduced = set(map(id, params))
    for ddp in instances(DistributedDataParallel):
        if any(id(p) in reduced for p in ddp.parameters()):
            raise ValueError(
                "stage=2 reduces gradients itself, and the model is wrapped in DistributedDataParallel, which "
                "reduces them too: pass the bare model, or use stage=1 with DistributedDataParallel"
            )


def instances(kind: type[Any]) -> Iterator[Any]:
    """All objects of a class and its subclasses.

    Objects refer to their class. `gc.get_objects` would reference every object, which breaks a ``tuple(… for …)`` in
    other threads: CPython builds the tuple in place and fails to finish it once it has a second reference.
    """
    yield from (instance for instance in gc.get_referrers(kind) if type(instance) is kind)
    subclasses: list[type[Any]] = kind.__subclasses__()
    for sub in subclasses:
        yield from instances(sub)
