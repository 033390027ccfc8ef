"""The optimizers: `Lamb` on one device, `ShardedLamb` over ranks."""
