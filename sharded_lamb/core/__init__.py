"""The algorithm and its bookkeeping: no ranks, no memory."""
