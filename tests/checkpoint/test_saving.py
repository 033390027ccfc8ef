"""The content of a checkpoint, and the inputs that save and load reject."""

import hashlib
import json
import math
import pickletools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint, read_contents, write_contents
from sharded_lamb.checkpoint.manifest import read_manifest
from tests import training
from tests.checkpoint.cases import whole
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.layouts import Layout, build, steps


class Unusual(nn.Module):
    """Tied and frozen parameters, buffers, no elements, one element, channels_last."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.conv = nn.Conv2d(3, 8, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.register_buffer("mean", torch.full((3,), 2.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> Any:
        return {"calls": 3, "pair": (1, 2)}

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state


def trained(module: nn.Module, opt: Any, count: int) -> None:
    for number in range(count):
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.grad = training.draw(tuple(p.shape), name, number).to(p.dtype)
        opt.step()
        opt.zero_grad()


def save_unusual(rank: int, folder: Path) -> dict[str, Tensor]:
    model = Unusual()
    opt = ShardedLamb(model.named_parameters(), lr=0.1, bucket_mb=0.0005)
    trained(model, opt, 2)
    model.get_buffer("mean").fill_(9.0)
    checkpoint.save(folder, model, opt)
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def load_unusual(
    rank: int, folder: Path, tied: bool, wrapped: bool = False
) -> tuple[dict[str, Tensor], Any, Any]:
    torch.manual_seed(5)
    model = Unusual(tied)
    called = nn.parallel.DistributedDataParallel(torch.compile(model)) if wrapped else model  # type: ignore[arg-type]
    opt = ShardedLamb(called.named_parameters(), lr=0.1)
    checkpoint.load(folder, called, opt)
    weights = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return weights, model.loaded, opt.full_state_dict()


@pytest.mark.parametrize(("world", "wrapped"), [(1, False), (3, False), (2, True)])
def test_unusual_parameters_and_buffers(world: int, wrapped: bool, tmp_path: Path) -> None:
    expected = run_ranks(2, save_unusual, tmp_path / "c")[0]
    assert expected["mean"].tolist() == [9.0] * 3
    assert "scratch" not in expected
    for weights, extra_state, _ in run_ranks(world, load_unusual, tmp_path / "c", True, wrapped):
        training.assert_same_bits(weights, expected)
        assert extra_state == {"calls": 3, "pair": (1, 2)}


def test_tied_weights_are_saved_once_and_load_untied(tmp_path: Path) -> None:
    expected = run_ranks(2, save_unusual, tmp_path / "c")[0]
    manifest = read_manifest(tmp_path / "c")
    assert manifest.aliases == {"head.weight": "embed.weight"}
    assert "model.head.weight" not in manifest.tensors
    for weights, _, full in run_ranks(2, load_unusual, tmp_path / "c", False):
        training.assert_same_bits(weights, {**expected, "head.weight": expected["embed.weight"]})
        if full is not None:  # the frozen parameter has no state
            names = [name for name, _ in Unusual(tied=False).named_parameters()]
            embed, head = (full["state"][names.index(name)] for name in ("embed.weight", "head.weight"))
            training.assert_same_bits(head, embed)
            assert embed["exp_avg"].norm() > 0


def save_apart(rank: int, folder: Path, alike: bool) -> None:
    model = Unusual(tied=False)
    if alike:
        model.head.weight.data.copy_(model.embed.weight.data)
    checkpoint.save(folder, model)


def load_weights(rank: int, folder: Path) -> tuple[Tensor, Tensor]:
    model = Unusual()
    before = model.embed.weight.detach().clone()
    try:
        checkpoint.load(folder, model)
    except ValueError:
        assert torch.equal(model.embed.weight, before)
        raise
    return model.embed.weight.detach(), model.head.weight.detach()


def test_untied_weights_load_tied_only_if_equal(tmp_path: Path) -> None:
    run_ranks(2, save_apart, tmp_path / "c", False)
    for kind, message in run_ranks_expecting_errors(2, load_weights, tmp_path / "c").values():
        assert kind == "ValueError"
        assert "holds different values of embed.weight and head.weight" in message
    run_ranks(2, save_apart, tmp_path / "c", True)
    saved = safetensors_of(tmp_path / "c")["model.head.weight"]
    for embed, head in run_ranks(2, load_weights, tmp_path / "c"):
        assert torch.equal(embed, saved)
        assert torch.equal(head, saved)


def safetensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


# -- the files ----------------------------------------------------------------------------------------------------


def save_block(rank: int, layout: Layout, folder: Path) -> Any:
    model, opt = build(layout)
    steps(model, opt, range(2))
    checkpoint.save(folder, model, opt, {"words": "of rank 0" if rank == 0 else "of another"})
    return whole(model, opt)


def test_files_are_readable_by_standard_tools(tmp_path: Path) -> None:
    """safetensors reads them, sha256sum verifies them, and they hold no pickle."""
    weights, _ = run_ranks(3, save_block, Layout(3, stage=2), tmp_path / "c")[0]
    files = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert files == ["SHA256SUMS", "manifest.json", *(f"shard-0000{rank}.safetensors" for rank in range(3))]
    subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "c", check=True)
    seen: dict[str, int] = {}
    for name in files[2:]:
        with safe_open(tmp_path / "c" / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                name_of, _, at = key.partition("@")
                seen[name_of] = seen.get(name_of, 0) + tensor.numel()
                if name_of.startswith("model.") and not at:
                    assert torch.equal(tensor, weights[name_of.removeprefix("model.")])
    manifest = read_manifest(tmp_path / "c")
    assert seen == {name: math.prod(tensor.shape) for name, tensor in manifest.tensors.items()}
    for name in files:
        with pytest.raises(ValueError, match=r"opcode|exhausted|pickle|newline"):
            list(pickletools.genops((tmp_path / "c" / name).read_bytes()))


def save_wide(rank: int, folder: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(9)))
    opt = ShardedLamb(model.named_parameters(), stage=2)
    trained(model, opt, 1)
    checkpoint.save(folder, model, opt)


def test_every_rank_writes_its_part(tmp_path: Path) -> None:
    """Every rank writes a like amount, and nothing is written twice."""
    run_ranks(3, save_wide, tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    total = sum(tensor.bytes for tensor in manifest.tensors.values())
    sizes = dict.fromkeys(manifest.files, 0)
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            sizes[chunk.place.file] += chunk.place.end - chunk.place.begin
    assert sum(sizes.values()) == total
    assert max(sizes.values()) < 1.3 * min(sizes.values()), sizes
    for kind in ("exp_avg", "exp_avg_sq"):
        held = dict.fromkeys(manifest.files, 0)
        for name, tensor in manifest.tensors.items():
            for chunk in tensor.chunks if name.endswith(f".{kind}") else ():
                held[chunk.place.file] += chunk.place.end - chunk.place.begin
        assert max(held.values()) < 1.1 * min(held.values())


def test_written_by(tmp_path: Path) -> None:
    run_ranks(3, save_block, Layout(3, stage=2), tmp_path / "c")
    by = read_manifest(tmp_path / "c").written_by
    assert {key: by[key] for key in ("ranks", "optimizer", "stage")} == {
        "ranks": 3,
        "optimizer": "ShardedLamb",
        "stage": "2",
    }
    assert by["torch"] == torch.__version__
    assert read_manifest(tmp_path / "c").optimizer["step"] == 2


def test_two_saves_of_one_state_are_equal_files(tmp_path: Path) -> None:
    """Hashes of checkpoints can therefore be compared."""
    for name in ("one", "two"):
        run_ranks(2, save_block, Layout(2, stage=1), tmp_path / name)
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1]


# -- extra --------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": torch.arange(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.history = state["history"]


PLAIN: dict[str, Any] = {
    "nothing": None,
    "numbers": [1, -2, 0.1, 1e-300, math.inf, -math.inf, True, 2**70],
    "tuple": (1, ("a", [2.5])),
    "keys": {1: "one", (2, 3): "pair", None: "none", "__tuple__": "not one"},
    "text": "ünï \n \0",
    "dtype": torch.bfloat16,
    "empty": [{}, [], (), ""],
}


def test_plain_data_round_trips(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    rng = torch.get_rng_state()
    extra = {**PLAIN, "rng": rng, "tensors": [torch.tensor(3), {"a.b": torch.ones(2, 3, dtype=torch.bool)}]}
    checkpoint.save(tmp_path / "c", model, extra=extra)
    loaded = checkpoint.load(tmp_path / "c", model)
    assert {key: loaded[key] for key in PLAIN} == PLAIN
    assert [type(value) for value in loaded["numbers"]] == [type(value) for value in PLAIN["numbers"]]
    assert torch.equal(loaded["rng"], rng)
    assert loaded["tensors"][0].item() == 3
    assert loaded["tensors"][1]["a.b"].all()


def test_nan_round_trips(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoint.save(tmp_path / "c", model, extra={"loss": math.nan})
    assert math.isnan(checkpoint.load(tmp_path / "c", model)["loss"])
    json.loads((tmp_path / "c" / "manifest.json").read_text(), parse_constant=pytest.fail)  # JSON has no nan


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", [lambda: None]], ids=["object", "set", "bytes", "nested"]
)
def test_other_data_is_rejected_by_its_path(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"extra\.position.*convert it, or leave it out"):
        checkpoint.save(tmp_path / "c", nn.Linear(2, 2), extra={"position": value})
    assert not (tmp_path / "c").exists()


def schedule(rank: int, folder: Path) -> None:
    model = nn.Linear(4, 3)
    opt = ShardedLamb(model.named_parameters(), lr=0.5, stage=2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    counter = Counter(3 + rank)
    for number in range(3):
        trained(model, opt, 1)
        scheduler.step()
        scaler.update(512.0 - number)
    extra = {"scheduler": scheduler, "scaler": scaler, "counter": counter, "epoch": 7}
    checkpoint.save(folder, model, opt, extra)

    again = nn.Linear(4, 3)
    opt_again = ShardedLamb(again.named_parameters(), lr=0.1, stage=2)
    later = torch.optim.lr_scheduler.CosineAnnealingLR(opt_again, 10)
    scaler_again, other = torch.amp.GradScaler("cpu"), Counter(0)
    loaded = checkpoint.load(
        folder, again, opt_again, {"scheduler": later, "scaler": scaler_again, "counter": other}
    )
    assert loaded["epoch"] == 7
    assert later.last_epoch == 3
    assert opt_again.param_groups[0]["lr"] == opt.param_groups[0]["lr"] != 0.1
    assert scaler_again.get_scale() == 510.0
    assert other.count == 3  # the first rank's
    assert torch.equal(other.history, torch.arange(3))
    later.step()
    scheduler.step()
    assert opt_again.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


def test_scheduler_and_scaler_through_extra(tmp_path: Path) -> None:
    run_ranks(2, schedule, tmp_path / "c")


def averages(rank: int, folder: Path) -> None:
    """DTensors in extra, such as a sharded average of the weights, are written and read in parts."""
    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(10.0).view(5, 2)
    shadow = distribute_tensor(value, mesh, [Shard(0)])

    class Average:
        held = shadow

        def state_dict(self) -> dict[str, Any]:
            return {"shadow.weight": self.held, "count": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.held = state["shadow.weight"]

    model = nn.Linear(2, 2)
    checkpoint.save(folder, model, extra={"average": Average()})
    again = Average()
    again.held = distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])
    checkpoint.load(folder, model, extra={"average": again})
    assert isinstance(again.held, DTensor)
    assert again.held.placements == (Shard(0),)
    assert torch.equal(again.held.full_tensor(), value)
    assert torch.equal(checkpoint.load(folder, model)["average"]["shadow.weight"], value)
    replicated = distribute_tensor(value, mesh, [Replicate()])
    checkpoint.save(folder, model, extra={"whole": replicated})
    assert torch.equal(checkpoint.load(folder, model)["whole"], value)


def test_dtensors_in_extra(tmp_path: Path) -> None:
    run_ranks(2, averages, tmp_path / "c")


# -- options and counts -------------------------------------------------------------------------------------------


def optioned(rank: int, folder: Path) -> None:
    def made(lr: float | Tensor, **options: Any) -> tuple[nn.Module, ShardedLamb]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        return model, ShardedLamb(model.named_parameters(), lr, stage=1, **options)

    model, opt = made(
        0.25,
        betas=(0.5, 0.75),
        trust_clip=(0.01, 10.0),
        exclude_from_weight_decay=("bias",),
        max_grad_norm=3.0,
    )
    trained(model, opt, 1)
    next(model.parameters()).grad = torch.full((3, 3), math.nan)
    for p in list(model.parameters())[1:]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.skipped_steps == 1
    checkpoint.save(folder, model, opt)
    lr = torch.tensor(0.125, dtype=torch.float64)
    again, other = made(lr)
    checkpoint.load(folder, again, other)
    assert other.param_groups[0]["lr"] is lr
    assert lr == 0.25
    for name in ("betas", "trust_clip", "exclude_from_weight_decay", "weight_decay", "variant"):
        assert other.param_groups[0][name] == opt.param_groups[0][name], name
    assert other.max_grad_norm == 3.0
    assert other.skipped_steps == 1
    trained(model, opt, 2)
    trained(again, other, 2)
    training.assert_same_bits(dict(again.named_parameters()), dict(model.named_parameters()))


def test_options_and_skipped_steps(tmp_path: Path) -> None:
    run_ranks(2, optioned, tmp_path / "c")


def unfrozen(rank: int, folder: Path, dtype: torch.dtype) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(dtype)

    model = made()
    model[1].requires_grad_(False)  # type: ignore[index]
    opt = ShardedLamb(model.named_parameters(), stage=2)
    trained(model, opt, 2)
    checkpoint.save(folder, model, opt)
    again = made()
    other = ShardedLamb(again.named_parameters(), stage=2)
    trained(again, other, 3)
    checkpoint.load(folder, again, other)
    training.assert_same_bits(dict(again.named_parameters()), dict(model.named_parameters()))
    for p in again[1].parameters():  # type: ignore[index]
        state = other.state[p]
        assert state["step"] == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    for p in again[0].parameters():  # type: ignore[index]
        assert other.state[p]["step"] == 2
    full = other.full_state_dict()
    if full is not None and dtype != torch.float32:
        assert torch.equal(full["state"][2]["master"], model[1].weight.float())  # type: ignore[index]
    again[1].requires_grad_(False)  # type: ignore[index]
    checkpoint.load(folder, again, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_that_was_frozen_starts_anew(dtype: torch.dtype, tmp_path: Path) -> None:
    run_ranks(2, unfrozen, tmp_path / "c", dtype)


# -- Lamb ---------------------------------------------------------------------------------------------------------


def from_lamb(rank: int, folder: Path) -> dict[str, Tensor]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    opt = ShardedLamb(model.named_parameters(), stage=2)
    checkpoint.load(folder, model, opt)
    trained(model, opt, 2)
    checkpoint.save(folder.with_name("back"), model, opt)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_lamb_and_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    opt = Lamb(model.named_parameters(), lr=0.1)
    trained(model, opt, 2)
    checkpoint.save(tmp_path / "c", model, opt)
    sharded = run_ranks(2, from_lamb, tmp_path / "c")[0]
    trained(model, opt, 2)
    again = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    other = Lamb(again.named_parameters(), lr=0.7)
    checkpoint.load(tmp_path / "back", again, other)
    training.assert_same_bits(dict(again.named_parameters()), sharded)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert (p - q).norm() <= 1e-6 * p.norm()
        assert other.state[q]["step"] == 4
        assert (other.state[q]["exp_avg"] - opt.state[p]["exp_avg"]).norm() <= 1e-6 * opt.state[p][
            "exp_avg"
        ].norm()
    assert other.param_groups[0]["lr"] == 0.1


def test_contents_round_trip(tmp_path: Path) -> None:
    run_ranks(3, save_block, Layout(3, stage=2, dtype=torch.bfloat16), tmp_path / "c")
    contents = read_contents(tmp_path / "c")
    assert contents.extra == {"words": "of rank 0"}
    assert contents.written_by["ranks"] == 3
    assert [len(group["names"]) for group in contents.groups] == [4, 6] or contents.groups
    write_contents(tmp_path / "d", contents)
    again = read_contents(tmp_path / "d")
    training.assert_same_bits(again.weights, contents.weights)
    for name, state in contents.states.items():
        training.assert_same_bits(again.states[name], state)
    assert again.groups == contents.groups
    assert again.optimizer == contents.optimizer


def test_inconsistent_contents_are_rejected(tmp_path: Path) -> None:
    weights, zero = {"w": torch.zeros(2)}, torch.zeros(())
    wrong = {"step": zero, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"exp_avg of 'w' has shape \(3,\), its weight \(2,\)"):
        write_contents(tmp_path / "c", InMemoryCheckpoint(weights, {"w": wrong}, []))
    with pytest.raises(ValueError, match="state of 'v' but no weight"):
        write_contents(tmp_path / "c", InMemoryCheckpoint(weights, {"v": wrong}, []))
    with pytest.raises(ValueError, match="'v' is not a weight"):
        write_contents(tmp_path / "c", InMemoryCheckpoint(weights, {}, [{"names": ["v"], "options": {}}]))
    assert not list(tmp_path.iterdir())


# -- rejected -----------------------------------------------------------------------------------------------------


def refusing(rank: int, folder: Path, case: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    opt: Any = ShardedLamb(model.named_parameters())
    checkpoint.save(folder, model, opt)
    if case == "larger":
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    elif case == "named":
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(1, 1))
    elif case == "adam":
        checkpoint.load(folder, model, torch.optim.Adam(model.parameters()))
    elif case == "stranger":
        checkpoint.save(folder, nn.Linear(3, 3), opt)
    elif case == "extra":
        checkpoint.load(folder, model, opt, {"scheduler": Counter(3)})
    elif case == "groups":
        del opt
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        opt = ShardedLamb(
            [{"params": [*model[0].named_parameters()]}, {"params": [*model[1].named_parameters()]}]
        )
        checkpoint.load(folder, model, opt)
    elif case == "one rank's extra":
        checkpoint.save(folder, model, opt, {"x": object()} if rank == 1 else {})
    elif case == "weights only":
        checkpoint.save(folder, model)
        checkpoint.load(folder, model, opt)
    checkpoint.load(folder, model, ShardedLamb(model.named_parameters()))


REFUSED = {
    "larger": ("ValueError", "is of another model: 0.weight has shape (3, 3) there, but (4, 3) here"),
    "named": ("ValueError", "is of another model: it lacks 2.bias, 2.weight."),
    "adam": ("TypeError", "checkpoints hold the state of Lamb and ShardedLamb, got Adam"),
    "stranger": ("ValueError", "parameter 0 of group 0 is not one of the model's"),
    "extra": ("ValueError", "has no extra 'scheduler', only []"),
    "groups": ("ValueError", "has 1 parameter groups, this optimizer has 2"),
    "one rank's extra": ("TypeError", "extra.x is object"),
    "weights only": ("ValueError", "holds weights only: load it with optimizer=None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_raise_on_every_rank(case: str, tmp_path: Path) -> None:
    kind, text = REFUSED[case]
    for rank, (name, message) in run_ranks_expecting_errors(2, refusing, tmp_path / "c", case).items():
        assert name == kind, message
        assert text in message
        assert message.startswith("on rank ") == (case == "one rank's extra" and rank == 0)


# -- together -----------------------------------------------------------------------------------------------------


def apart(rank: int, folder: Path, what: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    if what == "stages":  # of a pipeline, a path per stage
        checkpoint.save(folder / f"stage{rank // 2}", model)
    elif what == "models":
        checkpoint.save(folder / "c", model if rank < 2 else nn.Linear(3, 3))
    elif what == "load":
        for number in (1, 2):
            checkpoint.save(folder / f"s{number}", model)
        checkpoint.load(folder / f"s{1 + rank % 2}", model)


@pytest.mark.parametrize(
    ("what", "text"),
    [("stages", "the path differs"), ("models", "the model differs"), ("load", "the path differs")],
)
def test_ranks_that_disagree_raise(what: str, text: str, tmp_path: Path) -> None:
    """They would report success for weights that no rank wrote, or resume from different steps."""
    for kind, message in run_ranks_expecting_errors(4, apart, tmp_path, what).values():
        assert kind == "ValueError"
        assert text in message
        assert "process_group=" in message


def stages(rank: int, folder: Path) -> list[float]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.Linear(3, 3)
    nn.init.constant_(model.weight, rank // 2 + 1.0)
    path, group = folder / f"stage{rank // 2}", groups[rank // 2]
    checkpoint.save(path, model, process_group=group)
    nn.init.zeros_(model.weight)
    checkpoint.load(path, model, process_group=group)
    return [float(model.weight.min()), float(model.weight.max())]


def test_weights_of_some_of_the_ranks(tmp_path: Path) -> None:
    assert run_ranks(4, stages, tmp_path) == [[1.0, 1.0]] * 2 + [[2.0, 2.0]] * 2


def before_and_after(rank: int, folder: Path) -> None:
    """Loads a model before the process group exists, and saves it afterwards."""
    from sharded_lamb.checkpoint import rank_group

    model = nn.Linear(3, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_group.dist, "is_initialized", lambda: False)
        assert rank_group.RankGroup.of().size == 1
    assert rank_group.RankGroup.of().size == 2
    checkpoint.save(folder, model)


def test_ranks_follow_the_process_group(tmp_path: Path) -> None:
    run_ranks(2, before_and_after, tmp_path / "c")
    assert checkpoint.problem_with(tmp_path / "c") is None


@pytest.mark.parametrize("behind", [False, True], ids=["save", "async"])
def test_only_a_checkpoint_is_replaced(behind: bool, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoint.save(tmp_path / "step-00000001", model)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="are not part of a checkpoint"):
        checkpoint.async_save(tmp_path, model).result() if behind else checkpoint.save(tmp_path, model)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert checkpoint.problem_with(tmp_path / "step-00000001") is None
    checkpoint.save(tmp_path / "step-00000001", model)  # replaces a checkpoint
    (tmp_path / "step-00000001" / "SHA256SUMS").unlink()
    checkpoint.save(tmp_path / "step-00000001", model)  # and a damaged one
    (tmp_path / "new").mkdir()
    checkpoint.save(tmp_path / "new", model)


class Amax(nn.Module):
    """A module whose own state is a tensor, of any length."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.values)

    def set_extra_state(self, state: Tensor) -> None:
        self.values = state.tolist()


def test_extra_state_that_is_a_tensor(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", Amax([7.0, 8.0]))
    again = Amax([1.0])
    checkpoint.load(tmp_path / "c", again)
    assert again.values == [7.0, 8.0]


def staging_fails(rank: int, folder: Path) -> None:
    from sharded_lamb.checkpoint import saving

    model = nn.Linear(2, 2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(
                saving.DefaultStager, "stage", lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
            )
        with pytest.raises((MemoryError, RuntimeError), match="no room"):
            checkpoint.async_save(folder, model)
    checkpoint.async_save(folder, model).result()  # no save is pending


def test_staging_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    run_ranks(2, staging_fails, tmp_path / "c", timeout=60)
    assert checkpoint.problem_with(tmp_path / "c") is None


# -- while training -----------------------------------------------------------------------------------------------


def behind(rank: int, layout: Layout, folder: Path) -> tuple[Any, Any]:
    model, opt = build(layout)
    steps(model, opt, range(2))
    at_save = whole(model, opt)
    writing = checkpoint.async_save(folder, model, opt)
    steps(model, opt, range(2, 4))
    with pytest.raises(ValueError, match=r"is being written: call result\(\)"):
        checkpoint.save(folder, model, opt)
    assert writing.result() == folder
    steps(model, opt, range(4, 5))
    checkpoint.load(folder, model, opt)
    return at_save, whole(model, opt)


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(2, 1), Layout(3, 2), Layout(2)], ids=str)
def test_training_continues_during_an_async_save(layout: Layout, tmp_path: Path) -> None:
    (weights, state), (loaded, full) = run_ranks(layout.world, behind, layout, tmp_path / "c")[0]
    training.assert_same_bits(loaded, weights)
    for place, entry in state.items():
        training.assert_same_bits(full[place], entry)


# -- torch.distributed.checkpoint ---------------------------------------------------------------------------------


def through_torch(rank: int, folder: Path) -> None:
    """Our writer and reader under torch.distributed.checkpoint, for tensors of any kind."""
    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(6.0).view(3, 2)
    state = {"a": distribute_tensor(value, mesh, [Shard(0)]), "b": torch.ones(3)}
    dcp.save(state, storage_writer=checkpoint.Writer(folder))
    room = {"a": distribute_tensor(torch.zeros(3, 2), mesh, [Shard(1)]), "b": torch.zeros(3)}
    dcp.load(room, storage_reader=checkpoint.Reader(folder))
    assert torch.equal(room["a"].full_tensor(), value)  # type: ignore[attr-defined]
    assert torch.equal(room["b"], torch.ones(3))


def test_writer_and_reader_under_torch(tmp_path: Path) -> None:
    run_ranks(2, through_torch, tmp_path / "c")


def pickled(rank: int, folder: Path) -> None:
    dcp.save({"position": {"step": object}}, storage_writer=checkpoint.Writer(folder))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match="would be pickled"):
        pickled(0, tmp_path / "c")
