"""A program as data: a model, optimizers, and operations that every rank executes in order.

Losses are linear in the parameters, so that every gradient is known before the run. Gradients and weights are drawn
by name: an element's sign is the same on all ranks and in all operations, and magnitudes lie in [0.5, 1.5), so that no
sum cancels and rounding stays small. Every drawn number is exact in bfloat16.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray

HOWS = {
    "averaged": "stage 1, gradients averaged by hand",
    "ddp": "stage 1 under DistributedDataParallel",
    "stage2": "stage 2",
    "sharded": "every layer under fully_shard",
    "mixed1": "odd layers under fully_shard, the others in stage 1, averaged by hand",
    "mixed2": "odd layers under fully_shard, the others in stage 2",
}
WITH_DTENSORS = ("sharded", "mixed1", "mixed2")
REDUCED_HERE = ("stage2", "mixed2")  # plain gradients
AVERAGED_BY_HAND = ("averaged", "mixed1")


@dataclass(frozen=True)
class Slot:
    """One attribute of a layer; ``name`` is another layer's where the parameter is tied."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    transposed: bool = False


@dataclass(frozen=True)
class Group:
    layers: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """``kind`` names a method of `replay.Replay` and of `runner.Run`, which take ``args``."""

    kind: str
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{key}={value!r}' for key, value in self.args.items())})"


@dataclass(frozen=True)
class Phase:
    """The operations of one process group. Every phase but the first resumes from the one before, in a new model."""

    world: int
    how: str
    optimizers: tuple[tuple[Group, ...], ...]
    frozen: tuple[int, ...]  # layers that do not require gradients at the start
    ops: tuple[Op, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # keywords of ShardedLamb alone; dtypes by name


@dataclass(frozen=True)
class Program:
    seed: int
    layers: tuple[tuple[Slot, ...], ...]
    options: dict[str, Any]  # of the rule
    settings: dict[str, Any]  # keywords of ShardedLamb alone, in all phases
    wrapper: str  # "", "accelerate", "inherits", "copies"
    overlap_forward: bool
    phases: tuple[Phase, ...]
    follows: bool = (
        False  # some state or message is rounded: the oracle continues from what the run has stored
    )
    same: bool = False  # all ranks have the first one's gradients

    @property
    def operations(self) -> int:
        return sum(len(phase.ops) for phase in self.phases)

    def slots(self) -> dict[str, Slot]:
        """{name: slot}, each parameter once."""
        return {slot.name: slot for layer in reversed(self.layers) for slot in reversed(layer)}

    def names_of(self, layers: Any) -> list[str]:
        """The parameters that belong to ``layers``; a tied one belongs to the first layer that has it."""
        return [s.name for i in layers for s in self.layers[i] if s.name.startswith(f"layers.{i}.")]

    def is_dtensor(self, how: str, name: str) -> bool:
        return how == "sharded" or (how in WITH_DTENSORS and int(name.split(".")[1]) % 2 == 1)

    def source_of(self, rank: int) -> int:
        """The rank by which gradients are drawn."""
        return 0 if self.same else rank

    def blocks(self) -> dict[str, int]:
        """The number of ratio blocks of the parameters that have several."""
        ratio_blocks = self.options.get("ratio_blocks") or {}
        counts = {
            name: slot.shape[0] if count == "dim0" else count
            for name, slot in self.slots().items()
            for pattern, count in ratio_blocks.items()
            if re.search(pattern, name)
        }
        return {name: count for name, count in counts.items() if count > 1}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.options} {self.settings}"]
        lines += [f"  wrapper {self.wrapper!r}, overlap_forward={self.overlap_forward}, same={self.same}"]
        for i, layer in enumerate(self.layers):
            shown = [
                f"{s.name} {s.dtype} {list(s.shape)}{' transposed' if s.transposed else ''}" for s in layer
            ]
            lines.append(f"  layer {i}: " + "; ".join(shown))
        for phase in self.phases:
            lines.append(
                f"  {phase.how} on {phase.world} ranks, frozen {list(phase.frozen)} {phase.settings}"
            )
            lines += [
                f"    optimizer: {[(list(g.layers), g.options) for g in groups]}"
                for groups in phase.optimizers
            ]
            lines += [f"    {index:2} {op}" for index, op in enumerate(phase.ops)]
        return "\n".join(lines)


def _generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


@lru_cache(maxsize=4096)
def _signs(shape: tuple[int, ...], *key: object) -> Array:
    return np.asarray(_generator(*key).integers(0, 2, shape) * 2.0 - 1)


@lru_cache(maxsize=256)
def _pool(shape: tuple[int, ...], name: str) -> Array:
    """Magnitudes of which draws take slices: much faster than a generator for each."""
    size = int(np.prod(shape))
    return 0.5 + _generator("magnitudes", name).integers(0, 64, size + 4096) / 64


def _magnitudes(shape: tuple[int, ...], kind: str, name: str, *key: object) -> Array:
    size = int(np.prod(shape))
    start = zlib.crc32(repr((kind, name, key)).encode()) % 4096
    return _pool(shape, name)[start : start + size].reshape(shape)


def weight(slot: Slot) -> Array:
    """float64; random signs."""
    signs = _signs(slot.shape, "weight", slot.name)
    return np.asarray(signs * _magnitudes(slot.shape, "weight", slot.name) / 4)


def gradient(slot: Slot, layer: int, rank: int, key: int) -> Array:
    """float64: a parameter's gradient from its use in ``layer``, in the backward that ``key`` numbers."""
    signs = _signs(slot.shape, "gradient", slot.name)
    return np.asarray(signs * _magnitudes(slot.shape, "gradient", slot.name, layer, rank, key))
