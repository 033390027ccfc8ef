"""State tensors that torch.distributed.checkpoint sees as parts of their parameter, in the parameter's own shape.

A flat slice covers a few rectangles of the parameter, so a checkpoint records the elements it holds and any layout
can load them: another number of ranks, another stage, DTensors. Slice [5, 18) of a 5 x 4 parameter::

    . . . .
    . a a a        a  (1, 1) 1 x 3
    b b b b        b  (2, 0) 2 x 4
    b b b b
    c c . .        c  (4, 0) 1 x 2

Otherwise these behave as plain tensors: they have their local shape (except ``size()``, which the checkpoint compares),
and operations, pickle and deepcopy return plain tensors.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # a checkpoint that is saved or loaded has imported it
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a parameter; its elements are contiguous in the slice, from index ``at``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: int


def boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """The rectangles that elements [start, start + length) cover, row-major; at most 2 · ndim - 1 of them."""
    if length == 0:
        return []
    if not shape:
        return [Box((), (), 0)]
    row = math.prod(shape[1:])
    first, skipped = divmod(start, row)
    last, rest = divmod(start + length, row)
    if first == last:
        return _within(shape, first, skipped, length, 0)
    rectangles, at = [], 0
    if skipped:
        rectangles += _within(shape, first, skipped, row - skipped, 0)
        first, at = first + 1, row - skipped
    if last > first:
        rectangles.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), at))
        at += (last - first) * row
    return rectangles + _within(shape, last, 0, rest, at)


def _within(shape: Sequence[int], index: int, start: int, length: int, at: int) -> list[Box]:
    """`boxes` inside row ``index`` of the first axis."""
    return [
        replace(box, offsets=(index, *box.offsets), sizes=(1, *box.sizes), at=at + box.at)
        for box in boxes(shape[1:], start, length)
    ]


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a parameter that a slice covers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # dense: the slice runs in this memory order
    start: int

    def boxes(self, length: int) -> list[Box]:
        """The rectangles of a slice of ``length`` elements, in the parameter's axes."""
        order = self._memory_order()
        rectangles = boxes([self.shape[axis] for axis in order], self.start, length)
        inverse = [order.index(axis) for axis in range(len(order))]
        return [
            Box(tuple(box.offsets[i] for i in inverse), tuple(box.sizes[i] for i in inverse), box.at)
            for box in rectangles
        ]

    def view(self, flat: Tensor, box: Box) -> Tensor:
        """The elements of ``box`` in its shape, a view of the slice."""
        order = self._memory_order()
        run = flat[box.at : box.at + math.prod(box.sizes)].view([box.sizes[axis] for axis in order])
        return run.permute([order.index(axis) for axis in range(len(order))])

    def _memory_order(self) -> list[int]:
        """Axes by descending stride."""
        return sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])


class _CheckpointTensor(Tensor):
    """A plain tensor, except for the methods that torch.distributed.checkpoint calls."""

    # Results of operations are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone()


class SlicedState(_CheckpointTensor):
    """A flat slice of a state tensor, a view of the memory that steps update."""

    region: Region

    @staticmethod
    def of(flat: Tensor, region: Region) -> "SlicedState":
        sliced = flat.as_subclass(SlicedState)
        sliced.region = region
        return sliced

    def size(self, dim: int | None = None) -> Any:
        """The whole parameter's size, which the checkpoint compares; ``shape`` is the slice's."""
        whole = torch.Size(self.region.shape)
        return whole if dim is None else whole[dim]

    def to(self, *args: Any, **kwargs: Any) -> "SlicedState":
        return SlicedState.of(self.as_subclass(Tensor).to(*args, **kwargs), self.region)

    def new_empty(self, *args: Any, **kwargs: Any) -> "SlicedState":
        """A slice of the same region and length: torch's asynchronous stager copies with this and `set_`."""
        return SlicedState.of(self.as_subclass(Tensor).new_empty(self.shape, **kwargs), self.region)

    def set_(self, *args: Any, **kwargs: Any) -> "SlicedState":
        """Replace the memory; keep this slice's length and ignore the given size, which is the parameter's."""
        storage, offset = args[:2]
        Tensor.set_(self, storage, offset, self.shape, (1,))
        return self

    def _chunks(self) -> "list[ChunkStorageMetadata]":
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        rectangles = self.region.boxes(self.numel())
        if 0 in self.region.shape:  # without a chunk the checkpoint would lack the parameter
            rectangles = [Box((0,) * len(self.region.shape), self.region.shape, 0)]
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in rectangles]

    def __create_write_items__(self, fqn: str, object: Any) -> "list[WriteItem]":
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        plain = self.as_subclass(Tensor)
        properties = TensorProperties.create_from_tensor(plain)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(self.region.shape)),
            )
            for chunk in self._chunks()  # one replica writes a chunk that several offer
        ]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        return self._chunks()

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        plain = self.as_subclass(Tensor)
        for box in self.region.boxes(self.numel()):
            if torch.Size(box.offsets) == index.offset:
                return self.region.view(plain, box)
        return plain.new_empty(self.region.shape)  # the parameter has no elements


class Stamp(_CheckpointTensor):
    """Identifies the rank, layout and slice of a state. A checkpoint records them itself and stores a version only."""

    version: Tensor

    @staticmethod
    def of(numbers: Sequence[int]) -> "Stamp":
        stamp = torch.tensor(numbers, dtype=torch.int64, device="cpu").as_subclass(Stamp)
        stamp.version = torch.ones(1, dtype=torch.int64, device="cpu")
        return stamp

    def size(self, dim: int | None = None) -> Any:
        """The version's size."""
        return self.version.size() if dim is None else self.version.size(dim)

    def to(self, *args: Any, **kwargs: Any) -> "Stamp":
        return self

    def __create_write_items__(self, fqn: str, object: Any) -> "list[WriteItem]":
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        chunk = self.__create_chunk_list__()[0]
        properties = TensorProperties.create_from_tensor(self.version)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.TENSOR,
                tensor_data=TensorWriteData(chunk, properties, chunk.sizes),
            )
        ]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        return self.version


class Asked(NamedTuple):
    """What torch.distributed.checkpoint asks of an optimizer."""

    whole: bool  # whole tensors: ``full_state_dict=True``
    on_first: bool  # of the first rank alone: ``cpu_offload=True`` beside it


def asked_by_dcp() -> Asked | None:
    """What torch.distributed.checkpoint asks of the optimizer's method that calls this; None: another calls it."""
    frame, found = sys._getframe(1), False
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "torch.distributed.checkpoint.state_dict":
            info = frame.f_locals.get("info")
            return Asked(
                bool(getattr(info, "full_state_dict", False)), bool(getattr(info, "cpu_offload", False))
            )
        found = found or name.startswith("torch.distributed.checkpoint.")
        frame = frame.f_back  # type: ignore[assignment]
    return Asked(whole=False, on_first=False) if found else None
