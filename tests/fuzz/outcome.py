"""Runs a program on its ranks and judges what happened."""

import json
import tempfile
from dataclasses import dataclass
from typing import Any

from tests.fuzz.program import Program
from tests.fuzz.replay import Replay, replayed
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
    replay = replayed(program)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for number, phase in enumerate(program.phases):
            expected = {key: seen for key, seen in replay.observations.items() if key[0] == number}
            try:
                digests = run_ranks(phase.world, execute, program, number, folder, expected, timeout=timeout)
            except RankErrors as errors:
                return _judged(program, replay, errors)
            if len(set(digests)) > 1:
                return Outcome("FAULT", "ranks end with different numbers", (number, len(phase.ops)))
    if replay.refusal is not None:
        return Outcome("FAULT", f"not refused: {replay.refusal.key}", replay.refusal.last)
    return Outcome("equal")


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
