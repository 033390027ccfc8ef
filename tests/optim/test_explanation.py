"""Planted causes of divergence, and what `explain` says of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.optim.explanation import CAUSES, Explanation
from sharded_lamb.watchdog.diagnosis import Ledger, Report, ended_by
from sharded_lamb.watchdog.stack_probe import WAITS, Member
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

WORLD = 2
NAN = float("nan")


def by_cause(explanation: Explanation) -> dict[str, list[str]]:
    return {finding.cause: list(finding.parameters) for finding in explanation.findings}


def bad_step(
    opt: ShardedLamb, params: dict[str, Parameter], stage: int, rank: int, step: int, *bad: str
) -> None:
    """In stage 2 the gradients of ``bad`` are non-finite on rank 1 only."""
    grads = training.own_gradients(0 if stage == 1 else rank, step)
    for name in bad if stage == 1 or rank == 1 else ():
        grad = grads[name]
        assert grad is not None
        grad.view(-1)[-1] = NAN
    (training.give if stage == 1 else training.backward)(params, grads)
    opt.step()
    opt.zero_grad()


def skips(rank: int, stage: int) -> tuple[Explanation, str]:
    """Two steps, then a skip for one parameter and, in a row, two for others. The first one counts."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.02, stage=stage, bucket_mb=0.004)
    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=range(2))
    bad_step(opt, params, stage, rank, 2, "fc.weight")
    bad_step(opt, params, stage, rank, 3, "norm.bias", "embed.weight")
    bad_step(opt, params, stage, rank, 4, "scale")
    return opt.explain(), str(opt.explain())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_bad_parameter_of_a_row_of_skips(stage: int) -> None:
    oracle = training.oracle_of_ranks(WORLD, range(2), lr=0.02)
    results = run_ranks(WORLD, skips, stage)
    assert len({text for _, text in results}) == 1
    for explanation, text in results:
        (finding,) = explanation.findings
        assert (finding.cause, list(finding.parameters)) == ("non-finite gradient", ["fc.weight"])
        assert finding.parameters["fc.weight"] == pytest.approx(oracle.norms["fc.weight"], rel=1e-5)
        assert "warmup" in finding.remedy
        assert "max_grad_norm" in finding.remedy
        assert f"‖w‖ {oracle.norms['fc.weight'][0]:.3g}, ‖u‖ " in text


def skip_until_it_raises(rank: int) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.02, stage=2, max_consecutive_skips=2)
    for step, bad in enumerate((["scale"], ["fc.bias"], [])):
        bad_step(opt, params, 2, rank, step, *bad)


def test_too_many_skips_are_explained() -> None:
    for kind, message in run_ranks_expecting_errors(WORLD, skip_until_it_raises).values():
        assert kind == "DivergedError"
        assert "the first bad parameter of the last one is 'fc.bias'" in message
        assert "\n  scale: no step has updated it" in message
        assert "Try: a lower lr" in message


def test_the_watchdogs_diagnosis_contains_it() -> None:
    p = Parameter(torch.ones(3))
    opt = ShardedLamb([("head.weight", p)], max_consecutive_skips=1)
    p.grad = torch.full((3,), NAN)
    opt.step()
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    waits = Report(1, 9.0, 5.0, "step 1", "a.py:1 f", WAITS)
    left = replace(waits, ended=ended_by(caught.value))
    ledger = Ledger([Member(rank, "h", rank, "elsewhere") for rank in range(2)], silent_s=3.0, timeout_s=9.0)
    for rank, report in enumerate((waits, left)):
        ledger.record(rank, Report.loaded(report.dumped()), 0.0)
    diagnosis = ledger.diagnosis(1.0)
    assert diagnosis is not None
    assert diagnosis.startswith("rank 1 no longer responds")
    assert "non-finite gradient (1 parameter)" in diagnosis
    assert "head.weight: no step has updated it" in diagnosis


def one_skip_more(rank: int) -> list[dict[str, list[str]]]:
    """A good step ends a row of skips: the next row has a first skip of its own."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.02, stage=2)
    found = []
    for step, bad in enumerate(([*params], [], ["scale"])):
        bad_step(opt, params, 2, rank, step, *(name for name in bad if params[name].numel()))
        found.append(by_cause(opt.explain()))
    return found


def test_a_row_of_skips_ends() -> None:
    for first, second, third in run_ranks(WORLD, one_skip_more):
        assert first == {"non-finite gradient": [name for name in training.SHAPES if name != "empty"]}
        assert "non-finite gradient" not in second
        assert third == {"non-finite gradient": ["scale"]}


def test_a_step_that_gradscaler_skips() -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items(), max_consecutive_skips=1)
    training.give(params, training.own_gradients(0, 0))
    opt.found_inf = torch.ones(())
    opt.step()
    assert by_cause(opt.explain()) == {"skipped without a non-finite gradient": []}
    with pytest.raises(RuntimeError, match="init_scale") as caught:
        opt.step()
    assert "bad parameter" not in str(caught.value)


Planted = Callable[[dict[str, Parameter]], None]


def explained(plant: Planted = lambda params: None, steps: int = 1, **options: Any) -> Explanation:
    """After steps of `Lamb` with ordinary gradients; ``plant`` changes weights, and gradients of the last step."""
    params = {f"{i}.weight": Parameter(training.draw((9, 9), i)) for i in range(5)}
    params["0.bias"] = Parameter(training.draw((9,), "bias"))
    opt = Lamb(params.items(), **{"lr": 1e-3, **options})
    for step in range(steps):
        for name, p in params.items():
            p.grad = training.draw(tuple(p.shape), name, step)
        if step == steps - 1:
            with torch.no_grad():
                plant(params)
        opt.step()
    return opt.explain()


def times(name: str, weight: float = 1.0, gradient: float = 1.0) -> Planted:
    def plant(params: dict[str, Parameter]) -> None:
        params[name] *= weight
        params[name].grad *= gradient  # type: ignore[operator]

    return plant


@pytest.mark.parametrize(
    ("expected", "explanation"),
    [
        ({}, lambda: explained()),
        ({}, lambda: explained(steps=3)),
        ({"gradient jumped": ["1.weight"]}, lambda: explained(times("1.weight", gradient=50.0), steps=3)),
        ({"ratio 1: ‖w‖ is 0": ["2.weight"]}, lambda: explained(times("2.weight", weight=0.0))),
        (
            {"ratio 1: ‖u‖ is 0": ["2.weight"]},
            lambda: explained(times("2.weight", gradient=0.0), weight_decay=0.0),
        ),
        ({"update is decay alone": ["3.weight"]}, lambda: explained(times("3.weight", gradient=1e-10))),
        (
            {"ratio of a bias or norm far from the others": ["0.bias"]},
            lambda: explained(times("0.bias", weight=1e-4)),
        ),
        ({"ratio far from the others": ["4.weight"]}, lambda: explained(times("4.weight", weight=1e-4))),
        (
            {"ratio at trust_clip": ["4.weight"]},
            lambda: explained(times("4.weight", 50.0), trust_clip=(0.01, 10.0)),
        ),
        (
            {"ratio at trust_clip": ["4.weight"]},
            lambda: explained(times("4.weight", 0.02), trust_clip=(0.1, 10.0)),
        ),
        (
            {"norm at weight_norm_clip": ["4.weight"]},
            lambda: explained(times("4.weight", 5.0), weight_norm_clip=(0.0, 20.0)),
        ),
        (
            {"ratio 1: excluded": ["0.bias"]},
            lambda: explained(times("0.bias", 1e-4), exclude_from_layer_adaptation=["bias$"]),
        ),
        (
            {"ratio 1: excluded as from decay": ["0.bias"]},
            lambda: explained(exclude_from_weight_decay=["0.bias"], exclude_from_layer_adaptation=None),
        ),
        (
            {"ratio 1: no decay": ["0.bias"]},
            lambda: explained(
                exclude_from_weight_decay=["bias$"],
                exclude_from_layer_adaptation=[],
                adapt_without_decay=False,
            ),
        ),
        ({"non-finite gradient": ["1.weight"]}, lambda: explained(times("1.weight", gradient=NAN), steps=2)),
        ({"non-finite weight": ["1.weight"]}, lambda: explained(times("1.weight", weight=NAN), steps=2)),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_planted_causes(expected: dict[str, list[str]], explanation: Callable[[], Explanation]) -> None:
    found = explanation()
    assert by_cause(found) == expected
    for finding in found.findings:
        assert finding.cause in str(found)
        assert finding.remedy in str(found)


def test_a_loss_of_nan_and_norms_of_the_step_before() -> None:
    def plant(params: dict[str, Parameter]) -> None:
        for p in params.values():
            p.grad.fill_(NAN)  # type: ignore[union-attr]

    found, healthy = explained(plant, steps=2), explained()
    assert by_cause(found)["all gradients non-finite"] == [*(f"{i}.weight" for i in range(5)), "0.bias"]
    text = str(found)
    assert text.count("‖w‖") == 5  # a text names five
    assert text.endswith("and 1 more")
    assert str(healthy) == "the last step shows no sign of divergence"


def test_most_urgent_first() -> None:
    assert list(CAUSES)[:2] == ["non-finite gradient", "all gradients non-finite"]
