"""Point-to-point messages live as long as their group, and no longer: a peer receives them, or gets an error."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from sharded_lamb.comm import stalls
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.pending import Pending
from sharded_lamb.comm.topology import Topology
from tests.harness import run_ranks

NUMEL = 1000


def _collectives() -> Collectives:
    return Collectives(Topology((0, 1), (0, 1), (dist.get_rank(),), dist.get_rank()), torch.device("cpu"))


def _store() -> dist.Store:
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def _send(collectives: Collectives) -> Pending:
    return collectives.exchange([(1, torch.ones(NUMEL))], [])


def dropped(rank: int) -> float:
    """Rank 0 forgets a message that it has sent, as a reducer whose step raised does; rank 1 is late to receive it."""
    collectives, received = _collectives(), torch.zeros(NUMEL)
    if rank == 0:
        _send(collectives)
        _store().set("sent", "")
        _store().wait(["received"])
    else:
        _store().wait(["sent"])
        assert collectives.exchange([], [(0, received)]).wait(10)
        _store().set("received", "")
    return float(received.sum())


def test_a_forgotten_message_arrives_while_its_group_lives() -> None:
    assert run_ranks(2, dropped, timeout=40) == [0, NUMEL]


def ended(rank: int) -> None:
    """Rank 0 ends the group while something, such as an error's traceback, still refers to the message."""
    collectives = _collectives()
    if rank == 0:
        pending = _send(collectives)
        collectives.close()
        _store().set("ended", "")
        with pytest.raises(RuntimeError, match="was closed"):
            pending.wait()
        _store().wait(["failed"])
        return
    _store().wait(["ended"])
    with pytest.raises(RuntimeError, match=r"(?i)connection|closed|reset"):
        collectives.exchange([], [(0, torch.zeros(NUMEL))]).wait(10)
    _store().set("failed", "")


def test_the_end_of_a_group_fails_the_receive_of_its_messages() -> None:
    run_ranks(2, ended, timeout=40)


def failed(rank: int) -> None:
    """A wait that failed fails again: its result never came."""
    collectives = _collectives()
    if rank == 0:
        _store().wait(["receiving"])
        collectives.close()
        return
    pending = collectives.exchange([], [(0, torch.zeros(NUMEL))])
    assert not pending.wait(0)
    _store().set("receiving", "")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?i)connection|closed|reset"):
            pending.wait(10)


def test_a_wait_fails_again() -> None:
    run_ranks(2, failed, timeout=40)


LARGE = 60_000_000  # elements: under way for many milliseconds


def _begins(collectives: Collectives, direction: str) -> Pending:
    """On rank 0, a message in ``direction``, or both; on rank 1 its counterpart."""
    if direction == "gather":
        return collectives.all_gather(torch.empty(2 * LARGE))
    peer = 1 - dist.get_rank()
    message = [(peer, torch.empty(LARGE))]
    sends = (direction == "send") == (peer == 1)
    return collectives.exchange(message, []) if sends else collectives.exchange([], message)


def interrupted(rank: int, direction: str) -> str:
    """Rank 1 closes the connection in the middle of a message; gloo forgets the work of rank 0 that it serves."""
    collectives = _collectives()
    first = 0 if direction == "receive" else 1
    if rank != first:
        _store().wait(["first"])
    pending = _begins(collectives, direction)
    works = pending._messages.works
    if rank == 1:
        del works[0]  # its connection transfers the beginning of the message and no more
    _store().set("first" if rank == first else "second", "")
    if rank == 0:
        patience, period = (
            mock.patch.object(stalls, "PATIENCE", 0.4),
            mock.patch.object(stalls, "PERIOD", 0.1),
        )
        with patience, period, pytest.raises(RuntimeError) as error:
            pending.wait()
        _store().set("failed", "")
        return str(error.value)
    if rank == first:
        _store().wait(["second"])
    for work in works:  # rank 0 receives its part of a gather
        work.wait()
    stalls.raised(ValueError("why"))
    collectives.close()
    _store().wait(["failed"])
    return ""


@pytest.mark.parametrize("direction", ["send", "receive", "gather"])
def test_a_message_under_way_on_a_closed_connection_is_an_error(direction: str) -> None:
    message, _ = run_ranks(2, interrupted, direction, timeout=40)
    assert message == "ranks wait for a rank that has raised:\n  rank 1 has raised ValueError: why"
