"""``python -m sharded_lamb.deepspeed SCRIPT …``: run any program with the type "ShardedLamb" registered."""

import sys

from sharded_lamb.deepspeed.launcher import run_script

if __name__ == "__main__":
    sys.exit(run_script(sys.argv[1:]))
