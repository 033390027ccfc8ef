"""Runs unmodified scripts with ``"type": "ShardedLamb"`` in their DeepSpeed config.

``sharded-lamb-deepspeed [deepspeed's options] train.py …`` is the ``deepspeed`` launcher, with all its options; its
ranks run ``python -m sharded_lamb.deepspeed train.py …``: the script, in a process where the type is registered.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = (
    "usage: python -m sharded_lamb.deepspeed SCRIPT [ARGUMENT ...]\n"
    "       python -m sharded_lamb.deepspeed -m MODULE [ARGUMENT ...]\n"
    'Runs a program with "type": "ShardedLamb" registered. Start the ranks with torchrun or the deepspeed launcher.'
)


def run_script(arguments: Sequence[str]) -> int:
    """Run a script or, after ``-m``, a module as ``__main__``. Returns 2 on wrong usage, else 0.

    The launcher puts ``--local_rank=N`` before the script; it is passed on to the script.
    """
    rest = list(arguments)
    from_launcher = []
    while rest and rest[0].startswith(("--local_rank", "--local-rank")):
        from_launcher.append(rest.pop(0))
    as_module = rest[:1] == ["-m"]
    target = rest[1:2] if as_module else rest[:1]
    if not target or target[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    sys.argv = [target[0], *from_launcher, *rest[2 if as_module else 1 :]]
    if as_module:
        sys.path.insert(0, "")
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        return 0
    if not Path(target[0]).exists():
        print(f"sharded_lamb.deepspeed: there is no script {target[0]!r}\n{USAGE}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(target[0]).resolve().parent))
    runpy.run_path(target[0], run_name="__main__")
    return 0


def launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of the ``deepspeed`` launcher: this package's module, with the user's script as its argument.

    Raises:
        ValueError: ``--no_python``: no Python process in which the type can be registered.
    """
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(list(arguments))
    if parsed.no_python:
        raise ValueError(
            "--no_python: the program must run in Python, where the optimizer's type is registered; remove the option"
        )
    options = list(arguments[: len(arguments) - len(parsed.user_args) - 1])
    program = ["-m", parsed.user_script] if parsed.module else [parsed.user_script]
    rest = [option for option in options if option != "--module"]
    return [*rest, "--module", "sharded_lamb.deepspeed", *program, *parsed.user_args]


def launch(arguments: Sequence[str] | None = None) -> int:
    """``sharded-lamb-deepspeed``: DeepSpeed's launcher with its own options. Returns the exit code."""
    from deepspeed.launcher.runner import main

    try:
        options = launcher_arguments(sys.argv[1:] if arguments is None else list(arguments))
    except ValueError as error:
        print(f"sharded-lamb-deepspeed: {error}", file=sys.stderr)
        return 2
    main(options)
    return 0
