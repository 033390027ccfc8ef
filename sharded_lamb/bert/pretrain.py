"""``sharded-lamb pretrain``: the recipe on this machine's ranks; under torchrun or srun, on those."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

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
    shipped.add_overrides(parser)


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
    """Runs the recipe on ranks of this machine, ``chosen`` by `add_launching`.

    Returns:
        Its exit code; 130 after Ctrl-C; `checkpoint.requeue_exit_code` after SIGTERM or SIGUSR1, with which ranks save.

    Raises:
        ValueError, OSError: there are no ranks; settings or the run to resume are not valid.
    """
    from sharded_lamb.bert.config import load_config
    from sharded_lamb.recipes.training import checkpoint
    from sharded_lamb.recipes.training.precision import resolved

    ranks = _ranks(chosen.ranks)
    # Rejects invalid settings and input once, before torchrun starts ranks, which it would restart.
    settings = resolved(load_config(config, overrides))
    for phase in settings.phases:
        settings.plan_batches(phase, ranks)
    checkpoint.candidates(settings, resume)
    checkpoint.check_writable(Path(settings.run_dir), f"run_dir={settings.run_dir}")
    arguments = ["--config", config, *overrides]
    code = _recipe(["prepare", *arguments])
    if code:
        return code
    arguments += ["--resume", resume or "auto"]  # ranks that are restarted resume
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100",  # s in which ranks save after a signal; torch 2.11 has 30
        **os.environ,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # torchrun hands these signals to its ranks.
    command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    command += [f"--max-restarts={chosen.max_restarts}", "-m", "sharded_lamb.bert", *arguments]
    with subprocess.Popen(command, env=environment) as torchrun:
        code, stopped = _waited(torchrun)
    return settings.checkpoint.requeue_exit_code if stopped else code


def _waited(torchrun: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """(its exit code, whether SIGTERM or SIGUSR1 stopped it). It gets the first of these signals."""
    stopped: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not stopped:  # a second one would end the wait for the ranks' saves
            torchrun.send_signal(number)
        stopped.append(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return torchrun.wait(), bool(stopped)
    except KeyboardInterrupt:  # the ranks got it too
        torchrun.wait()
        return 130, False
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
