"""Ranks that wait for a rank that will not come raise within seconds, where gloo would wait for its timeout.

A rank that waits for longer than `PATIENCE` writes to the rendezvous store how many collectives of each kind it has
entered and in which it waits, and reads what other ranks wrote. A rank that raises an error (`raised`) writes that. A
rank is stuck if it waits for a rank that has not entered the same collective, and that rank has raised, or waits as
well, perhaps in another optimizer, for one that is stuck. A slow rank or a slow network is never stuck: one rank of
those that wait for each other makes progress. Where ranks raise alike, none is stuck: see `ThisRank.errors`. The first
rank to find others stuck also writes each of them a verdict, since it may continue with other collectives at once.
"""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

PATIENCE = 10.0
"""Seconds of waiting before a rank looks at what the others wait for."""
PERIOD = 1.0
"""Seconds between two looks. Two that see the same make ranks stuck."""
MOST_ERRORS = 8
"""So many of its errors a rank remembers."""
Post = Mapping[str, Any]
"""Of a rank that waits: ``{"entered": {group: {collective: count}}, "in": [group, collective], "number": of this one,
"ranks": [...], "errors": see `ThisRank`}``; of one that has raised: ``{"entered": ..., "raised": [kind, text],
"errors": ...}``.

Ranks are global. "entered" lacks the groups that this rank has ended, after all of their collectives.
"""
_OURS = "ranks wait for "  # how this file's messages begin


@dataclass(eq=False)
class ThisRank:
    """This process in one default process group: names of groups recur after the next init_process_group."""

    live: "weakref.WeakSet[Stalls]" = field(default_factory=weakref.WeakSet)
    errors: list[tuple[str, set[int]]] = field(default_factory=list)
    """The last ones that it has raised: kind, ranks for which it has waited since. A rank that has raised no more of a
    kind than the one that waits for it, since one waited for the other, may have raised alike, and return later."""
    meetings: "Stalls | None" = None
    has_posted: bool = False  # the store has a post of this rank


_THIS_RANK: Any = weakref.WeakKeyDictionary()  # by default process group


def _this_rank() -> ThisRank:
    this: ThisRank = _THIS_RANK.setdefault(dist.group.WORLD, ThisRank())
    return this


def _store() -> PrefixStore:
    return PrefixStore("sharded_lamb/stalls", dist.distributed_c10d._get_default_store())


def meeting(rank: int, ranks: Sequence[int]) -> "Entered":
    """Count a comparison that ``ranks`` (global) make through the store, before its start."""
    this_rank = _this_rank()
    if this_rank.meetings is None:
        this_rank.meetings = Stalls("meetings", rank, lambda: None)
    whom = ", ".join(map(str, ranks))
    return this_rank.meetings.entered(f"construction, load or registration of ranks {whom}, number", ranks)


class Stalls:
    """Counts the collectives of one group that this rank enters."""

    def __init__(self, name: str, rank: int, abandon: Callable[[], None]) -> None:
        """``abandon``: called before a rank raises that waits for it; a collective never completes."""
        self.rank, self.abandon = rank, abandon
        self.name = name
        self.counts: Counter[str] = Counter()
        self.this_rank = _this_rank()
        self.this_rank.live.add(self)

    def entered(self, collective: str, ranks: Sequence[int]) -> "Entered":
        """Count a collective that waits for ``ranks`` (global), before its start."""
        self.counts[collective] += 1
        if self.this_rank.has_posted:
            self.unpost()
        return Entered(self, collective, self.counts[collective], ranks)

    def post(self, **facts: Any) -> None:
        """Write ``facts``, the collectives that this rank has entered and its errors."""
        entered = {stalls.name: stalls.counts for stalls in self.this_rank.live}
        facts |= {
            "entered": entered,
            "errors": [[kind, sorted(ranks)] for kind, ranks in self.this_rank.errors],
        }
        self.this_rank.has_posted = True
        _store().set(str(self.rank), json.dumps(facts, sort_keys=True))

    def unpost(self) -> None:
        """This rank no longer waits, or continues after an error."""
        self.this_rank.has_posted = False
        with suppress(RuntimeError):  # the rank that holds the store is gone
            _store().set(str(self.rank), "")


def raised(error: Exception, *, again: bool = False) -> None:
    """Let ranks that wait for this one, on gloo or in the store, raise ``error`` too. Not collective.

    ``again``: this rank has entered collectives since, which withdrew it, to complete what was in flight.
    """
    if not dist.is_initialized():
        return
    this_rank = _this_rank()
    for stalls in [*this_rank.live][:1]:
        name, text = type(error).__name__, str(error)
        kind = _OURS if text.startswith(_OURS) else name
        if not again:
            this_rank.errors[:] = [*this_rank.errors[1 - MOST_ERRORS :], (kind, set())]
        with suppress(RuntimeError):
            stalls.post(raised=[kind, f"{name}: {text}"])


def _read(ranks: Iterable[int]) -> dict[int, Post]:
    """What was written by ``ranks`` and the ranks for which they wait, also indirectly."""
    store = _store()
    posts: dict[int, Post] = {}
    unread, read = set(ranks), set[int]()
    while unread:
        read |= unread
        texts = {rank: store.get(str(rank)).decode() for rank in unread if store.check([str(rank)])}
        found = {rank: json.loads(text) for rank, text in texts.items() if text}
        posts |= found
        unread = {rank for post in found.values() for rank in post.get("ranks", ())} - read
    return posts


@dataclass(frozen=True)
class Entered:
    """A collective that this rank has entered: the ``number``-th of its kind."""

    stalls: Stalls
    collective: str
    number: int
    ranks: Sequence[int]

    def wait(self, arrives: Callable[[float], bool], check: Callable[[], None] = lambda: None) -> None:
        """Wait until ``arrives(seconds)``, which waits at most so long, returns True.

        Args:
            check: called between two waits; raises if the collective can no longer complete.

        Raises:
            RuntimeError: this rank and others wait for each other in different collectives, or for a rank that has
                raised; names all of them.
        """
        posts: dict[int, Post] = {}
        stuck: set[int] = set()
        verdict = ""
        try:
            if not arrives(PATIENCE):
                while not (stuck or verdict or arrives(PERIOD)):
                    check()
                    before, posts = posts, self._look()
                    stuck, verdict = stuck_ranks(posts), self._verdict()
                    if self.stalls.rank not in stuck or any(
                        before.get(rank) != posts[rank] for rank in stuck
                    ):
                        stuck = set()
        finally:
            if not (stuck or verdict) and self.stalls.this_rank.has_posted:
                self.stalls.unpost()  # also if the backend raises: it may continue with another optimizer
        if not (stuck or verdict):
            for _, since in self.stalls.this_rank.errors:
                since.update(self.ranks)
            return
        waited = {self.stalls.name} | {posts[rank]["in"][0] for rank in stuck if "in" in posts[rank]}
        for stalls in [each for each in self.stalls.this_rank.live if each.name in waited]:
            stalls.abandon()
        error = RuntimeError(verdict or _message(posts, stuck))
        for rank in stuck - {self.stalls.rank}:
            if "in" in posts[rank]:
                where = [*posts[rank]["in"], posts[rank]["number"]]
                _store().set(f"verdict/{rank}", json.dumps([where, str(error)]))
        raised(error)
        raise error

    def _verdict(self) -> str:
        """The error of another rank that has found this one stuck in this collective, or "".

        That rank may have continued since, so that its post no longer says so.
        """
        store, key = _store(), f"verdict/{self.stalls.rank}"
        where, text = json.loads(store.get(key)) if store.check([key]) else ([], "")
        return text if where == [self.stalls.name, self.collective, self.number] else ""

    def _look(self) -> dict[int, Post]:
        where = {"in": [self.stalls.name, self.collective], "number": self.number}
        self.stalls.post(**where, ranks=[*self.ranks])
        return _read({self.stalls.rank})


@contextmanager
def explained(entered: Entered | None) -> Iterator[None]:
    """Raise an error of the backend inside, to which a connection was closed, with the errors that other ranks raised.

    Raises:
        RuntimeError: the backend's, with the errors of ranks that this rank waits for.
    """
    try:
        yield
    except RuntimeError as error:
        posts: Mapping[int, Post] = {}
        if entered is not None and not str(error).startswith(_OURS):
            with suppress(RuntimeError):
                posts = _read(rank for rank in entered.ranks if rank != entered.stalls.rank)
        if lines := _raised_lines(posts):
            raise RuntimeError("\n".join([f"{_OURS}a rank that has raised:", *lines])) from error
        raise


def stuck_ranks(posts: Mapping[int, Post]) -> set[int]:
    """The ranks that have raised, and those that wait, directly or through others, for ranks that wait for them."""
    stuck = set(posts)
    while True:
        waits = {rank for rank in stuck if "raised" in posts[rank] or _holders(rank, posts) & stuck}
        if waits == stuck:
            return stuck
        stuck = waits


def _holders(rank: int, posts: Mapping[int, Post]) -> set[int]:
    """The ranks with posts that have not entered the collective in which ``rank`` waits."""
    post = posts[rank]
    group, collective = post["in"]
    others = [other for other in post["ranks"] if group in posts.get(other, {}).get("entered", ())]
    others = [other for other in others if not _raised_alike(other, rank, posts)]
    return {other for other in others if posts[other]["entered"][group].get(collective, 0) < post["number"]}


def _raised_alike(other: int, rank: int, posts: Mapping[int, Post]) -> bool:
    """Whether ``other`` has raised, but no more than ``rank`` since one waited for the other."""
    if "raised" not in posts[other]:
        return False
    kind = posts[other]["raised"][0]
    return _times(kind, posts[other], since=rank) <= _times(kind, posts[rank], since=other)


def _times(kind: str, post: Post, since: int) -> int:
    """How often the rank of ``post`` has raised errors of ``kind`` since it waited for the rank ``since``."""
    return sum(each == kind and since not in ranks for each, ranks in post["errors"])


def _raised_lines(posts: Mapping[int, Post]) -> list[str]:
    """One for each rank that has raised; of ranks that raised since others had, only one where there is no other."""
    texts = {rank: post["raised"][1] for rank, post in sorted(posts.items()) if "raised" in post}
    first = {rank: text for rank, text in texts.items() if _OURS not in text}
    if texts and not first:
        shortest = min(texts, key=lambda rank: len(texts[rank]))
        first = {shortest: texts[shortest]}
    return [f"  rank {rank} has raised {text}" for rank, text in first.items()]


def _message(posts: Mapping[int, Post], stuck: set[int]) -> str:
    waiting = [rank for rank in sorted(stuck) if "in" in posts[rank]]
    groups = sorted({posts[rank]["in"][0] for rank in waiting}, key=lambda name: (len(name), name))
    lines = []
    for rank in waiting:
        group, collective = posts[rank]["in"]
        which = f" of optimizer {groups.index(group) + 1} of {len(groups)}" if len(groups) > 1 else ""
        lines.append(f"  rank {rank} waits in {collective} {posts[rank]['number']}{which}")
    if len(waiting) < len(stuck):
        return "\n".join([f"{_OURS}a rank that has raised:", *lines, *_raised_lines(posts)])
    return "\n".join(
        [
            f"{_OURS}each other in different collectives:",
            *lines,
            "A call of backward(), step(), zero_grad(), clip_grad_norm_() or full_state_dict() is missing on a rank. "
            "Make the same calls in the same order on every rank. In stage=2, after a backward that reaches an "
            "optimizer on some ranks only, step before zero_grad() or another backward(), and leave unscaling to "
            "GradScaler.step()",
        ]
    )
