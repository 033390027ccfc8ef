"""Stage 2 reduces gradients itself: rejects a DistributedDataParallel that reduces them too."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def reject_ddp(params: Sequence[Tensor]) -> None:
    """Raises ValueError if a DistributedDataParallel also reduces gradients of ``params``.

    DDP does not mark its parameters, so this searches for its instances, once.
    """
    reduced = set(map(id, params))
    for ddp in instances(DistributedDataParallel):
        if any(id(p) in reduced for p in ddp.parameters()):
            raise ValueError(
                "stage=2 reduces gradients itself, and the model is wrapped in DistributedDataParallel, which "
                "reduces them too: pass the bare model, or use stage=1 with DistributedDataParallel (Hugging Face's "
                "Trainer and Accelerate's prepare wrap the model by themselves)"
            )


def instances(kind: type[Any]) -> Iterator[Any]:
    """All objects of a class and its subclasses.

    Objects refer to their class. `gc.get_objects` would reference every object, which breaks a ``tuple(… for …)`` in
    other threads: CPython builds the tuple in place and fails to finish it once it has a second reference.
    """
    yield from (instance for instance in gc.get_referrers(kind) if type(instance) is kind)
    subclasses: list[type[Any]] = kind.__subclasses__()
    for sub in subclasses:
        yield from instances(sub)
