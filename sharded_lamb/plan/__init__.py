"""`sharded-lamb plan`: what a model costs on any number of ranks, computed from the layout that would be used there."""
