"""The end of a `ShardedLamb`: what it holds outside its own memory goes with it."""

import weakref
from contextlib import suppress

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.forward_gathers import ForwardGathers
from sharded_lamb.gradients.source import GradientSource
from sharded_lamb.optim.sharded_state import ShardedOptimizer


class ClosableOptimizer(ShardedOptimizer):
    """A `ShardedOptimizer` that can be closed. Deletion closes it too."""

    _gathers: ForwardGathers
    _deletion: "weakref.finalize[[ForwardGathers, GradientSource, Collectives], ClosableOptimizer]"

    def _close_on_deletion(self) -> None:
        # Not __del__, which a wrapper of this class would inherit. Process groups end by themselves at exit.
        self._deletion = weakref.finalize(
            self, _release_deleted, self._gathers, self._gradients, self._collectives
        )
        self._deletion.atexit = False

    def close(self) -> None:
        """Give back process groups (gloo: their threads and connections) and all hooks. Not collective.

        Waits for gathers in flight (`overlap_forward`), and drops reduced gradients. Parameters keep their values, and
        ``state_dict()`` this rank's slices. `step` and other methods that communicate raise RuntimeError afterwards.
        Closing twice does nothing; deleting the optimizer closes it. NCCL's groups stay until
        ``destroy_process_group()``.
        """
        self._close("close() was called")

    @property
    def is_open(self) -> bool:
        """False once it was closed, or its default process group destroyed."""
        return self._live.closed is None and self._collectives.is_alive

    def _close(self, reason: str) -> None:
        if self._live.closed is None:
            self._live.closed = reason
            self._deletion.detach()
            _release(self._gathers, self._gradients, self._collectives)

    def _check_open(self) -> None:
        """Raises RuntimeError if the optimizer is closed."""
        if self._live.closed is not None:
            raise RuntimeError(
                f"this ShardedLamb is closed: {self._live.closed}. Use the ShardedLamb that was constructed last over "
                f"these parameters (a scheduler or a wrapper may still hold this one), or construct a new one"
            )


def _release(gathers: ForwardGathers, gradients: GradientSource, collectives: Collectives) -> None:
    try:
        gathers.close()
    finally:
        gradients.close()
        collectives.close()


def _release_deleted(gathers: ForwardGathers, gradients: GradientSource, collectives: Collectives) -> None:
    with suppress(RuntimeError):  # the ranks that its gathers wait for are gone
        _release(gathers, gradients, collectives)
