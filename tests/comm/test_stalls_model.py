"""`comm.stalls` against a model: ranks interleave at every look at the store and at every wait, in thousands of orders.

The ranks run the code under test in threads of which one runs at a time, over a dict as the store and without a clock:
an order decides who takes the next turn. The model knows only that a collective completes once all of its ranks have
entered it. Ranks that it finds waiting for ranks that wait for them, or that have raised, must raise; no other may.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import pytest

from sharded_lamb.comm import stalls

GROUPS = {"first": (0, 1, 2), "second": (0, 1, 2), "left": (0, 1), "right": (1, 2), "ends": (0, 2)}
KINDS = ("reduce", "sum")
WAITS_WITHOUT_NEWS = 40
"""After so many waits in a row of every rank, without a collective that completes, no rank will raise any more."""

Op = tuple[str, str]
"""(group, kind): a collective; ("raise", "alike"): an error that is caught; ("raise", "alone"): one that ends a rank;
("launch", group): a reduce without waiting for it, for which the next operation waits."""
Program = list[Op]


class Over(Exception):
    """The schedule has ended."""


@dataclass
class Model:
    """What each rank has entered, and what that completes."""

    ranks: int
    entered: dict[int, Counter[Op]] = field(init=False)

    def __post_init__(self) -> None:
        self.entered = {rank: Counter() for rank in range(self.ranks)}

    def members(self, group: str) -> list[int]:
        return [rank for rank in GROUPS[group] if rank < self.ranks]

    def lacks(self, op: Op, number: int) -> set[int]:
        """The ranks that have not entered it."""
        return {rank for rank in self.members(op[0]) if self.entered[rank][op] < number}


def steps_of(program: Program) -> list[tuple[str, Op]]:
    """A program as ("enter", op), ("wait", op), ("raise", op)."""
    steps: list[tuple[str, Op]] = []
    launched: list[Op] = []
    for op in program:
        if op[0] == "launch":
            launched.append((op[1], "reduce"))
            steps.append(("enter", launched[-1]))
            continue
        steps += [("wait", each) for each in launched]
        launched.clear()
        steps += [("raise", op)] if op[0] == "raise" else [("enter", op), ("wait", op)]
    return steps + [("wait", each) for each in launched]


def expected(programs: Sequence[Program]) -> set[int]:
    """The ranks that raise: alone, or because they wait for ranks that do, or that wait for them."""
    model = Model(len(programs))
    lists = [steps_of(program) for program in programs]
    at, waits, alone = [0] * len(programs), {}, set[int]()
    moved = True
    while moved:
        moved, waits = False, {}
        for rank, steps in enumerate(lists):
            while at[rank] < len(steps):
                kind, op = steps[at[rank]]
                if kind == "enter":
                    model.entered[rank][op] += 1
                elif op == ("raise", "alone"):
                    alone.add(rank)
                    break
                elif kind == "wait":
                    lacking = model.lacks(op, _number(steps, at[rank]))
                    if lacking:
                        waits[rank] = lacking
                        break
                at[rank], moved = at[rank] + 1, True
    stuck = alone | waits.keys()
    while True:
        fewer = {rank for rank in stuck if rank in alone or waits[rank] & stuck}
        if fewer == stuck:
            return stuck
        stuck = fewer


def _number(steps: Sequence[tuple[str, Op]], index: int) -> int:
    """Which of its kind the wait at ``index`` is for: waits come in the order of entries."""
    return sum(step == steps[index] for step in steps[: index + 1])


class Schedule:
    """Runs one thread per rank, one at a time, in an order that a seed decides."""

    def __init__(self, programs: Sequence[Program], seed: int) -> None:
        self.model, self.random = Model(len(programs)), random.Random(seed)
        self.texts: dict[str, str] = {}
        self.lists = [steps_of(program) for program in programs]
        self.this_rank = [stalls.ThisRank() for _ in programs]
        self.raised: dict[int, str] = {}
        self.turns = [threading.Semaphore(0) for _ in programs]
        self.back = threading.Semaphore(0)
        self.idle: Counter[int] = Counter()
        self.over = False
        self.failure: BaseException | None = None
        self.local = threading.local()

    # -- the store ------------------------------------------------------------------------------------

    def set(self, key: str, value: str) -> None:
        self.turn()
        self.texts[key] = value

    def get(self, key: str) -> bytes:
        self.turn()
        return self.texts[key].encode()

    def check(self, keys: list[str]) -> bool:
        self.turn()
        return all(key in self.texts for key in keys)

    # -- turns ----------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Let other ranks run."""
        if not self.over:
            self.back.release()
            self.turns[self.local.rank].acquire()
        if self.over:
            raise Over

    def run(self) -> dict[int, str]:
        """{rank: its error}."""
        threads = [threading.Thread(target=self._run_rank, args=(rank,)) for rank in range(len(self.lists))]
        running = dict(enumerate(threads))
        with (
            mock.patch.object(stalls, "_this_rank", self._current),
            mock.patch.object(stalls, "_store", return_value=self),
            mock.patch.object(stalls.dist, "is_initialized", return_value=True),
        ):
            for thread in threads:
                thread.start()
            while running and not all(self.idle[rank] > WAITS_WITHOUT_NEWS for rank in running):
                rank = self.random.choice(sorted(running))
                # A rank may also run for long while the others do not.
                for _ in range(self.random.choice((1, 1, 2, 12))):
                    self.turns[rank].release()
                    self.back.acquire()
                    if self.idle[rank] < 0:
                        del running[rank]
                        break
            self.over = True
            for rank in running:
                self.turns[rank].release()
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure
        return self.raised

    def _current(self) -> stalls.ThisRank:
        return self.this_rank[self.local.rank]

    def _run_rank(self, rank: int) -> None:
        self.local.rank = rank
        self.turns[rank].acquire()
        try:
            if not self.over:
                self._execute(rank)
        except Over:
            pass
        except RuntimeError as error:
            self.raised[rank] = str(error)
        except BaseException as error:
            self.failure = error
        self.idle[rank] = -1
        self.back.release()

    def _execute(self, rank: int) -> None:
        groups = {
            name: stalls.Stalls(name, rank, lambda: None)
            for name in GROUPS
            if rank in self.model.members(name)
        }
        waiting: dict[Op, list[stalls.Entered]] = {}
        for kind, op in self.lists[rank]:
            if kind == "enter":
                entered = groups[op[0]].entered(op[1], self.model.members(op[0]))
                waiting.setdefault(op, []).append(entered)
                self.model.entered[rank][op] += 1
                self.idle.clear()
            elif kind == "wait":
                waiting[op].pop(0).wait(self._arrives(rank, op, _number_of(waiting, op, self.model, rank)))
            else:
                stalls.raised(ValueError("alike") if op[1] == "alike" else TypeError("alone"))
                if op[1] == "alone":
                    raise RuntimeError("alone")

    def _arrives(self, rank: int, op: Op, number: int) -> Callable[[float], bool]:
        def arrives(seconds: float) -> bool:
            self.turn()
            self.idle[rank] += 1
            return not self.model.lacks(op, number)

        return arrives


def _number_of(waiting: dict[Op, list[stalls.Entered]], op: Op, model: Model, rank: int) -> int:
    return model.entered[rank][op] - len(waiting[op])


def program(random_: random.Random, ranks: int) -> list[Program]:
    """Ranks with the same calls, of which some are moved, left out, or raise, on one rank."""
    groups = [name for name in GROUPS if ranks > 2 or len(GROUPS[name]) > 2]
    common: Program = []
    for _ in range(random_.randint(2, 6)):
        group = random_.choice(groups)
        ops: list[Op] = [(group, random_.choice(KINDS)), ("launch", group), ("raise", "alike")]
        common.append(random_.choices(ops, (6, 3, 1))[0])
    everyone = (*range(ranks),)
    programs = [
        [op for op in common if rank in GROUPS.get(op[op[0] == "launch"], everyone)] for rank in everyone
    ]
    for _ in range(random_.choice((0, 0, 1, 2))):
        changed = random_.choice(programs)
        at, to = (random_.randrange(len(changed) + 1) for _ in range(2))
        # Where calls differ, an error that all raise is one that a rank raises before the others.
        what = "alone" if ("raise", "alike") in common else random_.choice(("drop", "move", "alone"))
        if what == "alone":
            changed.insert(at, ("raise", "alone"))
        elif at < len(changed):
            op = changed.pop(at)
            if what == "move":
                changed.insert(to, op)
    return programs


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_that_wait_in_vain_raise_and_no_other(ranks: int, part: int) -> None:
    seen = Counter[bool]()
    for seed in range(75 * part, 75 * (part + 1)):
        programs = program(random.Random(seed), ranks)
        raised = Schedule(programs, seed).run()
        assert raised.keys() == expected(programs), (seed, programs, raised)
        seen[bool(raised)] += 1
        for rank, text in raised.items():
            if ("raise", "alone") not in programs[rank]:
                assert text.startswith("ranks wait for "), (seed, programs, text)
    assert min(seen[True], seen[False]) > 15


def test_ranks_that_wait_in_a_ring_raise() -> None:
    ring: list[Program] = [
        [("left", "sum"), ("ends", "sum")],
        [("right", "sum"), ("left", "sum")],
        [("ends", "sum"), ("right", "sum")],
    ]
    assert expected(ring) == {0, 1, 2}
    for seed in range(50):
        assert Schedule(ring, seed).run().keys() == {0, 1, 2}
