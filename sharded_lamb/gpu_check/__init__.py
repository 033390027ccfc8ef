"""``sharded-lamb gpu-check``: one battery of checks and measurements for a GPU, in minutes."""
