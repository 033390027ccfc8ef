"""Progress of the commands that take more than a few seconds: a bar by tqdm, where that is installed."""

import sys
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")


def with_progress(
    items: Sequence[Item], title: str, label: Callable[[Item], str] = str
) -> Generator[Item, None, None]:
    """Yields ``items``. A bar on stderr counts them and shows ``label`` of the one in progress.

    Only the first rank draws, only on a terminal, and the bar is wiped at the end. No collectives.
    """
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if not (is_first and sys.stderr.isatty()):
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(total=len(items), desc=title, leave=False, dynamic_ncols=True) as bar:
        for item in items:
            bar.set_postfix_str(label(item))
            yield item
            bar.update()
