"""The states of stage 2's reducer."""

from enum import Enum, auto


class ReducerState(Enum):
    """The state of a `BackwardReducer` between two calls, and the transition that each call makes.

    ======== ================ =============== ================== ========== ==========================
    state    gradient, or     end of backward `settle`, `ready`, `stepped`  `zero`
             `ready`          or `settle`     a norm that is
             opens a round    launches all    read
    ======== ================ =============== ================== ========== ==========================
    EMPTY    ROUND                                                          EMPTY
    ROUND                     LAUNCHED                                      LAUNCHED, REDUCED, EMPTY
    LAUNCHED ROUND                            REDUCED                       REDUCED, then EMPTY
    REDUCED  ROUND                                               USED       EMPTY
    USED     ROUND                                               USED       EMPTY
    ======== ================ =============== ================== ========== ==========================

    Zeroing or setting ``.grad`` to None changes no state: the next round, or `ready`, sees it.
    """

    EMPTY = auto()  # no reduced gradients: none yet, or they were zeroed
    ROUND = auto()  # a round is open: buckets launch as their gradients arrive
    LAUNCHED = (
        auto()
    )  # every bucket was launched; some are in flight, and ranks have not agreed on the summary
    REDUCED = auto()  # every gradient is in its shard, and no step has used it
    USED = auto()  # a step has used the gradients; the next round adds to them unless they are zeroed


TRANSITIONS = {
    ReducerState.EMPTY: {ReducerState.ROUND, ReducerState.EMPTY},
    ReducerState.ROUND: {ReducerState.LAUNCHED},
    ReducerState.LAUNCHED: {ReducerState.ROUND, ReducerState.REDUCED},
    ReducerState.REDUCED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
    ReducerState.USED: {ReducerState.ROUND, ReducerState.USED, ReducerState.EMPTY},
}
