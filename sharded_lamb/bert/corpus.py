"""Sources → documents: the built-in corpus, and text, JSONL, Parquet and Arrow through `datasets`.

Each input file becomes a `DocumentFile`, which every process can open and read at any row. Work is split by rows, so a
single huge file is tokenized in parallel too.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import DataConfig
from sharded_lamb.recipes.training.bad_input import raise_if_of_machine

BUILTIN = "builtin"
_FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_LOADERS = {"text": "text", "jsonl": "json", "parquet": "parquet", "arrow": "arrow"}
_RULES = re.compile(r"([^\w\s])\1{3,}")  # rules below headings and in tables, no prose
_MIN_DOCSTRING = 40  # characters; shorter ones are labels, not prose
_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # what holds statements, or is one


@dataclass(frozen=True)
class DocumentFile:
    """One input file: its path, format and number of documents."""

    path: str
    format: str  # text, jsonl, parquet, arrow, arrow_folder or builtin
    field: str
    cache: str  # folder in which `datasets` stores text and JSONL as Arrow
    documents: int = 0

    def open(self) -> Any:
        """The documents, a sequence whose `[start:stop]` is a list of texts."""
        if self.format == BUILTIN:
            return _Texts(builtin_documents())
        return _Column(_load(self), self.field)


@dataclass(frozen=True)
class _Texts:
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> list[str]:
        return list(self.texts[rows])


@dataclass(frozen=True)
class _Column:
    dataset: Any
    field: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: slice) -> list[str]:
        values = self.dataset[rows][self.field]
        return [value for value in values if isinstance(value, str)]


def _load(file: DocumentFile) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if file.format == "arrow_folder":
        dataset = datasets.load_from_disk(file.path)
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(
                f"{file.path}: contains the splits {sorted(dataset)}; name one, such as {file.path}/train"
            )
    else:
        options = {"sample_by": "paragraph"} if file.format == "text" else {}
        dataset = datasets.load_dataset(
            _LOADERS[file.format], data_files=[file.path], split="train", cache_dir=file.cache, **options
        )
    if file.field not in dataset.column_names:
        raise ValueError(
            f"{file.path}: no column {file.field!r} (data.text_field) among {sorted(dataset.column_names)}"
        )
    feature = dataset.features[file.field]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{file.path}: column {file.field!r} holds {feature}, expected strings")
    return dataset


def _expand(source: str) -> list[str]:
    """The files of one path, glob or fsspec URL, sorted."""
    import fsspec  # type: ignore[import-untyped]

    filesystem, path = fsspec.core.url_to_fs(source)
    protocol = source.split("://")[0] + "://" if "://" in source else ""
    if filesystem.isdir(path):
        if _is_saved_dataset(filesystem, path):
            return [source]
        paths = [p for p in filesystem.find(path) if _suffix_of(p) in _FORMATS]
    elif any(c in path for c in "*?["):
        paths = [p for p in filesystem.glob(path) if filesystem.isfile(p) or _is_saved_dataset(filesystem, p)]
    else:
        paths = [path] if filesystem.exists(path) else []
    if not paths:
        raise ValueError(
            f"data.source {source!r}: no such file, and no {', '.join(_FORMATS)} file matches; check the path"
        )
    return [protocol + p.removeprefix(protocol) for p in sorted(paths)]


def _is_saved_dataset(filesystem: Any, folder: str) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return any(filesystem.exists(f"{folder}/{name}") for name in ("state.json", "dataset_dict.json"))


def _suffix_of(path: str) -> str:
    """That of the file in a compressed one."""
    return Path(path.removesuffix(".gz")).suffix


def _format_of(path: str, config: DataConfig) -> str:
    if Path(path).is_dir():
        return "arrow_folder"
    if config.format != "auto":
        return config.format
    suffix = _suffix_of(path)
    if not suffix:
        return "text"
    if suffix not in _FORMATS:
        raise ValueError(
            f"data.source {path!r}: unknown format {suffix!r}; set data.format to one of {sorted(_LOADERS)}"
        )
    return _FORMATS[suffix]


def find_files(config: DataConfig, cache: Path) -> list[DocumentFile]:
    """Every input file of the configured sources, unopened.

    Raises:
        ValueError: a source does not exist, or its format is unknown.
    """
    files: list[DocumentFile] = []
    for source in config.source:
        if source == BUILTIN:
            files.append(DocumentFile(BUILTIN, BUILTIN, "text", ""))
            continue
        for path in _expand(source):
            form = _format_of(path, config)
            field = "text" if form == "text" else config.text_field  # a text file has no fields
            files.append(DocumentFile(path, form, field, str(cache)))
    return files


def count_documents(file: DocumentFile) -> int | str:
    """The number of documents in a file, or the reason why it cannot be used.

    Raises:
        OSError: the machine, not the file, is at fault: the cache's disk is full, or too many files are open.
    """
    empty = "contains no document"
    try:
        if os.path.isfile(file.path) and not os.path.getsize(file.path):
            return empty  # `datasets` speaks of its schema
        count = len(file.open())
    except Exception as error:  # `datasets` raises its own and pyarrow's classes, derived from Exception
        raise_if_of_machine(error, file.path)
        if isinstance(error, OSError | ValueError | RuntimeError | KeyError):
            return _reason(error)
        if type(error).__module__.split(".")[0] in ("datasets", "pyarrow", "fsspec"):
            return _reason(error)
        raise
    return count or empty


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return f"{type(cause).__name__}: {first_line}"


def check_files(
    files: Sequence[DocumentFile], counts: Sequence[int | str], on_bad: str
) -> list[DocumentFile]:
    """The usable files with their document counts. Bad files are an error or skipped, as configured.

    Raises:
        ValueError: a bad file with on_bad=error (the message names every one), or no usable file.
    """
    bad = [(f.path, c) for f, c in zip(files, counts, strict=True) if isinstance(c, str)]
    good = [replace(f, documents=c) for f, c in zip(files, counts, strict=True) if isinstance(c, int)]
    if bad:
        listing = "\n".join(f"  {path}: {why}" for path, why in bad)
        summary = f"{len(bad)} of {len(files)} input files are broken or empty:\n{listing}"
        if on_bad == "error":
            raise ValueError(f"{summary}\nRepair or remove them, or set data.on_bad=skip to leave them out")
        print(f"skipped: {summary}", flush=True)
    if not good:
        raise ValueError(f"the corpus is empty: no document in {[f.path for f in files]}; check data.source")
    return good


def _docstrings(source: str) -> Iterator[str]:
    """In the order of ``ast.walk``, which would also visit all expressions."""
    nodes: deque[ast.AST] = deque([ast.parse(source)])
    while nodes:
        node = nodes.popleft()
        for name in node._fields:
            field = getattr(node, name)
            if isinstance(field, list) and field and isinstance(field[0], _STATEMENTS):
                nodes.extend(field)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and len(text) >= _MIN_DOCSTRING:
                yield text


def _module_documents(library: Path) -> Iterator[str]:
    """One document for each standard library module: its docstrings."""
    skipped = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "__pycache__",
        "pydoc_data",
        "dist-packages",
    }
    for path in sorted(library.rglob("*.py")):
        if skipped.intersection(path.relative_to(library).parts):
            continue
        try:
            texts = list(_docstrings(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # templates and intentionally broken files
        if texts:
            yield "\n\n".join(texts)


@lru_cache(maxsize=1)
def builtin_documents() -> tuple[str, ...]:
    """English prose in every CPython: the language reference and the standard library's docstrings.

    Repeated paragraphs (docstrings get copied) are kept once, so that no held-out document has a twin among those to
    train on.
    """
    import pydoc_data.topics

    documents = [inspect.cleandoc(text) for _, text in sorted(pydoc_data.topics.topics.items())]
    documents += _module_documents(Path(sysconfig.get_paths()["stdlib"]))
    seen: set[bytes] = set()
    unique = []
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            words = " ".join(_RULES.sub(" ", paragraph).split())
            digest = hashlib.sha256(words.encode()).digest()
            if words and digest not in seen:
                seen.add(digest)
                paragraphs.append(words)
        if paragraphs:
            unique.append("\n\n".join(paragraphs))
    return tuple(unique)
