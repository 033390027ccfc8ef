"""Which rank holds which shard, and in which memory."""
