"""Programs that call ``torch.set_default_device`` or ``set_default_dtype``: this package's own tensors do not go there.

The default device is "meta" here, where a tensor has no values: one that is made without a device fails at its first
use.
"""

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharded_lamb
from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.checkpoint import async_save, load, save
from tests.harness import run_ranks

PACKAGE = Path(sharded_lamb.__file__).parent
MAKERS = {"tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "randperm", "eye"}
MAKERS |= {"linspace", "as_tensor", "scalar_tensor", "empty_strided"}


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 300), nn.LayerNorm(300), nn.Linear(300, 2)).to("cpu")


def gradients(model: nn.Module, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(p.shape, generator=generator, device="cpu") for p in model.parameters()]


def train(model: nn.Module, optimizer: Any, drawn: list[Tensor], steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([(p * g).sum() for p, g in zip(model.parameters(), drawn, strict=True)]).sum().backward()
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()


def trained(rank: int, name: str, kind: str, folder: str) -> list[Tensor]:
    """Weights after steps, a checkpoint, its loading by another optimizer, and more steps."""
    with torch.device("cpu"):
        models = make_model(), make_model()
        drawn = gradients(models[0], rank if kind == "stage 2" else 0)  # stage 1 gets averages
    options: dict[str, Any] = {"lr": 0.01, "max_grad_norm": 1.0, "exclude_from_weight_decay": ["bias$"]}
    with default_device(name):
        if kind == "Lamb":
            optimizers = [Lamb(model.named_parameters(), **options) for model in models]
        else:
            stage = int(kind[-1])
            optimizers = [ShardedLamb(m.named_parameters(), stage=stage, **options) for m in models]
        train(models[0], optimizers[0], drawn)
        if kind == "Lamb":
            optimizers[1].load_state_dict(optimizers[0].state_dict())
            models[1].load_state_dict(models[0].state_dict())
        else:
            save(folder, models[0], optimizers[0])
            async_save(f"{folder}/later", models[0], optimizers[0]).result()
            load(folder, models[1], optimizers[1])
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        optimizers[1].param_groups[0]["lr"] = 0.003
        train(models[1], optimizers[1], drawn)
    return [p.detach().clone() for p in models[1].parameters()]


@pytest.mark.parametrize(("kind", "ranks"), [("Lamb", 1), ("stage 1", 2), ("stage 2", 2), ("stage 2", 1)])
def test_training_does_not_depend_on_the_default_device(kind: str, ranks: int, tmp_path: Path) -> None:
    for rank, (actual, expected) in enumerate(
        zip(
            run_ranks(ranks, trained, "meta", kind, str(tmp_path / "meta")),
            run_ranks(ranks, trained, "cpu", kind, str(tmp_path / "cpu")),
            strict=True,
        )
    ):
        assert all(map(torch.equal, actual, expected)), rank


def makes_tensors_somewhere(source: str) -> list[str]:
    """Calls that make a tensor on the default device."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
        and not any(keyword.arg in {"device", None} for keyword in call.keywords)
    ]


def test_every_tensor_is_made_on_a_device() -> None:
    found = {path.name: makes_tensors_somewhere(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert not {name: calls for name, calls in found.items() if calls}
    assert makes_tensors_somewhere("x = torch.zeros(3)\ny = torch.zeros(3, device=d)") == [
        "1: torch.zeros(3)"
    ]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained_under(dtype: torch.dtype, kernel: str, **options: Any) -> list[Tensor]:
    model = make_model()
    optimizer = ShardedLamb(model.named_parameters(), lr=1e-2, stage=2, kernel=kernel, **options)
    with default_dtype(dtype):
        for step in range(3):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(5, 7, generator=generator, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduce_dtype": torch.float8_e4m3fn},
        {"reduce_dtype": torch.bfloat16, "gather_dtype": torch.bfloat16},
        {"gather_dtype": torch.float8_e4m3fn, "state_dtype": torch.bfloat16},
        {"state_dtype": torch.int8, "ema_decay": 0.9, "max_grad_norm": 0.1},
        {"variant": "lans"},
        {"caution": True},
    ],
    ids=str,
)
def test_the_default_dtype_changes_no_bit(options: dict[str, Any], kernel: str) -> None:
    expected = trained_under(torch.float32, kernel, **options)
    for dtype in (torch.float64, torch.float16):
        for actual, wanted in zip(trained_under(dtype, kernel, **options), expected, strict=True):
            assert torch.equal(actual, wanted), dtype
