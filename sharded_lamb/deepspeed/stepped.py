"""What one call of ``step()`` updates: some of DeepSpeed's tensors, their state, their parameters' options."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.options import OptionTable
from sharded_lamb.deepspeed.mapping import Partition
from sharded_lamb.kernels import ScatteredShard
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.sharding.buckets import flattened, memory_strides

MOMENTS = ("exp_avg", "exp_avg_sq")
State = MutableMapping[Tensor, dict[str, Any]]


class StateKeeper:
    """The state of every stepped tensor: exactly the keys that DeepSpeed's checkpoints know.

    ``exp_avg`` and ``exp_avg_sq`` have the tensor's shape (fp32; fp64 for float64), ``step`` is an fp64 scalar.
    DeepSpeed puts tensors of its own there when it loads a universal checkpoint, and one step count into several
    states; they are taken on.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._steps: dict[Tensor, Tensor] = {}  # step counts made here, each of one tensor only

    def ensure(self, tensors: Sequence[Tensor]) -> bool:
        """Make what is missing. Returns whether DeepSpeed had put state there.

        Raises:
            ValueError: moments of another size.
        """
        replaced = False
        for tensor in tensors:
            own = self.state[tensor]
            for key in MOMENTS:
                if key not in own:
                    own[key] = _zeros_like(tensor)
                check_moment(key, own[key], tensor)
                if own[key].stride() != tensor.stride():  # the model went to another memory format
                    own[key] = _zeros_like(tensor).copy_(own[key])
            step = own.get("step")
            if step is None or step is not self._steps.get(tensor):
                replaced = replaced or step is not None
                count = 0.0 if step is None else float(torch.as_tensor(step).reshape(-1)[0])
                own["step"] = torch.full((), count, dtype=torch.float64, device=tensor.device)
                self._steps[tensor] = own["step"]
        return replaced

    def load(self, tensor: Tensor, saved: Mapping[str, Any] | None) -> None:
        """Copy a saved state into the tensor's own, which keeps its dtypes. Nothing saved: as before the first step."""
        self.ensure([tensor])
        if not saved:
            for value in self.state[tensor].values():
                value.zero_()
            return
        for key in MOMENTS:
            check_moment(key, saved[key], tensor)
            self.state[tensor][key].copy_(saved[key])
        self.state[tensor]["step"].fill_(float(torch.as_tensor(saved["step"]).reshape(-1)[0]))


def _zeros_like(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def check_moment(key: str, moment: Tensor, tensor: Tensor) -> None:
    """Raises ValueError for moments that are not this partition's."""
    if moment.shape != tensor.shape:
        raise ValueError(
            f"{key} of shape {tuple(moment.shape)} does not fit a partition of shape {tuple(tensor.shape)}: the "
            f"checkpoint is of another model or another number of ranks; DeepSpeed's universal checkpoint "
            f"(ds_to_universal) changes the number of ranks"
        )


class Stepped:
    """The partitions that one call of ``step()`` updates together, and what stays the same from call to call.

    ``params``: the optimizer's parameters that lie in them on any rank; a "row" is a place in it. No memory is held
    between calls: DeepSpeed may move its buffers, or want them freed (offload_states).
    """

    def __init__(self, partitions: Sequence[Partition], table: OptionTable, skips: SkipCounter) -> None:
        self.partitions, self.table, self.skips = tuple(partitions), table, skips
        self.params = params_of(partitions)
        self.device = partitions[0].tensor.device
        row = {param: row for row, param in enumerate(self.params)}
        self._rows_of = [[row[param] for param in partition.params] for partition in partitions]
        owner = {r: i for i, rows in enumerate(self._rows_of) for r in rows}
        self._owner = torch.tensor([owner[r] for r in range(len(row))], device=self.device)
        self._cuts = [_Cuts.of(partition, row) for partition in partitions]

    def shards(self, state: State) -> list[ScatteredShard]:
        """This rank's memory, one shard for each combination of dtypes; none where it holds padding only."""
        by_dtype: dict[tuple[torch.dtype, ...], tuple[list[int], list[list[Tensor]]]] = {}
        for partition, cuts in zip(self.partitions, self._cuts, strict=True):
            if cuts.rows:
                memory = _memory(partition.tensor, state)
                rows, columns = by_dtype.setdefault(tuple(x.dtype for x in memory), ([], [[], [], [], []]))
                rows += cuts.rows
                for column, flat in zip(columns, memory, strict=True):
                    column += torch.split(flat, cuts.sizes)[1::2]
        return [ScatteredShard(tuple(rows), *columns) for rows, columns in by_dtype.values()]

    def present(self) -> list[bool]:
        """[rows] whether a parameter has a gradient; in a flat partition all have one, if only of zeros."""
        given = [False] * len(self.params)
        for partition, rows in zip(self.partitions, self._rows_of, strict=True):
            for row in rows:
                given[row] = partition.tensor.grad is not None
        return given

    def next_steps(self, moved: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """([rows], [partitions]) fp64 step counts: a partition counts a step in which any of its parameters moves."""
        advanced = torch.zeros(len(self.partitions), dtype=torch.float64, device=self.device)
        advanced.index_add_(0, self._owner, moved.to(torch.float64))
        steps = torch.stack([state[p.tensor]["step"] for p in self.partitions]) + (advanced > 0)
        return steps[self._owner], steps

    def write_steps(self, steps: Tensor, state: State) -> None:
        """``steps``: [partitions]."""
        torch._foreach_copy_([state[p.tensor]["step"] for p in self.partitions], list(steps.unbind()))


@dataclass(frozen=True, slots=True)
class _Cuts:
    """A flattened partition as what lies between segments and segments, in turns; the rows of the segments."""

    sizes: list[int]
    rows: list[int]

    @staticmethod
    def of(partition: Partition, row: Mapping[int, int]) -> "_Cuts":
        sizes, rows, at = [], [], 0
        for segment in sorted(partition.segments, key=lambda segment: segment.shard_start):
            if segment.length:
                sizes += [segment.shard_start - at, segment.length]
                rows.append(row[segment.param])
                at = segment.shard_start + segment.length
        return _Cuts([*sizes, partition.tensor.numel() - at], rows)


def params_of(partitions: Sequence[Partition]) -> tuple[int, ...]:
    return tuple(sorted({param for partition in partitions for param in partition.params}))


def _memory(tensor: Tensor, state: State) -> list[Tensor]:
    """Weight, gradient (0 where there is none: that parameter's coefficients are 0) and moments, flattened."""
    own, strides = state[tensor], memory_strides(tensor)
    grad = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
    return [flattened(x, strides) for x in (tensor.detach(), grad, own["exp_avg"], own["exp_avg_sq"])]
