"""A program of `processes.rows_of`: rank 0 prints a row and waits, and then another fails."""

import os
import socket
import sys
import time

rank, address = int(os.environ["RANK"]), ("127.0.0.1", int(os.environ["MASTER_PORT"]))
if rank:
    for _ in range(600):
        try:
            socket.create_connection(address).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            sys.exit(f"rank {rank} has failed")
print("other output")
print(
    f'row of the battery: {{"rank": 0, "of": {os.environ["WORLD_SIZE"]}, "device": "{sys.argv[1]}"}}',
    flush=True,
)
with socket.create_server(address):
    time.sleep(60)
