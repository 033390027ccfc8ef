"""Launches of the Triton backend, and copies to the device, under the interpreter: see `triton_cases.py`."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb.kernels import FlatShard, ReferenceKernel, engine, triton_kernel, triton_runs
from sharded_lamb.kernels.triton_kernel import TritonKernel
from tests.kernels.kernel_memory import F32, Form, assert_same, both_passes, made, optimizer_with, table_of
from tests.kernels.triton_interpreter import interpreted  # noqa: F401 (every test uses it)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    seen: list[str] = []
    real = triton_kernel.launch

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        seen.append(kernel.__name__)
        real(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_kernel, "launch", counted)
    return seen


def test_launches_do_not_grow_with_shards_pieces_and_parameters(launches: list[str]) -> None:
    expected = ["square_sums", "add_by_parameter", "moments_and_norms", "add_by_parameter", "apply"]
    for pieces, flats in ((1, 0), (20, 0), (0, 1), (0, 6), (9, 9)):
        forms = [Form(True, (256,), *F32)] * flats + ([Form(False, (16,) * pieces, *F32)] if pieces else [])
        shards = [made(form, 0, i, False) for i, form in enumerate(forms)]
        launches.clear()
        both_passes(TritonKernel(), shards, max(pieces, 1))
        assert launches == expected, (pieces, flats)


def test_launches_are_counted_by_forms_of_memory(launches: list[str]) -> None:
    """Another dtype is one more launch per pass, and so are pieces with unaligned addresses or lengths."""
    bf16 = replace(Form(False, (256, 512), *F32), model=torch.bfloat16)
    mismatched = Form(False, (16,) * 6 + (7,), *F32)
    both_passes(
        TritonKernel(), [made(form, 0, 0, False) for form in (Form(True, (256,), *F32), bf16, mismatched)], 8
    )
    assert launches.count("apply") == launches.count("moments_and_norms") == 3
    assert launches.count("add_by_parameter") == 2


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tables copied to the device."""
    seen: list[tuple[int, ...]] = []
    real = triton_runs._pinned

    def counted(values: Any, device: torch.device) -> Tensor:
        seen.append(values.shape)
        return real(values, device)

    monkeypatch.setattr(triton_runs, "_pinned", counted)
    return seen


def test_addresses_of_unchanged_memory_are_copied_once(copies: list[tuple[int, ...]]) -> None:
    kernel = TritonKernel()
    shards = [made(Form(True, (700,), *F32), 0, 0, False), made(Form(False, (3, 300), *F32), 1, 0, False)]
    both_passes(kernel, shards, 3)
    scratch = [table.block_sums.data_ptr() for table in kernel._tables._tables.values()]
    copies.clear()
    both_passes(kernel, shards, 3)
    again = [replace(shards[0]), replace(shards[1])]  # new shards over the same memory
    both_passes(kernel, again, 3)
    assert copies == []
    moved = replace(again[1], grad=[grad.clone() for grad in again[1].grad])  # type: ignore[call-arg]
    both_passes(kernel, [again[0], moved], 3)
    assert copies == [(3, 8)], "new gradients: copies the addresses only"
    both_passes(kernel, shards, 3)
    both_passes(kernel, [again[0], moved], 3)
    assert copies == [(3, 8)], "alternating gradients are both cached"
    assert scratch == [table.block_sums.data_ptr() for table in kernel._tables._tables.values()]


def test_no_memory_is_kept_alive() -> None:
    """Gradients above all; the extracted addresses are freed with the shard."""
    kernel = TritonKernel()
    shard = made(Form(False, (3, 300), *F32), 0, 0, False)
    both_passes(kernel, [shard], 2)
    refs = [weakref.ref(shard), weakref.ref(shard.grad[0]), weakref.ref(shard.weight[1])]
    assert len(kernel._tables._memories) == 1
    del shard
    assert [ref() for ref in refs] == [None] * 3
    assert not kernel._tables._memories


def test_new_memory_is_seen() -> None:
    """The same shapes at other addresses, and other parameters of the same blocks."""
    kernel, form = TritonKernel(), Form(True, (700, 30), *F32)
    for seed in range(2 * triton_runs.KEPT_PLACES):
        results = []
        for used in (kernel, ReferenceKernel()):
            shard = made(form, 0, seed, False)
            if seed % 2:
                assert isinstance(shard, FlatShard)
                shard = replace(shard, block_param=shard.block_param.flip(0))
            sums = torch.zeros(2, dtype=torch.float64)
            used.square_sums([shard], sums)
            results.append([sums])
        assert_same(results[0], results[1])


def test_pieces_that_differ_in_parameters_or_alignment_only_are_distinguished() -> None:
    kernel, sums = TritonKernel(), []
    shard = made(Form(False, (16, 32), *F32), 0, 0, False)
    for params in ((0, 1), (1, 0), (1, 1)):
        sums.append(torch.zeros(2, dtype=torch.float64))
        kernel.square_sums([replace(shard, params=params)], sums[-1])  # type: ignore[call-arg]
    assert sums[0].tolist() == sums[1].flip(0).tolist()
    assert sums[2].tolist() == [0, sums[0].sum()]
    forms = []
    for gap in (0, 1):
        lookup = kernel._tables.of([made(Form(False, (16, 32), *F32, gap=gap), 0, 0, False)], 2)
        assert lookup is not None
        forms.append([run.form.aligned for run in lookup[0].launches])
    assert forms == [[True], [False]]


def test_old_tables_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runs, "KEPT_TABLES", 3)
    kernel = TritonKernel()
    for length in range(1, 9):
        shard = made(Form(False, (length,), *F32), 0, 0, False)
        kernel.apply([shard], table_of(1, torch.float32, False), torch.ones(1)[None])
    assert len(kernel._tables._tables) == 3


def test_a_new_table_raises_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, form = TritonKernel(), Form(False, (5,), *F32)
    cached = made(form, 0, 0, False)
    other = made(replace(form, lengths=(6,)), 0, 0, False)
    both_passes(kernel, [cached], 1)
    monkeypatch.setattr(triton_runs, "_is_capturing", lambda device: True)
    both_passes(kernel, [cached], 1)
    assert len(kernel._tables._captured) == 3
    with pytest.raises(RuntimeError, match="a step like it first"):
        both_passes(kernel, [other], 1)
    assert len(kernel._tables._tables) == 1


def test_new_addresses_in_a_graph_are_for_that_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a replay writes them to the device, from memory that stays: a later call copies them itself."""
    kernel, form = TritonKernel(), Form(False, (5,), *F32)
    shards = [made(form, 0, seed, False) for seed in range(2)]
    both_passes(kernel, shards[:1], 1)
    (table,) = kernel._tables._tables.values()
    before = dict(table._rows)
    with monkeypatch.context() as patched:
        patched.setattr(triton_runs, "_is_capturing", lambda device: True)
        both_passes(kernel, shards[1:], 1)
    assert table._rows == before
    captured = [(id(table), rows.data_ptr()) for table, rows in kernel._tables._captured]
    assert len(captured) == len(table._copied_by_replays) == 3
    both_passes(kernel, shards[1:], 1)
    assert len(table._rows) == len(before) + 1


# -- the optimizer -------------------------------------------------------------------------------------


def test_a_step_over_42_buckets_is_at_most_12_launches(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a call updates several shards; with a missing gradient and clipping."""
    monkeypatch.setattr(engine, "_one_by_one", lambda shards: False)
    results = []
    for kernel in (TritonKernel(), ReferenceKernel()):
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.randn(3 + i)) for i in range(42)])
        optimizer = optimizer_with(kernel, model, max_grad_norm=1.0, bucket_mb=1e-6)
        assert len(optimizer._store.buckets) == 42
        for step in range(2):
            for i, p in enumerate(model):
                p.grad = None if step == 1 and i == 5 else torch.randn(p.shape)
            launches.clear()
            optimizer.step()
            assert len(launches) <= (12 if isinstance(kernel, TritonKernel) else 0), launches
        results.append([p.detach() for p in model])
    assert_same(results[0], results[1])
