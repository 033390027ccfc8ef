"""The ranks that save and load together: what one of them finds wrong is raised on all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sharded_lamb.checkpoint.errors import CheckpointError, tellable
from sharded_lamb.optim.sharded_state import ShardedOptimizer

Result = TypeVar("Result")
_behind_alone: list[Path] = []
TIMEOUT = timedelta(hours=2)
"""How long ranks wait for the slowest writer. A rank that died is noticed at once."""

# RankGroup → the world they were made in, and their `RankGroup`.
_made: dict[tuple[int, ...], tuple[Any, "RankGroup"]] = {}


@dataclass(frozen=True)
class RankGroup:
    """``group``: gloo, of our own, so that checkpoints do not come between training's collectives; None: one rank
    alone."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    everyone: tuple[int, ...] = (0,)  # global ranks
    behind: list[Path] = field(default_factory=list)  # what is being saved behind training
    _group_behind: list[dist.ProcessGroup] = field(default_factory=list)

    @staticmethod
    def of(everyone: tuple[int, ...] | None = None) -> "RankGroup":
        """Those of the given global ranks (None: all), made at their first checkpoint. Collective.

        Raises ValueError on a rank that is none of them.
        """
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if world is None:
            return RankGroup(None, 0, 1, behind=_behind_alone)
        everyone = tuple(range(dist.get_world_size())) if everyone is None else everyone
        if dist.get_rank() not in everyone:
            raise ValueError(
                f"rank {dist.get_rank()} is none of the ranks {list(everyone)} that write or read this checkpoint: "
                f"call save and load on those only, or pass another process_group="
            )
        made_in, found = _made.get(everyone, (None, None))
        if found is None or made_in is not world or not found.is_there():
            group = _new_group(everyone) if len(everyone) > 1 else None
            found = RankGroup(group, everyone.index(dist.get_rank()), len(everyone), everyone)
            _made[everyone] = (world, found)
        return found

    def is_there(self) -> bool:
        """False once somebody has destroyed the process groups."""
        try:
            for group in (self.group, *self._group_behind):
                if group is not None:
                    dist.get_backend(group)
        except ValueError:
            return False
        return True

    def group_behind(self) -> dist.ProcessGroup | None:
        """Another, for what is written behind training while ranks may talk in `group`. The first time, collective."""
        if self.group is None:
            return None
        if not self._group_behind:
            self._group_behind.append(_new_group(self.everyone))
        return self._group_behind[0]

    def check_free(self) -> None:
        """Raises ValueError where a save behind training is not waited for yet."""
        if self.behind:
            raise ValueError(
                f"checkpoint {self.behind[0]} is being written: call result() of what async_save gave before the "
                f"next save or load"
            )

    def agree(self, what: str, value: str) -> None:
        """Raises ValueError on every rank, with who differs, unless ``value`` is the same on all."""
        values = self.gathered(value)
        odd = {rank: other for rank, other in enumerate(values) if other != values[0]}
        if odd:
            rank, other = next(iter(odd.items()))
            raise ValueError(
                f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other} ({len(odd)} ranks "
                f"differ). Ranks write and read one checkpoint together; those of other models pass process_group="
            )

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], Result]) -> Result:
        """This rank's ``work``; what it raises on any rank is raised on all of them."""
        result, failure = _attempt(work)
        failures = {rank: error for rank, error in enumerate(self.gathered(failure)) if error is not None}
        if failures:
            self.raise_together(failures | ({} if failure is None else {self.rank: failure}))
        assert result is not None
        return result[0]

    def first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives on the first rank, on every rank; likewise what it raises."""
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            result, failure = _attempt(work)
            box = [None if result is None else result[0], failure]
        if self.group is not None:
            dist.broadcast_object_list(box, group_src=0, group=self.group)
        if box[1] is not None:
            self.raise_together({0: failure or box[1]})
        found: Result = box[0]
        return found

    def raise_together(self, failures: dict[int, Exception]) -> None:
        """Raises one error on every rank: the lowest rank's, with that rank's number where it is not this one's too."""
        rank, error = min(failures.items(), key=lambda item: item[0])
        own = failures.get(self.rank)
        if own is not None and (rank == self.rank or str(own) == str(error)):
            raise own
        if isinstance(error, OSError):
            raise OSError(error.errno, f"on rank {rank}: {error.strerror or error}", error.filename) from own
        kinds: tuple[type[Exception], ...] = (CheckpointError, ValueError, TypeError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        if kind is None:
            raise RuntimeError(f"on rank {rank}: {type(error).__name__}: {error}") from own
        raise kind(f"on rank {rank}: {error}") from own


def _new_group(everyone: tuple[int, ...]) -> Any:
    if len(everyone) == dist.get_world_size():
        return dist.new_group(backend="gloo", timeout=TIMEOUT)
    return dist.new_group(list(everyone), backend="gloo", timeout=TIMEOUT, use_local_synchronization=True)


def ranks_of(optimizer: Any, group: dist.ProcessGroup | None) -> RankGroup:
    """Those of a save or load: of ``group``, else of the optimizer, else all. Collective."""
    everyone: tuple[int, ...] | None = optimizer.ranks if isinstance(optimizer, ShardedOptimizer) else None
    initialized = dist.is_available() and dist.is_initialized()
    if everyone is not None and len(everyone) > 1 and not initialized:
        raise ValueError(
            f"the optimizer's state is sharded over ranks {list(everyone)}, and there is no process group: save before "
            f"destroy_process_group(), load after init_process_group()"
        )
    if group is not None:
        if not initialized or not isinstance(group, dist.ProcessGroup):
            raise ValueError("this rank is not in process_group: call save and load on its ranks only")
        everyone = tuple(sorted(dist.get_process_group_ranks(group)))
    return RankGroup.of(everyone)


def _attempt(work: Callable[[], Result]) -> tuple[tuple[Result] | None, Exception | None]:
    try:
        return (work(),), None
    except Exception as error:
        return None, tellable(error)


def unwrapped(error: CheckpointException) -> dict[int, Exception]:
    """{rank: what it raised} of what torch.distributed.checkpoint raises; not an Exception there means it was
    killed."""
    found: dict[int, Exception] = {}
    for rank, (raised, _) in error.failures.items():
        found[rank] = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
    return found
