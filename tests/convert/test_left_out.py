"""What a file leaves out is the variant's to fill, and what it says wins over the variant."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sharded_lamb.convert.apex import from_apex
from sharded_lamb.convert.deepspeed import _options as from_deepspeed
from sharded_lamb.convert.timm import from_timm

SCALARS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
Read = Callable[[dict[str, Any], str | None], dict[str, Any]]


def read_by(convert: Callable[..., Any]) -> Read:
    def read(group: dict[str, Any], variant: str | None) -> dict[str, Any]:
        weight = torch.ones(3)
        state = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
        groups = [{**SCALARS, "step": 1, "params": [0], **group}]
        file = {"model": {"w": weight}, "optimizer": {"state": {0: state}, "param_groups": groups}}
        contents, _ = convert(file, ["w"], variant)
        return dict(contents.groups[0]["options"])

    return read


FORMATS: dict[str, tuple[dict[str, Any], Read]] = {  # a group's marks, and what reads it
    "timm": ({"trust_clip": False}, read_by(from_timm)),
    "apex": ({"max_grad_norm": 1.0}, read_by(from_apex)),
    "deepspeed": (
        {"max_coeff": 10.0, "min_coeff": 0.01},
        lambda group, variant: from_deepspeed([{**SCALARS, **group}], variant)[0][0],
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_variant_fills_what_the_file_leaves_out(form: str) -> None:
    marks, read = FORMATS[form]
    assert read(marks, "paper_v3")["bias_correction"] is False
    assert read(marks, "paper_v3")["adapt_without_decay"] is True
    assert read(marks, None)["bias_correction"] == ("lr" if form == "deepspeed" else True)
    assert read(marks, None)["adapt_without_decay"] is (form == "deepspeed")


@pytest.mark.parametrize("form", FORMATS)
def test_the_file_wins_over_the_variant(form: str) -> None:
    marks, read = FORMATS[form]
    said = read({**marks, "bias_correction": True}, "paper_v3")["bias_correction"]
    assert said == ("lr" if form == "deepspeed" else True)
    assert read({**marks, "bias_correction": False}, "lamb")["bias_correction"] is False
