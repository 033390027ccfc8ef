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
from sharded_lamb.recipes.vision.timm import timm_for

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
        ValueError: the digits are augmented, timm is missing, or it does not know a keyword.
    """
    keywords, settings = config.augment.transform, config.data
    if keywords is None:
        return None
    if settings.source == DIGITS:
        raise ValueError(
            f"augment.transform={keywords!r}: expected null for the digits, which are 8 x 8 and gray"
        )
    timm = timm_for("augment.transform", "timm.data")
    try:
        transform: Transform = timm.create_transform(
            settings.size, is_training=True, mean=settings.mean, std=settings.std, **keywords
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"augment.transform={keywords!r}: {error or 'refused by timm'}") from None
    return transform


def mixing(config: VisionConfig, classes: int) -> Any:
    """timm's `Mixup`; None if it is off.

    Raises:
        ValueError: timm is missing, or does not know a keyword.
    """
    keywords = config.augment.mix
    if keywords is None:
        return None
    timm = timm_for("augment.mix", "timm.data")
    smoothing = config.loss.label_smoothing
    try:
        return timm.Mixup(num_classes=classes, label_smoothing=smoothing, **keywords)
    except TypeError as error:
        raise ValueError(f"augment.mix={keywords!r}: {error}") from None


def seed_generators(key: int) -> None:
    """Seeds the process's CPU generators, from which timm and torchvision draw."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key >> 1)
