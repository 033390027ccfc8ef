"""``sharded-lamb quickstart``: pretrains a small BERT on this machine, in minutes, and draws it."""

import argparse
from datetime import datetime

from sharded_lamb.bert.pretrain import add_launching, launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sharded-lamb quickstart``."""
    parser.description = (
        "Pretrains a small BERT on the English prose in every CPython. Prints `run: FOLDER` as its last line."
    )
    add_launching(parser)


def run(chosen: argparse.Namespace) -> int:
    """Returns the exit code of the ranks."""
    run_dir = f"runs/bert-quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    for setting in chosen.overrides:
        run_dir = setting.removeprefix("run_dir=") if setting.startswith("run_dir=") else run_dir
    code = launch(chosen, "bert-quickstart", [*chosen.overrides, f"run_dir={run_dir}"], None)
    if code == 0:
        print(f"run: {run_dir}", flush=True)
    return code
