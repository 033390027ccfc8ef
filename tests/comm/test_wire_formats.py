"""The encodings of parameters against a float64 oracle, at the edges of their ranges."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_lamb.comm.wire_formats import of_gather
from sharded_lamb.core.layout import BLOCK
from tests.comm.wire_oracle import received
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


def test_parameters_that_would_not_shrink_travel_as_they_are() -> None:
    for gather in (None, torch.bfloat16, FP8):
        assert of_gather(gather, torch.float64) is None
    for model in (torch.bfloat16, torch.float16):
        assert of_gather(torch.bfloat16, model) is None
