"""Stage 2: reduce-scatters buckets while backward runs, and frees full gradients.

One *round* reduces every bucket once, in bucket order on every rank: gloo matches operations by order alone, and
ranks' hooks may fire in different orders. A bucket launches once the hooks of all its parameters have fired and all
buckets before it have launched; a callback at the end of backward launches the rest, with zeros for missing gradients.
Backward waits for no other rank, save for a bounded time to bound memory: the other rank may be in a collective of the
user's backward. Whoever needs the gradients first waits. Like ``.grad``, rounds accumulate until gradients are zeroed.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.stalls import raised
from sharded_lamb.core.eager import run_eagerly
from sharded_lamb.core.layers import Layers
from sharded_lamb.core.parameters import check_gradient
from sharded_lamb.gradients.attached import AttachedGradients, Kept, apply_edits
from sharded_lamb.gradients.ddp import reject_ddp
from sharded_lamb.gradients.exchange import FreeStaging, average
from sharded_lamb.gradients.handles import Mark, ReducedGradient
from sharded_lamb.gradients.hooks import AccumulationHooks, reject_compiled_autograd
from sharded_lamb.gradients.source import Identity, Registration
from sharded_lamb.gradients.states import AFTER_INTERRUPT, TRANSITIONS, InFlight, ReducerState, Round
from sharded_lamb.gradients.streams import ReductionStream
from sharded_lamb.gradients.summary import GradientSummary, agree, inject_nan
from sharded_lamb.gradients.warn import warn_of_late_buckets, warn_of_swapped
from sharded_lamb.kernels import Kernel, ReceivedShards
from sharded_lamb.kernels.incoming import with_local_contribution
from sharded_lamb.sharding.buckets import FlatBucket

IN_FLIGHT = 2
"""Buckets in flight at once: one on the wire, one queued. A third, on BERT-base, used 55 MB and was not faster."""

PATIENCE = 1.0
"""Seconds that backward waits for one bucket of the `IN_FLIGHT`, before it launches more."""

GRACE = 10.0
"""Seconds that a rank that raises waits for one bucket, which ranks that do not raise may never send."""

IMPATIENT_ROUNDS = 3
"""After so many rounds in which `PATIENCE` ran out, backward waits no longer: memory grows instead."""

SYNCED_ROUNDS = 2
"""On a GPU the host reads late gradients in the first rounds only; later, `BackwardReducer.late` is complete."""


class BackwardReducer:
    """A `GradientSource`: owns the hooks, the order and the staging memory of one optimizer's gradient reduction."""

    def __init__(self, collectives: Collectives, kernel: Kernel, *, overlap: bool) -> None:
        self.collectives, self.kernel, self.overlap = collectives, kernel, overlap
        self._hooks = AccumulationHooks(self._before_gradient, self._after_gradient)
        self._stream = ReductionStream(collectives.device, has_peers=collectives.has_peers)
        self.enabled = True
        self.state = ReducerState.EMPTY
        self.buckets: list[FlatBucket] = []
        self.bucket_of: dict[int, int] = {}  # members only
        self.present: list[bool] = []  # [P] whether this rank had a gradient since zeroing
        self.late: set[int] = set()  # parameters whose hook fires more than once in a backward
        self.attached = AttachedGradients(weakref.ref(self))
        self.names, self.params = self.attached.names, self.attached.params  # the same lists
        self.rounds = 0
        self.may_lag = False  # whether other ranks may have gradients that no round includes
        self._summary: GradientSummary | None = None
        self._impatient_rounds = 0
        self._layers = Layers((), ())
        self._owner_mask = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._square_sums = torch.zeros(0, dtype=torch.float64, device="cpu")  # of the last round
        self._steps = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._round: Round | None = None
        self._late_grads: dict[int, Tensor] = {}  # that arrived after their bucket's launch
        self._in_flight: deque[InFlight] = deque()
        self._staging = FreeStaging(collectives, at_most=IN_FLIGHT)

    def extend(self, added: Registration) -> None:
        """See `GradientSource`."""
        assert self._round is None, "parameters cannot be added during a round"
        if self._summary is not None:
            self._summary = self._summary.padded(added.layers)
        self.present.extend([False] * len(added.params))
        self.attached.extend(added.names, added.params)
        self._layers, self._owner_mask, self._steps = added.layers, added.owner_mask, added.steps
        for index, bucket in enumerate(added.buckets, start=len(self.buckets)):
            self.bucket_of.update(dict.fromkeys(bucket.plan.params, index))
        self.buckets.extend(added.buckets)
        self._staging.resize()
        for param in sorted(added.members):
            self._hooks.register(param, self.params[param])
        self.may_lag = True

    def _enter(self, state: ReducerState) -> None:
        known = TRANSITIONS[self.state] | AFTER_INTERRUPT.get(self.state, set())
        assert state in known, f"no transition from {self.state.name} to {state.name}"
        self.state = state

    def identities(self) -> list[Identity | None]:
        """See `GradientSource`."""
        return [*map(self.attached.identity, range(len(self.params)))]

    @property
    def _reads_all(self) -> bool:
        """Whether the host reads summaries; on a GPU it would wait for the device in every step."""
        return self.params[0].device.type == "cpu"

    @property
    def _used(self) -> bool:
        return self.state is ReducerState.USED if self._round is None else self._round.used

    # -- a round ------------------------------------------------------------------------------------

    def _open_round(self) -> Round:
        """Return the open round; open a new one if there is none."""
        if self._round is None:
            if self.rounds == 0:
                reject_ddp([self.params[index] for index in self.bucket_of])
            missing = [len(bucket.params) for bucket in self.buckets]
            for param in self.late:  # launch at the end: its gradient may be incomplete before
                missing[self.bucket_of[param]] += 1
            sums = torch.zeros(len(self._layers), dtype=torch.float64, device=self.params[0].device)
            opened = Round(self._used, sums, missing)
            self._enter(ReducerState.ROUND)
            self._round, self._summary, self._square_sums, self.may_lag = opened, None, sums, False
            self.attached.removed.clear()
            self.attached.zeroed.clear()
        return self._round.in_this_thread()

    def _before_gradient(self, param: int) -> None:
        self._guarded(self._set_aside, param)

    def _after_gradient(self, param: int) -> None:
        self._guarded(self._on_gradient, param)

    def _set_aside(self, param: int) -> None:
        """Free ``.grad``; first, close the round of a backward that failed, as ranks on which it did not fail did."""
        if self.enabled and self._round is not None and self._round.is_abandoned:
            self._close_round()
        self.attached.set_aside(param, used=self._used)

    def _on_gradient(self, param: int) -> None:
        """Count the gradient of ``param``, which autograd has accumulated, and launch complete buckets."""
        self.attached.accumulated(param)
        if not self.enabled:
            return
        reject_compiled_autograd()
        current = self._open_round()
        task = torch._C._current_graph_task_id()
        if task not in current.callbacks:
            callback = partial(self._end_of_backward, task)
            torch.autograd.Variable._execution_engine.queue_callback(callback)
            others = self.bucket_of if self.collectives.world_size > 1 else ()
            failed = partial(current.failed, self.attached, others)
            current.callbacks[task] = weakref.ref(callback, failed)
            del callback  # a traceback may hold this frame
        if param in current.fired:
            self.late.add(param)
            return
        current.fired.add(param)
        current.missing[self.bucket_of[param]] -= 1
        if self.overlap:
            while current.next < len(self.buckets) and current.missing[current.next] == 0:
                current.next += 1
                self._launch(current.next - 1, current)

    @run_eagerly
    def _end_of_backward(self, task: int) -> None:
        if self._round is not None:
            self._round.callbacks[task] = None
        # A callback queued inside a reentrant checkpoint's backward runs while the outer backward still
        # evaluates the checkpoint's node: more gradients follow, and `ready` launches the rest at the latest.
        if self._round is not None and torch._C._current_autograd_node() is None:
            self._guarded(self._close_round)

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """If the call raises, complete what is in flight first: ranks that raise alike end at different times."""
        try:
            call(*arguments)
        except Exception as error:
            raised(error)
            with suppress(RuntimeError), self._stream.entered():
                while self._in_flight and self._land_oldest(GRACE):
                    pass
            raised(error, again=True)
            raise

    def _close_round(self) -> None:
        """Launch the remaining buckets, attach handles for late gradients, repeat edits since a failed backward."""
        assert self._round is not None
        current = self._round.in_this_thread()
        edits = self.attached.edits_during(current.fired, current.awaited) if current.is_abandoned else None
        while current.next < len(self.buckets):
            current.next += 1
            self._launch(current.next - 1, current)
        for param in self.bucket_of:
            grad = self.params[param].grad
            if grad is not None and not isinstance(grad, ReducedGradient):
                self._late_grads[param], self.params[param].grad = grad, None
                self.attached.attach(param, renew=False)
        self._enter(ReducerState.LAUNCHED)
        self._round, self.rounds = None, self.rounds + 1
        current.callbacks.clear()
        if edits is not None:
            self.attached.repeat(*edits)

    @torch.no_grad()  # after backward(create_graph=True) gradients require gradients
    def _launch(self, index: int, current: Round | None = None) -> None:
        """Start the exchange of a bucket, and attach handles in place of its gradients.

        ``current``: the open round; None: adds late gradients to the last one.
        """
        bucket, used = self.buckets[index], self._used
        faults.point("mid-backward")
        with self._stream.entered():
            if current is not None:
                self._throttle(current)
            staging = self._staging.take(index, self.buckets)
        grads: list[Tensor | None] = []
        kept: list[Kept] = []
        for position, (param, p) in enumerate(zip(bucket.plan.params, bucket.params, strict=True)):
            bucket.check_fits(position, self.names[param])
            stays = self.present[param] and self.attached.has_gradient(param)
            kept.append(self.attached.take_edits(param, used=used))
            grad = self._take_gradient(param, p)
            grads.append(grad)
            self.present[param] = stays or grad is not None
            # Another rank may have a gradient.
            elsewhere = current is not None and self.collectives.world_size > 1
            if self.present[param] or (elsewhere and p.requires_grad):
                self.attached.attach(param, renew=not kept[-1][0])
        if faults.point("gradient"):
            inject_nan(grads)
        with self._stream.entered(grads, [factor for _, factor in kept], [self._square_sums]):
            exchange = staging.exchange(index, bucket)
            pending = exchange.start(grads, self._steps)
        sent = grads if exchange.reads_gradients else []
        self._in_flight.append(InFlight(index, pending, staging, sent, kept, self._square_sums))

    def _take_gradient(self, param: int, p: Tensor) -> Tensor | None:
        """This rank's gradient, removed from ``.grad``, and the late one of the last round."""
        grad, late = self.attached.own_gradient(param), self._late_grads.pop(param, None)
        if grad is None:
            return late
        check_gradient(self.names[param], grad)
        p.grad = None
        return grad if late is None else grad + late

    # -- exchanges in flight ------------------------------------------------------------------------

    def _throttle(self, current: Round) -> None:
        """Bound the buckets in flight, where the other ranks do not wait for this one meanwhile."""
        while len(self._in_flight) >= IN_FLIGHT and current.is_throttled:
            if self._impatient_rounds == IMPATIENT_ROUNDS:
                return
            if self._land_oldest(PATIENCE if self._stream.blocks_host else None):
                continue
            current.is_throttled = False
            self._impatient_rounds += 1
            if self._impatient_rounds == IMPATIENT_ROUNDS:
                warn_of_late_buckets(IMPATIENT_ROUNDS, PATIENCE)

    @torch.no_grad()  # as `_launch`
    def _land_oldest(self, timeout: float | None = None) -> bool:
        """Average the oldest bucket in flight; False: it has not arrived within ``timeout`` seconds."""
        oldest = self._in_flight[0]
        if not oldest.pending.wait(timeout):
            return False
        bucket = self.buckets[oldest.index]
        compute = bucket.shard.compute
        if oldest.received is None:
            oldest.received = received = oldest.staging.exchange(oldest.index, bucket).received(oldest.grads)
            if self.collectives.has_replicas:
                rows = with_local_contribution(received.parts, bucket.layer_segments, received.own, compute)
                total, oldest.pending = self.collectives.sum_over_replicas(rows, compute)
                oldest.received = ReceivedShards(total, received.divisor)
                if not oldest.pending.wait(timeout):
                    return False
        self._in_flight.popleft()
        with self.collectives.traffic.computing("average"):
            adds = apply_edits(bucket, oldest.kept)
            average(self.kernel, bucket, oldest.received, oldest.square_sums, add=adds)
        self._staging.give_back(oldest.staging)
        return True

    def _drain(self) -> None:
        with self._stream.entered():
            while self._in_flight:
                self._land_oldest()
        self._stream.join()

    # -- the summary --------------------------------------------------------------------------------

    def settle(self) -> None:
        """Launch an open round's remaining buckets, wait for all, and sum the summaries (small all-reduce a)."""
        if self._round is not None:
            self._guarded(self._close_round)
        if self.state is ReducerState.LAUNCHED:
            self._drain()
            edited = self.attached.collect_edits()
            # Before edits: another rank may read norms before it edits.
            self._summary = self._agreed_summary()
            self._zero(edited)
            self._enter(ReducerState.REDUCED)

    def _agreed_summary(self) -> GradientSummary:
        """All-reduce (a); a second one follows if any rank has late gradients.

        Where the host does not read them, such a step counts as one with non-finite gradients: it lacks some.
        """
        summary = self._agree()
        if not self._reads_all and self.rounds > SYNCED_ROUNDS:
            return replace(summary, bad=summary.bad | self._layers.expand(summary.left_over > 0))
        late = {self.bucket_of[param] for param in summary.left_over.nonzero().flatten().tolist()}
        if late:
            for index in sorted(late):
                for param in self.buckets[index].plan.params:  # summed again
                    self._square_sums[self._layers.slice(param)] = 0
                self._launch(index)
            self._drain()
            summary = self._agree()
        if self._reads_all:
            for param in (summary.present == 0).nonzero().flatten().tolist():
                self.attached.drop_absent(param)
        return summary

    def _agree(self) -> GradientSummary:
        late = [param in self._late_grads for param in range(len(self.params))]
        sums = self._square_sums * self._owner_mask
        return agree(self.collectives, sums, self.present, late)

    def _zero(self, edited: Sequence[int]) -> None:
        """Zero the shards of gradients that users removed or zeroed."""
        for param in edited:
            bucket = self.buckets[self.bucket_of[param]]
            bucket.slice_of(param, bucket.shard.grad).zero_()
            self._late_grads.pop(param, None)
            self.present[param] = param in self.attached.zeroed and self.present[param]

    def catch_up(self) -> None:
        """Open a round if this rank has gradients that no round includes, or another rank may have some.

        Raises:
            RuntimeError: as `AttachedGradients.check`.
        """
        if self._round is not None:
            self._close_round()
        warn_of_swapped(self.attached, self._hooks.renew(), self.collectives.world_size)
        self._guarded(partial(self.attached.check, used=self._used))
        holds = self.state is not ReducerState.EMPTY and self.attached.holds_any()
        if not holds or self.may_lag or self.attached.has_own_gradients([*self.bucket_of]):
            self._open_round()

    def ready(
        self, found_inf: Tensor | None, *, may_defer: bool = False, keep: bool = False
    ) -> GradientSummary:
        """See `GradientSource`: the summary of the last round, or of a new one.

        GradScaler computed ``found_inf`` from the handles, so it is equal on all ranks.

        Raises:
            RuntimeError: GradScaler read gradients that were not reduced yet, or gradients were assigned to ``.grad``
                after backward.
        """
        if found_inf is not None and self.attached.has_own_gradients([*self.bucket_of]):
            raise RuntimeError(
                "GradScaler read gradients that stage=2 had not reduced, and would unscale them separately from the "
                "reduced ones: run the last backward before a step outside no_sync()"
            )
        self.catch_up()
        self.settle()
        self._zero(self.attached.collect_edits())
        assert self._summary is not None
        summary = self._summary.without(self.attached.removed, self.attached.zeroed, self._layers)
        factor = self.attached.factor()
        if factor is None:
            return summary
        return replace(summary, bad=summary.bad | ~self._layers.expand(factor.isfinite()))

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """False: a gradient that some ranks lack counts as zero on them."""
        return torch.zeros((), dtype=torch.bool, device=summary.present.device)

    def unscale_factor(self) -> Tensor | None:
        """See `GradientSource`: the factor by which users scaled ``.grad``; fp64 scalar or [P]."""
        return self.attached.factor()

    def edits(self) -> Tensor | None:
        """See `GradientSource`."""
        if self.collectives.world_size == 1 or not self.buckets:
            return None
        signature = self.attached.signature()
        zero = torch.zeros((), dtype=torch.float64, device=self._owner_mask.device)
        return zero if signature is None else signature.to(zero.device)

    def stepped(self) -> None:
        """Mark the gradients as used; like ``.grad`` they stay until they are zeroed."""
        self.attached.forget_rounds()
        self._enter(ReducerState.USED)

    def zero(self, *, set_to_none: bool) -> None:
        """See `GradientSource`. Waits for exchanges in flight, on every rank."""
        self.settle()  # after an exception in backward; ranks without one have closed the round and wait for this one
        if set_to_none:
            self.attached.clear()
            self._summary = None
        else:
            for param in self._late_grads:
                self.present[param] = True
            self._zero(self.attached.zero())
        self._late_grads.clear()
        self._hooks.renew()
        self._enter(ReducerState.USED if self.attached.has_marks else ReducerState.EMPTY)

    def close(self) -> None:
        """See `GradientSource`. Exchanges in flight are abandoned."""
        self._hooks.close()
        self.attached.clear()
        self._round = None

    def staging_bytes(self) -> int:
        """Bytes of the staging memory made so far."""
        return self._staging.nbytes + sum(exchange.staging.nbytes for exchange in self._in_flight)

    # -- read by handles ----------------------------------------------------------------------------

    def holds(self, origin: Mark) -> bool:
        """See `ReducedGradients`."""
        return self.attached.holds(origin)

    @torch.no_grad()
    def square_sum(self, param: int) -> Tensor | None:
        """See `ReducedGradients`: settles, but not inside the backward that reduces the gradients."""
        if self._round is not None and torch._C._current_graph_task_id() >= 0:
            return None
        self.settle()
        return None if self._summary is None else self._layers.total(self._summary.square_sums, param)

    def any_bad(self) -> Tensor:
        """See `ReducedGradients`."""
        self.settle()
        assert self._summary is not None
        return self._summary.without(self.attached.removed, self.attached.zeroed, self._layers).any_bad
