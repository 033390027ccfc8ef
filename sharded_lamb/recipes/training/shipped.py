"""``sharded-lamb configs``: the configurations that the package ships, for the recipe and for DeepSpeed."""

import argparse
import re
import textwrap
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """Of the recipe's, then of DeepSpeed's: ``bert-base``, ``deepspeed/zero1``, …"""
    recipe = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return recipe + sorted(f"deepspeed/{path.stem}" for path in (FOLDER / "deepspeed").glob("*.json"))


USERS = {"bert": "`sharded-lamb pretrain`", "vision": "`sharded-lamb vision train`", "deepspeed": "DeepSpeed"}
"""{how names begin: who reads the configurations}."""


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the argument ``overrides``: words ``key=value``, before, between and after options.

    argparse fills an argument of any number of words from the first of their places, and calls others unknown.
    """
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parse = parser.parse_known_args

    def parse_all(*arguments: Any) -> tuple[argparse.Namespace, list[str]]:
        chosen, rest = parse(*arguments)
        further = [word for word in rest if "=" in word and not word.startswith("-")]
        chosen.overrides = [*chosen.overrides, *further]
        return chosen, [word for word in rest if word not in further]

    parser.parse_known_args = parse_all  # type: ignore[method-assign,assignment]


def check_user(config: str | Path, family: str) -> None:
    """Raises ValueError if ``config`` is the name of a shipped configuration of another of `USERS` than ``family``."""
    name = str(config)
    own = re.split("[-/]", name)[0]
    if own != family and own in USERS and name in names() and not Path(name).exists():
        raise ValueError(f"--config {name}: {name} is a configuration of {USERS[own]}")


def path_of(name: str) -> Path:
    """The file of a shipped configuration.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"no configuration {name!r} is shipped; there are: {', '.join(names())}")
    return FOLDER / f"{name}{'.json' if name.startswith('deepspeed/') else '.yaml'}"


def completed(prefix: str, **_: object) -> list[str]:
    """For argcomplete: every name, and YAML files that begin with ``prefix``."""
    from argcomplete.completers import FilesCompleter

    return [*names(), *FilesCompleter(("yaml", "yml"))(prefix)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sharded-lamb configs``."""
    parser.description = "Lists the configurations that come with the package, or writes one to edit it."
    write = parser.add_argument("--write", metavar="NAME", help="copy it, and the files it is based on, here")
    write.completer = lambda **_: names()  # type: ignore[attr-defined]  # argcomplete's name
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="default: this folder")


def run(chosen: argparse.Namespace) -> int:
    """Returns 0.

    Raises:
        ValueError: an unknown name, or a file is there already.
    """
    if chosen.write is None:
        for name in names():
            print(f"{name:<32} {_summary(path_of(name))}".rstrip())
        return 0
    for path in _with_bases(path_of(chosen.write)):
        target = chosen.to / path.name
        if target.exists():
            raise ValueError(f"{target} exists already: it is not overwritten")
        chosen.to.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        print(target)
    return 0


def _summary(path: Path) -> str:
    """The beginning of a YAML file's first comment."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return textwrap.shorten(" ".join(line.lstrip("# ") for line in comment), 90, placeholder=" …")


def _with_bases(path: Path) -> list[Path]:
    """The file and, in turn, those named by ``base``."""
    if path.suffix != ".yaml":
        return [path]
    base = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("base")
    return [path] if base is None else [path, *_with_bases(path.parent / str(base))]
