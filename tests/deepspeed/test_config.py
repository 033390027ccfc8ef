"""Keys of ds_config.json: every key has an effect, every mistake raises an error with its remedy."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.deepspeed import cases
from tests.harness import run_ranks, run_ranks_expecting_errors

# The change of each key in the oracle: the run must follow it, and not the oracle without it.
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr": ({"lr": 0.05}, {"lr": 0.05}),
    "betas": ({"betas": [0.5, 0.9]}, {"betas": (0.5, 0.9)}),
    "eps": ({"eps": 1e-2}, {"eps": 1e-2}),
    "weight_decay": ({"weight_decay": 0.5}, {"weight_decay": 0.5}),
    "eps_inside_sqrt": ({"eps": 1e-2, "eps_inside_sqrt": True}, {"eps": 1e-2, "eps_inside_sqrt": True}),
    "bias_correction": ({"bias_correction": False}, {"bias_correction": False}),
    "max_coeff": ({"max_coeff": 0.3}, {"trust_clip": (0.01, 0.3)}),
    "min_coeff": ({"min_coeff": 2.0}, {"trust_clip": (2.0, 10.0)}),
    "trust_clip": ({"trust_clip": [0.2, 0.4]}, {"trust_clip": (0.2, 0.4)}),
    "weight_norm_clip": ({"weight_norm_clip": [0.0, 1.0]}, {"weight_norm_clip": (0.0, 1.0)}),
    "grad_averaging": ({"grad_averaging": False}, {"grad_averaging": False}),
    "adam_w_mode": ({"adam_w_mode": False}, {"adam_w_mode": False}),
    "variant": (
        {"variant": "adamw"},
        {"no_adapt": {name for name, _ in cases.tiny().named_parameters()} - {"frozen"}},
    ),
    "adapt_without_decay": (
        {"adapt_without_decay": False, "exclude_from_weight_decay": ["ndim<=1"]},
        {
            "adapt_without_decay": False,
            "no_decay": {"scale", "norm.weight", "norm.bias", "fc.bias", "head.bias"},
        },
    ),
    "exclude_from_weight_decay": (
        {"exclude_from_weight_decay": ["^fc"]},
        {"no_decay": {"fc.weight", "fc.bias"}},
    ),
    "exclude_from_layer_adaptation": (
        {"exclude_from_layer_adaptation": ["^fc"]},
        {"no_adapt": {"fc.weight", "fc.bias"}},
    ),
}


def effects(rank: int, keys: list[str]) -> dict[str, tuple[float, float]]:
    """{key: (distance of the run to its oracle, distance to the oracle without the key)}."""
    outcome = {}
    for key in keys:
        params, oracle = EFFECTS[key]
        engine = cases.start(cases.config(2, params={**cases.LAMB, **params}))
        weights = cases.masters(engine)
        with_it, without = cases.oracle_of(weights, **oracle), cases.oracle_of(weights)
        for step in range(2):
            engine.backward(engine(cases.tokens(rank, step)))
            grads = cases.gradients(engine)
            with_it.step(grads)
            without.step(grads)
            engine.step()
        after = cases.masters(engine)
        outcome[key] = cases.worst(after, with_it), cases.worst(after, without)
        cases.stop(engine)
    return outcome


def test_every_key_has_its_effect() -> None:
    for outcome in run_ranks(2, effects, list(EFFECTS), timeout=300):
        for key, (near, far) in outcome.items():
            assert near <= cases.FP32_TOLERANCE, key
            assert far > 1e-4, key


def construct(rank: int, config: dict[str, Any]) -> str:
    try:
        cases.stop(cases.start(config))
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("params", "fragment"),
    [
        ({"amsgrad": True}, "ValueError: amsgrad=True"),
        ({"gather_dtype": "bfloat16"}, "ValueError: gather_dtype='bfloat16': under DeepSpeed ZeRO gathers"),
        ({"reduce_dtype": "bfloat16"}, "ValueError: reduce_dtype='bfloat16': under DeepSpeed ZeRO reduces"),
        ({"state_dtype": "int8"}, "ValueError: state_dtype='int8': under DeepSpeed ZeRO splits, offloads"),
        (
            {"store_param_remainders": 8},
            "ValueError: store_param_remainders=8: under DeepSpeed ZeRO keeps whole",
        ),
        ({"trust_clip": [0, 1], "max_coeff": 2.0}, "give one of them"),
        ({"max_coeff": -1.0}, "trust_clip must be"),
        ({"variant": "lomb"}, "variant must be one of"),
        ({"lr": -1}, "lr must be"),
        ({"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        (
            {"exclude_from_weight_decay": ["LayerNorm"]},
            "matches no parameter; a name here looks like 'scale'",
        ),
        ({"exclude_from_weight_decay": "bias"}, "must be a sequence of patterns"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips must be >= 1"),
        ({"variant": "apex"}, '"gradient_clipping": 1.0'),
        ({"max_grad_norm": 1.0}, "gradient_clipping"),
    ],
)
def test_wrong_params(params: dict[str, Any], fragment: str) -> None:
    (message,) = run_ranks(1, construct, cases.config(1, params={**cases.LAMB, **params}))
    assert fragment in message


def test_a_variant_that_clips_accepts_equal_clipping_in_deepspeed() -> None:
    config = cases.config(1, params={**cases.LAMB, "variant": "apex"}, gradient_clipping=1.0)
    assert run_ranks(1, construct, config) == ["accepted"]


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        ({"zero": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}, "SuperOffload"),
        ({"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}, "NVMe"),
        ({"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "partial offload"),
        (
            {
                "zero": {
                    "offload_optimizer": {"device": "cpu"},
                    "zenflow": {"topk_ratio": 0.1, "overlap_step": False},
                }
            },
            "ZenFlow",
        ),
    ],
)
def test_unsupported_features_raise(more: dict[str, Any], fragment: str) -> None:
    for message in run_ranks(2, construct, cases.config(3 if "ratio" in str(more) else 2, "bf16", **more)):
        assert fragment in message
        assert "does not support" in message


@pytest.mark.parametrize(
    ("features", "fragment"),
    [
        ({"autotp_size": lambda: 2}, "tensor parallel"),
        ({"mpu": SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2)}, "tensor parallel"),
        ({"zero_offload_param": lambda: SimpleNamespace(device="nvme")}, "NVMe"),
        ({"zero_elastic_checkpoint": lambda: True}, "elastic_checkpoint"),
        ({"pipeline_parallelism": True}, "pipeline parallel"),
        ({"has_moe_layers": True}, "mixture-of-experts"),
    ],
)
def test_unsupported_partitioning_raises(features: dict[str, Any], fragment: str) -> None:
    from sharded_lamb.deepspeed.engine_probe import check_supported

    plain = {"zenflow": False, "pipeline_parallelism": False, "has_moe_layers": False, "mpu": None}
    switches = (
        "zero_offload_optimizer",
        "zero_offload_param",
        "bf16_optimizer_states",
        "zero_elastic_checkpoint",
        "load_universal_checkpoint",
    )
    methods = {name: (lambda: None) for name in switches}
    engine = SimpleNamespace(**{**plain, **methods, "autotp_size": lambda: 1, **features})
    with pytest.raises(ValueError, match=fragment):
        check_supported(engine)


def test_an_engine_of_a_release_without_a_feature_is_accepted() -> None:
    from sharded_lamb.deepspeed.engine_probe import check_supported

    def never() -> None:
        return None

    has = {"pipeline_parallelism": False, "has_moe_layers": False, "mpu": None, "autotp_size": lambda: 1}
    switches = ("zero_offload_optimizer", "zero_offload_param", "zero_elastic_checkpoint")
    has["load_universal_checkpoint"] = never  # asked of releases before 0.18
    engine = SimpleNamespace(**has, **dict.fromkeys(switches, never))
    check_supported(engine)
    engine.zenflow = True  # looked up where a release has it
    with pytest.raises(ValueError, match="ZenFlow"):
        check_supported(engine)


def construct_with(rank: int, deepspeed_version: str, torch_version: str, config: dict[str, Any]) -> str:
    import deepspeed

    with (
        mock.patch.object(deepspeed, "__version__", deepspeed_version),
        mock.patch.object(torch, "__version__", torch_version),
    ):
        return construct(rank, config)


UNIVERSAL = cases.config(2, checkpoint={"load_universal": True})


@pytest.mark.parametrize(
    ("releases", "config", "fragment"),
    [
        (("0.18.9", "2.13.0+cpu"), cases.config(1), "ZeRO 1 of DeepSpeed 0.18.9 with torch 2.13.0+cpu"),
        (("0.18.9", "2.14.1"), cases.config(2, "bf16"), "ZeRO 2 of DeepSpeed 0.18.9 with torch 2.14.1"),
        (("0.18.9", "2.11.0"), cases.config(2, "bf16"), "accepted"),
        (("0.18.9", "2.13.0"), cases.config(3), "accepted"),
        (
            ("0.18.9", "2.11.0"),
            cases.config(1, "bf16", data_types={"grad_accum_dtype": "fp32"}),
            "ZeRO 1 of DeepSpeed 0.18.9 in bf16 with grad_accum_dtype fp32",
        ),
        (("0.16.9", "2.13.0"), cases.config(2), "does not support DeepSpeed 0.16.9"),
        (("0.17.6", "2.13.0"), UNIVERSAL, "universal checkpoints of DeepSpeed 0.17.6"),
        (("0.19.8", "2.13.0"), UNIVERSAL, "accepted"),
    ],
)
def test_defects_of_a_release_are_refused_by_name(
    releases: tuple[str, str], config: dict[str, Any], fragment: str
) -> None:
    for message in run_ranks(2, construct_with, *releases, config):
        assert fragment in message
        assert message == "accepted" or "install DeepSpeed >= 0.19.8" in message


def in_groups(rank: int, more: dict[str, Any], clip: float) -> tuple[list[Any], str]:
    """Options of three groups; the second has ``more``."""
    model = cases.tiny()
    groups = cases.groups_of(model)
    groups[1].update(more)
    config = cases.config(0, params={"variant": "deepspeed", "lr": 0.01}, gradient_clipping=clip)
    try:
        engine = cases.start(config, model, model_parameters=groups)
    except (ValueError, TypeError) as error:
        return [], str(error)
    outcome = [
        (g["trust_clip"], g["bias_correction"], g["variant"]) for g in engine.basic_optimizer.param_groups
    ]
    cases.stop(engine)
    return outcome, ""


def test_groups_accept_deepspeeds_keys() -> None:
    ((outcome, _),) = run_ranks(1, in_groups, {"max_coeff": 0.5, "bias_correction": True}, 0.0)
    assert outcome[0] == ((0.01, 10.0), "lr", "deepspeed")
    assert outcome[1] == ((0.01, 0.5), "lr", "deepspeed")


def test_a_groups_variant_that_clips_needs_clipping_in_deepspeed() -> None:
    ((_, message),) = run_ranks(1, in_groups, {"variant": "apex"}, 0.0)
    assert 'set "gradient_clipping" at the top of the DeepSpeed config to 1.0' in message
    ((outcome, _),) = run_ranks(1, in_groups, {"variant": "apex"}, 1.0)
    assert outcome[1][2] == "apex"


def one_bit(rank: int) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cases.stop(
            cases.start(cases.config(0, params={**cases.LAMB, "freeze_step": 10, "cuda_aware": False}))
        )
    return [str(warning.message) for warning in caught if "1-bit" in str(warning.message)]


def test_one_bit_lambs_keys_are_accepted_with_a_warning() -> None:
    ((message,),) = run_ranks(1, one_bit)
    assert "freeze_step, cuda_aware" in message


def registered_twice(rank: int) -> int:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    import sharded_lamb.deepspeed as plugin

    plugin.register()
    plugin.register()
    assert torch.optim.ShardedLamb is plugin.DeepSpeedLamb  # type: ignore[attr-defined]
    return ZERO_SUPPORTED_OPTIMIZERS.count(plugin.DeepSpeedLamb)


def test_registration_is_idempotent() -> None:
    assert run_ranks(1, registered_twice) == [1]


def name_taken(rank: int) -> None:
    import sharded_lamb.deepspeed as plugin

    true = torch.optim.ShardedLamb  # type: ignore[attr-defined]
    try:
        torch.optim.ShardedLamb = object  # type: ignore[attr-defined]
        plugin.register()
    finally:
        torch.optim.ShardedLamb = true  # type: ignore[attr-defined]


def test_registration_does_not_replace_another_object() -> None:
    assert run_ranks_expecting_errors(1, name_taken)[0][0] == "RuntimeError"


def replaced_lamb(rank: int, how: str, folder: str) -> dict[str, Any]:
    """A config with type Lamb, passed to `initialize` in each form that DeepSpeed accepts."""
    import base64

    from sharded_lamb.deepspeed import initialize

    config = cases.config(2, "bf16")
    config["optimizer"] = {"type": "Lamb", "params": {"lr": 0.05, "max_coeff": 0.5, "min_coeff": 0.2}}
    path = Path(folder, f"config{rank}.json")
    path.write_text(json.dumps(config))
    encoded = base64.urlsafe_b64encode(path.read_bytes()).decode()
    args = SimpleNamespace(deepspeed_config=str(path), local_rank=rank) if how == "args" else None
    given = {"dict": config, "path": str(path), "base64": encoded, "args": None}[how]
    engine, *_ = initialize(args, cases.tiny(), take_over_lamb=True, **({"config": given} if given else {}))
    oracle = cases.oracle_of(
        cases.masters(engine),
        lr=0.05,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        trust_clip=(0.2, 0.5),
        bias_correction="lr",
    )
    cases.follow(engine, rank, oracle, steps=2)
    outcome = {
        "worst": cases.worst(cases.masters(engine), oracle),
        "type": type(engine.basic_optimizer).__name__,
    }
    cases.stop(engine)
    return outcome


@pytest.mark.parametrize("how", ["dict", "path", "base64", "args"])
def test_take_over_lamb_replaces_lamb(how: str, tmp_path: Path) -> None:
    for outcome in run_ranks(2, replaced_lamb, how, str(tmp_path), timeout=300):
        assert outcome["type"] == "DeepSpeedLamb"
        assert outcome["worst"] <= cases.FP32_TOLERANCE


def test_take_over_lamb_keeps_other_optimizers() -> None:
    from sharded_lamb.deepspeed.registration import replace_lamb

    assert replace_lamb({"optimizer": {"type": "Adam", "params": {}}})["optimizer"]["type"] == "Adam"
    assert replace_lamb({"optimizer": {"type": "LAMB"}})["optimizer"] == {
        "type": "ShardedLamb",
        "params": {"variant": "deepspeed"},
    }
    with pytest.raises(ValueError, match="neither a file"):
        replace_lamb("missing.json")


def client(rank: int, named: str) -> dict[str, float] | str:
    """An optimizer that the user constructs and passes to DeepSpeed as an object or a callable."""
    from sharded_lamb.deepspeed import DeepSpeedLamb, name_parameters

    model = cases.tiny()
    options = {"lr": 0.02, "exclude_from_weight_decay": ["bias$"]}
    config = cases.config(2)
    del config["optimizer"]
    if named == "registered":
        name_parameters(model)
    try:
        if named == "pairs":
            optimizer: Any = DeepSpeedLamb(model.named_parameters(), **options)
        elif named == "callable":
            optimizer = lambda params: DeepSpeedLamb(params, **options)  # noqa: E731
        else:
            optimizer = DeepSpeedLamb(model.parameters(), **options)
    except ValueError as error:
        return str(error)
    engine = cases.start(config, model, optimizer=optimizer)
    engine.backward(engine(cases.tokens(rank, 0)))
    engine.step()
    ratios: dict[str, float] = engine.basic_optimizer.trust_ratios()
    cases.stop(engine)
    return ratios


@pytest.mark.parametrize("named", ["pairs", "callable", "registered"])
def test_optimizers_that_the_user_constructs(named: str) -> None:
    for ratios in run_ranks(2, client, named, timeout=300):
        assert "fc.weight" in ratios


def test_patterns_without_names_raise_with_the_remedy() -> None:
    for message in run_ranks(2, client, "not at all"):
        assert "name_parameters(model)" in message


class Partitioned(nn.Module):
    """A model constructed under zero.Init: its parameters are partitioned before the optimizer exists."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 7)

    def forward(self, rank: int) -> torch.Tensor:
        return self.fc(torch.ones(2, 24) * (rank + 1)).square().mean()


def zero_init(rank: int) -> dict[str, Any]:
    import deepspeed

    params = {**cases.LAMB, "exclude_from_weight_decay": ["ndim<=1"]}
    config = cases.config(3, params=params)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Partitioned()
    engine = cases.start(config, model)
    oracle = cases.oracle_of(cases.masters(engine), no_decay={"fc.bias"})
    for _ in range(3):
        engine.backward(engine(rank))
        oracle.step(cases.gradients(engine))
        engine.step()
    outcome = {"worst": cases.worst(cases.masters(engine), oracle), "shape": tuple(model.fc.weight.shape)}
    cases.stop(engine)
    return outcome


def test_a_model_constructed_under_zero_init() -> None:
    """Its parameters are empty tensors when patterns are matched; their shapes are in ``ds_shape``."""
    for outcome in run_ranks(2, zero_init, timeout=300):
        assert outcome["worst"] <= cases.FP32_TOLERANCE


def late(rank: int) -> None:
    engine = cases.start(cases.config(2))
    engine.basic_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def test_groups_cannot_be_added_later() -> None:
    assert "partitioned" in run_ranks_expecting_errors(1, late)[0][1]


def copied(rank: int) -> None:
    import copy

    engine = cases.start(cases.config(0))
    copy.deepcopy(engine.basic_optimizer)


def test_it_cannot_be_copied() -> None:
    assert run_ranks_expecting_errors(1, copied)[0][0] == "TypeError"
