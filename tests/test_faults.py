"""Faults on purpose: what the variable may say, that points are where they are said to be, and what a fault does."""

import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb import ShardedLamb, faults
from sharded_lamb.faults import POINTS, VARIABLE, Fault, Injector, parse
from tests import training
from tests.harness import run_ranks

PACKAGE = Path(__file__).resolve().parent.parent / "sharded_lamb"


def test_the_grammar() -> None:
    assert parse("") == ()
    assert parse(
        "kill@backward:step=7:rank=1; slow@step:seconds=0.5:visit=3;disk-full@checkpoint-write;"
    ) == (
        Fault("kill", "backward", rank=1, step=7),
        Fault("slow", "step", visit=3, seconds=0.5),
        Fault("full", "checkpoint-write"),
    )
    assert parse("hang@all-reduce:attempt=any") == (Fault("hang", "all-reduce", attempt=None),)
    assert parse("freeze@pass-1:delay=0.25:attempt=2") == (Fault("freeze", "pass-1", attempt=2, delay=0.25),)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kill", "expected ACTION@POINT"),
        ("burn@step", "expected ACTION@POINT with one of kill, freeze"),
        ("kill@stap", "did you mean 'step'"),
        ("nan@step", "nan needs the point gradient"),
        ("full@step", "full needs a point that writes: checkpoint-"),
        ("slow@step", "slow needs seconds"),
        ("kill@step:seconds=1", "expected key=value, once each of attempt, delay, rank, step, visit"),
        ("kill@step:rank=1:rank=2", "'rank=2': expected key=value, once each"),
        ("kill@step:rank=one", "rank=one: expected a whole number"),
        ("kill@step:visit=0", "visit=0: expected a whole number from 1"),
        ("kill@step:attempt=all", 'attempt=all: expected a whole number or "any"'),
        ("kill@step:delay=-1", "delay=-1: expected seconds"),
    ],
)
def test_mistakes_show_the_variable_and_the_part(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="SHARDED_LAMB_FAULT=") as refused:
        parse(f"kill@pass-2; {text}")
    assert why in str(refused.value)
    assert repr(text) in str(refused.value)


def points_called() -> set[str]:
    """The names that the package's modules pass to `faults.point`, or to what calls it by a parameter named fault."""
    results = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "point"
            ):
                results |= {
                    a.value
                    for a in ast.walk(node)
                    if isinstance(a, ast.Constant) and isinstance(a.value, str)
                }
    return results


def test_every_point_is_somewhere() -> None:
    assert points_called() & {*POINTS} == {*POINTS}


def injector(text: str, **environ: str) -> Injector | None:
    return Injector.of({VARIABLE: text, **environ})


def test_whose_fault_it_is() -> None:
    assert injector("") is None
    assert injector("kill@step:rank=1") is None
    assert injector("kill@step:rank=1", RANK="1") is not None
    assert injector("kill@step", TORCHELASTIC_RESTART_COUNT="1") is None
    assert injector("kill@step:attempt=1", TORCHELASTIC_RESTART_COUNT="1") is not None
    assert injector("kill@step:attempt=any", TORCHELASTIC_RESTART_COUNT="5") is not None


def test_when_it_happens() -> None:
    here = injector("nan@gradient:step=3:visit=2")
    assert here is not None
    warnings_seen = []
    for step in (2, 3, 3, 3, 4):
        here.passed("step", step)
        warnings_seen.append(here.passed("gradient", None))
    assert warnings_seen == [False, False, True, False, False]


def test_a_loop_that_never_says_its_step_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    here = injector("nan@gradient:step=3")
    assert here is not None
    for _ in range(5):
        assert here.passed("gradient", None) is False
    assert caplog.text.count("this loop does not report its steps") == 1


def test_ranks_are_read_only_for_a_fault() -> None:
    assert injector("", RANK="") is None
    assert injector("kill@step", RANK="", TORCHELASTIC_RESTART_COUNT="") is not None


def test_a_full_disk_is_the_systems_error() -> None:
    here = injector("full@checkpoint-write")
    assert here is not None
    with pytest.raises(OSError, match="No space left on device") as full:
        here.passed("checkpoint-write", None)
    assert full.value.errno == errno.ENOSPC


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    faults.injector.cache_clear()
    yield
    faults.injector.cache_clear()


@pytest.mark.usefixtures("unset")
def test_the_variable_is_read_once_and_unset_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults.point("step", step=1) is False
    monkeypatch.setenv(VARIABLE, "full@checkpoint-write")
    assert faults.point("checkpoint-write") is False
    faults.injector.cache_clear()
    with pytest.raises(OSError, match=VARIABLE):
        faults.point("checkpoint: write")


def with_a_nan(rank: int, stage: Any) -> list[int]:
    """Skipped steps after each of three, in the second of which rank 1's gradient is made NaN."""
    os.environ[VARIABLE] = "nan@gradient:rank=1:visit=2" if stage == 2 else "nan@gradient:visit=2"
    faults.injector.cache_clear()
    params = training.parameters()
    opt = ShardedLamb(list(params.items()), stage=stage)
    skipped = []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in params.items()}
        gradients = training.own_gradients(rank if stage == 2 else 0, step)
        for name, p in params.items():
            p.grad = gradients[name]
        opt.step()
        opt.zero_grad()
        skipped.append(opt.skipped_steps)
        moved = any(not torch.equal(p, before[name]) for name, p in params.items())
        assert moved == (step != 1)
    del os.environ[VARIABLE]
    faults.injector.cache_clear()
    return skipped


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_made_nan_is_a_step_that_every_rank_skips(stage: int) -> None:
    assert run_ranks(2, with_a_nan, stage) == [[0, 1, 1]] * 2
