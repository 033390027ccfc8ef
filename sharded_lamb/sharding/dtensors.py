"""Whether a tensor is a DTensor, without importing torch.distributed.tensor: that takes most of a second."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> "TypeIs[DTensor]":
    """``isinstance(value, DTensor)``; False until some program has imported DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)  # absent while another thread imports it
    return kind is not None and isinstance(value, kind)
