"""Checks of what the package claims, on the device: exactness, equal bits, and state that survives."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb, checkpoint, kernels, shapes
from sharded_lamb.core import rule
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.gpu_check.battery import Findings, LeftOut, Section, Setting
from sharded_lamb.gpu_check.training import (
    CPU,
    STAGES,
    GivenRun,
    group_of_one,
    name_of,
    recorded_warnings,
    result_of,
)
from sharded_lamb.kernels import FlatShard, remainders
from sharded_lamb.verify import verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def verified(setting: Setting, found: Findings) -> str:
    """Stages x dtypes against a single-process fp64 LAMB, on awkward shapes."""
    for stage in STAGES:
        for dtype in DTYPES:
            report = verify(
                shapes.load("tiny"),
                steps=6 if setting.on_gpu else 2,
                stage=stage,
                dtype=dtype,
                device=setting.device,
            )
            text = "; ".join(report.problems[:3]) or "within tolerance"
            found.check(f"stage {stage} {name_of(dtype)}", report.passed, text)
    return "within tolerance of fp64 in stages 1 and 2, fp32, bf16 and fp16"


def bits(setting: Setting, found: Findings) -> str:
    """The setting's kernel, and stock operations on its device, against stock operations on the CPU."""
    for stage in STAGES:
        runs = {
            "fp32": GivenRun(stage),
            "bf16": GivenRun(stage, torch.bfloat16),
            "bf16, 16-bit remainders": GivenRun(stage, torch.bfloat16, remainders=16),
            "bf16, 8-bit remainders": GivenRun(stage, torch.bfloat16, remainders=8),
            "fp32, gathered in 8 bits": GivenRun(stage, gather_dtype=torch.float8_e4m3fn),
            "bf16 moments": GivenRun(stage, state_dtype=torch.bfloat16),
            "8-bit moments": GivenRun(stage, torch.bfloat16, remainders=8, state_dtype=torch.int8),
            "LANS": GivenRun(stage, variant="lans"),
            "caution": GivenRun(stage, rule={"caution": True}),
            "LARS": GivenRun(stage, torch.bfloat16, variant="lars", rule={"nesterov": True}),
        }
        if stage == 2:
            runs["fp32, reduced in 8 bits"] = GivenRun(stage, reduce_dtype=torch.float8_e4m3fn)
        for kind, run in runs.items():
            expected, name = run.trained(CPU, "torch"), f"stage {stage} {kind}"
            found.equal(f"{name}: {setting.kernel}", run.trained(setting.device, setting.kernel), expected)
            if setting.on_gpu:
                found.equal(f"{name}: stock operations", run.trained(setting.device, "torch"), expected)
    return f"{setting.kernel} on {setting.device.type} and stock operations on the CPU: equal to the bit"


def nccl(setting: Setting, found: Findings) -> str:
    """Every collective on a group of one rank changes nothing."""
    calls: set[str] = set()
    for stage in STAGES:
        run = GivenRun(stage, micro_batches=2)
        alone = run.trained(setting.device, setting.kernel)
        with group_of_one(setting):
            model, optimizer = run.run(setting.device, setting.kernel)
            found.equal(f"stage {stage}", result_of(model, optimizer), alone)
            calls |= set(optimizer.traffic.calls)
            optimizer.close()
    expected = {"all_gather", "all_reduce_small", "reduce_scatter"}
    found.check("collectives", calls >= expected, ", ".join(sorted(calls)))
    return f"{', '.join(sorted(calls))} on one rank: equal to the bit to a run without a group"


def side_stream(setting: Setting, found: Findings) -> str:
    """Stage 2 on another stream than the constructor's: gradients and hooks meet on two streams."""
    run = GivenRun(2, width=3000, micro_batches=3, steps=6)
    expected = run.trained(setting.device, setting.kernel)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with recorded_warnings() as recorded:
        ours = run.trained(setting.device, setting.kernel, stream)
    found.equal("constructed on the default stream", ours, expected)
    found.note("AccumulateGrad warnings", sum("AccumulateGrad" in str(w.message) for w in recorded))
    return "equal to the bit to a run on one stream"


def accumulation(setting: Setting, found: Findings) -> str:
    """Three micro-batches a step, two of them under ``no_sync``."""
    results = []
    for stage in STAGES:
        run = GivenRun(stage, micro_batches=3)
        results.append(run.trained(setting.device, setting.kernel))
        found.equal(f"stage {stage} and the CPU", results[-1], run.trained(CPU, "torch"))
    found.equal("stage 1 and stage 2", *results)
    return "3 micro-batches a step, both stages and the CPU: equal to the bit"


def stored_remainders(setting: Setting, found: Findings) -> str:
    """16-bit remainders: split and joined on the device as on the CPU, at half the bytes, and the same run."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator, device="cpu").to(torch.int32)
    masters = values.view(torch.float32)
    on_device, on_cpu = remainders.split(masters.to(setting.device)), remainders.split(masters)
    found.equal("split", [_bits(x) for x in on_device], [_bits(x) for x in on_cpu])
    joined = [_bits(remainders.joined(*parts)) for parts in (on_device, on_cpu)]
    found.equal("joined", joined[:1], joined[1:])
    for stage in STAGES:
        whole, split = (
            GivenRun(stage, torch.bfloat16, remainders=splits).run(setting.device, setting.kernel)
            for splits in (False, True)
        )
        sizes = [optimizer.memory()["masters"] for _, optimizer in (whole, split)]
        found.check(f"stage {stage}: bytes of masters", 2 * sizes[1] == sizes[0], sizes)
        found.within(f"stage {stage} and whole masters", result_of(*split), result_of(*whole), 1e-6)
    return "split and joined as on the CPU, to the bit; half the bytes of whole masters"


def _bits(x: Tensor) -> Tensor:
    """[…] the integers of the same memory, on the CPU. Conversions on a GPU make other nans than those on a CPU."""
    x = x.cpu()
    if x.is_floating_point():
        x = x.masked_fill(x.isnan(), torch.nan)
    return x.view(torch.int16 if x.itemsize == 2 else torch.int32)


def checkpoints(setting: Setting, found: Findings) -> str:
    """save, async_save and load: bits of weights and moments, and how long the call holds training up."""
    size = 8192 if setting.on_gpu else 64

    def made() -> tuple[nn.Linear, ShardedLamb]:
        torch.manual_seed(0)
        model = nn.Linear(size, size).to(setting.device)
        return model, ShardedLamb(model.named_parameters(), lr=0.01, stage=2, kernel=setting.kernel)

    model, optimizer = made()
    for _ in range(2):
        optimizer.zero_grad()
        (model.weight * 0.5).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expected = result_of(model, optimizer)
    calls: dict[str, Callable[..., Any]] = {"save": checkpoint.save, "async_save": checkpoint.async_save}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls.items():
            setting.synchronize()
            start = time.perf_counter()
            saving = call(Path(folder, name), model, optimizer)
            seconds[name] = time.perf_counter() - start
            if name == "async_save":
                saving.result()
            loaded = made()
            checkpoint.load(Path(folder, name), *loaded)
            found.equal(f"{name}, then load", result_of(*loaded), expected)
            found.note(f"{name} holds training up, s", round(seconds[name], 3))
    megabytes = 12 * size * size / 1e6
    return f"equal to the bit; {megabytes:,.0f} MB hold training up {_seconds(seconds)}"


def _seconds(times: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} s ({name})" for name, value in times.items())


def beyond_2_to_31(setting: Setting, found: Findings) -> str:
    """One shard of more than 2^31 elements: its tail has the bits of a small shard."""
    numel, tail = (1 << 31) + (1 << 20), 1 << 16
    if torch.cuda.mem_get_info()[0] < 5 * 4 * numel:
        raise LeftOut(f"needs {20 * numel / 2**30:.0f} GiB of free memory")
    parts = [torch.randn(tail, device=setting.device).abs() for _ in range(4)]
    long = [torch.full((numel,), 0.5, device=setting.device) for _ in range(4)]
    for whole, part in zip(long, parts, strict=True):
        whole[-tail:] = part
    results = [[x[-tail:].cpu() for x in _updated(setting, *tensors)] for tensors in (long, parts)]
    found.equal("the last elements", *results)
    return f"a shard of {numel:,} elements: its tail is equal to the bit to a small shard's"


def _updated(setting: Setting, w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments ([n] fp32) after both passes over one shard of one parameter."""
    rows = torch.full((1, len(rule.COLUMNS)), 0.5, dtype=torch.float64, device=setting.device)
    table = rule.table(rule.Coefficients(*rows.unbind(1)), torch.float32)
    owners = torch.zeros(len(w) // BLOCK, dtype=torch.int64, device=setting.device)
    shard = FlatShard(w, None, g, m, v, owners)
    kernel = kernels.choose(setting.kernel, setting.device)
    sums = torch.zeros(len(rule.SUMS), 1, dtype=torch.float64, device=setting.device)
    kernel.moments_and_norms([shard], table, sums)
    kernel.apply([shard], table, torch.full((1,), 0.1, device=setting.device)[None])
    return w, m, v


def default_device(setting: Setting, found: Findings) -> str:
    """Construction and steps under ``torch.set_default_device("cuda")``."""
    torch.set_default_device(setting.device)
    try:
        for stage in STAGES:
            run = GivenRun(stage)
            weights = [p.detach() for p in run.run(setting.device, setting.kernel)[0].parameters()]
            is_finite = all(bool(weight.isfinite().all()) for weight in weights)
            found.check(f"stage {stage}", is_finite, "finite" if is_finite else "not finite")
    finally:
        torch.set_default_device(None)
    return "constructs and steps in both stages"


SECTIONS = (
    Section("verify", "`verify` against fp64", 15, verified),
    Section("bits", "Bits of the kernel and of stock operations", 15, bits),
    Section("nccl", "NCCL under every collective, one rank", 10, nccl),
    Section("side-stream", "Backward on another stream", 10, side_stream, needs_gpu=True),
    Section("accumulation", "Gradient accumulation", 5, accumulation),
    Section("remainders", "16-bit remainders of masters", 5, stored_remainders),
    Section("checkpoints", "save, async_save, load", 20, checkpoints),
    Section("beyond-2-31", "More than 2^31 elements", 15, beyond_2_to_31, needs_gpu=True),
    Section("default-device", "`torch.set_default_device`", 5, default_device, needs_gpu=True),
)
