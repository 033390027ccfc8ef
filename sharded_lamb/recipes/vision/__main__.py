"""``python -m sharded_lamb.recipes.vision``, alone or under torchrun: as ``sharded-lamb vision``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from sharded_lamb.recipes.vision.command import add_arguments, run


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 error, 130 Ctrl-C, `checkpoint.requeue_exit_code` to be restarted after a signal."""
    parser = argparse.ArgumentParser(prog="python -m sharded_lamb.recipes.vision", allow_abbrev=False)
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    try:
        return run(chosen)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; --resume auto continues from the last checkpoint\n")
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        rank = os.environ.get("RANK")
        remedy = "; pip install 'sharded-lamb[vision]'" if isinstance(error, ModuleNotFoundError) else ""
        # One write: print() writes the newline separately, so that lines of several ranks could mix.
        sys.stderr.write(f"error{f' (rank {rank})' if rank else ''}: {error}{remedy}\n")
        return 1
    finally:
        dist: Any = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
