"""Convert other programs' checkpoints to this package's and back, and inspect a checkpoint.

Each format is a module of two pure functions between its file's content and `InMemoryCheckpoint`; `command.py` reads,
writes and reports what the target format cannot hold.
"""

from sharded_lamb.convert.common import Converted, Note

__all__ = ["Converted", "Note"]
