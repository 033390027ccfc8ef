"""The ranks that save and load together: what one of them finds wrong is raised on all of them."""

import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sharded_lamb.checkpoint.errors import CheckpointError

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=2)
"""How long ranks wait for the slowest writer. A rank that died is noticed at once."""

_groups: Any = weakref.WeakKeyDictionary()  # optimizer or model → its `Ranks`


@dataclass(frozen=True)
class Ranks:
    """``group``: gloo, of our own, so that a checkpoint written behind training does not come between its collectives;
    None: one rank alone."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    behind: list[str] = field(default_factory=list)  # what is being saved behind training

    @staticmethod
    def of(owner: object, everyone: tuple[int, ...] | None) -> "Ranks":
        """Those of global ranks ``everyone`` (None: all), made at ``owner``'s first checkpoint. Collective."""
        found: Ranks | None = _groups.get(owner)
        if found is None and not (dist.is_available() and dist.is_initialized()):
            found = _groups[owner] = Ranks(None, 0, 1)
        if found is None:
            world = tuple(range(dist.get_world_size()))
            everyone = world if everyone is None else everyone
            group = None
            if len(everyone) == 1:
                pass
            elif everyone == world:
                group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            else:
                group = dist.new_group(
                    list(everyone), backend="gloo", timeout=TIMEOUT, use_local_synchronization=True
                )
            found = Ranks(group, everyone.index(dist.get_rank()), len(everyone))
            _groups[owner] = found
        return found

    def check_free(self) -> None:
        """Raises ValueError where a save behind training is not waited for yet."""
        if self.behind:
            raise ValueError(
                f"{self.behind[0]} is being written: call result() of what async_save gave before the next save or load"
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


def _attempt(work: Callable[[], Result]) -> tuple[tuple[Result] | None, Exception | None]:
    try:
        return (work(),), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # it cannot be told to the other ranks
            return None, RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
        return None, error


def unwrapped(error: CheckpointException) -> dict[int, Exception]:
    """{rank: what it raised} of what torch.distributed.checkpoint raises; not an Exception there means it was
    killed."""
    found: dict[int, Exception] = {}
    for rank, (raised, _) in error.failures.items():
        found[rank] = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
    return found
