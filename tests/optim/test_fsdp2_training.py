"""Training under fully_shard: plain parameters beside DTensors, clipping, skipping, GradScaler, FSDP's policies."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sharded_lamb import ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim import fsdp_models as models
from tests.optim.fsdp_models import SHAPES, Run

STEPS = 4
STAGES = pytest.mark.parametrize("stage", [1, 2])
OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 5.0}


def oracle_of(world: int, steps: int = STEPS, **options: Any) -> Any:
    """The float64 oracle on the averages of `models.gradients`."""
    averaged = (training.average(models.gradients(r, step) for r in range(world)) for step in range(steps))
    return training.oracle_run(training.weights(SHAPES), averaged, **options)


# -- plain parameters beside DTensors ----------------------------------------------------------------------------


def half_sharded(mesh: Any) -> models.Tree:
    """Two leaves under fully_shard, a leaf and the root's own parameters plain."""
    tree = models.Tree(training.weights(SHAPES))
    for name in ("embed", "fc"):
        fully_shard(getattr(tree, name), mesh=mesh)
    return tree


def average_plain(model: nn.Module, world: int) -> None:
    for p in model.parameters():
        if not isinstance(p, DTensor) and p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= world


def mixed_run(
    rank: int, world: int, stage: int, scaled: bool
) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    tree = half_sharded(init_device_mesh("cpu", (world,)))
    opt = ShardedLamb(tree.named_parameters(), stage=stage, bucket_mb=0.001, **OPTIONS)
    for step in range(STEPS):
        tree(models.gradients(rank, step)).backward()
        if stage == 1:
            average_plain(tree, world)
        if scaled and step % 2:  # as GradScaler.unscale_, which leaves the version unchanged
            for p in tree.parameters():
                if p.grad is not None:
                    local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                    torch._amp_foreach_non_finite_check_and_unscale_(
                        [local], torch.zeros(1), torch.tensor(0.5)
                    )
        before = opt.traffic.bytes.copy()
        opt.step()
        opt.zero_grad()
    sent = dict(opt.traffic.calls)
    if not scaled:
        small = opt.traffic.bytes["all_reduce_small"] - before["all_reduce_small"]
        assert small == opt.expected_bytes()["all_reduce_small"]
    return models.whole_weights(tree), opt.trust_ratios(), (opt.grad_norm, sent, opt.memory())


@pytest.mark.parametrize(("stage", "world"), [(1, 3), (2, 2)])
def test_plain_parameters_beside_dtensors(stage: int, world: int) -> None:
    """One global norm clips both; stage 2 reduces the plain parameters' gradients."""
    oracle = oracle_of(world, **OPTIONS)
    for weights, ratios, (norm, calls, memory) in run_ranks(world, mixed_run, world, stage, False):
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)
        assert norm == pytest.approx(oracle.grad_norm, rel=1e-5)
        at_construction = 2
        assert calls["all_reduce_small"] == at_construction + STEPS * (2 if stage == 1 else 3)
        assert ("reduce_scatter" in calls) == (stage == 2)
        assert (memory["gradient_shards"] > 0) == (stage == 2)  # stage 1 reads plain gradients in place too


@STAGES
def test_unscaled_gradients_of_both_kinds(stage: int) -> None:
    """Gradients halved on odd steps: in ``.grad``, or by the sentinel where they are reduced and freed."""
    averaged = []
    for step in range(STEPS):
        grads = training.average(models.gradients(r, step) for r in range(2))
        averaged.append({n: g * (0.5 if step % 2 else 1.0) for n, g in grads.items() if g is not None})
    oracle = training.oracle_run(training.weights(SHAPES), averaged, **OPTIONS)
    for weights, ratios, (norm, _, _) in run_ranks(2, mixed_run, 2, stage, True):
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle)
        assert ratios == pytest.approx(oracle.ratios, rel=1e-5)
        assert norm == pytest.approx(oracle.grad_norm, rel=1e-5)


def norm_of_halved(rank: int, stage: int) -> float:
    tree = half_sharded(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters(), stage=stage, lr=0.02)
    tree(models.gradients(rank, 0)).backward()
    if stage == 1:
        average_plain(tree, 2)
    for p in tree.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)
    return float(opt.clip_grad_norm_(1e9))


@STAGES
def test_the_norm_of_scaled_gradients_of_both_kinds(stage: int) -> None:
    grads = training.average(models.gradients(rank, 0) for rank in range(2))
    norm = sum(float(g.double().square().sum()) for g in grads.values() if g is not None) ** 0.5
    assert run_ranks(2, norm_of_halved, stage) == pytest.approx([norm / 2] * 2, rel=1e-5)


def added_later(rank: int, stage: int) -> dict[str, Tensor]:
    """DTensors first, then a group of plain parameters, then an unfrozen parameter."""
    tree = half_sharded(init_device_mesh("cpu", (2,)))
    named = dict(tree.named_parameters())
    placed = [(n, p) for n, p in named.items() if isinstance(p, DTensor)]
    plain = [(n, p) for n, p in named.items() if not isinstance(p, DTensor)]
    named["fc.bias"].requires_grad_(False)
    opt = ShardedLamb(placed, stage=stage, **OPTIONS)
    opt.add_param_group({"params": plain})
    named["fc.bias"].requires_grad_(True)
    for step in range(STEPS):
        tree(models.gradients(rank, step)).backward()
        if stage == 1:
            average_plain(tree, 2)
        opt.step()
        opt.zero_grad()
    return models.whole_weights(tree)


@STAGES
def test_groups_may_be_added(stage: int) -> None:
    oracle = oracle_of(2, **OPTIONS)
    for weights in run_ranks(2, added_later, stage):
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle)


def plain_not_averaged(rank: int) -> None:
    tree = half_sharded(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters())
    tree(models.gradients(rank, 0)).backward()
    opt.step()


def test_plain_gradients_that_are_not_averaged_are_rejected() -> None:
    for kind, message in run_ranks_expecting_errors(2, plain_not_averaged).values():
        assert kind == "ValueError"
        assert "stage=1 got different gradients" in message


# -- clipping and skipping ---------------------------------------------------------------------------------------


def clipped_run(rank: int, how: str) -> tuple[dict[str, Tensor], list[float]]:
    tree = models.sharded_tree(init_device_mesh("cpu", (3,)))
    opt = ShardedLamb(tree.named_parameters(), lr=0.02, max_grad_norm=5.0 if how == "option" else None)
    norms = []
    for step in range(STEPS):
        tree(models.gradients(rank, step)).backward()
        if how == "method":
            norms.append(opt.clip_grad_norm_(5.0).item())
        elif how == "torch":
            norm = nn.utils.clip_grad_norm_(tree.parameters(), 5.0)
            assert isinstance(norm, DTensor)
            norms.append(norm.full_tensor().item())
        opt.step()
        opt.zero_grad()
        if how == "option":
            assert opt.grad_norm is not None
            norms.append(opt.grad_norm)
    return models.whole_weights(tree), norms


@pytest.mark.parametrize("how", ["option", "method", "torch"])
def test_clipping_is_by_the_global_norm(how: str) -> None:
    oracle = oracle_of(3, lr=0.02, max_grad_norm=5.0)
    for weights, norms in run_ranks(3, clipped_run, how):
        tolerance = 2e-6 if how != "torch" else 2e-5  # torch's has an epsilon
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle, tolerance)
        assert norms[-1] == pytest.approx(oracle.grad_norm, rel=1e-6)


def clipped_twice(rank: int) -> tuple[dict[str, Tensor], float | None]:
    """Clip with clip_grad_norm_, then halve gradients as torch's does, which leaves a DTensor's version unchanged."""
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters(), lr=0.02, max_grad_norm=5.0)
    for step in range(STEPS):
        tree(models.gradients(rank, step)).backward()
        opt.clip_grad_norm_(1e9)
        torch._foreach_mul_([p.grad for p in tree.parameters() if p.grad is not None], 0.5)
        opt.step()
        opt.zero_grad()
    return models.whole_weights(tree), opt.grad_norm


def test_gradients_changed_after_clipping_are_read_again() -> None:
    averaged = []
    for step in range(STEPS):
        grads = training.average(models.gradients(r, step) for r in range(2))
        averaged.append({n: g / 2 for n, g in grads.items() if g is not None})
    oracle = training.oracle_run(training.weights(SHAPES), averaged, lr=0.02, max_grad_norm=5.0)
    for weights, norm in run_ranks(2, clipped_twice):
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle)
        assert norm == pytest.approx(oracle.grad_norm, rel=1e-6)


def skipping_run(rank: int, bad: float) -> None:
    """One element of one rank's gradient: after the reduce-scatter it is on one rank only."""
    tree = models.sharded_tree(init_device_mesh("cpu", (3,)))
    opt = ShardedLamb(tree.named_parameters(), lr=0.02, max_consecutive_skips=2)
    params = dict(tree.named_parameters())
    tree(models.gradients(rank, 0)).backward()
    opt.step()
    before = training.bits_of(opt, params)
    for count in (1, 2):
        opt.zero_grad()
        grads = models.gradients(rank, 1)
        if rank == 1:
            grads["embed.weight"][66, 30] = bad
        tree(grads).backward()
        local = params["embed.weight"].grad.to_local()  # type: ignore[union-attr]
        assert local.isfinite().all() == (rank != 2)
        opt.step()
        for name, value in training.bits_of(opt, params).items():
            assert torch.equal(models.whole(value), models.whole(before[name])), name
        assert opt.skipped_steps == count
        assert opt.trust_ratios() == {}
    with pytest.raises(RuntimeError, match=r"2 steps in a row .*'embed\.weight'"):
        opt.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_element_on_one_rank_skips_on_all_ranks(bad: float) -> None:
    run_ranks(3, skipping_run, bad)


def scaler_run(rank: int, way: str) -> tuple[dict[str, Tensor], float, list[float]]:
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters(), lr=0.02, max_grad_norm=None if way == "clip" else 5.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scales = []
    for step in range(STEPS + 1):
        grads = models.gradients(rank, max(step - 1, 0))
        if step == 1 and rank == 0:
            grads["fc.weight"][0, 0] = torch.inf
        scaler.scale(tree(grads)).backward()
        if way != "plain":
            scaler.unscale_(opt)
        if way == "clip":
            opt.clip_grad_norm_(5.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return models.whole_weights(tree), opt.skipped_steps, scales


@pytest.mark.parametrize("way", ["plain", "unscale", "clip"])
def test_grad_scaler(way: str) -> None:
    """The draws of step 0, an infinity on one rank, then the draws of steps 1, 2, …"""
    draws = [0, *range(1, STEPS)]
    averaged = (training.average(models.gradients(r, step) for r in range(2)) for step in draws)
    oracle = training.oracle_run(training.weights(SHAPES), averaged, lr=0.02, max_grad_norm=5.0)
    for weights, skipped, scales in run_ranks(2, scaler_run, way):
        assert skipped == 1
        assert scales == [1024.0] + [512.0] * STEPS
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle)


# -- dtypes and policies -----------------------------------------------------------------------------------------


def policy_run(rank: int, dtype: torch.dtype, policy: str) -> Run:
    options: dict[str, Any] = {}
    if policy == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    tree = models.sharded_tree(init_device_mesh("cpu", (3,)), dtype, **options)
    opt = ShardedLamb(models.two_groups(tree), **models.GROUPED)
    run = models.train(tree, opt, lambda step: tree(models.gradients(rank, step)), 8)
    for name, p in tree.named_parameters():
        assert p.dtype == dtype
        if dtype == torch.bfloat16:
            assert torch.equal(p.to_local(), opt.state[p]["master"].to_local().bfloat16()), name  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        (torch.bfloat16, ""),
        (torch.float16, ""),
        (torch.float32, "mixed precision"),
        (torch.float32, "offload"),
        (torch.bfloat16, "offload"),
    ],
)
def test_policies_and_dtypes_follow_the_oracle(dtype: torch.dtype, policy: str) -> None:
    runs = run_ranks(3, policy_run, dtype, policy)
    models.check(runs, lr=0.02, max_grad_norm=5.0, overrides=models.overrides(runs[0].start))
    for run in runs:
        numel = sum(run.local_sizes.values())
        assert run.memory == {
            "parameters": numel * dtype.itemsize,
            "masters": 4 * numel if dtype.itemsize == 2 else 0,
            "moments": 8 * numel,
            "gradient_shards": 0,
            "staging": 0,
        }


def written_run(rank: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)), dtype)
    opt = ShardedLamb(tree.named_parameters(), lr=0.01, weight_decay=0.0)
    for step in range(2):
        tree(models.gradients(rank, step)).backward()
        opt.step()
        opt.zero_grad()
    other = models.sharded_tree(init_device_mesh("cpu", (2,)), dtype)
    with torch.no_grad():
        for p in other.parameters():
            p *= 100
    start = models.whole_weights(other)
    tree.load_state_dict(other.state_dict())
    tree(models.gradients(rank, 2)).backward()
    opt.step()
    weights = models.whole_weights(tree)
    return {
        n: ((w - start[n]).double().norm().item(), start[n].double().norm().item())
        for n, w in weights.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_written_after_construction_win(dtype: torch.dtype) -> None:
    for gaps in run_ranks(2, written_run, dtype):
        for name, (change, size) in gaps.items():
            assert 0.5 * 0.01 * size < change < 2 * 0.01 * size, name


def meta_run(rank: int) -> Run:
    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        tree = models.Tree({name: torch.empty(shape) for name, shape in SHAPES.items()})
    for leaf in tree.children():
        fully_shard(leaf, mesh=mesh)
    fully_shard(tree, mesh=mesh)
    tree.to_empty(device="cpu")
    torch.manual_seed(rank)
    for p in tree.parameters():
        nn.init.normal_(p)
    opt = ShardedLamb(tree.named_parameters(), **OPTIONS)
    return models.train(tree, opt, lambda step: tree(models.gradients(rank, step)), STEPS)


def test_a_model_from_the_meta_device() -> None:
    models.check(run_ranks(2, meta_run), **OPTIONS)


def run_to_its_device(rank: int, stage: Any) -> Run:
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters(), stage=stage, **OPTIONS)
    return models.train(tree, opt, lambda step: tree.to("cpu")(models.gradients(rank, step)), STEPS)


@pytest.mark.parametrize("stage", [1, 2])
def test_model_to_a_device_between_steps(stage: int) -> None:
    """It swaps DTensors, which torch refuses if a weak reference to one exists."""
    models.check(run_ranks(2, run_to_its_device, stage), **OPTIONS)


def wrapped_block_run(rank: int, wrapper: str) -> tuple[Run, list[str]]:
    mesh, model = init_device_mesh("cpu", (2,)), models.block()
    if wrapper == "checkpoint":
        model.up = checkpoint_wrapper(model.up)  # type: ignore[assignment]
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    called: Any = torch.compile(model, backend="aot_eager") if wrapper == "compile" else model
    opt = ShardedLamb(
        called.named_parameters(), **OPTIONS, exclude_from_weight_decay=[r"^up\.bias$", r"^norm\."]
    )
    run = models.train(model, opt, lambda step: called(models.inputs(rank, step)).square().sum(), STEPS)
    strip = "_checkpoint_wrapped_module."
    for tensors in (run.start, run.weights, *run.gradients):
        for name in list(tensors):
            tensors[name.replace(strip, "")] = tensors.pop(name)  # type: ignore[assignment]
    return run, list(opt.trust_ratios())


@pytest.mark.parametrize("wrapper", ["", "checkpoint", "compile"])
def test_checkpointed_and_compiled_models(wrapper: str) -> None:
    """Names equal the bare model's, numbers the oracle's."""
    results = run_ranks(2, wrapped_block_run, wrapper)
    no_decay = {"up.bias", "norm.weight", "norm.bias"}
    models.check([run for run, _ in results], **OPTIONS, no_decay=no_decay)
    assert {*results[0][1]} == {name for name, _ in models.block().named_parameters()}


def accumulating_run(rank: int) -> dict[str, Tensor]:
    tree = models.sharded_tree(init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(tree.named_parameters(), **OPTIONS)
    for step in range(STEPS):
        with opt.no_sync():  # has no effect: FSDP's own call decides
            tree.set_requires_gradient_sync(False)  # type: ignore[attr-defined]
            tree(models.gradients(rank, step)).backward()
        tree.set_requires_gradient_sync(True)  # type: ignore[attr-defined]
        tree(models.gradients(rank, step)).backward()
        opt.step()
        opt.zero_grad()
    return models.whole_weights(tree)


def test_accumulation_by_fully_shard() -> None:
    averaged = []
    for step in range(STEPS):
        grads = training.average(models.gradients(r, step) for r in range(2))
        averaged.append({n: 2 * g for n, g in grads.items() if g is not None})
    oracle = training.oracle_run(training.weights(SHAPES), averaged, **OPTIONS)
    for weights in run_ranks(2, accumulating_run):
        training.assert_follows({name: weights[name] for name in SHAPES}, oracle)


# -- the log line and errors -------------------------------------------------------------------------------------


def log_of(rank: int, plain: bool, stage: int) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sharded_lamb")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        mesh = init_device_mesh("cpu", (2,))
        tree = half_sharded(mesh) if plain else models.sharded_tree(mesh)
        opt = ShardedLamb(tree.named_parameters(), stage=stage)
        tree(models.gradients(0, 0)).backward()
        opt.step()
    finally:
        logger.removeHandler(handler)
    return lines


def test_the_log_line_names_stage_3() -> None:
    for plain, stage, text in ((False, 1, "3"), (False, 2, "3"), (True, 1, "1 and 3"), (True, 2, "2 and 3")):
        first, second = run_ranks(2, log_of, plain, stage)
        assert [line.startswith(f"ShardedLamb stage {text}: 2 ranks, 6 tensors") for line in first] == [True]
        assert second == []
