"""Options of any numeric type or sequence become plain values; values that fp32 cannot hold are refused."""

import math
from collections import UserList
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.oracle import OracleLamb

PLAIN: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.75, 0.5),
    "eps": 0.125,
    "weight_decay": 0.25,
    "trust_clip": (0.125, 2.0),
    "weight_norm_clip": (0.5, 8.0),
    "bias_correction": False,
    "exclude_from_weight_decay": ("bias",),
}
SHAPES = {"weight": (37, 23), "bias": (37,)}


def listed(value: Any, number: Callable[[float], Any]) -> Any:
    if isinstance(value, tuple) and isinstance(value[0], str):
        return UserList(value)
    if isinstance(value, tuple):
        return UserList(map(number, value))
    return value if isinstance(value, bool) else number(value)


KINDS: dict[str, Callable[[Any], Any]] = {
    "config list": lambda value: listed(value, float),
    "numpy scalar": lambda value: np.bool_(value) if isinstance(value, bool) else listed(value, np.float64),
    "numpy fp32": lambda value: listed(value, np.float32),
    "numpy array": np.array,
    "tensor": lambda value: (
        value if isinstance(value, tuple) and isinstance(value[0], str) else torch.tensor(value)
    ),
    "fraction": lambda value: listed(value, Fraction),
    "decimal": lambda value: listed(value, Decimal),
}


def trained(cls: Any, options: dict[str, Any], *, written: bool) -> Any:
    params = training.parameters(SHAPES)
    opt = cls(params.items(), **({} if written else options))
    if written:
        opt.param_groups[0].update(options)
    oracle = OracleLamb(
        {name: p.detach().double().numpy() for name, p in params.items()},
        lr=float(options["lr"]),
        no_decay=("bias",),
        **{name: value for name, value in PLAIN.items() if name not in ("lr", "exclude_from_weight_decay")},
    )
    for step in range(3):
        grads = training.own_gradients(0, step, SHAPES)
        training.give(params, grads)
        opt.step()
        oracle.step({name: g.double().numpy() for name, g in grads.items() if g is not None})
    training.assert_follows(params, oracle)
    return opt


@pytest.mark.parametrize("written", [False, True], ids=["constructed", "written into the group"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_options_of_other_types_are_those_of_plain_ones(cls: Any, kind: str, written: bool) -> None:
    opt = trained(cls, {name: KINDS[kind](value) for name, value in PLAIN.items()}, written=written)
    for name, value in PLAIN.items():
        own = opt.param_groups[0][name]
        if name == "lr":
            assert float(own) == pytest.approx(value)  # a tensor stays one: schedules may write into it
            continue
        assert own == value
        assert type(own) is type(value)
        assert not isinstance(value, tuple) or list(map(type, own)) == list(map(type, value))


def test_omegaconf() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    trained(
        Lamb,
        dict(
            omegaconf.OmegaConf.create({k: list(v) if isinstance(v, tuple) else v for k, v in PLAIN.items()})
        ),
        written=False,
    )


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_max_grad_norm_of_any_numeric_type(cls: Any) -> None:
    for value in (2, np.float32(2), torch.tensor(2.0), Fraction(2), Decimal(2)):
        opt = cls([Parameter(torch.ones(3))], max_grad_norm=value)
        assert type(opt.max_grad_norm) is float
        opt.max_grad_norm = value
        assert (type(opt.max_grad_norm), opt.max_grad_norm) == (float, 2.0)


INVALID: list[tuple[dict[str, Any], str]] = [
    (
        {"lr": "1e-3"},
        r"lr must be .*'1e-3'; it is a string: convert it with float\(\), and in YAML write 1\.0e-3",
    ),
    ({"betas": ("0.9", 0.99)}, r"betas\[0\] must be .*'0\.9'; it is a string"),
    ({"betas": "ab"}, r"betas must be a pair of numbers"),
    ({"betas": {0.9: 1, 0.99: 2}}, r"betas must be a pair of numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, r"betas must be a pair of numbers"),
    ({"betas": np.ones((2, 2))}, r"betas\[0\] must be a number"),
    ({"eps": "1e-6"}, r"eps must be .*it is a string"),
    ({"eps": 1e-46}, r"eps must be a finite number > 0, normal in fp32"),  # 0 in fp32: 0/0
    ({"eps": 1e-40}, r"eps must be a finite number > 0, normal in fp32"),  # 0 where denormals are flushed
    ({"eps": 1e39}, r"eps must be a finite number > 0, normal in fp32"),  # inf: no step
    ({"eps": True}, r"eps must be a finite number"),
    ({"eps": 1 + 0j}, r"eps must be a finite number"),
    ({"eps": None}, r"eps must be a finite number"),
    ({"weight_decay": 1e39}, r"weight_decay must be a finite number"),
    ({"weight_decay": np.float64("nan")}, r"weight_decay must be a finite number"),
    ({"weight_decay": 10**400}, r"weight_decay must be a finite number"),
    ({"lr": 1e39}, r"lr must be a finite number"),
    ({"lr": math.inf}, r"lr must be a finite number"),
    ({"lr": torch.ones(2)}, r"lr must be .*one element"),
    ({"lr": torch.tensor(-0.1)}, r"lr must be a finite number"),
    ({"lr": torch.tensor(torch.nan)}, r"lr must be a finite number"),
    ({"betas": (0.9, 1 - 1e-9)}, r"betas\[1\] must be a number in \[0, 1\) that is not 1 in fp32"),
    ({"betas": (1 - 1e-9, 0.9)}, r"betas\[0\] must be a number in \[0, 1\) that is not 1 in fp32"),
    ({"trust_clip": ("0", 1)}, r"trust_clip must be None or a pair"),
    ({"trust_clip": (0.0, math.nan)}, r"trust_clip must be None or a pair"),
    ({"bias_correction": "true"}, r"bias_correction must be True, False"),
    ({"grad_averaging": "False"}, r"grad_averaging must be True or False"),
    ({"max_grad_norm": 1e-46}, r"max_grad_norm must be a number > 0"),
    ({"max_grad_norm": "1.0"}, r"max_grad_norm must be a number > 0.*it is a string"),
]


@pytest.mark.parametrize(("options", "message"), INVALID, ids=str)
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_invalid_values_are_refused_wherever_they_arrive(
    cls: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(nn.Linear(3, 2).named_parameters(), **options)
    opt = cls(nn.Linear(3, 2).named_parameters())
    if "max_grad_norm" in options:
        with pytest.raises(ValueError, match=message):
            opt.max_grad_norm = options["max_grad_norm"]
        assert opt.max_grad_norm is None
        return
    state = opt.state_dict()
    state["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    before = training.copies({str(i): p for i, p in enumerate(opt.param_groups[0]["params"])})
    opt.param_groups[0].update(options)
    with pytest.raises(ValueError, match="parameter group 0: " + message):
        opt.step()
    after = training.copies({str(i): p for i, p in enumerate(opt.param_groups[0]["params"])})
    training.assert_same_bits(after, before)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"state_dtype": torch.float16}, r"state_dtype=torch\.float16: second moments.*underflow.*bfloat16"),
    (
        {"master_dtype": torch.float16},
        r"master_dtype=torch\.float16 for parameter 'weight' of torch\.float32",
    ),
    ({"overlap": "False"}, r"overlap must be True or False"),
    ({"skip_nonfinite": 0}, r"skip_nonfinite must be True or False"),
    ({"stage": 1.5}, r"stage must be 1 .* or 2"),
    ({"stage": True}, r"stage must be 1 .* or 2"),
    ({"stage": 3}, r"got 3; stage 3 is FSDP2: call fully_shard\(model\) and leave stage out$"),
    ({"bucket_mb": "32"}, r"bucket_mb must be > 0"),
    ({"bucket_mb": math.inf}, r"bucket_mb must be > 0"),
    ({"max_consecutive_skips": 1.5}, r"max_consecutive_skips must be >= 1"),
    (
        {"gather_dtype": torch.float16},
        r"gather_dtype must be one of None, torch\.bfloat16, .*float16 lacks float32's range",
    ),
    ({"reduce_dtype": torch.float8_e5m2}, r"reduce_dtype must be one of .*float8_e4m3fn"),
    ({"reduce_dtype": "bfloat16"}, r"reduce_dtype must be one of .*, got 'bfloat16'"),
    ({"gather_dtype": torch.int8}, r"gather_dtype must be one of .*torch\.int8: .*scale"),
    ({"gather_dtype": "bfloat16"}, r"gather_dtype must be one of .*, got 'bfloat16'"),
    (
        {"gather_dtype": torch.float8_e4m3fn, "store_param_remainders": True},
        r"store_param_remainders=16 with gather_dtype=torch\.float8_e4m3fn.*rounds them away",
    ),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=str)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedLamb(nn.Linear(3, 2).named_parameters(), **settings)


def test_float16_weights_may_have_no_masters_and_a_float16_wire() -> None:
    p = Parameter(torch.ones(300, dtype=torch.float16))
    opt = ShardedLamb([p], master_dtype=torch.float16, reduce_dtype=torch.float16, stage=2)
    p.sum().backward()
    opt.step()
    assert opt.memory()["masters"] == 0
    assert p.isfinite().all()
    assert (p < 1).all()


def test_second_moments_of_small_gradients_in_bfloat16() -> None:
    """The range for which float16 is refused."""
    params = training.parameters({"weight": (300,)})
    opt = ShardedLamb(params.items(), lr=0.01, state_dtype=torch.bfloat16)
    oracle = OracleLamb({name: p.detach().double().numpy() for name, p in params.items()}, lr=0.01)
    for step in range(3):
        grad = training.draw((300,), step) * 1e-4
        params["weight"].grad = grad
        opt.step()
        oracle.step({"weight": grad.double().numpy()})
    training.assert_follows(params, oracle, tolerance=1e-3)
