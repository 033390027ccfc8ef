"""Finds a smaller program with the same fault."""

from collections.abc import Iterator
from dataclasses import replace

from tests.fuzz.outcome import Outcome, outcome_of
from tests.fuzz.program import Program
from tests.fuzz.replay import Undefined, replayed

MOST_RUNS = 150


def shrunk(program: Program, fault: Outcome) -> Program:
    """Drop operations, then simplify settings, while a fault of the same signature remains."""
    runs, again = 0, True
    while again:
        again = False
        for smaller in _smaller(program):
            try:
                replayed(smaller)
            except Undefined:
                continue
            runs += 1
            if runs > MOST_RUNS:
                return program
            if outcome_of(smaller).signature == fault.signature:
                program, again = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for number, phase in enumerate(program.phases):
        size = len(phase.ops)
        length = size // 2
        while length:
            for start in range(size - length, -1, -length):
                ops = phase.ops[:start] + phase.ops[start + length :]
                phases = list(program.phases)
                phases[number] = replace(phase, ops=ops)
                yield replace(program, phases=tuple(phases))
            length //= 2
    if program.wrapper:
        yield replace(program, wrapper="")
    if program.overlap_forward:
        yield replace(program, overlap_forward=False)
    if program.options["max_grad_norm"] is not None:
        yield replace(program, options={**program.options, "max_grad_norm": None})
