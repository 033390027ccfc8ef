"""A model, steps on gradients drawn by parameter name, and the command line run in this process."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, checkpoint
from sharded_lamb.__main__ import main
from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint, read_contents
from tests import training

LAMB: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
PATTERNS = ["bias$", "norm"]


class Net(nn.Module):
    """Tied weights, float and integer buffers, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.embed = nn.Embedding(29, 40)
        self.norm = nn.BatchNorm1d(40)
        self.fc = nn.Linear(40, 6)
        self.head = nn.Linear(40, 29)
        self.head.weight = self.embed.weight


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(training.draw(tuple(p.shape), "weight", name, seed))
        model.norm.running_mean.normal_()
    return model


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> None:
    """Steps on gradients that are bfloat16 numbers, hence equal for models of every dtype."""
    for step in steps:
        for name, p in model.named_parameters():
            drawn = training.draw(tuple(p.shape), "gradient", name, step)
            p.grad = drawn.to(torch.bfloat16).to(p.dtype)
        optimizer.step()


def trained(steps: int = 4, **options: Any) -> tuple[Net, Lamb]:
    model = net()
    optimizer = Lamb(model.named_parameters(), **{**LAMB, **options})
    train(model, optimizer, range(steps))
    return model, optimizer


def saved(path: Path, model: nn.Module, optimizer: Any, **extra: Any) -> Path:
    checkpoint.save(path, model, optimizer, extra or None)
    return path


def params(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6
) -> None:
    """Compares the norm of the difference with the expected norm."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        other = expected[name].double()
        error = (value.double() - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name} is {error:.2e} off"


def assert_moved(actual: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """Asserts that every parameter moved by far more than the tolerance of `assert_close`."""
    for name, value in actual.items():
        assert (value - start[name]).norm() > 1e-3 * start[name].norm(), name


def convert(source: Path | str, target: Path, form: str, to: str, *options: str) -> None:
    code = main(["convert", str(source), str(target), "--from", form, "--to", to, *options])
    assert code == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Asserts that the command exits with 2; returns its error message."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def load_file(path: Path) -> dict[str, Any]:
    file: dict[str, Any] = torch.load(path, weights_only=True)
    return file


def groups_of(model: nn.Module, names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    own = dict(model.named_parameters())
    return [{"params": [own[name] for name in group]} for group in names]


def same_contents(actual: InMemoryCheckpoint, expected: InMemoryCheckpoint, *, groups: bool = True) -> None:
    """Asserts bitwise equality."""
    training.assert_same_bits(actual.weights, expected.weights)
    assert all(value.dtype == expected.weights[name].dtype for name, value in actual.weights.items())
    assert actual.states.keys() == expected.states.keys()
    for name, state in actual.states.items():
        training.assert_same_bits(state, expected.states[name])
    assert actual.aliases == expected.aliases
    if groups:
        assert actual.groups == expected.groups
        assert actual.optimizer == expected.optimizer


def through(
    folder: Path, form: str, start: Path, capsys: pytest.CaptureFixture[str] | None = None
) -> tuple[InMemoryCheckpoint, str]:
    """Converts a checkpoint to a format and back; returns the result and the notes on the way there."""
    convert(start, folder / form, "sharded_lamb", form)
    said = capsys.readouterr().out if capsys else ""
    convert(folder / form, folder / "back", form, "sharded_lamb", "--force")
    return read_contents(folder / "back"), said


def continued(
    path: Path, make: Callable[[Net], Any], steps: range = range(4, 9), dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns weights as loaded from a file {model, optimizer}, and after more steps of another optimizer."""
    file, model = load_file(path), net(seed=9).to(dtype)
    model.load_state_dict(file["model"])
    optimizer = make(model)
    optimizer.load_state_dict(file["optimizer"])
    start = params(model)
    train(model, optimizer, steps)
    return start, params(model)
