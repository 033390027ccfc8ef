"""``sharded-lamb vision``, and ``python -m sharded_lamb.recipes.vision``: train as configured, or compare on digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from sharded_lamb.recipes.training import shipped

_OUT = "runs/vision-digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sharded-lamb vision``."""
    parser.description = (
        "Trains a timm model, or a small ViT, with ShardedLamb as a configuration says: a file, or the name of one "
        "that is shipped (sharded-lamb configs). Under torchrun this process is one of its ranks. Default: digits."
    )
    commands = parser.add_subparsers(dest="task", metavar="train|digits")
    train = commands.add_parser("train", help="as a configuration says")
    config = train.add_argument("--config", required=True, metavar="NAME|FILE")
    config.completer = shipped.completed  # type: ignore[attr-defined]  # argcomplete's name
    train.add_argument(
        "--resume", metavar="auto|FOLDER", help="resume from the newest complete checkpoint, or a named one"
    )
    shipped.add_overrides(train)
    digits = commands.add_parser(
        "digits", help="LAMB beside AdamW on scikit-learn's digits, both tuned: no data, no timm, two minutes"
    )
    digits.add_argument("--out", type=Path, default=Path(_OUT), metavar="FOLDER", help="default: %(default)s")


def run(chosen: argparse.Namespace) -> int:
    """The exit code: 0 done, `checkpoint.requeue_exit_code` to be restarted after a signal.

    Raises:
        ValueError, OSError: bad settings or input.
    """
    from sharded_lamb.recipes.training.config_io import load_config
    from sharded_lamb.recipes.training.ranks import Ranks
    from sharded_lamb.recipes.vision.config import VisionConfig
    from sharded_lamb.recipes.vision.digits import compare
    from sharded_lamb.recipes.vision.train import run as train

    if chosen.task != "train":
        compare(Path(_OUT) if chosen.task is None else chosen.out, Ranks.start())
        return 0
    shipped.check_user(chosen.config, "vision")
    config = load_config(VisionConfig, chosen.config, chosen.overrides)
    ranks = Ranks.start()
    return train(config, chosen.resume, ranks).exit_code(config, ranks)
