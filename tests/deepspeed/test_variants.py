"""Every variant in a ds_config.json, and as the BERT recipe spells it out, against the golden vectors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharded_lamb.bert.config import OptimizerConfig
from sharded_lamb.bert.ds_config import lamb_params
from tests.deepspeed import cases
from tests.harness import run_ranks
from tests.optim.test_golden import FOLDER, INPUTS, TOLERANCES, assert_near, json
from tests.oracle import VARIANT_FACTS

SCALARS = INPUTS["options"]
PATTERNS = INPUTS["exclude_from_weight_decay"]
# DeepSpeed adds 1e-6 to the norm that it clips by.
PARAMS, RATIOS = (2 * tolerance for tolerance in TOLERANCES[torch.float32])


class Golden(nn.Module):
    """The golden parameters. The loss is linear in them, so gradients are the golden ones on every rank."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in INPUTS["params"].items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(leaf, nn.Parameter(torch.tensor(value).reshape(self.shape_of(value))))

    @staticmethod
    def shape_of(value: Any) -> tuple[int, ...]:
        return np.shape(value) or (1,)  # DeepSpeed takes no scalars

    def forward(self, grads: dict[str, Any]) -> Tensor:
        sums = [
            (p * 0 if grads[n] is None else p * torch.tensor(grads[n])).sum()
            for n, p in self.named_parameters()
        ]
        return torch.stack(sums).sum()


def comparable(name: str) -> int:
    """Steps up to the first without a gradient, which counts there, and not here: partitions have the step count.

    A gradient of zeros is none under DeepSpeed.
    """
    present = [g[name] is not None and bool(np.any(g[name])) for g in INPUTS["grads"]]
    return present.index(False)


def configured(variant: str, by_the_recipe: bool) -> dict[str, Any]:
    clip = VARIANT_FACTS[variant]["max_grad_norm"]
    if by_the_recipe:
        scalars = {**SCALARS, "betas": tuple(SCALARS["betas"])}
        lr = scalars.pop("lr")
        settings = OptimizerConfig(
            variant=variant, max_grad_norm=clip, exclude_from_weight_decay=tuple(PATTERNS), **scalars
        )
        params = {**lamb_params(settings), "lr": lr}
    else:
        params = {"variant": variant, "exclude_from_weight_decay": PATTERNS, **SCALARS}
    config = cases.config(2, params=params, gradient_clipping=clip or 0.0)
    return dict(json.loads(json.dumps(config)))


def follow_all_vectors(rank: int) -> list[str]:
    followed = []
    for variant in VARIANT_FACTS:
        steps = json.loads((FOLDER / f"{variant}.json").read_text())["steps"]
        for by_the_recipe in (False, True):
            follow(variant, configured(variant, by_the_recipe), steps)
        followed.append(variant)
    return followed


def follow(variant: str, config: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    engine = cases.start(config, Golden())
    for k, (grads, expected) in enumerate(zip(INPUTS["grads"][:8], steps[:8], strict=True)):
        engine.backward(engine(grads))
        engine.step()
        ratios = engine.basic_optimizer.trust_ratios()
        for name, p in engine.module.named_parameters():
            if k < comparable(name):
                where = f"{variant}, step {k}, {name}"
                value = np.reshape(expected["params"][name], p.shape)
                assert_near(p, value, PARAMS, where)
                assert abs(ratios[name] / expected["ratios"][name] - 1) <= RATIOS, where
    cases.stop(engine)


def test_variant_follows_its_vectors_under_deepspeed() -> None:
    compared = [comparable(name) for name in INPUTS["params"]]
    assert sorted(compared) == [0, 0, 3, 5, 8, 8]
    assert run_ranks(2, follow_all_vectors, timeout=300) == [list(VARIANT_FACTS)] * 2
