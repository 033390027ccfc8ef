"""A rank's device on machines with and without an accelerator, which this one plays."""

from unittest import mock

import pytest
import torch

from sharded_lamb.comm import devices


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """The third rank of a machine with accelerators of the type xpu."""
    accelerator = mock.Mock(wraps=torch.accelerator)
    accelerator.current_accelerator.side_effect = lambda check_available: torch.device("xpu")
    accelerator.set_device_index.side_effect = lambda index: None
    accelerator.synchronize.side_effect = lambda device: None
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setenv("LOCAL_RANK", "2")
    return accelerator


def test_a_rank_takes_the_accelerator_of_its_number(xpu: mock.Mock) -> None:
    for kind in (None, "xpu"):
        assert devices.of_this_rank(kind) == torch.device("xpu", 2)
    assert xpu.set_device_index.call_args_list == [mock.call(2)] * 2
    assert devices.backends(torch.device("xpu", 2)) == "cpu:gloo,xpu:xccl"
    assert devices.backends(torch.device("cuda", 2)) == "cpu:gloo,cuda:nccl"
    devices.synchronize(torch.device("xpu", 2))
    xpu.synchronize.assert_called_once_with(torch.device("xpu", 2))


def test_a_rank_may_take_the_cpu(xpu: mock.Mock) -> None:
    assert devices.of_this_rank("cpu") == torch.device("cpu")
    assert devices.backends(torch.device("cpu")) == "gloo"
    devices.synchronize(torch.device("cpu"))
    assert not xpu.set_device_index.called
    assert not xpu.synchronize.called


def test_a_device_that_the_machine_lacks_is_refused(xpu: mock.Mock) -> None:
    with pytest.raises(ValueError, match="--device cuda: expected cpu or xpu on this machine"):
        devices.of_this_rank("cuda")


def test_without_an_accelerator_a_rank_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert devices.of_this_rank() == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: expected cpu on this machine"):
        devices.of_this_rank("cuda")
