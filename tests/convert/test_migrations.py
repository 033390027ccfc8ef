"""The migration pages: the programs before and after each diff, run on two ranks against a float64 LAMB."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.bench import peers
from tests import training
from tests.convert import cases
from tests.harness import run_ranks
from tests.oracle import OracleLamb, variant_options

FOLDER = Path(__file__).resolve().parents[2] / "sharded_lamb/convert/migrations"
EXCLUDED = ["dense.bias", "LayerNorm.weight", "LayerNorm.bias"]
SHAPES: dict[str, training.Shape] = {
    "dense.weight": (37, 23),
    "dense.bias": (37,),
    "LayerNorm.weight": (17,),
    "LayerNorm.bias": (17,),
}
# The variant that each page names, and the options that it sets beside it.
PROMISED: dict[str, tuple[str, dict[str, Any]]] = {
    "apex": ("apex", {"lr": 6e-3}),
    "timm": ("timm", {"lr": 2e-3}),
    "deepspeed": ("deepspeed", {"lr": 2e-3, "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}),
    "zero_redundancy_optimizer": ("adamw", {"lr": 1e-3, "eps": 1e-8}),
    "tensorflow": (
        "paper_v3",
        {"lr": 2e-3, "max_grad_norm": 1.0, "no_decay": EXCLUDED, "no_adapt": EXCLUDED},
    ),
}
STEPS = 4


def program(page: str, sign: str) -> str:
    """The program before ("-") or after ("+") the page's diff."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (FOLDER / f"{page}.md").read_text(), flags=re.DOTALL)
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


def net() -> nn.ModuleDict:
    model = nn.ModuleDict({"dense": nn.Linear(23, 37), "LayerNorm": nn.LayerNorm(17)})
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(training.draw(tuple(p.shape), "weight", name))
    return model


def own_gradients(rank: int, step: int) -> dict[str, Tensor | None]:
    """Drawn; one parameter's are so small that eps shows."""
    drawn = training.own_gradients(rank, step, SHAPES)
    small = drawn["LayerNorm.bias"]
    assert small is not None
    return {**drawn, "LayerNorm.bias": small * 1e-4}


def give_gradients(model: nn.Module, rank: int, step: int, own: bool) -> None:
    """This rank's own gradients, by backward; or the average over two ranks, as DDP leaves it."""
    per_rank = [own_gradients(other, step) for other in range(2)]
    if own:
        pairs = [(p, per_rank[rank][name]) for name, p in model.named_parameters()]
        torch.stack([(p * g).sum() for p, g in pairs if g is not None]).sum().backward()  # type: ignore[no-untyped-call]
        return
    averaged = training.average(per_rank)
    for name, p in model.named_parameters():
        gradient = averaged[name]
        p.grad = None if gradient is None else gradient.to(p.dtype)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run_program(rank: int, text: str, saved: str | None = None) -> dict[str, Tensor]:
    model = net()
    space: dict[str, Any] = {"model": model, "torch": torch}
    timm = ModuleType("timm.optim")  # `import timm` needs torchvision
    timm.Lamb = peers.timm_lamb()  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"timm": ModuleType("timm"), "timm.optim": timm}):
        exec(compile(text, "migration", "exec"), space)
    optimizer = space["optimizer"]
    for step in range(STEPS):
        if saved and step == STEPS - 1:
            optimizer.consolidate_state_dict()
            if rank == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        optimizer.zero_grad()
        give_gradients(model, rank, step, own="stage=2" in text)
        optimizer.step()
    if isinstance(optimizer, ShardedLamb):
        optimizer.close()
    return values(model)


def promised(page: str) -> dict[str, Tensor]:
    variant, options = PROMISED[page]
    facts = variant_options(variant, list(SHAPES), options.get("no_decay", ()), options.get("no_adapt")) | {
        name: value for name, value in options.items() if name not in ("no_decay", "no_adapt")
    }
    oracle = OracleLamb({name: p.numpy() for name, p in values(net()).items()}, **facts)
    for step in range(STEPS):
        averaged = training.average(own_gradients(rank, step) for rank in range(2))
        oracle.step({name: None if g is None else g.numpy() for name, g in averaged.items()})
    return {name: torch.from_numpy(value) for name, value in oracle.params.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, start in values(net()).items():
        assert not torch.equal(actual[name], start), f"{name} has not moved"
        torch.testing.assert_close(actual[name].double(), expected[name].double(), rtol=2e-6, atol=2e-7)


def test_every_page_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted(PROMISED)
    assert all(len(path.read_text().splitlines()) <= 40 for path in FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PROMISED)
def test_the_program_after_the_diff_is_the_promised_lamb(page: str) -> None:
    expected = promised(page)
    for actual in run_ranks(2, run_program, program(page, "+")):
        assert_close(actual, expected)


@pytest.mark.parametrize("page", ["timm", "zero_redundancy_optimizer"])
def test_the_program_before_it_trains_alike(page: str) -> None:
    expected = promised(page)
    for actual in run_ranks(2, run_program, program(page, "-")):
        assert_close(actual, expected)


def test_a_consolidated_file_of_zero_redundancy_optimizer_is_converted(tmp_path: Path) -> None:
    end, _ = run_ranks(2, run_program, program("zero_redundancy_optimizer", "-"), str(tmp_path / "zero.pt"))
    cases.convert(tmp_path / "zero.pt", tmp_path / "ours", "adam", "sharded_lamb")
    model = net()
    optimizer = Lamb(model.named_parameters(), lr=9.0, variant="deepspeed")  # the file's options win
    checkpoint.load(tmp_path / "ours", model, optimizer)
    give_gradients(model, 0, STEPS - 1, own=False)
    optimizer.step()
    assert_close(values(model), end)
