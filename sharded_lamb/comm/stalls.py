"""Ranks that wait for each other in different collectives raise within seconds, where gloo would wait for its timeout.

A rank that waits for longer than `PATIENCE` writes to the rendezvous store how many collectives of each kind it has
entered and in which it waits, and reads what other waiting ranks wrote. It is stuck if it waits for a rank that has
not entered the same collective, and that rank waits as well, perhaps in another optimizer, for one that is stuck. A
slow rank or a slow network is never stuck: one rank of those that wait for each other makes progress.
"""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

PATIENCE = 10.0
"""Seconds of waiting before a rank looks at what the others wait for."""
PERIOD = 1.0
"""Seconds between two looks. Two that see the same make ranks stuck."""
Post = Mapping[str, Any]
"""``{"entered": {group: {collective: count}}, "in": [group, collective], "number": of this one, "ranks": [...]}``.

Ranks are global. "entered" lacks the groups that this rank has ended, after all of their collectives.
"""

_LIVE: "weakref.WeakSet[Stalls]" = weakref.WeakSet()


class Stalls:
    """Counts the collectives of one group that this rank enters."""

    def __init__(self, name: str, rank: int, abandon: Callable[[], None]) -> None:
        """``abandon``: called before a rank raises that waits for it; a collective never completes."""
        self.rank, self.abandon = rank, abandon
        self.name = name
        self._entered: Counter[str] = Counter()
        _LIVE.add(self)

    def entered(self, collective: str, ranks: Sequence[int]) -> "Entered":
        """Count a collective that waits for ``ranks`` (global), before its start."""
        self._entered[collective] += 1
        return Entered(self, collective, self._entered[collective], ranks)

    def posts(self, own: "Entered") -> dict[int, Post]:
        """Write what this rank waits for; returns what was written by the ranks for which it waits, also indirectly."""
        store = self._store()
        post = {
            "entered": {stalls.name: stalls._entered for stalls in _LIVE},
            "in": [self.name, own.collective],
            "number": own.number,
            "ranks": [*own.ranks],
        }
        store.set(str(self.rank), json.dumps(post, sort_keys=True))
        posts: dict[int, Post] = {}
        unread, read = {self.rank}, set()
        while unread:
            read |= unread
            waiting = {rank: store.get(str(rank)).decode() for rank in unread if store.check([str(rank)])}
            found = {rank: json.loads(text) for rank, text in waiting.items() if text}
            posts |= found
            unread = {rank for post in found.values() for rank in post["ranks"]} - read
        return posts

    def moved_on(self) -> None:
        """This rank no longer waits."""
        with suppress(RuntimeError):  # the rank that holds the store is gone
            self._store().set(str(self.rank), "")

    @staticmethod
    def _store() -> PrefixStore:
        return PrefixStore("sharded_lamb/stalls", dist.distributed_c10d._get_default_store())


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
        posts: dict[int, Post] = {}
        stuck: set[int] = set()
        try:
            while not stuck and not arrives(PERIOD):
                before, posts = posts, self.stalls.posts(self)
                stuck = stuck_ranks(posts)
                if self.stalls.rank not in stuck or any(before.get(rank) != posts[rank] for rank in stuck):
                    stuck = set()
        finally:
            if not stuck:  # also if the backend raises: this rank may continue with another optimizer
                self.stalls.moved_on()
        if not stuck:
            return
        waited = {posts[rank]["in"][0] for rank in stuck}
        for stalls in [each for each in _LIVE if each.name in waited]:
            stalls.abandon()
        raise RuntimeError(_message(posts, stuck))


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
    group, collective = post["in"]
    others = [other for other in post["ranks"] if group in posts.get(other, {}).get("entered", ())]
    return {other for other in others if posts[other]["entered"][group].get(collective, 0) < post["number"]}


def _message(posts: Mapping[int, Post], stuck: set[int]) -> str:
    groups = sorted({posts[rank]["in"][0] for rank in stuck}, key=lambda name: (len(name), name))
    lines = []
    for rank in sorted(stuck):
        group, collective = posts[rank]["in"]
        which = f" of optimizer {groups.index(group) + 1} of {len(groups)}" if len(groups) > 1 else ""
        lines.append(f"  rank {rank} waits in {collective} {posts[rank]['number']}{which}")
    return "\n".join(
        [
            "ranks wait for each other in different collectives:",
            *lines,
            "A call of backward(), step(), zero_grad(), clip_grad_norm_() or full_state_dict() is missing on a rank. "
            "Make the same calls in the same order on every rank. In stage=2, after a backward that reaches an "
            "optimizer on some ranks only, step before zero_grad() or another backward(), and leave unscaling to "
            "GradScaler.step()",
        ]
    )
