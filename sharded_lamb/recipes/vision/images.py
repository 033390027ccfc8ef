"""Splits of images with labels: scikit-learn's digits, and folders as Hugging Face `datasets` reads them."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sharded_lamb.recipes.training.stateless_rng import I64, Permutation, key_of
from sharded_lamb.recipes.vision.config import DIGITS, DataConfig

_SPLIT_OF_DIGITS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
_NAMED = 3  # of bad labels, in a message


class Split(Protocol):
    """Images of one split."""

    labels: I64  # [N] numbers of classes

    def image(self, number: int) -> Any:
        """A PIL image, gray or RGB. Raises for a file that is not an image, or is damaged: almost any exception."""

    def name(self, number: int) -> str:
        """Of the image, for messages."""


@dataclass(frozen=True)
class Splits:
    """The splits that a run uses, by the names of `DataConfig`'s fields, and the names of the classes."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    left_out: Mapping[str, int]  # images with wrong labels, with data.on_bad=skip

    def digest(self) -> str:
        """Of classes and labels: a resumed run must have the same."""
        hashed = hashlib.sha256("\0".join(self.classes).encode())
        for name in ("train", "validation"):
            hashed.update(self.splits[name].labels.tobytes())
        return hashed.hexdigest()[:16]


def open_splits(settings: DataConfig) -> Splits:
    """The configured splits.

    Raises:
        ValueError: no such source, split or column; labels that are no class of the training split (unless
            `data.on_bad` is "skip", which leaves those images out); no image is left.
        OSError: a file cannot be read.
    """
    return _digits(settings) if settings.source == DIGITS else _folder(settings)


def _names(settings: DataConfig) -> dict[str, str]:
    """{field of `DataConfig`: its split}"""
    named = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    return {name: split for name, split in named.items() if split is not None}


def _missing(settings: DataConfig, field: str, split: str, there: Sequence[str]) -> ValueError:
    return ValueError(
        f"data.{field}={split!r}: {settings.source} has no such split; it has {', '.join(sorted(there))}"
    )


class _Digits:
    """A part of the digits: 8 x 8, gray, 0 … 255."""

    def __init__(self, numbers: I64, images: Any, labels: Any) -> None:
        self._numbers, self._images = numbers, images[numbers]
        self.labels: I64 = labels[numbers].astype(np.int64)

    def image(self, number: int) -> Any:
        from PIL import Image

        return Image.fromarray(np.rint(self._images[number] * (255 / 16)).astype(np.uint8))

    def name(self, number: int) -> str:
        return f"digit {self._numbers[number]}"


def _digits(settings: DataConfig) -> Splits:
    """60, 20 and 20 % of an order that no seed of a run changes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(f"the digits need scikit-learn ({error}): pip install scikit-learn") from None
    digits = load_digits()
    count = len(digits.target)
    order = Permutation(count, key_of("digits"))(np.arange(count))
    splits: dict[str, Split] = {}
    for field, split in _names(settings).items():
        if split not in _SPLIT_OF_DIGITS:
            raise _missing(settings, field, split, [*_SPLIT_OF_DIGITS])
        begin, end = (round(share * count) for share in _SPLIT_OF_DIGITS[split])
        splits[field] = _Digits(order[begin:end], digits.images, digits.target)
    return Splits(tuple(map(str, digits.target_names)), splits, {})


class _Rows:
    """Some rows of a data set of files or bytes."""

    def __init__(self, rows: Any, column: str, numbers: I64, labels: I64, mode: str) -> None:
        self._rows, self._column, self._numbers, self._mode = rows, column, numbers, mode
        self.labels = labels

    def image(self, number: int) -> Any:
        from PIL import Image

        entry = self._rows[int(self._numbers[number])][self._column]
        source = entry["path"] if entry["bytes"] is None else io.BytesIO(entry["bytes"])
        with Image.open(source) as image:
            return _in_8_bits(image).convert(self._mode)

    def name(self, number: int) -> str:
        return _name_of(self._rows, self._column, int(self._numbers[number]))


def _in_8_bits(image: Any) -> Any:
    """The image; its values scaled if they have 16 bits, which PIL's ``convert`` would cut at 255.

    Raises:
        ValueError: they have 32 bits, of which no file says what is white.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"an image of 32 bits a pixel (mode {image.mode}) has no range")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))


def _name_of(rows: Any, column: str, number: int) -> str:
    return rows[number][column]["path"] or f"row {number}"


def _folder(settings: DataConfig) -> Splits:
    tables = _tables(settings)
    opened: dict[str, Split] = {}
    left_out: dict[str, int] = {}
    classes: dict[Any, int] = {}
    names: Mapping[Any, str] = {}
    code_of: dict[Any, Any] = {}
    mode = "RGB" if len(settings.mean) == 3 else "L"
    for field, rows in tables.items():
        raw, known = _labels(rows, settings)
        if field == "train":
            there = {value for value in raw if _is_label(value)}
            classes = {value: number for number, value in enumerate(sorted(there))}
            names = known or {value: str(value) for value in classes}
            code_of = {name: value for value, name in known.items()}
        elif known and code_of:  # its own codes of the same names
            named = (known.get(value, value) if _is_label(value) else value for value in raw)
            raw = [code_of.get(name, name) for name in named]
        good = [number for number, value in enumerate(raw) if value in classes]
        if len(good) < len(raw):
            bad = _bad_labels(rows, settings, field, raw, classes, names if code_of else known)
            if settings.on_bad == "error":
                raise ValueError(f"{bad}; set data.on_bad=skip to leave them out")
            left_out[field] = len(raw) - len(good)
        if not good:
            raise ValueError(f"data.{field}: no image with a label in {settings.source}")
        labels = np.array([classes[raw[number]] for number in good], np.int64)
        opened[field] = _Rows(rows, settings.image, np.array(good), labels, mode)
    return Splits(tuple(names[value] for value in classes), opened, left_out)


def _tables(settings: DataConfig) -> dict[str, Any]:
    """{field: its rows}, images as files or bytes."""
    import datasets

    folder = Path(settings.source)
    if not folder.is_dir():
        raise ValueError(f"data.source={settings.source!r}: expected {DIGITS!r} or a folder")
    bars, there = datasets.utils.are_progress_bars_disabled(), None
    datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").exists():
            there = datasets.load_from_disk(str(folder))
        else:
            files = _files_of_splits(folder, _names(settings).values())
            there = datasets.load_dataset(str(folder), data_files=files, cache_dir=settings.cache)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"data.source={settings.source!r}: `datasets` cannot read it: {error}") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()
    tables = {}
    for field, split in _names(settings).items():
        if split not in there:
            raise _missing(settings, field, split, list(there))
        rows = there[split]
        for setting, column in (("image", settings.image), ("label", settings.label)):
            if column not in rows.features:
                columns = ", ".join(rows.features)
                raise ValueError(
                    f"data.{setting}={column!r}: no such column in {split}; there are: {columns} (a folder of "
                    f"images has labels if they are all in SPLIT/CLASS/IMAGE)"
                )
        tables[field] = rows.cast_column(settings.image, datasets.Image(decode=False))
    return tables


def _files_of_splits(folder: Path, wanted: Collection[str]) -> dict[str, list[str]] | None:
    """{split: patterns of files}, of the folders in ``folder`` that are named after splits; None if none is wanted.

    Left to itself `datasets` takes any folder's name that contains a split's: images of a class "bullet_train".
    """
    from datasets.data_files import SPLIT_KEYWORDS

    split_of = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
    split_of |= {split: split for split in wanted}
    files: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name in split_of:
            files.setdefault(split_of[entry.name], []).append(f"{entry.name}/**")
    return files if any(split in files for split in wanted) else None


def _labels(rows: Any, settings: DataConfig) -> tuple[list[Any], dict[int, str]]:
    """(every row's label, {label: name of its class} if the data set has names)."""
    feature = rows.features[settings.label]
    values = list(rows[settings.label])
    if not all(value is None or isinstance(value, int | str) for value in values):
        raise ValueError(
            f"data.label={settings.label!r}: expected numbers of classes or names, found {feature}"
        )
    return values, dict(enumerate(getattr(feature, "names", None) or []))


def _is_label(value: Any) -> bool:
    """`datasets` writes -1 where a public test split hides its labels."""
    return value is not None and value != "" and (isinstance(value, str) or value >= 0)


def _bad_labels(
    rows: Any,
    settings: DataConfig,
    field: str,
    raw: Sequence[Any],
    classes: Mapping[Any, int],
    known: Mapping[int, str],
) -> str:
    """How many labels are none of ``classes``, and the first of each."""
    wrong = [value for value in raw if value not in classes]
    parts = []
    for value, count in Counter(wrong).most_common(_NAMED):
        first = _name_of(rows, settings.image, raw.index(value))
        shown = repr(known.get(value, value)) if _is_label(value) else "none"
        parts.append(f"{shown} ({count}, the first: {first})")
    more = ", …" if len(set(wrong)) > _NAMED else ""
    return (
        f"data.{field}: {len(wrong)} of {len(raw)} labels are no class of the training split: "
        f"{', '.join(parts)}{more}"
    )
