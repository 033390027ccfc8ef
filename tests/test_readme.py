"""What README.md says is run and looked up: snippets, options, variants, commands."""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb import VARIANTS, ShardedLamb
from sharded_lamb.__main__ import main
from sharded_lamb.hyperparams import DEFAULTS
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def table_rows(header: str) -> list[str]:
    table = README.split(header, 1)[1].split("\n\n", 1)[0]
    return [
        name for row in table.splitlines()[2:] for name in re.findall(r"`\"?(\w+)\"?`", row.split("|")[1])
    ]


def run_snippets(rank: int) -> dict[str, float]:
    space: dict[str, Any] = {}
    for snippet in snippets("python"):
        # The harness has joined the ranks already, as torchrun's user has after the first lines.
        code = snippet.replace("dist.init_process_group()", "pass")
        exec(compile(code, "README.md", "exec"), space)
    return dict(space["optimizer"].memory())


def test_python_snippets_run_on_two_ranks() -> None:
    assert len(snippets("python")) == 3
    for memory in run_ranks(2, run_snippets):
        assert memory["moments"] > 0


def test_options_and_variants_are_the_real_ones() -> None:
    assert table_rows("| option | default | meaning |") == ["variant", *DEFAULTS]
    assert sorted(table_rows("| variant | what it is |")) == sorted(VARIANTS)


def test_members_named_for_sharded_lamb_exist() -> None:
    line = README.split("Only on `ShardedLamb`:", 1)[1].split("`help(", 1)[0]
    keywords, members = line.split("methods", 1)
    for name in re.findall(r"`(\w+)[=(`]", keywords):
        assert name in inspect.signature(ShardedLamb.__init__).parameters, name
    for name in re.findall(r"`(\w+)[(`]", members):
        assert hasattr(ShardedLamb, name), name


@pytest.mark.parametrize("command", re.findall(r"^launch/\S+", README, flags=re.MULTILINE))
def test_commands_exist(command: str) -> None:
    assert (ROOT / command).stat().st_mode & 0o111, f"{command} is not executable"


@pytest.mark.parametrize(
    "line", re.findall(r"^torchrun .*-m sharded_lamb (verify.*)$", README, flags=re.MULTILINE)
)
def test_verify_commands_parse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse leaves with 2 on an option that is not there; --help after the others leaves with 0."""
    arguments = shlex.split(line, comments=True)
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    assert left.value.code == 0, capsys.readouterr().err
