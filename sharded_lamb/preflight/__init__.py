"""``sharded-lamb preflight``, before a long job: do all ranks mean the same, and does the network do its part?"""
