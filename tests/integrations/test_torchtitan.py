"""torchtitan's OptimizersContainer makes ShardedLamb over an FSDP2 model on two ranks."""

import importlib.util
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.integrations import cases, torchtitan_cases
from tests.training import assert_follows, assert_same_bits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason="needs torchtitan: pip install --no-deps torchtitan tyro spmd-types docstring-parser",
)


def test_trains_with_groups_of_patterns_and_clips() -> None:
    first, second = run_ranks(cases.WORLD, torchtitan_cases.fit)
    assert_same_bits(first, second)
    expected = cases.oracle(cases.data(4), range(4), no_decay=torchtitan_cases.NO_DECAY, max_grad_norm=0.5)
    assert_follows(first, expected)


def test_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = run_ranks(cases.WORLD, torchtitan_cases.fit)
    for weights in run_ranks(cases.WORLD, torchtitan_cases.resumed, tmp_path):
        assert_same_bits(weights, whole)


def test_other_names_are_torchtitans() -> None:
    assert run_ranks(cases.WORLD, torchtitan_cases.adamw) == ["AdamW"] * cases.WORLD
