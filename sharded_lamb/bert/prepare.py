"""Sources → shards: tokenizes and packs once, in parallel over units of rows, restartable and repeatable."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.corpus import BUILTIN, DocumentFile, check_files, count_documents, find_files
from sharded_lamb.bert.packing import Packer
from sharded_lamb.bert.shards import FORMAT_VERSION, Manifest, Split, entropy, read_manifest, write_atomically
from sharded_lamb.bert.tokenizer import (
    encode,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    train_tokenizer,
    vocabulary_of,
)
from sharded_lamb.recipes.training.stateless_rng import key_of, uniform

_CHUNK = 512  # documents tokenized at once
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one file: one task of a worker."""

    number: int
    file: DocumentFile
    start: int
    stop: int
    first_document: int  # number of its first document in the whole corpus


@dataclass(frozen=True)
class PrepareJob:
    """The settings that all units of one prepared folder share."""

    folder: str
    tokenizer: str
    sequence_length: int
    nsp: bool
    pack: bool
    heldout_fraction: float


def prepare(config: RunConfig, sequence_length: int, report: Callable[[str], None] = print) -> Path:
    """The folder with shards for one sequence length; creates it, or completes an interrupted one.

    Raises:
        ValueError: missing, broken or empty input, or a vocabulary that the corpus cannot fill.
        OSError: the disk is full, or a folder is not writable.
    """
    root = Path(config.data.prepared)
    root.mkdir(parents=True, exist_ok=True)
    files = find_files(config.data, root / "arrow")
    fingerprint = [_fingerprint(file) for file in files]
    folder = root / f"shards-{sequence_length}-{_folder_key(config, fingerprint)}"
    if (folder / "manifest.json").exists():
        read_manifest(folder)
        return folder
    # Starting a process costs about as much as opening eight files.
    counts = _parallel(count_documents, files, min(config.data.workers or _cores(), 1 + len(files) // 8))
    files = check_files(files, counts, config.data.on_bad)
    tokenizer = _ensure_tokenizer(config, files, root, fingerprint)
    job = PrepareJob(
        folder=str(folder),
        tokenizer=str(tokenizer),
        sequence_length=sequence_length,
        nsp=config.data.nsp,
        pack=config.data.pack,
        heldout_fraction=config.data.heldout_fraction,
    )
    units = list(_units(files, config.data.unit_documents))
    (folder / "units").mkdir(parents=True, exist_ok=True)
    todo = [(job, unit) for unit in units if not _is_done(folder, unit)]
    report(
        f"prepare: {sum(f.documents for f in files)} documents in {len(files)} files, {len(todo)} of "
        f"{len(units)} units to do"
    )
    _parallel(_run_unit, todo, config.data.workers)
    manifest = _finish(job, units, fingerprint)
    report(
        f"prepare: {manifest.samples('train')} training and {manifest.samples('heldout')} held-out samples of "
        f"{sequence_length}, {manifest.fill:.1%} filled, in {folder}"
    )
    return folder


def _fingerprint(file: DocumentFile) -> str:
    """Identifies the input without reading it; changes with the input."""
    if file.format == BUILTIN:
        return f"builtin corpus of CPython {platform.python_version()}"
    if "://" in file.path:
        import fsspec  # type: ignore[import-untyped]

        filesystem, path = fsspec.core.url_to_fs(file.path)
        try:
            modified = filesystem.modified(path).timestamp()
        except NotImplementedError:  # by HTTP
            modified = 0.0
        return f"{file.path} {filesystem.size(path)} {modified}"
    stat = os.stat(file.path)
    return f"{file.path} {stat.st_size} {stat.st_mtime_ns}"


def _tokenizer_key(config: RunConfig, fingerprint: Sequence[str]) -> str:
    parts = [asdict(config.tokenizer), list(fingerprint), config.data.text_field, config.data.format]
    if config.tokenizer.path is not None:  # another one may have taken its place
        parts.append(tokenizer_digest(load_tokenizer(config.tokenizer.path)))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _folder_key(config: RunConfig, fingerprint: Sequence[str]) -> str:
    data = config.data
    parts = [FORMAT_VERSION, _tokenizer_key(config, fingerprint), data.nsp, data.pack, data.heldout_fraction]
    return hashlib.sha256(json.dumps([*parts, data.unit_documents]).encode()).hexdigest()[:12]


def _ensure_tokenizer(
    config: RunConfig, files: Sequence[DocumentFile], root: Path, fingerprint: Sequence[str]
) -> Path:
    """The tokenizer's folder: the configured one, or that of a tokenizer trained on the corpus (once)."""
    if config.tokenizer.path is not None:
        return Path(config.tokenizer.path)
    folder = root / f"tokenizer-{_tokenizer_key(config, fingerprint)}"
    if not folder.is_dir():
        trained = train_tokenizer(_sampled(files, config.tokenizer.sample_documents), config.tokenizer)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        save_tokenizer(trained, aside, config.tokenizer.lowercase, config.model.max_positions)
        try:
            aside.rename(folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
            shutil.rmtree(aside)
    return folder


def _sampled(files: Sequence[DocumentFile], wanted: int | None) -> Iterator[str]:
    """About `wanted` documents, the same ones every time; all of them if the corpus has no more."""
    total = sum(file.documents for file in files)
    share = 1.0 if wanted is None else wanted / total
    key, number = key_of("tokenizer sample"), 0
    for file in files:
        texts = file.open()
        for start in range(0, file.documents, _CHUNK):
            chunk = texts[start : start + _CHUNK]
            taken = uniform(key, number + np.arange(len(chunk))) < share
            yield from (text for text, take in zip(chunk, taken, strict=True) if take)
            number += len(chunk)


def _units(files: Iterable[DocumentFile], documents: int) -> Iterator[Unit]:
    number = first = 0
    for file in files:
        for start in range(0, file.documents, documents):
            stop = min(start + documents, file.documents)
            yield Unit(number, file, start, stop, first + start)
            number += 1
        first += file.documents


def _is_done(folder: Path, unit: Unit) -> bool:
    return (folder / "units" / f"{unit.number:05d}.json").exists()


def _run_unit(task: tuple[PrepareJob, Unit]) -> None:
    """Tokenizes and packs one unit; its JSON file is written last and marks it done."""
    job, unit = task
    tokenizer = load_tokenizer(job.tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    packers: dict[Split, Packer] = {
        split: Packer(vocabulary, job.sequence_length, nsp=job.nsp, pack=job.pack)
        for split in ("train", "heldout")
    }
    texts = unit.file.open()
    heldout_key = key_of("held-out document")
    nulls = 0
    for start in range(unit.start, unit.stop, _CHUNK):
        stop = min(start + _CHUNK, unit.stop)
        chunk = texts[start:stop]
        nulls += stop - start - len(chunk)
        numbers = unit.first_document + start - unit.start + np.arange(len(chunk))
        is_heldout = uniform(heldout_key, numbers) < job.heldout_fraction
        for ids, heldout in zip(encode(tokenizer, chunk), is_heldout, strict=True):
            packers["heldout" if heldout else "train"].add(ids)
    folder, dtype = Path(job.folder), _dtype(vocabulary.size)
    done: dict[str, Any] = {"documents": unit.stop - unit.start}
    for split, packer in packers.items():
        rows = packer.rows()
        content = rows.astype(dtype).tobytes()
        write_atomically(folder / f"{split}-{unit.number:05d}.bin", content)
        done[split] = len(rows)
        done[f"{split}_sha256"] = hashlib.sha256(content).hexdigest()
        if split == "train":
            counts = np.bincount(rows.ravel(), minlength=vocabulary.size)
            done["tokens"] = int(rows.size - counts[vocabulary.pad])
            done["counts"] = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
    done["dropped"] = nulls + sum(packer.dropped for packer in packers.values())
    write_atomically(folder / "units" / f"{unit.number:05d}.json", json.dumps(done).encode())


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _finish(job: PrepareJob, units: Sequence[Unit], fingerprint: Sequence[str]) -> Manifest:
    """Sums up the units, copies the tokenizer to the shards and writes the manifest."""
    folder = Path(job.folder)
    tokenizer = load_tokenizer(job.tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    done = [
        json.loads((folder / "units" / f"{unit.number:05d}.json").read_text(encoding="utf-8"))
        for unit in units
    ]
    counts = np.zeros(vocabulary.size, np.int64)
    for result in done:
        for piece, count in result["counts"].items():
            counts[int(piece)] += count
    counts[list(vocabulary.special)] = 0
    manifest = Manifest(
        version=FORMAT_VERSION,
        sequence_length=job.sequence_length,
        nsp=job.nsp,
        packed=job.pack and not job.nsp,
        vocab_size=vocabulary.size,
        dtype=_dtype(vocabulary.size),
        tokenizer_sha256=tokenizer_digest(tokenizer),
        sources=tuple(fingerprint),
        documents=sum(result["documents"] for result in done),
        dropped_documents=sum(result["dropped"] for result in done),
        train=_shard_list("train", units, done),
        heldout=_shard_list("heldout", units, done),
        train_tokens=sum(result["tokens"] for result in done),
        unigram_entropy=entropy(counts),
        rows_sha256=_rows_sha256(done),
    )
    if not manifest.samples("train"):
        raise ValueError(
            f"the corpus is empty: {manifest.documents} documents gave no training sample of "
            f"{job.sequence_length} pieces; check data.source, data.text_field and data.heldout_fraction"
        )
    np.save(folder / "unigram.npy", counts)
    shutil.copytree(job.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    write_atomically(folder / "manifest.json", json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def _rows_sha256(done: Sequence[dict[str, Any]]) -> str:
    """Of all units' shards; "" if an earlier version finished some of them."""
    shards = [result.get(f"{split}_sha256") for split in ("train", "heldout") for result in done]
    return "" if None in shards else hashlib.sha256("".join(map(str, shards)).encode()).hexdigest()


def _shard_list(
    split: Split, units: Sequence[Unit], done: Sequence[dict[str, Any]]
) -> tuple[tuple[str, int], ...]:
    return tuple(
        (f"{split}-{unit.number:05d}.bin", result[split])
        for unit, result in zip(units, done, strict=True)
        if result[split]
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _parallel(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Results in the order of the items; a single item runs in this process."""
    workers = min(workers or _cores(), len(items))
    if workers <= 1:
        return [function(item) for item in items]
    # spawn: a process that has started threads (torch, tokenizers) must not be forked.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, item) for item in items]
        for future in as_completed(futures):
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
                break
        return [future.result() for future in futures]
