"""``python -m sharded_lamb COMMAND``: the package's commands, alone or under torchrun."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from sharded_lamb import __version__

COMMANDS = {
    "quickstart": ("bert.quickstart", "pretrain a small BERT on this machine, in minutes"),
    "pretrain": ("bert.pretrain", "pretrain BERT as a configuration says"),
    "finetune": ("bert.finetune.command", "fine-tune on a task and report its metrics"),
    "vision": ("recipes.vision.command", "train an image classifier, or compare optimizers on digits"),
    "configs": (
        "recipes.training.shipped",
        "list the configurations that come with the package, or write one",
    ),
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


class HelpWithDefaults(argparse.HelpFormatter):
    """Adds its default to the help of every option that has one and does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        is_given = default is not None and default is not False and default not in (argparse.SUPPRESS, [])
        has_default = action.option_strings and is_given
        if not text or not has_default or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


COLLECTIVE = {"verify", "plan", "bench"}
"""Commands for which torchrun's ranks are joined: ``run(chosen, device)``."""


EXTRAS = {"bert": "bert", "recipes.training": "bert", "recipes.vision": "vision"}
"""{package of the table's modules: the extra that has its dependencies}."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 passed, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose locale may have no UTF-8
            stream.reconfigure(errors="backslashreplace")
    is_completing = "_ARGCOMPLETE" in os.environ  # by the function of register-python-argcomplete
    words = os.environ.get("COMP_LINE", "").split()[1:] if is_completing else arguments
    named = next((word for word in words if not word.startswith("-")), None)
    try:
        parser, module = _parser(named)
        if is_completing:
            importlib.import_module("argcomplete").autocomplete(parser)
        chosen = parser.parse_args(arguments)
        if chosen.command is None:
            parser.print_help()
            return 2
        if chosen.command in COLLECTIVE:
            devices = importlib.import_module("sharded_lamb.comm.devices")
            return int(module.run(chosen, devices.join_ranks(chosen.device)))
        return int(module.run(chosen))
    except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        extra = _extra(named) if isinstance(error, ModuleNotFoundError) else None
        remedy = f"; pip install 'sharded-lamb[{extra}]'" if extra else ""
        print(f"sharded-lamb {named}: {error}{remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sharded-lamb {named}: interrupted", file=sys.stderr)
        return 130
    finally:
        _leave_ranks()


def _parser(named: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """The parser with the arguments of the command ``named``, and that command's module (None: no such command)."""
    parser = argparse.ArgumentParser(
        prog="sharded-lamb", description="ZeRO-sharded LAMB with exact trust ratios."
    )
    parser.add_argument("--version", action="version", version=f"sharded-lamb {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    module: Any = None
    for name, (path, text) in COMMANDS.items():
        own = commands.add_parser(name, help=text, formatter_class=HelpWithDefaults)
        if name == named:
            module = importlib.import_module(f"sharded_lamb.{path}")
            module.add_arguments(own)
    return parser, module


def _extra(named: str | None) -> str | None:
    """The extra that the command ``named`` needs."""
    module = COMMANDS[named][0] if named in COMMANDS else ""
    return next((extra for package, extra in EXTRAS.items() if module.startswith(f"{package}.")), None)


def _leave_ranks() -> None:
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
