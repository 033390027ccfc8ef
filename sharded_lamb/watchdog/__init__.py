"""A watchdog over ranks: when none comes further, each says which one hangs, and where, and ends.

A rank that hangs makes all others wait in a collective, until its timeout (30 minutes in gloo, which then names nobody;
NCCL's watchdog names the collective). Ranks that say "I am here, doing this" through the rendezvous store know more:
the one that hangs is the one that does not wait for the others.
"""

from sharded_lamb.watchdog.watchdog import EXIT_CODE, Watchdog

__all__ = ["EXIT_CODE", "Watchdog"]
