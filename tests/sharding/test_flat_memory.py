"""Memory for state: zeros of the right size, in lanes of their own, that torch treats as its own."""

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
    found = memory.zeros(numel, dtype, CPU, lane=3)
    assert found.shape == (numel,)
    assert found.dtype == dtype
    assert not found.any()
    assert found.untyped_storage().nbytes() == numel * dtype.itemsize
    assert found.is_contiguous()
    assert found.data_ptr() % 64 == 0


def test_lanes_begin_at_different_places_of_a_page() -> None:
    places = [memory.zeros(1 << 20, torch.float32, CPU, lane).data_ptr() % 4096 for lane in range(5)]
    assert len(set(places)) == 5
    gaps = [(a - b) % 4096 for a in places for b in places if a != b]
    assert min(gaps) >= 768


def test_it_outlives_the_call_and_is_given_back() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

    size = 64 << 20
    gc.collect()
    before = resident()
    found = memory.zeros(size // 4, torch.float32, CPU, lane=1)
    gc.collect()
    found.fill_(3.0)
    assert found.sum(dtype=torch.float64) == 3.0 * found.numel()
    assert resident() - before > size * 0.9
    view = found[5:7]
    del found
    assert view.tolist() == [3.0, 3.0]
    del view
    gc.collect()
    assert resident() - before < size * 0.5


def test_torch_treats_it_as_its_own() -> None:
    found = memory.zeros(1 << 20, torch.float32, CPU, lane=2)
    found[7] = 5.0
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert torch.equal(torch.load(file), found)
    assert torch.equal(copy.deepcopy(found), found)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.data = found[:100].view(10, 10)
    parameter.sum().backward()
    assert parameter.grad is not None
    parameter.share_memory_()
    assert parameter[0, 7] == 5.0


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python was built with knows the word; what it runs on refuses it."""

    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    assert not memory.zeros(1 << 20, torch.float32, CPU, lane=1).any()
