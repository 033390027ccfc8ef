"""All-gathers that overlap the next forward, and the hooks that wait for them (`ShardedLamb.overlap_forward`).

Every module of the model waits, before its forward, for the buckets of its own parameters. No hook runs for a parameter
that is read without a call of its module (``nn.MultiheadAttention`` reads ``out_proj.weight`` so). The first forward
detects them: the step itself waits for every bucket with a parameter whose module was not called.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sharded_lamb.comm.param_gather import ParamGather


class ForwardGathers:
    """Gathers in flight, by bucket. Holds no reference to the optimizer: the model may outlive it."""

    def __init__(self) -> None:
        self._in_flight: dict[int, ParamGather] = {}
        self._watched: set[Tensor] = set()  # parameters of watched modules
        self._bucket_of: dict[Tensor, int] = {}  # of those that are in a bucket
        self._buckets = 0  # when that was last looked up
        self._read: set[Tensor] = set()  # parameters whose module was called
        self._learning = True
        self._may_wait: set[int] = set()
        self._handles: list[Any] = []  # of hooks on modules

    def watch(self, module: nn.Module, params: Collection[Tensor]) -> "Watch":
        """Make the forward of ``module`` and of its submodules wait for their parameters.

        Args:
            params: all parameters of the optimizer; those in no bucket (frozen, DTensors) are not waited for.

        Raises:
            ValueError: no parameter of ``module`` is in ``params``.
        """
        watched = set(module.parameters()).intersection(params)
        if not watched:
            raise ValueError(
                "overlap_forward got a module without a parameter of this optimizer: pass the model whose parameters "
                "it was constructed from"
            )
        self._watched |= watched
        self._learning, self._read, self._may_wait = True, set(), set()
        handles: list[Any] = []
        for part in module.modules():
            own = [p for p in part.parameters(recurse=False) if p in watched]
            if own:
                handles.append(part.register_forward_pre_hook(_BeforeForward(self, own)))
            untyped: Any = part
            handles.append(untyped.register_state_dict_pre_hook(self._before_state))
            handles.append(untyped.register_load_state_dict_pre_hook(self._before_state))
        self._handles += handles
        return Watch(self, watched, handles)

    def forget_buckets(self) -> None:
        """Look up again which buckets parameters are in."""
        self._bucket_of, self._buckets = {}, 0

    def close(self) -> None:
        """Wait for gathers in flight, and remove all hooks."""
        try:
            self.wait()
        finally:
            while self._handles:
                self._handles.pop().remove()

    def unwatch(self, params: Iterable[Tensor]) -> None:
        """Let steps wait for the gathers of these parameters again."""
        self.wait()
        self._watched.difference_update(params)
        self._read.difference_update(params)
        for p in params:
            self._may_wait.discard(self._bucket_of.pop(p, -1))

    def read(self, own: Sequence[Tensor]) -> None:
        """Before a module reads its own parameters: wait for their buckets."""
        if self._learning:
            self._read.update(own)
        if self._in_flight:
            self.wait({self._bucket_of[p] for p in own if p in self._bucket_of})

    def __reduce__(self) -> tuple[type["ForwardGathers"], tuple[()]]:
        """A copied or pickled model has complete parameters and no gathers."""
        self.wait()
        return ForwardGathers, ()

    def _before_state(self, *_: Any) -> None:
        self.wait()

    def finish_or_defer(self, gathers: Sequence[ParamGather], params: Sequence[Iterable[Tensor]]) -> None:
        """Keep a step's gathers in flight if forward waits for them; finish the others.

        Args:
            gathers: one per bucket.
            params: the parameters of each bucket.
        """
        assert not self._in_flight, "a step starts after all parameters are gathered"
        if self._read and (self._learning or len(params) != self._buckets):
            self._learning, self._buckets = False, len(params)
            self._bucket_of = {p: b for b, own in enumerate(params) for p in own if p in self._watched}
            self._may_wait = {b for b in self._bucket_of.values() if all(p in self._read for p in params[b])}
        for bucket in reversed(range(len(gathers))):  # the order in which pass 2 started them
            if bucket in self._may_wait:
                self._in_flight[bucket] = gathers[bucket]
            else:
                gathers[bucket].finish()

    def wait(self, buckets: Iterable[int] | None = None) -> None:
        """Wait for the gathers of these buckets, or of all."""
        for bucket in list(self._in_flight) if buckets is None else buckets:
            gather = self._in_flight.pop(bucket, None)
            if gather is not None:
                gather.finish()


@dataclass(frozen=True)
class _BeforeForward:
    """A module's forward pre-hook; an object, so that a model with it can be pickled."""

    gathers: ForwardGathers
    own: Sequence[Tensor]

    def __call__(self, _: nn.Module, __: Any) -> None:
        self.gathers.read(self.own)


class Watch:
    """Handle that `ShardedLamb.overlap_forward` returns."""

    def __init__(self, gathers: ForwardGathers, params: Iterable[Tensor], handles: list[Any]) -> None:
        self._gathers, self._params, self._handles = gathers, list(params), handles

    def remove(self) -> None:
        """Remove the hooks: wait for gathers in flight, and from now on in every step."""
        self._gathers.unwatch(self._params)
        for handle in self._handles:
            handle.remove()
        self._handles = []
