"""Memory for the two passes in every form, the results of a backend on it, and an optimizer with a given backend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb, kernels
from sharded_lamb.core import rule
from sharded_lamb.core.layout import BLOCK, round_up
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import FlatShard, Kernel, ScatteredShard, Shard, formats, remainders
from sharded_lamb.kernels.block_codes import BlockFormat

SPLIT, SPLIT8 = remainders.STORAGE[16], remainders.STORAGE[8]
CODES = BlockFormat.storage
WRAPPING = {SPLIT: 2**14, SPLIT8: 2**6}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
F32 = (torch.float32, None, torch.float32, torch.float32, torch.float32)
KINDS = ("weight", "model", "grad", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Form:
    """A shard to construct. ``gap``: elements between pieces, for unaligned addresses; a flat shard has none.

    ``weight`` SPLIT, SPLIT8: remainders beside a bfloat16 ``model``.
    """

    flat: bool
    lengths: tuple[int, ...]
    weight: torch.dtype
    model: torch.dtype | None
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    gap: int = 0
    written: int = 0  # elements of each piece that the user wrote into the model

    @property
    def compute(self) -> torch.dtype:
        return torch.promote_types(self.weight, torch.float32)


def coded(kind: str, values: Tensor) -> Tensor:
    """Memory of 8-bit moments, the nearest to ``values``. kind: "exp_avg" or "exp_avg_sq"."""
    return formats.of_moment(kind, CODES).encode(values)[0]


def made(form: Form, first_param: int, seed: int, bad: bool, device: str = "cpu") -> Shard:
    """A shard with one parameter per piece, from ``first_param`` on. ``bad``: nan gradients in every other one."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = {kind: getattr(form, kind) for kind in KINDS}
    if form.flat:
        dtypes["grad"] = form.compute
    slices, at = [], form.gap
    for length in form.lengths:
        slices.append(slice(at, at + length))
        at += round_up(length, BLOCK) if form.flat else length + form.gap
    memory: dict[str, Tensor] = {}
    for kind, dtype in dtypes.items():
        if dtype is None:
            continue
        memory[kind] = torch.zeros(at, dtype=torch.float32 if dtype == CODES else dtype)
        for piece in slices:
            value = torch.randn(piece.stop - piece.start, generator=generator)
            value = value * WRAPPING.get(dtype, 1)  # some wrap around, to any number
            memory[kind][piece] = (value.abs() if kind == "exp_avg_sq" else value).to(memory[kind].dtype)
    for index, piece in enumerate(slices):
        if "model" in memory:
            if form.weight not in WRAPPING:
                memory["model"][piece] = memory["weight"][piece].to(memory["model"].dtype)
            memory["model"][piece][: form.written] += 1
        if bad and index % 2:
            memory["grad"][piece] = torch.nan
    memory = {kind: x.to(device) for kind, x in memory.items()}
    if not form.flat:
        pieces = {
            kind: [coded(kind, x[piece]) if dtypes[kind] == CODES else x[piece] for piece in slices]
            for kind, x in memory.items()
        }
        return ScatteredShard(tuple(range(first_param, first_param + len(slices))), **pieces)
    memory = {kind: coded(kind, x) if dtypes[kind] == CODES else x for kind, x in memory.items()}
    blocks = torch.tensor([round_up(length, BLOCK) // BLOCK for length in form.lengths])
    owners = torch.arange(first_param, first_param + len(slices)).repeat_interleave(blocks)
    return FlatShard(**{"model": None, **memory}, block_param=owners.to(device))


def in_whole_gradients(shard: ScatteredShard) -> ScatteredShard:
    """The same pieces, with each gradient inside a larger one: a vector, a matrix, or a transposed matrix."""
    grads, starts = [], []
    for index, grad in enumerate(shard.grad):
        start, numel = 3 * index, 2 * (3 * index + len(grad))
        whole = torch.full((numel,), torch.nan, dtype=grad.dtype, device=grad.device)
        whole[start : start + len(grad)] = grad
        grads.append((whole, whole.view(2, -1), whole.view(2, -1).t())[index % 3])
        starts.append(start)
    return replace(shard, grad=grads, grad_starts=starts)


def table_of(count: int, dtype: torch.dtype, bad: bool, device: str = "cpu") -> Tensor:
    rows = (
        torch.rand(count, len(COLUMNS), generator=torch.Generator().manual_seed(count)).double() * 0.5 + 0.25
    )
    if bad:
        rows[1::2, COLUMNS.index("grad_scale")] = 0
    return rule.table(rule.Coefficients(*rows.unbind(1)), dtype).to(device)


def contents(shard: Shard) -> dict[str, Tensor]:
    tensors = {kind: getattr(shard, kind) for kind in KINDS if getattr(shard, kind) is not None}
    return {
        kind: x.cpu() if isinstance(x, Tensor) else torch.cat([piece.cpu() for piece in x])
        for kind, x in tensors.items()
        if isinstance(x, Tensor) or len(x)
    }


def passes(kernel: Kernel, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor, number: int) -> Tensor:
    """Both passes, and their sums. The update ``number``, modulo 4: LAMB, Nesterov's momentum, caution, or LARS."""
    rows, directions = ((2, 1), (3, 2), (4, 1), (1, 2))[number % 4]
    sums = torch.zeros(rows, len(table), dtype=torch.float64, device=table.device)
    if rows == 1:
        with_one_moment = [replace(shard, exp_avg_sq=None) for shard in shards]
        kernel.weight_norms(with_one_moment, sums[0])
        kernel.apply_momentum(with_one_moment, table, step_sizes)
    else:
        kernel.moments_and_norms(shards, table, sums)
        kernel.apply(shards, table, step_sizes[:directions], caution=rows == 4)
    return sums


def stepped(
    kernel: Kernel,
    forms: Sequence[Form],
    seed: int,
    bad: bool,
    device: str = "cpu",
    steps: int = 2,
    update: int | None = None,
) -> list[Tensor]:
    """All sums and memory after each of several steps of both passes. ``update``: see `passes`."""
    shards, count = [], 0
    for i, form in enumerate(forms):
        shards.append(made(form, count, seed + i, bad, device))
        count += len(form.lengths)
    compute = forms[0].compute
    table = table_of(count, compute, bad, device)
    sizes = torch.linspace(0.1, 0.9, count, dtype=compute, device=device)
    results: list[Tensor] = []
    for _ in range(steps):
        square_sums = torch.full((count,), 3.0, dtype=torch.float64, device=device)
        if not bad:
            kernel.square_sums(shards, square_sums)
        sums = passes(
            kernel, shards, table, torch.stack([sizes, 1 - sizes]), seed if update is None else update
        )
        results += [
            square_sums.cpu(),
            sums.cpu(),
            *(x.clone() for shard in shards for x in contents(shard).values()),
        ]
    return results


def both_passes(kernel: Kernel, shards: Sequence[Shard], count: int) -> None:
    table = table_of(count, torch.float32, False)
    kernel.square_sums(shards, torch.zeros(count, dtype=torch.float64))
    kernel.moments_and_norms(shards, table, torch.zeros(2, count, dtype=torch.float64))
    kernel.apply(shards, table, torch.ones(count)[None])


def assert_subnormal_moments_become_zero(kernel: Kernel, dtype: torch.dtype, update: int, step: int) -> None:
    """Moments on both sides of the smallest normal number, infinite and nan, after a step without gradients, beside
    numpy's: subnormal ones count as 0 at every 64th step. ``update``: see `passes`.
    """
    limits = np.finfo(np.float32 if dtype == torch.float32 else np.float64)
    tiny = limits.smallest_normal
    near = tiny * np.array([0.5, 1 - limits.eps, 1, 1 + limits.eps, 1.11, 1.12, 2, 2.5, 1e3], limits.dtype)
    few = np.arange(600, dtype=limits.dtype) * limits.smallest_subnormal
    values = np.concatenate([few, near, np.array([1e-3, 1, np.inf, np.nan], limits.dtype)])
    values = np.concatenate([values, -values])
    ones, beta1, beta2 = torch.ones(len(values), dtype=dtype), 0.9, 0.5
    row = {
        "grad_scale": 1.0,
        "beta1": beta1,
        "beta2": beta2,
        "c1": 0.1,
        "c2": 0.5,
        "eps_outside": 1e-6,
        "salt": step,
    }
    table = torch.tensor([[row.get(column, 0.0) for column in COLUMNS]], dtype=dtype)
    moments = [torch.from_numpy(values.copy()), torch.from_numpy(np.abs(values))]
    pieces = [[x] for x in (ones, torch.zeros_like(ones), *moments)]
    shard = ScatteredShard(
        (0,), **dict(zip(("weight", "grad", "exp_avg", "exp_avg_sq"), pieces, strict=True))
    )
    passes(kernel, [shard], table, torch.zeros(2, 1, dtype=dtype), update)
    both = [*zip(moments, (values, np.abs(values)), (beta1, beta2), strict=True)]
    for moment, before, beta in both[:1] if update % 4 == 3 else both:  # LARS has one moment
        is_subnormal = np.abs(before) < tiny
        assert is_subnormal.sum() > 1000
        expected = np.where(is_subnormal & (step % 64 == 0), 0, before) * limits.dtype.type(beta)
        np.testing.assert_array_equal(moment.numpy(), expected)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y) or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), (
            f"result {i}: {(x != y).sum()} of {x.numel()} differ"
        )


def optimizer_with(kernel: Kernel, model: nn.Module, **options: Any) -> ShardedLamb:
    with mock.patch.object(kernels, "choose", return_value=kernel):
        return ShardedLamb(model.named_parameters(), **options)


def trained(kernel: Kernel, dtype: torch.dtype, device: str = "cpu", **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(19, 31), nn.LayerNorm(31), nn.Linear(31, 1)).to(device, dtype)
    optimizer = optimizer_with(kernel, model, lr=0.05, weight_decay=0.1, bucket_mb=0.001, **options)
    for step in range(3):
        optimizer.zero_grad()
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * step + i)
            grad = torch.randn(p.shape, generator=generator)
            if step == 1 and i == 0:
                grad[0, 0] = torch.nan  # a skipped step
            p.grad = grad.to(device, dtype)
        with torch.no_grad():
            model[2].bias.add_(1)  # written by the user
        optimizer.step()
    assert optimizer.skipped_steps == 1
    state = optimizer.full_state_dict()["state"]
    moments = [value for row in state.values() for value in row.values() if isinstance(value, Tensor)]
    ratios = torch.tensor(list(optimizer.trust_ratios().values()), dtype=torch.float64)
    return [*(p.detach().cpu() for p in model.parameters()), *moments, ratios]
