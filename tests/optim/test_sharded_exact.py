"""`ShardedLamb` against the fp64 oracle, and real models against `Lamb` on one process, on several world sizes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import Lamb, ShardedLamb
from tests.harness import run_ranks
from tests.sharded_cases import Case, check_run, run

NAMES = ("embed.weight", "block.0.weight", "block.0.bias", "norm.weight", "scale", "head.weight")
# Blocks are 256 elements: below, at, just above, and primes of several blocks.
SHAPES = [(), (0,), (1,), (7,), (13, 3), (4, 0), (256,), (257,), (509,), (31, 37), (2, 3, 211)]

GROUP_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([1e-3, 0.01]),
    "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.0, 0.99)]),
    "eps": st.sampled_from([1e-8, 1e-6, 1e-2]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
    "bias_correction": st.sampled_from([True, False, "lr"]),
    "grad_averaging": st.booleans(),
    "adam_w_mode": st.booleans(),
    "eps_inside_sqrt": st.booleans(),
    "trust_clip": st.sampled_from([None, (0.01, 10.0), (0.5, 1.5)]),
    "weight_norm_clip": st.sampled_from([None, (0.0, 1.0), (0.5, 5.0)]),
    "adapt_without_decay": st.booleans(),
    "normalize_grad": st.booleans(),
    "nesterov": st.booleans(),
    "trust_coefficient": st.sampled_from([1.0, 0.3]),
    "decoupled_decay": st.booleans(),
}
LANS = {"normalize_grad": True, "nesterov": True}
LARS = {"lars": True, "trust_coefficient": 0.02, "bias_correction": False, "adam_w_mode": False}
CAUTION = {"caution": True, "betas": (0.5, 0.95)}  # see test_caution.py


def without_contradiction(
    given: dict[str, Any], options: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Decay is outside the update, or in the gradient."""
    decoupled = {**options, **given}.get("decoupled_decay", False)
    return {**given, "adam_w_mode": True} if decoupled else given


@st.composite
def cases(draw: st.DrawFn, stage: int) -> Case:
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    options = without_contradiction(draw(st.fixed_dictionaries({}, optional=GROUP_OPTIONS)))
    options["max_grad_norm"] = draw(st.sampled_from([None, 0.1, 5.0]))
    cut = draw(st.integers(0, len(names)))
    own = st.fixed_dictionaries({}, optional=GROUP_OPTIONS).map(
        lambda given: without_contradiction(given, options)
    )
    subsets = st.just(frozenset()) | st.frozensets(st.sampled_from(names))
    return Case(
        shapes={name: draw(st.sampled_from(SHAPES)) for name in names},
        options=options,
        groups=tuple((part, draw(own)) for part in (names[:cut], names[cut:]) if part),
        no_decay=draw(subsets),
        no_adapt=draw(subsets),
        settings={"stage": stage, "bucket_mb": draw(st.sampled_from([0.0001, 0.001, 0.004, 32]))},
        missing=draw(st.sampled_from([0.0, 0.2, 0.6])),
        drive=draw(st.sampled_from(["assign", "backward"])) if stage == 2 else "assign",
        seed=draw(st.integers(0, 2**32 - 1)),
    )


UGLY = Case(
    shapes={
        "embed.weight": (97, 41),
        "block.0.weight": (31, 37),
        "block.0.bias": (1,),
        "norm.weight": (0,),
        "scale": (),
        "head.weight": (1031,),
    },
    options={"max_grad_norm": 1.0, "weight_decay": 0.01},
    groups=(
        (("embed.weight", "norm.weight", "scale"), {}),
        (("block.0.weight", "block.0.bias"), {"lr": 1e-3, "trust_clip": (0.01, 10.0)}),
        (("head.weight",), {"betas": (0.8, 0.95), "weight_decay": 0.3}),
    ),
    no_decay=frozenset({"block.0.bias", "norm.weight"}),
    no_adapt=frozenset({"scale"}),
    settings={"bucket_mb": 0.001},
)


def ugly(stage: int, **changes: Any) -> Case:
    return Case(**{**vars(UGLY), "settings": {**UGLY.settings, "stage": stage}, **changes})


@pytest.mark.parametrize("world", [1, 2, 3])
@settings(max_examples=6)
@given(case=cases(1))
def test_stage_1_follows_the_oracle(world: int, case: Case) -> None:
    check_run(case, run_ranks(world, run, case, world))


@pytest.mark.parametrize("world", [1, 2, 3])
@settings(max_examples=6)
@given(case=cases(2))
def test_stage_2_follows_the_oracle(world: int, case: Case) -> None:
    check_run(case, run_ranks(world, run, case, world))


UGLY_CASES = {
    "1": ugly(1),
    "1-missing": ugly(1, missing=0.9),
    "2": ugly(2),
    "2-backward": ugly(2, drive="backward"),
    "2-backward-missing": ugly(2, drive="backward", missing=0.9),
}
for rule, options in {"lans": LANS, "lars": LARS, "caution": CAUTION}.items():
    ruled = {**UGLY.options, **options}
    UGLY_CASES[f"1-{rule}"] = ugly(1, options=ruled, missing=0.5)
    UGLY_CASES[f"2-{rule}"] = ugly(2, drive="backward", options=ruled, missing=0.5)
PLACES = [(3, case) for case in UGLY_CASES]
PLACES += [(1, "1"), (1, "2-backward-missing"), (1, "2-lans"), (1, "1-lars"), (1, "2-caution")]
PLACES += [(2, "1-missing"), (2, "2"), (2, "2-backward"), (2, "1-lans"), (2, "2-lars"), (2, "1-caution")]
PLACES += [(4, "1"), (4, "2-backward"), (4, "2-backward-missing"), (8, "1-missing"), (8, "2")]


@pytest.mark.parametrize(("world", "case"), PLACES)
def test_ugly_shapes_follow_the_oracle(world: int, case: str) -> None:
    """All cases on three ranks; on one and on two, each stage, drive and rule."""
    check_run(UGLY_CASES[case], run_ranks(world, run, UGLY_CASES[case], world))


class Model(nn.Module):
    """Embedding, LayerNorm, MLP with a 0-d scale; mean loss, so that averages over ranks are the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(53, 16)
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 61), nn.Linear(61, 7)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(self.embed(tokens))))) * self.scale


MODEL_OPTIONS = {
    "lr": 0.02,
    "weight_decay": 0.05,
    "max_grad_norm": 0.5,
    "exclude_from_weight_decay": ("bias", "norm"),
}
BATCH, STEPS = 24, 5


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(53, (BATCH,), generator=generator)
    return tokens, torch.randint(7, (BATCH,), generator=generator)


def train_alone(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    opt = Lamb(model.named_parameters(), **MODEL_OPTIONS)
    for step in range(STEPS):
        tokens, labels = batch(step)
        nn.functional.cross_entropy(model(tokens), labels).backward()
        opt.step()
        opt.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def train_sharded(rank: int, world: int, stage: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(rank)  # construction broadcasts the first rank's weights
    model = Model().to(dtype)
    net = DistributedDataParallel(model) if stage == 1 else model
    opt = ShardedLamb(net.named_parameters(), stage=stage, bucket_mb=0.004, **MODEL_OPTIONS)
    for step in range(STEPS):
        tokens, labels = (x.chunk(world)[rank] for x in batch(step))
        nn.functional.cross_entropy(net(tokens), labels).backward()
        opt.step()
        opt.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_model_trains_as_on_one_device(stage: int, world: int) -> None:
    """In float64, where the gradients of micro-batches sum to the batch's to 1e-15."""
    expected = train_alone(torch.float64)
    ranks = run_ranks(world, train_sharded, world, stage, torch.float64)
    for name, value in expected.items():
        gap = float((ranks[0][name] - value).norm() / value.norm())
        assert gap < 1e-7, f"{name}: {gap}"
        assert all(torch.equal(params[name], ranks[0][name]) for params in ranks)


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_of_a_float32_model_stay_bit_identical(stage: int) -> None:
    start = {name: p.detach() for name, p in Model().named_parameters()}
    ranks = run_ranks(3, train_sharded, 3, stage, torch.float32)
    for name in start:
        assert not torch.equal(ranks[0][name], start[name])
        assert all(torch.equal(params[name], ranks[0][name]) for params in ranks)
