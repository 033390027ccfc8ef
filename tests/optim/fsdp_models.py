"""Models under fully_shard and tensor parallel, and runs of them that an oracle can follow.

`Tree` is linear in its parameters, so the gradients that `fully_shard` averages are known before the run. For other
models the oracle gets the averaged gradients, read whole from ``.grad`` before each step (they rely on torch).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from tests import training

# fully_shard takes no 0-dim and no zero-size parameters. Uneven over 2, 3 and 4; empty on some ranks.
SHAPES: dict[str, training.Shape] = {
    "embed.weight": (67, 31),
    "norm.weight": (17,),
    "norm.bias": (17,),
    "fc.weight": (37, 23),
    "fc.bias": (1,),
    "scale": (2,),
}


def gradients(rank: int, step: int, shapes: Mapping[str, training.Shape] = SHAPES) -> dict[str, Tensor]:
    """Multiples of 1/64, so that sums over ranks are exact."""
    return {
        name: (training.draw(shape, "tree", name, rank, step) * 64).round() / 64
        for name, shape in shapes.items()
    }


class Leaf(nn.Module):
    """Parameters, and a loss that is linear in them."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, Parameter(value))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        terms = [(p * gradients[name].to(p.dtype)).sum() for name, p in self.named_parameters(recurse=False)]
        return torch.stack([term.float() for term in terms]).sum()


class Tree(Leaf):
    """One leaf per prefix of the names; parameters without a prefix belong to the root."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__({name: value for name, value in params.items() if "." not in name})
        for prefix in dict.fromkeys(name.split(".")[0] for name in params if "." in name):
            own = {name.split(".")[1]: v for name, v in params.items() if name.startswith(f"{prefix}.")}
            self.add_module(prefix, Leaf(own))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        total = super().forward(gradients) if list(self.named_parameters(recurse=False)) else torch.zeros(())
        for prefix, leaf in self.named_children():
            total = total + leaf(
                {n.split(".")[1]: g for n, g in gradients.items() if n.startswith(f"{prefix}.")}
            )
        return total


def sharded_tree(
    mesh: DeviceMesh, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **options: Any
) -> Tree:
    tree = Tree({name: value.to(dtype) for name, value in training.weights(shapes).items()})
    for leaf in tree.children():
        fully_shard(leaf, mesh=mesh, **options)
    fully_shard(tree, mesh=mesh, **options)
    return tree


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[:3], "weight_decay": 0.2}, {"params": named[3:], "lr": 0.01}]


GROUPED: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 5.0}


def overrides(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The options of `two_groups`, in the oracle's format."""
    return {name: {"weight_decay": 0.2} if i < 3 else {"lr": 0.01} for i, name in enumerate(names)}


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor. Collective for DTensors."""
    value = tensor.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


@dataclass
class Run:
    """One rank's record. ``gradients``: whole and averaged, per step."""

    start: dict[str, Tensor]
    gradients: list[dict[str, Tensor | None]]
    weights: dict[str, Tensor]
    masters: dict[str, Tensor]  # whole, on the first rank
    ratios: list[dict[str, float]]
    grad_norms: list[float | None]
    placements: dict[str, str]
    local_sizes: dict[str, int]
    memory: dict[str, int]
    calls: dict[str, int]


def read_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else whole(p.grad).double() for name, p in model.named_parameters()}


def train(
    model: nn.Module,
    opt: ShardedLamb,
    loss: Callable[[int], Tensor],
    steps: int,
    before_step: Callable[[], None] = lambda: None,
) -> Run:
    """Train on ``loss(step)``, this rank's own loss, and record."""
    params = dict(model.named_parameters())
    run = Run(whole_weights(model), [], {}, {}, [], [], {}, {}, {}, {})
    for step in range(steps):
        loss(step).backward()
        run.gradients.append(read_gradients(model))
        before_step()
        opt.step()
        opt.zero_grad()
        run.ratios.append(opt.trust_ratios())
        run.grad_norms.append(opt.grad_norm)
    run.weights = whole_weights(model)
    full = opt.full_state_dict()
    if full is not None:
        run.masters = {
            name: full["state"][i]["master"]
            for i, name in enumerate(params)
            if "master" in full["state"].get(i, {})
        }
    run.placements = {
        name: repr(p.placements) if isinstance(p, DTensor) else "" for name, p in params.items()
    }
    run.local_sizes = {
        name: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for name, p in params.items()
    }
    run.memory, run.calls = opt.memory(), dict(opt.traffic.calls)
    return run


def check(runs: list[Run], tolerance: float = 2e-6, **oracle_options: Any) -> None:
    """Compare weights, ratios and norms of all steps with the fp64 oracle on the run's gradients, and ranks bitwise."""
    first = runs[0]
    oracle = training.oracle_run(first.start, [], **oracle_options)
    for step, grads in enumerate(first.gradients):
        oracle.step({name: None if g is None else g.numpy() for name, g in grads.items()})
        assert first.ratios[step].keys() == oracle.ratios.keys()
        for name, ratio in oracle.ratios.items():
            actual = first.ratios[step][name]
            assert abs(actual - ratio) <= 1e-5 * ratio, (
                f"step {step}: ratio of {name} is {actual}, not {ratio}"
            )
        norm = first.grad_norms[step]
        assert norm is not None
        assert abs(norm - oracle.grad_norm) <= 1e-5 * oracle.grad_norm
    training.assert_follows(first.masters or first.weights, oracle, tolerance)
    for other in runs[1:]:
        training.assert_same_bits(other.weights, first.weights)
        assert other.ratios == first.ratios
        assert other.grad_norms == first.grad_norms


# -- a model with tensor parallel -----------------------------------------------------------------------------


class Block(nn.Module):
    """Linear → LayerNorm → Colwise → Rowwise; only the size 12 divides evenly over tensor-parallel ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(self.first(x)))))


def block() -> Block:
    torch.manual_seed(11)
    return Block()


def inputs(rank: int, step: int) -> Tensor:
    return training.draw((6, 7), "inputs", rank, step)


TP_PLAN: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def parallel_block(mesh: DeviceMesh, dp: str | tuple[str, ...] | None, tp: str | None) -> Block:
    """``dp``: the axes that fully_shard gets; ``tp``: the axis of Colwise and Rowwise."""
    model = block()
    if tp is not None:
        parallelize_module(model, mesh[tp], TP_PLAN)
    if dp is not None:
        fully_shard(model.up, mesh=mesh[dp])
        fully_shard(model, mesh=mesh[dp])
    return model


def named_mesh(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
