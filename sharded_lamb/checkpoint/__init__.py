"""Checkpoints that any number of ranks in any stage can load, on torch.distributed.checkpoint; without pickle."""

from sharded_lamb.checkpoint.contents import Contents, read_contents, write_contents
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.folder import Checkpoints, Resumed
from sharded_lamb.checkpoint.loading import load
from sharded_lamb.checkpoint.manifest import problem_with
from sharded_lamb.checkpoint.ranks import Ranks
from sharded_lamb.checkpoint.saving import Saving, async_save, save
from sharded_lamb.checkpoint.storage import Reader, Writer

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Contents",
    "Ranks",
    "Reader",
    "Resumed",
    "Saving",
    "Writer",
    "async_save",
    "load",
    "problem_with",
    "read_contents",
    "save",
    "write_contents",
]
