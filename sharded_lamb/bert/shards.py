"""Packed samples on disk: fixed-length rows of piece ids in memory-mapped files, described by a manifest.

::

    FOLDER/manifest.json     written last: a folder without it is not ready
           unigram.npy       [vocabulary] int64: count of each piece in the training rows
           tokenizer/        the tokenizer of the rows, a Hugging Face folder
           train-00000.bin   rows of one unit of work, [samples, sequence_length] uint16 or uint32, no header
           heldout-00000.bin
           units/00000.json  one finished unit, which a restarted `prepare` skips
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Manifest:
    """The format of the rows, and everything that determined them."""

    version: int
    sequence_length: int
    nsp: bool
    packed: bool
    vocab_size: int
    dtype: str  # uint16 or uint32
    tokenizer_sha256: str
    sources: tuple[str, ...]
    documents: int
    dropped_documents: int  # null, or too short to make a sample
    train: tuple[tuple[str, int], ...]  # (file name, samples)
    heldout: tuple[tuple[str, int], ...]
    train_tokens: int  # special pieces included, padding not
    unigram_entropy: float  # nats, over the ordinary pieces of the training rows
    rows_sha256: str = ""  # of the shards, in order; "" in folders of earlier versions

    def __post_init__(self) -> None:
        if self.version != FORMAT_VERSION:
            raise ValueError(
                f"version={self.version}: this program reads version {FORMAT_VERSION}; prepare again"
            )

    def samples(self, split: Split) -> int:
        return sum(count for _, count in getattr(self, split))

    @property
    def fill(self) -> float:
        """Share of tokens in the training rows, the rest is padding."""
        return self.train_tokens / max(1, self.samples("train") * self.sequence_length)

    def digest(self) -> str:
        """Hash of what a run trains on: the rows, wherever the corpus was and whenever it was modified."""
        fields = asdict(self)
        del fields["sources" if self.rows_sha256 else "rows_sha256"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> Manifest:
    """Raises: ValueError if the folder is not (fully) prepared, or a shard is missing or truncated."""
    path = folder / "manifest.json"
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no manifest, the shards are incomplete; run `prepare` (again)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken ({error}); remove the folder and run `prepare` again") from None
    for split in ("train", "heldout"):
        plain[split] = tuple((name, count) for name, count in plain[split])
    plain["sources"] = tuple(plain["sources"])
    manifest = Manifest(**plain)
    row = manifest.sequence_length * np.dtype(manifest.dtype).itemsize
    for name, count in (*manifest.train, *manifest.heldout):
        size = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if size != row * count:
            state = "missing" if size < 0 else f"{size} bytes long"
            raise ValueError(
                f"{folder / name}: expected {row * count} bytes, but it is {state}; run `prepare` again"
            )
    return manifest


def write_atomically(path: Path, content: bytes) -> None:
    """Writes all of the file or none of it, also in a power cut, and if several processes write the same file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class PackedSamples:
    """Rows of one split by sample number, mapped into memory on first use."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.split = split
        self._shards: Sequence[tuple[str, int]] = getattr(self.manifest, split)
        self._ends = np.cumsum([count for _, count in self._shards], dtype=np.int64)
        self._maps: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] sample numbers -> [n, sequence_length] piece ids."""
        out = np.empty((len(numbers), self.manifest.sequence_length), np.int64)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shards):
            selected = shards == shard
            begin = self._ends[shard] - self._shards[shard][1]
            out[selected] = self._map(int(shard))[numbers[selected] - begin]
        return out

    def _map(self, shard: int) -> NDArray[Any]:
        if shard not in self._maps:
            name, count = self._shards[shard]
            shape = (count, self.manifest.sequence_length)
            self._maps[shard] = np.memmap(self.folder / name, self.manifest.dtype, "r", shape=shape)
        return self._maps[shard]


def entropy(counts: NDArray[np.int64]) -> float:
    """Unigram entropy in nats: the loss of a model that knows the frequencies only."""
    present = counts[counts > 0].astype(np.float64)
    if not len(present):
        return 0.0
    share = present / present.sum()
    return float(-(share * np.log(share)).sum())
