"""Sequences a second of BERT-large: forward, backward and step of the recipe's model, without its data loading."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sharded_lamb import ShardedLamb
from sharded_lamb.gpu_check import timing
from sharded_lamb.gpu_check.battery import Findings, LeftOut, Section, Setting

if TYPE_CHECKING:
    from sharded_lamb.bert.data import MicroBatch

EAGER_S, COMPILED_S = 20.0, 50.0
"""Seconds that a case must have left; compiling is most of the latter."""

KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "attention": ("flash", "fmha", "attention", "mha"),
    "layer norm": ("layer_norm", "gammabeta"),
    "foreach": ("multi_tensor",),
    "optimizer": ("moments_and_norms", "apply", "average", "add_by_parameter", "square_sums"),
    "dropout": ("dropout", "philox"),
}
"""{kind of kernel: what names contain}, the first that fits."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train."""

    micro_batch: int
    compiled: bool
    precision: str = "bf16_autocast"  # as the recipe's speed.precision
    masked: bool = False  # attention inside documents only: padding is one

    @property
    def name(self) -> str:
        how = "layers compiled" if self.compiled else "eager"
        return f"{how} {self.precision} x{self.micro_batch}{' masked' if self.masked else ''}"


CASES = (
    Case(256, compiled=True),
    Case(256, compiled=False),
    Case(64, compiled=False),
    Case(512, compiled=True),
    Case(256, compiled=True, masked=True),
    Case(256, compiled=True, precision="bf16"),
)
"""By value: the budget may end before the last."""

REHEARSED = (
    Case(4, compiled=False),
    Case(4, compiled=False, masked=True),
    Case(4, compiled=False, precision="bf16"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model's and the batch's sizes."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    length: int  # of a sequence
    predictions: int  # masked positions a sequence


LARGE = Sizes(1024, 24, 16, 30528, 128, 20)
REHEARSAL = Sizes(64, 2, 4, 512, 32, 4)


def bert(setting: Setting, found: Findings) -> str:
    """Sequences a second and MFU of every case that the budget allows."""
    try:
        import transformers

        from sharded_lamb.bert import metrics
    except ImportError as error:
        raise LeftOut(f"transformers or pydantic is not importable: {error}") from error
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    peak, source = metrics.peak_flops(setting.device, None)
    found.note("peak TFLOP/s", f"{peak / 1e12:,.1f} ({source})")
    best, skipped = ("", 0.0, 0.0), []
    for case in CASES if setting.on_gpu else REHEARSED:
        if setting.seconds_left < (COMPILED_S if case.compiled else EAGER_S):
            skipped.append(case.name)
            continue
        try:
            row = _measured(setting, case, peak)
        except torch.OutOfMemoryError as error:
            found.note(case.name, f"out of memory: {error}"[:200])
            continue
        found.note(case.name, row)
        if row["sequences/s"] > best[1]:
            best = case.name, row["sequences/s"], row["MFU %"]
    if skipped:
        found.note("left out for time", skipped)
    return f"{best[1]:,.0f} sequences/s of length {_sizes(setting).length}, MFU {best[2]:.0f} % ({best[0]})"


def _sizes(setting: Setting) -> Sizes:
    return LARGE if setting.on_gpu else REHEARSAL


def _measured(setting: Setting, case: Case, peak: float) -> dict[str, Any]:
    """Times of one case, and on a GPU its memory and kernels by kind."""
    gc.collect()  # frees the previous case's model
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, flops = _training(setting, case)
    start = time.perf_counter()
    step()
    setting.synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    host, _ = timing.host_and_alone_ms(setting, step)
    ms = timing.back_to_back_ms(setting, step, repeats=4, rounds=3)
    row: dict[str, Any] = {
        "sequences/s": round(case.micro_batch / ms * 1e3, 1),
        "MFU %": round(100 * flops / (ms * 1e-3) / peak, 1),
        "back to back ms": round(ms, 2),
        "host ms": round(host, 1),
        "first s": round(first, 1),
    }
    if setting.on_gpu:
        row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        row["kernels ms by kind"] = _by_kind(timing.device_operations(step))
    return row


def _training(setting: Setting, case: Case) -> tuple[Callable[[], None], int]:
    """(forward, backward and step on one batch; their floating point operations)."""
    from transformers import BertForPreTraining

    from sharded_lamb.bert.config import ModelConfig
    from sharded_lamb.bert.model import Losses, hf_config, model_size, parameters_to_train

    sizes = _sizes(setting)
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=sizes.hidden, layers=sizes.layers, heads=sizes.heads, intermediate_size=4 * sizes.hidden
    )
    net: Any = BertForPreTraining(hf_config(config, sizes.vocabulary, 0))
    net = net.to(setting.device).train()
    if case.precision == "bf16":
        net = net.to(torch.bfloat16)
    if case.compiled:
        torch._dynamo.reset()
        for layer in net.bert.encoder.layer:
            layer.compile()
    losses = Losses(net, nsp=True, autocast=case.precision == "bf16_autocast")
    optimizer = ShardedLamb(
        parameters_to_train(net),
        lr=1e-4,
        stage=2,
        variant="apex",
        kernel=setting.kernel,
        exclude_from_weight_decay=["bias$", "LayerNorm"],
        reduce_dtype=torch.float32,
    )
    batch = _batch(setting, case)
    predictions = case.micro_batch * sizes.predictions

    def step() -> None:
        sums = losses(batch)
        (sums[0] / predictions + sums[1] / case.micro_batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = case.micro_batch * sizes.length
    return step, model_size(net).flops(tokens, predictions, sizes.length)


def _batch(setting: Setting, case: Case) -> "MicroBatch":
    """Random tokens: two segments of half the length; masked: the last 8 positions are padding."""
    from sharded_lamb.bert.data import MicroBatch

    sizes, generator = _sizes(setting), torch.Generator().manual_seed(0)
    shape = case.micro_batch, sizes.length
    positions = torch.arange(sizes.length, device="cpu").expand(shape).contiguous()
    predictions = case.micro_batch * sizes.predictions
    order = torch.randperm(case.micro_batch * sizes.length, generator=generator, device="cpu")
    return MicroBatch(
        tokens=torch.randint(5, sizes.vocabulary, shape, generator=generator, device="cpu"),
        segments=(positions > sizes.length // 2).long(),
        positions=positions,
        documents=(positions < sizes.length - 8).long() if case.masked else None,
        masked_positions=order[:predictions].sort().values,
        labels=torch.randint(5, sizes.vocabulary, (predictions,), generator=generator, device="cpu"),
        follows=torch.randint(0, 2, (case.micro_batch,), generator=generator, device="cpu"),
    ).to(setting.device)


def _by_kind(operations: timing.Operations) -> dict[str, tuple[int, float]]:
    """{kind: (launches, milliseconds)}, the most expensive first."""
    kinds: dict[str, tuple[int, float]] = {}
    for name, ms in operations:
        low = name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(w in low for w in words)), "elementwise")
        launches, total = kinds.get(kind, (0, 0.0))
        kinds[kind] = launches + 1, total + ms
    ordered = sorted(kinds.items(), key=lambda item: -item[1][1])
    return {kind: (launches, round(ms, 2)) for kind, (launches, ms) in ordered}


SECTIONS = (Section("bert", "BERT-large", EAGER_S, bert, is_check=False),)
