"""``python -m sharded_lamb.deepspeed SCRIPT …``: a program of anyone's with the optimizer's type registered."""

import sys

from sharded_lamb.deepspeed.launcher import run_script

if __name__ == "__main__":
    sys.exit(run_script(sys.argv[1:]))
