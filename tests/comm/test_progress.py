"""The bars of commands: on a terminal, on the first rank, beside what they print."""

import io
import sys
from pathlib import Path

import pytest
import torch

from sharded_lamb import Lamb, checkpoint
from sharded_lamb.__main__ import main
from sharded_lamb.comm.progress import with_progress
from tests.harness import run_ranks


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(is_terminal: bool = True) -> tuple[list[int], str]:
    """The items that pass, and what is written to stderr."""
    with pytest.MonkeyPatch.context() as patch:
        said = Terminal() if is_terminal else io.StringIO()
        patch.setattr(sys, "stderr", said)
        return list(with_progress([3, 1, 2], "count", lambda item: f"item {item}")), said.getvalue()


def drawn_on(rank: int) -> tuple[list[int], str]:
    return drawn()


def test_a_bar_counts_names_what_is_in_progress_and_is_wiped() -> None:
    items, said = drawn()
    assert items == [3, 1, 2]
    first, *_, last = said.strip("\r").split("\r")
    assert first.startswith("count:   0%")
    assert "0/3" in said
    assert "item 3" in said
    assert last.strip() == ""


def test_without_a_terminal_or_without_tqdm_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(is_terminal=False) == ([3, 1, 2], "")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert drawn() == ([3, 1, 2], "")


def test_only_the_first_rank_draws() -> None:
    (first, said), second = run_ranks(2, drawn_on)
    assert first == [3, 1, 2]
    assert "count" in said
    assert second == ([3, 1, 2], "")


@pytest.mark.parametrize(
    ("command", "bars"),
    [
        (["verify", "--device", "cpu", "--steps", "2"], ["verify"]),
        (["plan", "--shapes", "tiny", "--world-sizes", "2"], ["plan"]),
        (["inspect", "saved", "--check"], ["check", "inspect"]),
        (["convert", "--from", "sharded_lamb", "--to", "lamb", "saved", "whole.pt"], ["convert"]),
        (
            ["bench", "host", "--device", "cpu", "--tensors", "2", "--rounds", "1", "--iterations", "1"],
            ["bench"],
        ),
    ],
    ids=lambda value: value[0],
)
def test_commands_that_take_seconds_draw(
    command: list[str],
    bars: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "saved" in command:
        model = torch.nn.Linear(2, 2)
        checkpoint.save("saved", model, Lamb(model.named_parameters(), lr=0.01))
    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    assert main(command) == 0, said.getvalue()
    for bar in bars:
        assert f"\r{bar}:   0%" in said.getvalue()
    assert "%|" not in capsys.readouterr().out
