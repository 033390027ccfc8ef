"""Stage 2's states: every legal transition is walked by the calls that make it, and every other one is refused."""

import itertools

import pytest
import torch
from torch import nn

from sharded_lamb import ShardedLamb
from sharded_lamb.gradients.mixed import MixedGradients
from sharded_lamb.gradients.reducer import BackwardReducer
from sharded_lamb.gradients.states import AFTER_INTERRUPT, TRANSITIONS, ReducerState

EMPTY, ROUND, LAUNCHED, REDUCED, USED = ReducerState


class Walk:
    """A model of two parameters under stage 2 on one rank; the states that its reducer was in, in order."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.opt = ShardedLamb(self.model.named_parameters(), lr=1e-2, stage=2)
        gradients = self.opt._gradients
        assert isinstance(gradients, MixedGradients)
        self.reducer: BackwardReducer = gradients.reducer
        self.seen = [self.reducer.state]
        enter = self.reducer._enter

        def noted(state: ReducerState) -> None:
            enter(state)
            self.seen.append(state)

        self.reducer._enter = noted  # type: ignore[method-assign]

    def backward(self) -> None:
        self.model(torch.ones(3, 4)).square().mean().backward()

    def broken_backward(self) -> None:
        """Fails once the bias, whose gradient comes first, has opened a round."""
        handle = self.model.weight.register_hook(self._fail)
        with pytest.raises(ArithmeticError):
            self.backward()
        handle.remove()

    @staticmethod
    def _fail(grad: torch.Tensor) -> None:
        raise ArithmeticError

    def read_norm(self) -> None:
        assert self.model.bias.grad is not None
        self.model.bias.grad.norm()

    def taken(self) -> list[ReducerState]:
        """The states since the last call, the one at its end first."""
        seen, self.seen = self.seen, self.seen[-1:]
        return seen


def test_a_training_step() -> None:
    walk = Walk()
    walk.backward()
    assert walk.taken() == [EMPTY, ROUND, LAUNCHED]
    walk.opt.step()
    assert walk.taken() == [LAUNCHED, REDUCED, USED]
    walk.opt.zero_grad()
    assert walk.taken() == [USED, EMPTY]


def test_accumulation_goes_through_a_round_each_time() -> None:
    walk = Walk()
    walk.backward()
    walk.backward()
    assert walk.taken() == [EMPTY, ROUND, LAUNCHED, ROUND, LAUNCHED]
    walk.opt.step()
    walk.opt.step()
    walk.backward()
    assert walk.taken() == [LAUNCHED, REDUCED, USED, USED, ROUND, LAUNCHED]


def test_a_norm_that_is_read_closes_a_round() -> None:
    walk = Walk()
    walk.backward()
    walk.read_norm()
    walk.read_norm()
    assert walk.taken() == [EMPTY, ROUND, LAUNCHED, REDUCED]
    walk.backward()
    walk.opt.step()
    assert walk.taken() == [REDUCED, ROUND, LAUNCHED, REDUCED, USED]


def test_a_step_without_a_backward_makes_a_round_of_zeros() -> None:
    walk = Walk()
    walk.opt.step()
    assert walk.taken() == [EMPTY, ROUND, LAUNCHED, REDUCED, USED]


def test_zeroing_before_and_after() -> None:
    walk = Walk()
    walk.opt.zero_grad()
    walk.backward()
    walk.opt.zero_grad()
    assert walk.taken() == [EMPTY, EMPTY, ROUND, LAUNCHED, REDUCED, EMPTY]


def test_a_backward_that_broke_off_is_finished_before_it_is_zeroed() -> None:
    walk = Walk()
    walk.broken_backward()
    assert walk.reducer.state is ROUND
    walk.opt.zero_grad()
    assert walk.taken() == [EMPTY, ROUND, LAUNCHED, REDUCED, EMPTY]
    assert walk.model.weight.grad is None
    assert walk.model.bias.grad is None


def test_gradients_that_the_model_zeroed_do_not_add_to_the_next_round() -> None:
    """The state stays; the next round sees it."""
    once, twice = Walk(), Walk()
    once.backward()
    once.opt.step()
    twice.backward()
    twice.model.zero_grad()
    assert twice.reducer.state is LAUNCHED
    twice.backward()
    twice.opt.step()
    assert torch.equal(once.model.weight, twice.model.weight)
    assert once.opt.grad_norm == twice.opt.grad_norm


def test_the_walks_cover_the_table() -> None:
    walk = Walk()
    calls = [
        walk.opt.zero_grad,  # EMPTY → EMPTY
        walk.backward,  # EMPTY → ROUND → LAUNCHED
        walk.backward,  # LAUNCHED → ROUND → LAUNCHED
        walk.opt.step,  # LAUNCHED → REDUCED → USED
        walk.opt.step,  # USED → USED
        walk.backward,  # USED → ROUND → LAUNCHED
        walk.read_norm,  # LAUNCHED → REDUCED
        walk.backward,  # REDUCED → ROUND → LAUNCHED
        walk.opt.zero_grad,  # LAUNCHED → REDUCED → EMPTY
        walk.backward,
        walk.opt.step,
        walk.opt.zero_grad,  # USED → EMPTY
    ]
    for call in calls:
        call()
    made = set(itertools.pairwise(walk.seen))
    assert made == {(state, to) for state, allowed in TRANSITIONS.items() for to in allowed}


@pytest.mark.parametrize(
    ("state", "to"),
    [
        (a, b)
        for a in ReducerState
        for b in ReducerState
        if b not in TRANSITIONS[a] | AFTER_INTERRUPT.get(a, set())
    ],
    ids=lambda state: state.name,
)
def test_every_other_transition_is_refused(state: ReducerState, to: ReducerState) -> None:
    reducer = Walk().reducer
    reducer.state = state
    with pytest.raises(AssertionError, match=f"no transition from {state.name} to {to.name}"):
        reducer._enter(to)


def test_the_table_of_the_docstring_is_the_table() -> None:
    doc = ReducerState.__doc__ or ""
    rows = {
        line.split()[0]: line
        for line in doc.splitlines()
        if line.strip().split(" ")[0] in ReducerState.__members__
    }
    for state, allowed in TRANSITIONS.items():
        named = {word.strip(",") for word in rows[state.name].split()[1:]} & ReducerState.__members__.keys()
        # `zero` finishes the round first
        through = {ROUND: {"REDUCED", "EMPTY"}, LAUNCHED: {"EMPTY"}}.get(state, set())
        assert named - through == {to.name for to in allowed}, state
