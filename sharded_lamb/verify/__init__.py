"""Verification on the user's machine: compares some steps of `ShardedLamb` with a single-process fp64 LAMB.

Rank 0 computes the expected result from the same gradients with `Reference`, which shares no code with the optimizer.
"""

from sharded_lamb.verify.command import add_arguments, run
from sharded_lamb.verify.comparison import ParameterError, Report, verify
from sharded_lamb.verify.reference import Reference

__all__ = ["ParameterError", "Reference", "Report", "add_arguments", "run", "verify"]
