"""An error that one rank alone finds is an error on every rank that waits for it, by name."""

import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import ShardedLamb
from sharded_lamb.comm import stalls
from tests.harness import run_ranks, run_ranks_expecting_errors

ODD = 1


class Case:
    """A step that ends well; then `PLACES` gives the call in which rank `ODD` raises alone."""

    def __init__(self, rank: int, stage: int, mesh: DeviceMesh | None = None) -> None:
        self.is_odd = rank == ODD
        model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
        self.weight = model[1].weight
        self.model = DistributedDataParallel(model) if stage == 1 else model
        self.opt = ShardedLamb(model.named_parameters(), stage=stage, bucket_mb=0.001, mesh=mesh)
        self.backward()
        self.opt.step()
        self.opt.zero_grad()
        self.backward()

    def backward(self) -> None:
        self.model(torch.ones(2, 40)).square().mean().backward()

    # -- the calls ------------------------------------------------------------------------------------

    def closure(self) -> None:
        self.opt.step(self.fails if self.is_odd else None)

    def fails(self) -> None:
        raise ArithmeticError("no loss")

    def clip(self) -> None:
        self.opt.clip_grad_norm_(-1.0 if self.is_odd else 1.0)

    def changed(self) -> None:
        self.opt.clip_grad_norm_(1.0)
        if self.is_odd:
            assert self.weight.grad is not None
            self.weight.grad.mul_(2)
        self.opt.step()

    def converted(self) -> None:
        if self.is_odd:
            self.weight.data = self.weight.data.double()
        self.opt.step()

    def sparse(self) -> None:
        if self.is_odd:
            self.weight.grad = torch.zeros_like(self.weight).to_sparse()
        self.opt.step()

    def assigned(self) -> None:
        if self.is_odd:
            self.weight.grad = torch.ones_like(self.weight)
        self.opt.step()

    def second_backward(self) -> None:
        if self.is_odd:
            self.weight.grad = torch.ones_like(self.weight)
        self.backward()
        self.opt.step()

    def norm(self) -> None:
        if self.is_odd:
            self.weight.grad = torch.ones_like(self.weight)
            self.opt.clip_grad_norm_(1.0)
        else:
            assert self.weight.grad is not None
            self.weight.grad.norm()
            self.opt.clip_grad_norm_(1.0)

    def consolidate(self) -> None:
        self.opt.consolidate_state_dict(7 if self.is_odd else 0)

    def group(self) -> None:
        new = nn.Linear(5, 6)
        options = {"lr": -1.0} if self.is_odd else {}
        self.opt.add_param_group({"params": new.named_parameters(), **options})


PLACES: dict[str, tuple[Callable[[Case], None], tuple[int, ...], str]] = {
    "closure": (Case.closure, (1, 2), "no loss"),
    "clip": (Case.clip, (1, 2), "max_norm"),
    "changed": (Case.changed, (1,), "changed in place after clip_grad_norm_"),
    "converted": (Case.converted, (1, 2), "float64"),
    "sparse": (Case.sparse, (1,), "sparse"),
    "assigned": (Case.assigned, (2,), "was assigned while stage=2 holds"),
    "second backward": (Case.second_backward, (2,), "was assigned while stage=2 holds"),
    "norm": (Case.norm, (2,), "was assigned while stage=2 holds"),
    "consolidate": (Case.consolidate, (1, 2), "got 7"),
    "group": (Case.group, (1, 2), "lr"),
}


def alone(rank: int, stage: int, place: str) -> None:
    with mock.patch.object(stalls, "PATIENCE", 0.4), mock.patch.object(stalls, "PERIOD", 0.3):
        PLACES[place][0](Case(rank, stage))


@pytest.mark.parametrize(
    ("place", "stage", "ranks"),
    [
        (place, stage, ranks)
        for place, (_, stages, _) in PLACES.items()
        for stage in stages
        for ranks in (2, 3)
    ],
)
def test_an_error_on_one_rank_is_raised_on_every_rank(place: str, stage: int, ranks: int) -> None:
    for kind, message in run_ranks_expecting_errors(ranks, alone, stage, place, timeout=40).values():
        assert kind in ("RuntimeError", "ValueError", "TypeError", "ArithmeticError")
        assert PLACES[place][2] in message


_kept: list[Exception] = []


def beside_replicas(rank: int, place: str, is_kept: bool) -> None:
    """``is_kept``: the program keeps its error, whose traceback holds the optimizer and its connections."""
    mesh = init_device_mesh("cpu", (2, 2))
    with mock.patch.object(stalls, "PATIENCE", 0.4), mock.patch.object(stalls, "PERIOD", 0.3):
        try:
            PLACES[place][0](Case(rank, 2, mesh))
        except Exception as error:
            if is_kept:
                _kept.append(error)
            raise


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("place", ["clip", "second backward"])
def test_replicas_of_shards_raise_too(place: str, is_kept: bool) -> None:
    for kind, message in run_ranks_expecting_errors(4, beside_replicas, place, is_kept, timeout=40).values():
        assert kind in ("RuntimeError", "ValueError")
        assert PLACES[place][2] in message


def unfrozen(rank: int, stage: int) -> None:
    """Rank `ODD` alone unfreezes a layer, which the step registers."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    model[1].requires_grad_(False)
    opt = ShardedLamb(model.named_parameters(), stage=stage)
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    model[1].requires_grad_(rank == ODD)
    with mock.patch.object(stalls, "PATIENCE", 0.4), mock.patch.object(stalls, "PERIOD", 0.3):
        opt.step()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_registered_on_one_rank_are_an_error(stage: int, ranks: int) -> None:
    for kind, message in run_ranks_expecting_errors(ranks, unfrozen, stage, timeout=40).values():
        assert kind == "RuntimeError"
        assert "ranks wait for each other" in message
        assert "rank 1 waits in construction, load or registration" in message


def ended(rank: int, stage: int) -> None:
    """Rank `ODD` ends its groups after its error, as the end of its process does."""
    case = Case(rank, stage)
    try:
        case.clip()
    except ValueError:
        case.opt.close()
        dist.destroy_process_group()
        raise


@pytest.mark.parametrize("stage", [1, 2])
def test_a_closed_connection_is_explained(stage: int) -> None:
    failed = run_ranks_expecting_errors(3, ended, stage, timeout=40)
    assert failed.pop(ODD)[0] == "ValueError"
    for kind, message in failed.values():
        assert kind == "RuntimeError"
        assert message.startswith(
            "ranks wait for a rank that has raised:\n  rank 1 has raised ValueError: max_norm"
        )


def closed_before(rank: int) -> None:
    """Rank `ODD` raises and ends its groups; then another begins to send it state, or to receive some."""
    case = Case(rank, 1)
    store = dist.distributed_c10d._get_default_store()
    try:
        if not case.is_odd:
            store.wait(["closed"])
            for _ in range(600):  # until gloo here has noticed
                try:
                    case.opt._collectives.everyone.check_connection(ODD)  # type: ignore[union-attr]
                except RuntimeError:
                    break
                time.sleep(0.05)
        case.consolidate()
    except ValueError:
        case.opt.close()
        store.set("closed", "")
        raise


def test_a_connection_that_was_closed_before_a_transfer_is_explained() -> None:
    failed = run_ranks_expecting_errors(2, closed_before, timeout=60)
    assert failed.pop(ODD)[0] == "ValueError"
    assert failed[0][0] == "RuntimeError"
    assert failed[0][1].startswith(
        "ranks wait for a rank that has raised:\n  rank 1 has raised ValueError: to must be"
    )


def caught(rank: int) -> list[str]:
    """All ranks raise alike and continue; rank `ODD` comes back late."""
    case = Case(rank, 1)
    texts = []
    with mock.patch.object(stalls, "PATIENCE", 0.1), mock.patch.object(stalls, "PERIOD", 0.1):
        try:
            case.opt.clip_grad_norm_(-1.0)
        except ValueError as error:
            texts.append(str(error))
        if case.is_odd:
            store = dist.distributed_c10d._get_default_store()
            store.wait(["looked"])
        else:
            _when_looked(3, lambda: dist.distributed_c10d._get_default_store().set("looked", ""))
        case.opt.step()
    return texts


def _when_looked(times: int, then: Callable[[], None]) -> None:
    """Call ``then`` once a rank that waits has looked so often what the others wait for."""
    look, looks = stalls._read, []

    def counted(ranks: object) -> object:
        looks.append(ranks)
        if len(looks) == times:
            stalls._read = look
            then()
        return look(ranks)  # type: ignore[arg-type]

    stalls._read = counted  # type: ignore[assignment]


def test_ranks_that_raise_alike_and_continue_wait_for_each_other() -> None:
    for texts in run_ranks(2, caught, timeout=40):
        assert len(texts) == 1
