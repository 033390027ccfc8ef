"""Buffers and extra tensors of any dtype and layout are saved, or refused by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.checkpoint import load, read_contents, save, write_contents
from tests.harness import run_ranks


def numbers(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def cast(dtype: str) -> Tensor:
    return numbers(4).to(getattr(torch, dtype))


BUFFERS: dict[str, Callable[[], Tensor]] = {
    "complex64": lambda: torch.polar(torch.ones(4), numbers(4)),
    "complex128": lambda: torch.polar(torch.ones(2, 3), numbers(2, 3)).to(torch.complex128),
    "complex32": lambda: torch.ones(3, dtype=torch.complex32),
    "conjugate": lambda: torch.polar(torch.ones(2, 3), numbers(2, 3)).conj(),
    "scalar complex": lambda: torch.tensor(1 - 2j),
    "bool": lambda: numbers(5) > 2,
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.zeros(0, 3, dtype=torch.complex64),
    "empty, expanded": lambda: torch.zeros(3, 0).expand(5, 3, 0),
    "transposed": lambda: numbers(3, 4).t(),
    "strided": lambda: numbers(8)[::3],
    "channels last": lambda: numbers(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "uint16": lambda: numbers(3).to(torch.uint16),
    **{name: partial(cast, name) for name in dir(torch) if name.startswith("float8_")},
    "coo": lambda: torch.sparse_coo_tensor([[0, 2, 2], [1, 0, 0]], [1.0, 2.0, 3.0], (3, 4)),
    "coalesced": lambda: numbers(3, 4).to_sparse(),
    "hybrid": lambda: numbers(3, 4, 2).to_sparse(2),
    "complex coo": lambda: (numbers(3, 4) * 1j).to_sparse(),
    "csr": lambda: numbers(3, 4).to_sparse_csr(),
    "csc": lambda: numbers(3, 4).to_sparse_csc(),
    "bsr": lambda: numbers(4, 4).to_sparse_bsr((2, 2)),
    "bsc": lambda: numbers(4, 4).to_sparse_bsc((2, 2)),
}


def bits(tensor: Tensor) -> tuple[Any, ...]:
    dense = tensor
    if tensor.layout is not torch.strided:
        dense = tensor.to_dense()
    raw = dense.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
    return tensor.layout, tensor.dtype, tuple(tensor.shape), raw.tolist()


class WithBuffer(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)
        self.register_buffer("table", value)


def cleared(value: Tensor) -> Tensor:
    """Other values, and in a sparse tensor none."""
    if value.layout is torch.strided:
        return torch.zeros_like(value)
    return torch.zeros(value.shape, dtype=value.dtype).to_sparse(layout=value.layout, blocksize=block(value))


def block(value: Tensor) -> tuple[int, int] | None:
    return (2, 2) if value.layout in (torch.sparse_bsr, torch.sparse_bsc) else None


def round_trip(rank: int, folder: str) -> None:
    for name, make in BUFFERS.items():
        path, value = f"{folder}/{name}", make()
        model = WithBuffer(value)
        opt = ShardedLamb(model.fc.named_parameters())
        save(path, model, opt, {"table": value} if rank == 0 else {"table": None})
        other = WithBuffer(cleared(value))
        extra = load(path, other, ShardedLamb(other.fc.named_parameters()))
        assert bits(other.table) == bits(value), name  # type: ignore[arg-type]
        assert bits(extra["table"]) == bits(value), name
        assert torch.equal(other.fc.weight, model.fc.weight)


def test_buffers_and_extra_tensors_return_bit_for_bit(tmp_path: Path) -> None:
    round_trip(0, str(tmp_path))


def test_buffers_of_the_first_rank_reach_all(tmp_path: Path) -> None:
    run_ranks(2, round_trip, str(tmp_path))


def test_safetensors_reads_the_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for name in ("complex64", "complex128", "bool", "scalar complex"):
        value = BUFFERS[name]()
        save(tmp_path / name, WithBuffer(value))
        (file,) = (tmp_path / name).glob("*.safetensors")
        saved = safetensors.load_file(str(file))["model.table"]
        if name == "complex128":
            saved = saved.view(torch.complex128).reshape(value.shape)
        assert torch.equal(saved, value)


def test_converters_carry_them(tmp_path: Path) -> None:
    for name in ("complex128", "csr", "coo"):
        value = BUFFERS[name]()
        save(tmp_path / name, WithBuffer(value))
        write_contents(tmp_path / f"{name} again", read_contents(tmp_path / name))
        other = WithBuffer(cleared(value))
        load(tmp_path / f"{name} again", other)
        assert bits(other.table) == bits(value)  # type: ignore[arg-type]


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "quantized": (
        lambda: torch.quantize_per_tensor(numbers(4), 0.5, 0, torch.qint8),
        r"table is a quantized tensor \(torch.qint8 with scales\)",
    ),
    "nested": (nested, "table is a NestedTensor"),
    "mkldnn": (lambda: numbers(3, 4).to_mkldnn(), "table is a tensor of layout torch._mkldnn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "step", WithBuffer(make()))
    assert not (tmp_path / "step").exists()


def test_a_buffer_of_another_kind_of_number_or_shape_is_another_model(tmp_path: Path) -> None:
    save(tmp_path / "complex", WithBuffer(BUFFERS["complex64"]()))
    with pytest.raises(ValueError, match=r"table is torch.complex64 there, but torch.float32 here"):
        load(tmp_path / "complex", WithBuffer(numbers(4)))
    save(tmp_path / "sparse", WithBuffer(BUFFERS["csr"]()))
    with pytest.raises(ValueError, match=r"table has shape \[3, 4\] there, but \[4, 3\] here"):
        load(tmp_path / "sparse", WithBuffer(numbers(4, 3).to_sparse_csr()))
