"""Detects a job in which no rank makes progress: every rank reports which rank is stuck and where, then exits.

A rank that hangs makes all others wait in a collective until its timeout (30 minutes in gloo, which then names no rank;
NCCL's watchdog names the collective). Ranks that report their position through the rendezvous store know more: the
stuck rank is the one that does not wait for the others.
"""

from sharded_lamb.watchdog.watchdog import EXIT_CODE, Watchdog

__all__ = ["EXIT_CODE", "Watchdog"]
