"""timm's optimizer factory and schedulers without torchvision, which ``import timm`` needs."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_lamb import ShardedLamb
from tests.integrations import cases

OURS = "sharded_lamb.integrations.timm"


@contextmanager
def real_timm() -> Iterator[tuple[Any, Any]]:
    """(timm.optim, our integration), imported from timm's files with its models left out, and forgotten at the end."""
    try:
        folder = Path(str(importlib.metadata.distribution("timm").locate_file("timm")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_timm(name)}
    try:
        package("timm", folder)
        package("timm.layers", folder / "layers").use_reentrant_ckpt = lambda: False  # type: ignore[attr-defined]
        models = package("timm.models", folder / "models")
        models.group_parameters = importlib.import_module("timm.models._manipulate").group_parameters  # type: ignore[attr-defined]
        yield importlib.import_module("timm.optim"), importlib.import_module(OURS)
    finally:
        for name in [name for name in sys.modules if is_timm(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def is_timm(name: str) -> bool:
    return name == "timm" or name.startswith("timm.") or name == OURS


def package(name: str, folder: Path) -> ModuleType:
    """An empty package over ``folder``, whose submodules can be imported."""
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = [str(folder)]
    return module


class Layered(cases.Net):
    """Layers as timm's models describe them: ``up`` is the stem, ``head`` and the rest are the last layer."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^up", "blocks": [(r"^head", (0,)), (r"^scale", (0,))]}

    def no_weight_decay(self) -> set[str]:
        return {"head.weight"}


def fit(
    rank: int, how: str, layer_decay: float | None, **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """(parameters, names of trust ratios) after three steps in DDP."""
    with real_timm() as (optim, ours):
        net, batches = Layered(), cases.data(3)
        keywords = {"lr": cases.LR, "eps": cases.OPTIONS["eps"], **options}
        decay = {"weight_decay": cases.OPTIONS["weight_decay"], "layer_decay": layer_decay}
        if how == "named":
            opt = optim.create_optimizer_v2(
                net, "shardedlamb", param_group_fn=ours.named_groups(**decay), **keywords
            )
        else:
            opt = optim.create_optimizer_v2(net, "shardedlamb", **decay, **keywords)
        schedule = importlib.import_module("timm.scheduler.step_lr").StepLRScheduler(
            opt, decay_t=1, decay_rate=0.5, t_in_epochs=False
        )
        model = torch.nn.parallel.DistributedDataParallel(net)
        for step in range(3):
            first = step * cases.BATCH * cases.WORLD + rank
            own = [tensor[first :: cases.WORLD][: cases.BATCH] for tensor in batches.tensors]
            schedule.step_update(step)  # applies lr_scale of layer decay
            model(*own).backward()
            opt.step()
            opt.zero_grad()
        assert isinstance(opt, ShardedLamb)
        return cases.values(net), list(opt.trust_ratios())
