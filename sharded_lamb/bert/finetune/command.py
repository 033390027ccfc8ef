"""``python -m sharded_lamb.bert finetune``: rates and seeds in turn, a table and JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sharded_lamb.bench.report import about
from sharded_lamb.bert.finetune.bag_of_words import bag_of_words, majority
from sharded_lamb.bert.finetune.builtin import NAME as BUILTIN
from sharded_lamb.bert.finetune.builtin import builtin_dataset
from sharded_lamb.bert.finetune.encoder import Encoder, read_encoder
from sharded_lamb.bert.finetune.tasks import GLUE, Dataset, Task, read
from sharded_lamb.bert.finetune.training import Examples, Settings, finetune
from sharded_lamb.bert.shards import write_atomically
from sharded_lamb.comm import devices

FILES = "files"
_WEIGHTS = ("trained", "random")
_MIN_LENGTH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``finetune``."""
    parser.description = (
        "Fine-tunes a pretrained encoder on a sentence or sentence-pair task, for every learning rate and seed, and "
        "compares it with the most frequent label, a bag of words, and the same model from random weights."
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a run's, or a Hugging Face folder",
    )
    parser.add_argument(
        "--task",
        default=BUILTIN,
        choices=[BUILTIN, *GLUE, FILES],
        help="default: pairs of the built-in prose; a task of GLUE; or files with --columns and --label",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of the task's train.tsv and dev.tsv")
    parser.add_argument("--train", type=Path, metavar="FILE", help="default: train.tsv of --data")
    parser.add_argument(
        "--dev", type=Path, metavar="FILE", help="default: dev.tsv of --data; MNLI: dev_matched.tsv"
    )
    parser.add_argument(
        "--columns", type=_listed, metavar="A[,B]", help="of text; numbers from 0 for files without a header"
    )
    parser.add_argument("--label", metavar="COLUMN", help="of the label")
    parser.add_argument("--regression", action="store_true", help="labels are numbers (--task files)")
    parser.add_argument(
        "--on-bad",
        default="error",
        choices=["error", "skip"],
        help="bad rows: an error, or counted and left out",
    )
    parser.add_argument(
        "--weights",
        type=_listed,
        metavar="trained|random|trained,random",
        help="to start from; default: trained, and for the built-in task both",
    )
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "lamb"], help="default: adamw")
    parser.add_argument("--lrs", type=_numbers, default=[3e-4], help="default: 3e-4")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--epochs", type=_positive, default=3, help="default: 3")
    parser.add_argument("--batch", type=_positive, default=32, help="default: 32")
    parser.add_argument("--max-length", type=_positive, default=128, help="pieces; default: 128")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps; default: 0.1")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON; default: finetune-TASK.json in --from"
    )


def _listed(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(chosen: argparse.Namespace) -> int:
    """Fine-tunes, prints the table and writes the JSON. Returns 0.

    Raises:
        ValueError: bad settings, input or folder; see `tasks.read` and `encoder.read_encoder`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("finetune runs in one process: start it without torchrun")
    weights = chosen.weights or (list(_WEIGHTS) if chosen.task == BUILTIN else ["trained"])
    _check(chosen, weights)
    dataset = _dataset(chosen)
    encoders = {kind: read_encoder(chosen.source, with_weights=kind == "trained") for kind in weights}
    settings = Settings(
        chosen.optimizer,
        chosen.epochs,
        chosen.batch,
        _length(chosen.max_length, next(iter(encoders.values()))),
        chosen.warmup,
    )
    device = devices.of_this_rank()
    runs = list(_runs(chosen, dataset, encoders, settings, device))
    best = {kind: _best([row for row in runs if row["weights"] == kind], dataset.task) for kind in weights}
    result = {
        "about": {
            **about(device),
            "command": shlex.join(["python", "-m", "sharded_lamb.bert", *sys.argv[1:]]),
        },
        "task": {**asdict(dataset.task), "train": len(dataset.train), "dev": len(dataset.dev)},
        "settings": {**asdict(settings), "lrs": chosen.lrs, "seeds": chosen.seeds},
        "starts": {kind: encoder.source for kind, encoder in encoders.items()},
        "majority": majority(dataset),
        "bag_of_words": bag_of_words(dataset),
        "best": best,
        "runs": runs,
    }
    out = chosen.out or chosen.source / f"finetune-{chosen.task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(_without_nan(result), indent=1).encode())
    print(table(result), f"results in {out}", sep="\n", flush=True)
    return 0


def _check(chosen: argparse.Namespace, weights: Sequence[str]) -> None:
    expectations = (
        ("--weights", weights, bool(weights) and {*weights} <= {*_WEIGHTS}, " or ".join(_WEIGHTS)),
        ("--lrs", chosen.lrs, all(0 < lr < math.inf for lr in chosen.lrs), "positive numbers"),
        ("--seeds", chosen.seeds, all(seed >= 0 for seed in chosen.seeds), "numbers from 0"),
        ("--warmup", chosen.warmup, 0 <= chosen.warmup < 1, "a number in [0, 1)"),
    )
    for name, value, holds, expected in expectations:
        if not holds:
            raise ValueError(f"{name} {value}: expected {expected}")


def _dataset(chosen: argparse.Namespace) -> Dataset:
    own = chosen.task == FILES
    files = {"--data": chosen.data, "--train": chosen.train, "--dev": chosen.dev}
    columns = {
        "--columns": chosen.columns,
        "--label": chosen.label,
        "--regression": chosen.regression or None,
    }
    useless = {} if own else {name: value for name, value in columns.items() if value is not None}
    if chosen.task == BUILTIN:
        useless |= {name: value for name, value in files.items() if value is not None}
    if useless:
        raise ValueError(f"--task {chosen.task} takes no {', '.join(useless)}; --task {FILES} does")
    if chosen.task == BUILTIN:
        return builtin_dataset()
    if own and (chosen.columns is None or chosen.label is None):
        raise ValueError(f"--task {FILES} needs --columns and --label")
    task = _own_task(chosen) if own else GLUE[chosen.task]
    paths: list[Path] = []
    for name, path, default in (("train", chosen.train, "train.tsv"), ("dev", chosen.dev, task.dev)):
        if path is None and chosen.data is None:
            raise ValueError(f"--task {chosen.task} has no {name} split: give --data FOLDER or --{name} FILE")
        paths.append(path or chosen.data / default)
    return read(task, paths[0], paths[1], chosen.on_bad)


def _own_task(chosen: argparse.Namespace) -> Task:
    metrics = ("pearson", "spearman") if chosen.regression else ("accuracy",)
    return Task(FILES, tuple(chosen.columns), chosen.label, metrics, is_regression=chosen.regression)


def _length(wanted: int, encoder: Encoder) -> int:
    if not _MIN_LENGTH <= wanted <= encoder.config.max_position_embeddings:
        raise ValueError(
            f"--max-length {wanted}: expected {_MIN_LENGTH} to the model's {encoder.config.max_position_embeddings}"
        )
    return wanted


def _runs(
    chosen: argparse.Namespace,
    dataset: Dataset,
    encoders: Mapping[str, Encoder],
    settings: Settings,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    tokenizer = next(iter(encoders.values())).tokenizer
    train, dev = (Examples(split, tokenizer, settings.max_length) for split in (dataset.train, dataset.dev))
    if cut := train.cut + dev.cut:
        total = len(dataset.train) + len(dataset.dev)
        print(f"{cut} of {total} examples are longer than --max-length and cut", flush=True)
    for (kind, encoder), lr, seed in product(encoders.items(), chosen.lrs, chosen.seeds):
        found = finetune(encoder, dataset, train, dev, settings, lr, seed, device)
        row = {"weights": kind, "lr": lr, "seed": seed, **found}
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        yield row


def _best(runs: Sequence[Mapping[str, Any]], task: Task) -> dict[str, Any]:
    """The rate with the highest median over seeds of the first metric, and the median of every metric at it."""
    medians = []
    for lr in dict.fromkeys(row["lr"] for row in runs):
        same = [row for row in runs if row["lr"] == lr]
        medians.append({"lr": lr, **{name: _median([row[name] for row in same]) for name in task.metrics}})
    return max(medians, key=lambda row: _or_least(row[task.metrics[0]]))


def _median(values: Sequence[float]) -> float:
    middle = statistics.median(_or_least(value) for value in values)
    return middle if math.isfinite(middle) else math.nan


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def table(result: Mapping[str, Any]) -> str:
    """The best of every way as Markdown: the median over seeds, and the lowest and highest of the first metric."""
    metrics = result["task"]["metrics"]
    lines = [
        f"{result['task']['name']}: {result['task']['train']} examples to train, {result['task']['dev']} of dev",
        "",
        f"| | {' | '.join(metrics)} | range of {metrics[0]} | lr |",
        "|" + "---|" * (len(metrics) + 3),
        _line("most frequent label", result["majority"], metrics, "", ""),
        _line("bag of words", result["bag_of_words"], metrics, "", ""),
    ]
    for kind, best in result["best"].items():
        same = [row for row in result["runs"] if (row["weights"], row["lr"]) == (kind, best["lr"])]
        values = sorted((row[metrics[0]] for row in same), key=_or_least)
        spread = f"{_shown(values[0])} to {_shown(values[-1])}, {len(values)} seeds"
        lines.append(_line(f"{kind} weights", best, metrics, spread, f"{best['lr']:g}"))
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, float], metrics: Sequence[str], spread: str, lr: str) -> str:
    return f"| {name} | {' | '.join(_shown(row[metric]) for metric in metrics)} | {spread} | {lr} |"


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "undefined" if math.isnan(value) else f"{value:.4g}"


def _without_nan(value: Any) -> Any:
    """With null in place of nan, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
