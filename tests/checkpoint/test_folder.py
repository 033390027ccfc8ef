"""A run's folder holds a whole checkpoint to resume from, whenever the power fails."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb import ShardedLamb, checkpoint, faults
from sharded_lamb.checkpoint import CheckpointError, Checkpoints, durable
from tests import fork_server, harness, training
from tests.harness import run_ranks, run_ranks_expecting_errors

POINTS = ("write", "fsync", "manifest", "rename", "latest", "prune")


def make() -> tuple[torch.nn.Module, ShardedLamb]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    return model, ShardedLamb(model.named_parameters(), lr=0.1)


def step(model: torch.nn.Module, opt: ShardedLamb, number: int) -> None:
    for name, p in model.named_parameters():
        p.grad = training.draw(tuple(p.shape), name, number)
    opt.step()


def run_to(number: int) -> tuple[torch.nn.Module, ShardedLamb]:
    """Returns a run after its ``number``-th step."""
    model, opt = make()
    for i in range(number):
        step(model, opt, i)
    return model, opt


def assert_is_at(model: torch.nn.Module, number: int) -> None:
    training.assert_same_bits(dict(model.named_parameters()), dict(run_to(number)[0].named_parameters()))


def save_steps(root: Path, last: int, keep: int = 3) -> None:
    """Resumes, and saves a checkpoint after each step."""
    model, opt = make()
    checkpoints = Checkpoints(root, keep=keep)
    resumed = checkpoints.resume(model, opt)
    for number in range(resumed.step if resumed else 0, last):
        step(model, opt, number)
        checkpoints.save(number + 1, model, opt, {"position": {"step": number + 1}})


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, keep=2)
    assert names(tmp_path) == {"latest", "step-00000004", "step-00000005"}
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    model, opt = make()
    resumed = Checkpoints(tmp_path).resume(model, opt)
    assert resumed is not None
    assert (resumed.step, resumed.path, resumed.skipped) == (5, tmp_path / "step-00000005", ())
    assert resumed.extra == {"position": {"step": 5}}
    assert_is_at(model, 5)


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 5, 9])
def test_how_many_are_kept(keep: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for last in range(1, 9):
        checkpoints.save(last, torch.nn.Linear(2, 1))
        kept = range(max(1, last - keep + 1) if keep else 1, last + 1)
        assert names(tmp_path) == {"latest", *(f"step-{number:08d}" for number in kept)}


def test_keep_is_checked() -> None:
    with pytest.raises(ValueError, match="keep must be >= 0"):
        Checkpoints("x", keep=-1)


def test_an_empty_or_missing_folder_resumes_nothing(tmp_path: Path) -> None:
    model, opt = make()
    assert Checkpoints(tmp_path / "none").resume(model, opt) is None
    assert Checkpoints(tmp_path).resume(model, opt) is None


def test_checkpoints_after_latest_are_superseded(tmp_path: Path) -> None:
    """`latest` names 2, but 3 and 4 exist: they were abandoned; they are renamed and never deleted."""
    save_steps(tmp_path, 4, keep=0)
    (tmp_path / "latest").write_text("step-00000002\n")
    older = "given-up-1-step-00000004"  # the name that earlier releases gave superseded checkpoints
    (tmp_path / older).mkdir()
    model, opt = make()
    checkpoints = Checkpoints(tmp_path, keep=2)
    resumed = checkpoints.resume(model, opt)
    assert resumed is not None
    assert resumed.step == 2
    step(model, opt, 2)
    checkpoints.save(3, model, opt)
    superseded = "superseded-1-step-00000004"
    assert names(tmp_path) == {"latest", "step-00000002", "step-00000003", superseded, older}
    assert checkpoint.problem_with(tmp_path / superseded) is None
    assert [path.name for path in checkpoints.candidates()] == ["step-00000003", "step-00000002"]


def save_without_resuming(rank: int, root: Path, behind: bool) -> None:
    model, opt = make()
    checkpoints = Checkpoints(root)
    (checkpoints.async_save if behind else checkpoints.save)(1, model, opt)


@pytest.mark.parametrize("behind", [False, True], ids=["save", "async"])
def test_a_run_that_did_not_resume_deletes_nothing_of_an_earlier_run(behind: bool, tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    before = names(tmp_path)
    for kind, message in run_ranks_expecting_errors(2, save_without_resuming, tmp_path, behind).values():
        assert kind == "ValueError"
        assert "holds step-00000003 of an earlier run" in message
        assert "call resume() first" in message
    assert names(tmp_path) == before


def test_an_unreadable_checkpoint_is_kept(tmp_path: Path) -> None:
    """After a disk error or with a newer format, the run resumes from an older checkpoint and keeps both."""
    save_steps(tmp_path, 3)
    (tmp_path / "step-00000003" / "SHA256SUMS").rename(tmp_path / "away")
    model, opt = make()
    checkpoints = Checkpoints(tmp_path, keep=1)
    resumed = checkpoints.resume(model, opt)
    assert resumed is not None
    assert resumed.step == 2
    checkpoints.save(2, model, opt)
    superseded = tmp_path / "superseded-1-step-00000003"
    (tmp_path / "away").rename(superseded / "SHA256SUMS")
    assert checkpoint.problem_with(superseded) is None


def test_steps_are_numbers_beyond_eight_digits(tmp_path: Path) -> None:
    model, opt = make()
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number in (99_999_980, 99_999_990, 100_000_000):
        checkpoints.save(number, model, opt)
    assert [path.name for path in checkpoints.candidates()] == [
        "step-100000000",
        "step-99999990",
        "step-99999980",
    ]


class Interrupted(BaseException):
    pass


def test_a_save_whose_wait_was_interrupted_is_still_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = make()
    checkpoints = Checkpoints(tmp_path)
    go = threading.Event()
    commit = checkpoints.commit
    monkeypatch.setattr(checkpoints, "commit", lambda path: (go.wait(30), commit(path)))
    pending = checkpoints.async_save(5, model, opt)
    monkeypatch.setattr(pending._future, "result", lambda: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        checkpoints.wait()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is being written"):
        checkpoint.save(tmp_path / "other", model, opt)
    go.set()
    checkpoints.save(6, model, opt)
    assert names(tmp_path) == {"latest", "step-00000005", "step-00000006"}
    assert (tmp_path / "latest").read_text() == "step-00000006\n"


@pytest.mark.parametrize("text", [None, "", "step-00000099\n", "../../etc\n", "\udcff"])
def test_without_a_readable_latest_the_newest_is_loaded(text: str | None, tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_bytes(text.encode(errors="surrogateescape"))
    model, opt = make()
    resumed = Checkpoints(tmp_path).resume(model, opt)
    assert resumed is not None
    assert resumed.step == 3


def test_a_damaged_checkpoint_is_logged_and_the_one_before_it_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 3)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    (tmp_path / "step-00000002" / "shard-00000.safetensors").unlink()
    model, opt = make()
    with caplog.at_level("INFO", logger="sharded_lamb"):
        resumed = Checkpoints(tmp_path).resume(model, opt)
    assert resumed is not None
    assert resumed.step == 1
    assert_is_at(model, 1)
    assert len(resumed.skipped) == 2
    assert "step-00000003/manifest.json does not have the hash" in caplog.text
    assert "step-00000002/shard-00000.safetensors is missing" in caplog.text
    assert f"resuming from {tmp_path / 'step-00000001'}" in caplog.text


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    for number in (1, 2):
        (tmp_path / f"step-0000000{number}" / "SHA256SUMS").unlink()
    model, opt = make()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        Checkpoints(tmp_path).resume(model, opt)


def test_a_checkpoint_of_another_model_is_not_skipped(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="is of another model"):
        Checkpoints(tmp_path).resume(model, ShardedLamb(model.named_parameters()))


# -- crashes ------------------------------------------------------------------------------------------------------


def save_with_fault(root: Path, last: int, fault: str) -> None:
    torch.set_num_threads(1)
    os.environ[faults.VARIABLE] = fault
    save_steps(root, last, keep=1)


def exit_code_of_save(root: Path, last: int, fault: str) -> int | None:
    """Saves in a forked process, which ``fault`` may kill; negative: killed by that signal."""
    process = fork_server.context().Process(target=save_with_fault, args=(root, last, fault))
    process.start()
    process.join(100)
    return process.exitcode


@pytest.mark.parametrize("where", POINTS)
def test_killed_anywhere_in_a_save(where: str, tmp_path: Path) -> None:
    """With keep=1, so that there is no older checkpoint."""
    save_steps(tmp_path, 1, keep=1)
    assert exit_code_of_save(tmp_path, 2, f"kill@checkpoint-{where}") == -signal.SIGKILL
    model, opt = make()
    resumed = Checkpoints(tmp_path, keep=1).resume(model, opt)
    assert resumed is not None
    assert resumed.step == (2 if where == "prune" else 1)
    assert resumed.skipped == ()
    assert_is_at(model, resumed.step)
    save_steps(tmp_path, 3, keep=1)  # leftovers of the crash do not interfere
    assert names(tmp_path) == {"latest", "step-00000003"}
    model, opt = make()
    assert Checkpoints(tmp_path).resume(model, opt) is not None
    assert_is_at(model, 3)


def test_the_next_save_removes_leftovers_of_crashes(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for left in (".step-00000077.part", ".step-00000001.dropped"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "shard-00000.safetensors").write_text("half")
    save_steps(tmp_path, 2)
    assert names(tmp_path) == {"latest", "step-00000001", "step-00000002"}


def test_killed_while_one_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file system cannot exchange names, the old checkpoint has a temporary name between two renames."""
    save_steps(tmp_path, 1, keep=1)
    model, opt = run_to(1)
    monkeypatch.setattr(durable, "exchange", lambda *_: False)
    real = Path.rename

    def only_the_first(self: Path, target: Any) -> Any:
        if self.name.endswith(".part"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", only_the_first)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        checkpoint.save(tmp_path / "step-00000001", model, opt)
    monkeypatch.undo()
    target = tmp_path / "step-00000001"
    assert not target.exists()
    for read in (checkpoint.read_contents, lambda path: checkpoint.load(path, model, opt)):
        with pytest.raises(
            CheckpointError, match=re.escape(f"mv {tmp_path / '.step-00000001.old'} {target}")
        ):
            read(target)
    model, opt = make()
    resumed = Checkpoints(tmp_path).resume(model, opt)
    assert resumed is not None
    assert resumed.step == 1
    assert_is_at(model, 1)


def test_a_checkpoint_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems that exchange names, as Linux's do, the checkpoint always exists."""
    save_steps(tmp_path, 1)
    monkeypatch.setattr(
        Path, "rename", lambda *_: pytest.fail("the checkpoint would be missing for a moment")
    )
    checkpoint.save(tmp_path / "step-00000001", *run_to(2))
    monkeypatch.undo()
    assert names(tmp_path) == {"latest", "step-00000001"}
    model, opt = make()
    checkpoint.load(tmp_path / "step-00000001", model, opt)
    assert_is_at(model, 2)


# -- full disks, unshared folders ---------------------------------------------------------------------------------


@contextmanager
def faults_of(text: str) -> Iterator[None]:
    os.environ[faults.VARIABLE] = text
    faults.injector.cache_clear()
    try:
        yield
    finally:
        del os.environ[faults.VARIABLE]
        faults.injector.cache_clear()


def save_on_a_full_disk(rank: int, root: Path, fault: str, behind: bool) -> None:
    model, opt = make()
    with faults_of(fault):
        checkpoints = Checkpoints(root, resumed=True)
        if behind:
            checkpoints.async_save(2, model, opt)
            checkpoints.wait()
        else:
            checkpoints.save(2, model, opt)


def saved(rank: int, root: Path) -> None:
    model, opt = make()
    Checkpoints(root).save(1, model, opt)


@pytest.mark.parametrize("behind", [False, True], ids=["save", "async"])
@pytest.mark.parametrize("fault", ["write:rank=1", "fsync:rank=0", "manifest", "rename", "latest"])
def test_a_full_disk(fault: str, behind: bool, tmp_path: Path) -> None:
    run_ranks(2, saved, tmp_path)
    failed = run_ranks_expecting_errors(2, save_on_a_full_disk, tmp_path, f"full@checkpoint-{fault}", behind)
    for kind, message in failed.values():
        assert kind == "OSError"
        assert "No space left" in message
        if fault == "latest":
            assert "step-00000002 was written, but the post-save step failed: `latest` still names" in message
        else:
            assert "step-00000002 could not be written" in message
            assert "earlier checkpoints are untouched" in message
    assert checkpoint.problem_with(tmp_path / "step-00000001") is None
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_failing_to_delete_old_checkpoints_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1)
    model, opt = run_to(2)
    with faults_of("full@checkpoint-prune"), caplog.at_level("WARNING", "sharded_lamb"):
        Checkpoints(tmp_path, keep=1, resumed=True).save(2, model, opt)
    assert "could not be deleted or renamed" in caplog.text
    assert names(tmp_path) == {"latest", "step-00000001", "step-00000002"}
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def save_on_own_disks(rank: int, root: Path) -> None:
    if rank == 1:
        clone_newns = 0x20000  # gives this thread its own mounts
        assert ctypes.CDLL(None).unshare(clone_newns) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", root], check=True)
    model, opt = make()
    checkpoint.save(root / "c", model, opt)


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0,
    reason="mounts of a process's own need root",
)
def test_an_unshared_folder_is_named_with_its_host(tmp_path: Path) -> None:
    errors = run_ranks_expecting_errors(2, save_on_own_disks, tmp_path)
    harness.shutdown_pools()  # one worker has other mounts now
    for kind, message in errors.values():
        assert kind == "OSError"
        assert "does not exist on host" in message
        assert "checkpoints need a folder that all ranks see" in message


def test_a_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, opt = make()
    with pytest.raises(OSError, match="could not be written"):
        checkpoint.save(tmp_path / "file" / "c", model, opt)


def resume_on_two(rank: int, root: Path) -> tuple[int, tuple[str, ...]]:
    model, opt = make()
    resumed = Checkpoints(root).resume(model, opt)
    assert resumed is not None
    assert_is_at(model, resumed.step)
    return resumed.step, resumed.skipped


def test_ranks_fall_back_together(tmp_path: Path) -> None:
    """The second rank verifies the damaged file."""
    save_steps(tmp_path, 2)
    shutil.copy(tmp_path / "step-00000002" / "manifest.json", tmp_path / "step-00000002" / "SHA256SUMS")
    results = run_ranks(2, resume_on_two, tmp_path)
    assert [step for step, _ in results] == [1, 1]
    assert all("SHA256SUMS is damaged" in skipped[0] for _, skipped in results)
