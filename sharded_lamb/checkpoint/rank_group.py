"""The ranks that save and load together: an error on one of them is raised on all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sharded_lamb.checkpoint.errors import CheckpointError, picklable
from sharded_lamb.comm.groups import OwnedGroup
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.sharded_state import ShardedOptimizer

Result = TypeVar("Result")
_pending_without_ranks: list[Path] = []
TIMEOUT = timedelta(hours=2)
"""Limit of the wait for the slowest writer. A dead rank ends the wait at once."""

_cache: dict[tuple[int, ...], "RankGroup"] = {}  # by global ranks


@dataclass(frozen=True)
class RankGroup:
    """Ranks and their control messages, which use a gloo group apart from training's collectives."""

    owned: OwnedGroup | None  # None: a single rank
    rank: int  # in the group
    size: int
    global_ranks: tuple[int, ...] = (0,)
    pending: list[Path] = field(default_factory=list)  # checkpoints that async saves are writing
    _async_groups: list[OwnedGroup] = field(default_factory=list)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """None: a single rank."""
        return None if self.owned is None else self.owned.pg

    @staticmethod
    def of(global_ranks: tuple[int, ...] | None = None) -> "RankGroup":
        """Returns the group of the given global ranks (None: all ranks), and creates it on first use. Collective.

        Raises:
            ValueError: this rank is not among them.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return RankGroup(None, 0, 1, pending=_pending_without_ranks)
        global_ranks = tuple(range(dist.get_world_size())) if global_ranks is None else global_ranks
        if dist.get_rank() not in global_ranks:
            raise ValueError(
                f"rank {dist.get_rank()} is not among the ranks {list(global_ranks)} that write or read this "
                f"checkpoint: call save and load on those only, or pass another process_group="
            )
        ranks = _cache.get(global_ranks)
        if ranks is None or not ranks.is_alive():
            owned = _new_group(global_ranks) if len(global_ranks) > 1 else None
            ranks = RankGroup(owned, global_ranks.index(dist.get_rank()), len(global_ranks), global_ranks)
            _cache[global_ranks] = ranks
        return ranks

    def is_alive(self) -> bool:
        """Returns False once a process group has been destroyed."""
        return all(owned is None or owned.is_alive for owned in (self.owned, *self._async_groups))

    def async_group(self) -> dist.ProcessGroup | None:
        """Returns a second group for async saves, which run while `group` is in use. Collective on the first call."""
        if self.owned is None:
            return None
        if not self._async_groups:
            self._async_groups.append(_new_group(self.global_ranks))
        return self._async_groups[0].pg

    def check_no_pending_save(self) -> None:
        """Raises ValueError while an async save is unfinished, or its result was not asked for."""
        if self.pending:
            raise ValueError(
                f"checkpoint {self.pending[0]} is being written: call result() on the AsyncSave that async_save "
                f"returned before the next save or load"
            )

    def agree(self, what: str, value: str) -> None:
        """Raises ValueError on every rank, naming a rank that differs, unless all ranks pass the same ``value``."""
        values = self.gathered(value)
        mismatched = {rank: other for rank, other in enumerate(values) if other != values[0]}
        if mismatched:
            rank, other = next(iter(mismatched.items()))
            raise ValueError(
                f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other} "
                f"({len(mismatched)} ranks differ). All ranks write or read one checkpoint; ranks of another model "
                f"pass process_group="
            )

    def gathered(self, value: Any) -> list[Any]:
        """Returns every rank's value, by rank. One all-gather."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], Result]) -> Result:
        """Runs ``work`` on every rank, returns its own result, and raises any rank's error on all. One all-gather."""
        result, failure = _attempt(work)
        failures = {rank: error for rank, error in enumerate(self.gathered(failure)) if error is not None}
        if failures:
            self.raise_together(failures | ({} if failure is None else {self.rank: failure}))
        assert result is not None
        return result[0]

    def first(self, work: Callable[[], Result]) -> Result:
        """Runs ``work`` on the first rank; every rank returns its result or raises its error. One broadcast."""
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            result, failure = _attempt(work)
            box = [None if result is None else result[0], failure]
        if self.group is not None:
            dist.broadcast_object_list(box, group_src=0, group=self.group)
        if box[1] is not None:
            self.raise_together({0: failure or box[1]})
        value: Result = box[0]
        return value

    def raise_together(self, failures: dict[int, Exception]) -> None:
        """Raises the lowest failed rank's error, with its rank number unless this rank failed alike."""
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


def _new_group(global_ranks: tuple[int, ...]) -> OwnedGroup:
    return OwnedGroup(global_ranks, backend="gloo", timeout=TIMEOUT)


def bare_optimizer(optimizer: Any) -> Any:
    """The `Lamb` or `ShardedLamb` in wrappers of frameworks (Accelerate, Fabric, Lightning); others unchanged.

    A wrapper holds an optimizer as ``optimizer`` or ``_optimizer`` and shows its groups and state: a scheduler has no
    groups, and a wrapper with state of its own (lookahead) is an optimizer of another kind.
    """
    inner = optimizer
    for _ in range(8):
        held = [getattr(inner, name, None) for name in ("optimizer", "_optimizer")]
        below = next((one for one in held if hasattr(one, "param_groups")), None)
        if below is None or not hasattr(inner, "param_groups"):
            break
        if getattr(inner, "state", None) is not getattr(below, "state", None):
            break
        inner = below
    return inner if isinstance(inner, LambOptimizer) else optimizer


def ranks_of(optimizer: Any, group: dist.ProcessGroup | None) -> RankGroup:
    """Returns the ranks of a save or load: those of ``group``, else the optimizer's, else all. Collective.

    Raises:
        ValueError: the optimizer is sharded and there is no process group, or this rank is not in ``group``.
    """
    optimizer = bare_optimizer(optimizer)
    global_ranks: tuple[int, ...] | None = (
        optimizer.ranks if isinstance(optimizer, ShardedOptimizer) else None
    )
    initialized = dist.is_available() and dist.is_initialized()
    if global_ranks is not None and len(global_ranks) > 1 and not initialized:
        raise ValueError(
            f"the optimizer's state is sharded over ranks {list(global_ranks)}, and there is no process group: save "
            f"before destroy_process_group(), load after init_process_group()"
        )
    if group is not None:
        if not initialized or not isinstance(group, dist.ProcessGroup):
            raise ValueError("this rank is not in process_group: call save and load on its ranks only")
        global_ranks = tuple(sorted(dist.get_process_group_ranks(group)))
    return RankGroup.of(global_ranks)


def _attempt(work: Callable[[], Result]) -> tuple[tuple[Result] | None, Exception | None]:
    try:
        return (work(),), None
    except Exception as error:
        return None, picklable(error)


def unwrapped(error: CheckpointException) -> dict[int, Exception]:
    """Returns {rank: error} of an error of torch.distributed.checkpoint.

    A rank that raised no Exception was killed, which becomes a RuntimeError.
    """
    errors: dict[int, Exception] = {}
    for rank, (raised, _) in error.failures.items():
        errors[rank] = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
    return errors
