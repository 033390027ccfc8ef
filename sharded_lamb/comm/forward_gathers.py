"""All-gathers that go on while the next forward runs: who waits for which parameters (`ShardedLamb.overlap_forward`).

Every module of the model waits, before its own forward, for the buckets that its own parameters lie in. A parameter
that is read without its module being called (``nn.MultiheadAttention`` reads ``out_proj.weight`` so) cannot be waited
for in this way. Which are, shows in the first forward: buckets with a parameter whose module was not called then are
waited for in every step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sharded_lamb.comm.param_gather import ParamGather


class ForwardGathers:
    """Gathers in flight, by bucket. Holds no optimizer: a model outlives its own."""

    def __init__(self) -> None:
        self._in_flight: dict[int, ParamGather] = {}
        self._bucket_of: dict[Tensor, int] = {}  # of the parameters of watched modules
        self._read: set[Tensor] = set()  # whose module was called
        self._learning = True
        self._may_wait: set[int] = set()

    def watch(self, module: nn.Module, bucket_of: Mapping[Tensor, int]) -> "Watch":
        """Wait in the forward of ``module`` and of the modules in it for what they need.

        Args:
            bucket_of: the bucket of every parameter that the optimizer holds in one.

        Raises:
            ValueError: none of the module's parameters is among them.
        """
        found: dict[Tensor, int] = {p: bucket_of[p] for p in module.parameters() if p in bucket_of}
        if not found:
            raise ValueError(
                "overlap_forward got a module without a parameter that this optimizer gathers: pass the model whose "
                "parameters it was constructed from (DTensors are gathered by fully_shard)"
            )
        self._bucket_of.update(found)
        self._learning, self._read, self._may_wait = True, set(), set()
        handles: list[Any] = []
        for part in module.modules():
            own = [p for p in part.parameters(recurse=False) if p in found]
            if own:
                buckets = sorted({self._bucket_of[p] for p in own})
                handles.append(part.register_forward_pre_hook(_BeforeForward(self, own, buckets)))
            untyped: Any = part
            handles.append(untyped.register_state_dict_pre_hook(self._before_state))
            handles.append(untyped.register_load_state_dict_pre_hook(self._before_state))
        return Watch(self, found, handles)

    def unwatch(self, params: Iterable[Tensor]) -> None:
        """Gathers of these parameters are waited for in their step again."""
        self.wait()
        for p in params:
            self._may_wait.discard(self._bucket_of.pop(p, -1))

    def read(self, own: Sequence[Tensor], buckets: Sequence[int]) -> None:
        """A module is about to read its own parameters, which lie in these buckets."""
        if self._learning:
            self._read.update(own)
        if self._in_flight:
            self.wait(buckets)

    def __reduce__(self) -> tuple[type["ForwardGathers"], tuple[()]]:
        """A copied or pickled model has whole parameters and nothing to wait for."""
        self.wait()
        return ForwardGathers, ()

    def _before_state(self, *_: Any) -> None:
        self.wait()

    def finish_or_defer(self, gathers: Sequence[ParamGather], params: Sequence[Iterable[Tensor]]) -> None:
        """Leave gathers that a step started in flight where forward waits for them, and finish the rest.

        Args:
            gathers: of every bucket.
            params: of every bucket.
        """
        assert not self._in_flight, "a step begins when every parameter is gathered"
        if self._learning and self._read:
            self._learning = False
            buckets = set(self._bucket_of.values())
            self._may_wait = {b for b in buckets if all(p in self._read for p in params[b])}
        for bucket in reversed(range(len(gathers))):  # the order in which pass 2 starts them
            if bucket in self._may_wait:
                self._in_flight[bucket] = gathers[bucket]
            else:
                gathers[bucket].finish()

    def wait(self, buckets: Iterable[int] | None = None) -> None:
        """For the gathers of these buckets, or all."""
        for bucket in list(self._in_flight) if buckets is None else buckets:
            gather = self._in_flight.pop(bucket, None)
            if gather is not None:
                gather.finish()


@dataclass(frozen=True)
class _BeforeForward:
    """A module's hook; an object, so that models that have it can be pickled."""

    gathers: ForwardGathers
    own: Sequence[Tensor]
    buckets: Sequence[int]

    def __call__(self, _: nn.Module, __: Any) -> None:
        self.gathers.read(self.own, self.buckets)


class Watch:
    """What `ShardedLamb.overlap_forward` returns."""

    def __init__(self, gathers: ForwardGathers, params: Iterable[Tensor], handles: list[Any]) -> None:
        self._gathers, self._params, self._handles = gathers, list(params), handles

    def remove(self) -> None:
        """Wait for what is in flight, and from now on in every step."""
        self._gathers.unwatch(self._params)
        for handle in self._handles:
            handle.remove()
        self._handles = []
