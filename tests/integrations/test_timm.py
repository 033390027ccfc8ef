"""timm's factory makes ShardedLamb: decay groups, layer decay, names; on two ranks in DDP, as in its train.py."""

from typing import Any

import pytest

from tests.harness import run_ranks
from tests.integrations import cases, timm_cases
from tests.training import assert_follows, assert_same_bits


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("how", ["factory", "named"])
def test_trains_with_timms_groups_and_scheduler(how: str, layer_decay: float | None) -> None:
    first, second = run_ranks(cases.WORLD, timm_cases.fit, how, layer_decay)
    assert_same_bits(first[0], second[0])
    scales = {"up.weight": layer_decay or 1.0, "up.bias": layer_decay or 1.0}
    expected = cases.oracle(
        cases.data(3),
        range(3),
        lr_of=lambda step: 0.5**step,
        scales=scales,
        no_decay={"up.bias", "head.weight", "scale"},
    )
    assert_follows(first[0], expected)
    assert (set(first[1]) == {name for name, _ in cases.Net().named_parameters()}) is (how == "named")


def test_patterns_match_names() -> None:
    options: dict[str, Any] = {"exclude_from_layer_adaptation": [r"^up\.weight$"]}
    first, _ = run_ranks(cases.WORLD, timm_cases.fit, "named", None, **options)
    expected = cases.oracle(
        cases.data(3),
        range(3),
        lr_of=lambda step: 0.5**step,
        no_decay={"up.bias", "head.weight", "scale"},
        no_adapt={"up.weight"},
    )
    assert_follows(first[0], expected)


def test_the_factory_passes_options() -> None:
    """``--opt-betas`` and ``--opt-kwargs``. ``sharded_lamb`` is read as timm's own."""
    with timm_cases.real_timm() as (optim, _):
        opt = optim.create_optimizer_v2(
            cases.Net(), "shardedlamb", lr=0.1, variant="timm", betas=(0.8, 0.9), max_grad_norm=2.0
        )
        assert opt.defaults["betas"] == (0.8, 0.9)
        assert (opt.max_grad_norm, opt.param_groups[0]["variant"]) == (2.0, "timm")
        assert type(optim.create_optimizer_v2(cases.Net(), "sharded_lamb")).__module__ == "timm.optim.lamb"
