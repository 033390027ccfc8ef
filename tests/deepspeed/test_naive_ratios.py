"""A small version of the measurement in the README."""

import argparse
from pathlib import Path

import pytest

from tests.harness import run_ranks


def measure(rank: int, stage: int) -> tuple[dict[str, float], dict[str, float]]:
    from sharded_lamb.bench.naive_ratios import quotients

    arguments = argparse.Namespace(layers=1, hidden=64, batch=1, steps=3, seed=0)
    return quotients(stage, True, arguments), quotients(stage, False, arguments)


@pytest.mark.parametrize("stage", [2, 3])
def test_naive_ratios_are_wrong_and_ours_exact(stage: int) -> None:
    naive, ours = run_ranks(2, measure, stage, timeout=300)[0]
    assert naive.keys() == ours.keys()
    assert max(naive.values()) > 2 * min(naive.values())
    assert list(ours.values()) == pytest.approx([1.0] * len(ours), rel=1e-4)


def test_the_picture(tmp_path: Path) -> None:
    from sharded_lamb.bench.naive_ratios import draw, summarize

    draw(
        {"naive": summarize({"a": 0.5, "b": 40.0}), "ShardedLamb": summarize({"a": 1.0})}, tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_table() -> None:
    from sharded_lamb.bench.naive_ratios import summarize, table

    row = summarize({"a": 0.5, "b": 1.05, "c": 40.0})
    assert row["least_of"] == "a"
    assert row["within_10_percent"] == pytest.approx(1 / 3)
    assert "| x | 0.50x | 1.05x | 40.00x | 33% |" in table({"x": row})
