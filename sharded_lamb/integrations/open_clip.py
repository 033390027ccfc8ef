"""open_clip's trainer with `ShardedLamb`: ``-m sharded_lamb.integrations.open_clip --opt timm/shardedlamb …``.

The arguments are those of ``open_clip_train.main``. Importing `sharded_lamb.integrations.timm` alone makes the name
known; but open_clip writes checkpoints on rank 0, whose ``state_dict()`` needs the other ranks' state before.
"""

import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

from open_clip_train import main as program

import sharded_lamb.integrations.timm  # noqa: F401 (registers the name)
from sharded_lamb import ShardedLamb


def main(arguments: Sequence[str]) -> None:
    """Train; rank 0 gathers the whole state at the end of every epoch. Collective over all ranks.

    Raises:
        SystemExit: invalid arguments.
    """
    train = program.train_one_epoch

    def train_and_gather(
        model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, *rest: Any, **options: Any
    ) -> None:
        train(model, data, loss, epoch, optimizer, *rest, **options)
        if isinstance(optimizer, ShardedLamb):
            optimizer.consolidate_state_dict()

    with mock.patch.object(program, "train_one_epoch", train_and_gather):
        program.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
