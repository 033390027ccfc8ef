"""Speeds of a machine, and the time of a collective on it.

A collective over ``n`` ranks on ``k`` nodes, after the model by which NCCL chooses algorithms (src/graph/tuning.cc):

    large   ring   (n - k) a + (k - 1) b  +  bytes sent by a rank / bandwidth
    small   tree   2 ((n/k - 1) a + log2(k) b)  +  2 bytes / bandwidth

with a and b the latency of a hop inside and between nodes. A large all-reduce is two rings, or a tree if that is less.
Rings run through all ranks of a node at once: over several nodes their bandwidth is the smaller of a rank's inside a
node and of all the node's ranks together between nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path

from sharded_lamb.shapes import read_json


@dataclass(frozen=True, slots=True)
class Machine:
    """One rank's speeds, each > 0 (latencies >= 0).

    Raises:
        ValueError: a field is out of range.
    """

    update_bytes_per_second: float  # of memory, in the two passes
    intra_bytes_per_second: float  # sent to ranks of the same node
    inter_bytes_per_second: float  # sent to other nodes
    intra_latency: float  # seconds a hop
    inter_latency: float
    ranks_per_node: int

    def __post_init__(self) -> None:
        for name in ("update_bytes_per_second", "intra_bytes_per_second", "inter_bytes_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("intra_latency", "inter_latency"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0 seconds, got {getattr(self, name)!r}")
        if self.ranks_per_node < 1:
            raise ValueError(f"--ranks-per-node must be >= 1, got {self.ranks_per_node}")


# Memory: what both passes reached over BERT-large, 0.86 to 0.88 of the data sheet (gpu_check/results, "bandwidth", and
# bench/results/gpu-tiles.json); the A100's, which was not measured, 0.86 of its own. NVLink: the data sheets' total,
# halved (one direction). Network: one adapter a GPU. Latencies: NCCL's own (src/graph/tuning.cc, LL128 rings): 1.9 us a
# hop over NVLink, 4.0 us over the network.
PRESETS = {
    # NVIDIA H100 SXM data sheet: HBM3 3.35 TB/s, NVLink 900 GB/s; DGX H100: a ConnectX-7 of 400 Gb/s a GPU.
    "h100-nvlink-ib": Machine(2.94e12, 450e9, 50e9, 1.9e-6, 4.0e-6, 8),
    # NVIDIA H200 SXM data sheet: HBM3e 4.8 TB/s, NVLink 900 GB/s; DGX H200: as DGX H100.
    "h200-nvlink-ib": Machine(4.11e12, 450e9, 50e9, 1.9e-6, 4.0e-6, 8),
    # NVIDIA A100 80GB SXM data sheet: HBM2e 2,039 GB/s, NVLink 600 GB/s; DGX A100: a ConnectX-6 of 200 Gb/s a GPU.
    "a100-nvlink-ib": Machine(0.86 * 2.039e12, 300e9, 25e9, 1.9e-6, 4.0e-6, 8),
}

CALIBRATED = ("kernel_bytes_per_second", "wire_bytes_per_second", "latency_seconds")
"""Top-level keys of the JSON of `sharded-lamb bench kernels` (the first) and `bench comm`."""


def calibrated(machine: Machine, paths: Sequence[str]) -> Machine:
    """``machine`` with the measurements of the JSON files; wire speed and latency apply to both levels.

    If two files have the same key, the later one counts.

    Raises:
        ValueError: a file cannot be read, has none of `CALIBRATED`, or one of them is not a number > 0.
    """
    read: dict[str, float] = {}
    for path in paths:
        read |= _read(path)
    wire, latency = read.get("wire_bytes_per_second"), read.get("latency_seconds")
    return replace(
        machine,
        update_bytes_per_second=read.get("kernel_bytes_per_second", machine.update_bytes_per_second),
        intra_bytes_per_second=wire or machine.intra_bytes_per_second,
        inter_bytes_per_second=wire or machine.inter_bytes_per_second,
        intra_latency=latency or machine.intra_latency,
        inter_latency=latency or machine.inter_latency,
    )


def _read(path: str) -> dict[str, float]:
    try:
        content = read_json(Path(path))
    except OSError as error:
        raise ValueError(
            f"--calibrate {path}: {error.strerror}; write it with sharded-lamb bench kernels or comm, and --json"
        ) from None
    read = {key: content[key] for key in CALIBRATED if key in content} if isinstance(content, dict) else {}
    if not read:
        raise ValueError(
            f"--calibrate {path} has none of {', '.join(CALIBRATED)}: write it with sharded-lamb bench kernels or comm"
        )
    for key, value in read.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"--calibrate {path}: {key} must be a number > 0, got {value!r}")
    return read


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of a collective, ``members`` of them on each of ``nodes`` nodes."""

    ranks: int
    members: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.members)

    @staticmethod
    def of(machine: Machine, ranks: int, stride: int = 1) -> "Group":
        """Every ``stride``-th of consecutive ranks, while the others run the same collective in groups of their own."""
        return Group(ranks, max(1, min(ranks, machine.ranks_per_node // stride)))

    def bandwidth(self, machine: Machine) -> float:
        """Bytes a second that a rank sends in a ring."""
        if self.nodes == 1:
            return machine.intra_bytes_per_second
        return min(machine.intra_bytes_per_second, self.members * machine.inter_bytes_per_second)

    def ring_seconds(self, machine: Machine, sends: Sequence[int]) -> list[float]:
        """Seconds of each all-gather or reduce-scatter in which a rank sends ``sends`` bytes."""
        if self.ranks == 1:
            return [0.0] * len(sends)
        latency = (self.ranks - self.nodes) * machine.intra_latency + (self.nodes - 1) * machine.inter_latency
        return [latency + sent / self.bandwidth(machine) for sent in sends]

    def all_reduce_seconds(self, machine: Machine, sizes: Sequence[int]) -> list[float]:
        """Seconds of each all-reduce of ``sizes`` bytes: a reduce-scatter and an all-gather, or a tree if faster."""
        parts = self.ring_seconds(machine, [ceil(size * (self.ranks - 1) / self.ranks) for size in sizes])
        trees = self.small_seconds(machine, sizes)
        return [min(2 * ring, tree) for ring, tree in zip(parts, trees, strict=True)]

    def small_seconds(self, machine: Machine, sizes: Sequence[int]) -> list[float]:
        """Seconds of each small all-reduce of ``sizes`` bytes."""
        if self.ranks == 1:
            return [0.0] * len(sizes)
        latency = 2 * (
            (self.members - 1) * machine.intra_latency + ceil(log2(self.nodes)) * machine.inter_latency
        )
        return [latency + 2 * size / self.bandwidth(machine) for size in sizes]
