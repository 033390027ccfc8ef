"""Failures seen while sharding an optimizer: the order of hooks, freed gradients, the bits of a norm.

Those of flat memory: tests/sharding/test_traps_of_memory.py.
"""

import threading
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sharded_lamb import ShardedLamb
from sharded_lamb.core import rule as lamb_rule
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.gradients.reducer import BackwardReducer
from sharded_lamb.kernels import FlatShard, ReferenceKernel
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.pairs import pairs

# Buckets of one parameter each, all of one size: only wrong numbers would reveal a swap of two.
EQUAL = {f"layer{i}": (BLOCK,) for i in range(7)}
ONE_EACH_MB = BLOCK * 4 / 2**20
LR = 0.01


def equal_gradients(rank: int, step: int) -> dict[str, Tensor | None]:
    return training.own_gradients(rank, step, EQUAL)


def branching_gradients(rank: int, step: int) -> dict[str, Tensor | None]:
    """Every rank runs a different branch: no rank has layer0 in even steps, only rank 1 layer1; others alternate."""
    grads = equal_gradients(rank, step)
    if step % 2 == 0:
        grads["layer0"] = None
    if rank != 1:
        grads["layer1"] = None
    for i in range(2, 7):
        if (i + step) % 3 == rank:
            grads[f"layer{i}"] = None
    return grads


def only_rank_zero(rank: int, step: int) -> dict[str, Tensor | None]:
    return equal_gradients(rank, step) if rank == 0 else {}


DRAWS = {"all": equal_gradients, "branches": branching_gradients, "rank 0 only": only_rank_zero}


# -- 1: hooks that fire in different orders ------------------------------------------------------------------


def train_in_own_order(rank: int, world: int, draw: str, overlap: bool) -> dict[str, Tensor]:
    params = training.parameters(EQUAL)
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=ONE_EACH_MB, overlap=overlap)
    names = list(params)
    for step in range(5):
        order = names[rank + step :] + names[: rank + step]  # never the same on two ranks
        training.backward(params, DRAWS[draw](rank, step), order if rank % 2 else order[::-1])
        opt.step()
        opt.zero_grad()
    assert opt.traffic.calls["reduce_scatter"] == 5 * len(EQUAL)
    return training.copies(params)


@pairs(world=[2, 3], draw=[*DRAWS], overlap=[True, False])
def test_hooks_in_different_orders_swap_no_buckets(world: int, draw: str, overlap: bool) -> None:
    start = training.weights(EQUAL)
    oracle = training.oracle_of_ranks(world, range(5), DRAWS[draw], start, lr=LR)
    for weights in run_ranks(world, train_in_own_order, world, draw, overlap):
        training.assert_follows(weights, oracle)


class Tied(nn.Module):
    """One weight, used in two checkpointed segments and outside; reentrant, its hook fires three times."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.shared = nn.Parameter(training.draw((16, 16), "shared").double() / 4)
        self.own = nn.ParameterList(training.draw((16, 16), "own", i).double() / 4 for i in range(3))

    def segment(self, x: Tensor, own: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.shared) @ own)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.shared)
        for own in self.own:
            if self.checkpointed:
                x = checkpoint(self.segment, x, own, use_reentrant=True)
            else:
                x = self.segment(x, own)
        return (x @ self.shared).square().sum()


def train_tied(rank: int, checkpointed: bool, stage: int, world: int, bucket_mb: float) -> dict[str, Tensor]:
    model = Tied(checkpointed)
    opt = ShardedLamb(model.named_parameters(), lr=LR, stage=stage, bucket_mb=bucket_mb)
    for step in range(4):
        ranks = [rank] if stage == 2 else range(world)
        for r in ranks:
            loss = model(training.draw((5, 16), "x", r, step).double().requires_grad_())
            (loss / len(ranks)).backward()
        opt.step()
        opt.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("bucket_mb", [16 * 16 * 8 / 2**20, 32])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_reentrant_checkpoints_with_a_tied_weight(world: int, bucket_mb: float) -> None:
    (plain,) = run_ranks(1, train_tied, False, 1, world, bucket_mb)
    for weights in run_ranks(world, train_tied, True, 2, world, bucket_mb):
        for name, value in weights.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-11, atol=1e-13, msg=name)


def exchanges_of_a_step(rank: int, checkpointed: bool) -> int:
    """After steps in which the reducer learns which hooks fire several times."""
    model = Tied(checkpointed)
    opt = ShardedLamb(model.named_parameters(), lr=LR, stage=2, bucket_mb=16 * 16 * 8 / 2**20)
    before = 0
    for step in range(3):
        before = opt.traffic.calls["reduce_scatter"]
        model(training.draw((5, 16), "x", rank, step).double().requires_grad_()).backward()
        opt.step()
        opt.zero_grad()
    return opt.traffic.calls["reduce_scatter"] - before


def test_reentrant_checkpoints_exchange_no_bucket_twice() -> None:
    assert run_ranks(2, exchanges_of_a_step, True) == run_ranks(2, exchanges_of_a_step, False)


def late_on_one_rank(rank: int, steps: tuple[int, ...], late_from: int) -> tuple[dict[str, Tensor], int]:
    """As on a GPU, where the host reads no summary after the first rounds."""
    model = Tied(checkpointed=False)
    with mock.patch.object(BackwardReducer, "_reads_all", False):
        opt = ShardedLamb(model.named_parameters(), lr=LR, stage=2, bucket_mb=16 * 16 * 8 / 2**20)
        for step in steps:
            model.checkpointed = rank == 0 and step >= late_from
            model(training.draw((5, 16), "x", rank, step).double().requires_grad_()).backward()
            opt.step()
            opt.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, opt.skipped_steps


def test_a_step_whose_late_gradients_no_host_reads_is_skipped() -> None:
    """It lacks gradients of one rank, and no rank waits for the device to learn of it. Later steps are complete."""
    plain = run_ranks(2, late_on_one_rank, (0, 1, 2, 4, 5), 9)
    for (weights, skipped), (expected, none) in zip(
        run_ranks(2, late_on_one_rank, (0, 1, 2, 3, 4, 5), 3), plain, strict=True
    ):
        assert (skipped, none) == (1, 0)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-13, msg=name)


# -- 2: GradScaler and freed gradients -----------------------------------------------------------------------

SCALED_LR = 0.02


def with_infinity(rank: int, step: int) -> dict[str, Tensor | None]:
    grads = training.own_gradients(rank, step)
    if step == 1 and rank == 1:
        weight = grads["fc.weight"]
        assert weight is not None
        weight[3, 4] = torch.inf
    return grads


def train_scaled(
    rank: int, draw: str, scaled: bool, unscale: bool, max_norm: float | None
) -> tuple[dict[str, Tensor], list[float], list[float], int]:
    """Weights, loss scales, norms that clipping returned, and steps skipped."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=SCALED_LR, stage=2, bucket_mb=0.002)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0, enabled=scaled)
    scales, norms = [], []
    for step in range(4):
        grads = with_infinity(rank, step) if draw == "inf" else training.own_gradients(rank, step)
        scaler.scale(training.loss_of(params, grads)).backward()
        if unscale:
            scaler.unscale_(opt)
        if max_norm is not None:
            norms.append(opt.clip_grad_norm_(max_norm).item())
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return training.copies(params), scales, norms, opt.skipped_steps


# As everywhere in torch, clipping scaled gradients needs unscale_ first.
@pytest.mark.parametrize(("unscale", "max_norm"), [(True, None), (True, 0.5), (False, None)])
def test_gradscaler_equals_the_unscaled_run(unscale: bool, max_norm: float | None) -> None:
    oracle = training.oracle_of_ranks(2, range(4), lr=SCALED_LR, max_grad_norm=max_norm)
    plain = run_ranks(2, train_scaled, "finite", False, unscale, max_norm)
    scaled = run_ranks(2, train_scaled, "finite", True, unscale, max_norm)
    for (weights, _, norms, _), (expected, _, expected_norms, _) in zip(scaled, plain, strict=True):
        training.assert_follows(weights, oracle)
        training.assert_same_bits(weights, expected)  # the scale is a power of two
        assert norms == expected_norms


@pytest.mark.parametrize("unscale", [True, False])
def test_inf_on_one_rank_halves_the_scale_on_all(unscale: bool) -> None:
    oracle = training.oracle_of_ranks(2, [0, 2, 3], lr=SCALED_LR)
    for weights, scales, _, skipped in run_ranks(2, train_scaled, "inf", True, unscale, None):
        assert scales == [1024.0, 512.0, 512.0, 512.0]
        assert skipped == 1
        training.assert_follows(weights, oracle)


def train_clipped_by_torch(rank: int, scaled: bool) -> dict[str, Tensor]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=SCALED_LR, stage=2, bucket_mb=0.002)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0, enabled=scaled)
    for step in range(3):
        scaler.scale(training.loss_of(params, training.own_gradients(rank, step))).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(list(params.values()), 0.5)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return training.copies(params)


@pytest.mark.parametrize("scaled", [True, False])
def test_torch_clips_reduced_gradients(scaled: bool) -> None:
    oracle = training.oracle_of_ranks(2, range(3), lr=SCALED_LR, max_grad_norm=0.5)
    for weights in run_ranks(2, train_clipped_by_torch, scaled):
        training.assert_follows(weights, oracle)


class Fails(torch.autograd.Function):
    """Identity forward; backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("planted in backward")


def fail_in_backward(rank: int, failing: tuple[int, ...], bucket_mb: float) -> tuple[dict[str, Tensor], int]:
    params = training.parameters(EQUAL)
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=bucket_mb)
    training.backward(params, equal_gradients(rank, 0))
    opt.step()
    opt.zero_grad()
    grads, terms = equal_gradients(rank, 99), []
    for i, (name, p) in enumerate(params.items()):
        term = p * grads[name]
        terms.append(Fails.apply(term) if i == 3 and rank in failing else term)
    loss, before = torch.stack(terms).sum(), opt.traffic.calls["reduce_scatter"]
    if rank in failing:
        with pytest.raises(ArithmeticError, match="planted in backward"):
            loss.backward()
    else:
        loss.backward()
    sent = opt.traffic.calls["reduce_scatter"] - before
    opt.zero_grad()
    assert all(p.grad is None for p in params.values())
    for step in (1, 2):
        training.backward(params, equal_gradients(rank, step))
        opt.step()
        opt.zero_grad()
    return training.copies(params), sent


@pytest.mark.parametrize("failing", [(0, 1), (1,)], ids=["everywhere", "on one rank"])
@pytest.mark.parametrize("bucket_mb", [ONE_EACH_MB, 32], ids=["buckets in flight", "no bucket in flight"])
def test_zero_grad_after_an_exception_in_backward(failing: tuple[int, ...], bucket_mb: float) -> None:
    """Exchanges in flight complete and their results are dropped, also if only one of the ranks failed."""
    oracle = training.oracle_of_ranks(2, range(3), equal_gradients, training.weights(EQUAL), lr=LR)
    results = run_ranks(2, fail_in_backward, failing, bucket_mb, timeout=30)
    for rank, (weights, sent) in enumerate(results):
        if rank in failing:
            assert sent == (3 if bucket_mb == ONE_EACH_MB else 0)
        training.assert_follows(weights, oracle)


def zero_by_the_model(rank: int, set_to_none: bool) -> dict[str, Tensor]:
    params = training.parameters()
    model = nn.ParameterList(params.values())
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=0.002)
    for step in range(3):
        training.backward(params, training.own_gradients(rank, 50 + step))  # discarded
        model.zero_grad(set_to_none=set_to_none)
        training.backward(params, training.own_gradients(rank, step))
        opt.step()
        model.zero_grad(set_to_none=set_to_none)
    return training.copies(params)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_models_zero_grad_drops_reduced_gradients(set_to_none: bool) -> None:
    oracle = training.oracle_of_ranks(2, range(3), lr=LR)
    for weights in run_ranks(2, zero_by_the_model, set_to_none):
        training.assert_follows(weights, oracle)


# -- 3: the bits of a norm -----------------------------------------------------------------------------------


def test_norms_round_away_the_order_of_ranks() -> None:
    """fp64 sums depend on the order of the ranks' parts; the rounded norms of the ratio do not."""
    generator = torch.Generator().manual_seed(6)
    parts = torch.rand(400, 8, generator=generator, dtype=torch.float64) * 100
    one, other = torch.zeros(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    for column in range(8):
        one += parts[:, column]
        other += parts[:, 7 - column]
    is_fp64 = torch.zeros(400, dtype=torch.bool)
    assert (one.sqrt() != other.sqrt()).sum() > 50
    assert torch.equal(lamb_rule.norms(one, is_fp64), lamb_rule.norms(other, is_fp64))
    assert torch.equal(lamb_rule.norms(one, ~is_fp64), one.sqrt())  # float64 parameters: not rounded


def square_sums(values: Tensor, shards: int) -> Tensor:
    """[shards] fp64 Σx² by the kernel, of equal runs of blocks."""
    sums = []
    for part in values.chunk(shards):
        shard = FlatShard(
            weight=part,
            model=None,
            grad=part,
            exp_avg=part,
            exp_avg_sq=part,
            block_param=torch.zeros(len(part) // BLOCK, dtype=torch.int64),
        )
        total = torch.zeros(1, dtype=torch.float64)
        ReferenceKernel().square_sums([shard], total)
        sums.append(total)
    return torch.cat(sums)


def test_norms_have_the_same_bits_for_any_number_of_shards() -> None:
    is_fp64 = torch.zeros((), dtype=torch.bool)
    for trial in range(20):
        values = training.draw((24 * BLOCK,), "block sums", trial)
        whole = lamb_rule.norms(square_sums(values, 1).sum(), is_fp64)
        assert whole.item() == pytest.approx(values.double().norm().item(), rel=1e-6)
        for shards in (2, 3, 4, 6, 8):
            assert torch.equal(lamb_rule.norms(square_sums(values, shards).sum(), is_fp64), whole)


def step_beside_a_thread(rank: int) -> None:
    """A thread (a data loader's, say) builds tuples while first steps search for DDP."""
    done = threading.Event()
    failed: list[BaseException] = []

    def build() -> None:
        try:
            while not done.is_set():
                tuple(i for i in range(1000))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        for _ in range(3):
            model = nn.Linear(3, 2)
            optimizer = ShardedLamb(model.named_parameters(), stage=2)
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    finally:
        done.set()
        thread.join()
    assert not failed, failed


def test_the_first_step_does_not_disturb_other_threads() -> None:
    run_ranks(1, step_beside_a_thread)


# -- 7: a model that is converted and converted back, or moved to the CPU and back, has other nodes ------------


def train_and_convert(rank: int, converts: bool, zeroes: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    opt = ShardedLamb(model.named_parameters(), lr=LR, stage=2, bucket_mb=ONE_EACH_MB)
    for step in range(6):
        if converts and step in (2, 4):
            model.double()
            model.float()
        for backward in range(3):  # each is reduced, beside what was reduced before
            model(torch.full((2, 9), rank + step + backward + 1.0)).square().mean().backward()
        opt.step()
        if zeroes:
            opt.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_a_model_that_was_converted_and_converted_back_accumulates() -> None:
    ours, expected = (run_ranks(2, train_and_convert, converts, True) for converts in (True, False))
    for converted, kept in zip(ours, expected, strict=True):
        training.assert_same_bits(dict(enumerate(converted)), dict(enumerate(kept)))


def test_a_gradient_kept_over_a_conversion_is_an_error_that_says_so() -> None:
    for kind, message in run_ranks_expecting_errors(2, train_and_convert, True, False).values():
        assert kind == "RuntimeError"
        assert "the model was converted or moved since" in message
        assert "Call zero_grad() before this backward" in message
