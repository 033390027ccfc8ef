"""Batches of a step: a function of the seed and the step, whatever was read before.

A step takes places `step · B … (step + 1) · B - 1` of an endless order: epoch by epoch, a permutation of the images
keyed by the epoch, each repeated as repeated augmentation has it. An epoch is as long as the images are many, cut to
whole batches. A place also keys its random transform.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sharded_lamb.recipes.training.bad_input import raise_if_of_machine
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.stateless_rng import I64, Permutation, key_of
from sharded_lamb.recipes.vision.config import VisionConfig
from sharded_lamb.recipes.vision.images import Split
from sharded_lamb.recipes.vision.model import Batch
from sharded_lamb.recipes.vision.transforms import Transform, preprocess, seed_generators, training_transform

_KEPT_PIXELS = 2**22
"""Of a split whose tensors stay in memory if nothing is random."""


@dataclass(frozen=True)
class MicroBatch:
    """Images as read, on the CPU. The image in place of a broken one is the next that is not."""

    images: Tensor  # [B, C, S, S] fp32
    labels: Tensor  # [B] int64
    broken: tuple[str, ...]  # names of broken images
    is_whole: Tensor  # [B] bool: not in place of a broken one

    def without_broken(self) -> MicroBatch:
        """The images that were read at their own place."""
        whole = self.is_whole
        return MicroBatch(self.images[whole], self.labels[whole], (), whole[whole])


class Read(Dataset[tuple[Tensor, int, str]]):
    """(image, label, name of the broken image in its place or "") of (place, number)."""

    def __init__(self, split: Split, config: VisionConfig, *, is_training: bool) -> None:
        self._split, self._seed = split, config.seed
        random = training_transform(config) if is_training else None
        self._is_random = random is not None
        size = config.data.size if is_training else config.data.validation_size or config.data.size
        self._transform: Transform = random or preprocess(config.data, size)
        keeps = not self._is_random and len(split.labels) * size**2 <= _KEPT_PIXELS
        self._kept: dict[int, tuple[Tensor, int, str]] | None = {} if keeps else None

    def __len__(self) -> int:
        return len(self._split.labels)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, str]:
        place, number = item
        if self._kept is None:
            return self._read(place, number)
        if number not in self._kept:
            self._kept[number] = self._read(place, number)
        return self._kept[number]

    def _read(self, place: int, number: int) -> tuple[Tensor, int, str]:
        count, broken = len(self._split.labels), ""
        for tried in range(count):
            other = (number + tried) % count
            try:
                image = self._split.image(other)
            except Exception as error:  # damaged files make decoders raise almost any
                raise_if_of_machine(error, self._split.name(other))
                broken = broken or self._split.name(other)
                continue
            if self._is_random:
                seed_generators(key_of(self._seed, "augment", place))
            return self._transform(image), int(self._split.labels[other]), broken
        raise ValueError(f"no image can be read: {broken} and all {count - 1} others are broken")


def collated(read: list[tuple[Tensor, int, str]]) -> MicroBatch:
    images, labels, broken = zip(*read, strict=True)
    whole = torch.tensor([not name for name in broken], device="cpu")
    names = tuple(name for name in broken if name)
    return MicroBatch(torch.stack(images), torch.tensor(labels, device="cpu"), names, whole)


class TrainBatches:
    """The micro-batches of every step on this rank."""

    def __init__(self, split: Split, config: VisionConfig, plan: BatchPlan, steps_per_epoch: int) -> None:
        self._config, self._plan, self._count = config, plan, len(split.labels)
        self._per_epoch = steps_per_epoch * plan.global_batch
        self._read = Read(split, config, is_training=True)

    def numbers(self, places: I64) -> I64:
        """The image at each place of the order."""
        numbers = np.empty_like(places)
        epochs, within = np.divmod(places, self._per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shuffle = Permutation(self._count, key_of(self._config.seed, "order", int(epoch)))
            numbers[here] = shuffle(within[here] // self._config.augment.repeats)
        return numbers

    def steps(self, begin: int, rank: int) -> Iterator[list[MicroBatch]]:
        """From step ``begin`` on. Worker processes read ahead."""
        workers = self._config.data.workers
        loader = DataLoader(
            self._read,
            batch_sampler=self._items(begin, rank),
            num_workers=workers,
            collate_fn=collated,
            pin_memory=torch.cuda.is_available(),
        )
        read = iter(loader)
        for step in range(begin, self._plan.steps):
            yield [next(read) for _ in range(self._plan.accumulation(step))]

    def _items(self, begin: int, rank: int) -> Iterator[list[tuple[int, int]]]:
        for step in range(begin, self._plan.steps):
            for start, stop in self._plan.step_plan(step, step * self._plan.global_batch, rank).micro_batches:
                places = np.arange(start, stop)
                yield list(zip(places.tolist(), self.numbers(places).tolist(), strict=True))


def to_batch(
    read: MicroBatch, classes: int, config: VisionConfig, device: torch.device, *, smoothing: float
) -> Batch:
    """On the device, with one-hot targets, smoothed as timm smooths them."""
    images = read.images.to(device, non_blocking=True)
    if config.speed.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    targets = F.one_hot(read.labels.to(device, non_blocking=True), classes).float()
    return Batch(images, targets * (1 - smoothing) + smoothing / classes)


def mixed(batch: Batch, mixup: Any, key: int) -> Batch:
    """``batch`` after timm's `Mixup`, which smooths by itself, seeded with ``key``."""
    seed_generators(key)
    images, targets = mixup(batch.images, batch.targets.argmax(1))
    return Batch(images, targets)
