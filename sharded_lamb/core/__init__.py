"""The LAMB rule, its options and the shard layout: no process group, no device memory."""
