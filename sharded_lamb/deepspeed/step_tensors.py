"""The tensors that one call of ``step()`` updates, their state, and the options of their parameters."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.layers import Layers, check_order
from sharded_lamb.core.options import OptionTable
from sharded_lamb.deepspeed.mapping import Partition
from sharded_lamb.kernels import ScatteredShard
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.sharding.buckets import flattened, memory_strides

State = MutableMapping[Tensor, dict[str, Any]]


class StateKeeper:
    """The state of every stepped tensor, with exactly the keys of DeepSpeed's checkpoints.

    The ``moments`` have the tensor's shape (fp32; fp64 for float64), ``step`` is an fp64 scalar. When
    DeepSpeed loads a universal checkpoint, it replaces these tensors, and shares one step count between several states;
    `ensure` accepts them.
    """

    def __init__(self, state: State, moments: Sequence[str]) -> None:
        self.state, self.moments = state, moments
        self._steps: dict[Tensor, Tensor] = {}  # step counts created here, one per tensor

    def ensure(self, tensors: Sequence[Tensor]) -> bool:
        """Create missing state. Returns whether DeepSpeed has replaced any.

        Raises:
            ValueError: moments of another shape.
        """
        replaced = False
        for tensor in tensors:
            own = self.state[tensor]
            for key in self.moments:
                if key not in own:
                    own[key] = _zeros_like(tensor)
                check_moment(key, own[key], tensor)
                if own[key].stride() != tensor.stride():  # the model changed its memory format
                    own[key] = _zeros_like(tensor).copy_(own[key])
            step = own.get("step")
            if step is None or step is not self._steps.get(tensor):
                replaced = replaced or step is not None
                count = 0.0 if step is None else float(as_tensor(step).reshape(-1)[0])
                own["step"] = torch.full((), count, dtype=torch.float64, device=tensor.device)
                self._steps[tensor] = own["step"]
        return replaced

    def load(self, tensor: Tensor, saved: Mapping[str, Any] | None) -> None:
        """Copy a saved state into the tensor's state, keeping its dtypes. None: reset it to zeros."""
        self.ensure([tensor])
        if not saved:
            for value in self.state[tensor].values():
                value.zero_()
            return
        for key in self.moments:
            check_moment(key, saved[key], tensor)
            self.state[tensor][key].copy_(saved[key])
        self.state[tensor]["step"].fill_(float(as_tensor(saved["step"]).reshape(-1)[0]))


def _zeros_like(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def check_moment(key: str, moment: Tensor, tensor: Tensor) -> None:
    """Raises ValueError unless ``moment`` has the shape of its partition."""
    if moment.shape != tensor.shape:
        raise ValueError(
            f"{key} of shape {tuple(moment.shape)} does not fit a partition of shape {tuple(tensor.shape)}: the "
            f"checkpoint is of another model or another number of ranks; DeepSpeed's universal checkpoint "
            f"(ds_to_universal) changes the number of ranks"
        )


class StepTensors:
    """The partitions that one call of ``step()`` updates together, and their constant bookkeeping.

    ``params``: the optimizer's parameters with a segment in them on any rank, which ``table`` describes; a "row" is an
    index into it. Keeps no memory between calls: DeepSpeed may move its buffers, or free them (offload_states).
    """

    def __init__(
        self,
        partitions: Sequence[Partition],
        table: OptionTable,
        skips: SkipCounter,
        moments: Sequence[str],
    ) -> None:
        self._moments = moments
        self.partitions, self.table, self.skips = tuple(partitions), table, skips
        self.params = params_of(partitions)
        self.device = partitions[0].tensor.device
        row = {param: row for row, param in enumerate(self.params)}
        self._rows_of = [[row[param] for param in partition.params] for partition in partitions]
        owner = {r: i for i, rows in enumerate(self._rows_of) for r in rows}
        owners = torch.tensor([owner[r] for r in range(len(row))], device=self.device)
        self._owner = table.layers.expand(owners)  # [L] the partition of each layer
        self._splits = [_Splits.of(partition, row, table.layers) for partition in partitions]

    def shards(self, state: State) -> list[ScatteredShard]:
        """This rank's memory, one shard per combination of dtypes; none for a partition of padding only."""
        by_dtype: dict[tuple[torch.dtype, ...], tuple[list[int], list[list[Tensor]]]] = {}
        for partition, splits in zip(self.partitions, self._splits, strict=True):
            if splits.layers:
                if len(splits.layers) > 1 and partition.tensor.dim() > 1:
                    self._check_order(partition)
                memory = _memory(partition.tensor, state, self._moments)
                layers, columns = by_dtype.setdefault(
                    tuple(x.dtype for x in memory), ([], [[] for _ in memory])
                )
                layers += splits.layers
                for column, flat in zip(columns, memory, strict=True):
                    column += torch.split(flat, splits.sizes)[1::2]
        return [
            ScatteredShard(tuple(layers), w, g, m, second[0] if second else None)
            for layers, (w, g, m, *second) in by_dtype.values()
        ]

    def _check_order(self, partition: Partition) -> None:
        """Raises ValueError if ratio blocks of a parameter that DeepSpeed steps whole are not contiguous in memory."""
        tensor, row = partition.tensor, self.params.index(partition.params[0])
        blocks = self.table.layers.counts[row]
        check_order(self.table.rows[row][0], tensor.shape, memory_strides(tensor), blocks)

    def present(self) -> list[bool]:
        """[rows] whether a parameter has a gradient; in a flat partition all have one, possibly zeros."""
        present = [False] * len(self.params)
        for partition, rows in zip(self.partitions, self._rows_of, strict=True):
            for row in rows:
                present[row] = partition.tensor.grad is not None
        return present

    def next_steps(self, updated: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """([L], [partitions]) fp64 step counts: a partition counts a step that updates any of its parameters.

        ``updated``: [L] bool.
        """
        advanced = torch.zeros(len(self.partitions), dtype=torch.float64, device=self.device)
        advanced.index_add_(0, self._owner, updated.to(torch.float64))
        steps = torch.stack([state[p.tensor]["step"] for p in self.partitions]) + (advanced > 0)
        return steps[self._owner], steps

    def write_steps(self, steps: Tensor, state: State) -> None:
        """Store ``steps`` [partitions] in the state."""
        torch._foreach_copy_([state[p.tensor]["step"] for p in self.partitions], list(steps.unbind()))


@dataclass(frozen=True, slots=True)
class _Splits:
    """Sizes that split a flattened partition into alternating gaps and segments of layers, and these layers."""

    sizes: list[int]
    layers: list[int]

    @staticmethod
    def of(partition: Partition, row: Mapping[int, int], layers: Layers) -> "_Splits":
        sizes, found, end = [], [], 0
        in_order = sorted(partition.segments, key=lambda segment: segment.shard_start)
        segments, _ = layers.cut([replace(segment, param=row[segment.param]) for segment in in_order])
        for segment in segments:
            if segment.length:
                sizes += [segment.shard_start - end, segment.length]
                found.append(segment.param)
                end = segment.shard_start + segment.length
        return _Splits([*sizes, partition.tensor.numel() - end], found)


def params_of(partitions: Sequence[Partition]) -> tuple[int, ...]:
    """All parameters with a segment in ``partitions`` on any rank, ascending."""
    return tuple(sorted({param for partition in partitions for param in partition.params}))


def _memory(tensor: Tensor, state: State, moments: Sequence[str]) -> list[Tensor]:
    """Weight, gradient (zeros if missing: that parameter's coefficients are 0) and moments, flattened."""
    own, strides = state[tensor], memory_strides(tensor)
    grad = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
    return [flattened(x, strides) for x in (tensor.detach(), grad, *(own[key] for key in moments))]
