"""`sharded-lamb plan`: memory, bytes and time of a model on any number of ranks, from the layout that it would have."""
