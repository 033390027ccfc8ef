"""What one call of ``step()`` updates: some of DeepSpeed's tensors, their state, their parameters' options."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.buckets import flattened, memory_strides
from sharded_lamb.deepspeed.mapping import Partition
from sharded_lamb.facts import SkipCounter
from sharded_lamb.kernels import PieceShard
from sharded_lamb.layout import Segment
from sharded_lamb.options import OptionTable

MOMENTS = ("exp_avg", "exp_avg_sq")
State = MutableMapping[Tensor, dict[str, Any]]


def segment_of(flat: Tensor, segment: Segment) -> Tensor:
    """The segment of a flattened tensor."""
    return flat[segment.shard_start : segment.shard_start + segment.length]


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
                    dtype = torch.promote_types(tensor.dtype, torch.float32)
                    own[key] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
                check_moment(key, own[key], tensor)
            step = own.get("step")
            if step is None or step is not self._steps.get(tensor):
                replaced = replaced or step is not None
                count = 0.0 if step is None else float(torch.as_tensor(step).reshape(-1)[0])
                own["step"] = torch.full((), count, dtype=torch.float64, device=tensor.device)
                self._steps[tensor] = own["step"]
        return replaced

    def load(self, tensor: Tensor, saved: Mapping[str, Any]) -> None:
        """Copy a saved state into the tensor's own; every tensor keeps its dtype."""
        self.ensure([tensor])
        for key in MOMENTS:
            check_moment(key, saved[key], tensor)
            self.state[tensor][key].copy_(saved[key])
        self.state[tensor]["step"].fill_(float(torch.as_tensor(saved["step"]).reshape(-1)[0]))


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

    ``params``: the optimizer's parameters that lie in them on any rank; a "row" is a place in it.
    """

    def __init__(self, partitions: Sequence[Partition], table: OptionTable, skips: SkipCounter) -> None:
        self.partitions, self.table, self.skips = tuple(partitions), table, skips
        self.params = params_of(partitions)
        self.device = partitions[0].tensor.device
        row = {param: row for row, param in enumerate(self.params)}
        self._rows_of = [[row[param] for param in partition.params] for partition in partitions]
        owner = {r: i for i, rows in enumerate(self._rows_of) for r in rows}
        self._owner = torch.tensor([owner[r] for r in range(len(row))], device=self.device)
        self._pieces = [
            (i, s, row[s.param]) for i, p in enumerate(partitions) for s in p.segments if s.length
        ]
        self._where: list[int] = []
        self._shards: list[tuple[PieceShard, list[tuple[int, Segment]]]] = []

    def shards(self, state: State) -> list[PieceShard]:
        """This rank's memory with the gradients of now; none where the rank holds padding only."""
        where = [x.data_ptr() for p in self.partitions for x in _memory(p.tensor, state)]
        if where != self._where:  # new, or DeepSpeed moved it: offload_states, a universal checkpoint
            self._where, self._shards = where, self._view(state)
        grads = [_flat_gradient(p.tensor) for p in self.partitions]
        return [
            replace(shard, grad=[segment_of(grads[i], segment) for i, segment in pieces])
            for shard, pieces in self._shards
        ]

    def _view(self, state: State) -> list[tuple[PieceShard, list[tuple[int, Segment]]]]:
        """One shard for each combination of dtypes."""
        flat = [
            [flattened(x, memory_strides(p.tensor)) for x in _memory(p.tensor, state)]
            for p in self.partitions
        ]
        by_dtype: dict[Any, list[tuple[int, Segment, int]]] = {}
        for i, segment, row in self._pieces:
            by_dtype.setdefault(tuple(x.dtype for x in flat[i]), []).append((i, segment, row))
        found = []
        for pieces in by_dtype.values():
            columns = [[segment_of(flat[i][kind], segment) for i, segment, _ in pieces] for kind in range(3)]
            shard = PieceShard(tuple(row for _, _, row in pieces), columns[0], (), columns[1], columns[2])
            found.append((shard, [(i, segment) for i, segment, _ in pieces]))
        return found

    def present(self) -> list[bool]:
        """[rows] whether a parameter has a gradient; in a flat partition all have one."""
        given = [False] * len(self.params)
        for partition, rows in zip(self.partitions, self._rows_of, strict=True):
            for row in rows:
                given[row] = partition.tensor.grad is not None
        return given

    def steps(self, state: State) -> Tensor:
        """[rows] fp64 step counts."""
        return torch.stack([state[p.tensor]["step"] for p in self.partitions])[self._owner]

    def write_steps(self, steps: Tensor, state: State) -> None:
        counts = [state[p.tensor]["step"] for p in self.partitions]
        firsts = torch.tensor([rows[0] for rows in self._rows_of], device=self.device)
        torch._foreach_copy_(counts, list(steps[firsts].unbind()))


def params_of(partitions: Sequence[Partition]) -> tuple[int, ...]:
    return tuple(sorted({param for partition in partitions for param in partition.params}))


def _memory(tensor: Tensor, state: State) -> list[Tensor]:
    return [tensor.detach(), *(state[tensor][key] for key in MOMENTS)]


def _flat_gradient(tensor: Tensor) -> Tensor:
    """Zeros where there is none: that parameter's coefficients are 0."""
    if tensor.grad is None:
        return torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return flattened(tensor.grad, memory_strides(tensor))
