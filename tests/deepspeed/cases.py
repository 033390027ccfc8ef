"""Training under the real DeepSpeed on gloo, and a float64 LAMB on the gradients that DeepSpeed averaged.

These functions run on a rank, in the harness's workers, and import DeepSpeed themselves: its import takes seconds.
"""

import copy
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor, nn

from tests import training
from tests.oracle import OracleLamb

FP32_TOLERANCE = 2e-6
LINEAR = nn.functional.linear
LAMB = {"lr": 0.02, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}


def release() -> Version:
    """The installed DeepSpeed's."""
    return Version(version("deepspeed"))


class Tiny(nn.Module):
    """Uneven sizes, a one-element parameter, a frozen one and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(53, 24)
        self.norm = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 37)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.out = nn.Linear(37, 24, bias=False)
        self.head = nn.Linear(24, 53)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embed(tokens)) * self.scale * self.frozen.mean().to(self.scale.dtype)
        hidden = self.out(torch.tanh(self.fc(hidden)))
        logits: Tensor = self.head(hidden)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten())


def tiny(seed: int = 3) -> Tiny:
    torch.manual_seed(seed)
    model = Tiny()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1 + 0.3 * torch.rand(()))
    return model


class Known(nn.Module):
    """A loss that is linear in the parameters: the drawn gradients are known without DeepSpeed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in training.weights().items():
            if value.numel() and value.dim():  # DeepSpeed rejects scalars
                self.register_parameter(name.replace(".", "_"), nn.Parameter(value.to(dtype)))

    def forward(self, rank: int, step: int) -> Tensor:
        own = known_gradients(rank, step)
        return torch.stack([(p * own[n].to(p.dtype)).sum().float() for n, p in self.named_parameters()]).sum()


def known_gradients(rank: int, step: int) -> dict[str, Tensor]:
    drawn = training.own_gradients(rank, step)
    return {name.replace(".", "_"): g for name, g in drawn.items() if g is not None and g.numel() and g.dim()}


def known_averages(world: int, step: int) -> dict[str, np.ndarray]:
    per_rank = [known_gradients(rank, step) for rank in range(world)]
    return {name: torch.stack([g[name].double() for g in per_rank]).mean(0).numpy() for name in per_rank[0]}


def tokens(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 53, (2, 9), generator=generator)


def config(
    stage: int, dtype: str = "fp32", *, params: Mapping[str, Any] = LAMB, **more: Any
) -> dict[str, Any]:
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "ShardedLamb", "params": dict(params)},
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    if dtype == "bf16":
        ds_config["bf16"] = {"enabled": True, **more.pop("bf16", {})}
    if dtype == "fp16":
        ds_config["fp16"] = {"enabled": True, "initial_scale_power": 8, **more.pop("fp16", {})}
    return {**ds_config, **more}


def start(ds_config: dict[str, Any], model: nn.Module | None = None, **keywords: Any) -> Any:
    """An engine; importing the plugin registers it, without any other setup of DeepSpeed."""
    import deepspeed

    import sharded_lamb.deepspeed  # noqa: F401

    deepspeed.logger.setLevel("ERROR")
    model = tiny() if model is None else model
    return deepspeed.initialize(model=model, config=copy.deepcopy(ds_config), **keywords)[0]


def stop(engine: Any) -> None:
    """Destroy the engine after a barrier."""
    import torch.distributed as dist

    dist.barrier()
    engine.destroy()
    nn.functional.linear = LINEAR


def masters(engine: Any) -> dict[str, Tensor]:
    """The full weights that the optimizer updates, as float64."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    unfused = getattr(engine.optimizer, "fp32_groups", None)
    copies = {}
    if unfused is not None:
        copies = {
            p: copy
            for ps, cs in zip(engine.optimizer.fp16_groups, unfused, strict=True)
            for p, copy in zip(ps, cs, strict=True)
        }
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if p in copies:
            value = copies[p]
        elif engine.optimizer is engine.basic_optimizer:
            value = p
        else:
            value = safe_get_full_fp32_param(p)
            value = p if value is None else value
        weights[name] = value.detach().double().clone().cpu()
    return weights


def gradients(engine: Any) -> dict[str, np.ndarray]:
    """DeepSpeed's full averaged gradients, before it unscales and clips."""
    from deepspeed.utils import safe_get_full_grad

    return {
        name: safe_get_full_grad(p).detach().double().cpu().numpy().copy()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


GROUP_OVERRIDES = {
    "norm.weight": {"weight_decay": 0.0, "lr": 0.05},
    "scale": {"weight_decay": 0.0, "lr": 0.05},
    "out.weight": {"betas": (0.8, 0.95)},
    "head.bias": {"betas": (0.8, 0.95)},
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of `GROUP_OVERRIDES`, after a first group of all other parameters."""
    params = dict(model.named_parameters())
    rest = [p for name, p in params.items() if name not in GROUP_OVERRIDES]
    return [
        {"params": rest},
        {"params": [params["norm.weight"], params["scale"]], "weight_decay": 0.0, "lr": 0.05},
        {"params": [params["out.weight"], params["head.bias"]], "betas": [0.8, 0.95]},
    ]


def oracle_of(start_weights: Mapping[str, Tensor], **options: Any) -> OracleLamb:
    given = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, **options}
    return OracleLamb({name: value.numpy() for name, value in start_weights.items()}, **given)


def follow(
    engine: Any,
    rank: int,
    oracle: OracleLamb,
    steps: int = 4,
    scale: Callable[[dict[str, np.ndarray]], float] = lambda grads: 1.0,
    batch: Callable[[int, int], Tensor] = tokens,
    first: int = 0,
) -> list[dict[str, float]]:
    """Train with the oracle; returns the ratios of every step. ``scale``: DeepSpeed's factor on the gradients."""
    ratios = []
    for step in range(first, first + steps):
        engine.backward(engine(batch(rank, step)))
        if engine.is_gradient_accumulation_boundary():
            grads = gradients(engine)
            factor = scale(grads)
            oracle.step({name: value * factor for name, value in grads.items()})
        engine.step()
        ratios.append(engine.basic_optimizer.trust_ratios())
    return ratios


def worst(weights: Mapping[str, Tensor], oracle: OracleLamb) -> float:
    """The largest relative error in norm over all parameters."""
    assert weights.keys() == oracle.params.keys()
    errors = [
        float(
            np.linalg.norm(value.numpy() - oracle.params[name])
            / max(np.linalg.norm(oracle.params[name]), 1e-30)
        )
        for name, value in weights.items()
    ]
    return max(errors)


def exact(names: list[str]) -> list[str]:
    return [f"^{re.escape(name)}$" for name in names]
