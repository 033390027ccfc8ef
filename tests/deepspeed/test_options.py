"""Options written into DeepSpeed's groups after construction: an effect in the next step, or an error on every rank."""

from typing import Any

import pytest

from tests.deepspeed import cases
from tests.harness import run_ranks, run_ranks_expecting_errors

EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "lr": (
        {"lr": 0.125},
        "options of group 0: lr: rank 0 has '0.02', rank 1 has options of group 0: lr: '0.125'",
    ),
    "patterns": (
        {"exclude_from_layer_adaptation": ["all"]},
        "options of group 0: exclude_from_layer_adaptation",
    ),
    "an invalid value": ({"betas": (0.9, 1.0)}, "betas[1] must be a number in [0, 1), got 1.0"),
}


def step(engine: Any, rank: int, number: int) -> None:
    engine.backward(engine(cases.tokens(rank, number)))
    engine.step()


def edited(rank: int, stage: int, edit: dict[str, Any], ranks: tuple[int, ...]) -> dict[str, float]:
    engine = cases.start(cases.config(stage))
    step(engine, rank, 0)
    assert set(engine.basic_optimizer.trust_ratios().values()) != {1.0}
    if rank in ranks:
        for group in engine.basic_optimizer.param_groups:
            group.update(edit)
    step(engine, rank, 1)
    ratios: dict[str, float] = engine.basic_optimizer.trust_ratios()
    cases.stop(engine)
    return ratios


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_with_another_option_is_an_error_on_every_rank(stage: int, edit: str) -> None:
    options, says = EDITS[edit]
    for kind, message in run_ranks_expecting_errors(2, edited, stage, options, (1,), timeout=300).values():
        assert kind == "ValueError"
        assert "ranks disagree on the options of a step" in message
        assert says in message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_patterns_written_into_a_group_have_their_effect(stage: int) -> None:
    edit = {"exclude_from_layer_adaptation": ["norm", "embed"]}
    for ratios in run_ranks(2, edited, stage, edit, (0, 1), timeout=300):
        matched = {name for name in ratios if "norm" in name or "embed" in name}
        assert matched
        assert {name for name, ratio in ratios.items() if ratio == 1.0} == matched


@pytest.mark.parametrize("stage", [0, 2])
def test_an_invalid_value_on_all_ranks_is_named(stage: int) -> None:
    edit = {"exclude_from_layer_adaptation": ["nrom"]}
    for kind, message in run_ranks_expecting_errors(2, edited, stage, edit, (0, 1), timeout=300).values():
        assert kind == "ValueError"
        assert "parameter group 0: exclude_from_layer_adaptation=('nrom',) matches no parameter" in message
