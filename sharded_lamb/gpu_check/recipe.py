"""Sequences a second of BERT-large: forward, backward and step of the recipe's model, without its data loading."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from sharded_lamb import ShardedLamb
from sharded_lamb.gpu_check import timing
from sharded_lamb.gpu_check.battery import Findings, LeftOut, Section, Setting

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sharded_lamb.bert.data import MicroBatch

EAGER_S, COMPILED_S = 20.0, 50.0
"""Seconds that a case must have left; compiling is most of the latter."""

KINDS = {
    "attention": ("flash", "fmha", "attention", "mha"),  # before: flash attention's names contain "cutlass"
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "layer norm": ("layer_norm", "gammabeta"),
    "foreach": ("multi_tensor",),
    "optimizer": ("moments_and_norms", "apply", "average", "add_by_parameter", "square_sums"),
    "dropout": ("dropout", "philox"),
}
"""{kind of kernel: what names contain}, the first that fits."""


Lengths = Literal["full", "mixed", "packed"]
"""Documents as long as a row, or of 1/8 to all of it: as many as rows, or as fill the rows."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train."""

    rows: int  # of a micro-batch
    compiled: bool
    precision: str = "bf16_autocast"  # as the recipe's speed.precision
    lengths: Lengths = "full"
    padded: bool = False  # one document a row with a mask, instead of the recipe's documents without padding

    @property
    def name(self) -> str:
        how = "layers compiled" if self.compiled else "eager"
        lengths = "" if self.lengths == "full" else f" {self.lengths} lengths"
        return f"{how} {self.precision} x{self.rows}{lengths}{' padded' if self.padded else ''}"


CASES = (
    Case(256, compiled=True),
    Case(256, compiled=True, lengths="mixed"),
    Case(256, compiled=True, lengths="mixed", padded=True),
    Case(256, compiled=True, lengths="packed"),
    Case(256, compiled=False, lengths="mixed"),
    Case(256, compiled=False),
    Case(512, compiled=True),
    Case(64, compiled=False),
    Case(256, compiled=True, precision="bf16"),
)
"""By value: the budget may end before the last."""

REHEARSED = (
    Case(4, compiled=False),
    Case(4, compiled=False, lengths="mixed"),
    Case(4, compiled=False, lengths="mixed", padded=True),
    Case(4, compiled=False, lengths="packed"),
    Case(4, compiled=False, precision="bf16", lengths="mixed"),
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
    with _alone(found, "attention over mixed lengths"):
        _compare_attention(setting, found)
    with _alone(found, "q, k and v of a layer"):
        found.note("q, k and v of a layer", _projections(setting))
    best, skipped = ("", 0.0, 0.0), []
    for case in CASES if setting.on_gpu else REHEARSED:
        if setting.seconds_left < (COMPILED_S if case.compiled else EAGER_S):
            skipped.append(case.name)
            continue
        with _alone(found, case.name):
            row = _measured(setting, case, peak)
            found.note(case.name, row)
            if row["tokens/s"] > best[1]:
                best = case.name, row["tokens/s"], row["MFU %"]
    if skipped:
        found.note("left out for time", skipped)
    length = _sizes(setting).length
    return (
        f"{best[1]:,.0f} tokens/s = {best[1] / length:,.0f} sequences/s of length {length}, MFU {best[2]:.0f} % "
        f"({best[0]})"
    )


@contextmanager
def _alone(found: Findings, name: str) -> Iterator[None]:
    """Record an error as a failed row, and continue."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        found.note(name, f"out of memory: {error}"[:200])
    except Exception as error:
        traceback.print_exc()
        found.check(name, False, f"{type(error).__name__}: {error}"[:300])


def _sizes(setting: Setting) -> Sizes:
    return LARGE if setting.on_gpu else REHEARSAL


def _measured(setting: Setting, case: Case, peak: float) -> dict[str, Any]:
    """Times of one case, and on a GPU its memory and kernels by kind."""
    gc.collect()  # frees the previous case's model
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, documents, tokens, flops = _training(setting, case)
    start = time.perf_counter()
    step()
    setting.synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    host, _ = timing.host_and_alone_ms(setting, step)
    ms = timing.back_to_back_ms(setting, step, repeats=4, rounds=3)
    row: dict[str, Any] = {
        "sequences/s": round(documents / ms * 1e3, 1),
        "tokens/s": round(tokens / ms * 1e3),
        "MFU %": round(100 * flops / (ms * 1e-3) / peak, 1),
        "back to back ms": round(ms, 2),
        "host ms": round(host, 1),
        "first s": round(first, 1),
    }
    if setting.on_gpu:
        row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        row["kernels ms by kind"] = _by_kind(timing.device_operations(step))
    return row


def _training(setting: Setting, case: Case) -> tuple[Callable[[], None], int, int, int]:
    """(forward, backward and step on one batch; its documents, tokens and floating point operations)."""
    from transformers import BertForPreTraining

    from sharded_lamb.bert.attention import use_documents
    from sharded_lamb.bert.config import ModelConfig
    from sharded_lamb.bert.model import Losses, compile_layers, hf_config, model_size, parameters_to_train
    from sharded_lamb.bert.padding import PaddedLosses

    sizes = _sizes(setting)
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=sizes.hidden, layers=sizes.layers, heads=sizes.heads, intermediate_size=4 * sizes.hidden
    )
    net: Any = BertForPreTraining(hf_config(config, sizes.vocabulary, 0))
    use_documents(net)
    net = net.to(setting.device).train()
    if case.precision == "bf16":
        net = net.to(torch.bfloat16)
    if case.compiled:
        torch._dynamo.reset()
        compile_layers(net)
    kind = PaddedLosses if case.padded else Losses
    losses = kind(net, nsp=True, autocast=case.precision == "bf16_autocast")
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
    documents, tokens, predictions = batch.documents.count, len(batch.tokens), len(batch.labels)

    def step() -> None:
        sums = losses(batch)
        (sums[0] / predictions + sums[1] / documents).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, documents, tokens, model_size(net).flops(tokens, predictions, batch.documents.pairs)


def _lengths(sizes: Sizes, case: Case) -> "NDArray[np.int64]":
    """[D], ascending."""
    if case.lengths == "full":
        return np.full(case.rows, sizes.length)
    least = sizes.length // 8
    drawn = np.random.default_rng(0).integers(least, sizes.length + 1, 8 * case.rows)
    if case.lengths == "packed":
        room = case.rows * sizes.length - np.cumsum(drawn)
        whole = int((room >= least).sum())
        return np.sort(np.append(drawn[:whole], min(room[whole - 1], sizes.length)))
    return np.sort(drawn[: case.rows])


def _batch(setting: Setting, case: Case) -> "MicroBatch":
    """Random tokens: documents of two segments of half the length."""
    from sharded_lamb.bert.attention import Documents
    from sharded_lamb.bert.data import MicroBatch

    sizes, lengths = _sizes(setting), _lengths(_sizes(setting), case)
    draw = np.random.default_rng(1)
    positions = np.concatenate([np.arange(length) for length in lengths])
    predicted = np.sort(
        draw.choice(len(positions), len(positions) * sizes.predictions // sizes.length, replace=False)
    )
    arrays = {
        "tokens": draw.integers(5, sizes.vocabulary, len(positions)),
        "segments": (positions > np.repeat(lengths, lengths) // 2).astype(np.int64),
        "positions": positions,
        "output_positions": predicted,
        "labels": draw.integers(5, sizes.vocabulary, len(predicted)),
        "follows": draw.integers(0, 2, len(lengths)),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    documents = Documents.of(lengths, sizes.length)
    batch = MicroBatch(documents=documents, causal_labels=0, causal_samples=0, **tensors)
    return batch.to(setting.device)


def _compare_attention(setting: Setting, found: Findings) -> None:
    """The attention of one layer over mixed lengths, with its gradients, against SDPA for each length."""
    from sharded_lamb.bert import attention

    sizes, case = _sizes(setting), Case(8, compiled=False, lengths="mixed")
    documents = attention.Documents.of(_lengths(sizes, case), sizes.length).to(setting.device)
    shape = int(documents.offsets[-1]), sizes.heads, sizes.hidden // sizes.heads
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(shape, generator=generator, device="cpu") for _ in range(3)]
    results = []
    for attention_of in (attention.attend, attention.by_length):
        q, k, v = (x.to(setting.device, torch.bfloat16).requires_grad_() for x in qkv)
        out = attention_of(q, k, v, documents, 0.0)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
    found.within("attention over mixed lengths", results[0], results[1], 2e-2)


def _projections(setting: Setting) -> dict[str, float]:
    """Milliseconds of a layer's three projections, forward and backward: as the model has them, and as one product."""
    sizes = _sizes(setting)
    options: dict[str, Any] = {"device": setting.device, "dtype": torch.bfloat16}
    layers = [torch.nn.Linear(sizes.hidden, sizes.hidden, **options) for _ in range(3)]
    rows = (256 if setting.on_gpu else 4) * sizes.length
    x = torch.randn(rows, sizes.hidden, requires_grad=True, **options)
    grads = [torch.randn(rows, sizes.hidden, **options) for _ in layers]

    def three() -> None:
        torch.autograd.backward([layer(x) for layer in layers], grads)

    def one() -> None:
        weight, bias = torch.cat([p.weight for p in layers]), torch.cat([p.bias for p in layers])
        torch.autograd.backward(torch.split(F.linear(x, weight, bias), sizes.hidden, -1), grads)

    return {
        "three products ms": round(timing.back_to_back_ms(setting, three), 3),
        "one product ms": round(timing.back_to_back_ms(setting, one), 3),
    }


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
