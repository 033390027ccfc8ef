"""What the recipe does on a GPU, as far as a CPU shows it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_lamb.bert import metrics
from sharded_lamb.bert.model import compile_layers
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.training.step_clock import SECTIONS, StepClock
from tests.bert.test_data import source_of

GPU = torch.device("cuda", 0)


class Device:
    """A GPU's stream, simulated: work is queued and takes device time; events get the time at which it reaches them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued = self.reached = (
            0.0  # device seconds: of all work, and of the work that the host waited for
        )
        self.stream = "main"
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.queued

            def synchronize(self) -> None:
                device.reached = max(device.reached, self.at)

            def elapsed_time(self, end: "Event") -> float:
                assert device.reached >= end.at, "read before the device came there"
                return 1e3 * (end.at - self.at)

        @contextmanager
        def stream(other: object) -> Iterator[None]:
            before, device.stream = device.stream, "beside"
            yield
            device.stream = before

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", object)
        monkeypatch.setattr(torch.cuda, "stream", stream)

    def work(self, seconds: float) -> None:
        self.queued += seconds


def test_sections_are_those_of_the_device_and_the_host_waits_for_no_later_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    first, second = StepClock(GPU), StepClock(GPU)
    for clock in (first, second):
        for section, seconds in (
            ("data", 0.5),
            ("forward", 1),
            ("backward", 2),
            ("forward", 1),
            ("backward", 2),
        ):
            clock.enter(section)
            device.work(seconds)
        clock.enter("log")
        clock.enter("optimizer")
        device.work(0.25)
        clock.end()
    assert device.reached == 0
    with first.completed():
        assert device.stream == "beside"  # reads of the device are not queued behind the second step
        assert dict(zip(SECTIONS, first.seconds(), strict=True)) == {
            "data": 0.5,
            "forward": 2,
            "backward": 4,
            "log": 0,
            "optimizer": 0.25,
        }
    assert device.reached == 6.75


def test_sections_on_a_cpu_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 2.5, 4.5, 4.75, 5.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    for section in SECTIONS:
        clock.enter(section)
    clock.end()
    with clock.completed():
        assert clock.seconds() == [0.5, 1, 2, 0.25, 0.25]


def test_batches_are_pinned_by_the_thread_that_makes_them(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, _ = source_of(tree, nsp=True)
    threads: dict[int, str] = {}

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        threads[copy.data_ptr()] = threading.current_thread().name
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    (data,) = source.steps(BatchPlan(1, 12, 1, 5, 12, 0), 0, 0, pin=True)
    assert len(data.micro_batches) == 3
    for micro in data.micro_batches:
        tensors = [x for x in (*vars(micro).values(), micro.documents.offsets) if isinstance(x, torch.Tensor)]
        assert len(tensors) == 7
        assert {threads[x.data_ptr()].split("_")[0] for x in tensors} == {"batches"}


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
    here = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: here)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: seen.update(current=index))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: seen.update(options, backend=backend)
    )
    monkeypatch.setattr(dist, "new_group", lambda **options: mock.Mock(group_name="control"))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
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
    assert (seen["current"], seen["device_id"]) == (device.index, device)
    assert seen["backend"] == "cpu:gloo,cuda:nccl"
