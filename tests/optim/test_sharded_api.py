"""`ShardedLamb`'s interface: process groups, parameter groups, schedulers, closures, hooks, names, logging."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.kernels import choose
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.sharded_cases import (
    BASE,
    FP32_TOLERANCE,
    Case,
    Outcome,
    assert_differ,
    assert_near,
    assert_same_bits,
    average,
    check_run,
    give_gradients,
    make_optimizer,
    make_oracle,
    make_parameters,
    rank_gradients,
    run,
    take_steps,
)

SHAPES = {"embed": (97, 11), "fc": (31, 37), "bias": (257,), "one": (1,), "scale": (), "none": (0,)}
CASE = Case(
    shapes=SHAPES,
    options={"max_grad_norm": 1.0},
    groups=((("embed", "bias", "none"), {}), (("fc", "one", "scale"), {"lr": 2e-3, "weight_decay": 0.0})),
    settings={"bucket_mb": 0.001},
    drive="backward",
    seed=2,
)


def staged(stage: int, case: Case = CASE, **changes: Any) -> Case:
    """Stage 1 gets averaged gradients by assignment, stage 2 its own by backward."""
    return replace(case, settings={**case.settings, "stage": stage}, **changes)


both_stages = pytest.mark.parametrize("stage", [1, 2])

# -- ranks --------------------------------------------------------------------------------------------


def _in_group(rank: int, case: Case, members: list[int]) -> Outcome | None:
    group = dist.new_group(members)
    if rank not in members:
        return None
    params = make_parameters(case)
    opt = make_optimizer(case, params, process_group=group)
    return take_steps(case, params, opt, members.index(rank), len(members))


@pytest.mark.parametrize(("members", "stage"), [([0, 2], 1), ([1, 2, 3], 2), ([3], 2)])
def test_process_group_of_some_ranks(members: list[int], stage: int) -> None:
    outcomes = run_ranks(4, _in_group, staged(stage), members)
    assert [rank for rank, outcome in enumerate(outcomes) if outcome is not None] == members
    check_run(staged(stage), [outcomes[rank] for rank in members])


def _two_halves(rank: int, case: Case) -> Outcome:
    """Two optimizers at once, each over half of the ranks."""
    groups = [dist.new_group(half) for half in ([0, 1], [2, 3])]
    params = make_parameters(case)
    opt = make_optimizer(case, params, process_group=groups[rank // 2])
    return take_steps(case, params, opt, rank % 2, 2)


def test_disjoint_groups_do_not_disturb_each_other() -> None:
    outcomes = run_ranks(4, _two_halves, staged(2))
    check_run(staged(2), outcomes[:2])
    check_run(staged(2), outcomes[2:])


def _on_mesh(rank: int, case: Case, shape: tuple[int, ...]) -> Outcome:
    params = make_parameters(case)
    opt = make_optimizer(case, params, mesh=init_device_mesh("cpu", shape))
    return take_steps(case, params, opt, rank, 4)


@both_stages
@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4), (4, 1)], ids=str)
def test_mesh_shards_inside_and_replicates_across(shape: tuple[int, ...], stage: int) -> None:
    case = staged(stage)
    outcomes = run_ranks(4, _on_mesh, case, shape)
    check_run(case, outcomes)
    shards = shape[-1]
    for outcome in outcomes:
        assert outcome.memory["moments"] == outcome.memory["parameters"] * 2 // shards
        calls = outcome.calls
        assert calls["all_reduce_small"] == 2 * case.steps
        assert calls.get("all_gather", 0) == (0 if shards == 1 else calls["all_gather"])
        replicas = calls.get("all_reduce_replicas", 0)
        assert (replicas > 0) == (stage == 2 and len(shape) == 2 and shape[0] > 1)


def _wrong_ranks(rank: int, argument: str) -> None:
    p = Parameter(torch.ones(3))
    if argument == "both":
        ShardedLamb([p], process_group=dist.group.WORLD, mesh=init_device_mesh("cpu", (2,)))
    ShardedLamb([p], mesh=init_device_mesh("cpu", (2, 1, 1)))


@pytest.mark.parametrize(("argument", "message"), [("both", "both given"), ("3-D", "1 dimension")])
def test_wrong_ranks_are_rejected(argument: str, message: str) -> None:
    for kind, text in run_ranks_expecting_errors(2, _wrong_ranks, argument).values():
        assert kind == "ValueError"
        assert message in text


# -- parameters ---------------------------------------------------------------------------------------

LATE = {"fc": 3, "one": 3, "scale": 3}  # the second group


def _add_group(rank: int, case: Case, world: int) -> Outcome:
    params = make_parameters(case)
    (first, own), (second, late) = case.groups
    opt = ShardedLamb(
        [{"params": [(n, params[n]) for n in first], **own}], **{**BASE, **case.options, **case.settings}
    )

    def before_step(step: int) -> None:
        if step == LATE["fc"]:
            opt.add_param_group({"params": [(name, params[name]) for name in second], **late})

    return take_steps(case, params, opt, rank, world, before_step)


@both_stages
@pytest.mark.parametrize("world", [1, 3])
def test_group_added_later_follows_the_oracle(world: int, stage: int) -> None:
    case = staged(stage, absent_until=LATE)
    check_run(case, run_ranks(world, _add_group, case, world))


def _unfreeze(rank: int, case: Case, world: int, frozen_share: bool) -> tuple[Outcome, dict[str, int], int]:
    params = make_parameters(case)
    for name in LATE:
        params[name].requires_grad_(False)
    opt = make_optimizer(case, params)
    memory, states = opt.memory(), len(opt.state)

    def before_step(step: int) -> None:
        if step == LATE["fc"]:
            for name in LATE:
                params[name].requires_grad_(True)

    return take_steps(case, params, opt, rank, world, before_step), memory, states


@both_stages
@pytest.mark.parametrize("world", [1, 3])
def test_frozen_parameters_take_no_memory_until_unfrozen(world: int, stage: int) -> None:
    case = staged(stage, absent_until=LATE)
    results = run_ranks(world, _unfreeze, case, world, True)
    check_run(case, [outcome for outcome, _, _ in results])
    without = replace(case, shapes={n: s for n, s in SHAPES.items() if n not in LATE}, groups=(), steps=0)
    for (_, memory, states), bare in zip(results, run_ranks(world, run, without, world), strict=True):
        assert memory == bare.memory
        assert states == len(SHAPES) - len(LATE)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 16)
        self.fc = nn.Linear(16, 16)
        self.head = nn.Linear(16, 29, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.embed(tokens))))


def _train_tied(rank: int, world: int, make: Callable[..., Any], **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Tied().double()
    net = DistributedDataParallel(model) if settings.get("stage") == 1 else model
    opt = make(model.named_parameters(), lr=0.02, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        tokens, labels = torch.randint(29, (2, 12), generator=generator)
        tokens, labels = tokens.chunk(world)[rank], labels.chunk(world)[rank]
        nn.functional.cross_entropy(net(tokens), labels).backward()
        opt.step()
        opt.zero_grad()
    assert model.head.weight is model.embed.weight
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@both_stages
def test_tied_parameters_are_one_parameter(stage: int) -> None:
    expected = _train_tied(0, 1, Lamb)
    for params in run_ranks(3, _train_tied, 3, ShardedLamb, stage=stage, bucket_mb=0.001):
        assert params.keys() == expected.keys() == {"embed.weight", "fc.weight", "fc.bias"}
        for name, value in params.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


# -- lr, schedulers, closures, hooks --------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: LambdaLR(opt, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.05, total_steps=CASE.steps + 1),
}


def _scheduled(rank: int, case: Case, world: int, kind: str) -> tuple[Outcome, list[Any]]:
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    scheduler = SCHEDULERS[kind](opt)
    seen: list[Any] = []

    def before_step(step: int) -> None:
        if step:
            scheduler.step()
        seen.append([(group["lr"], group["betas"]) for group in opt.param_groups])

    return take_steps(case, params, opt, rank, world, before_step), seen


def _oracle_on_schedule(case: Case, world: int, seen: list[Any]) -> dict[str, Tensor]:
    oracle = make_oracle(case)
    for step, values in enumerate(seen):
        for (names, _), (lr, betas) in zip(case.groups, values, strict=True):
            for name in names:
                oracle.options[name].update(lr=lr, betas=betas)
        oracle.step(average(rank_gradients(case, step, world)))
    return {name: torch.from_numpy(value) for name, value in oracle.params.items()}


@both_stages
@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_schedulers_write_groups(kind: str, stage: int) -> None:
    case = staged(stage)
    for outcome, seen in run_ranks(2, _scheduled, case, 2, kind):
        lrs = {group[0] for step in seen for group in step}
        assert len(lrs) > case.steps / 2
        assert (len({group[1] for step in seen for group in step}) > 1) == (kind == "OneCycleLR")
        assert_near(outcome.params, _oracle_on_schedule(case, 2, seen), FP32_TOLERANCE)


def _tensor_lr(rank: int, case: Case, world: int, tensor: bool) -> Outcome:
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    lrs: list[Any] = [0.01, 0.01]
    if tensor:
        lrs = [torch.tensor(0.01, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)]
    for group, lr in zip(opt.param_groups, lrs, strict=True):
        group["lr"] = lr

    def before_step(step: int) -> None:
        for group in opt.param_groups:
            if tensor:
                group["lr"].mul_(0.5)
            else:
                group["lr"] *= 0.5

    return take_steps(case, params, opt, rank, world, before_step)


@both_stages
def test_tensor_lr_is_read_at_every_step(stage: int) -> None:
    with_tensors = run_ranks(2, _tensor_lr, staged(stage), 2, True)
    with_floats = run_ranks(2, _tensor_lr, staged(stage), 2, False)
    assert_same_bits(with_tensors[0].params, with_floats[0].params)
    assert_differ(with_floats[0].params, run_ranks(2, run, staged(stage), 2)[0].params, "embed", "fc")


def _with_closure(rank: int, case: Case, world: int) -> tuple[dict[str, Tensor], list[float]]:
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    losses = []
    for step in range(case.steps):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            opt.zero_grad()
            give_gradients(case, params, rank_gradients(case, step, world)[rank])
            return torch.tensor(float(step))

        losses.append(float(opt.step(closure)))
    return {name: p.detach().clone() for name, p in params.items()}, losses


@both_stages
def test_closure_is_called_once_and_its_loss_returned(stage: int) -> None:
    plain = run_ranks(2, run, staged(stage), 2)
    for params, losses in run_ranks(2, _with_closure, staged(stage), 2):
        assert losses == list(range(CASE.steps))
        assert_same_bits(params, plain[0].params)


def test_step_hooks_and_no_loss() -> None:
    p = Parameter(torch.ones(3))
    opt = ShardedLamb([p])
    before = p.detach().clone()
    seen: list[tuple[str, bool]] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", torch.equal(p, before))))
    handle = opt.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", torch.equal(p, before)))
    )
    p.grad = torch.ones(3)
    assert opt.step() is None
    assert seen == [("pre", True), ("post", False)]
    handle.remove()
    opt.step()
    assert [name for name, _ in seen] == ["pre", "post", "pre"]


# -- names and the log --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module._fsdp_wrapped_module._checkpoint_wrapped_module.{}",
    ],
)
def test_names_omit_wrappers(name: str) -> None:
    params = [Parameter(torch.full((4,), 2.0)) for _ in range(2)]
    names = [name.format("fc.weight"), name.format("fc.bias")]
    opt = ShardedLamb(
        zip(names, params, strict=True), weight_decay=0.5, exclude_from_weight_decay=(r"^fc\.bias$",)
    )
    for p in params:
        p.grad = torch.zeros(4)
    opt.step()
    assert opt.trust_ratios().keys() == {"fc.weight", "fc.bias"}
    assert [bool((p == 2).all()) for p in params] == [False, True]


def _wrapped_names(rank: int) -> list[str]:
    model = DistributedDataParallel(torch.compile(nn.Sequential(nn.Linear(3, 2))))
    opt = ShardedLamb(model.named_parameters(), exclude_from_weight_decay=(r"^0\.bias$",))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return sorted(opt.trust_ratios())


def test_names_of_a_wrapped_model() -> None:
    assert run_ranks(2, _wrapped_names) == [["0.bias", "0.weight"]] * 2


def _log_lines(rank: int) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("sharded_lamb")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        params = [
            ("w", Parameter(torch.ones(512))),
            ("b", Parameter(torch.ones(3))),
            ("s", Parameter(torch.ones(()))),
        ]
        opt = ShardedLamb(
            params,
            stage=2,
            variant="nvlamb",
            exclude_from_weight_decay=("b", "s"),
            exclude_from_layer_adaptation=("s",),
        )
        assert not lines
        for _ in range(3):
            for _, p in params:
                p.grad = torch.ones_like(p)
            opt.step()
        return lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_first_step_logs_one_line_on_the_first_rank() -> None:
    (line,), *others = run_ranks(2, _log_lines)
    assert others == [[]]
    assert line == (
        "INFO ShardedLamb stage 2: 2 ranks, 3 tensors (2 without decay, 1 without ratio), "
        f"{2 * 4 * 512:,} bytes of state per rank, kernel {choose('auto', torch.device('cpu')).name}, variant nvlamb"
    )
