"""The end of a `ShardedLamb`: what it holds outside its own memory goes with it."""

from sharded_lamb.comm.forward_gathers import ForwardGathers
from sharded_lamb.gradients.source import GradientSource
from sharded_lamb.optim.sharded_state import ShardedOptimizer


class ClosableOptimizer(ShardedOptimizer):
    """A `ShardedOptimizer` that can be closed. Deletion closes it too."""

    _gathers: ForwardGathers
    _gradients: GradientSource
    _closed: str | None = None  # why

    def close(self) -> None:
        """Give back process groups (gloo: their threads and connections) and all hooks. Not collective.

        Waits for gathers in flight (`overlap_forward`), and drops reduced gradients. Parameters keep their values, and
        ``state_dict()`` this rank's slices. `step` and other methods that communicate raise RuntimeError afterwards.
        Closing twice does nothing; deleting the optimizer closes it, and so does a ShardedLamb constructed later over
        one of its parameters. NCCL's groups stay until ``destroy_process_group()``.
        """
        self._close("close() was called")

    def _close(self, reason: str) -> None:
        if self._closed is None:
            self._closed = reason
            try:
                self._gathers.close()
            finally:
                self._gradients.close()
                self._collectives.close()

    def _check_open(self) -> None:
        """Raises RuntimeError if the optimizer is closed."""
        if self._closed is not None:
            raise RuntimeError(
                f"this ShardedLamb is closed: {self._closed}. Use the ShardedLamb that was constructed last over these "
                f"parameters (a scheduler or a wrapper may still hold this one), or construct a new one"
            )

    def __del__(self) -> None:
        try:
            self._close("it was deleted")
        except Exception:
            return  # half constructed, or the ranks that its gathers wait for are gone
