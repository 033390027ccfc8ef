"""Options written into groups between steps have their effect in the next step, or are an error there."""

from typing import Any

import pytest
import torch

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.oracle import OracleLamb

SHAPES = {"embed.weight": (67, 31), "fc.weight": (37, 23), "fc.bias": (37,), "scale": ()}
pytestmark = pytest.mark.parametrize("cls", [Lamb, ShardedLamb])


def two_groups(cls: Any, **options: Any) -> tuple[dict[str, Any], Any]:
    params = training.parameters(SHAPES)
    names = list(SHAPES)
    groups = [
        {"params": [(name, params[name]) for name in names[:2]], "weight_decay": 0.3},
        {"params": [(name, params[name]) for name in names[2:]], "lr": 0.03},
    ]
    return params, cls(groups, lr=0.02, weight_decay=0.1, **options)


def step(params: dict[str, Any], opt: Any, number: int = 0) -> None:
    training.give(params, training.own_gradients(0, number, SHAPES))
    opt.step()


def test_edits_follow_float64_lamb(cls: Any) -> None:
    """Every kind of option, one after the other, in one of the groups; the oracle's options change alike."""
    params, opt = two_groups(cls)
    first, second = list(SHAPES)[:2], list(SHAPES)[2:]
    oracle = OracleLamb(
        {name: p.detach().double().numpy() for name, p in params.items()},
        lr=0.02,
        weight_decay=0.1,
        overrides={**{n: {"weight_decay": 0.3} for n in first}, **{n: {"lr": 0.03} for n in second}},
    )
    plain: list[tuple[int, dict[str, Any]]] = [
        (0, {"lr": 0.01}),
        (1, {"betas": (0.7, 0.8)}),
        (0, {"eps": 0.01}),
        (1, {"weight_decay": 0.5}),
        (0, {"trust_clip": (0.0, 0.5)}),
        (1, {"weight_norm_clip": (0.0, 0.25)}),
        (0, {"bias_correction": "lr"}),
        (1, {"grad_averaging": False}),
        (0, {"adam_w_mode": False}),
        (1, {"eps_inside_sqrt": True}),
        (1, {"adapt_without_decay": False}),
        (1, {"weight_decay": 0.0}),
    ]
    for number, (index, edit) in enumerate(plain):
        opt.param_groups[index].update(edit)
        for name in (first, second)[index]:
            oracle.options[name].update(edit)
        step(params, opt, number)
        oracle.step(
            {
                n: g.double().numpy()
                for n, g in training.own_gradients(0, number, SHAPES).items()
                if g is not None
            }
        )
        training.assert_follows(params, oracle)
        assert opt.trust_ratios() == pytest.approx(oracle.ratios, rel=1e-5)
    opt.param_groups[0]["exclude_from_layer_adaptation"] = ["embed"]
    opt.param_groups[0]["exclude_from_weight_decay"] = ["^fc"]
    oracle.no_adapt, oracle.no_decay = {"embed.weight"}, {"fc.weight"}
    step(params, opt)
    oracle.step(
        {n: g.double().numpy() for n, g in training.own_gradients(0, 0, SHAPES).items() if g is not None}
    )
    training.assert_follows(params, oracle)
    assert opt.trust_ratios()["embed.weight"] == 1.0
    opt.param_groups[0]["exclude_from_layer_adaptation"] = None  # as for decay
    step(params, opt)
    assert opt.trust_ratios()["embed.weight"] != 1.0
    assert opt.trust_ratios()["fc.weight"] == 1.0


EDITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"variant": "adamw"}, ValueError, r"variant 'lamb' was changed to 'adamw'.*VARIANTS\['adamw'\]"),
    ({"variant": "nvlamb"}, ValueError, r"variant 'lamb' was changed to 'nvlamb'"),
    ({"variant": "lomb"}, ValueError, r"variant must be one of"),
    ({"caution": True}, ValueError, r"caution=True cannot be given to an optimizer with caution=False"),
    ({"nesterov": True}, ValueError, r"nesterov=True cannot be given to an optimizer with nesterov=False"),
    ({"max_grad_norm": 1.0}, ValueError, r"max_grad_norm=1\.0 in a parameter group"),
    ({"weight_deacy": 0.1}, ValueError, r"unknown option 'weight_deacy'.*did you mean 'weight_decay'"),
    ({"betas": (0.9,)}, ValueError, r"betas must be a pair"),
    ({"exclude_from_weight_decay": "bias"}, TypeError, r"must be a sequence of patterns, got 'bias'"),
    ({"exclude_from_weight_decay": ("b(",)}, ValueError, r"'b\(' is not a regular expression"),
    (
        {"exclude_from_layer_adaptation": ("embed",)},
        ValueError,
        r"\('embed',\) matches no parameter.*'fc\.bias'",
    ),
]


@pytest.mark.parametrize(("edit", "kind", "message"), EDITS, ids=lambda value: str(value)[:40])
def test_invalid_edits_are_refused_and_can_be_undone(
    cls: Any, edit: dict[str, Any], kind: type[Exception], message: str
) -> None:
    params, opt = two_groups(cls)
    other_params, other = two_groups(cls)
    for number in range(2):
        step(other_params, other, number)
    step(params, opt)
    kept = dict(opt.param_groups[1])
    opt.param_groups[1].update(edit)
    for _ in range(2):  # not only once
        with pytest.raises(kind, match="parameter group 1: .*" + message):
            step(params, opt, 1)
    opt.param_groups[1].clear()
    opt.param_groups[1].update(kept)
    step(params, opt, 1)
    training.assert_same_bits(training.copies(params), training.copies(other_params))


def test_a_deleted_option_is_named(cls: Any) -> None:
    params, opt = two_groups(cls)
    del opt.param_groups[0]["eps"]
    with pytest.raises(ValueError, match=r"parameter group 0: .*lacks the option 'eps'"):
        step(params, opt)


def test_patterns_need_names(cls: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = cls([p])
    opt.param_groups[0]["exclude_from_weight_decay"] = ("bias",)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"pass model\.named_parameters\(\)"):
        opt.step()
    opt.param_groups[0]["exclude_from_weight_decay"] = ("ndim<=1",)
    opt.step()


def test_loading_another_variants_state_changes_all_options(cls: Any) -> None:
    params, opt = two_groups(cls)
    other_params, other = two_groups(cls, variant="adamw")
    step(params, opt)
    step(other_params, other)
    opt.load_state_dict(other.state_dict())
    step(params, opt, 1)
    assert set(opt.trust_ratios().values()) == {1.0}
    assert opt.param_groups[0]["variant"] == "adamw"


def test_keys_of_schedulers_are_no_options(cls: Any) -> None:
    params, opt = two_groups(cls)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=4)
    for number in range(3):
        step(params, opt, number)
        schedule.step()
    assert opt.param_groups[0]["betas"][0] != 0.9
