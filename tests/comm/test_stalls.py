"""Ranks that call backward or step on some ranks only raise on all of them; slow ranks do not."""

import json
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import nn
from torch.distributed import HashStore, PrefixStore

from sharded_lamb import ShardedLamb
from sharded_lamb.comm import stalls
from sharded_lamb.comm.collectives import _completes
from sharded_lamb.comm.groups import timeout_of_default
from sharded_lamb.comm.stalls import Post, stuck_ranks
from tests.harness import run_ranks, run_ranks_expecting_errors

ROUNDS = 4


def train(rank: int, stage: int, differs: str, odd: int) -> None:
    """Rank ``odd`` makes one call less, or late, in the second of `ROUNDS` rounds."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    opt = ShardedLamb(model.named_parameters(), stage=stage, bucket_mb=0.001)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("backward", lambda: model(torch.ones(2, 40)).square().mean().backward()),
        *([("clip", lambda: opt.clip_grad_norm_(1.0))] if "clip" in differs else []),
        ("step", opt.step),
    ]
    with mock.patch.object(stalls, "PATIENCE", 0.4), mock.patch.object(stalls, "PERIOD", 0.3):
        for number in range(ROUNDS):
            for name, call in calls:
                if rank == odd and number == 1 and name in differs:
                    if differs == name:
                        continue
                    time.sleep(2.5)  # "late …"
                call()
            opt.zero_grad()


@pytest.mark.parametrize(
    ("stage", "missing", "ranks"), [(2, "step", 3), (2, "step", 2), (2, "clip", 2), (1, "clip", 2)]
)
def test_a_missing_call_is_an_error_on_every_rank(stage: int, missing: str, ranks: int) -> None:
    failed = run_ranks_expecting_errors(ranks, train, stage, missing, 1, timeout=60)
    for kind, message in failed.values():
        assert kind in ("RuntimeError", "ValueError"), message
        assert "step" in message, message


@pytest.mark.parametrize("late", ["late backward", "late clip", "late step"])
def test_a_late_rank_is_waited_for(late: str) -> None:
    run_ranks(2, train, 2, late, 0)


def gather(rank: int, reads: bool) -> None:
    """The first rank alone gathers the whole state, or backward reaches it alone before parameters are registered."""
    model = nn.ModuleList([nn.Linear(40, 30), nn.Linear(40, 20)])
    model[1].requires_grad_(False)
    opt = ShardedLamb(model.named_parameters(), stage=2)

    def backward() -> None:
        model[0](torch.ones(2, 40)).square().mean().backward()

    with mock.patch.object(stalls, "PATIENCE", 0.4), mock.patch.object(stalls, "PERIOD", 0.3):
        backward()
        opt.step()
        if reads:
            if rank == 0:
                opt.full_state_dict()
            backward()
        else:
            model[1].requires_grad_(True)
            if rank == 0:
                backward()
        opt.step()


@pytest.mark.parametrize("reads", [True, False])
def test_a_call_that_moves_state_or_parameters_on_one_rank_is_an_error(reads: bool) -> None:
    for kind, message in run_ranks_expecting_errors(2, gather, reads, timeout=60).values():
        assert kind == "RuntimeError"
        assert "ranks wait for each other" in message


def retry(rank: int, quicker: int) -> None:
    """A rank makes one backward less; both catch the error, and construct another optimizer at once."""
    model = nn.Linear(40, 30)
    opt = ShardedLamb(model.named_parameters(), stage=2)

    def train() -> None:
        for _ in range(3 - rank):
            model(torch.ones(2, 40)).square().mean().backward()
        opt.step()

    patience = 0.4 if rank == quicker else 0.6
    with mock.patch.multiple(stalls, PATIENCE=patience, PERIOD=0.3):
        with pytest.raises(RuntimeError, match="ranks wait for each other in different collectives"):
            train()
        again = nn.Linear(4, 3)
        opt = ShardedLamb(again.parameters(), stage=2)
        again(torch.ones(2, 4)).sum().backward()
        opt.step()


@pytest.mark.parametrize("quicker", [0, 1])
def test_ranks_may_continue_at_once_after_such_an_error(quicker: int) -> None:
    run_ranks(2, retry, quicker, timeout=60)


def post(collective: str, number: int, ranks: int = 2, group: str = "", **entered: int) -> Post:
    return {
        "entered": {group: entered},
        "in": [group, collective],
        "number": number,
        "ranks": [*range(ranks)],
        "errors": [],
    }


def test_ranks_are_stuck_if_each_waits_for_a_rank_that_waits() -> None:
    first, second = post("reduce", 5, reduce=5, sums=3), post("sums", 3, reduce=4, sums=3)
    assert stuck_ranks({0: first, 1: second}) == set()  # rank 0 has entered rank 1's collective: it arrives
    second = post("sums", 4, reduce=4, sums=4)
    assert stuck_ranks({0: first, 1: second}) == {0, 1}
    assert stuck_ranks({0: first}) == set()  # rank 1 computes
    behind = post("sums", 4, ranks=3, reduce=4, sums=4)
    assert stuck_ranks({0: first, 1: second, 2: behind}) == {0, 1, 2}
    elsewhere = post("sums", 4, group="another optimizer", sums=4)
    assert stuck_ranks({0: first, 1: elsewhere}) == set()  # rank 1 has ended rank 0's optimizer
    elsewhere["entered"][""] = {"reduce": 4}
    assert stuck_ranks({0: first, 1: elsewhere}) == set()  # rank 0 has ended rank 1's
    first["entered"]["another optimizer"] = {"sums": 3}
    assert stuck_ranks({0: first, 1: elsewhere}) == {0, 1}


def test_a_rank_whose_collective_fails_waits_no_longer() -> None:
    store = HashStore()
    waiting = []

    def arrives(seconds: float) -> bool:
        waiting.append(store.check(["0"]) and store.get("0") != b"")
        if len(waiting) == 3:
            raise RuntimeError("connection closed")
        return False

    this_rank = stalls.ThisRank()
    with (
        mock.patch.object(stalls, "_store", return_value=store),
        mock.patch.object(stalls, "_this_rank", return_value=this_rank),
    ):
        entered = stalls.Stalls("group", 0, lambda: None).entered("reduce", [0, 1])
        with pytest.raises(RuntimeError, match="connection closed"):
            entered.wait(arrives)
    assert waiting == [False, False, True]
    assert store.get("0") == b""


def two_optimizers(rank: int) -> None:
    """Rank 0 zeroes what backward reached on it alone; rank 1 is in the other optimizer's step."""
    model = nn.ModuleList([nn.Linear(40, 30), nn.Linear(40, 20)])
    first, second = (ShardedLamb(layer.named_parameters(), stage=2) for layer in model)
    with mock.patch.object(stalls, "PATIENCE", 0.4), mock.patch.object(stalls, "PERIOD", 0.3):
        model[0](torch.ones(2, 40)).square().mean().backward()
        if rank == 0:
            model[1](torch.ones(2, 40)).square().mean().backward()
        second.zero_grad()
        first.step()


def test_ranks_that_wait_in_different_optimizers_raise() -> None:
    for kind, message in run_ranks_expecting_errors(2, two_optimizers, timeout=60).values():
        assert kind == "RuntimeError"
        assert "rank 0 waits in reduce-scatter of backward, number 1 of optimizer 2 of 2" in message
        assert (
            "rank 1 waits in all-reduce of step or clip_grad_norm_, number 1 of optimizer 1 of 2" in message
        )


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=3, max_size=3), min_size=2, max_size=4), st.data())
def test_ranks_with_the_same_calls_are_never_stuck(calls: list[list[str]], data: st.DataObject) -> None:
    """Whatever each rank has reached, in one order of collectives for all."""
    order = calls[0] * 2
    ranks = len(calls)
    posts = {}
    for rank in range(ranks):
        at = data.draw(st.integers(0, len(order) - 1))
        entered = order[: at + 1]
        posts[rank] = post(
            order[at], entered.count(order[at]), ranks, **{name: entered.count(name) for name in "abc"}
        )
    assert stuck_ranks(posts) == set()


class CompletesLate:
    """A work that completes, or fails, right after a wait for it has timed out."""

    def __init__(self, error: str = "") -> None:
        self.error, self.waits = error, 0

    def wait(self, timeout: object = None) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_completes_while_a_wait_times_out_has_completed() -> None:
    work: Any = CompletesLate()
    assert _completes(work, 1.0)
    failing: Any = CompletesLate("connection closed")
    with pytest.raises(RuntimeError, match="connection closed"):
        _completes(failing, 1.0)


def initialized_again(rank: int) -> list[set[str]]:
    """The collectives that this rank says it has entered, after each of some init_process_group().

    Optimizers of the earlier ones stay alive, and their groups had the same name.
    """
    layer, kept = nn.Linear(40, 30), []
    default, timeout = dist.distributed_c10d._get_default_store(), timeout_of_default(torch.device("cpu"))
    entered = []
    for generation in range(4):
        opt = ShardedLamb(layer.named_parameters())
        kept.append(opt)
        if generation < 3:
            opt.clip_grad_norm_(1.0)
        counted = opt._collectives._stalls
        assert counted is not None
        with mock.patch.object(stalls, "_store", return_value=HashStore()) as store:
            counted.post()
            entered.append({*json.loads(store.return_value.get(str(rank)))["entered"][counted.name]})
        opt.close()
        dist.destroy_process_group()
        again = PrefixStore(f"again {generation}", default)
        dist.init_process_group("gloo", store=again, rank=rank, world_size=2, timeout=timeout)
    return entered


def test_an_optimizer_of_an_earlier_process_group_is_not_counted() -> None:
    both = {"broadcast of parameters, number", "all-reduce of step or clip_grad_norm_, number"}
    for entered in run_ranks(2, initialized_again):
        assert entered == [both, both, both, {"broadcast of parameters, number"}]
