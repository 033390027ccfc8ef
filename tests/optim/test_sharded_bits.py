"""The same averaged gradients give the same bits on any number of ranks, threads and buckets; and the reasons."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_lamb.core import rule
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.kernels.reference import CHUNK_BLOCKS, add_by_parameter, block_square_sums
from tests.harness import run_ranks
from tests.sharded_cases import Case, run

WORLDS = [1, 2, 3, 4, 8]

MANY = Case(
    shapes={
        "embed.weight": (307, 251),  # more than one chunk of the kernel
        "body.weight": (64, 256),  # whole blocks
        "body.bias": (257,),
        "one": (1,),
        "scalar": (),
        "nothing": (0,),
        "prime": (7919,),
        "head.weight": (31, 37),
    },
    options={"max_grad_norm": 1.0, "weight_decay": 0.01},
    groups=(
        (("embed.weight", "one", "prime"), {}),
        (("body.weight", "body.bias", "nothing"), {"lr": 3e-3, "trust_clip": (0.01, 10.0)}),
        (("head.weight", "scalar"), {"betas": (0.8, 0.95), "adam_w_mode": False, "bias_correction": False}),
    ),
    no_decay=frozenset({"body.bias", "one"}),
    no_adapt=frozenset({"scalar"}),
    settings={"bucket_mb": 0.05},
)
SMALL = Case(
    shapes={f"p{i}": shape for i, shape in enumerate([(3,), (129, 5), (), (1021,), (2, 2, 2), (255,)])},
    options={"max_grad_norm": 0.3},
    settings={"bucket_mb": 32},
    seed=5,
)
CAUTION = replace(MANY, options={**MANY.options, "caution": True})
LANS = replace(MANY, options={**MANY.options, "normalize_grad": True, "nesterov": True})
ONE_TALL = Case(shapes={"w": (1000, 101)}, options={"max_grad_norm": 3.0}, missing=0.0, seed=11)


def params_of(case: Case, world: int, threads: int = 1) -> dict[str, Tensor]:
    first, *others = [outcome.params for outcome in run_ranks(world, run, case, world, threads)]
    for other in others:
        assert same_bits(other, first)
    return first


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Includes signs of zeros; for `torch.equal`, -0 is 0."""
    return {n: x.numpy().tobytes() for n, x in a.items()} == {n: x.numpy().tobytes() for n, x in b.items()}


@pytest.mark.parametrize(
    ("case", "worlds"),
    [(MANY, WORLDS[1:]), (SMALL, [2, 3]), (ONE_TALL, [3, 4]), (LANS, [2, 3, 4]), (CAUTION, [2, 3, 4])],
    ids=["many", "small", "tall", "lans", "caution"],
)
def test_bits_do_not_depend_on_world_size(case: Case, worlds: list[int]) -> None:
    alone = params_of(case, 1)
    for world in worlds:
        params = params_of(case, world)
        differing = [name for name in alone if not torch.equal(alone[name], params[name])]
        assert same_bits(params, alone), f"{world} ranks differ from one in {differing}"


@pytest.mark.parametrize("world", [1, 2])
def test_bits_do_not_depend_on_threads(world: int) -> None:
    assert same_bits(params_of(MANY, world, threads=1), params_of(MANY, world, threads=4))


@pytest.mark.parametrize("world", [1, 3])
def test_bits_do_not_depend_on_bucket_size(world: int) -> None:
    runs = [params_of(replace(MANY, settings={"bucket_mb": mb}), world) for mb in (0.001, 0.05, 0.31, 32)]
    assert all(same_bits(params, runs[0]) for params in runs)


def test_norms_round_away_the_order_of_sums() -> None:
    """fp64 sums depend on the order of the ranks' parts; the results of `norms` do not."""
    rng = np.random.default_rng(0)
    is_fp64, raw_differences = torch.zeros(1, dtype=torch.bool), 0
    for trial in range(400):
        blocks = torch.from_numpy(rng.random(97) * 10.0 ** rng.integers(-6, 3, 97)).float().double()
        sums = []
        for world in WORLDS:
            parts = [part.sum() for part in blocks[torch.from_numpy(rng.permutation(97))].chunk(world)]
            sums.append(torch.stack(parts).cumsum(0)[-1])
        raw_differences += len({float(total) for total in sums}) > 1
        norms = {float(rule.norms(total.reshape(1), is_fp64)) for total in sums}
        assert len(norms) == 1, f"trial {trial}: {norms}"
        (value,) = norms
        assert value == float(np.float32(value))
    assert raw_differences > 50


def test_norms_of_float64_parameters_are_not_rounded() -> None:
    sums = torch.tensor([2.0, 2.0], dtype=torch.float64)
    rounded, exact = rule.norms(sums, torch.tensor([False, True])).tolist()
    assert exact == float(sums[1].sqrt())  # torch's sqrt may be MKL's, an ulp from 2.0**0.5
    assert rounded == float(np.float32(2.0**0.5)) != exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_sums_depend_on_the_block_only(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 + 2 * CHUNK_BLOCKS, BLOCK, generator=generator, dtype=dtype)
    whole = block_square_sums(x)
    for index in (0, 1, 17, len(x) - 1):
        alone = x[index : index + 1].clone()
        memory = torch.zeros(BLOCK + 3, dtype=dtype)
        for offset in range(4):  # vector instructions may handle unaligned memory differently
            shifted = memory[offset : offset + BLOCK].copy_(alone[0]).view(1, -1)
            assert torch.equal(block_square_sums(shifted)[0], whole[index])
        for low in (max(index - 5, 0), index):
            assert torch.equal(block_square_sums(x[low : index + 3])[index - low], whole[index])


def test_block_sums_are_pairwise() -> None:
    x = torch.randn(37, BLOCK, generator=torch.Generator().manual_seed(1))
    total = np.square(x.numpy())
    while total.shape[1] > 1:
        total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
    assert total.dtype == np.float32
    np.testing.assert_array_equal(block_square_sums(x).numpy(), total[:, 0])


def test_block_sums_do_not_depend_on_threads() -> None:
    x = torch.randn(4 * CHUNK_BLOCKS, BLOCK, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(block_square_sums(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(sums, results[0]) for sums in results)


def test_blocks_are_added_in_float64_to_their_own_parameter() -> None:
    sums = torch.zeros(3, dtype=torch.float64)
    small = 2.0**-30  # lost if it were added to 1 in fp32
    add_by_parameter(sums, torch.tensor([0, 2, 0]), torch.tensor([1.0, 5.0, small]))
    assert sums.tolist() == [1.0 + small, 0.0, 5.0]
