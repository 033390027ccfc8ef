"""A third state format, which only this file knows, trains, saves and loads to the bits of plain float32."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.core.rule import MOMENTS
from sharded_lamb.kernels import formats
from sharded_lamb.kernels.state_format import OneByOne, PlainFormat, StateFormat


@dataclass(frozen=True)
class SwappedHalves(OneByOne):
    """float32 values with the two halves of their bits exchanged: nothing that reads the memory as values works."""

    storage: ClassVar[torch.dtype] = torch.int32
    value: ClassVar[torch.dtype] = torch.float32
    name: ClassVar[str] = "swapped"
    beside_weight: ClassVar[bool] = False

    def key(self, kind: str) -> str:
        return f"{kind}_swapped"

    @staticmethod
    def _swap(bits: Tensor) -> Tensor:
        return (bits << 16) | ((bits >> 16) & 0xFFFF)

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        return self._swap(stored).view(torch.float32)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._swap(values.contiguous().view(torch.int32)), None

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        stored.copy_(self.encode(weight.float())[0])


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> SwappedHalves:
    """Registered, and chosen for every kind of state that is float32."""
    chosen = SwappedHalves()
    monkeypatch.setitem(formats.MASTERS, torch.int32, chosen)
    monkeypatch.setitem(formats.MOMENTS, torch.int32, (chosen, chosen))
    monkeypatch.setitem(formats.STATE_DTYPES, torch.float32, torch.int32)
    monkeypatch.setattr(formats, "of_masters", lambda model, master, **_: None if model == master else chosen)
    return chosen


def trained(dtype: torch.dtype, steps: int = 4, load: Any = None) -> tuple[nn.Module, ShardedLamb]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(19, 40), nn.LayerNorm(40), nn.Linear(40, 3)).to(dtype)
    opt = ShardedLamb(model.named_parameters(), lr=1e-2, kernel="torch", bucket_mb=0.003)
    if load is not None:
        model.load_state_dict(load[0])
        opt.load_state_dict(load[1])
    for step in range(steps):
        torch.manual_seed(step)
        opt.zero_grad()
        model(torch.randn(5, 19, dtype=dtype)).float().square().mean().backward()
        opt.step()
    return model, opt


def saved(model: nn.Module, opt: ShardedLamb) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {key: value.clone() for key, value in model.state_dict().items()}, opt.state_dict()


def values(opt: ShardedLamb) -> list[tuple[str, Tensor]]:
    entries = opt.state_dict()["state"]
    return [(f"{p}.{kind}", x) for p, entry in entries.items() for kind, x in sorted(entry.items())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_registered_format_changes_the_memory_and_no_value(
    dtype: torch.dtype, swapped: SwappedHalves, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = trained(dtype)
    kinds = {key for state in opt.state.values() for key in state}
    assert {"exp_avg_swapped", "exp_avg_sq_swapped"} <= kinds
    assert ("master_swapped" in kinds) is (dtype == torch.bfloat16)
    full = opt.full_state_dict()
    halfway = saved(model, opt)
    resumed, _ = trained(dtype, steps=2, load=halfway)
    monkeypatch.undo()

    plain_model, plain = trained(dtype)
    for (name, value), (plain_name, expected) in zip(values(opt), values(plain), strict=True):
        assert name == plain_name
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), name
    for a, b in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert opt.memory() == plain.memory()
    plain_full = plain.full_state_dict()
    assert full is not None
    assert plain_full is not None
    for place, entry in plain_full["state"].items():
        for kind, expected in entry.items():
            assert torch.equal(full["state"][place][kind], expected), kind
    plain_resumed, _ = trained(dtype, steps=2, load=halfway)  # a plain optimizer loads the other's state
    for a, b in zip(resumed.parameters(), plain_resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_format_has_a_storage_dtype_of_its_own_by_which_kernels_find_it() -> None:
    for storage, known in formats.MASTERS.items():
        assert known.storage is storage
        assert formats.of_memory(storage) is known
    for storage, both in formats.MOMENTS.items():
        for kind, known in zip(MOMENTS, both, strict=True):
            assert known.storage is storage
            assert formats.of_moment(kind, storage) is known


ALL = dict.fromkeys(
    [*formats.MASTERS.values(), *(form for both in formats.MOMENTS.values() for form in both)]
)


@pytest.mark.parametrize("known", ALL, ids=lambda form: form.name)
def test_memory_of_zeros_stands_for_zeros(known: StateFormat) -> None:
    shape, weight = known.shape(256), torch.zeros(256, dtype=torch.bfloat16)
    read = known.decode(torch.zeros(shape, dtype=known.storage), weight).flatten()
    assert read.dtype == known.value
    assert torch.equal(read, torch.zeros(256, dtype=known.value))


@pytest.mark.parametrize("storage", formats.MASTERS, ids=str)
def test_what_is_encoded_is_decoded(storage: torch.dtype) -> None:
    known = formats.of_memory(storage)
    given = torch.linspace(-3, 5, 1001).to(known.value)
    if storage == torch.int8:  # 24 bits; but the sign of a tie
        given = (given.view(torch.int32) & ~0xFF).view(torch.float32)
        given = given[(given.view(torch.int32) & 0xFFFF) != 0x8000]
    stored, weight = known.encode(given)
    assert torch.equal(known.decode(stored.to(storage), weight), given)


def test_masters_are_stored_where_weights_cannot_hold_them() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    assert formats.of_masters(fp32, fp32, remainder_bits=16) is None
    assert formats.of_masters(bf16, fp32, remainder_bits=0) == PlainFormat(fp32)
    for bits in (8, 16):
        chosen = formats.of_masters(bf16, fp32, remainder_bits=bits)
        assert chosen is not None
        assert chosen.beside_weight
        assert 8 * chosen.storage.itemsize == bits
    assert formats.of_masters(torch.float16, fp32, remainder_bits=16) == PlainFormat(fp32)
