"""Disagreement between ranks and invalid inputs raise on every rank within seconds, and never hang."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.comm import consistency as agreement
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

SECONDS = 20.0
"""Upper bound on the time until an error; the agreement's timeout is 60 s, gloo's half an hour."""

Errors = dict[int, tuple[str, str]]


def errors_of(world: int, case: Callable[..., Any], *args: Any) -> Errors:
    """`run_ranks_expecting_errors` for errors that leave no collective unfinished: workers are reused."""
    results = run_ranks(world, catch, case, *args, timeout=SECONDS)
    assert None not in results, f"ranks that did not raise: {results}"
    return dict(enumerate(results))


def catch(rank: int, case: Callable[..., Any], *args: Any) -> tuple[str, str] | None:
    try:
        case(rank, *args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def all_say(errors: Errors, kind: str, *parts: str) -> None:
    for rank, (raised, message) in errors.items():
        assert raised == kind, f"rank {rank}: {raised}: {message}"
        for part in parts:
            assert part in message, f"rank {rank}: {part!r} is not in {message!r}"


# -- ranks that disagree -------------------------------------------------------------------------------------


def two_layers() -> list[tuple[str, nn.Parameter]]:
    return [("a", nn.Parameter(torch.ones(4, 3))), ("b", nn.Parameter(torch.ones(5)))]


def other_shape(last: bool) -> ShardedLamb:
    return ShardedLamb([("a", nn.Parameter(torch.ones(3, 4) if last else torch.ones(4, 3)))])


def other_order(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers()[:: -1 if last else 1])


def other_count(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers()[: 1 if last else 2])


def other_dtype(last: bool) -> ShardedLamb:
    return ShardedLamb([("a", nn.Parameter(torch.ones(4, dtype=torch.bfloat16 if last else torch.float32)))])


def other_option(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers(), weight_decay=0.1 if last else 0.01)


def other_patterns(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers(), exclude_from_weight_decay=("b",) if last else ())


def other_lr(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers(), lr=torch.tensor(0.5 if last else 0.25))


def other_stage(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers(), stage=2 if last else 1)


def other_clip(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers(), max_grad_norm=1.0 if last else None)


def other_buckets(last: bool) -> ShardedLamb:
    return ShardedLamb(two_layers(), bucket_mb=1e-4 if last else 32)


def other_frozen(last: bool) -> ShardedLamb:
    pairs = two_layers()
    pairs[1][1].requires_grad_(not last)
    return ShardedLamb(pairs)


def other_kernel(last: bool) -> ShardedLamb:
    """As on a host without a compiler, where "auto" selects another kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDED_LAMB_KERNEL", "torch" if last else "cpp")
        return ShardedLamb(two_layers())


DISAGREEMENTS = {
    other_shape: ("parameter 0", "[4, 3]", "[3, 4]"),
    other_order: ("parameter 0", "'a'", "'b'"),
    other_count: ("parameter 1", "'b'"),
    other_dtype: ("parameter 0", "torch.float32", "torch.bfloat16"),
    other_option: ("options of group 0", "0.01", "0.1"),
    other_patterns: ("options of group 0", "exclude_from_weight_decay"),
    other_lr: ("options of group 0", "0.25", "0.5"),
    other_stage: ("settings", "'stage': '1'", "'stage': '2'"),
    other_clip: ("max_grad_norm", "None", "1.0"),
    other_buckets: ("settings", "bucket_mb"),
    other_frozen: ("parameter 1", "'b'"),
    other_kernel: (
        "kernel",
        "'cpp'",
        "'torch'",
        "compiler, or the wheel, on the host of rank 1",
        "kernel='torch'",
        "SHARDED_LAMB_KERNEL=torch",
    ),
}


def construct_last_unlike(rank: int, world: int, make: Callable[[bool], ShardedLamb]) -> None:
    make(rank == world - 1)


@pytest.mark.parametrize("make", DISAGREEMENTS, ids=lambda make: make.__name__)
def test_disagreement_is_named_on_every_rank(make: Callable[[bool], ShardedLamb]) -> None:
    errors = errors_of(2, construct_last_unlike, 2, make)
    all_say(errors, "ValueError", "ranks disagree", "rank 0 has", "rank 1", *DISAGREEMENTS[make])
    assert "Construct the same model and optimizer on every rank" in errors[0][1]


def construct_with_own_decay(rank: int) -> None:
    ShardedLamb(two_layers(), weight_decay=0.1 * (rank % 3))


def test_every_rank_that_differs_is_named() -> None:
    errors = errors_of(4, construct_with_own_decay)
    all_say(errors, "ValueError", "rank 1 has", "rank 2 has")
    assert all("rank 3 has" not in message for _, message in errors.values())  # it agrees with rank 0


def add_group_unlike(rank: int) -> None:
    opt = ShardedLamb(two_layers())
    opt.add_param_group({"params": [("c", nn.Parameter(torch.ones(3 + rank)))]})


def test_disagreement_on_an_added_group() -> None:
    all_say(
        errors_of(2, add_group_unlike), "ValueError", "ranks disagree", "parameter 2", "'c', [3]", "'c', [4]"
    )


def continue_after_disagreement(rank: int) -> dict[str, Tensor]:
    """A rejected group does not change the optimizer."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.01, stage=2)
    with pytest.raises(ValueError, match="ranks disagree"):
        opt.add_param_group({"params": [("c", nn.Parameter(torch.ones(3 + rank)))]})
    assert len(opt.param_groups) == 1
    training.train(opt, params, stage=2, rank=rank, world=2, steps=range(2))
    return training.copies(params)


def test_a_rejected_group_changes_nothing() -> None:
    oracle = training.oracle_of_ranks(2, range(2), lr=0.01)
    for weights in run_ranks(2, continue_after_disagreement):
        training.assert_follows(weights, oracle)


def fail_alone(rank: int, failing: int) -> None:
    ShardedLamb(two_layers(), eps=-1.0 if rank == failing else 1e-6)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_local_error_raises_on_every_rank(failing: int) -> None:
    errors = errors_of(3, fail_alone, failing)
    all_say(errors, "ValueError", "eps must be a finite number > 0", "-1.0")
    for rank, (_, message) in errors.items():
        assert rank == failing or ("ranks disagree" in message and f"rank {failing}" in message)


def fail_alone_on_a_parameter(rank: int) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64 if rank == 1 else torch.float32))
    ShardedLamb([("p", p)])


def test_a_local_wrong_parameter_raises_on_every_rank() -> None:
    errors = errors_of(2, fail_alone_on_a_parameter)
    assert errors[1][0] == "TypeError"
    assert errors[0][0] == "ValueError"
    all_say({rank: ("", message) for rank, (_, message) in errors.items()}, "", "complex64")


def stay_away(rank: int, absent: tuple[int, ...]) -> str:
    agreement.TIMEOUT_S = 2.0
    try:
        if rank in absent:
            return "absent"
        with pytest.raises(RuntimeError, match="did not construct its ShardedLamb") as caught:
            ShardedLamb(two_layers())
        return str(caught.value)
    finally:
        agreement.TIMEOUT_S = 60.0
        dist.destroy_process_group()  # construction counts differ now: these workers must not be reused


@pytest.mark.parametrize("absent", [(1,), (0,), (1, 2)], ids=str)
def test_a_rank_that_never_constructs_is_named(absent: tuple[int, ...]) -> None:
    messages = run_ranks(3, stay_away, absent, timeout=SECONDS + 10)
    named = "rank " + ", ".join(map(str, absent))
    for rank, message in enumerate(messages):
        if rank not in absent:
            assert named in message, message
            assert "Look for an earlier error there" in message


# -- gradients that stage 1 must reject ----------------------------------------------------------------------


def train_on_own_gradients(rank: int) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items())
    training.backward(params, training.own_gradients(rank, 0))
    opt.step()


def test_stage_1_rejects_gradients_that_are_not_averaged() -> None:
    all_say(
        errors_of(2, train_on_own_gradients),
        "ValueError",
        "stage=1 got different gradients",
        "not averaged over ranks",
        "Wrap the model in DistributedDataParallel",
        "ShardedLamb(stage=2)",
    )


def own_gradients_of_one_small_parameter(rank: int) -> None:
    """Gradients agree except for one parameter of one element, about a thousandth of the total."""
    params = training.parameters()
    opt = ShardedLamb(params.items())
    grads = training.own_gradients(0, 0)
    grads["fc.bias"] = torch.full((1,), 10.0 * rank)
    training.give(params, grads)
    opt.step()


def test_stage_1_sees_one_parameter_that_differs() -> None:
    all_say(errors_of(2, own_gradients_of_one_small_parameter), "ValueError", "not averaged over ranks")


def miss_one_gradient(rank: int, step_of_it: int) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items())
    for step in range(step_of_it + 1):
        grads = training.own_gradients(0, step)
        if rank == 1 and step == step_of_it:
            grads["fc.weight"] = None
        training.give(params, grads)
        opt.step()


@pytest.mark.parametrize("step_of_it", [0, 4])
def test_stage_1_rejects_a_gradient_on_one_rank_only(step_of_it: int) -> None:
    all_say(
        errors_of(2, miss_one_gradient, step_of_it),
        "ValueError",
        "a gradient of 'fc.weight' on 1 of 2 ranks only",
        "find_unused_parameters=True",
        "stage=2",
    )


def nan_at_first(rank: int) -> int:
    params = training.parameters()
    opt = ShardedLamb(params.items())
    grads = training.own_gradients(0, 0)
    if rank == 1:
        grads["embed.weight"] = torch.full((67, 31), torch.nan)
    training.give(params, grads)
    opt.step()
    return opt.skipped_steps


def test_non_finite_gradients_do_not_count_as_unaveraged() -> None:
    assert run_ranks(2, nan_at_first) == [1, 1]


def ddp_with_stage_1(rank: int) -> dict[str, Tensor]:
    model = nn.Linear(7, 5)
    wrapped = DistributedDataParallel(model)
    opt = ShardedLamb(wrapped.named_parameters(), lr=0.01)
    for step in range(3):
        wrapped(training.draw((4, 7), rank, step)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert set(opt.trust_ratios()) == {"weight", "bias"}  # without the wrapper's prefix
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_stage_1_under_ddp() -> None:
    one, other = run_ranks(2, ddp_with_stage_1)
    training.assert_same_bits(one, other)


def ddp_with_stage_2(rank: int) -> None:
    wrapped = DistributedDataParallel(nn.Linear(7, 5))
    opt = ShardedLamb(wrapped.named_parameters(), stage=2)
    wrapped(torch.ones(2, 7)).sum().backward()
    opt.step()


def test_stage_2_under_ddp_raises() -> None:
    all_say(
        run_ranks_expecting_errors(2, ddp_with_stage_2, timeout=SECONDS),
        "ValueError",
        "stage=2 reduces gradients itself",
        "DistributedDataParallel",
        "pass the bare model, or use stage=1",
    )


# -- parameters that cannot be sharded here ------------------------------------------------------------------


def fake_flat_parameter() -> nn.Parameter:
    p = nn.Parameter(torch.ones(8))
    p._is_flat_param = True
    return p


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_fsdp1_flat_parameter_raises(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"'flat' is a flat parameter of FSDP1.*fully_shard"):
        cls([("flat", fake_flat_parameter())])


def fsdp1(rank: int, cls: Any, views: bool, before: bool) -> None:
    """``before``: the optimizer is constructed before the parameters are sharded."""
    model = nn.Linear(7, 5)
    opt = cls(model.named_parameters()) if before else None
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=views)
    opt = opt or cls(sharded.named_parameters())
    sharded(torch.ones(2, 7)).sum().backward()
    opt.step()


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("views", [False, True])
def test_real_fsdp1_raises(cls: Any, views: bool) -> None:
    all_say(errors_of(2, fsdp1, cls, views, False), "ValueError", "flat parameter of FSDP1", "fully_shard")


def test_parameters_that_fsdp1_shards_after_construction_raise() -> None:
    all_say(errors_of(2, fsdp1, Lamb, True, True), "ValueError", "flat parameter of FSDP1", "fully_shard")
    all_say(errors_of(2, fsdp1, ShardedLamb, True, True), "RuntimeError", "is no longer in its bucket")


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_complex_and_sparse_parameters_raise(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"'c' is torch\.complex64: LAMB is defined for real parameters"):
        cls([("c", nn.Parameter(torch.ones(3, dtype=torch.complex64)))])
    sparse = torch.eye(3).to_sparse().requires_grad_()
    with pytest.raises(TypeError, match=r"'s' has layout torch\.sparse_coo: LAMB needs dense"):
        cls([("s", sparse)])


def test_meta_parameter_raises() -> None:
    with pytest.raises(ValueError, match=r"'weight' is on the meta device: call model\.to_empty"):
        ShardedLamb(nn.Linear(3, 2, device="meta").named_parameters())


def step_with_sparse_gradient(rank: int, stage: int) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    opt = ShardedLamb(embedding.named_parameters(), stage=stage)
    embedding(torch.tensor([1, 2])).sum().backward()
    opt.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_sparse_gradient_raises(stage: int) -> None:
    errors = run_ranks_expecting_errors(2, step_with_sparse_gradient, stage, timeout=SECONDS)
    all_say(errors, "TypeError", "the gradient of 'weight' has layout torch.sparse_coo", "sparse=False")


def test_lamb_rejects_a_sparse_gradient() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    opt = Lamb(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"the gradient of 'weight' has layout torch\.sparse_coo"):
        opt.step()


def test_several_ranks_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"WORLD_SIZE=2 and torch\.distributed is not initialized.*init_process"
    ):
        ShardedLamb(two_layers())


def second_optimizer(rank: int) -> None:
    pairs = two_layers()
    first = ShardedLamb(pairs)
    try:
        ShardedLamb(pairs[1:])
    finally:
        assert len(first.param_groups) == 1  # keeps `first` alive


def test_second_optimizer_on_the_same_parameters() -> None:
    all_say(errors_of(2, second_optimizer), "ValueError", "'b' already belongs to another ShardedLamb")


def two_over_one_memory(rank: int) -> None:
    p = nn.Parameter(torch.ones(6))
    ShardedLamb([("a", p), ("b", nn.Parameter(p.data.view(2, 3)))])


def test_two_parameters_over_the_same_memory() -> None:
    all_say(errors_of(2, two_over_one_memory), "ValueError", "'a' and 'b'", "the same memory")
