"""Stage 2: buckets are reduce-scattered while backward runs, and full gradients freed.

One *round* reduces every bucket once, in bucket order on every rank: gloo matches operations by order alone, and
ranks' hooks may fire in different orders. A bucket goes once all its parameters have fired and all buckets before
it went; a callback at the end of backward sends the rest, missing gradients as zeros. Rounds add up until the
gradients are zeroed, as `.grad` does.

The *sentinel*: the smallest parameter keeps a ``.grad`` of ones after a round. It is what tells

- GradScaler of a non-finite gradient on any rank (the ones become inf on every rank, alike);
- us the factor of ``GradScaler.unscale_``, and of gradients scaled behind our back (stock ``clip_grad_norm_``);
- that ``model.zero_grad()``, which cannot reach reduced shards, was called.
"""

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import faults
from sharded_lamb.comm.collectives import Collectives, Pending
from sharded_lamb.core.parameters import check_gradient
from sharded_lamb.gradients.exchange import Staging
from sharded_lamb.gradients.summary import GradientSummary, agree, spoil_on_purpose
from sharded_lamb.kernels import Kernel, ReceivedShards
from sharded_lamb.kernels.incoming import with_local_contribution
from sharded_lamb.sharding.buckets import FlatBucket
from sharded_lamb.sharding.placements import Replicas

IN_FLIGHT = 2
"""Buckets whose exchange may be under way at once: one on the wire and one behind it. A third was not faster on two
ranks of BERT-base, and held 55 MB more."""

SYNCED_ROUNDS = 2
"""On a GPU the host reads left-over gradients in the first rounds only; late parameters are known by then."""


@dataclass(slots=True)
class _Exchange:
    index: int  # of the bucket
    pending: Pending
    staging: Staging
    grads: list[Tensor | None]  # may be sent from where they lie


class BackwardReducer:
    """Owns the hooks, the order and the staging memory of one optimizer's gradient reduction."""

    def __init__(
        self,
        collectives: Collectives,
        kernel: Kernel,
        mask_replicas: Callable[[Tensor], Tensor],
        *,
        overlap: bool,
    ) -> None:
        self.collectives, self.kernel, self.mask_replicas, self.overlap = (
            collectives,
            kernel,
            mask_replicas,
            overlap,
        )
        self.enabled = True
        self.buckets: list[FlatBucket] = []
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.bucket_of: dict[int, int] = {}  # of the parameters that are reduced here: DTensors are not
        self.present: list[bool] = []
        self.late: set[int] = set()
        self.summary: GradientSummary | None = None
        self._square_sums = torch.zeros(0, dtype=torch.float64)  # [P] of what this rank holds, in this round
        self.rounds = 0
        self.sentinel_param = -1
        self._sentinel: Tensor | None = None
        self._sentinel_version = 0
        self._sentinel_set_aside = False
        self._used = False
        self._exchanges: deque[_Exchange] = deque()
        self._staging: list[Staging] = []  # free
        self._open = self._callback_queued = False
        self._fresh = True
        self._fired: set[int] = set()
        self._waiting: list[int] = []
        self._next = 0

    def extend(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        buckets: Sequence[FlatBucket],
        replicas: Replicas,
    ) -> None:
        """Take on parameters that follow those of before, in buckets of their own. Settled before."""
        assert not self._open, "parameters cannot join in the middle of a round"
        self.summary = None  # of fewer parameters
        first = len(self.params)
        self.names.extend(names)
        self.params.extend(params)
        self.present.extend([False] * len(params))
        for index, bucket in enumerate(buckets, start=len(self.buckets)):
            for param in bucket.plan.params:
                self.bucket_of[param] = index
        self.buckets.extend(buckets)
        self._staging.clear()  # new buckets may be larger
        sized = [index for index in sorted(self.bucket_of) if self.params[index].numel() > 0]
        if self.sentinel_param < 0 and sized:
            self.sentinel_param = min(sized, key=lambda index: self.params[index].numel())
        self._register(first)

    def _register(self, first: int) -> None:
        """Hooks hold this object weakly: a model outlives its optimizer unharmed."""
        this = weakref.ref(self)

        def after_accumulation(index: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                reducer = this()
                if reducer is not None:
                    reducer._on_gradient(index)

            return hook

        def before_accumulation(_: tuple[Tensor, ...]) -> None:
            reducer = this()
            if reducer is not None:
                reducer._before_sentinel_gradient()

        for index in sorted(index for index in self.bucket_of if index >= first):
            register: Any = self.params[index].register_post_accumulate_grad_hook
            register(after_accumulation(index))
        if self.sentinel_param >= first:
            # On the accumulation, not on the tensor: a tensor's hook fires under torch.autograd.grad too.
            edge = torch.autograd.graph.get_gradient_edge(self.params[self.sentinel_param])
            self._accumulation = edge.node  # the parameter holds it weakly
            self._accumulation.register_prehook(before_accumulation)

    # -- the sentinel -------------------------------------------------------------------------------

    def _sentinel_attached(self) -> bool:
        return self._sentinel is not None and self.params[self.sentinel_param].grad is self._sentinel

    def _has_reduced(self) -> bool:
        """Whether reduced gradients are held that nobody has zeroed.

        Raises:
            RuntimeError: somebody assigned the sentinel's ``.grad``, so that this cannot be told.
        """
        if self._sentinel is None or self._sentinel_set_aside:
            return self._sentinel_set_aside
        grad = self.params[self.sentinel_param].grad
        if grad is not None and grad is not self._sentinel:
            if self._used:
                return False
            raise RuntimeError(
                f"the .grad of {self.names[self.sentinel_param]!r} was assigned while stage=2 holds reduced gradients "
                f"that no step has used: call opt.zero_grad() before assigning gradients"
            )
        # zero_grad(set_to_none=False) by the model: the value is read only after somebody wrote it.
        written = self._sentinel._version != self._sentinel_version
        return grad is not None and not (written and bool((grad == 0).all()))

    def _before_sentinel_gradient(self) -> None:
        """Autograd is about to add to the ``.grad`` that may be the sentinel: it must be out of the way."""
        p = self.params[self.sentinel_param]
        if p.grad is None and not self._open:  # zeroed by the model, whatever had been set aside
            self._drop_sentinel()
        if self.enabled:
            self._open_round()
        if self._sentinel_attached():
            self._sentinel_set_aside = self._has_reduced()
            p.grad = None

    def _drop_sentinel(self) -> None:
        if self._sentinel_attached():
            self.params[self.sentinel_param].grad = None
        self._sentinel, self._sentinel_set_aside = None, False

    def _set_sentinel(self, summary: GradientSummary) -> None:
        self._sentinel_set_aside = self._used = False
        if self.sentinel_param < 0:
            return
        p = self.params[self.sentinel_param]
        self._sentinel = torch.ones_like(p.detach()).masked_fill_(summary.any_bad, torch.inf)
        self._sentinel_version = self._sentinel._version
        p.grad = self._sentinel

    def unscale_factor(self) -> Tensor | None:
        """What ``GradScaler.unscale_`` multiplied gradients with since the last round; fp64 scalar.

        Raises:
            RuntimeError: gradients were changed by something else.
        """
        if not self._sentinel_attached():
            return None
        assert self._sentinel is not None
        # GradScaler's unscaling of a list of tensors counts no version; every other in-place change does.
        if self._sentinel._version != self._sentinel_version:
            raise RuntimeError(
                "gradients were changed after backward, and stage=2 has already reduced and freed them, so the "
                "change is lost: call opt.clip_grad_norm_(max_norm) instead of torch.nn.utils.clip_grad_norm_, or "
                "pass max_grad_norm; use stage=1 for other changes"
            )
        factor = self._sentinel.flatten()[0].to(torch.float64)
        return torch.where(factor.isfinite(), factor, torch.ones_like(factor))  # inf only says: non-finite

    # -- a round ------------------------------------------------------------------------------------

    def _open_round(self) -> None:
        if self._open:
            return
        if self._sentinel_set_aside and self.params[self.sentinel_param].grad is None:
            self._drop_sentinel()  # zeroed by the model after a backward in no_sync
        self._fresh = not self._has_reduced()
        if self._fresh:
            self._drop_sentinel()
            self.present = [False] * len(self.params)
        self._open, self._next, self.summary = True, 0, None
        self._square_sums = torch.zeros(len(self.params), dtype=torch.float64, device=self.params[0].device)
        self._fired = set()
        self._waiting = [len(bucket.params) for bucket in self.buckets]
        for param in self.late:  # never early: its gradient may not be whole before backward ends
            self._waiting[self.bucket_of[param]] += 1

    def _on_gradient(self, param: int) -> None:
        """Autograd has put the gradient of ``param`` into ``.grad``."""
        if not self.enabled:
            return
        self._open_round()
        if not self._callback_queued:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            self._callback_queued = True
        if param in self._fired:
            self.late.add(param)
            return
        self._fired.add(param)
        self._waiting[self.bucket_of[param]] -= 1
        if self.overlap:
            while self._next < len(self.buckets) and self._waiting[self._next] == 0:
                self._launch(self._next)
                self._next += 1

    def _end_of_backward(self) -> None:
        self._callback_queued = False
        # A callback queued inside a reentrant checkpoint's own backward comes while the outer one still
        # evaluates that checkpoint's node: more gradients follow, and `step` flushes at the latest.
        if torch._C._current_autograd_node() is None:
            self.flush()

    @torch.no_grad()  # backward(create_graph=True) makes gradients that require gradients
    def _launch(self, index: int) -> None:
        """Start the exchange of a bucket: gradients into staging memory, ``.grad`` freed."""
        bucket = self.buckets[index]
        faults.point("mid-backward")
        if len(self._exchanges) == IN_FLIGHT:
            self._finish_oldest()
        staging = self._take_staging(index)
        grads: list[Tensor | None] = []
        for param, p in zip(bucket.plan.params, bucket.params, strict=True):
            grad = p.grad
            if grad is None or grad is self._sentinel:
                grads.append(None)
                continue
            check_gradient(self.names[param], grad)
            grads.append(grad)
            p.grad = None
            self.present[param] = True
        if faults.point("gradient"):
            spoil_on_purpose(grads)
        pending = staging.route(index, bucket).start(grads)
        # In one piece they have been copied already.
        self._exchanges.append(_Exchange(index, pending, staging, grads if self.collectives.by_hand else []))

    @torch.no_grad()  # as `_launch`
    def _finish_oldest(self) -> None:
        exchange = self._exchanges.popleft()
        exchange.pending.wait()
        bucket = self.buckets[exchange.index]
        shard, route = bucket.shard, exchange.staging.route(exchange.index, bucket)
        own = route.own(exchange.grads)
        parts = self.collectives.parts_of_sum(route.full, route.received)
        if self.collectives.has_replicas:
            rows = with_local_contribution(parts, bucket.segments, own, shard.compute)
            parts, own = self.collectives.summed_over_replicas(rows, shard.compute), None
        with self.collectives.traffic.computing("average"):
            received = ReceivedShards(parts, self.collectives.world_size, own)
            self.kernel.average(shard, bucket.segments, received, self._square_sums, add=not self._fresh)
        self._staging.append(exchange.staging)

    def _take_staging(self, index: int) -> Staging:
        """The one that this bucket went through before, if it is free: pages of it are those that it needs."""
        if not self._staging:
            return Staging(self.buckets, self.collectives)
        known = [place for place, staging in enumerate(self._staging) if staging.knows(index)]
        return self._staging.pop(known[0] if known else 0)

    def flush(self) -> GradientSummary:
        """Reduce what has not been, on every rank alike, and agree on the summary (small all-reduce a).

        A second pass follows where any rank has gradients that came after their bucket went.
        """
        if self.rounds == 0:
            refuse_ddp([self.params[index] for index in self.bucket_of])
        self._open_round()
        for index in range(self._next, len(self.buckets)):
            self._launch(index)
        self._drain()
        summary = self._agree(self._left_over())
        if summary.left_over.device.type == "cpu" or self.rounds < SYNCED_ROUNDS:
            again = {self.bucket_of[param] for param in summary.left_over.nonzero().flatten().tolist()}
            if again:
                self._fresh = False
                for index in sorted(again):
                    self._square_sums[list(self.buckets[index].plan.params)] = 0  # they are summed anew
                    self._launch(index)
                self._drain()
                summary = self._agree([False] * len(self.params))
        self._open, self._callback_queued, self.rounds, self.summary = False, False, self.rounds + 1, summary
        self._set_sentinel(summary)
        return summary

    def _agree(self, left_over: list[bool]) -> GradientSummary:
        return agree(self.collectives, self.mask_replicas(self._square_sums), self.present, left_over)

    def _drain(self) -> None:
        while self._exchanges:
            self._finish_oldest()

    def _left_over(self) -> list[bool]:
        return [
            index in self.bucket_of and p.grad is not None and p.grad is not self._sentinel
            for index, p in enumerate(self.params)
        ]

    def ready(self, found_inf: Tensor | None) -> GradientSummary:
        """The summary of all gradients so far: of the last round, or of one that is made now.

        ``found_inf`` (GradScaler's) was made of the sentinel, so all ranks have the same.

        Raises:
            RuntimeError: GradScaler has looked at gradients that were not reduced yet.
        """
        if found_inf is not None and any(self._left_over()):
            raise RuntimeError(
                "GradScaler saw gradients that stage=2 had not reduced, and would unscale them apart from the others: "
                "run the last backward before a step outside no_sync()"
            )
        if self._open or self.summary is None or not self._sentinel_attached() or any(self._left_over()):
            return self.flush()
        return self.summary

    def settle(self) -> None:
        """End an open round, on every rank alike."""
        if self._open:
            self.flush()

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """False: a gradient that some ranks lack counts as zero there."""
        return torch.zeros((), dtype=torch.bool, device=summary.present.device)

    def stepped(self) -> None:
        """A step has used the gradients; they stay, as ``.grad`` would, until they are zeroed."""
        self._used = True

    def zero(self) -> None:
        """Wait for what is in flight, on every rank alike, and forget reduced gradients."""
        if self._open:  # backward broke off here; where it did not, the round was finished, and waits for us
            self.flush()
        self._drain()
        self._drop_sentinel()
        self._open, self._callback_queued, self.summary = False, False, None

    def staging_bytes(self) -> int:
        """Bytes of the staging memory made so far."""
        return sum(staging.nbytes for staging in self._staging)


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
