"""Benchmarks that a user can repeat; ``results/`` holds our measurements, each with its machine and date."""
