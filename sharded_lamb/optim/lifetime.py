"""The end of a `ShardedLamb`: what it holds outside its own memory goes with it."""

import weakref
from contextlib import suppress

from sharded_lamb.optim.parts import ShardedLive
from sharded_lamb.optim.sharded_state import ShardedOptimizer


class ClosableOptimizer(ShardedOptimizer):
    """A `ShardedOptimizer` that can be closed. Deletion closes it too."""

    _deletion: "weakref.finalize[[ShardedLive], ClosableOptimizer]"

    def _close_on_deletion(self) -> None:
        # Not __del__, which a wrapper of this class would inherit. Process groups end by themselves at exit.
        self._deletion = weakref.finalize(self, _release_deleted, self._live)
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
            _release(self._live)

    def _check_open(self) -> None:
        """Raises RuntimeError if the optimizer is closed."""
        if self._live.closed is not None:
            raise RuntimeError(
                f"this ShardedLamb is closed: {self._live.closed}. Use the ShardedLamb that was constructed last over "
                f"these parameters (a scheduler or a wrapper may still hold this one), or construct a new one"
            )


def _release(live: ShardedLive) -> None:
    """Give back hooks and process groups."""
    try:
        live.gathers.close()
    finally:
        live.gradients.close()
        live.collectives.close()


def _release_deleted(live: ShardedLive) -> None:
    with suppress(RuntimeError):  # the ranks that its gathers wait for are gone
        _release(live)
