"""Loss and accuracy on a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.vision.batches import Read, collated, to_batch
from sharded_lamb.recipes.vision.config import VisionConfig

_NAMED = 5  # broken images in a message


@dataclass(frozen=True)
class Score:
    """Means over the images of a split that could be read."""

    loss: float
    accuracy: float
    images: int
    broken: int


def evaluate(
    losses: Any, images: Read, classes: int, config: VisionConfig, ranks: Ranks, beat: Callable[[str], None]
) -> Score:
    """Ranks take batches in turn, all with rank 0's buffers (BatchNorm's statistics). Collective.

    Raises:
        ValueError: broken images, on every rank, unless `data.on_bad` is "skip", which leaves them out.
    """
    share_buffers(losses)
    size, count = config.schedule.max_micro_batch, len(images)
    starts = range(ranks.rank * size, count, ranks.world_size * size)
    items = [[(number, number) for number in range(start, min(start + size, count))] for start in starts]
    loader = DataLoader(
        images,
        batch_sampler=items,
        num_workers=config.data.workers,
        collate_fn=collated,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    broken: list[str] = []
    was_training, read_count = losses.training, 0
    losses.eval()
    with torch.no_grad():
        for number, read in enumerate(loader):
            beat(f"evaluation, batch {number}")
            if read.broken:
                broken += read.broken
                read = read.without_broken()
            if len(read.labels):
                sums += losses(to_batch(read, classes, config, ranks.device, smoothing=0.0))
                read_count += len(read.labels)
    losses.train(was_training)
    loss, right, total, bad = ranks.sum([*sums.tolist(), read_count, len(broken)])
    if bad:
        handle_broken(ranks, broken, config)
    return Score(loss / max(1, total), right / max(1, total), int(total), int(bad))


def share_buffers(model: nn.Module) -> None:
    """Rank 0's buffers on every rank. Collective."""
    if dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def handle_broken(ranks: Ranks, names: Sequence[str], config: VisionConfig) -> list[str]:
    """The broken images of all ranks. Collective.

    Raises:
        ValueError: on every rank, with `data.on_bad` "error".
    """
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, list(names), group=ranks.control)
    every = sorted({name for own in gathered for name in own})
    if config.data.on_bad == "error":
        more = ", …" if len(every) > _NAMED else ""
        raise ValueError(
            f"{len(every)} broken image{'s' if len(every) > 1 else ''} in {config.data.source}: "
            f"{', '.join(every[:_NAMED])}{more}; set data.on_bad=skip to read the next image instead"
        )
    return every
