"""Runs a program on its ranks and judges what happened."""

import json
import tempfile
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzz import program as data
from tests.fuzz.program import Program
from tests.fuzz.replay import Replay, Undefined, replayed
from tests.fuzz.runner import execute
from tests.harness import RankError, RankErrors, run_ranks

TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Outcome:
    """``kind``: "equal", "refused" (by contract, on every rank), or "FAULT"."""

    kind: str
    reason: str = ""
    at: tuple[int, int] | None = None  # phase, operation
    details: str = ""

    @property
    def signature(self) -> str:
        """Without numbers and names: programs with equal signatures have the same fault, as far as this tells."""
        words = "".join(" " if c.isdigit() else c for c in self.reason.split("\n")[0])
        return f"{self.kind} {' '.join(words.split())[:60]}"


def outcome_of(program: Program, timeout: float = TIMEOUT_S) -> Outcome:
    """Raises Undefined where the contract leaves an operation open. ``timeout``: seconds after which ranks hang."""
    outcome, bits = _run(program, timeout)
    alone = alone_of(program) if outcome.kind == "equal" else None
    if alone is not None:
        outcome, bits_alone = _run(alone, timeout)
        if outcome.kind == "equal" and bits != bits_alone:
            at = next(i for i, pair in enumerate(zip(bits, bits_alone, strict=True)) if pair[0] != pair[1])
            return Outcome("FAULT", f"one rank has other bits, from observation {at} on")
    return outcome


def alone_of(program: Program) -> Program | None:
    """The program on one rank, where the bits must be the same; None: where they may differ.

    DTensors' parts need not be whole blocks; DistributedDataParallel divides by 3 before it sums.
    """
    if not program.same or all(phase.world == 1 for phase in program.phases):
        return None
    phases = []
    for phase in program.phases:
        if phase.how in data.WITH_DTENSORS or (phase.how == "ddp" and phase.world == 3):
            return None
        ops = []
        for op in phase.ops:
            args = dict(op.args)
            parts = args.get("parts")
            if parts is not None:
                if any(part != parts[0] for part in parts) or args.get("fail") is not None:
                    return None
                args["parts"] = parts[:1]
            if args.get("nan") is not None:
                args["nan"] = 0
            ops.append(replace(op, args=args))
        phases.append(replace(phase, world=1, ops=tuple(ops)))
    alone = replace(program, phases=tuple(phases))
    try:
        replayed(alone)
    except Undefined:
        return None
    return alone


def _run(program: Program, timeout: float) -> tuple[Outcome, list[str]]:
    """The outcome, and `Ran.bits` of all phases."""
    replay, right, bits = Replay(program), replayed(program), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for number, phase in enumerate(program.phases):
            try:
                ran = run_ranks(phase.world, execute, program, number, folder, replay, timeout=timeout)
            except RankErrors as errors:
                return _judged(program, right, errors), []
            if len({each.digest for each in ran}) > 1:
                return Outcome("FAULT", "ranks end with different numbers", (number, len(phase.ops))), []
            replay = ran[0].replay
            bits += ran[0].bits
    if right.refusal is not None:
        return Outcome("FAULT", f"not refused: {right.refusal.key}", right.refusal.last), []
    return Outcome("equal"), bits


def _judged(program: Program, replay: Replay, errors: RankErrors) -> Outcome:
    raised = {rank: _parsed(error) for rank, error in errors.errors.items()}
    details = str(errors)
    first = min(raised)
    own = [error for error in raised.values() if error["at"] is not None]
    if errors.returned or len(own) < len(raised):
        kinds = {rank: error["kind"] for rank, error in raised.items()}
        kinds |= dict.fromkeys(errors.returned, "returned")
        reason = f"hang or crash {sorted(set(kinds.values()))}"
        if own:
            reason += f": {own[0]['kind']}: {own[0]['message']}"
        at = own[0]["at"] if own else None
        return Outcome("FAULT", reason, at, details)
    error = raised[first]
    at, text = tuple(error["at"]), f"{error['kind']}: {error['message']}"
    if error["kind"] == "WrongNumber":
        return Outcome("FAULT", f"wrong number: {error['message']}", at, details)
    refusal = replay.refusal
    if refusal is None or refusal.last is None:
        return Outcome("FAULT", f"unexpected error: {text}", at, details)
    for other in raised.values():
        inside = refusal.first <= tuple(other["at"]) <= refusal.last
        if not inside or not refusal.matches(other["message"]):
            return Outcome(
                "FAULT", f"not refused as {refusal.key!r}: {other['kind']}: {other['message']}", at, details
            )
    return Outcome("refused", text, at)


def _parsed(error: RankError) -> dict[str, Any]:
    if error.kind == "AtOperation":
        parsed: dict[str, Any] = json.loads(error.message)
        return parsed
    return {"at": None, "kind": error.kind, "message": error.message}
