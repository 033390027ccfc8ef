"""Mistakes of users raise an error on every rank, and lose none of their files."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.checkpoint import CheckpointError, Checkpoints, durable, plain, saving, storage
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors


def linear(value: float) -> nn.Linear:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, value)
    return model


def value_of(path: Path) -> float:
    model = linear(-1.0)
    checkpoint.load(path, model)
    return float(model.weight.detach().mean())


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


# -- foreign folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["shard-000000.tar", "tokenizer.json", "step-00000001/x", "manifest.jsonl"], ids=str
)
def test_a_folder_with_anything_else_in_it_is_not_replaced(name: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", linear(1.0))
    user_file = tmp_path / "c" / name
    user_file.parent.mkdir(exist_ok=True)
    user_file.write_text("mine")
    with pytest.raises(FileExistsError, match=f"not part of a checkpoint \\({name.partition('/')[0]}"):
        checkpoint.save(tmp_path / "c", linear(2.0))
    assert user_file.read_text() == "mine"
    assert value_of(tmp_path / "c") == 1.0
    assert names(tmp_path) == {"c"}


def test_foreign_hidden_files_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, linear(1.0))
    for name in (".data.old", ".step-mine.part", ".step-00000002-ema.part", ".step-00000003.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("mine")
    (tmp_path / ".notes.txt.old").write_text("mine")
    before = names(tmp_path)
    checkpoints.resume(linear(0.0))
    checkpoints.save(1, linear(2.0))
    assert names(tmp_path) == before
    assert (tmp_path / ".data.old" / "x").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "last"
    link.symlink_to("elsewhere")
    for value in (1.0, 2.0, 3.0):
        checkpoint.save(link, linear(value))
    assert link.is_symlink()
    assert value_of(tmp_path / "elsewhere") == 3.0
    assert names(tmp_path) == {"elsewhere", "last"}


def test_a_change_of_working_folder_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    monkeypatch.chdir(tmp_path / "b")
    checkpoints.save(1, linear(1.0))
    assert names(tmp_path / "run") == {"latest", "step-00000001"}
    assert names(tmp_path / "b" / "run") == set()


def test_a_run_that_did_not_resume_does_not_prune_an_earlier_one(tmp_path: Path) -> None:
    for number in (100, 200):
        Checkpoints(tmp_path, resumed=True).save(number, linear(1.0))
    with pytest.raises(ValueError, match=r"holds step-00000200 of an earlier run.*call resume\(\) first"):
        Checkpoints(tmp_path, keep=1).save(1000, linear(2.0))
    assert names(tmp_path) == {"latest", "step-00000100", "step-00000200"}


def test_a_run_that_failed_to_resume_saves_nothing(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, linear(1.0))
    (tmp_path / "step-00000001" / "SHA256SUMS").unlink()
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoints.resume(linear(0.0))
    with pytest.raises(ValueError, match="holds step-00000001 of an earlier run"):
        checkpoints.save(2, linear(0.0))


def test_steps_are_not_negative(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        Checkpoints(tmp_path).save(-1, linear(1.0))


# -- two saves at a time ------------------------------------------------------------------------------------------


def test_two_jobs_that_save_to_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later checkpoint replaces the earlier one, whole."""
    target = tmp_path / "last"
    real, seen = storage.Writer.finish, []

    def finish(self: storage.Writer, **keywords: Any) -> None:
        if not seen:  # the other job saves in between
            seen.append(self.target)
            checkpoint.save(target, linear(2.0))
        real(self, **keywords)

    monkeypatch.setattr(storage.Writer, "finish", finish)
    checkpoint.save(target, linear(1.0))
    assert value_of(target) == 1.0
    assert names(tmp_path) == {"last"}


def test_leftovers_of_a_dead_save_are_removed_when_old(tmp_path: Path) -> None:
    left = [tmp_path / f".c.{name}.part" for name in ("0123abcd", "89ef0000", "other")]
    for path in left:
        path.mkdir()
        (path / "shard-00000.safetensors").write_text("half")
    for old in (left[0], left[2]):
        for path in (old / "shard-00000.safetensors", old):
            os.utime(path, (0, 0))
    checkpoint.save(tmp_path / "c", linear(1.0))
    assert names(tmp_path) == {"c", left[1].name, left[2].name}


def again_and_again(rank: int, folder: Path) -> None:
    """Asks for results twice, the first time while another save runs."""
    model = linear(1.0)
    first = checkpoint.async_save(folder / "a", model)
    first.result()
    second = checkpoint.async_save(folder / "b", model)
    first.result()
    with pytest.raises(ValueError, match="/b is being written"):
        checkpoint.async_save(folder / "c", model)
    second.result()
    checkpoint.async_save(folder / "c", model).result()


def test_a_result_may_be_asked_for_twice(tmp_path: Path) -> None:
    run_ranks(2, again_and_again, tmp_path, timeout=60)
    assert [checkpoint.problem_with(tmp_path / name) for name in "abc"] == [None] * 3


def test_a_reported_error_is_not_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    real, full = storage.Writer.finish, [True]

    def finish(self: storage.Writer, **keywords: Any) -> None:
        if full.pop() if full else False:
            raise OSError(28, "No space left on device")
        real(self, **keywords)

    monkeypatch.setattr(storage.Writer, "finish", finish)
    saving = checkpoints.async_save(1, linear(1.0))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            saving.result()
    checkpoints.save(2, linear(2.0))
    assert names(tmp_path) == {"latest", "step-00000002"}


def without_end(rank: int, folder: Path) -> tuple[int, int]:
    counts = []
    for number in range(12):
        checkpoint.async_save(folder / "c", linear(number)).result()
        checkpoint.save(folder / "c", linear(number), process_group=dist.group.WORLD if number % 2 else None)
        counts.append((len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/fd"))))
    assert counts[-1] == counts[2]
    return counts[-1]


def test_groups_and_files_do_not_pile_up(tmp_path: Path) -> None:
    run_ranks(2, without_end, tmp_path)


# -- the old checkpoint exists until the new one does -------------------------------------------------------------


def test_without_exchange_the_old_checkpoint_is_deleted_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash between two renames on NFS, without a resume."""
    monkeypatch.setattr(durable, "exchange", lambda *_: False)
    checkpoint.save(tmp_path / "last", linear(1.0))
    (tmp_path / "last").rename(tmp_path / ".last.old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        assert (tmp_path / ".last.old").is_dir()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    checkpoint.save(tmp_path / "last", linear(2.0))
    assert value_of(tmp_path / "last") == 2.0
    assert names(tmp_path) == {"last"}


def test_listing_candidates_renames_nothing(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, linear(1.0))
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.old")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.candidates() == []
    resumed = checkpoints.resume(linear(0.0))
    assert resumed is not None
    assert resumed.step == 1


# -- ranks --------------------------------------------------------------------------------------------------------


def alone(rank: int, folder: Path, case: str) -> None:
    model = nn.Sequential(linear(1.0))
    opt: Any = ShardedLamb(model.named_parameters(), lr=0.1)
    if case == "optimizer":
        opt = torch.optim.Adam(model.parameters()) if rank == 1 else Lamb(model.named_parameters())
    if case == "no optimizer":
        opt = Lamb(model.named_parameters()) if rank == 0 else None
    path: Any = folder
    if case == "no path" and rank == 1:
        path = None
    group = None
    if case == "group":
        group = dist.new_group([0])
        if rank == 0:
            checkpoint.save(path, model, process_group=group)
    if case == "load":
        Checkpoints(folder).save(1, model, opt)
        path = folder / "step-00000001"
        checkpoint.load(path, model, opt if rank == 0 else None)
    if case == "written":

        class Odd(Exception):
            pass

        def raises(_: Path) -> None:
            raise Odd("mine")

        checkpoint.save(path, model, opt, written=raises)
    if case == "destroyed":
        dist.barrier()
        dist.destroy_process_group()
    if case != "group" or rank == 1:
        checkpoint.save(path, model, opt, process_group=group)
    raise RuntimeError("rank 0 is content")


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("optimizer", "TypeError", "got Adam"),
        (
            "no optimizer",
            "ValueError",
            "the optimizer differs between ranks: rank 0 has Lamb, rank 1 has none",
        ),
        ("no path", "TypeError", "NoneType"),
        ("load", "ValueError", "the optimizer differs between ranks"),
        ("written", "RuntimeError", "Odd: mine"),
        ("destroyed", "ValueError", "there is no process group: save before destroy_process_group()"),
    ],
)
def test_one_ranks_mistake_is_an_error_on_all(case: str, kind: str, message: str, tmp_path: Path) -> None:
    failed = run_ranks_expecting_errors(2, alone, tmp_path / "c", case, timeout=60)
    assert set(failed) == {0, 1}
    for name, text in failed.values():
        assert name == kind
        assert message in text


def test_a_rank_outside_the_group_raises(tmp_path: Path) -> None:
    failed = run_ranks_expecting_errors(2, alone, tmp_path / "c", "group", timeout=60)
    assert failed[1] == (
        "ValueError",
        "this rank is not in process_group: call save and load on its ranks only",
    )
    assert failed[0][1] == "rank 0 is content"


# -- models -------------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """Buffers that differ between ranks, as running statistics do."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        for number in range(6):
            self.register_buffer(f"mean{number}", torch.full((3 + number,), float(rank)))


def save_statistics(rank: int, folder: Path, behind: bool) -> None:
    if behind:
        checkpoint.async_save(folder, Statistics(rank)).result()
    else:
        checkpoint.save(folder, Statistics(rank))


@pytest.mark.parametrize("behind", [False, True], ids=["save", "async"])
def test_buffers_that_differ_between_ranks_are_those_of_the_first(behind: bool, tmp_path: Path) -> None:
    run_ranks(3, save_statistics, tmp_path / "c", behind)
    again = Statistics(7)
    checkpoint.load(tmp_path / "c", again)
    assert {float(value) for buffer in again.buffers() for value in buffer} == {0.0}


class Copied(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.clone()


def expanded() -> nn.Module:
    model = linear(1.0)
    model.register_buffer("mask", torch.zeros(1).expand(8))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copied(2, 2), r"weight in the model's state_dict\(\) is a copy"),
        (
            lambda: nn.Linear(2, 2, device="meta"),
            r"weight is on the meta device.*call model.to_empty\(\) first",
        ),
        (expanded, "mask is expanded, and its elements share memory"),
    ],
    ids=["copy", "meta", "expanded"],
)
def test_a_model_that_cannot_be_loaded_into_is_rejected(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    model = make()
    plainly = nn.Linear(model.in_features, model.out_features)  # type: ignore[arg-type]
    for name, buffer in model.named_buffers():
        plainly.register_buffer(name, buffer.clone())
    checkpoint.save(tmp_path / "c", plainly)
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "c", model)
    after: dict[str, Tensor] = {name: model.state_dict()[name] for name in before}
    training.assert_same_bits(after, before)


def test_extra_state_on_one_side_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": torch.ones(2)}

        def set_extra_state(self, state: Any) -> None:
            pytest.fail("there is none")

    checkpoint.save(tmp_path / "with", Own(2, 2))
    with pytest.raises(ValueError, match="this model lacks _extra_state"):
        checkpoint.load(tmp_path / "with", nn.Linear(2, 2))
    checkpoint.save(tmp_path / "without", nn.Linear(2, 2))
    with caplog.at_level("WARNING", "sharded_lamb"):
        checkpoint.load(tmp_path / "without", Own(2, 2))
    assert "lacks _extra_state" in caplog.text


# -- extra --------------------------------------------------------------------------------------------------------


def test_names_in_extra(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="extra has the name 3: names must be strings"):
        checkpoint.save(tmp_path / "c", linear(1.0), extra={3: 4})  # type: ignore[dict-item]

    class Own(nn.Linear):
        def get_extra_state(self) -> Any:
            return torch.ones(2)

        def set_extra_state(self, state: Any) -> None:
            assert torch.equal(state, torch.ones(2))

    checkpoint.save(tmp_path / "c", Own(2, 2), extra={"model": {"_extra_state": torch.zeros(3)}})
    extra = checkpoint.load(tmp_path / "c", Own(2, 2))
    assert torch.equal(extra["model"]["_extra_state"], torch.zeros(3))


def test_a_dtype_is_a_dtype() -> None:
    with pytest.raises(KeyError):
        plain.decoded({"__dtype__": "load"}, lambda name: name)
    assert plain.decoded({"__dtype__": "bfloat16"}, lambda name: name) is torch.bfloat16


def test_a_default_device_does_not_matter(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", linear(1.0), extra={"rng": torch.arange(3)})
    model = linear(0.0)
    with torch.device("meta"):
        extra = checkpoint.load(tmp_path / "c", model)
    assert extra["rng"].tolist() == [0, 1, 2]
    assert float(model.weight.detach().mean()) == 1.0


# -- a save behind, whose process group goes ------------------------------------------------------------------------


def destroyed_behind(rank: int, folder: Path) -> None:
    """The thread begins once the groups are gone: torch would save each rank's parts alone, as whole checkpoints."""
    model = nn.Linear(8, 64)
    opt = ShardedLamb(model.named_parameters())
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    checkpoints, gone, write = Checkpoints(folder, keep=1), threading.Event(), saving._write

    def late(*arguments: Any) -> None:
        assert gone.wait(60)
        write(*arguments)

    checkpoints.save(1, model, opt)
    with mock.patch.object(saving, "_write", late):
        pending = checkpoints.async_save(2, model, opt)
        dist.barrier()
        dist.destroy_process_group()
        gone.set()
        with pytest.raises(
            RuntimeError, match=r"step-00000002 was not completed here: .*before destroy_process_group\(\)"
        ):
            pending.result()


def test_a_save_behind_commits_nothing_once_the_process_group_is_destroyed(tmp_path: Path) -> None:
    run_ranks(2, destroyed_behind, tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"latest", "step-00000001"}
    assert checkpoint.problem_with(tmp_path / "c" / "step-00000001") is None
