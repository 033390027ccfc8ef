"""Values of the host on their way to a device."""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.core import host_values
from sharded_lamb.core.host_values import as_tensor, to_device

GPU = torch.device("cuda", 0)


def test_a_copy_inside_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would copy from host memory that is freed and used again, a learning rate say."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        to_device([1.0], torch.float64, GPU)
    assert to_device([1.0], torch.float64, torch.device("cpu")).tolist() == [1.0]


def test_tensors_stay_where_they_are() -> None:
    meta = torch.empty(3, device="meta")
    assert as_tensor(meta) is meta
    assert as_tensor(2.5).item() == 2.5


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_like_the_last_copies_nothing_from_the_host(stage: int) -> None:
    """So it can be captured; a changed learning rate is one copy."""
    copies: list[object] = []

    def counted(values: object, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        copies.append(values)
        return host_values.to_device(values, dtype, device)

    users = [module for name, module in sys.modules.items() if name.startswith("sharded_lamb.")]
    with contextlib.ExitStack() as patches:
        for module in users:
            if getattr(module, "to_device", None) is to_device and module is not host_values:
                patches.enter_context(mock.patch.object(module, "to_device", counted))
        model = nn.Linear(5, 3)
        optimizer = ShardedLamb(model.named_parameters(), lr=0.01, stage=stage, max_grad_norm=1.0)
        counts = []
        for lr in (0.01, 0.01, 0.01, 0.005):
            optimizer.param_groups[0]["lr"] = lr
            model(torch.ones(2, 5)).sum().backward()
            copies.clear()
            optimizer.step()
            counts.append(len(copies))
            optimizer.zero_grad()
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 1]
