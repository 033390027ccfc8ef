"""Checkpoints without pickle, on torch.distributed.checkpoint, for any number of ranks and any stage."""

from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.folder import Checkpoints, Resumed
from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint, read_contents, write_contents
from sharded_lamb.checkpoint.loading import load
from sharded_lamb.checkpoint.manifest import problem_with, read_manifest
from sharded_lamb.checkpoint.rank_group import RankGroup
from sharded_lamb.checkpoint.saving import AsyncSave, async_save, save
from sharded_lamb.checkpoint.storage import Reader, Writer

__all__ = [
    "AsyncSave",
    "CheckpointError",
    "Checkpoints",
    "InMemoryCheckpoint",
    "RankGroup",
    "Reader",
    "Resumed",
    "Writer",
    "async_save",
    "load",
    "problem_with",
    "read_contents",
    "read_manifest",
    "save",
    "write_contents",
]
