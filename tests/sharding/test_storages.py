"""Each parameter has a storage of its own over its bucket, and weights that are written elsewhere are followed."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from sharded_lamb import ShardedLamb
from tests import fork_server, training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.pairs import pairs

STAGES = pytest.mark.parametrize("stage", [1, 2])


# -- one storage per parameter ------------------------------------------------------------------------------


def storages(rank: int, stage: int, dtype: torch.dtype) -> None:
    params = training.parameters(dtype=dtype)
    params["conv"] = Parameter(torch.ones(4, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last))
    opt = ShardedLamb(params.items(), stage=stage, lr=0.1)
    before = training.copies(params)
    training.backward(params, {name: torch.ones_like(p) for name, p in params.items()})
    opt.step()
    held = {name: p.untyped_storage() for name, p in params.items()}
    assert {name: storage.nbytes() for name, storage in held.items()} == {
        n: p.nbytes for n, p in params.items()
    }
    pointers = [storage.data_ptr() for name, storage in held.items() if params[name].numel()]
    assert len(set(pointers)) == len(pointers)
    for name, p in params.items():
        assert p.storage_offset() == 0
        assert not p.numel() or not torch.equal(p, before[name]), name  # a step writes this memory


@pairs(
    world=[1, 2],
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    stage=[1, 2],
)
def test_each_parameter_has_a_storage_of_its_own(world: int, dtype: torch.dtype, stage: int) -> None:
    run_ranks(world, storages, stage, dtype)


def test_memory_outlives_the_optimizer_and_its_bucket() -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items())
    kept = params["fc.weight"].detach()
    expected = kept.clone()
    del opt, params
    torch.zeros(1 << 20)
    assert torch.equal(kept, expected)


def small_and_large() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(500, 40))
    opt = ShardedLamb(model.named_parameters())
    model[0](torch.ones(1, 3)).sum().backward()
    opt.step()
    return model


def test_a_saved_layer_holds_that_layer_alone() -> None:
    stream = io.BytesIO()
    torch.save(small_and_large()[0].state_dict(), stream)
    assert stream.tell() < 8 * 1024


def test_safetensors_and_accelerate_save_every_tensor(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    accelerate = pytest.importorskip("accelerate")
    model = small_and_large()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "folder"))
    for file in (tmp_path / "model.safetensors", tmp_path / "folder" / "model.safetensors"):
        training.assert_same_bits(safetensors.load_file(str(file)), dict(model.state_dict()))


def test_a_copied_model_shares_nothing() -> None:
    model = small_and_large()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert model[0].weight.all()


# -- weights written by other memory ----------------------------------------------------------------------------


def by_vector(model: nn.Sequential) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 0.5, model.parameters())


def by_pruning(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")


def by_swap(model: nn.Sequential) -> None:
    model[1].weight.data, model[2].weight.data = model[2].weight.data, model[1].weight.data


def by_rotation(model: nn.Sequential) -> None:
    a, b = model[1].weight, model[2].weight
    a.data, b.data = b.data.t(), a.data


def by_transposed_view(model: nn.Sequential) -> None:
    model[1].weight.data = model[1].weight.data.t()


def by_flipped_strides(model: nn.Sequential) -> None:
    model[0].weight.data = (2 * model[0].weight.data).t().contiguous().t()


def by_move(model: nn.Sequential) -> None:
    model.to("cpu:0")


def by_average(model: nn.Sequential) -> None:
    average = {name: (0.9 * p).detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data = average[name]


def by_swap_there_and_back(model: nn.Sequential) -> None:
    for p in model.parameters():
        kept, p.data = p.data, torch.zeros_like(p)
        p.data = kept


WRITERS = [
    by_vector,
    by_pruning,
    by_swap,
    by_rotation,
    by_transposed_view,
    by_flipped_strides,
    by_move,
    by_average,
    by_swap_there_and_back,
]
Writer = Callable[[nn.Sequential], None]


def squares(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers of one shape among three."""
    model = nn.Sequential(nn.Linear(23, 17), nn.Linear(17, 17), nn.Linear(17, 17)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(training.draw(tuple(p.shape), name))
    return model


def written_between_steps(
    rank: int,
    write: Writer,
    stage: int,
    dtype: torch.dtype,
    writers: tuple[int, ...],
    options: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights just after the write, weights at the end)."""
    model = squares(dtype)
    opt = ShardedLamb(model.named_parameters(), lr=0.05, stage=stage, bucket_mb=0.001, **options)
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}

    def gradients(r: int, step: int) -> dict[str, Tensor | None]:
        return training.own_gradients(r, step, shapes)

    run = {"stage": stage, "rank": rank, "world": 2, "gradients": gradients}
    training.train(opt, params, steps=range(2), **run)
    if rank in writers:
        write(model)
    written = training.copies(params)
    training.train(opt, params, steps=range(2, 4), **run)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in params.values())
    return written, training.copies(params)


@STAGES
@pytest.mark.parametrize("write", WRITERS)
def test_a_step_starts_from_weights_written_by_data(write: Writer, stage: int) -> None:
    shapes = {name: tuple(p.shape) for name, p in squares().named_parameters()}
    averaged = [
        training.average(training.own_gradients(r, step, shapes) for r in range(2)) for step in range(4)
    ]
    results = run_ranks(2, written_between_steps, write, stage, torch.float32, (0, 1), {})
    oracle = training.oracle_run(training.copies(dict(squares().named_parameters())), averaged[:2], lr=0.05)
    torch_beside = squares()
    with torch.no_grad():
        for name, p in torch_beside.named_parameters():
            p.copy_(torch.from_numpy(oracle.params[name]))
    write(torch_beside)
    oracle.params = {name: p.detach().double().numpy() for name, p in torch_beside.named_parameters()}
    for written, _ in results:
        training.assert_follows(written, oracle)
    for grads in averaged[2:]:
        oracle.step({name: g.numpy() for name, g in grads.items() if g is not None})
    for _, weights in results:
        training.assert_follows(weights, oracle)


def in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


@pytest.mark.parametrize("writers", [(0, 1), (1,)])
@pytest.mark.parametrize("options", [{}, {"store_param_remainders": True}], ids=["masters", "remainders"])
def test_data_and_writes_in_place_have_the_same_bits(
    options: dict[str, Any], writers: tuple[int, ...]
) -> None:
    """Also on one rank alone, whose own slices count."""
    by_data, expected = (
        run_ranks(2, written_between_steps, write, 2, torch.bfloat16, writers, options)
        for write in (by_vector, in_place)
    )
    for (_, weights), (_, others) in zip(by_data, expected, strict=True):
        training.assert_same_bits(weights, others)
    training.assert_same_bits(by_data[0][1], by_data[1][1])


def tied_by_data(model: nn.Sequential) -> None:
    model[1].weight.data = model[2].weight.data


def narrowed(model: nn.Sequential) -> None:
    model[1].weight.data = model[1].weight.data[:9]


def emptied(model: nn.Sequential) -> None:
    model[1].weight.data = torch.empty(0)


MISTAKES: dict[Writer, tuple[str, str]] = {
    tied_by_data: ("ValueError", "parameters '1.weight' and '2.weight' are two objects over the same memory"),
    narrowed: ("RuntimeError", r"(now torch.float32 (9, 17) on cpu; it was torch.float32 (17, 17) on cpu)"),
    emptied: ("RuntimeError", r"(now torch.float32 (0,) on cpu; it was torch.float32 (17, 17) on cpu)"),
}


def step_after(rank: int, write: Writer, stage: int) -> None:
    model = squares()
    opt = ShardedLamb(model.named_parameters(), stage=stage)
    write(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()


@STAGES
@pytest.mark.parametrize("write", MISTAKES)
def test_memory_that_cannot_be_followed_is_an_error(write: Writer, stage: int) -> None:
    kind, text = MISTAKES[write]
    results = run_ranks_expecting_errors(2, step_after, write, stage)
    for actual, message in results.values():
        assert actual == kind
        assert text in message


# -- shared memory ----------------------------------------------------------------------------------------------


def train_shared(
    rank: int, stage: int, dtype: torch.dtype, share_at: int | None, overlap_forward: bool
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """(after each step, a view of the shared memory; the weights at the end). The last step follows a write there."""
    model = squares(dtype)
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    seen: dict[str, Tensor] = {}

    def share() -> None:
        model.share_memory()
        seen.update({name: p.detach() for name, p in params.items()})

    if share_at == -1:
        share()
    opt = ShardedLamb(model.named_parameters(), lr=0.05, stage=stage, bucket_mb=0.001)
    if overlap_forward:
        opt.overlap_forward(model)
        model(torch.ones(1, 23, dtype=dtype))
    views = []
    for step in range(4):
        if step == share_at:
            share()
        if step == 3 and share_at is not None:
            for value in seen.values():  # as another process writes
                value.mul_(0.5)
        elif step == 3:
            with torch.no_grad():
                for p in params.values():
                    p.mul_(0.5)
        run = {"stage": stage, "rank": rank, "world": 2}
        training.train(
            opt, params, steps=[step], gradients=lambda r, s: training.own_gradients(r, s, shapes), **run
        )
        if share_at is not None and step >= share_at:
            views.append({name: value.clone() for name, value in seen.items()})
            assert all(p.is_shared() for p in params.values())
        else:
            opt.synchronize()
            views.append(training.copies(params))
    return views, training.copies(params)


@pairs(share_at=[-1, 0, 2], dtype=[torch.float32, torch.bfloat16], overlap_forward=[False, True])
def test_shared_memory_shows_every_step(share_at: int, dtype: torch.dtype, overlap_forward: bool) -> None:
    alone = run_ranks(2, train_shared, 2, dtype, None, False)
    shared = run_ranks(2, train_shared, 2, dtype, share_at, overlap_forward)
    for (views, weights), (expected, last) in zip(shared, alone, strict=True):
        for view, plain in zip(views, expected, strict=True):
            training.assert_same_bits(view, plain)
        training.assert_same_bits(weights, last)


def test_a_parameter_that_leaves_shared_memory_is_in_its_bucket_again() -> None:
    model = squares()
    opt = ShardedLamb(model.named_parameters(), lr=0.05)
    model.share_memory()
    model(torch.ones(1, 23)).sum().backward()
    opt.step()
    for p in model.parameters():
        p.data = p.data.clone()
    opt.step()
    assert not any(p.is_shared() for p in model.parameters())
    (bucket,) = opt._store.buckets
    assert all(bucket.contains(p) for p in model.parameters())
    assert not bucket.has_shared


def evaluator(inbox: Any, outbox: Any) -> None:
    """For each message, the sums of the weights that came in the first one."""
    state = inbox.get(timeout=60)
    outbox.put("received")
    while inbox.get(timeout=60):
        outbox.put({name: value.double().sum().item() for name, value in state.items()})


def test_a_state_dict_in_a_queue_shows_every_step() -> None:
    model = squares()
    opt = ShardedLamb(model.named_parameters(), lr=0.05)
    context = fork_server.context()
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=evaluator, args=(inbox, outbox), daemon=True)
    process.start()
    state = model.state_dict()
    sums = {name: value.double().sum().item() for name, value in state.items()}
    inbox.put(state)
    assert outbox.get(timeout=60) == "received"  # a thread of the queue moves the weights into shared memory
    for _ in range(2):
        opt.zero_grad()
        model(torch.ones(4, 23)).square().mean().backward()
        opt.step()
        inbox.put(True)
        before, sums = sums, {name: value.double().sum().item() for name, value in model.state_dict().items()}
        assert not any(sums[name] == value for name, value in before.items())
        assert outbox.get(timeout=60) == sums
    inbox.put(False)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("remainders", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_weights_written_without_a_gradient_stay(kernel: str, stage: Literal[1, 2], remainders: bool) -> None:
    """Masters follow them, also in a step in which the parameter, or every one, has no gradient."""
    written, other = (nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for _ in range(2))
    opt = ShardedLamb(
        [("written", written), ("other", other)],
        lr=0.1,
        stage=stage,
        kernel=kernel,
        store_param_remainders=remainders,
    )
    (written.float().square().sum() + other.float().square().sum()).backward()
    opt.step()
    opt.zero_grad()
    for factor, has_other in ((2.0, True), (3.0, False)):
        with torch.no_grad():
            written.mul_(factor)
        expected = written.detach().clone()
        if has_other:
            other.float().square().sum().backward()
        opt.step()
        opt.zero_grad()
        assert torch.equal(written.detach(), expected)
    written.float().square().sum().backward()
    opt.step()
    assert torch.all(written < expected)
    assert torch.all(written > expected / 2), "from a master of before the writes"
