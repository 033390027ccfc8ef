"""Other programs' checkpoints ↔ this package's, and what is in a checkpoint.

A format is a module of two pure functions, between what its file holds and `Contents`; `command.py` reads, writes and
says what a format could not hold.
"""

from sharded_lamb.convert.common import Converted, Note

__all__ = ["Converted", "Note"]
