"""The states of stage 2's reducer, and its records of a round and of exchanges in flight."""

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from torch import Tensor

from sharded_lamb.comm.pending import Pending
from sharded_lamb.gradients.attached import AttachedGradients, Kept
from sharded_lamb.gradients.exchange import Staging
from sharded_lamb.kernels import ReceivedShards


class ReducerState(Enum):
    """The state of a `BackwardReducer` between two calls, and the transition that each call makes.

    ======== ================ =============== ================== ========== ==========================
    state    gradient, or     end of backward `settle`, `ready`, `stepped`  `zero`
             `catch_up`       or `settle`     a norm that is
             opens a round    launches all    read
    ======== ================ =============== ================== ========== ==========================
    EMPTY    ROUND                                                          EMPTY
    ROUND                     LAUNCHED                                      LAUNCHED, REDUCED, EMPTY
    LAUNCHED ROUND                            REDUCED                       REDUCED, then EMPTY
    REDUCED  ROUND                                               USED       EMPTY
    USED     ROUND                                               USED       EMPTY
    ======== ================ =============== ================== ========== ==========================

    `zero` in place ends in USED instead of EMPTY if there are gradients. Zeroing or setting ``.grad`` to None changes
    no state: the next round, or `catch_up`, sees it.
    """

    EMPTY = auto()  # no reduced gradients: none yet, or they were set to None
    ROUND = auto()  # a round is open: buckets launch as their gradients arrive
    LAUNCHED = (
        auto()
    )  # every bucket was launched; some are in flight, and ranks have not agreed on the summary
    REDUCED = auto()  # every gradient is in its shard, and no step has used it
    USED = auto()  # a step has used the gradients, which the next round adds to, or they are zeros


TRANSITIONS = {
    ReducerState.EMPTY: {ReducerState.ROUND, ReducerState.EMPTY},
    ReducerState.ROUND: {ReducerState.LAUNCHED},
    ReducerState.LAUNCHED: {ReducerState.ROUND, ReducerState.REDUCED},
    ReducerState.REDUCED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
    ReducerState.USED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
}

AFTER_INTERRUPT = {
    ReducerState.ROUND: {ReducerState.ROUND, ReducerState.EMPTY},
    ReducerState.LAUNCHED: {ReducerState.LAUNCHED},
}
"""Transitions beside those, after a KeyboardInterrupt at the beginning or end of a round."""


@dataclass(slots=True)
class InFlight:
    """One bucket's exchange in flight."""

    index: int  # of the bucket
    pending: Pending
    staging: Staging
    grads: list[Tensor | None]  # sent from their own memory, so they must stay alive
    kept: list[Kept]  # of the bucket's parameters, when it was launched
    square_sums: Tensor  # of its round
    received: ReceivedShards | None = None  # once ``pending`` is the sum over replicas, that sum


@dataclass(slots=True)
class Round:
    """The open round; None between rounds."""

    used: bool  # a step had used the gradients that it adds to
    square_sums: Tensor  # [L] fp64 Σg² of this rank's shards
    missing: list[int]  # [buckets] gradients that each bucket still waits for
    next: int = 0  # the bucket to launch next
    fired: set[int] = field(default_factory=set)  # parameters whose gradient has arrived
    # For each backward pass: the callback that autograd calls at its end, and drops if it fails; None: called.
    callbacks: dict[int, "weakref.ref[Any] | None"] = field(default_factory=dict)
    is_throttled: bool = True
    is_abandoned: bool = False  # an exception ended its backward
    awaited: set[int] = field(default_factory=set)  # then: parameters without a gradient, which got handles
    thread: int = field(default_factory=threading.get_ident)  # in which gradients arrive

    def in_this_thread(self) -> "Round":
        """This round. Raises RuntimeError if gradients still arrive in another thread."""
        if self.thread != (own := threading.get_ident()):
            if any(callback is not None and callback() is not None for callback in self.callbacks.values()):
                raise RuntimeError(
                    "two threads run backward or step of a ShardedLamb of stage 2 at once, which reduces the gradients "
                    "of one backward at a time: run them one after another, or use stage=1"
                )
            self.thread = own
        return self

    def failed(self, attached: AttachedGradients, members: Iterable[int], _: Any) -> None:
        """Autograd has dropped a callback, so its backward failed: handles show what users remove or zero from now on.

        ``members``: parameters of which other ranks may have gradients.
        """
        self.is_abandoned = True
        self.awaited.update(filter(attached.expect, members))
