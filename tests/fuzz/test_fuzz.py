"""The fuzzer: programs in the suite, and that it sees faults."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharded_lamb import ShardedLamb
from tests.fuzz import compact, endurance
from tests.fuzz import outcome as outcomes
from tests.fuzz.compact import PER_LINE
from tests.fuzz.compare import compare
from tests.fuzz.generate import STATE_DTYPES, VARIANTS, WIRE_DTYPES, generate
from tests.fuzz.outcome import Outcome, alone_of, outcome_of
from tests.fuzz.program import Group, Op, Phase, Program, Slot
from tests.fuzz.replay import Observation, Replay, Undefined, replayed
from tests.fuzz.runner import Run, execute
from tests.fuzz.shrink import shrunk
from tests.fuzz.stored import WrongNumber
from tests.harness import run_ranks

# Programs for which `shown` sees as much as for the first two dozen, and that have every operation and format.
SEEDS = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    10,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
    19,
    20,
    21,
    23,
    27,
    33,
    41,
    42,
    70,
    110,
    115,
    134,
    160,
]
TIMEOUT_S = 100.0  # a loaded machine is no hang
OPTIONS: dict[str, Any] = {
    "variant": "lamb",
    "lr": 0.05,
    "betas": (0.9, 0.99),
    "weight_decay": 0.01,
    "max_grad_norm": None,
}
SETTINGS: dict[str, Any] = {"bucket_mb": 0.001, "overlap": True, "ema_decay": None}
LAYERS = ((Slot("layers.0.a", (13, 5)),), (Slot("layers.1.a", (31,)), Slot("layers.1.b", (7,))))


def made(*ops: Op, how: str = "averaged", world: int = 1) -> Program:
    phase = Phase(world, how, ((Group((0, 1)),),), (), ops)
    return Program(0, LAYERS, OPTIONS, SETTINGS, "", False, (phase,))


def backward(key: int, world: int = 1) -> Op:
    return Op("backward", {"parts": [[0, 1]] * world, "key": key})


@pytest.mark.parametrize("seed", SEEDS)
def test_programs(seed: int) -> None:
    program = generate(seed)
    outcome = outcome_of(program, TIMEOUT_S)
    assert outcome.kind != "FAULT", f"{outcome.reason}\n{program}\n{outcome.details}"


def test_a_seed_gives_one_program() -> None:
    assert generate(7) == generate(7)
    assert generate(7) != generate(8)


def shown(program: Program) -> set[tuple[Any, ...]]:
    """Operations by world size, by how gradients are reduced on one rank and on many, by settings that are words,
    and by the operation before. Options and formats by how gradients are reduced, on many ranks.
    """
    seen: set[tuple[Any, ...]] = set()
    for phase in program.phases:
        before = "start"
        options = {"variant": program.options["variant"], "blocks": bool(program.options["ratio_blocks"])}
        options |= {"averages": program.settings["ema_decay"] is not None, **phase.settings}
        options |= {"caution": any("caution" in group.options for group in phase.optimizers[0])}
        many = [phase.how] if phase.world > 1 and program.follows else []
        seen |= {(*item, *many) for item in options.items()}
        for op in phase.ops:
            words = {k: v for k, v in op.args.items() if v is None or isinstance(v, str | bool)}
            seen |= {(op.kind, phase.how, phase.world > 1), (op.kind, phase.world), (before, op.kind)}
            seen |= {(op.kind, *setting) for setting in words.items()}
            before = op.kind
    return seen


def test_the_programs_show_what_two_dozen_do() -> None:
    programs = [generate(seed) for seed in SEEDS]
    first = [generate(seed) for seed in range(24) if seed not in SEEDS]
    assert set().union(*map(shown, first)) <= set().union(*map(shown, programs))
    drawn = {op.kind for p in programs for phase in p.phases for op in phase.ops}
    methods = {name for name, value in vars(Run).items() if callable(value) and not name.startswith("_")}
    assert drawn == methods
    phases = [phase for p in programs for phase in p.phases]
    assert {phase.world for phase in phases} == {1, 2, 3}
    assert {p.options["variant"] for p in programs} == set(VARIANTS)
    for option, values in (
        ("state_dtype", STATE_DTYPES),
        ("gather_dtype", WIRE_DTYPES),
        ("reduce_dtype", WIRE_DTYPES),
        ("store_param_remainders", [False, True, 8]),
    ):
        assert {phase.settings[option] for phase in phases if option in phase.settings} == set(values)


def altered_step(rank: int, smaller: float, plan: Program) -> str:
    """A fault planted in the optimizer: the learning rate is scaled at every step."""
    step = ShardedLamb.step

    def wrong(self: ShardedLamb, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= smaller
        return step(self, closure)

    ShardedLamb.step = wrong  # type: ignore[method-assign]
    try:
        return execute(rank, plan, 0, "", Replay(plan)).digest
    finally:
        ShardedLamb.step = step  # type: ignore[method-assign]


def test_a_wrong_step_is_seen() -> None:
    plan = made(backward(1), Op("step"))
    run_ranks(1, altered_step, 1.0, plan)
    with pytest.raises(Exception, match="weights of layers"):
        run_ranks(1, altered_step, 1.01, plan)


def altered_state(rank: int, kind: str, factor: float, plan: Program) -> str:
    """A fault planted after every step: state, or a weight, is another one."""
    step = ShardedLamb.step

    def wrong(self: ShardedLamb, closure: Any = None) -> Any:
        loss = step(self, closure)
        for p in self.param_groups[0]["params"]:
            values = p.data if kind == "weight" else self.state[p][kind]
            values.mul_(factor)
        return loss

    ShardedLamb.step = wrong  # type: ignore[method-assign]
    try:
        return execute(rank, plan, 0, "", Replay(plan)).digest
    finally:
        ShardedLamb.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "off", "message"),
    [
        ("exp_avg", 1.02, "exp_avg of layers"),
        ("exp_avg_sq", 1.02, "exp_avg_sq of layers"),
        ("master", 1 + 1e-5, "the master of layers"),
        ("ema", 1 + 1e-5, "the average of layers"),
        ("weight", 1 + 2.0**-7, "the weight layers"),
    ],
)
def test_wrong_state_is_seen(kind: str, off: float, message: str) -> None:
    formats = {"state_dtype": "bfloat16", "gather_dtype": "bfloat16"}
    plan = replace(
        made(backward(1), Op("step")), follows=True, settings={**SETTINGS, **formats, "ema_decay": 0.5}
    )
    run_ranks(1, altered_state, kind, 1.0, plan)
    with pytest.raises(Exception, match=message):
        run_ranks(1, altered_state, kind, off, plan)


def test_state_that_no_step_updates_keeps_its_bits() -> None:
    """The second step updates one layer alone."""
    plan = made(
        backward(1), Op("step"), Op("zero_grad", {"who": "model", "set_to_none": True}), reached([1]), STEP
    )
    plan = replace(plan, follows=True, settings={**SETTINGS, "state_dtype": "int8"})
    replay = Replay(plan)
    replay.start(plan.phases[0])
    for op in plan.phases[0].ops:
        replay.apply(op)
    assert replay.stored is not None
    name = LAYERS[0][0].name
    state = {"exp_avg": replay.lamb.m[name], "exp_avg_sq": replay.lamb.v[name], "step": np.array(1.0)}
    state["master"] = replay.lamb.params[name]
    replay.lamb.state = {name: state}
    replay.stored.check([name])
    for kind, wrong in (("exp_avg", state["exp_avg"] * (1 + 1e-15)), ("step", np.array(2.0))):
        replay.lamb.state = {name: {**state, kind: wrong}}
        with pytest.raises(WrongNumber):
            replay.stored.check([name])


def test_bits_of_one_rank_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = Op("backward", {"parts": [[0, 1]] * 2, "key": 2, "nan": 1})
    program = replace(made(backward(1, 2), STEP, nan, STEP, how="stage2", world=2), same=True)
    alone = alone_of(program)
    assert alone is not None
    assert (alone.phases[0].world, alone.phases[0].ops[0]) == (1, backward(1))
    assert alone.phases[0].ops[2].args == {"parts": [[0, 1]], "key": 2, "nan": 0}
    for other in (
        replace(program, same=False),
        replace(program, phases=(replace(program.phases[0], how="sharded"),)),
        replace(made(reached([0], [1]), STEP, how="stage2", world=2), same=True),
        alone,
    ):
        assert alone_of(other) is None
    runs = [(Outcome("equal"), ["a", "b"]), (Outcome("equal"), ["a", "c"])]
    monkeypatch.setattr(outcomes, "_run", lambda *_: runs.pop(0))
    outcome = outcome_of(program)
    assert (outcome.kind, outcome.reason) == ("FAULT", "one rank has other bits, from observation 1 on")


def test_a_missing_refusal_is_a_fault() -> None:
    """A learning rate that differs by nothing: the contract as written in the program is not met."""
    differs = Op("edit", {"optimizer": 0, "group": 0, "option": "lr", "value": 0.07, "rank": 5})
    plan = made(differs, backward(1, 2), Op("step"), world=2)
    outcome = outcome_of(plan)
    assert outcome.kind == "FAULT"
    assert "not refused" in outcome.reason


def test_undefined_operations_are_dropped() -> None:
    with pytest.raises(Undefined):
        replayed(made(Op("backward", {"parts": [[0]] * 2, "key": 1, "sync": False}), Op("step"), world=2))


TIED = (LAYERS[0], (Slot("layers.1.a", (31,)), LAYERS[0][0]))


@pytest.mark.parametrize("how", ["averaged", "stage2"])
def test_a_tied_gradient_of_a_failed_backward_is_lost(how: str) -> None:
    """Layer 1's part has arrived on rank 1 and layer 0's has not: autograd accumulates neither."""
    fails = Op("backward", {"parts": [[0, 1]] * 2, "key": 2, "fail": [None, 1]})
    outcome = outcome_of(
        replace(made(backward(1, 2), Op("step"), fails, Op("step"), how=how, world=2), layers=TIED)
    )
    assert outcome.kind == "equal", outcome.reason


def test_a_gradient_removed_before_a_failed_backward_stays_removed() -> None:
    fails = Op("backward", {"parts": [[0, 1]] * 2, "key": 2, "fail": [None, 1]})
    ops = [
        backward(1, 2),
        Op("zero_grad", {"who": "model", "set_to_none": True}),
        fails,
        backward(3, 2),
        Op("step"),
    ]
    outcome = outcome_of(made(*ops, how="stage2", world=2), TIMEOUT_S)
    assert outcome.kind == "equal", outcome.reason


@pytest.mark.parametrize("how", ["averaged", "stage2"])
@pytest.mark.parametrize("reached", [[], [1]])
def test_a_weight_written_before_a_step_without_its_gradient_stays(how: str, reached: list[int]) -> None:
    """It has a master, which the step must take from it."""
    rewrite = Op("rewrite", {"names": ["layers.0.a"], "factor": 0.5, "way": "copy"})
    before = [Op("backward", {"parts": [reached], "key": 1})] if reached else []
    program = made(*before, rewrite, Op("step"), how=how)
    program = replace(program, layers=((Slot("layers.0.a", (13, 5), "bfloat16"),), LAYERS[1]))
    outcome = outcome_of(program, TIMEOUT_S)
    assert outcome.kind == "equal", outcome.reason


def test_a_gradient_assigned_after_the_reduced_one_was_removed_is_refused() -> None:
    assign = Op("grad_assign", {"names": ["layers.0.a"], "key": 2})
    copy = Op("copy", {"way": "deepcopy"})  # of the optimizer too, which holds nothing
    for removed, kind in (([ZERO], "refused"), ([OF_FIRST], "equal"), ([ZERO, copy], "equal")):
        program = made(backward(1), *removed, assign, backward(3), Op("step"), how="stage2")
        outcome = outcome_of(program, TIMEOUT_S)
        assert outcome.kind == kind, outcome.reason


LAYER = Op("zero_grad", {"who": ["layer", 1], "set_to_none": True})


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("before", [[], [backward(1, 2)]], ids=["first", "second"])
@pytest.mark.parametrize(
    "after", [[], [backward(3, 2)], [Op("zero_grad", {"who": "model", "set_to_none": True})]]
)
def test_a_layer_zeroed_after_a_backward_that_failed_on_one_rank(
    before: list[Op], after: list[Op], overlap: bool
) -> None:
    """Rank 1's reduction is still open, rank 0's is not."""
    fails = Op("backward", {"parts": [[0, 1]] * 2, "key": 2, "fail": [None, 1]})
    program = made(*before, fails, LAYER, *after, Op("step"), how="stage2", world=2)
    outcome = outcome_of(replace(program, settings={**SETTINGS, "overlap": overlap}), TIMEOUT_S)
    assert outcome.kind == "equal", outcome.reason


def test_ratios_stay_where_gradscaler_skips_the_step_itself() -> None:
    args = {"parts": [[0, 1]], "key": 2, "unscale": False}
    ops = [Op("amp_step", {**args, "nan": nan}) for nan in (None, 0)]
    outcome = outcome_of(replace(made(*ops, how="stage2"), wrapper="accelerate"))
    assert outcome.kind == "equal", outcome.reason


def reached(*parts: list[int], **args: Any) -> Op:
    """A backward by rank; its key is as good as any."""
    return Op("backward", {"parts": [*parts], "key": 1, **args})


BOTH, FIRST = reached([0, 1], [0, 1]), reached([0, 1], [1])
SECOND = reached([1], [0, 1])  # the first optimizer has gradients on the second rank alone
STEP, ZERO = Op("step"), Op("zero_grad", {"who": "model", "set_to_none": True})
IN_PLACE = Op("zero_grad", {"who": "model", "set_to_none": False})
OF_FIRST = Op("zero_grad", {"who": ["optimizer", 0], "set_to_none": True})
OF_SECOND = Op("zero_grad", {"who": ["optimizer", 1], "set_to_none": True})
SCALED = Op("amp_step", {"parts": [[0, 1], [1]], "key": 2, "unscale": False})
UNSCALED = Op("amp_step", {**SCALED.args, "unscale": True})
CLIP = Op("clip", {"kind": "ours", "optimizer": 0, "limit": 3.0})
UNREDUCED = reached([0, 1], [1], sync=False)


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ([BOTH, OF_FIRST, SECOND, STEP], "equal"),
        ([BOTH, ZERO, SECOND, STEP], "equal"),
        ([BOTH, STEP, IN_PLACE, SECOND, STEP], "equal"),
        ([BOTH, STEP, UNREDUCED, SECOND, STEP], "equal"),
        ([FIRST, SECOND, STEP], "equal"),
        ([BOTH, SECOND, STEP], "backward on some ranks"),
        ([SECOND, ZERO, BOTH, STEP], "backward on some ranks"),
        ([SECOND, ZERO, FIRST, STEP], "backward on some ranks"),
        ([SECOND, ZERO, BOTH, FIRST, STEP], "zeroed between reductions"),
        ([SECOND, ZERO, BOTH, FIRST, OF_FIRST, BOTH, STEP], "equal"),
        ([SECOND, OF_FIRST, STEP], "backward on some ranks"),
        ([SECOND, OF_FIRST, BOTH, STEP], "backward on some ranks"),
        ([reached([0, 1], [0]), OF_SECOND, STEP], "backward on some ranks"),
        ([SCALED, BOTH, STEP], "equal"),
        ([UNSCALED], "unscaled on some ranks"),
        ([BOTH, SECOND, CLIP, STEP], "backward on some ranks"),
    ],
)
def test_reductions_are_counted_as_ranks_make_them(ops: list[Op], expected: str) -> None:
    program = made(*ops, how="stage2", world=2)
    phase = replace(program.phases[0], optimizers=((Group((0,)),), (Group((1,)),)))
    program = replace(program, phases=(phase,))
    refusal = replayed(program).refusal
    assert (refusal.key if refusal else "equal") == expected
    outcome = outcome_of(program, TIMEOUT_S)
    assert outcome.kind == ("refused" if refusal else "equal"), outcome.reason


def test_an_optimizer_unscaled_on_some_ranks_is_refused() -> None:
    """The other rank has no other optimizer to wait in."""
    args = {"parts": [[0, 1], []], "key": 2, "unscale": True}
    outcome = outcome_of(made(Op("amp_step", args), how="stage2", world=2), TIMEOUT_S)
    assert outcome.kind == "refused", outcome.reason


def test_a_rank_that_backward_has_not_reached_has_nothing_to_scale() -> None:
    scale = Op("grad_scale", {"names": ["layers.0.a"], "factor": 3.0})
    replayed(made(backward(1, 2), scale, how="stage2", world=2))
    with pytest.raises(Undefined):
        replayed(made(reached([0], []), scale, how="stage2", world=2))


def test_the_ratio_of_an_update_that_cancels_is_rough() -> None:
    plan = replace(made(), layers=((Slot("layers.0.a", (1,), "bfloat16"),),))
    for ratio, accepted in ((300.0, True), (1.0, False)):
        right = Observation(weights={}, ratios=[{"layers.0.a": ratio}], skipped=[0])
        with nullcontext() if accepted else pytest.raises(WrongNumber):
            compare(plan, "stage2", replace(right, ratios=[{"layers.0.a": ratio * 1.15}]), right)


def test_a_transposed_parameter_is_in_no_vector() -> None:
    """torch's parameters_to_vector raises."""
    rewrite = Op("rewrite", {"names": ["layers.0.a"], "factor": 2.0, "way": "vector"})
    replayed(made(rewrite))
    with pytest.raises(Undefined):
        replayed(replace(made(rewrite), layers=((Slot("layers.0.a", (13, 5), transposed=True),), LAYERS[1])))


@pytest.mark.parametrize(
    ("how", "kind"), [("averaged", "refused"), ("sharded", "refused"), ("stage2", "equal")]
)
def test_gradients_zeroed_in_place_after_they_were_clipped(how: str, kind: str) -> None:
    """In stage 2 they are handles, which tell zeroing from other changes."""
    clip = Op("clip", {"kind": "ours", "optimizer": 0, "limit": 0.5})
    ops = [backward(1), clip, IN_PLACE, backward(2), Op("step")]
    outcome = outcome_of(made(*ops, how=how))
    assert outcome.kind == kind, outcome.reason


def test_torch_clips_float64_beside_bfloat16_roughly() -> None:
    """torch's norm of a bfloat16 gradient is a bfloat16, and its factor scales all gradients."""
    clip = Op("clip", {"kind": "torch", "optimizer": 0, "limit": 0.5})
    replayed(made(backward(1), clip))
    mixed = replace(made(backward(1), clip), layers=((Slot("layers.0.a", (13, 5), "bfloat16"),), LAYERS[1]))
    with pytest.raises(Undefined):
        replayed(mixed)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", None), ("bfloat16", 0.5), ("float64", 0.5)])
def test_a_norm_of_bfloat16_gradients_clips_roughly(dtype: str, limit: float | None) -> None:
    layers = ((Slot("layers.0.a", (13, 5), dtype),), LAYERS[1])
    plan = replace(made(backward(1), Op("step")), layers=layers, options={**OPTIONS, "max_grad_norm": limit})
    right = replayed(plan).observations[0, 1]
    assert right.is_rough == (dtype == "bfloat16" and limit is not None)
    assert right.weights is not None
    for off, accepted in ((1e-3, right.is_rough), (1e-2, False)):
        seen = replace(right, weights={name: value * (1 + off) for name, value in right.weights.items()})
        with nullcontext() if accepted else pytest.raises(WrongNumber):
            compare(plan, "averaged", seen, right)


def test_shrinking_keeps_the_fault() -> None:
    differs = Op("edit", {"optimizer": 0, "group": 0, "option": "lr", "value": 0.07, "rank": 5})
    rest = [op for key in range(3) for op in (backward(key, 2), Op("step"), Op("read_norms"))]
    plan = made(*rest, differs, backward(9, 2), Op("step"), world=2)
    smallest = shrunk(plan, outcome_of(plan))
    assert [op.kind for op in smallest.phases[0].ops] in (
        ["edit", "backward", "step"],
        ["backward", "edit", "step"],
    )


def test_compare_sees_every_kind_of_observation() -> None:
    plan = made()
    weights = {"layers.0.a": np.ones(3)}
    right = Observation(weights=weights, ratios=[{"layers.0.a": 1.0}], skipped=[0])
    compare(plan, "averaged", right, right)
    wrong = [
        replace(right, weights={"layers.0.a": np.full(3, 1.001)}),
        replace(right, weights={"layers.0.a": np.full(3, np.nan)}),
        replace(right, ratios=[{"layers.0.a": 1.1}]),
        replace(right, ratios=[{}]),
        replace(right, skipped=[1]),
    ]
    for seen in wrong:
        with pytest.raises(WrongNumber):
            compare(plan, "averaged", seen, right)
    with pytest.raises(WrongNumber):
        compare(plan, "averaged", Observation(norms={}), Observation(norms={"layers.0.a": 1.0}))
    with pytest.raises(WrongNumber):
        compare(plan, "averaged", Observation(number=1.0), Observation(number=1.1))


def test_a_result_file_has_a_letter_for_every_program() -> None:
    seed = next(seed for seed in range(100) if replayed(generate(seed)).refusal is not None)
    outcomes = ["refused", "FAULT", *["equal"] * PER_LINE]
    rows = [{"seed": seed + at, "outcome": each, "operations": 3} for at, each in enumerate(outcomes)]
    result = compact.compact([rows[1], rows[0], *rows[2:]])
    refusal = replayed(generate(seed)).refusal
    assert refusal is not None
    assert result["refused"] == {refusal.key: 1}
    assert result["counts"] == {"refused": 1, "FAULT": 1, "equal": PER_LINE}
    assert result["operations"] == 3 * len(rows)
    assert result["faults"] == [rows[1]]
    assert result["programs"] == {
        seed: compact.LETTERS[refusal.key] + "F" + "." * (PER_LINE - 2),
        seed + PER_LINE: "..",
    }
    with pytest.raises(ValueError, match="consecutive"):
        compact.compact([rows[0], rows[2]])


def test_endurance_is_flat(tmp_path: Path) -> None:
    for counts in run_ranks(endurance.WORLD, endurance.train, 300, 100, str(tmp_path / "run")):
        assert not [line for line in endurance.growth(counts) if not line.startswith("memory")]
