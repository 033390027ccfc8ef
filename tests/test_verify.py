"""`verify` passes on what is right and fails on what is planted: it must be able to say FAIL."""

import os
import re
import subprocess
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import shapes
from sharded_lamb.__main__ import main
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.step_agreement import StepAgreement
from sharded_lamb.comm.wire_formats import ScaledFloat8
from sharded_lamb.core import rule
from sharded_lamb.core.layout import Bucket, Segment
from sharded_lamb.gradients.compressed import CompressedExchange
from sharded_lamb.kernels import ReceivedShards, ScatteredShard
from sharded_lamb.kernels.block_codes import BlockFormat
from sharded_lamb.kernels.native import CppKernel
from sharded_lamb.sharding.buckets import GradientsInPlace
from sharded_lamb.verify import Reference, Report, verify
from tests import interpreter
from tests.harness import run_ranks
from tests.pairs import pairs

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Verdict = tuple[bool, str, dict[str, float]]


def verdict(report: Report) -> Verdict:
    return report.passed, str(report), dict(report.per_step)


def verify_here(rank: int, stage: int, dtype: str, bucket_mb: float = 0.02, steps: int = 3) -> Verdict:
    report = verify(shapes.named("tiny"), stage=stage, dtype=DTYPES[dtype], steps=steps, bucket_mb=bucket_mb)
    return verdict(report)


@pairs(world_size=[1, 2, 3], stage=[1, 2], dtype=[*DTYPES])
def test_passes_on_what_is_right(world_size: int, stage: int, dtype: str) -> None:
    for passed, text, _ in run_ranks(world_size, verify_here, stage, dtype):
        assert passed, text
        assert ("bits of the parameters: equal on all" in text) == (world_size > 1)


def verify_lans(rank: int, stage: int, forgets: bool) -> Verdict:
    """``forgets``: gradients keep their norms."""
    with mock.patch.object(rule, "gradient_scales", keep_scale if forgets else rule.gradient_scales):
        return verdict(verify(shapes.named("tiny"), stage=stage, steps=3, bucket_mb=0.02, variant="lans"))


def keep_scale(scale: Tensor, square_sums: Tensor, options: Any) -> Tensor:
    return scale


@pytest.mark.parametrize(("world_size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_compares_lans(world_size: int, stage: int) -> None:
    for passed, text, per_step in run_ranks(world_size, verify_lans, stage, False):
        assert passed, text
        if world_size == 2 and stage == 2:
            tensors = len(shapes.named("tiny"))
            assert per_step["all_reduce_small bytes"] == 8 * (3 * tensors + 1 + 3 * tensors + 6)
    assert not any(passed for passed, _, _ in run_ranks(world_size, verify_lans, stage, True))


def verify_lars(rank: int, stage: int, forgets: bool) -> Verdict:
    """``forgets``: no decay in the denominator."""
    real = rule.lars_ratios

    def without_decay(weight: Tensor, gradient: Tensor, options: Any, lr: Tensor) -> Tensor:
        return real(weight, gradient, replace(options, l2=torch.zeros_like(options.l2)), lr)

    with mock.patch.object(rule, "lars_ratios", without_decay if forgets else real):
        return verdict(verify(shapes.named("tiny"), stage=stage, steps=3, bucket_mb=0.02, variant="lars"))


def test_compares_lars() -> None:
    for passed, text, per_step in run_ranks(2, verify_lars, 2, False):
        assert passed, text
        tensors = len(shapes.named("tiny"))
        assert per_step["all_reduce_small bytes"] == 8 * (3 * tensors + 1 + tensors + 6)
    assert not any(passed for passed, _, _ in run_ranks(2, verify_lars, 2, True))


def verify_moments(rank: int, state_dtype: str, kernel: str = "auto", planted: bool = False) -> Verdict:
    """``planted``: 8-bit moments are read with twice their scale."""
    decode = BlockFormat.decode

    def wrong(self: BlockFormat, stored: Tensor, weight: Tensor | None) -> Tensor:
        return decode(self, stored, weight) * 2

    with (
        mock.patch.dict(os.environ, SHARDED_LAMB_KERNEL=kernel),
        mock.patch.object(BlockFormat, "decode", wrong if planted else decode),
    ):
        return verdict(verify(shapes.load("tiny"), steps=4, bucket_mb=0.02, state_dtype=state_dtype))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_compares_rounded_moments(state_dtype: str) -> None:
    for passed, text, _ in run_ranks(2, verify_moments, state_dtype):
        assert passed, text


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
def test_fails_on_a_wrong_scale_of_8_bit_moments(kernel: str) -> None:
    passed, text, _ = verify_moments(0, "int8", kernel, planted=True)
    assert not passed
    assert re.search("int8 moments are off by .* after one step", text)


def test_rounded_moments_of_lars_are_refused() -> None:
    with pytest.raises(ValueError, match="'int8' is compared with lamb and lans only"):
        verify({"w": (3,)}, variant="lars", state_dtype="int8")


def verify_gathered(rank: int, gather: torch.dtype, dtype: str, spoils: bool) -> Verdict:
    """``spoils``: the exponent of every block is one too high on the wire."""
    original = ScaledFloat8.encode

    def spoiled(self: ScaledFloat8, values: Tensor) -> Tensor:
        message = original(self, values)
        message[:, -1] += spoils
        return message

    with mock.patch.object(ScaledFloat8, "encode", spoiled):
        return verdict(
            verify(shapes.named("tiny"), steps=3, bucket_mb=0.02, dtype=DTYPES[dtype], gather_dtype=gather)
        )


@pytest.mark.parametrize(
    ("gather", "dtype"),
    [(torch.bfloat16, "float32"), (torch.float8_e4m3fn, "float16")],
    ids=str,
)
def test_compares_compressed_gathers(gather: torch.dtype, dtype: str) -> None:
    for passed, text, _ in run_ranks(2, verify_gathered, gather, dtype, False):
        assert passed, text


def test_fails_on_a_wrong_scale_on_the_wire() -> None:
    for passed, text, _ in run_ranks(2, verify_gathered, torch.float8_e4m3fn, "float32", True):
        assert not passed
        assert "is not its rounded master" in text


def verify_reduced(rank: int, reduce: torch.dtype, dtype: str, spoils: bool) -> Verdict:
    """``spoils``: 8 elements of every shard are 2⁻⁸ too large, as much as bfloat16 rounds."""
    received = CompressedExchange.received

    def spoiled(self: CompressedExchange, grads: Any) -> ReceivedShards:
        shards = received(self, grads)
        shards.parts[:, :8] *= 1 + 2.0**-8
        return shards

    with mock.patch.object(CompressedExchange, "received", spoiled if spoils else received):
        return verdict(
            verify(shapes.named("tiny"), steps=3, bucket_mb=0.02, dtype=DTYPES[dtype], reduce_dtype=reduce)
        )


@pytest.mark.parametrize(
    ("reduce", "dtype"), [(torch.bfloat16, "float32"), (torch.float8_e4m3fn, "bfloat16")], ids=str
)
def test_compares_compressed_reductions(reduce: torch.dtype, dtype: str) -> None:
    for passed, text, _ in run_ranks(2, verify_reduced, reduce, dtype, False):
        assert passed, text
    assert not any(passed for passed, _, _ in run_ranks(2, verify_reduced, reduce, dtype, True))


def verify_model(rank: int) -> Verdict:
    torch.manual_seed(rank)  # ranks start from different weights: the first rank's count
    model = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    return verdict(verify(model, steps=4))


def verify_frozen(rank: int) -> Verdict:
    model = nn.Sequential(nn.Embedding(11, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return verdict(verify(model, steps=2))


def test_frozen_parameters_are_left_out() -> None:
    for passed, text, _ in run_ranks(2, verify_frozen):
        assert passed, text
        assert "3 tensors" in text
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        verify(nn.Linear(3, 2).requires_grad_(False), steps=1)


def test_complex_parameters_are_refused() -> None:
    """A cast to --dtype would drop their imaginary parts, and pass."""
    model = nn.ParameterDict({"real": torch.ones(3), "wave": torch.ones(3, dtype=torch.complex64)})
    with pytest.raises(TypeError, match=r"'wave' is torch.complex64: LAMB is defined for real parameters"):
        verify(model, steps=1)


def test_takes_a_model() -> None:
    for passed, text, _ in run_ranks(2, verify_model):
        assert passed, text


def without_norm_reduction(rank: int, stage: int) -> Verdict:
    """Each rank keeps its own part of ‖w‖² and ‖u‖²: the mistake of ratios per partition."""
    original = StepAgreement.all_reduce

    def without_sums(
        self: StepAgreement, parts: Sequence[Tensor], facts: Hashable, on_device: Sequence[Tensor] = ()
    ) -> Tensor:
        return original(self, [part.clone() for part in parts], facts, on_device)

    with mock.patch.object(StepAgreement, "all_reduce", without_sums):
        return verify_here(rank, stage, "float32")


def with_a_dropped_slice(rank: int, stage: int) -> Verdict:
    """Rank 1 forgets its first segment, in gradients and norms alike."""
    original = Bucket.segments

    def fewer(self: Bucket, of_rank: int) -> tuple[Segment, ...]:
        results = original(self, of_rank)
        return results[1:] if of_rank == 1 else results

    with mock.patch.object(Bucket, "segments", fewer):
        return verify_here(rank, stage, "float32")


def with_summed_gradients(rank: int, stage: int) -> Verdict:
    """Gradients summed over ranks, not averaged (LAMB hardly notices; its moments do)."""
    original = CppKernel.average

    def summed(self: CppKernel, *arguments: Any, **named: Any) -> None:
        shard, segments, received, *rest = arguments
        original(self, shard, segments, replace(received, divisor=1), *rest, **named)

    with mock.patch.object(CppKernel, "average", summed):
        return verify_here(rank, 2, "float32")


def with_own_gradients_in_stage_1(rank: int, stage: int) -> Verdict:
    """Stage 1 takes what is this rank's alone, and the check of the first steps does not look."""
    original = GradientsInPlace.shards

    def own(self: GradientsInPlace, grads: Sequence[Tensor | None]) -> tuple[list[ScatteredShard], ...]:
        return original(self, [None if grad is None else grad * (1 + rank) for grad in grads])

    with mock.patch.object(GradientsInPlace, "shards", own):
        return verify_here(rank, 1, "float32")


def with_stale_parameters(rank: int, stage: int) -> Verdict:
    """The last rank does not get what the others wrote."""
    original = Collectives.all_gather

    def without_writing(self: Collectives, flat: Tensor):
        before = flat.clone()
        pending = original(self, flat)
        pending.wait()
        if rank == self.world_size - 1:
            size = flat.numel() // self.shard_count
            flat[: rank * size] = before[: rank * size]
        return pending

    with mock.patch.object(Collectives, "all_gather", without_writing):
        return verify_here(rank, stage, "float32")


def with_a_third_all_reduce(rank: int, stage: int) -> Verdict:
    original = Collectives.all_reduce_small

    def twice(self: Collectives, vector: Tensor) -> None:
        original(self, vector)
        original(self, vector.clone())

    with mock.patch.object(Collectives, "all_reduce_small", twice):
        return verify_here(rank, stage, "float32")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("planted", "says"),
    [
        (without_norm_reduction, "is off"),
        (with_a_dropped_slice, "is off"),
        (with_summed_gradients, "global gradient norm is"),
        (with_own_gradients_in_stage_1, "is off"),
        (with_stale_parameters, "other bits than rank 0"),
        (with_a_third_all_reduce, "small all-reduces a step"),
    ],
)
def test_fails_on_what_is_planted(planted, says: str, stage: int) -> None:
    for passed, text, _ in run_ranks(2, planted, stage):
        assert not passed
        assert "FAIL" in text
        assert says in text


def unaveraged_stage_1(rank: int) -> Verdict:
    from sharded_lamb.verify.comparison import _Comparison

    with mock.patch.object(
        _Comparison, "averaged", lambda self, step, index: self.gradient(step, rank, index)
    ):
        return verify_here(rank, 1, "float32")


def test_fails_on_unaveraged_gradients_with_the_remedy() -> None:
    for passed, text, _ in run_ranks(2, unaveraged_stage_1):
        assert not passed
        assert "not averaged over ranks" in text
        assert "stage=2" in text


def test_small_all_reduces_do_not_grow_with_parameters() -> None:
    """Two a step, and bytes as reduce-scatter, all-gather and two small vectors add up to."""
    for _, _, per_step in run_ranks(2, verify_here, 2, "float32"):
        assert per_step["all_reduce_small calls"] == 2
        parameters = len(shapes.named("tiny"))
        assert per_step["all_reduce_small bytes"] == 8 * (5 * parameters + 1 + 6)


def test_the_reference_is_what_the_paper_says() -> None:
    """By hand: one weight of 2, gradient 1, at the first step: u = 1/(1 + 1e-6) + 0.02, ratio 2/u, w = 2 - lr·2."""
    reference = Reference([torch.tensor([2.0])], lr=0.1, max_grad_norm=None)
    reference.step([torch.tensor([1.0], dtype=torch.float64)])
    assert reference.ratios[0] == pytest.approx(2 / (1 / (1 + 1e-6) + 0.02), rel=1e-12)
    assert reference.w[0].item() == pytest.approx(1.8, rel=1e-12)


@pytest.mark.parametrize("name", ["tiny", "bert-base", "bert-large", "many-small", "many-tiny"])
def test_shapes_are_the_published_ones(name: str) -> None:
    elements = sum(torch.Size(shape).numel() for shape in shapes.named(name).values())
    counts = {"tiny": 36, "bert-base": 206, "bert-large": 398, "many-small": 10_000, "many-tiny": 10_000}
    published = {"bert-base": 110.1e6, "bert-large": 336.2e6, "many-small": 10e6, "many-tiny": 2e6}
    assert len(shapes.named(name)) == counts[name]
    assert elements == pytest.approx(published.get(name, elements), rel=1e-3)


def test_command_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--steps", "2", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("PASS")
    assert re.search(r"relative error of +\nparameter +elements +weight +m +v +trust ratio\n", shown)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shapes", "nothing"], "must be one of"),
        (["--shapes", "missing.json"], "missing.json"),
        (["--model", "nowhere"], "module:function"),
        (["--model", "json:dumps"], "dumps"),
        (["--steps", "0"], "steps must be >= 1"),
        (["--bucket-mb", "0"], "--bucket-mb must be > 0, got 0"),
        (["--reduce-dtype", "bfloat16", "--stage", "1"], "--reduce-dtype bfloat16 needs --stage 2"),
    ],
)
def test_command_line_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cpu", *arguments]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_command_line_under_torchrun() -> None:
    command = [
        interpreter.python(),
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "sharded_lamb",
    ]
    done = subprocess.run(
        [*command, "verify", "--steps", "3"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    assert done.stdout.rstrip().endswith("PASS")
