"""A program of `processes.rows_of`: rank 0 prints a row and waits, another fails."""

import os
import sys
import time

rank = int(os.environ["RANK"])
if rank:
    sys.exit(f"rank {rank} has failed")
print("other output")
print(
    f'row of the battery: {{"rank": 0, "of": {os.environ["WORLD_SIZE"]}, "device": "{sys.argv[1]}"}}',
    flush=True,
)
time.sleep(120)
