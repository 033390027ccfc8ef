"""The encodings of messages against a float64 oracle, at the edges of their ranges."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_lamb.comm.wire_formats import ScaledFloat8, of_gather, of_reduce
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.kernels.block_codes import random_bits
from tests.comm.wire_oracle import contribution, received
from tests.training import draw

FP8 = torch.float8_e4m3fn
MODELS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(torch.bfloat16, torch.float32), *((FP8, model) for model in MODELS)]


def blocks() -> Tensor:
    """[blocks, BLOCK] fp32: whatever is hard to round."""
    normal = draw((BLOCK,), "block")
    codes = torch.arange(BLOCK, dtype=torch.float32)
    rows = [normal * 10.0**power for power in (-44, -40, -20, -3, 0, 3, 30, 37)]
    rows += [torch.zeros(BLOCK), -torch.zeros(BLOCK), normal.sign()]
    rows.append(torch.cat([normal[:-1] * 1e-3, torch.tensor([1e4])]))  # one huge element
    rows.append(codes * 2.0**-149)  # the smallest denormals
    rows += [
        (codes - 128) * 3.5 * scale for scale in (1.0, 2.0**-120, 2.0**-135, 2.0**119)
    ]  # exact codes and ties
    spread = normal * torch.logspace(-5, 0, BLOCK)  # some become subnormal codes
    for top in (448.0, 456.0, 448.00003, 447.99997, 464.0, 3.4028235e38, 65504.0, 63488.0, 63487.0):
        rows.append(torch.cat([spread[:-1] * top / 16, torch.tensor([-top])]))
    return torch.stack(rows)


@pytest.mark.parametrize(("gather", "model"), KINDS, ids=str)
def test_ranks_receive_the_nearest_code_times_a_power_of_two(gather: torch.dtype, model: torch.dtype) -> None:
    format = of_gather(gather, model)
    assert format is not None
    values = blocks().to(model)
    values = values[values.isfinite().all(1)]
    message = format.encode(values)
    assert message.shape == (len(values), format.row)
    assert message.dtype == format.storage
    decoded = format.decode(message, model)
    expected = received(values, gather)
    assert decoded.dtype == model
    assert torch.equal(decoded, expected)
    assert torch.equal(decoded.signbit(), expected.signbit())


@pytest.mark.parametrize(("gather", "model"), KINDS, ids=str)
def test_the_stated_bound_of_the_error(gather: torch.dtype, model: torch.dtype) -> None:
    format = of_gather(gather, model)
    assert format is not None
    values = blocks().to(model)
    values = values[values.isfinite().all(1)].double()
    gaps = (format.decode(format.encode(values.to(model)), model).double() - values).abs()
    magnitudes = values.abs()
    if gather == FP8:
        floor = torch.maximum(magnitudes.amax(1, keepdim=True) * 2.0**-17, torch.tensor(2.0**-136))
        assert bool((gaps <= torch.maximum(magnitudes / 16, floor)).all())
        assert bool((gaps > magnitudes / 32).any())
    else:
        normal = (magnitudes >= 2.0**-126) & gaps.isfinite()
        assert bool((gaps <= magnitudes * 2.0**-8)[normal].all())
        assert bool((gaps > magnitudes * 2.0**-9)[normal].any())


@pytest.mark.parametrize(("gather", "model"), KINDS, ids=str)
def test_non_finite_weights_stay_non_finite_and_change_no_other(
    gather: torch.dtype, model: torch.dtype
) -> None:
    format = of_gather(gather, model)
    assert format is not None
    values = draw((1, BLOCK), "weights").to(model)
    places = torch.tensor([3, 100, 255])
    spoiled = values.clone()
    spoiled[0, places] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(model)
    before, after = (format.decode(format.encode(each), model) for each in (values, spoiled))
    others = np.setdiff1d(np.arange(BLOCK), places)
    assert not after[0, places].isfinite().any()
    assert torch.equal(after[0, others], before[0, others])


def by_chance(values: Tensor, step: int) -> Tensor:
    format = ScaledFloat8()
    random = random_bits(values, torch.full((len(values), 1), float(step)))
    return format.decode(format.encode(values, random), torch.float32)


def test_gradients_are_rounded_to_a_neighboring_code_by_a_hash() -> None:
    values = blocks()
    for step in (0, 1, 70000):
        expected = torch.from_numpy(contribution(values, FP8, step)).float().view(values.shape)
        assert torch.equal(by_chance(values, step).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_rounding_by_chance_has_the_stated_bound_and_the_right_mean() -> None:
    """One huge element leaves the others of its block an error of 2⁻¹⁶ of it, in a single step, and none on average."""
    values = blocks()
    values = values[(values.abs().amax(1) < 1e38) & values.isfinite().all(1)]
    magnitude = values.double().abs()
    top = magnitude.amax(1, keepdim=True)
    bound = torch.maximum(magnitude / 8, torch.clamp(top * 2.0**-16, min=2.0**-135))
    steps, total = 400, torch.zeros_like(magnitude)
    for step in range(steps):
        gap = by_chance(values, step).double() - values.double()
        assert bool((gap.abs() < bound).all())
        total += gap
    assert bool(((total / steps).abs() <= 5.5 * bound / 2 / steps**0.5 + top * 2.0**-37).all())


def test_gradients_that_would_not_shrink_are_not_encoded() -> None:
    assert of_reduce(None, torch.float32) is None
    assert of_reduce(torch.float16, torch.float32) is None  # a dtype that libraries reduce
    for model in (torch.bfloat16, torch.float16):
        assert of_reduce(torch.bfloat16, model) is None
        assert of_reduce(FP8, model) == ScaledFloat8()


def test_parameters_that_would_not_shrink_travel_as_they_are() -> None:
    for gather in (None, torch.bfloat16, FP8):
        assert of_gather(gather, torch.float64) is None
    for model in (torch.bfloat16, torch.float16):
        assert of_gather(torch.bfloat16, model) is None
