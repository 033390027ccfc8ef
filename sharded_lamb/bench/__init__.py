"""Measurements that a user can repeat; what was measured lies in ``results/``, with machine and date."""
