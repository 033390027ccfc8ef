"""What recipes share: settings, ranks, batches, random numbers, checkpoints, metrics. Nothing of one model or task.

Imports between modules run one way::

    settings, shipped, stateless_rng, batch, step_clock, picture -> config_io, precision, ranks, metrics
           -> sharded_backend -> checkpoint -> loop
"""
