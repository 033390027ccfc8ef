"""``sharded-lamb preflight``: before a long job, compares ranks with each other and the network with its plan."""
