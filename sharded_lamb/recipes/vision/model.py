"""The configured model, its loss, and ShardedLamb over its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.recipes.training.sharded_backend import ShardedBackend
from sharded_lamb.recipes.training.stateless_rng import key_of
from sharded_lamb.recipes.vision.config import SMALL_VIT, LossConfig, VisionConfig
from sharded_lamb.recipes.vision.small_vit import SmallViT
from sharded_lamb.recipes.vision.timm import timm_for, tried


@dataclass(frozen=True)
class Batch:
    """Images [B, C, S, S] fp32 and targets [B, classes] fp32: one-hot, smoothed or mixed."""

    images: Tensor
    targets: Tensor


def build_model(config: VisionConfig, classes: int) -> nn.Module:
    """The model with weights from `seed`, on the CPU.

    Raises:
        ValueError: an unknown name or option, timm is missing, or the model does not take images of the data's sizes.
    """
    torch.manual_seed(key_of(config.seed, "weights") >> 1)
    settings, channels = config.model, len(config.data.mean)
    what = f"model.name={settings.name!r}, model.options={settings.options!r}"
    if settings.name == SMALL_VIT:
        model: nn.Module = tried(
            what, lambda: SmallViT(classes, channels, config.data.size, **settings.options)
        )
    else:
        timm = timm_for(f"model.name={settings.name!r}", "timm")
        if not timm.is_model(settings.name):
            raise ValueError(
                f"model.name={settings.name!r}: expected {SMALL_VIT!r} or one of timm.list_models()"
            )
        drop_path = {"drop_path_rate": settings.drop_path} if settings.drop_path else {}
        keywords = {"num_classes": classes, "in_chans": channels, **drop_path, **settings.options}
        model = tried(what, lambda: timm.create_model(settings.name, **keywords))
    for field in ("size", "validation_size"):
        size = getattr(config.data, field)
        if size is not None:
            images = torch.zeros(1, channels, size, size, device="cpu")
            tried(f"{what}, data.{field}={size}", partial(_try, model, images, classes))
    return model


@torch.no_grad()
def _try(model: nn.Module, images: Tensor, classes: int) -> None:
    out = model.eval()(images)
    model.train()
    if not isinstance(out, Tensor) or out.shape != (len(images), classes):
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise TypeError(f"the model returns {found}, expected a tensor of shape [B, {classes}]")


class Losses(nn.Module):
    """A model with its loss: a `Batch` → [2] the sum of losses, and of images whose likeliest class is the target's."""

    def __init__(self, module: nn.Module, settings: LossConfig, *, autocast: bool) -> None:
        super().__init__()
        self.module, self.settings, self.autocast = module, settings, autocast

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.autocast):
            out: Tensor = self.module(batch.images)
        out, targets = out.float(), batch.targets
        right = (out.argmax(1) == targets.argmax(1)).sum()
        if self.settings.target_threshold is not None:
            targets = targets.gt(self.settings.target_threshold).to(targets.dtype)
        if self.settings.kind == "ce":
            loss = F.cross_entropy(out, targets, reduction="sum")
        else:
            loss = F.binary_cross_entropy_with_logits(out, targets, reduction="none").mean(1).sum()
        return torch.stack([loss, right.to(loss.dtype)])


def build_backend(config: VisionConfig, model: nn.Module) -> ShardedBackend:
    """The model under ShardedLamb.

    Raises:
        ValueError: an option of the optimizer is out of range, or timm, which layer decay needs, is missing.
    """
    if config.speed.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    losses = Losses(model, config.loss, autocast=config.speed.precision == "bf16_autocast")
    return ShardedBackend(model, losses, config.stage, lambda: build_optimizer(config, model))


def build_optimizer(config: VisionConfig, model: nn.Module) -> ShardedLamb:
    """ShardedLamb with the model's names. The schedule sets lr before every step."""
    settings = config.optimizer
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    params: Any = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    patterns = [
        *settings.exclude_from_weight_decay,
        *(f"^{re.escape(name)}$" for name, _ in params if name in exempt),
    ]
    if settings.layer_decay is not None:
        timm_for("optimizer.layer_decay", "timm")
        from sharded_lamb.integrations.timm import named_groups

        params = named_groups(weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)(model)
    return ShardedLamb(
        params, lr=0.0, stage=config.stage, exclude_from_weight_decay=patterns, **settings.keywords()
    )


def layer_of(name: str) -> str:
    """The part of a model that owns a parameter, to group trust ratios: "blocks.3", "layer1", "head"."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def whole(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` and the model's buffers, as `load_state_dict` takes them."""
    own = model.state_dict()
    return {
        name: weights.get(name, tensor).detach().cpu().clone().contiguous() for name, tensor in own.items()
    }
