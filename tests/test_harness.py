"""The harness itself: results, errors, hangs and crashes are reported by rank, and none outlives its case."""

import importlib.util
import os
import signal
import sys
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_lamb.comm import consistency
from sharded_lamb.comm.topology import Topology
from tests import harness
from tests.harness import RankErrors, run_ranks, run_ranks_expecting_errors

_earlier_group: weakref.ref[Any] | None = None


def _gather_sum(rank: int, tensor: torch.Tensor, *, scale: float = 1.0) -> dict[str, object]:
    total = tensor * scale * (rank + 1)
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "world": dist.get_world_size(), "total": total}


def _pid(rank: int) -> int:
    return os.getpid()


def _environment(rank: int) -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def _one_rank_raises_before_a_collective(rank: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"no good on rank {rank}")
    dist.barrier()


def _handles_the_signal(rank: int) -> None:
    """As the recipe, which saves at SIGUSR1, and restores the handler that Python knows of."""
    signal.signal(signal.SIGUSR1, signal.signal(signal.SIGUSR1, signal.SIG_IGN))


def _all_raise(rank: int) -> None:
    raise KeyError(f"rank {rank}")


def _only_rank_0_returns(rank: int) -> None:
    if rank:
        raise RuntimeError("not rank 0")


def _sleep_forever(rank: int) -> None:
    while True:
        time.sleep(0.1)


def _rank_1_dies(rank: int) -> None:
    if rank == 1:
        os.write(2, b"last words")
        os._exit(7)
    dist.barrier()


def _leave_a_mess(rank: int) -> None:
    os.environ["RANK"] = "99"
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    group = dist.new_group()
    dist.all_reduce(torch.zeros(1), group=group)


def _look_for_a_mess(rank: int) -> tuple[str, torch.dtype, int, int, float]:
    groups = len(dist.distributed_c10d._world.pg_map)
    threads = torch.get_num_threads()
    return os.environ["RANK"], torch.get_default_dtype(), threads, groups, torch.rand(()).item()


def _destroy_the_group(rank: int) -> None:
    dist.destroy_process_group()


def _leave_collectives_half_done(rank: int) -> None:
    """Ranks wait for others in the default group and in one that torch names by its ranks; one key is left behind."""
    named = dist.new_group(use_local_synchronization=True)
    dist.distributed_c10d._get_default_store().set("stale", str(rank))
    if rank == 0:
        dist.all_reduce(torch.ones(1), async_op=True)
    else:
        dist.all_reduce(torch.ones(3), group=named, async_op=True)
        dist.irecv(torch.zeros(5), src=0)
    raise ValueError("in the middle")


def _construct_one_more_on_rank_0(rank: int) -> None:
    for _ in range(2 - rank):
        consistency.check_consistency(Topology.of(None, None), [("number", 1)], timeout_s=0.5)
    raise ValueError("in the middle")


def _construct(rank: int) -> None:
    consistency.check_consistency(Topology.of(None, None), [("number", 1)], timeout_s=20)


def _wait_for_each_other(rank: int) -> None:
    """In one group, at two collectives: its destruction waits for both."""
    dist.broadcast(torch.ones(1), src=1 - rank, async_op=True)
    raise ValueError("in the middle")


def _leave_a_named_group(rank: int) -> None:
    dist.all_reduce(torch.ones(1), group=dist.new_group(use_local_synchronization=True))


def _remember_the_group(rank: int, raises: bool) -> None:
    global _earlier_group
    _earlier_group = weakref.ref(dist.group.WORLD)
    if raises:
        raise ValueError("in the middle")


def _look_at_the_group(rank: int) -> dict[str, object]:
    total, of_named = torch.tensor([rank + 1.0]), torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    dist.all_reduce(of_named, group=dist.new_group(use_local_synchronization=True))
    return {
        "totals": (total.item(), of_named.item()),
        "ranks": (dist.get_rank(), dist.get_world_size()),
        "stale": dist.distributed_c10d._get_default_store().check(["stale"]),
        "same": _earlier_group is not None and _earlier_group() is dist.group.WORLD,
        "kept": _earlier_group is not None and _earlier_group() is not None,
    }


def _preloaded(rank: int) -> dict[str, bool]:
    assert "tests.preloaded" in sys.modules
    from tests import preloaded

    return {name: name in sys.modules for name in preloaded.NAMES}


def _unpicklable(rank: int) -> object:
    return lambda: rank


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    results = run_ranks(world_size, _gather_sum, torch.ones(3), scale=2.0)
    assert [result["rank"] for result in results] == list(range(world_size))
    expected = torch.full((3,), 2.0 * sum(range(1, world_size + 1)))
    for result in results:
        assert result["world"] == world_size
        assert torch.equal(result["total"], expected)


def test_workers_are_reused() -> None:
    pids = run_ranks(2, _pid)
    for _ in range(50):
        assert run_ranks(2, _pid) == pids
    assert len({*pids, os.getpid()}) == 3


def test_environment_is_that_of_a_launcher() -> None:
    assert run_ranks(2, _environment) == [("0", "0", "2"), ("1", "1", "2")]


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_is_reported_while_others_wait_for_it(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_GRACE_AFTER_ERROR", 2.0)  # they wait without end
    run_ranks(3, _handles_the_signal)
    pids = run_ranks(3, _pid)
    begin = time.monotonic()
    with pytest.raises(RankErrors, match=f"no good on rank {bad}") as caught:
        run_ranks(3, _one_rank_raises_before_a_collective, bad, timeout=60)
    assert time.monotonic() - begin < 30
    error = caught.value.errors[bad]
    assert (error.kind, error.message) == ("ValueError", f"no good on rank {bad}")
    assert "_one_rank_raises_before_a_collective" in error.traceback
    waiting = {rank: error.kind for rank, error in caught.value.errors.items() if rank != bad}
    assert waiting == dict.fromkeys({0, 1, 2} - {bad}, "Abandoned")
    assert "in barrier" in str(caught.value)  # where the others were
    assert not set(run_ranks(3, _pid)) & set(pids)


def test_a_rank_that_returns_is_not_among_the_errors() -> None:
    with pytest.raises(RankErrors, match="rank 0: returned") as caught:
        run_ranks(2, _only_rank_0_returns)
    assert caught.value.returned == [0]
    assert set(caught.value.errors) == {1}


def test_expected_errors() -> None:
    expected = {rank: ("KeyError", f"'rank {rank}'") for rank in range(3)}
    assert run_ranks_expecting_errors(3, _all_raise) == expected


def test_expected_errors_must_come_from_every_rank() -> None:
    with pytest.raises(AssertionError, match="all 2 ranks returned"):
        run_ranks_expecting_errors(2, _pid)
    with pytest.raises(RankErrors, match="rank 0: returned"):
        run_ranks_expecting_errors(2, _only_rank_0_returns)
    with pytest.raises(RankErrors, match="Timeout"):
        run_ranks_expecting_errors(2, _one_rank_raises_before_a_collective, 0, timeout=2)


def test_a_hang_ends_at_the_timeout_with_the_stack() -> None:
    run_ranks(2, _pid)
    begin = time.monotonic()
    with pytest.raises(RankErrors, match="in _sleep_forever") as caught:
        run_ranks(2, _sleep_forever, timeout=1)
    assert time.monotonic() - begin < 10
    assert {rank: error.kind for rank, error in caught.value.errors.items()} == {0: "Timeout", 1: "Timeout"}
    assert len(run_ranks(2, _pid)) == 2


def test_a_dead_worker_is_reported_with_its_output() -> None:
    with pytest.raises(RankErrors) as caught:
        run_ranks(2, _rank_1_dies)
    assert caught.value.errors[1].kind == "Died"
    assert "exit code 7" in caught.value.errors[1].message
    assert "last words" in caught.value.errors[1].message


def test_a_worker_that_died_between_cases_is_reported() -> None:
    os.kill(run_ranks(2, _pid)[1], 9)
    with pytest.raises(RankErrors) as caught:
        run_ranks(2, _gather_sum, torch.ones(1))
    assert caught.value.errors[1].kind == "Died"
    assert len(run_ranks(2, _pid)) == 2


def test_a_case_does_not_see_what_the_last_one_left() -> None:
    first = run_ranks(2, _look_for_a_mess)
    assert [result[:4] for result in first] == [(rank, torch.float32, 1, 1) for rank in ("0", "1")]
    pids = run_ranks(2, _pid)
    run_ranks(2, _leave_a_mess)
    assert run_ranks(2, _look_for_a_mess) == first
    assert run_ranks(2, _pid) == pids


def _assert_renewed(world_size: int) -> None:
    """The default group works, is not the remembered one, and finds nothing of an earlier one in the store."""
    total = world_size * (world_size + 1) / 2
    for rank, results in enumerate(run_ranks(world_size, _look_at_the_group)):
        assert results.pop("ranks") == (rank, world_size)
        assert results == {"totals": (total, total), "stale": False, "same": False, "kept": False}


def test_a_case_may_destroy_its_process_group() -> None:
    pids = run_ranks(2, _pid)
    run_ranks(2, _destroy_the_group)
    assert run_ranks(2, _gather_sum, torch.ones(1))[1]["world"] == 2
    assert run_ranks(2, _pid) == pids


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_where_every_rank_raises_workers_stay_and_their_group_is_new(world_size: int) -> None:
    run_ranks(world_size, _remember_the_group, False)
    assert all(results["same"] for results in run_ranks(world_size, _look_at_the_group)), (
        "nothing to tell apart"
    )
    pids = run_ranks(world_size, _pid)
    for _ in range(2):
        run_ranks_expecting_errors(world_size, _remember_the_group, True)
        _assert_renewed(world_size)
    assert run_ranks(world_size, _pid) == pids


def test_where_some_ranks_raise_and_the_others_return_workers_stay() -> None:
    pids = run_ranks(2, _pid)
    with pytest.raises(RankErrors, match="rank 0: returned"):
        run_ranks(2, _only_rank_0_returns)
    _assert_renewed(2)
    assert run_ranks(2, _pid) == pids


def test_collectives_that_errors_leave_half_done_do_not_reach_the_next_case() -> None:
    pids = run_ranks(3, _pid)
    for _ in range(2):
        run_ranks_expecting_errors(3, _leave_collectives_half_done)
        _assert_renewed(3)
    assert run_ranks(3, _pid) == pids


def test_ranks_that_constructed_unlike_numbers_of_optimizers_meet_again() -> None:
    pids = run_ranks(2, _pid)
    kinds = {kind for kind, _ in run_ranks_expecting_errors(2, _construct_one_more_on_rank_0).values()}
    assert kinds == {"RuntimeError", "ValueError"}
    run_ranks(2, _construct)
    assert run_ranks(2, _pid) == pids


def test_a_group_that_cannot_be_destroyed_costs_new_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_RENEWAL_TIMEOUT", 1.0)
    pids = run_ranks(2, _pid)
    begin = time.monotonic()
    run_ranks_expecting_errors(2, _wait_for_each_other)
    _assert_renewed(2)
    assert time.monotonic() - begin < 60
    assert not set(run_ranks(2, _pid)) & set(pids)


def test_groups_named_by_their_ranks_are_made_again_under_the_same_name() -> None:
    pids = run_ranks(2, _pid)
    for _ in range(2):
        run_ranks(2, _leave_a_named_group)
        _assert_renewed(2)
    assert run_ranks(2, _pid) == pids


def test_workers_have_imported_what_their_server_preloads() -> None:
    (results,) = run_ranks(1, _preloaded)
    assert {"torch", "sharded_lamb", "tests.harness"} <= results.keys()
    assert results == {name: importlib.util.find_spec(name.split(".")[0]) is not None for name in results}


def test_a_result_that_cannot_travel_is_an_error() -> None:
    with pytest.raises(RankErrors, match="pickle"):
        run_ranks(1, _unpicklable)


def test_shutdown_ends_every_process() -> None:
    pids = run_ranks(2, _pid)
    harness.shutdown_pools()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _leak_threads(rank: int) -> int:
    for _ in range(60):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def test_workers_with_too_many_threads_are_replaced() -> None:
    """Connections that are never closed are polled by threads, and make every later case slower."""
    worn = run_ranks(2, _leak_threads)
    assert not {*worn} & {*run_ranks(2, _pid)}
