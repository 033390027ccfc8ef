"""``python -m sharded_lamb COMMAND``: the package's commands, alone or under torchrun."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from sharded_lamb import __version__

COMMANDS = {
    "quickstart": ("bert.quickstart", "pretrain a small BERT on this machine, in minutes"),
    "pretrain": ("bert.pretrain", "pretrain BERT as a configuration says"),
    "configs": ("bert.shipped", "list the configurations that come with the package, or write one"),
    "verify": ("verify", "compare with a single-process fp64 LAMB on this machine"),
    "plan": ("plan.command", "memory, bytes and time for a model, up to thousands of ranks"),
    "bench": ("bench.command", "measure against other optimizers on this machine"),
    "preflight": (
        "preflight.command",
        "before a job: compare code, config and data of all ranks, and measure the network",
    ),
    "doctor": ("preflight.doctor", "what is installed and what this machine can run, to paste in a report"),
    "convert": ("convert.command", "convert checkpoints from and to other programs"),
    "inspect": ("convert.inspect", "show the content of a checkpoint and verify it"),
    "gpu-check": ("gpu_check.command", "check and measure everything on one GPU, in minutes"),
}
"""{command: (its module, help)}. A module has ``add_arguments(parser)`` and ``run(chosen)``; only that of the chosen
command is imported, so that help and typing errors do not wait for torch."""

COLLECTIVE = {"verify", "plan", "bench"}
"""Commands for which torchrun's ranks are joined: ``run(chosen, device)``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 passed, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="sharded-lamb", description="ZeRO-sharded LAMB with exact trust ratios."
    )
    parser.add_argument("--version", action="version", version=f"sharded-lamb {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    module: Any = None
    for name, (path, text) in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        if name == named:
            try:
                module = importlib.import_module(f"sharded_lamb.{path}")
            except ModuleNotFoundError as error:
                extra = path.partition(".")[0]
                print(f"sharded-lamb {name}: {error}; pip install 'sharded-lamb[{extra}]'", file=sys.stderr)
                return 2
            module.add_arguments(own)
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 2
    try:
        if chosen.command in COLLECTIVE:
            devices = importlib.import_module("sharded_lamb.comm.devices")
            return int(module.run(chosen, devices.join_ranks(chosen.device)))
        return int(module.run(chosen))
    except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        print(f"sharded-lamb {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sharded-lamb {chosen.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        _leave_ranks()


def _leave_ranks() -> None:
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
