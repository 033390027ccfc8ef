"""Tasks of one or two sentences: GLUE's, those of a user's files, and how their files are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_SHOWN = 10
"""Bad rows that a message lists."""

OnBad = Literal["error", "skip"]


@dataclass(frozen=True)
class Task:
    """What the columns of a task's files hold, and its published metrics, of which the first chooses a rate."""

    name: str
    texts: tuple[str, ...]  # one or two columns by name; by number from 0 for files without a header
    label: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()  # empty: those of the training file; in regression none
    is_regression: bool = False
    dev: str = "dev.tsv"

    def __post_init__(self) -> None:
        columns = (*self.texts, self.label)
        if len(self.texts) not in (1, 2) or len({*columns}) != len(columns):
            raise ValueError(f"columns {columns}: expected one or two of text and another of the label")
        if len({column.isdigit() for column in columns}) != 1:
            raise ValueError(f"columns {columns}: expected names, or numbers for files without a header")

    @property
    def has_header(self) -> bool:
        return not self.label.isdigit()


_BINARY = ("0", "1")
_OF_TWO = ("f1", "matthews")
_ENTAILED = ("entailment", "not_entailment")

GLUE = {
    task.name: task
    for task in (
        Task("CoLA", ("3",), "1", ("matthews",), _BINARY),
        Task("SST-2", ("sentence",), "label", ("accuracy",), _BINARY),
        Task("MRPC", ("#1 String", "#2 String"), "Quality", ("f1", "accuracy"), _BINARY),
        Task("QQP", ("question1", "question2"), "is_duplicate", ("f1", "accuracy"), _BINARY),
        Task("STS-B", ("sentence1", "sentence2"), "score", ("pearson", "spearman"), is_regression=True),
        Task(
            "MNLI",
            ("sentence1", "sentence2"),
            "gold_label",
            ("accuracy",),
            ("entailment", "neutral", "contradiction"),
            dev="dev_matched.tsv",
        ),
        Task("QNLI", ("question", "sentence"), "label", ("accuracy",), _ENTAILED),
        Task("RTE", ("sentence1", "sentence2"), "label", ("accuracy",), _ENTAILED),
        Task("WNLI", ("sentence1", "sentence2"), "label", ("accuracy",), _BINARY),
    )
}
"""The tasks of GLUE (arXiv 1804.07461) by name: columns as in its TSV files, which have no quoting."""


@dataclass(frozen=True)
class Split:
    """N examples."""

    texts: tuple[tuple[str, ...], ...]  # [N] of one or two sentences
    targets: NDArray[Any]  # [N] int64 indices of labels, or float64 numbers

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Dataset:
    """A task with its two splits; ``task.labels`` names the classes."""

    task: Task
    train: Split
    dev: Split

    @property
    def outputs(self) -> int:
        """Numbers that a model returns for an example."""
        return 1 if self.task.is_regression else len(self.task.labels)


def read(task: Task, train: Path, dev: Path, on_bad: OnBad = "error") -> Dataset:
    """The task's files. ``on_bad``: whether bad rows are an error, or counted, printed and left out.

    Raises:
        ValueError: a file or column is missing; rows are ragged, a sentence is empty or a label unknown; the splits
            have different labels.
    """
    if not task.is_regression and not task.labels:
        found = _found_labels(task, train)
        task = replace(task, labels=found, metrics=task.metrics + _OF_TWO * (len(found) == 2))
    dataset = Dataset(task, *(_split(task, path, on_bad) for path in (train, dev)))
    if not task.is_regression:
        _check_same_labels(dataset, train, dev)
    return dataset


def _check_same_labels(dataset: Dataset, train: Path, dev: Path) -> None:
    own, other = ({*split.targets.tolist()} for split in (dataset.train, dataset.dev))
    if not other <= own or len(other) < 2:
        names = [[dataset.task.labels[i] for i in sorted(which)] for which in (own, other)]
        raise ValueError(
            f"task {dataset.task.name}: {train} has {len(own)} labels {names[0]} and {dev} has {len(other)} "
            f"{names[1]}; expected at least two in both, and none in dev that the other lacks"
        )


def _found_labels(task: Task, path: Path) -> tuple[str, ...]:
    rows, width, columns = _rows(task, path)
    labels = {fields[columns[-1]] for _, fields in rows if len(fields) == width}
    return tuple(sorted(labels - {""}))


def _rows(task: Task, path: Path) -> tuple[list[tuple[int, list[str]]], int, list[int]]:
    """([(line number, fields)], the first row's number of fields, the indices of the columns of text and label)."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file; task {task.name} needs a file to train and one of dev"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    if lines[-1] == "":
        lines.pop()
    rows = [(number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1)]
    if len(rows) <= task.has_header:
        raise ValueError(f"{path}: no examples in {len(rows)} lines")
    wanted = (*task.texts, task.label)
    there = rows[0][1] if task.has_header else [str(i) for i in range(len(rows[0][1]))]
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"{path}: no column {missing} for task {task.name}; its columns are {there}")
    return rows[task.has_header :], len(there), [there.index(name) for name in wanted]


def _split(task: Task, path: Path, on_bad: OnBad) -> Split:
    rows, width, columns = _rows(task, path)
    texts, targets, bad = [], [], []
    for number, fields in rows:
        if len(fields) != width:
            bad.append(f"line {number}: {len(fields)} columns, expected {width}")
            continue
        *sentences, label = (fields[i] for i in columns)
        problem = next(
            (f"column {n!r} is empty" for n, s in zip(task.texts, sentences, strict=True) if not s.strip()),
            None,
        )
        target = _target(task, label)
        if target is None:
            expected = "a finite number" if task.is_regression else f"one of {list(task.labels)}"
            problem = f"{task.label} {label!r}, expected {expected}"
        if problem is not None:
            bad.append(f"line {number}: {problem}")
        else:
            texts.append(tuple(sentences))
            targets.append(target)
    if bad:
        report_bad(f"{path}: {len(bad)} of {len(rows)} rows are bad", bad, on_bad)
    if not texts:
        raise ValueError(f"{path}: no good row in {len(rows)}")
    return Split(tuple(texts), np.array(targets, np.float64 if task.is_regression else np.int64))


def _target(task: Task, label: str) -> float | int | None:
    if not task.is_regression:
        return task.labels.index(label) if label in task.labels else None
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def report_bad(summary: str, bad: Sequence[str], on_bad: OnBad) -> None:
    """Raises a ValueError that lists the first of ``bad``, or prints it, by ``on_bad``."""
    more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    listing = "".join(f"\n  {line}" for line in [*bad[:_SHOWN], *more])
    if on_bad == "error":
        raise ValueError(f"{summary}:{listing}\nRepair them, or leave them out with --on-bad skip")
    print(f"skipped: {summary}:{listing}", flush=True)
