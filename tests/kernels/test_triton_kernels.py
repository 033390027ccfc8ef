"""The Triton backend: bits under the interpreter, code compiled for GPUs, and tests on a GPU if present."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.torch_version import TorchVersion

from sharded_lamb import ShardedLamb
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.gradients import summary as facts
from sharded_lamb.kernels import FlatShard, ReceivedShards, ReferenceKernel, triton_kernel, triton_runs
from sharded_lamb.kernels.engine import _batches
from sharded_lamb.kernels.triton_kernel import TritonKernel, usable
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.optim.step_results import StepResults
from tests.forked import forked
from tests.kernels.kernel_memory import SPLIT, Form, assert_same, optimizer_with, stepped, trained

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
INTERPRETED = ["tests/kernels/triton_cases.py", "tests/kernels/triton_tables.py"]
TRITON = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(TRITON is None, reason="triton is not installed")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_triton
@pytest.mark.skipif(
    TRITON is not None
    and version("triton") < TorchVersion("3.7")
    and version("numpy") >= TorchVersion("2.4"),
    reason="Triton 3.6's interpreter converts arrays of one element as NumPy 2.4 refuses to",
)
@pytest.mark.slow
def test_the_cases_pass_under_the_interpreter() -> None:
    """In a separate process: the interpreter cannot be switched off again, and torch.compile needs the compiler."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 24
    assert "skipped" not in done.stdout


def without_triton() -> None:
    """The package, imported again where triton cannot be."""
    for name in [name for name in sys.modules if name.startswith(("sharded_lamb", "triton"))]:
        del sys.modules[name]
    sys.modules["triton"] = None  # type: ignore[assignment]
    again = importlib.import_module("sharded_lamb")
    assert again.ShardedLamb is not ShardedLamb
    kernel = importlib.import_module("sharded_lamb.kernels.triton_kernel")
    print(kernel.usable(torch.device("cpu")))
    try:
        kernel.TritonKernel()
    except ModuleNotFoundError:
        print("refused")


def test_the_package_does_not_import_triton() -> None:
    with forked(without_triton) as process:
        code, output = process.ended()
    assert code == 0, output
    assert output.splitlines() == [
        "triton is not installed (pip install 'sharded-lamb[gpu]')",
        "refused",
    ]


def test_usable_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in str(usable(CPU))
    assert "no cuda device" in str(usable(torch.device("cuda")))
    assert "no mps device" in str(usable(torch.device("mps")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert usable(CPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and cuda:0 has 7.5" in str(usable(torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert usable(torch.device("cuda:0")) is None


def test_pass_2_is_at_most_8_calls_on_a_device() -> None:
    """With 2 launches for Σg² and 2 for pass 1, a step has at most 12, for any number of buckets; 5 without gathers."""
    empty = torch.empty(256, device="meta")
    shard = FlatShard(empty, None, empty, empty, empty, torch.empty(1, dtype=torch.int64, device="meta"))
    for count in (1, 7, 8, 9, 42, 1000):
        for are_gathered, most in ((True, 8), (False, 1)):
            calls = list(_batches([[shard]] * count, are_gathered=are_gathered))
            assert len(calls) <= most
            assert sorted(index for call in calls for index in call) == list(range(count))


@pytest.mark.parametrize("buckets", [20, 100, 400])
def test_a_step_like_the_last_makes_no_table(buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many buckets: each alone in backward, all in pass 1, and the batches of pass 2."""
    memory = torch.empty(256)
    shards = [
        FlatShard(memory, None, memory, memory, memory, torch.full((1,), i, dtype=torch.int64))
        for i in range(buckets)
    ]
    size = -(-buckets // 8)
    batches = [shards[first : first + size] for first in range(0, buckets, size)]
    made, real = [], triton_runs.Table
    monkeypatch.setattr(triton_runs, "Table", lambda *arguments: made.append(1) or real(*arguments))
    tables = triton_runs.Tables(tile_blocks=8)
    for _ in range(3):
        made.clear()
        for call in ([[shard] for shard in shards], [shards], batches):
            for together in call:
                assert tables.of(together, buckets) is not None
    assert not made


def test_gradient_flags_are_copied_to_the_device_once() -> None:
    meta = torch.device("meta")
    known = facts._flags([True, False], meta)
    assert known.device == meta
    assert facts._flags([True, False], meta) is known
    assert facts._flags([True, True], meta) is not known
    flags = facts._flags_on_device((True, False), CPU)
    assert torch.equal(flags, facts._flags([True, False], CPU))
    assert flags.dtype == torch.float64


@pytest.mark.parametrize("capturing", [False, True])
def test_no_event_is_waited_for_while_a_graph_is_captured(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips, event, results = SkipCounter(CPU, limit=1), mock.Mock(), StepResults()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    skips._arrived = event
    skips.check(results)
    skips.record(torch.tensor(True))
    assert event.synchronize.called is not capturing
    assert event.record.called is not capturing
    assert skips.total == 1
    if capturing:
        skips.check(results)
    else:
        with pytest.raises(RuntimeError, match="non-finite gradients"):
            skips.check(results)


# -- code compiled for a GPU; needs no GPU -------------------------------------------------------------


def compiled(
    kernel: Any, dtype: str, target: tuple[str, Any, int] = ("cuda", 90, 32), **constants: Any
) -> str:
    """The PTX of a kernel for compute capability 9.0, as `TritonKernel` launches it; AMD's assembly for a "hip" one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"runs": "*i64", "tile_run": "*i32", "block_param": "*i32", "block_slot": "*i32"}
    pointers |= {
        "first_slots": "*i32",
        **dict.fromkeys(("columns", "slots", "count", "numel", "divisor"), "i32"),
    }
    if kernel.__name__ == "add_by_parameter":
        pointers["sums"] = "*fp64"
    names = kernel.arg_names
    if "NESTEROV" in names:
        grad = {"GRAD": None} if kernel.__name__ == "apply" else {}
        constants = {"NESTEROV": False, "CAUTION": False, **grad, **constants}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, f"*{dtype}") for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    plain_pass_1 = kernel.__name__ == "moments_and_norms" and constants["MODEL"] is None
    warps = triton_kernel.PASS_1_WARPS if plain_pass_1 else triton_kernel.WARPS
    options = {"num_warps": warps, "enable_fp_fusion": False}
    assembly = triton.compile(source, target=GPUTarget(*target), options=options).asm
    return str(assembly["ptx" if target[0] == "cuda" else "amdgcn"])


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache: a program that several tests read is compiled for the first of them."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def device_code(monkeypatch: pytest.MonkeyPatch, compiled_once: Path) -> Any:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled_once))
    from sharded_lamb.kernels import triton_device

    return triton_device


@needs_triton
@pytest.mark.slow
def test_compiled_arithmetic_is_ieee(device_code: Any) -> None:
    """No fused multiply-add, no flush to 0, divisions and roots to nearest; vector loads for aligned memory."""
    tl = device_code.tl
    for compute, name in ((tl.float32, "fp32"), (tl.float64, "fp64")):
        plain = {"WEIGHT": compute, "EXP_AVG": tl.bfloat16, "EXP_AVG_SQ": compute, "COMPUTE": compute}
        plain["ALIGNED"] = compute == tl.float32
        pass_1, pass_2 = {"GRAD": compute, "MODEL": tl.bfloat16, **plain}, {"MODEL": None, **plain}
        programs = [
            compiled(device_code.moments_and_norms, name, **pass_1),
            compiled(device_code.apply, name, **pass_2),
        ]
        if compute == tl.float32:
            same = {**pass_2, "EXP_AVG": compute, "GRAD": compute}  # as test_sums_stay_inside_warps compiles
            programs += [
                compiled(device_code.moments_and_norms, name, **same, NESTEROV=True),
                compiled(device_code.apply, name, **pass_2, GRAD=compute, NESTEROV=True),
                compiled(device_code.moments_and_norms, name, **same, CAUTION=True),
                compiled(device_code.apply, name, **pass_2, GRAD=compute, CAUTION=True),
            ]
        momentum = {key: value for key, value in pass_1.items() if key != "EXP_AVG_SQ"}
        weights = {key: momentum[key] for key in ("WEIGHT", "MODEL", "COMPUTE", "ALIGNED")}
        for ptx in (
            compiled(device_code.weight_norms, name, **weights),
            compiled(device_code.apply_momentum, name, **momentum),
        ):
            assert not re.findall(r"\bfma\.|\.ftz|\.approx|div\.full|(ld|st)\.local", ptx)
            assert bool(re.search(r"ld\.global\S*\.v4\.b32", ptx)) == plain["ALIGNED"]
        for ptx in programs:
            kind = "f32" if compute == tl.float32 else "f64"
            assert not re.findall(r"\bfma\.|\.ftz|\.approx|div\.full", ptx)
            assert f"div.rn.{kind}" in ptx
            assert f"sqrt.rn.{kind}" in ptx
            assert bool(re.search(r"ld\.global\S*\.v4\.b32", ptx)) == plain["ALIGNED"]


@needs_triton
@pytest.mark.slow
def test_split_masters_are_compiled_to_vectors(device_code: Any) -> None:
    """Remainders and weights are loaded and stored as vectors, never as scalars."""
    tl = device_code.tl
    plain = {"WEIGHT": tl.int16, "MODEL": tl.bfloat16, "EXP_AVG": tl.float32, "EXP_AVG_SQ": tl.float32}
    plain |= {"COMPUTE": tl.float32, "ALIGNED": True}
    for ptx in (
        compiled(device_code.moments_and_norms, "fp32", GRAD=tl.float32, **plain),
        compiled(device_code.apply, "fp32", **plain),
    ):
        assert not re.findall(r"\bfma\.|\.ftz|\.approx|div\.full", ptx)
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        assert not re.search(r"(ld|st)\.global\S*\.b16", ptx)


@needs_triton
def test_the_launcher_accepts_every_kernel(device_code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are bound as a launch on a GPU binds them. The interpreter and the compiler do not bind them so: an
    argument named ``params``, as a local variable of the launcher's is, fails in launches only.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, bound = make_backend(GPUTarget("cuda", 90, 32)), set()

    def bind(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        constants.pop("warps", None)
        _, specialization, _ = binder(*arguments, **constants, num_warps=triton_kernel.WARPS)
        assert len(specialization) == len(kernel.arg_names)
        bound.add(kernel.__name__)

    monkeypatch.setattr(triton_kernel, "launch", bind)
    kernel, memory = TritonKernel(), torch.ones(512)
    shard = FlatShard(memory, None, memory, memory, memory, torch.zeros(2, dtype=torch.int64))
    table, sums = torch.ones(1, len(COLUMNS)), torch.zeros(2, 1, dtype=torch.float64)
    kernel.square_sums([shard], sums[0])
    kernel.moments_and_norms([shard], table, sums)
    kernel.apply([shard], table, torch.ones(1)[None])
    kernel.average(shard, [], ReceivedShards(torch.ones(2, 512), 2, None), sums[0], add=False)
    kernel.weight_norms([shard], sums[0])
    kernel.apply_momentum([shard], table, torch.ones(2, 1))
    passes = {"moments_and_norms", "apply", "weight_norms", "apply_momentum"}
    assert bound == {"square_sums", "average", "add_by_parameter", *passes}


OTHER_TARGETS = {"sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_other_gpus_get_ieee_arithmetic_and_vectors(device_code: Any, target: str) -> None:
    """Compiled only, for GPUs that nothing has run on. AMD's exact division and root are sequences with fused
    multiply-adds of their own, at most six and two (by v_rsq, as in Triton 3.6, five); contraction of the rule's
    products and sums would add 20.
    """
    f32, is_amd = device_code.tl.float32, not target.startswith("sm")
    plain = {"WEIGHT": f32, "MODEL": None, "EXP_AVG": f32, "EXP_AVG_SQ": f32, "COMPUTE": f32, "ALIGNED": True}
    for kernel, more in (
        (device_code.moments_and_norms, {"GRAD": f32}),
        (device_code.apply, {}),
        *((device_code.apply, {"GRAD": f32, rule: True}) for rule in ("NESTEROV", "CAUTION")[: is_amd * 2]),
    ):
        text = compiled(kernel, "fp32", OTHER_TARGETS[target], **plain, **more)
        if not is_amd:
            assert not re.findall(r"\bfma\.|\.ftz|\.approx|div\.full|(ld|st)\.local", text)
            assert "div.rn.f32" in text
            assert "sqrt.rn.f32" in text
            assert re.search(r"ld\.global\S*\.v4\.b32", text)
            continue
        divisions, *roots = (len(re.findall(rf"v_{name}_f32", text)) for name in ("div_fixup", "sqrt", "rsq"))
        assert divisions > 0
        assert max(roots) > 0
        most = 6 * divisions + 2 * roots[0] + 5 * roots[1]
        assert len(re.findall(r"\sv_(?:pk_)?(?:fma|fmac|mad|mac)_\w*f32", text)) <= most
        assert "global_load_dwordx4" in text
        assert set(re.findall(r"(?:vgpr|sgpr)_spill_count:\s*(\d+)", text)) == {"0"}


@needs_triton
@pytest.mark.slow
def test_sums_stay_inside_warps(device_code: Any) -> None:
    """Sums of blocks over a row of warps exchange through shared memory: 66 stores and 9 barriers instead of 2 and 3 in
    fp32's pass 1, at 38 % of a copy's bandwidth instead of 99 %.
    """
    tl = device_code.tl
    plain = {"COMPUTE": tl.float32, "ALIGNED": True}
    moments = {"WEIGHT": tl.float32, "MODEL": None, "EXP_AVG": tl.float32, "EXP_AVG_SQ": tl.float32}
    pass_1 = {"GRAD": tl.float32, **moments, **plain}
    for ptx, stores, barriers in (
        (compiled(device_code.moments_and_norms, "fp32", **pass_1), 2, 3),
        (compiled(device_code.moments_and_norms, "fp32", NESTEROV=True, **pass_1), 3, 5),
        (compiled(device_code.moments_and_norms, "fp32", CAUTION=True, **pass_1), 4, 7),
        (compiled(device_code.square_sums, "fp32", GRAD=tl.float32, **plain), 1, 1),
        (compiled(device_code.weight_norms, "fp32", WEIGHT=tl.float32, MODEL=None, **plain), 1, 1),
        (compiled(device_code.average, "fp32", WIRE=tl.float32, ADD=False, **plain), 1, 1),
    ):
        assert len(re.findall(r"st\.shared", ptx)) <= stores
        assert len(re.findall(r"bar\.sync", ptx)) <= barriers
        assert not re.search(r"(ld|st)\.local", ptx), "spilled"


@needs_triton
@pytest.mark.slow
def test_received_parts_are_loaded_as_vectors(device_code: Any) -> None:
    tl = device_code.tl
    for add in (False, True):
        ptx = compiled(
            device_code.average, "fp32", WIRE=tl.float32, COMPUTE=tl.float32, ALIGNED=True, ADD=add
        )
        scalars = len(re.findall(r"ld\.global", ptx)) - len(re.findall(r"ld\.global\S*\.v4", ptx))
        assert scalars <= 6, "the run's row, the tile's run and the slot"


@needs_triton
@pytest.mark.slow
def test_a_lane_loads_many_blocks_at_once(device_code: Any) -> None:
    """One after another, a large parameter's blocks would each wait for memory."""
    ptx = compiled(device_code.add_by_parameter, "fp32")
    lanes_of_a_thread = device_code.LANES.value // (32 * triton_kernel.WARPS)
    straight = max(len(re.findall(r"ld\.global", block)) for block in re.split(r"\n\$L__BB", ptx))
    assert straight >= device_code.UNROLL.value * lanes_of_a_thread


@needs_triton
@pytest.mark.slow
def test_compiled_sums_use_no_atomics(device_code: Any) -> None:
    tl = device_code.tl
    plain = {"COMPUTE": tl.float32, "ALIGNED": True}
    for ptx in (
        compiled(device_code.square_sums, "fp32", GRAD=tl.float16, **plain),
        compiled(device_code.average, "fp32", WIRE=tl.float32, ADD=True, **plain),
        compiled(device_code.add_by_parameter, "fp32"),
    ):
        assert not re.findall(r"\batom\.|\bred\.|\bfma\.|\.ftz", ptx)


# -- on a GPU ------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Operations that synchronize with the device raise."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_triton
@pytest.mark.gpu
def test_a_gpu_has_the_bits_of_the_reference_on_a_cpu() -> None:
    forms = [
        Form(flat, (257, 5000, 0, 1), weight, model, torch.float16, state, torch.float32, gap, 3)
        for flat, gap in ((True, 0), (False, 3))
        for weight, model, state in (
            (torch.float32, None, torch.float32),
            (torch.float32, torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float16, torch.float16),
            (SPLIT, torch.bfloat16, torch.float32),
        )
    ]
    for bad, update in product((False, True), (1, 2)):
        actual = stepped(TritonKernel(), forms, 1, bad, "cuda", update=update)
        assert_same(actual, stepped(ReferenceKernel(), forms, 1, bad, update=update))


@gpu
@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_gpu_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    """Except for the fp64 powers of the bias correction, which differ between libraries: to fp32's last bits."""
    actual = trained(TritonKernel(), dtype, "cuda")
    for x, y in zip(actual, trained(ReferenceKernel(), dtype), strict=True):
        torch.testing.assert_close(x.cpu(), y.cpu())


def _optimizer_on_a_device() -> tuple[torch.nn.Module, ShardedLamb]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(190, 310), torch.nn.LayerNorm(310)).cuda().bfloat16()
    lr = torch.tensor(0.01, device="cuda")
    options = {"lr": lr, "max_grad_norm": 1.0, "bucket_mb": 0.01}
    optimizer = optimizer_with(TritonKernel(), model, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()  # logs, which synchronizes
    optimizer.step()
    return model, optimizer


@gpu
@needs_triton
@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device(request: pytest.FixtureRequest) -> None:
    model, optimizer = _optimizer_on_a_device()
    norms = optimizer.layer_norms()
    request.getfixturevalue("no_waiting")
    fetched = optimizer.fetch_layer_norms()
    for _ in range(3):
        optimizer.step()
    for p in model.parameters():
        p.grad = torch.randn_like(p)  # at a new address
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert fetched.read() == norms


@gpu
@needs_triton
@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_step() -> None:
    """Bit for bit, with other gradients at the same address and another learning rate."""
    (captured, actual), (eager, expected) = _optimizer_on_a_device(), _optimizer_on_a_device()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual.step()
    for seed in range(3):
        torch.manual_seed(seed)
        for p, q in zip(captured.parameters(), eager.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            q.grad.copy_(p.grad.copy_(torch.randn_like(p)))
        for optimizer in (actual, expected):
            optimizer.param_groups[0]["lr"].fill_(0.01 / (1 + seed))
        graph.replay()
        expected.step()
        for p, q in zip(captured.parameters(), eager.parameters(), strict=True):
            assert torch.equal(p, q)
