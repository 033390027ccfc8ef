"""Ratio blocks: parts of a parameter with ratios of their own, exact wherever a rank's shard begins and ends."""

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.core.hyperparams import DEFAULTS
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim import fsdp_models as models
from tests.oracle import VARIANT_FACTS, split_blocks
from tests.sharded_cases import (
    Case,
    assert_same_bits,
    check_alike,
    check_close,
    check_run,
    expect,
    through_lamb,
)
from tests.sharded_cases import run as run_case

# Ratio blocks of 1,200 and of 5 elements, which begin inside blocks of 256; and of 512, which do not.
SHAPES: dict[str, tuple[int, ...]] = {
    "norm.weight": (17,),
    "qkv.weight": (12, 300),
    "qkv.bias": (15,),
    "experts": (4, 16, 32),
    "fc.weight": (31, 17),
    "empty": (0, 3),
}
BLOCKS = {"qkv.weight": 3, "qkv.bias": 3, "experts": 4, "empty": 1}
BF16 = torch.bfloat16
LANS: dict[str, Any] = {"normalize_grad": True, "nesterov": True}
CAUTION: dict[str, Any] = {"caution": True}
LARS: dict[str, Any] = {key: value for key, value in VARIANT_FACTS["lars"].items() if key in DEFAULTS}
LARS["max_grad_norm"] = 2.0
OF_VARIANTS: dict[str, dict[str, Any]] = {"lamb": {}, "lans": LANS, "caution": CAUTION, "lars": LARS}


def case(stage: int, *, dtype: torch.dtype = torch.float32, bits: int = 12, **more: Any) -> Case:
    settings = {"stage": stage, "bucket_mb": 0.01, **more.pop("settings", {})}
    return Case(
        SHAPES,
        blocks={name: count for name, count in BLOCKS.items() if count > 1},
        options={"max_grad_norm": 2.0, "weight_norm_clip": (0.0, 30.0), **more.pop("options", {})},
        settings=settings,
        dtypes=dict.fromkeys(SHAPES, dtype),
        no_decay=frozenset({"qkv.bias"}),
        missing=0.2,
        bits=bits,
        **more,
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_follow_the_oracle(stage: int) -> None:
    """The oracle gets every block as a parameter. Shards end inside blocks, and elsewhere at each world size.

    From the same gradients (stage 1) come the same bits.
    """
    own = case(
        stage, groups=((("norm.weight", "qkv.weight"), {"weight_decay": 0.3}), (tuple(SHAPES)[2:], {}))
    )
    for world in (1, 2, 3, 4):
        outcomes = run_ranks(world, run_case, own, world)
        check_run(own, outcomes)
        if stage == 1:
            assert_same_bits(outcomes[0].params, through_lamb(own, world))


@pytest.mark.parametrize(
    "own",
    [
        case(1, options=LANS),
        case(2, options=LANS),
        case(1, dtype=BF16, bits=7),
        case(2, dtype=BF16, bits=7, options=LANS, settings={"store_param_remainders": True}),
        case(2, options=LANS, settings={"kernel": "torch"}),
        case(1, options=CAUTION),
        case(2, dtype=BF16, bits=7, options=CAUTION),
        case(1, options=LARS),
        case(2, options=LARS, settings={"kernel": "torch"}),
    ],
    ids=[
        "1, LANS",
        "2, LANS",
        "1, bf16",
        "2, LANS, bf16 with remainders",
        "2, LANS, stock operations",
        "1, caution",
        "2, bf16, caution",
        "1, LARS",
        "2, LARS, stock operations",
    ],
)
def test_options_and_dtypes_follow_the_oracle(own: Case) -> None:
    outcomes = run_ranks(2, run_case, own, 2)
    check_alike(outcomes)
    values = {**outcomes[0].params, **outcomes[0].masters}
    check_close(split_blocks(values, own.blocks), expect(own, 2))


# -- the same as several parameters -----------------------------------------------------------------------------

ALIGNED = {"w": (6, 8, 64), "b": (5,)}
PARTS = {"w": 3}


def drawn(rank: int, step: int) -> dict[str, Tensor | None]:
    """The same on every rank, so that averages over 2 and 4 ranks have the same bits."""
    return training.own_gradients(0, step, ALIGNED)


def drawn_parts(rank: int, step: int) -> dict[str, Tensor | None]:
    return split_blocks(drawn(rank, step), PARTS)


def fused_and_separate(rank: int, world: int, stage: int, variant: str) -> dict[str, Tensor]:
    """``stage`` 0: `Lamb`. Returns the fused parameters, checked against one parameter for each of their blocks."""
    fused = training.parameters(ALIGNED)
    apart = {name: Parameter(value) for name, value in split_blocks(training.copies(fused), PARTS).items()}
    options: dict[str, Any] = {"lr": 0.02, **OF_VARIANTS[variant], "max_grad_norm": 1.0}
    if stage:
        options |= {"stage": stage, "bucket_mb": 0.001}
    cls: Any = ShardedLamb if stage else Lamb
    opt, other = cls(fused.items(), ratio_blocks=PARTS, **options), cls(apart.items(), **options)
    for optimizer, params, draw in ((opt, fused, drawn), (other, apart, drawn_parts)):
        training.train(
            optimizer, params, stage=stage or 1, rank=rank, world=world, steps=range(3), gradients=draw
        )
    training.assert_same_bits(split_blocks(training.copies(fused), PARTS), training.copies(apart))
    assert repr(opt.layer_norms()) == repr(other.layer_norms())
    assert [*opt.layer_norms()] == ["w[0]", "w[1]", "w[2]", "b"]
    assert opt.grad_norm == pytest.approx(other.grad_norm, rel=1e-7)
    assert str(opt.explain()) == str(other.explain())
    return training.copies(fused)


@pytest.mark.parametrize("variant", OF_VARIANTS)
def test_a_fused_parameter_has_the_bits_of_its_parts(variant: str) -> None:
    """If blocks begin at multiples of 256 elements; then they are also the same over world sizes and stages."""
    expected = fused_and_separate(0, 1, 0, variant)
    for world in (1, 2, 4) if variant == "lamb" else (2,):
        for stage in (1, 2):
            for params in run_ranks(world, fused_and_separate, world, stage, variant):
                training.assert_same_bits(params, expected)


# -- DTensors ---------------------------------------------------------------------------------------------------

FSDP_SHAPES: dict[str, training.Shape] = {
    "attention.qkv": (12, 7),  # two ranks cut its second block of three
    "attention.bias": (12,),
    "experts.w": (4, 3, 5),
    "norm": (17,),
}
FSDP_BLOCKS = {"attention.qkv": 3, "attention.bias": 3, "experts.w": 4}
RATIO_BLOCKS: dict[str, Any] = {"attention": 3, "experts": "dim0"}
DTENSOR_OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 0.5, "weight_norm_clip": (0.0, 0.7)}


def fully_sharded(rank: int, world: int, variant: str) -> models.Run:
    tree = models.sharded_tree(init_device_mesh("cpu", (world,)), shapes=FSDP_SHAPES)
    options = {**OF_VARIANTS[variant], **DTENSOR_OPTIONS}
    opt = ShardedLamb(tree.named_parameters(), ratio_blocks=RATIO_BLOCKS, **options)
    return models.train(tree, opt, lambda step: tree(models.gradients(rank, step, FSDP_SHAPES)), 4)


@pytest.mark.parametrize(("world", "variant"), [(2, "lamb"), (3, "lans"), (2, "caution"), (3, "lars")])
def test_fully_shard_follows_the_oracle(world: int, variant: str) -> None:
    runs = run_ranks(world, fully_sharded, world, variant)
    assert runs[0].local_sizes["attention.qkv"] == 12 // world * 7
    for own in runs:
        own.weights = split_blocks(own.weights, FSDP_BLOCKS)
    models.check(runs, blocks=FSDP_BLOCKS, **{**OF_VARIANTS[variant], **DTENSOR_OPTIONS})


def placements_of(mesh: Any) -> dict[str, tuple[Placement, ...]]:
    """Of `FSDP_SHAPES`; the last parameter is plain."""
    rest = (Replicate(),) * (mesh.ndim - 1)
    both = (_StridedShard(0, split_factor=2), Shard(0)) if mesh.ndim == 2 else (Shard(0),)
    return {
        "attention.qkv": both,
        "attention.bias": (_StridedShard(0, split_factor=2), Replicate()) if mesh.ndim == 2 else (Shard(0),),
        "experts.w": (*rest[:1], Shard(1)) if mesh.ndim == 2 else (Shard(1),),
    }


def assigned(rank: int, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, float]]:
    mesh = init_device_mesh("cpu", shape)
    placements = placements_of(mesh)

    def placed(values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        return {
            name: distribute_tensor(value, mesh, placements[name]) if name in placements else value
            for name, value in values.items()
            if value is not None
        }

    params = {name: Parameter(value) for name, value in placed(training.weights(FSDP_SHAPES)).items()}
    opt = ShardedLamb(params.items(), ratio_blocks=RATIO_BLOCKS, **DTENSOR_OPTIONS)
    for step in range(3):
        for name, grad in placed(training.own_gradients(0, step, FSDP_SHAPES)).items():
            params[name].grad = grad
        opt.step()
    return {name: gathered(p) for name, p in params.items()}, opt.trust_ratios()


def gathered(p: Tensor) -> Tensor:
    """The whole of ``p``. torch 2.11's full_tensor() does not take replicas of strided shards."""
    if not isinstance(p, DTensor):
        return p.detach()
    positions = torch.arange(p.numel()).view(p.shape)
    own = distribute_tensor(positions, p.device_mesh, p.placements).to_local(), p.detach().to_local()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    whole = torch.full((p.numel(),), torch.nan)
    for at, values in parts:
        whole[at.flatten()] = values.flatten()
    return whole.view(p.shape)


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=str)
def test_every_placement_follows_the_oracle(shape: tuple[int, ...]) -> None:
    """Tensor parallel in rows and columns; with two axes also strided shards, and replicas of shards (HSDP)."""
    grads = [training.own_gradients(0, step, FSDP_SHAPES) for step in range(3)]
    start = training.weights(FSDP_SHAPES)
    oracle = training.oracle_run(start, grads, blocks=FSDP_BLOCKS, **DTENSOR_OPTIONS)
    for weights, ratios in run_ranks(torch.Size(shape).numel(), assigned, shape):
        training.assert_follows(split_blocks(weights, FSDP_BLOCKS), oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)


# -- parameters that come, go, and are edited -----------------------------------------------------------------------

SMALL: dict[str, training.Shape] = {"a": (7,), "qkv": (6, 50), "b": (3,)}


def gradients(rank: int, step: int) -> dict[str, Tensor | None]:
    """On even steps one is missing on rank 1, on odd steps another one on all ranks."""
    grads = models.gradients(rank, step, SMALL)
    return {**grads, "a": grads["a"] if step % 2 or not rank else None, "b": None if step % 2 else grads["b"]}


def unfrozen(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, float], float]:
    """The blocks are registered last; the user clips, scales and removes stage 2's gradients, and reads a norm."""
    params = training.parameters(SMALL)
    params["qkv"].requires_grad_(False)
    opt = ShardedLamb(params.items(), lr=0.02, stage=2, ratio_blocks={"qkv": 3})
    for step in range(4):
        params["qkv"].requires_grad_(step > 0)
        training.backward(params, {n: g for n, g in gradients(rank, step).items() if step or n != "qkv"})
        if step == 2:
            params["qkv"].grad.mul_(0.5)  # type: ignore[union-attr]
        if step in (1, 2):
            params["a"].grad = None
        opt.clip_grad_norm_(2.0)
        norm = 0.0 if params["qkv"].grad is None else float(params["qkv"].grad.norm())
        opt.step()
        opt.zero_grad()
    return training.copies(params), opt.trust_ratios(), norm


@pytest.mark.parametrize("world", [1, 2])
def test_unfrozen_missing_clipped_and_scaled(world: int) -> None:
    oracle = training.oracle_run(training.weights(SMALL), [], lr=0.02, max_grad_norm=2.0, blocks={"qkv": 3})
    for step in range(4):
        averaged = training.average(gradients(rank, step) for rank in range(world))
        given = {name: None if g is None else g.numpy() for name, g in averaged.items()}
        if step == 0:
            given["qkv"] = None
        if step == 2:
            given["qkv"] = given["qkv"] * 0.5
        if step in (1, 2):
            given["a"] = None
        oracle.step(given)
    for weights, ratios, norm in run_ranks(world, unfrozen, world):
        training.assert_follows(split_blocks(weights, {"qkv": 3}), oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)
        assert norm == pytest.approx(float(averaged["qkv"].norm()), rel=1e-5)  # type: ignore[union-attr]


def nonfinite(rank: int) -> str:
    params = training.parameters(SMALL)
    opt = ShardedLamb(params.items(), lr=0.02, stage=2, ratio_blocks={"qkv": 3})
    grads = models.gradients(rank, 0, SMALL)
    grads["qkv"][2] = torch.inf if rank else 0.0
    training.backward(params, grads)
    opt.step()
    assert opt.skipped_steps == 1
    return str(opt.explain())


def test_a_non_finite_gradient_names_its_block() -> None:
    for text in run_ranks(2, nonfinite):
        assert text.startswith("non-finite gradient (1 parameter)")
        assert "qkv[1]: no step has updated it" in text


# -- messages -----------------------------------------------------------------------------------------------------


def sent(
    rank: int, stage: int, ratio_blocks: Any, more: dict[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """(calls, bytes) of the third step, in which ranks no longer compare gradients."""
    params = training.parameters(SMALL)
    if not stage:
        mesh = init_device_mesh("cpu", (2,))
        params = {
            name: Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in params.items()
        }
    opt = ShardedLamb(params.items(), lr=0.02, stage=stage or 1, ratio_blocks=ratio_blocks, **more)
    for step in range(3):
        before = opt.traffic.calls.copy(), opt.traffic.bytes.copy()
        for name, p in params.items():
            grad = models.gradients(0, step, SMALL)[name]
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(p, DTensor) else grad
        opt.step()
        opt.zero_grad()
    calls, sizes = opt.traffic.calls - before[0], opt.traffic.bytes - before[1]
    assert dict(sizes) == {name: count for name, count in opt.expected_bytes().items() if count}
    return dict(calls), dict(sizes)


@pytest.mark.parametrize(
    ("stage", "more", "sums"),
    [
        (1, {}, 1 + 2),
        (2, {"variant": "lans"}, 1 + 3),
        (0, {}, 1 + 2),
        (0, {"skip_nonfinite": False}, 1 + 2),  # one all-reduce
    ],
    ids=["1", "2, LANS", "3", "3, one all-reduce"],
)
def test_the_small_all_reduces_grow_by_the_blocks_and_nothing_else(
    stage: int, more: dict[str, Any], sums: int
) -> None:
    plain = run_ranks(2, sent, stage, None, more)
    for (calls, sizes), (own_calls, own_sizes) in zip(
        plain, run_ranks(2, sent, stage, {"qkv": 3}, more), strict=True
    ):
        assert own_calls == calls
        assert calls["all_reduce_small"] == (1 if "skip_nonfinite" in more else 2)
        assert own_sizes == {**sizes, "all_reduce_small": sizes["all_reduce_small"] + 8 * sums * 2}


# -- state --------------------------------------------------------------------------------------------------------


def resumed(rank: int, saves: Any, loads: Any, folder: Path) -> list[dict[str, Tensor]]:
    """Results of runs that save in three ways with ratio blocks ``saves``, and continue with ``loads``."""

    def made(
        weights: dict[str, Tensor], ratio_blocks: Any
    ) -> tuple[nn.Module, dict[str, Parameter], ShardedLamb]:
        model = models.Leaf({name: value.clone() for name, value in weights.items()})
        params = dict(model.named_parameters())
        return model, params, ShardedLamb(params.items(), lr=0.02, stage=1, ratio_blocks=ratio_blocks)

    options: dict[str, Any] = {"stage": 1, "rank": rank, "world": 2, "gradients": gradients}
    model, params, first = made(training.weights(SMALL), saves)
    training.train(first, params, steps=range(2), **options)
    full, local = first.full_state_dict(), copy.deepcopy(first.local_state_dict())
    checkpoint.save(folder, model, first)
    loading: list[Callable[[nn.Module, ShardedLamb], Any]] = [
        lambda model, opt: opt.load_full_state_dict(full),
        lambda model, opt: opt.load_state_dict(local),
        lambda model, opt: checkpoint.load(folder, model, opt),
    ]
    results = []
    for load in loading:
        other, own, second = made(training.copies(params), loads)
        load(other, second)
        training.assert_same_bits(training.bits_of(second, own), training.bits_of(first, params))
        training.train(second, own, steps=range(2, 4), **options)
        assert len(second.trust_ratios()) == (5 if loads else 3) - 1
        results.append(training.copies(own))
    if full is not None:
        lamb = Lamb(training.renew(params).items(), ratio_blocks=loads)
        lamb.load_state_dict(full)
        assert "ratio_blocks" not in lamb.state_dict()["param_groups"][0]
    return results


@pytest.mark.parametrize("saves", [None, {"qkv": 3}], ids=["without", "with"])
def test_state_loads_with_and_without(saves: Any, tmp_path: Path) -> None:
    loads = {"qkv": 3} if saves is None else None
    start = training.weights(SMALL)
    for results in run_ranks(2, resumed, saves, loads, tmp_path / "checkpoint"):
        assert all(not torch.equal(results[0][name], start[name]) for name in SMALL)
        for other in results[1:]:
            training.assert_same_bits(results[0], other)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_copy_keeps_them(cls: Any) -> None:
    params = training.parameters(SMALL)
    opt = cls(params.items(), ratio_blocks={"qkv": 3})
    assert opt.ratio_blocks == {"qkv": 3}
    training.give(params, models.gradients(0, 0, SMALL))
    copied_params, copied = copy.deepcopy((params, opt))
    if cls is ShardedLamb:
        opt.close()
    training.give(copied_params, models.gradients(0, 0, SMALL))
    copied.step()
    assert [*copied.trust_ratios()] == ["a", "qkv[0]", "qkv[1]", "qkv[2]", "b"]


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_errors_at_construction(cls: Any) -> None:
    def made(ratio_blocks: Any, *, names: bool = True, of_group: Any = None) -> Any:
        params = training.parameters(SMALL)
        group: dict[str, Any] = {"params": [*params.items()] if names else [*params.values()]}
        if of_group is not None:
            group["ratio_blocks"] = of_group
        return cls([group], ratio_blocks=ratio_blocks)

    with pytest.raises(
        ValueError, match=r"\{'qkv': 4\} for parameter 'qkv' of shape \(6, 50\): 4 does not divide"
    ):
        made({"qkv": 4})
    with pytest.raises(ValueError, match=r"\['experts'\] matches no parameter"):
        made({"qkv": 3, "experts": 2})
    with pytest.raises(ValueError, match=r"the parameters have none: pass model\.named_parameters"):
        made({"qkv": 3}, names=False)
    with pytest.raises(ValueError, match=r"ratio_blocks=\{'qkv': 3\} in a parameter group"):
        made(None, of_group={"qkv": 3})
    made({"ndim<=1": "dim0"}, names=False)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_they_are_fixed_at_construction(cls: Any) -> None:
    params = training.parameters(SMALL)
    opt = cls(params.items(), ratio_blocks={"qkv": 3})
    with pytest.raises(AttributeError, match="ratio_blocks"):
        opt.ratio_blocks = {}
    with pytest.raises(ValueError, match=r"'qkv2' of shape \(4,\): 3 does not divide"):
        opt.add_param_group({"params": [("qkv2", Parameter(torch.ones(4)))]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("qkv3", Parameter(torch.ones(6)))]})
    opt.param_groups[0]["ratio_blocks"] = {"qkv": 2}
    training.give(params, models.gradients(0, 0, SMALL))
    with pytest.raises(
        ValueError, match=r"parameter group 0: ratio_blocks=\{'qkv': 2\} in a parameter group"
    ):
        opt.step()
    del opt.param_groups[0]["ratio_blocks"]
    opt.step()
    assert [*opt.trust_ratios()] == ["a", "qkv[0]", "qkv[1]", "qkv[2]", "b"]


def disagreeing(rank: int) -> None:
    ShardedLamb(training.parameters(SMALL).items(), ratio_blocks={"qkv": 2 + rank})


def test_ranks_must_agree() -> None:
    for kind, message in run_ranks_expecting_errors(2, disagreeing).values():
        assert kind == "ValueError"
        assert "ratio_blocks: rank 0 has {'qkv': 2}, rank 1 has ratio_blocks: {'qkv': 3}" in message


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_other_memory_orders(cls: Any) -> None:
    """channels_last leaves the first dimension outermost; a transposed parameter's blocks are scattered in memory."""
    image = training.draw((6, 3, 5, 5), "image")
    start = {"qkv": image.to(memory_format=torch.channels_last)}
    params = {"qkv": Parameter(start["qkv"].clone())}
    opt = cls(params.items(), lr=0.02, ratio_blocks={"qkv": 3})
    grads = [{"qkv": training.draw((6, 3, 5, 5), "gradient", step)} for step in range(2)]
    for own in grads:
        training.give(params, own)
        opt.step()
    assert params["qkv"].is_contiguous(memory_format=torch.channels_last)
    oracle = training.oracle_run(start, grads, lr=0.02, blocks={"qkv": 3})
    training.assert_follows(split_blocks(training.copies(params), {"qkv": 3}), oracle)
    with pytest.raises(ValueError, match=r"'qkv' has 3 ratio blocks .*p\.data = p\.data\.contiguous\(\)"):
        cls([("qkv", Parameter(torch.ones(4, 6).T))], ratio_blocks={"qkv": 3})


def test_a_parameter_that_is_transposed_later_is_refused() -> None:
    p = Parameter(torch.ones(6, 4))
    opt = Lamb([("qkv", p)], ratio_blocks={"qkv": 3})
    p.data = torch.ones(4, 6).T
    p.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match="'qkv' has 3 ratio blocks"):
        opt.step()
    assert torch.equal(p, torch.ones(6, 4))


def test_the_log_counts_layers(caplog: pytest.LogCaptureFixture) -> None:
    params = training.parameters(SMALL)
    opt = ShardedLamb(params.items(), ratio_blocks={"qkv": 3})
    training.give(params, models.gradients(0, 0, SMALL))
    with caplog.at_level(logging.INFO, logger="sharded_lamb"):
        opt.step()
    assert "3 tensors of 5 layers" in caplog.text
