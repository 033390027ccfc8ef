"""Layers in LAMB's sense, which have norms and a trust ratio of their own: a parameter, or each ratio block of one.

A parameter of B ratio blocks is B equal parts along its first dimension. P parameters are L layers, in order::

    parameter   0: norm.weight   1: qkv.weight, "qkv": 3           2: fc.weight
    layer       0                1 (q)     2 (k)     3 (v)         4

Sums, norms, ratios and coefficients have one entry a layer; gradients, steps and state one a parameter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sharded_lamb.core.host_values import to_device
from sharded_lamb.core.hyperparams import integer
from sharded_lamb.core.layout import BLOCK, Segment, round_up
from sharded_lamb.core.names import matching, validate_patterns
from sharded_lamb.core.parameters import NamedParameter, shape_of

RatioBlocks = Mapping[str, int | Literal["dim0"]]
"""{pattern of names: number of blocks; "dim0": one per index of the first dimension}."""


def validate_ratio_blocks(value: Any) -> RatioBlocks:
    """``value`` as a dict of plain values; None: an empty one.

    Raises:
        ValueError: a number of blocks is neither an int >= 1 nor "dim0"; a pattern is not a regular expression.
        TypeError: not a mapping of strings.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f'ratio_blocks must map patterns to numbers, as in {{"qkv": 3}}, got {value!r}')
    expected = 'an int >= 1, or "dim0" for one block per index of the first dimension'
    counts = {
        pattern: count if count == "dim0" else integer(f"ratio_blocks[{pattern!r}]", count, 1, expected)
        for pattern, count in value.items()
    }
    return dict(zip(validate_patterns("ratio_blocks", [*counts]), counts.values(), strict=True))


def count_blocks(name: str, shape: Sequence[int], ratio_blocks: RatioBlocks) -> int:
    """The number of ratio blocks of a parameter; 1 where no pattern matches.

    Raises:
        ValueError: patterns with different numbers match; a number does not divide the first dimension, or there is
            none.
    """
    given = {pattern: ratio_blocks[pattern] for pattern in matching(ratio_blocks, name, len(shape))}
    if not given:
        return 1
    what = f"ratio_blocks={dict(sorted(given.items()))} for parameter {name!r} of shape {tuple(shape)}"
    if not shape:
        raise ValueError(f"{what}: it has no first dimension to divide. Write patterns that do not match it")
    counts = {max(shape[0], 1) if count == "dim0" else count for count in given.values()}
    if len(counts) > 1:
        raise ValueError(f"{what}: patterns disagree. Write patterns of which one matches it")
    (count,) = counts
    if shape[0] % count:
        raise ValueError(
            f"{what}: {count} does not divide its first dimension, {shape[0]}, into equal blocks. Give a divisor of "
            f"{shape[0]}, or a pattern that does not match it"
        )
    return count


def check_order(name: str, shape: Sequence[int], strides: Sequence[int], blocks: int) -> None:
    """Raises ValueError if blocks along the first dimension are not contiguous in memory without gaps.

    ``shape``: of the part that this rank holds.
    """
    numel: int = math.prod(map(int, shape))
    if blocks > 1 and numel and shape[0] > 1 and strides[0] * shape[0] != numel:
        raise ValueError(
            f"parameter {name!r} has {blocks} ratio blocks along its first dimension, which is not the outermost in "
            f"memory (shape {tuple(shape)}, strides {tuple(strides)}): make the parameter contiguous before the "
            f"optimizer is constructed, as in p.data = p.data.contiguous()"
        )


Sources = Sequence[int] | None
"""The index of the segment that each piece was cut from; None: no segment was cut."""

T = TypeVar("T")


def repeated(values: list[T], sources: Sources) -> list[T]:
    """[segments] → [pieces]: each piece has the value of its segment."""
    return values if sources is None else [values[source] for source in sources]


class Layers:
    """The layers of P parameters: those of parameter p are ``slice(p)``, equal parts in its memory order."""

    def __init__(self, counts: Sequence[int], numels: Sequence[int]) -> None:
        """``counts``, ``numels``: ratio blocks and elements of each parameter."""
        self.counts = tuple(counts)
        self._numels = [numel // count for numel, count in zip(numels, counts, strict=True)]  # of its layers
        self._first = [0, *accumulate(counts)]
        self._is_plain = len(self) == len(self.counts)
        self._param_of: dict[torch.device, Tensor] = {}

    @staticmethod
    def named(rows: Sequence[NamedParameter], ratio_blocks: RatioBlocks) -> "Layers":
        """Raises ValueError as `count_blocks`."""
        shapes = [(name, tuple(shape_of(p))) for name, p, _ in rows]
        counts = [count_blocks(name, shape, ratio_blocks) for name, shape in shapes]
        return Layers(counts, [math.prod(shape) for _, shape in shapes])

    def __len__(self) -> int:
        return self._first[-1]

    def slice(self, param: int) -> slice:
        """The layers of a parameter."""
        return slice(self._first[param], self._first[param + 1])

    def names(self, params: Sequence[str]) -> list[str]:
        """[L] ``name``, or ``name[i]`` of a block. ``params``: the parameters' names."""
        return [
            name if count == 1 else f"{name}[{i}]"
            for name, count in zip(params, self.counts, strict=True)
            for i in range(count)
        ]

    def numels(self) -> list[int]:
        """[L] the layers' elements."""
        return [numel for numel, count in zip(self._numels, self.counts, strict=True) for _ in range(count)]

    def cut(self, segments: Sequence[Segment]) -> tuple[Sequence[Segment], Sources]:
        """Cut segments of parameters where layers begin. Pieces have the layer as ``param``, and keep ``start``."""
        if self._is_plain:
            return segments, None
        pieces: list[Segment] = []
        sources: list[int] = []
        for source, segment in enumerate(segments):
            is_cut = self.counts[segment.param] > 1 and segment.length > 0
            own = self._cut(segment) if is_cut else [replace(segment, param=self._first[segment.param])]
            pieces += own
            sources += [source] * len(own)
        return pieces, None if sources == [*range(len(segments))] else sources

    def _cut(self, segment: Segment) -> list[Segment]:
        numel, end = self._numels[segment.param], segment.start + segment.length
        pieces, start = [], segment.start
        while start < end:
            block = start // numel
            # Up to the parameter's next block of 256, if inside one: then the pieces' blocks are the same over ranks.
            stop = min((block + 1) * numel, end, round_up(start + 1, BLOCK) if start % BLOCK else end)
            place = segment.shard_start + start - segment.start
            pieces.append(Segment(self._first[segment.param] + block, start, stop - start, place))
            start = stop
        return pieces

    def expand(self, values: Tensor) -> Tensor:
        """[P] → [L]: each layer has its parameter's value. A scalar stays one."""
        return values if self._is_plain or not values.ndim else values[self._index(values.device)]

    def total(self, values: Tensor, param: int) -> Tensor:
        """The sum of [L] ``values`` over a parameter's layers: a scalar."""
        return values[self._first[param]] if self.counts[param] == 1 else values[self.slice(param)].sum()

    def any_of(self, flags: Tensor) -> Tensor:
        """[L] bool → [P] bool: whether any layer of a parameter has the flag."""
        if self._is_plain:
            return flags
        counts = torch.zeros(len(self.counts), dtype=torch.float64, device=flags.device)
        return counts.index_add_(0, self._index(flags.device), flags.to(torch.float64)) > 0

    def _index(self, device: torch.device) -> Tensor:
        """[L] int64: the parameter of each layer."""
        if device not in self._param_of:
            params = [param for param, count in enumerate(self.counts) for _ in range(count)]
            self._param_of[device] = to_device(params, torch.int64, device)
        return self._param_of[device]
