"""Ranks that meet, in a store that earlier attempts have used, and connect."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from sharded_lamb.recipes.training.ranks import Ranks, of_this_attempt, wait_for_all
from tests.harness import run_ranks


def meet(folder: Path, order: list[int], attempt: str) -> None:
    """Ranks come in ``order``, each when the one before has said so; all then see what each wrote."""

    def come(rank: int) -> str:
        store = dist.FileStore(str(folder / "store"), -1)  # type: ignore[attr-defined]
        name = of_this_attempt(store, rank, len(order), timeout_s=20)
        name.set(f"here {rank}", attempt)
        return ",".join(name.get(f"here {other}").decode() for other in range(len(order)))

    with ThreadPoolExecutor(len(order)) as pool:
        running = []
        for rank in order:
            running.append(pool.submit(come, rank))
            with pytest.raises(TimeoutError):  # it waits for the others
                running[0].result(0.3 if len(running) < len(order) else 0)
        assert [one.result(30) for one in running] == [",".join([attempt] * len(order))] * len(order)


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [2, 0, 1], [0, 2, 1]])
def test_what_an_earlier_attempt_left_is_not_taken_for_this_ones(order: list[int], tmp_path: Path) -> None:
    for attempt in ("first", "second", "third"):
        meet(tmp_path, order, attempt)


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), -1)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] of 3 did not join within 0.2 s"):
        of_this_attempt(store, 0, 3, timeout_s=0.2)


def connected(rank: int) -> bool:
    """Rank 1 is slow to connect; whether it had when this rank's `start` returned."""
    store = dist.distributed_c10d._get_default_store()
    real = dist.new_group

    def slow(**options: Any) -> Any:
        group = real(**options)
        if rank == 1:
            time.sleep(0.3)
            store.set("rank 1 has connected", "")
        return group

    with mock.patch.object(dist, "new_group", slow):
        Ranks.start()
    return bool(store.check(["rank 1 has connected"]))


def test_no_rank_goes_on_before_all_are_connected() -> None:
    """A rank that ends at once, as after bad input, breaks the connections of those that still connect."""
    assert run_ranks(3, connected) == [True] * 3


def test_rank_0_which_may_serve_the_store_is_the_last_to_go_on() -> None:
    store, order, late = dist.HashStore(), [], threading.Event()  # type: ignore[attr-defined]

    def first_waits(keys: list[str], limit: Any) -> None:
        if "left/1" in keys:
            late.set()
        store.wait(keys, limit)

    def other_waits(keys: list[str], limit: Any) -> None:
        store.wait(keys, limit)
        assert late.wait(30)  # its answer comes once rank 0 waits for it, or has gone on
        order.append("rank 1")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(wait_for_all, mock.Mock(wraps=store, wait=other_waits), 1, 2)
        wait_for_all(mock.Mock(wraps=store, wait=first_waits), 0, 2)
        order.append("rank 0")
        late.set()
        other.result(30)
    assert order == ["rank 1", "rank 0"]
