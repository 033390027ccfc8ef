"""Moments of 8 bits: the code, its rounding, and whole optimizers that store them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.kernels import ScatteredShard, formats
from sharded_lamb.kernels.block_codes import BLOCK_BYTES, BlockFormat, random_bits, random_halves
from tests import training
from tests.harness import run_ranks
from tests.optim.test_sharded_bits import MANY, same_bits
from tests.sharded_cases import BASE, Case, initial_values, make_optimizer, make_parameters, run, take_steps

FIRST, SECOND = formats.CODES
BOTH = pytest.mark.parametrize("form", [FIRST, SECOND], ids=["first", "second"])
INT8: dict[str, Any] = {"state_dtype": torch.int8}


# -- the code, in float64 from its definition ----------------------------------------------------------------


def magnitudes(largest_e: int) -> np.ndarray:
    """All magnitudes in units of the origin, in the order of their codes."""
    fraction = np.arange(16) / 16
    return np.concatenate([2 * fraction, *(2.0**e * (1 + fraction) for e in range(1, largest_e + 1))])


def expected_origin(values: np.ndarray, largest_e: int) -> np.ndarray:
    """[blocks, 1] of finite values."""
    top = np.abs(values).max(axis=1, keepdims=True)
    exponent = np.floor(np.log2(np.where(top > 0, top, 1)))
    exponent += top > 31 / 16 * 2.0**exponent
    return np.maximum(np.where(top > 0, 2.0 ** (exponent - largest_e), 0), 2.0**-95)


def decoded(form: BlockFormat, memory: Tensor) -> np.ndarray:
    """[blocks, BLOCK] float64, read from the bytes."""
    largest_e = 7 if form.signed else 15
    raw = memory.numpy()
    origin = np.ascontiguousarray(raw[:, :4]).view(np.float32).astype(np.float64)
    codes = raw[:, 4:].astype(int)
    sign = np.where(codes > form.largest, -1.0, 1.0)
    return sign * origin * magnitudes(largest_e)[codes & form.largest]


def blocks(form: BlockFormat, values: list[float]) -> Tensor:
    """[n, BLOCK] whose blocks begin with ``values``, each n-th of them."""
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor if form.signed else tensor.abs()


@st.composite
def numbers(draw: st.DrawFn) -> Tensor:
    """Some blocks of numbers of all magnitudes, some zeros, perhaps one far larger than the rest."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = draw(st.integers(1, 3)), BLOCK
    powers = torch.randint(*draw(st.sampled_from([(-12, 4), (-30, -20), (-140, -120), (100, 126)])), shape)
    values = torch.randn(shape, generator=generator).clamp(-3, 3) * 2.0 ** powers.float()
    values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    if draw(st.booleans()):
        values[:, 7] = values.abs().max() * 2.0**10
    return values.clamp(-3e38, 3e38)


@BOTH
@given(numbers())
@example(torch.zeros(1, BLOCK))
@example(torch.full((1, BLOCK), 1e-45))
@example(torch.tensor([[3e38, *[1e-3] * (BLOCK - 1)]]))
def test_values_are_rounded_to_the_nearest_code(form: BlockFormat, values: Tensor) -> None:
    values = values if form.signed else values.abs()
    memory, _ = form.encode(values)
    assert memory.dtype == torch.uint8
    assert memory.shape == form.shape(values.numel())
    own, exact = decoded(form, memory), values.double().numpy()
    largest_e = 7 if form.signed else 15
    origin = expected_origin(exact, largest_e)
    grid = origin * magnitudes(largest_e)
    size = np.abs(exact)
    nearest = np.abs(size[:, :, None] - grid[:, None, :]).min(axis=2)
    kept = np.where((size > 0) & (own == 0) | form.signed, 0, (size > 0) & (size < grid[:, 1:2] / 2))
    error = np.abs(np.abs(own) - size)
    assert (error[kept == 0] <= nearest[kept == 0] * (1 + 1e-6)).all()
    assert (np.abs(own)[kept == 1] == np.broadcast_to(grid[:, 1:2], size.shape)[kept == 1]).all()
    if not form.signed:
        assert ((own > 0) == (size > 0)).all(), "a second moment above 0 is not 0"
    assert (np.sign(own)[own != 0] == np.sign(exact)[own != 0]).all()
    assert np.array_equal(form.decode(memory, None).double().numpy(), own)


@BOTH
@given(numbers())
def test_codes_are_exact_numbers(form: BlockFormat, values: Tensor) -> None:
    """Decoded and encoded again, at any random number and through bfloat16, they stay the same."""
    values = values if form.signed else values.abs()
    for first in (0, 2**18, 2**19 - 1):
        read = form.decode(form.encode_randomly(values, torch.full(values.shape, first)), None)
        assert read.dtype == torch.bfloat16
        assert torch.equal(form.decode(form.encode(read)[0], None), read)
        for random in (0, 1, 2**19 - 1):
            again = form.encode_randomly(read, torch.full(values.shape, random))
            assert torch.equal(form.decode(again, None), read)


@BOTH
def test_a_nan_or_an_infinity_makes_its_block_nan(form: BlockFormat) -> None:
    values = torch.ones(3, BLOCK)
    values[0, 3], values[2, 200] = torch.nan, torch.inf
    read = form.decode(form.encode(values)[0], None)
    assert read.isnan().all(dim=1).tolist() == [True, False, True]
    assert torch.equal(read[1], values[1])


@BOTH
def test_random_rounding_has_the_right_mean(form: BlockFormat) -> None:
    """Over all random numbers (1,024 of them), for values between all codes and below the smallest."""
    largest_e = 7 if form.signed else 15
    grid = magnitudes(largest_e)
    middle = torch.from_numpy(np.concatenate([grid[1:-9] + 0.3 * np.diff(grid)[1:-8], [1e-2]])).float()
    values = torch.nn.functional.pad(middle, (0, 2 * BLOCK - len(middle))).view(2, BLOCK)
    values[:, -1] = 1.5 * 2.0**largest_e  # one scale for all
    total = torch.zeros(2, BLOCK, dtype=torch.float64)
    count = 1024
    for random in range(0, 2**19, 2**19 // count):
        total += form.decode(form.encode_randomly(values, torch.full(values.shape, random)), None)
    spacing = torch.from_numpy(np.interp(values.numpy(), grid[:-1], np.diff(grid)))
    error = ((total / count - values).abs() / spacing).flatten()
    is_small = (values > 0) & (values < grid[1]) & torch.tensor(not form.signed)
    assert error[~is_small.flatten()].max() <= 2 / count
    assert (total[is_small] / count == grid[1]).all(), "below the smallest code a second moment is that code"


def test_a_step_is_bounded_by_the_rounding_of_the_second_moment() -> None:
    """Rounded down as far as can be, 16/17 of it is left, and half of it where it is below 2⁻¹⁴ of the largest."""
    values = torch.logspace(-9, 0, BLOCK)[None]
    low = SECOND.decode(SECOND.encode_randomly(values, torch.zeros(values.shape, dtype=torch.int64)), None)
    is_normal = values >= 2.0**-14
    assert (low[is_normal] >= values[is_normal] * 16 / 17).all()
    assert (low >= values / 2).all()
    assert (low[is_normal] < values[is_normal] * 0.95).any()
    assert (low < values * 0.6).any()


def test_second_moments_follow_their_gradients_and_to_the_nearest_code_would_not() -> None:
    """1,000 steps of β2 = 0.999 from 0. Elements' gradients have standard deviations from 0.1 to 10."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1, BLOCK)[torch.randperm(BLOCK, generator=generator)].expand(64, -1)
    exact = torch.zeros(64, BLOCK, dtype=torch.float64)
    by_chance, nearest = torch.zeros(64, BLOCK), torch.zeros(64, BLOCK)
    for step in range(1000):
        g = torch.randn(64, BLOCK, generator=generator) * scale
        exact = 0.999 * exact + 0.001 * g.double() ** 2
        _, random = random_halves(random_bits(g, torch.tensor([float(step)])))
        updated = 0.999 * by_chance + 0.001 * g**2
        by_chance = SECOND.decode(SECOND.encode_randomly(updated, random), None).float()
        nearest = SECOND.decode(SECOND.encode(0.999 * nearest + 0.001 * g**2)[0], None).float()
    assert ((by_chance / exact).mean(dim=0) - 1).abs().max() < 0.1
    assert abs((by_chance / exact).mean() - 1) < 0.01
    assert (nearest / exact).mean() < 0.6


def test_bfloat16_moments_follow_gradients_that_shrink_and_to_nearest_would_not() -> None:
    """A step of β2 = 0.999 changes a second moment by at most a thousandth downwards, less than half a unit."""
    form = formats.of_moment("exp_avg_sq", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    exact, by_chance, nearest = (torch.ones(64, BLOCK) for _ in range(3))
    for step in range(1000):
        g = torch.randn(64, BLOCK, generator=generator) * 0.1
        exact = 0.999 * exact + 0.001 * g**2
        _, random = random_halves(random_bits(g, torch.tensor([float(step)])))
        by_chance = form.encode_randomly(0.999 * by_chance.float() + 0.001 * g**2, random)
        nearest = (0.999 * nearest.float() + 0.001 * g**2).to(torch.bfloat16)
    assert by_chance.dtype == torch.bfloat16
    assert abs((by_chance.float() / exact).mean() - 1) < 0.01
    assert (nearest.float() / exact).mean() > 2


def test_random_numbers_are_uniform_and_independent() -> None:
    """χ² of 64 bins of each half, of their pairs, and over steps for one moment; 6 standard deviations."""
    moments = torch.randn(2**17, generator=torch.Generator().manual_seed(0)) * 1e-3
    of_moments = random_halves(random_bits(moments, torch.tensor([7.0])))
    of_steps = random_halves(random_bits(torch.tensor([1e-3]), torch.arange(2.0**17)))
    for first, second in (of_moments, of_steps):
        for half in (first, second):
            assert half.min() >= 0
            assert half.max() < 2**19
        pairs = (first >> 16) * 8 + (second >> 16)
        for values, bins in ((first >> 13, 64), (second >> 13, 64), (first >> 4 & 63, 64), (pairs, 64)):
            counts = torch.bincount(values, minlength=bins).double()
            expected = len(values) / bins
            assert ((counts - expected) ** 2 / expected).sum() <= bins + 6 * (2 * bins) ** 0.5


# -- whole optimizers ----------------------------------------------------------------------------------------

COARSE = Case(
    {"a": (31, 37), "b": (700,), "one": (1,)},
    options={"lr": 0.01, "max_grad_norm": 1.0},
    missing=0.0,
    steps=8,
)


def stored_moments(opt: ShardedLamb) -> dict[str, list[np.ndarray]]:
    full = opt.full_state_dict()
    names = [name for name, _, _ in opt._named_parameters()]
    assert full is not None
    return {
        names[i]: [state[kind].double().numpy() for kind in ("exp_avg", "exp_avg_sq")]
        for i, state in full["state"].items()
    }


def traced(rank: int, case: Case, world: int) -> list[tuple[Any, ...]]:
    """(weights before, moments after, gradients, ratios, weights after) of every step; on the first rank."""
    from tests.sharded_cases import average, give_gradients, rank_gradients

    params = make_parameters(case)
    opt = make_optimizer(case, params)
    steps = []
    for step in range(case.steps):
        before = {name: p.detach().double().numpy() for name, p in params.items()}
        gradients = rank_gradients(case, step, world)
        give_gradients(case, params, gradients[rank])
        opt.step()
        full = opt.full_state_dict()
        if full is None:
            continue
        moments = dict(
            zip(params, ([s["exp_avg"], s["exp_avg_sq"]] for s in full["state"].values()), strict=True)
        )
        after = {name: p.detach().double().numpy() for name, p in params.items()}
        mean = average(gradients)
        steps.append((before, moments, mean, opt.trust_ratios(), after))
    return steps


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2), (3, 1)])
def test_it_is_a_lamb_that_rounds_its_moments(world: int, stage: int) -> None:
    """Each step, in float64, from the moments as they were stored: new moments are within a code of them, ratios and
    weights are exact for them. An oracle of its own: Algorithm 2."""
    case = replace(COARSE, settings={"stage": stage, **INT8})
    steps = run_ranks(world, traced, case, world)[0]
    old = {name: [np.zeros(shape)] * 2 for name, shape in case.shapes.items()}
    for t, (before, moments, gradients, ratios, after) in enumerate(steps, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        clip = min(1.0, 1.0 / norm)
        for name, w in before.items():
            g = gradients[name] * clip
            (m, v), (new_m, new_v) = old[name], (x.double().numpy() for x in moments[name])
            assert moments[name][0].dtype == torch.bfloat16
            exact = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            for own, expected, finest in zip((new_m, new_v), exact, (2.0**-10, 2.0**-18), strict=True):
                spacing = np.maximum(np.abs(expected) / 16, np.abs(expected).max() * finest)
                assert (np.abs(own - expected) <= spacing * 1.01).all()
            u = (new_m / (1 - 0.9**t)) / (np.sqrt(new_v / (1 - 0.999**t)) + 1e-6) + BASE["weight_decay"] * w
            w_norm, u_norm = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
            ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
            assert ratios[name] == pytest.approx(ratio, rel=2e-6)
            expected_w = w - 0.01 * ratio * u
            assert np.abs(after[name] - expected_w).max() <= 2e-6 * max(np.abs(expected_w).max(), 1e-3)
            old[name] = [new_m, new_v]


@pytest.mark.parametrize("stage", [1, 2])
def test_bits_do_not_depend_on_world_size(stage: int) -> None:
    """Stage 2 averages equal gradients of the ranks."""
    case = replace(MANY, settings={**MANY.settings, **INT8})
    alone = run(0, case, 1).params
    if stage == 1:
        for world in (2, 3, 4):
            for outcome in run_ranks(world, run, case, world):
                assert same_bits(outcome.params, alone)
    else:
        for world in (2, 3, 4):
            for params in run_ranks(world, equal_gradients, case, world):
                assert same_bits(params, alone)


def equal_gradients(rank: int, case: Case, world: int) -> dict[str, Tensor]:
    """Stage 2 with stage 1's gradients on every rank. A sum of 3 equal numbers over 3 is that number; also of 2, 4."""
    from tests.sharded_cases import give_gradients, rank_gradients

    reduced = replace(case, settings={**case.settings, "stage": 2})
    params = make_parameters(reduced)
    opt = make_optimizer(reduced, params)
    for step in range(case.steps):
        give_gradients(reduced, params, rank_gradients(case, step, world)[rank])
        opt.step()
        opt.zero_grad()
    return {name: p.detach().clone() for name, p in params.items()}


ROWS = {"a": (12, BLOCK), "b": (12 * BLOCK,)}


def stage_3(rank: int, world: int) -> dict[str, Tensor]:
    """Parts are whole blocks at 1, 2, 3 and 4 ranks."""
    mesh = init_device_mesh("cpu", (world,))
    model = nn.ParameterDict({name: Parameter(value) for name, value in training.weights(ROWS).items()})
    fully_shard(model, mesh=mesh)
    opt = ShardedLamb(model.named_parameters(), lr=0.02, **INT8)
    for step in range(4):
        for name, p in model.named_parameters():
            whole = training.draw(ROWS[name], name, step)
            p.grad = torch.distributed.tensor.distribute_tensor(whole, mesh, p.placements)
        opt.step()
    assert opt.memory()["moments"] == 2 * 24 * BLOCK_BYTES // world
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_stage_3_has_the_same_bits_where_parts_are_whole_blocks() -> None:
    params = {name: Parameter(value) for name, value in training.weights(ROWS).items()}
    opt = ShardedLamb(params.items(), lr=0.02, **INT8)
    for step in range(4):
        for name, p in params.items():
            p.grad = training.draw(ROWS[name], name, step)
        opt.step()
    for world in (1, 2, 3, 4):
        for whole in run_ranks(world, stage_3, world):
            assert same_bits(whole, {name: p.detach() for name, p in params.items()})


def test_memory_is_65_64ths_of_a_byte_a_moment() -> None:
    case = Case({"w": (64, 256), "short": (5,)}, settings=INT8, steps=1)
    assert run(0, case, 1).memory["moments"] == 2 * (64 + 1) * 260
    masters = replace(case, dtypes=dict.fromkeys(case.shapes, torch.bfloat16))
    masters = replace(masters, settings={**INT8, "store_param_remainders": 8})
    memory = run(0, masters, 1).memory
    assert memory["masters"] == (64 + 1) * 256
    assert memory["moments"] == 2 * (64 + 1) * 260


def continued(
    rank: int, case: Case, world: int, folder: str, first: bool, state: torch.dtype
) -> dict[str, Tensor]:
    """The first half of a run, saved; or the second, loaded into ``state`` moments."""
    half = replace(case, steps=case.steps // 2)
    params = make_parameters(case)
    model = nn.ParameterDict({name.replace(".", "_"): p for name, p in params.items()})
    opt = make_optimizer(replace(case, settings={**case.settings, "state_dtype": state}), params)
    if first:
        take_steps(half, params, opt, rank, world)
        checkpoint.save(folder, model, opt)
    else:
        checkpoint.load(folder, model, opt)
        from tests.sharded_cases import give_gradients, rank_gradients

        for step in range(half.steps, case.steps):
            give_gradients(case, params, rank_gradients(case, step, world)[rank])
            opt.step()
            opt.zero_grad()
    return {name: p.detach().clone() for name, p in params.items()}


def test_a_run_resumes_to_the_same_bits_at_any_world_size(tmp_path: Path) -> None:
    folder, int8 = str(tmp_path / "checkpoint"), torch.int8
    case = replace(MANY, settings={**MANY.settings, **INT8})
    expected = run(0, case, 1).params
    run_ranks(2, continued, case, 2, folder, True, int8)
    for world in (1, 3):
        for params in run_ranks(world, continued, case, world, folder, False, int8):
            assert same_bits(params, expected)
    whole = run_ranks(2, continued, case, 2, folder, False, torch.float32)[0]
    assert not same_bits(whole, expected), "moments in float32 are not rounded any more"


def test_checkpoints_between_8_bits_and_float32(tmp_path: Path) -> None:
    case = replace(COARSE, steps=3)
    params = make_parameters(case)
    coded, plain = (
        make_optimizer(case, {n: Parameter(v) for n, v in initial_values(case).items()}, state_dtype=dtype)
        for dtype in (torch.int8, torch.float32)
    )
    opt = make_optimizer(case, params)
    take_steps(case, params, opt, 0, 1)
    checkpoint.save(str(tmp_path / "plain"), nn.ParameterDict(params), opt)
    for source, target in (("plain", coded), ("coded", plain)):
        model = nn.ParameterDict({name: p for name, p, _ in target._named_parameters()})
        checkpoint.load(str(tmp_path / source), model, target)
        if target is coded:
            checkpoint.save(str(tmp_path / "coded"), model, target)
    exact, rounded, again = map(stored_moments, (opt, coded, plain))
    for name in case.shapes:
        for kind, (a, b, c) in enumerate(zip(exact[name], rounded[name], again[name], strict=True)):
            assert np.array_equal(b, c)
            finest = (2.0**-10, 2.0**-18)[kind]
            half_a_code = np.maximum(np.abs(a) / 32, np.abs(a).max() * finest)  # and bfloat16 on the way
            assert (np.abs(a - b) <= half_a_code * (1 + 2.0**-3)).all()
    assert any((a[0] != b[0]).any() for a, b in zip(exact.values(), rounded.values(), strict=True))


def test_state_dicts_hold_bfloat16_values(tmp_path: Path) -> None:
    case = replace(COARSE, settings=INT8)
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    take_steps(case, params, opt, 0, 1)
    other_params = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    other = make_optimizer(case, other_params)
    saved = opt.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert "exp_avg_codes" in opt.state[params["a"]]
    assert "exp_avg" not in opt.state[params["a"]]
    other.load_state_dict(saved)
    again = other.state_dict()["state"]
    for place, entry in saved["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[key], again[place][key])


# -- formats of groups ---------------------------------------------------------------------------------------


def grouped(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    case = Case(
        {"embed": (40, 32), "body": (64, 40)},
        options={"lr": 0.02},
        groups=((("embed",), state), (("body",), {})),
        missing=0.0,
    )
    outcome = run(0, replace(case, settings=INT8), 1)
    return outcome.params, outcome.memory


def test_a_group_keeps_its_own_format() -> None:
    coded, small = grouped({})
    mixed, large = grouped({"state_dtype": torch.float32})
    plain = run(0, Case({"embed": (40, 32), "body": (64, 40)}, options={"lr": 0.02}, missing=0.0), 1).params
    assert torch.equal(mixed["embed"], plain["embed"])
    assert torch.equal(mixed["body"], coded["body"])
    assert not torch.equal(coded["embed"], plain["embed"])
    assert large["moments"] - small["moments"] == 2 * 5 * (4 * BLOCK - BLOCK_BYTES)


def test_formats_that_cannot_be_are_refused() -> None:
    def params(shape: tuple[int, ...] = (3, 100)) -> list[tuple[str, Parameter]]:
        return [("qkv", Parameter(torch.ones(shape)))]

    with pytest.raises(ValueError, match=r"'qkv' .* 3 ratio blocks and 8-bit moments.*multiple of 100"):
        ShardedLamb(params(), ratio_blocks={"qkv": 3}, **INT8)
    ShardedLamb(params((3, 512)), ratio_blocks={"qkv": 3}, **INT8).close()
    with pytest.raises(ValueError, match=r"state_dtype must be one of .*int8"):
        ShardedLamb([{"params": params(), "state_dtype": torch.int16}])
    with pytest.raises(ValueError, match="underflow"):
        ShardedLamb([{"params": params(), "state_dtype": torch.float16}])
    with pytest.raises(ValueError, match=r"state_dtype=torch\.int8 in a parameter group: ShardedLamb alone"):
        Lamb([{"params": [p for _, p in params()], "state_dtype": torch.int8}])


def test_a_format_cannot_change_later_and_no_state_is_lost() -> None:
    """Also where the optimizer follows parameters that were replaced, as Accelerate does."""
    p = Parameter(torch.ones(300))
    opt = ShardedLamb([("w", p)], lr=0.1)
    p.grad = torch.linspace(-1, 1, 300)
    opt.step()
    moments = opt.state[p]["exp_avg"].clone()
    for edited in (torch.int8, [1]):
        opt.param_groups[0]["state_dtype"] = edited
        with pytest.raises(ValueError, match="state_dtype was changed"):
            opt.step()
        replaced = Parameter(p.detach().clone())
        opt.param_groups[0]["params"][0] = replaced
        with pytest.raises(ValueError, match="state_dtype was changed"):
            opt.zero_grad()
        opt.param_groups[0]["params"][0] = p
        del opt.param_groups[0]["state_dtype"]
    opt.zero_grad()
    assert torch.equal(opt.state[p]["exp_avg"], moments)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"state_dtyp": torch.int8}, "did you mean 'state_dtype'"),
        ({"gather_dtype": torch.bfloat16}, "pass gather_dtype to it"),
        ({"store_param_remainders": 8}, "pass store_param_remainders to it"),
        ({"state_dtype": [1]}, "state_dtype must be one of"),
    ],
)
def test_wrong_keys_of_groups_are_named(group: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ShardedLamb([{"params": [Parameter(torch.ones(3))], **group}])


def missing_gradients(rank: int, state: torch.dtype) -> dict[str, Tensor]:
    params = {
        name: Parameter(value) for name, value in training.weights({"a": (40, 30), "b": (700,)}).items()
    }
    opt = ShardedLamb(params.items(), lr=0.1, state_dtype=state)
    for step in range(3):
        params["a"].grad = training.draw((40, 30), "a", step) if step != 1 else None
        params["b"].grad = training.draw((700,), "b", step)
        opt.step()
        assert all(
            shard.grad[0].dtype == torch.float32
            for shard in opt._gradients.shards()
            if isinstance(shard, ScatteredShard)
        )
    return {name: p.detach() for name, p in params.items()}


def test_a_stand_in_for_a_missing_gradient_is_no_codes() -> None:
    """Codes are aligned to 4 bytes, gradients of aligned memory are loaded 16 bytes at once."""
    missing_gradients(0, torch.int8)
    first, second = run_ranks(2, missing_gradients, torch.int8)
    assert same_bits(first, second)


def test_a_loaded_group_keeps_its_format() -> None:
    """Options are loaded, the format is the optimizer's own."""

    def made(state: dict[str, Any]) -> tuple[Parameter, ShardedLamb]:
        p = Parameter(torch.ones(300))
        return p, ShardedLamb([{"params": [("w", p)], "lr": 0.5, **state}])

    p, opt = made({"state_dtype": torch.int8})
    p.grad = torch.linspace(-1, 1, 300)
    opt.step()
    _, other = made({})
    other.load_state_dict(opt.state_dict())
    assert "state_dtype" not in other.param_groups[0]
    assert other.memory()["moments"] == 2 * 2 * BLOCK * 4
