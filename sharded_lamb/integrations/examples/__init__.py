"""Programs that train on a CPU or GPUs, one a framework: `torchrun --standalone --nproc-per-node 2 FILE`."""
