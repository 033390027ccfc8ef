"""Ranks that wait for each other in different collectives raise within seconds, where gloo would wait for its timeout.

A rank that waits for longer than `PATIENCE` writes to the rendezvous store how many collectives of each kind it has
entered and in which it waits, and reads what other waiting ranks wrote. It is stuck if it waits for a rank that has
not entered the same collective, and that rank waits as well, for one that is stuck. A slow rank or a slow network is
never stuck: one rank of those that wait for each other makes progress.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

PATIENCE = 10.0
"""Seconds of waiting before a rank looks at what the others wait for."""
PERIOD = 1.0
"""Seconds between two looks. Two that see the same make ranks stuck."""
Post = Mapping[str, Any]
"""``{"entered": {collective: count}, "in": collective, "number": of this one, "ranks": [...]}``; ranks are global."""


class Stalls:
    """Counts the collectives that this rank enters, for the ranks that share ``name``."""

    def __init__(self, name: str, rank: int, ranks: Sequence[int], abandon: Callable[[], None]) -> None:
        """``abandon``: called before this rank raises; its collective never completes."""
        self.rank, self.ranks, self.abandon = rank, ranks, abandon
        self._name = name
        self._entered: Counter[str] = Counter()

    def entered(self, collective: str, ranks: Sequence[int]) -> "Entered":
        """Count a collective that waits for ``ranks`` (global), before its start."""
        self._entered[collective] += 1
        return Entered(self, collective, self._entered[collective], ranks)

    def posts(self, own: "Entered") -> dict[int, Post]:
        """Write what this rank waits for; returns what all waiting ranks wrote."""
        store = self._store()
        post = {
            "entered": self._entered,
            "in": own.collective,
            "number": own.number,
            "ranks": [*own.ranks],
        }
        store.set(str(self.rank), json.dumps(post, sort_keys=True))
        keys = {rank: str(rank) for rank in self.ranks}
        waiting = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
        return {rank: json.loads(text) for rank, text in waiting.items() if text}

    def moved_on(self) -> None:
        """This rank no longer waits."""
        self._store().set(str(self.rank), "")

    def _store(self) -> PrefixStore:
        return PrefixStore(f"sharded_lamb/stalls/{self._name}", dist.distributed_c10d._get_default_store())


@dataclass(frozen=True)
class Entered:
    """A collective that this rank has entered: the ``number``-th of its kind."""

    stalls: Stalls
    collective: str
    number: int
    ranks: Sequence[int]

    def wait(self, arrives: Callable[[float], bool]) -> None:
        """Wait until ``arrives(seconds)``, which waits at most so long, returns True.

        Raises:
            RuntimeError: this rank and others wait for each other in different collectives; names all of them.
        """
        if arrives(PATIENCE):
            return
        before: dict[int, Post] = {}
        while not arrives(PERIOD):
            posts = self.stalls.posts(self)
            stuck = stuck_ranks(posts)
            if self.stalls.rank in stuck and all(before.get(rank) == posts[rank] for rank in stuck):
                self.stalls.abandon()
                raise RuntimeError(_message(posts, stuck))
            before = posts
        self.stalls.moved_on()


def stuck_ranks(posts: Mapping[int, Post]) -> set[int]:
    """The waiting ranks that wait, directly or through others, for ranks that wait for them."""
    stuck = set(posts)
    while True:
        waits = {rank for rank in stuck if _holders(rank, posts) & stuck}
        if waits == stuck:
            return stuck
        stuck = waits


def _holders(rank: int, posts: Mapping[int, Post]) -> set[int]:
    """The waiting ranks that have not entered the collective in which ``rank`` waits."""
    post = posts[rank]
    others = [other for other in post["ranks"] if other in posts]
    return {other for other in others if posts[other]["entered"].get(post["in"], 0) < post["number"]}


def _message(posts: Mapping[int, Post], stuck: set[int]) -> str:
    lines = [f"  rank {rank} waits in {posts[rank]['in']} {posts[rank]['number']}" for rank in sorted(stuck)]
    return "\n".join(
        [
            "ranks wait for each other in different collectives:",
            *lines,
            "A call of backward(), step(), clip_grad_norm_() or full_state_dict() is missing on some ranks: every rank "
            "must make the same calls in the same order",
        ]
    )
