"""``sharded-lamb pretrain``: the recipe on this machine's ranks; under torchrun or srun, on those."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from sharded_lamb.recipes.training import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sharded-lamb pretrain``."""
    parser.description = (
        "Pretrains BERT as a configuration says: a file, or the name of one that is shipped (sharded-lamb configs). "
        "Starts this machine's ranks; under torchrun or srun it is one of theirs."
    )
    config = parser.add_argument("--config", required=True, metavar="NAME|FILE")
    config.completer = shipped.completed  # type: ignore[attr-defined]  # argcomplete's name
    parser.add_argument(
        "--dry-run", action="store_true", help="print batch arithmetic, memory and steps; train nothing"
    )
    parser.add_argument(
        "--resume", metavar="auto|FOLDER", help="resume from the newest complete checkpoint, or a named one"
    )
    add_launching(parser)


def add_launching(parser: argparse.ArgumentParser) -> None:
    """Adds the options of starting ranks, and the settings."""
    parser.add_argument("--ranks", type=int, help="processes; default: one per GPU, or 2 on the CPU")
    parser.add_argument(
        "--max-restarts", type=int, default=2, help="of all ranks, if one dies; they resume bit-exactly"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")


def run(chosen: argparse.Namespace) -> int:
    """Returns the exit code of the recipe or of its ranks."""
    arguments = ["--config", chosen.config, *chosen.overrides]
    is_rank = "RANK" in os.environ
    if chosen.dry_run:
        world = os.environ["WORLD_SIZE"] if is_rank else str(_ranks(chosen.ranks))
        return _recipe([*arguments, "--dry-run", "--world-size", world])
    if is_rank:
        resume = [] if chosen.resume is None else ["--resume", chosen.resume]
        return _recipe([*arguments, *resume])
    return launch(chosen, chosen.config, chosen.overrides, chosen.resume)


def launch(chosen: argparse.Namespace, config: str, overrides: Sequence[str], resume: str | None) -> int:
    """Runs the recipe on ranks of this machine, ``chosen`` by `add_launching`. Returns its exit code; 130 after Ctrl-C.

    Raises:
        ValueError, OSError: there are no ranks; settings or the run to resume are not valid.
    """
    from sharded_lamb.bert.config import load_config
    from sharded_lamb.recipes.training import checkpoint
    from sharded_lamb.recipes.training.precision import resolved

    ranks = _ranks(chosen.ranks)
    # Rejects invalid settings and input once, before torchrun starts ranks, which it would restart.
    checkpoint.candidates(resolved(load_config(config, overrides)), resume)
    arguments = ["--config", config, *overrides]
    code = _recipe(["prepare", *arguments])
    if code:
        return code
    arguments += ["--resume", resume or "auto"]  # ranks that are restarted resume
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={chosen.max_restarts}", "-m", "sharded_lamb.bert", *arguments]
    with subprocess.Popen(command, env=environment) as ranks_of_torchrun:
        try:
            return ranks_of_torchrun.wait()
        except KeyboardInterrupt:  # the ranks got it too
            ranks_of_torchrun.wait()
            return 130


def _ranks(chosen: int | None) -> int:
    import torch  # not for help and completion

    if chosen is None:
        return torch.accelerator.device_count() if torch.accelerator.is_available() else 2
    if chosen < 1:
        raise ValueError(f"--ranks must be >= 1, got {chosen}")
    return chosen


def _recipe(arguments: Sequence[str]) -> int:
    from sharded_lamb.bert.__main__ import main

    return main(arguments)
