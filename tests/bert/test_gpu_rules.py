"""What the recipe does on a GPU, as far as a CPU shows it."""

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_lamb.bert import metrics, train
from sharded_lamb.bert.model import compile_layers
from sharded_lamb.bert.ranks import Ranks

GPU = torch.device("cuda", 0)


class AsynchronousSums:
    """A step's [4] sums on a device that computes for five seconds after its work was enqueued."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def double(self) -> "AsynchronousSums":
        return self

    def tolist(self) -> list[float]:
        self.clock[0] += 5.0
        return [1.0, 2.0, 3.0, 4.0]


def test_a_step_lasts_until_the_device_has_completed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = train._Clock(begin=100.0)
    now[0] += 0.25  # the host enqueues
    sums: Any = AsynchronousSums(now)
    assert clock.stopped_by(sums) == [1.0, 2.0, 3.0, 4.0]
    assert clock.total == 5.25


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
    ],
)
def test_the_peak_is_that_of_the_card(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(GPU, None) == (tflops * 1e12, mock.ANY)


@pytest.mark.parametrize(("name", "is_fp32"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA L4", False)])
def test_other_peaks_are_measured(name: str, is_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on any card, and cards that are not in the table: an L4 is no L40."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(metrics, "_measured_flops", lambda device, size: 7.0)
    flops, source = metrics.peak_flops(GPU, None, is_fp32=is_fp32)
    assert flops == 7.0
    assert "matmul" in source


def test_layers_are_compiled_one_by_one() -> None:
    """Parameters keep their names, and no outer module is compiled, whose backward would be one node of autograd."""
    bert = nn.Module()
    bert.bert = nn.Module()
    bert.bert.encoder = nn.Module()
    bert.bert.encoder.layer = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    names = [name for name, _ in bert.named_parameters()]
    compile_layers(bert)
    assert [name for name, _ in bert.named_parameters()] == names
    compiled = [m for m in bert.modules() if m._compiled_call_impl is not None]
    assert compiled == list(bert.bert.encoder.layer)


@pytest.mark.parametrize("launched", [False, True])
def test_ranks_on_a_gpu_meet_on_nccl_beside_gloo(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun too, and each bound to its GPU."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(current=device))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: seen.update(options, backend=backend)
    )
    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 1)]))
    device = torch.device("cuda", 1 if launched else 0)
    assert Ranks.start().device == device
    assert seen["current"] == seen["device_id"] == device
    assert seen["backend"] == "cpu:gloo,cuda:nccl"
