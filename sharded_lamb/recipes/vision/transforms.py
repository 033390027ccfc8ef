"""Images → tensors: resize and center crop by PIL, as torchvision and timm do it; random ones are timm's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_lamb.recipes.vision.config import DIGITS, DataConfig, VisionConfig
from sharded_lamb.recipes.vision.timm import timm_for, tried

Transform = Callable[[Any], Tensor]
"""A PIL image → [C, size, size] fp32, normalized."""


def preprocess(settings: DataConfig, size: int) -> Transform:
    """The shorter side becomes size / crop (bicubic), the center is cut out: torchvision's Resize and CenterCrop."""
    short = math.floor(size / settings.crop)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (settings.mean, settings.std))

    def apply(image: Any) -> Tensor:
        width, height = image.size
        scale = [
            short if side == min(width, height) else int(short * side / min(width, height))
            for side in image.size
        ]
        left, top = (round((side - size) / 2) for side in scale)
        if scale != [width, height]:
            image = image.resize(scale, 3)  # PIL's BICUBIC
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy((pixels - mean) / std)

    return apply


def training_transform(config: VisionConfig) -> Transform | None:
    """timm's random transform; None if none is configured.

    Raises:
        ValueError: the digits are augmented, timm is missing, or cannot make fp32 of an image with the keywords.
    """
    keywords, settings = config.augment.transform, config.data
    if keywords is None:
        return None
    if settings.source == DIGITS:
        raise ValueError(
            f"augment.transform={keywords!r}: expected null for the digits, which are 8 x 8 and gray"
        )
    timm = timm_for("augment.transform", "timm.data")

    def trial() -> Transform:
        from PIL import Image

        transform: Transform = timm.create_transform(
            settings.size, is_training=True, mean=settings.mean, std=settings.std, **keywords
        )
        made = transform(Image.new("RGB" if len(settings.mean) == 3 else "L", (settings.size, settings.size)))
        if not isinstance(made, Tensor) or made.dtype != torch.float32:
            raise TypeError(
                f"it makes {getattr(made, 'dtype', type(made))} of an image, expected torch.float32"
            )
        return transform

    return tried(f"augment.transform={keywords!r}", trial)


def mixing(config: VisionConfig, classes: int) -> Any:
    """timm's `Mixup`; None if it is off.

    Raises:
        ValueError: timm is missing, or cannot mix two images with the keywords.
    """
    keywords = config.augment.mix
    if keywords is None:
        return None
    timm = timm_for("augment.mix", "timm.data")
    smoothing, size = config.loss.label_smoothing, config.data.size

    def trial() -> Any:
        modes = ("batch", "pair", "elem")
        if keywords.get("mode", modes[0]) not in modes:
            raise ValueError(f"expected one of {', '.join(modes)} as mode")
        mixup = timm.Mixup(num_classes=classes, label_smoothing=smoothing, **keywords)
        always = timm.Mixup(num_classes=classes, label_smoothing=smoothing, **{**keywords, "prob": 1.0})
        images = torch.zeros(2, len(config.data.mean), size, size, device="cpu")
        always(images, torch.zeros(2, dtype=torch.int64, device="cpu"))
        return mixup

    return tried(f"augment.mix={keywords!r}", trial)


def seed_generators(key: int) -> None:
    """Seeds the process's CPU generators, from which timm and torchvision draw."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key >> 1)
