"""Sparse tensors as plain data and dense tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAYOUTS = {
    str(layout).removeprefix("torch."): layout
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
}
_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)


def is_sparse(value: Any) -> bool:
    """Whether ``value`` is a tensor of a layout that `taken_apart` knows."""
    return isinstance(value, Tensor) and value.layout in LAYOUTS.values()


def taken_apart(sparse: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    """({"layout", "shape", "coalesced"}, dense tensors) of a sparse tensor."""
    header = {"layout": str(sparse.layout).removeprefix("torch."), "shape": list(sparse.shape)}
    if sparse.layout is torch.sparse_coo:
        return {**header, "coalesced": sparse.is_coalesced()}, [sparse._indices(), sparse._values()]
    if sparse.layout in _BY_ROW:
        return header, [sparse.crow_indices(), sparse.col_indices(), sparse.values()]
    return header, [sparse.ccol_indices(), sparse.row_indices(), sparse.values()]


def put_together(header: dict[str, Any], parts: list[Tensor]) -> Tensor:
    """Reverses `taken_apart`. Raises RuntimeError for indices outside the shape."""
    layout, shape = LAYOUTS[header["layout"]], header["shape"]
    if layout is torch.sparse_coo:
        indices, values = parts
        return torch.sparse_coo_tensor(
            indices, values, shape, is_coalesced=header["coalesced"], check_invariants=True
        )
    compressed, plain, values = parts
    return torch.sparse_compressed_tensor(
        compressed, plain, values, shape, layout=layout, check_invariants=True
    )


def encoded(sparse: Tensor, encode: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """A sparse tensor as JSON. ``encode``: (name of a part, dense tensor) → JSON."""
    header, parts = taken_apart(sparse)
    return {**header, "parts": [encode(str(i), part) for i, part in enumerate(parts)]}
