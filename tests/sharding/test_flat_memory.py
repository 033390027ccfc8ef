"""Memory for state: zeros of the right size at separate page offsets, usable as any torch tensor."""

import copy
import gc
import io
import mmap
from pathlib import Path

import pytest
import torch

from sharded_lamb.sharding import flat_memory as memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, 256, (1 << 18) + 256, 1 << 21])
def test_zeros_of_the_right_size(numel: int, dtype: torch.dtype) -> None:
    tensor = memory.zeros(numel, dtype, CPU, lane=3)
    assert tensor.shape == (numel,)
    assert tensor.dtype == dtype
    assert not tensor.any()
    assert tensor.untyped_storage().nbytes() == numel * dtype.itemsize
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0


def test_lanes_begin_at_different_page_offsets() -> None:
    offsets = [memory.zeros(1 << 20, torch.float32, CPU, lane).data_ptr() % 4096 for lane in range(5)]
    assert len(set(offsets)) == 5
    gaps = [(a - b) % 4096 for a in offsets for b in offsets if a != b]
    assert min(gaps) >= 768


def test_memory_lives_as_long_as_its_views() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

    size = 64 << 20
    gc.collect()
    before = resident()
    tensor = memory.zeros(size // 4, torch.float32, CPU, lane=1)
    gc.collect()
    tensor.fill_(3.0)
    assert tensor.sum(dtype=torch.float64) == 3.0 * tensor.numel()
    assert resident() - before > size * 0.9
    view = tensor[5:7]
    del tensor
    assert view.tolist() == [3.0, 3.0]
    del view
    gc.collect()
    assert resident() - before < size * 0.5


def test_torch_saves_copies_and_shares_the_memory() -> None:
    tensor = memory.zeros(1 << 20, torch.float32, CPU, lane=2)
    tensor[7] = 5.0
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    assert torch.equal(torch.load(file), tensor)
    assert torch.equal(copy.deepcopy(tensor), tensor)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.data = tensor[:100].view(10, 10)
    parameter.sum().backward()
    assert parameter.grad is not None
    parameter.share_memory_()
    assert parameter[0, 7] == 5.0


def test_zeros_on_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has the constant MADV_HUGEPAGE; the running kernel rejects it."""

    class RejectingMmap(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", RejectingMmap)
    assert not memory.zeros(1 << 20, torch.float32, CPU, lane=1).any()
