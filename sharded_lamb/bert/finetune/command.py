"""``python -m sharded_lamb.bert finetune``: rates and seeds in turn, a table and JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sharded_lamb.bench.report import about
from sharded_lamb.bert.finetune.builtin import NAME as BUILTIN
from sharded_lamb.bert.finetune.builtin import SPANS_NAME as BUILTIN_SPANS
from sharded_lamb.bert.finetune.builtin import builtin_dataset, builtin_spans
from sharded_lamb.bert.finetune.encoder import Encoder, read_encoder
from sharded_lamb.bert.finetune.report import best_rate, shown, table, without_nan
from sharded_lamb.bert.finetune.sentences import Sentences
from sharded_lamb.bert.finetune.spans import Spans
from sharded_lamb.bert.finetune.squad import SQUAD, SpanDataset, read_squad
from sharded_lamb.bert.finetune.tasks import GLUE, Dataset, Task, read
from sharded_lamb.bert.finetune.training import Problem, Settings, finetune
from sharded_lamb.bert.finetune.windows import Lengths
from sharded_lamb.bert.shards import write_atomically
from sharded_lamb.comm import devices
from sharded_lamb.recipes.training.checkpoint import check_writable

FILES = "files"
_WEIGHTS = ("trained", "random")
_SPAN_TASKS = (BUILTIN_SPANS, *SQUAD)
_MIN_LENGTH = 8
_MAX_LENGTH = 128
_PUBLISHED = Lengths(384, 128, 64)
"""Of models of 512 positions: `run_squad.py` of google-research/bert."""


@dataclass(frozen=True)
class Defaults:
    """The options of a task that are not given."""

    lrs: Sequence[float] = (3e-4,)
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 3
    batch: int = 32
    weights: Sequence[str] = ("trained",)


_DEFAULTS = {
    # One seed and two epochs: within a minute of two cores.
    BUILTIN: Defaults(seeds=(0,), epochs=2, weights=_WEIGHTS),
    BUILTIN_SPANS: Defaults(lrs=(3e-3,), seeds=(0,), epochs=2, weights=_WEIGHTS),
    # Devlin et al., arXiv 1810.04805, 4.2 and 4.3.
    "SQuAD-1.1": Defaults(lrs=(5e-5,)),
    "SQuAD-2.0": Defaults(lrs=(5e-5,), epochs=2, batch=48),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``finetune``."""
    parser.description = (
        "Fine-tunes a pretrained encoder on sentences, pairs of sentences or spans of text, for every learning rate "
        "and seed, and compares it with ways without a network and the same model from random weights."
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
        choices=[BUILTIN, BUILTIN_SPANS, *GLUE, *SQUAD, FILES],
        help="default: pairs of the built-in prose; a task of GLUE or SQuAD; or files with --columns and --label",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of the task's files, as published")
    parser.add_argument(
        "--train", type=Path, metavar="FILE", help="default: train.tsv of --data; SQuAD: train-v1.1.json"
    )
    parser.add_argument(
        "--dev",
        type=Path,
        metavar="FILE",
        help="default: dev.tsv of --data; MNLI: dev_matched.tsv; SQuAD: dev-v1.1.json",
    )
    parser.add_argument(
        "--columns", type=_listed, metavar="A[,B]", help="of text; numbers from 0 for files without a header"
    )
    parser.add_argument("--label", metavar="COLUMN", help="of the label")
    parser.add_argument(
        "--regression", action="store_true", default=None, help="labels are numbers (--task files)"
    )
    parser.add_argument(
        "--on-bad",
        default="error",
        choices=["error", "skip"],
        help="bad rows or questions: an error, or counted and left out",
    )
    parser.add_argument(
        "--weights",
        type=_listed,
        metavar="trained|random|trained,random",
        help="to start from; default: trained, and for the built-in tasks both",
    )
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "lamb"], help="default: adamw")
    parser.add_argument(
        "--lrs", type=_numbers, help="default: 3e-4; builtin-spans: 3e-3; SQuAD: 5e-5 (Devlin et al.)"
    )
    parser.add_argument("--seeds", type=_seeds, help="default: 0,1,2; the built-in tasks: 0")
    parser.add_argument("--epochs", type=_positive, help="default: 3; SQuAD-2.0 and the built-in tasks: 2")
    parser.add_argument("--batch", type=_positive, help="default: 32; SQuAD-2.0: 48")
    parser.add_argument(
        "--max-length", type=_positive, help="pieces; default: 128, spans: 384, at most the model's positions"
    )
    _add_span_arguments(parser)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps; default: 0.1")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON; default: finetune-TASK.json in --from"
    )


def _add_span_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride",
        type=_positive,
        help="pieces between windows of a context; default: a third of --max-length",
    )
    parser.add_argument(
        "--max-question", type=_positive, help="pieces; default: a sixth of --max-length; longer ones are bad"
    )
    parser.add_argument(
        "--null-threshold",
        type=float,
        help="no answer if its score exceeds the best span's by more than this; default: 0",
    )


def _listed(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def run(chosen: argparse.Namespace) -> int:
    """Fine-tunes, prints the table and writes the JSON. Returns 0.

    Raises:
        ValueError: bad settings, input or folder; see `tasks.read`, `squad.read_squad` and `encoder.read_encoder`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("finetune runs in one process: start it without torchrun")
    for name, value in asdict(_DEFAULTS.get(chosen.task, Defaults())).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    _check(chosen)
    dataset = _dataset(chosen)
    encoders = {kind: read_encoder(chosen.source, with_weights=kind == "trained") for kind in chosen.weights}
    problem = _problem(chosen, dataset, next(iter(encoders.values())))
    settings = Settings(chosen.optimizer, chosen.epochs, chosen.batch, chosen.warmup)
    device = devices.of_this_rank()
    out = chosen.out or chosen.source / f"finetune-{chosen.task}.json"
    check_writable(out.parent, f"--out {out}")  # before hours of training
    if out.is_dir():
        raise ValueError(f"--out {out}: expected a file, and it is a folder")
    runs = list(_runs(chosen, problem, encoders, settings, device))
    best = {
        kind: best_rate([row for row in runs if row["weights"] == kind], problem.metrics) for kind in encoders
    }
    result = {
        "about": {
            **about(device),
            "command": shlex.join(["python", "-m", "sharded_lamb.bert", *sys.argv[1:]]),
        },
        "task": problem.about,
        "settings": {**asdict(settings), "lrs": chosen.lrs, "seeds": chosen.seeds},
        "starts": {kind: encoder.source for kind, encoder in encoders.items()},
        "baselines": problem.baselines(),
        "best": best,
        "runs": runs,
    }
    print(table(result), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(without_nan(result), indent=1).encode())
    print(f"results in {out}", flush=True)
    return 0


def _check(chosen: argparse.Namespace) -> None:
    def unique(values: Sequence[float]) -> bool:
        return len({*values}) == len(values)

    weights = chosen.weights
    expectations = (
        ("--weights", weights, bool(weights) and {*weights} <= {*_WEIGHTS}, " or ".join(_WEIGHTS)),
        (
            "--lrs",
            chosen.lrs,
            all(0 < lr < math.inf for lr in chosen.lrs) and unique(chosen.lrs),
            "different positive numbers",
        ),
        (
            "--seeds",
            chosen.seeds,
            all(seed >= 0 for seed in chosen.seeds) and unique(chosen.seeds),
            "different numbers from 0",
        ),
        (
            "--null-threshold",
            chosen.null_threshold,
            math.isfinite(chosen.null_threshold or 0),
            "a finite number",
        ),
        ("--warmup", chosen.warmup, 0 <= chosen.warmup < 1, "a number in [0, 1)"),
    )
    for name, value, holds, expected in expectations:
        if not holds:
            raise ValueError(f"{name} {value}: expected {expected}")


def _dataset(chosen: argparse.Namespace) -> Dataset | SpanDataset:
    _refuse_useless(chosen)
    if chosen.task == BUILTIN:
        return builtin_dataset()
    if chosen.task == BUILTIN_SPANS:
        return builtin_spans()
    own = chosen.task == FILES
    if own and (chosen.columns is None or chosen.label is None):
        raise ValueError(f"--task {FILES} needs --columns and --label")
    if chosen.task in SQUAD:
        return read_squad(chosen.task, *_paths(chosen, *SQUAD[chosen.task]), chosen.on_bad)
    task = _own_task(chosen) if own else GLUE[chosen.task]
    return read(task, *_paths(chosen, "train.tsv", task.dev), chosen.on_bad)


def _refuse_useless(chosen: argparse.Namespace) -> None:
    """Raises if an option has no effect on the task."""
    is_builtin = chosen.task in (BUILTIN, BUILTIN_SPANS)
    takers = {
        ("columns", "label", "regression"): chosen.task == FILES,
        ("data", "train", "dev"): not is_builtin,
        ("stride", "max_question"): chosen.task in _SPAN_TASKS,
        ("null_threshold",): chosen.task in (BUILTIN_SPANS, "SQuAD-2.0"),
    }
    useless = [
        f"--{name.replace('_', '-')}"
        for names, are_taken in takers.items()
        for name in names
        if not are_taken and getattr(chosen, name) is not None
    ]
    if useless:
        raise ValueError(f"--task {chosen.task} takes no {', '.join(useless)}")


def _paths(chosen: argparse.Namespace, train: str, dev: str) -> tuple[Path, Path]:
    paths: list[Path] = []
    for name, path, default in (("train", chosen.train, train), ("dev", chosen.dev, dev)):
        if path is None and chosen.data is None:
            raise ValueError(f"--task {chosen.task} has no {name} split: give --data FOLDER or --{name} FILE")
        paths.append(path or chosen.data / default)
    return paths[0], paths[1]


def _own_task(chosen: argparse.Namespace) -> Task:
    is_regression = bool(chosen.regression)
    metrics = ("pearson", "spearman") if is_regression else ("accuracy",)
    return Task(FILES, tuple(chosen.columns), chosen.label, metrics, is_regression=is_regression)


def _problem(chosen: argparse.Namespace, dataset: Dataset | SpanDataset, encoder: Encoder) -> Problem:
    most = encoder.config.max_position_embeddings
    default = _PUBLISHED.window if isinstance(dataset, SpanDataset) else _MAX_LENGTH
    length = chosen.max_length or min(default, most)
    if not _MIN_LENGTH <= length <= most:
        raise ValueError(f"--max-length {length}: expected {_MIN_LENGTH} to the model's {most}")
    if isinstance(dataset, Dataset):
        return Sentences(dataset, encoder.tokenizer, length)
    lengths = Lengths(
        length,
        chosen.stride or length * _PUBLISHED.stride // _PUBLISHED.window,
        chosen.max_question or length * _PUBLISHED.question // _PUBLISHED.window,
    )
    return Spans(dataset, encoder.tokenizer, lengths, chosen.on_bad, chosen.null_threshold or 0.0)


def _runs(
    chosen: argparse.Namespace,
    problem: Problem,
    encoders: Mapping[str, Encoder],
    settings: Settings,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    for (kind, encoder), lr, seed in product(encoders.items(), chosen.lrs, chosen.seeds):
        found = finetune(encoder, problem, settings, lr, seed, device)
        row = {"weights": kind, "lr": lr, "seed": seed, **found}
        print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
        yield row
