"""The float64 oracle: a program's right numbers, or the refusal that the contract promises.

Gradients follow torch's ``.grad`` under DistributedDataParallel: ``averaged`` holds what all ranks have averaged,
``local`` what each rank has accumulated since (in no_sync, or before stage 2 reduces it). Operations whose meaning the
contract leaves open raise `Undefined`, and the generator does not emit them.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tests.fuzz import program as data
from tests.fuzz.program import Array, Op, Phase, Program
from tests.fuzz.stored import REDUCED, State, Stored, StoredLamb
from tests.oracle import VARIANT_FACTS

REFUSALS: dict[str, str] = {
    "lr": r"\blr\b|learning rate",
    "weight_decay": r"weight_decay",
    "betas": r"\bbetas?\b",
    "max_grad_norm": r"max_grad_norm",
    "clip differs": r"clip",
    "a gradient on some ranks": r"gradient.* some|ranks only|\.grad",
    "gradients scaled differently": r"not averaged|different gradients|\.grad|scale|factor",
    "assigned over a reduced gradient": r"\.grad.*(assigned|reduced)",
    "edited after it was reduced": r"reduce",
    "changed after it was clipped": r"changed in place after clip_grad_norm_",
    "a step less": r"\bsteps?\b",
    "backward on some ranks": r"wait for each other.*backward",
    "zeroed between reductions": r"edits of \.grad",
    "unscaled on some ranks": r"wait for each other.*GradScaler|edits of \.grad.*scaled by",
    "converted": r"bucket|dtype|float16",
    "copied over several ranks": r"cannot be pickled|copied",
}
"""Refused by contract: what happened, and a fragment of the message on every rank."""

AFTER_A_DIFFERENCE = {"backward", "step"}
MOST_SKIPS = 8  # max_consecutive_skips is 10
CHECKED_STEPS = 2  # in which stage 1 compares gradients over ranks


class Undefined(Exception):
    """The contract does not say what happens."""


@dataclass
class Refusal:
    """Every rank raises at an operation in [first, last], with a message that ``key`` of `REFUSALS` matches."""

    key: str
    first: tuple[int, int]  # phase, operation
    last: tuple[int, int] | None = None

    def matches(self, message: str) -> bool:
        return re.search(REFUSALS[self.key], message, re.IGNORECASE | re.DOTALL) is not None


@dataclass
class Observation:
    """What every rank must see after one operation."""

    weights: dict[str, Array] | None = None
    ratios: list[dict[str, float]] | None = None  # by optimizer
    skipped: list[int] | None = None
    number: float | None = None  # a norm or a loss
    terms: float = 0.0  # the sum of the absolute values that ``number`` sums
    norms: dict[str, float] | None = None  # of .grad
    is_rough: bool = False  # weights are as exact as those of the roughest dtype
    loose: float = 0.0  # relative error of gradients that were rounded
    are_ratios_loose: bool = False  # ratios have it too
    state: State | None = None  # of a program that is followed; of a run only


@dataclass
class _Optimizer:
    groups: list[list[str]]
    options: list[dict[str, Any]]
    max_grad_norm: float | None
    registered: set[str] = field(default_factory=set)
    clip: float | None = None
    is_clip_stale: bool = False  # applied once, to gradients that are still there
    changed: set[str] = field(
        default_factory=set
    )  # zeroed in place, in .grad itself, after they were clipped
    ratios: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skips_in_a_row: int = 0
    steps: int = 0
    is_used: bool = False  # a step has used the gradients
    # Stage 2, by rank:
    reductions: Counter[int] = field(default_factory=Counter)  # that it has started
    held: dict[int, set[str]] = field(default_factory=dict)  # reduced gradients, not zeroed
    dropped: set[str] = field(default_factory=set)  # reduced gradients, removed before a step used them
    lagging: set[int] = field(default_factory=set)  # no reduction since no_sync or new parameters
    is_zeroed_between: bool = False  # when some ranks had started a reduction that others had not

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


def _ensure(condition: bool) -> None:
    if not condition:
        raise Undefined


class Replay:
    """Interprets operations one by one; ``observations`` by (phase, operation)."""

    def __init__(self, program: Program) -> None:
        self.program, self.slots = program, program.slots()
        weights = {name: data.weight(slot) for name, slot in self.slots.items()}
        self.lamb = StoredLamb(weights, program.blocks())
        self.stored = Stored(self.lamb, self.slots) if program.follows else None
        self.seen: Observation | None = None
        self.are_ratios_loose = False
        self.form = "checkpoint"  # from which the next phase resumes
        self.observations: dict[tuple[int, int], Observation] = {}
        self.refusal: Refusal | None = None
        self.ended = False
        self.phase = self.index = -1
        self.skipped = [0] * 9
        self.is_rough = False

    def start(self, phase: Phase) -> None:
        self.phase, self.index = self.phase + 1, -1
        self.world, self.how = phase.world, phase.how
        self.frozen = set(phase.frozen)
        self.averaged: dict[str, Array] = {}
        self.local: list[dict[str, Array]] = [{} for _ in range(self.world)]
        self.zeroed: set[str] = set()  # in stage 2, by zero_grad(set_to_none=False), and not reached since
        self.snapshots: dict[int, Any] = {}
        before = self.optimizers if self.phase else None
        self.optimizers = []
        for groups in phase.optimizers:
            clip = self.program.options["max_grad_norm"]
            options = [self._group_options(group.options) for group in groups]
            names = [self.program.names_of(group.layers) for group in groups]
            self.optimizers.append(_Optimizer(names, options, clip))
        for optimizer, old in zip(self.optimizers, before or [], strict=False):
            optimizer.options = old.options
            if self.form == "checkpoint":
                optimizer.max_grad_norm, optimizer.skipped = old.max_grad_norm, old.skipped
        self.settings = {**self.program.settings, **phase.settings}
        formats = {
            name: self._format(name, group.options)
            for groups in phase.optimizers
            for group in groups
            for name in self.program.names_of(group.layers)
        }
        if self.stored is not None:
            self.stored.begin(self.settings, formats)
        for optimizer in self.optimizers:
            self._register(optimizer)

    def _format(self, name: str, options: dict[str, Any]) -> str:
        """``state_dtype`` of a parameter of a group with these options."""
        own = options.get("state_dtype", self.settings.get("state_dtype", "float32"))
        return "float32" if self.slots[name].dtype == "float64" else str(own)

    def follow(self, seen: Observation | None) -> None:
        """Take what a run has seen after the operation that is applied next; the oracle continues from its state."""
        self.seen = seen
        self.lamb.state = None if seen is None else seen.state

    def apply(self, op: Op) -> None:
        """Raises Undefined before it changes anything."""
        _ensure(not self.ended)
        _ensure(self.refusal is None or op.kind in AFTER_A_DIFFERENCE)
        getattr(self, op.kind)(**op.args)
        self.index += 1
        if self._observation is not None:
            self._observation.loose = self._looseness()
            self.observations[self.phase, self.index] = self._observation
        self._observation = None

    _observation: Observation | None = None

    # -- helpers ------------------------------------------------------------------------------------

    def _refuse(self, key: str, *, now: bool) -> None:
        here = (self.phase, self.index + 1)
        self.refusal = Refusal(key, here, here if now else None)
        self.ended = now

    def _group_options(self, own: dict[str, Any]) -> dict[str, Any]:
        return {key: v for key, v in {**self.program.options, **own}.items() if key != "max_grad_norm"}

    def _register(self, optimizer: _Optimizer) -> None:
        optimizer.registered |= {n for n in optimizer.names if self._layer(n) not in self.frozen}
        if self.stored is not None:
            self.stored.register(optimizer.registered)

    @staticmethod
    def _layer(name: str) -> int:
        return int(name.split(".")[1])

    def _is_dtensor(self, name: str) -> bool:
        return self.program.is_dtensor(self.how, name)

    def _is_reduced_here(self, name: str) -> bool:
        return self.how in data.REDUCED_HERE and not self._is_dtensor(name)

    def _optimizer_of(self, name: str) -> _Optimizer | None:
        return next((o for o in self.optimizers if name in o.names), None)

    def _has_local(self, names: Iterable[str] | None = None) -> bool:
        wanted = None if names is None else set(names)
        return any(wanted is None or name in wanted for own in self.local for name in own)

    def _fold(self, names: Iterable[str]) -> None:
        """Average over ranks; a rank without a gradient counts as zero."""
        for name in names:
            parts = [own.pop(name) for own in self.local if name in own]
            if parts:
                total = sum(parts[1:], parts[0]) / self.world
                self.averaged[name] = self.averaged[name] + total if name in self.averaged else total

    def _gradients(self, optimizer: _Optimizer) -> dict[str, Array]:
        return {name: self.averaged[name] for name in optimizer.names if name in self.averaged}

    def _norm(self, names: Iterable[str]) -> float:
        return float(np.sqrt(sum(float(np.sum(self.averaged[n] ** 2)) for n in names if n in self.averaged)))

    def _no_clip(self) -> None:
        _ensure(all(optimizer.clip is None and not optimizer.is_clip_stale for optimizer in self.optimizers))

    def _read(self, optimizers: Iterable[_Optimizer]) -> None:
        """Norms are read, for which ranks wait for the reductions that they have started."""
        for optimizer in optimizers:
            lagging = optimizer.lagging.copy()
            self._settled(optimizer)
            optimizer.lagging = lagging

    # -- gradients ----------------------------------------------------------------------------------

    def backward(
        self,
        parts: list[list[int]],
        key: int,
        sync: bool = True,
        fail: list[int | None] | None = None,
        nan: int | None = None,
        collective: int | None = None,
    ) -> None:
        """``fail``: by rank, the lowest layer whose gradients arrive before backward raises."""
        self._no_clip()
        same = all(part == parts[0] for part in parts)
        _ensure(
            self.how not in data.WITH_DTENSORS or (same and fail is None and (sync or self.how == "mixed2"))
        )
        _ensure(self.how != "ddp" or (fail is None and all(parts)))
        _ensure(collective is None or all(collective in part for part in parts))
        _ensure(collective is None or fail is None)
        _ensure(self.refusal is None or (nan is None and sync and fail is None))
        _ensure(self.refusal is None or collective is None)
        touched = set()
        for rank, part in enumerate(parts):
            reached: set[str] = set()
            lowest = (fail or [None] * self.world)[rank] or 0
            # Autograd accumulates a tied parameter's gradient once those of all its uses have arrived.
            lost = {slot.name for layer in part if layer < lowest for slot in self.program.layers[layer]}
            for layer in part:
                if layer < lowest:
                    continue
                for slot in self.program.layers[layer]:
                    name = slot.name
                    if self._layer(name) in self.frozen or name in lost:
                        continue
                    value = data.gradient(slot, layer, self.program.source_of(rank), key)
                    if rank == nan:
                        value = value * np.nan
                    self.zeroed.discard(name)
                    own = self.local[rank]
                    own[name] = own[name] + value if name in own else value
                    touched.add(name)
                    reached.add(name)
            for optimizer in self.optimizers if sync else ():
                if any(map(self._is_reduced_here, reached & optimizer.registered)):
                    self._reduce(optimizer, rank)
        self._fold(name for name in touched if self._is_dtensor(name))
        if sync:
            self._average(touched)
        for optimizer in self.optimizers:
            optimizer.is_used = False
            if not sync:
                optimizer.lagging = set(range(self.world))

    def _reduce(self, optimizer: _Optimizer, rank: int) -> None:
        """``rank`` starts a reduction; afterwards it holds what any rank may have."""
        optimizer.reductions[rank] += 1
        optimizer.dropped.clear()
        optimizer.lagging.discard(rank)
        may_have = {n for n in optimizer.registered if self._layer(n) not in self.frozen}
        optimizer.held[rank] = set(filter(self._is_reduced_here, may_have))

    def _is_uneven(self, optimizer: _Optimizer) -> bool:
        """Whether some ranks have started more reductions than others."""
        return len({optimizer.reductions[rank] for rank in range(self.world)}) > 1

    def _catches_up(self, optimizer: _Optimizer) -> bool:
        """Whether ranks have started as many reductions once those that must have started another one.

        Ranks reduce at each backward that reaches them, and wait for as many reductions of every rank. In the step
        those reduce once more that hold no reduced gradient, have one that is not reduced, or may lack another rank's.
        """
        counts = set()
        for rank in range(self.world):
            own = any(self._is_reduced_here(n) for n in set(self.local[rank]) & optimizer.registered)
            again = not optimizer.held.get(rank) or own or rank in optimizer.lagging
            counts.add(optimizer.reductions[rank] + again)
        return len(counts) == 1

    def _settled(self, optimizer: _Optimizer) -> None:
        """All ranks have reduced as often, and know which gradients there are."""
        optimizer.reductions.clear()
        optimizer.dropped.clear()
        optimizer.lagging.clear()
        held = set(filter(self._is_reduced_here, self._gradients(optimizer)))
        optimizer.held = {rank: held.copy() for rank in range(self.world)}

    def _average(self, touched: set[str]) -> None:
        if self.how == "ddp":
            self._fold(touched)
        elif self.how in data.AVERAGED_BY_HAND:
            self._fold([name for name in self.slots if not self._is_dtensor(name)])
        else:
            for optimizer in self.optimizers:
                self._fold([n for n in optimizer.names if n in optimizer.registered])

    def zero_grad(self, who: Any, set_to_none: bool) -> None:
        """``who``: "model", ["optimizer", index] or ["layer", index]."""
        if who == "model":
            names = list(self.slots)
        elif who[0] == "optimizer":
            names = self.optimizers[who[1]].names
        else:
            names = [slot.name for slot in self.program.layers[who[1]]]
            self._no_clip()
            # A gradient that some ranks have not reduced cannot be zeroed alike on all.
            _ensure(not any(map(self._is_uneven, self.optimizers)))
        if who != "model" and who[0] == "optimizer":
            # It waits for the reductions that this rank has started, and other ranks may not know of.
            if self._is_uneven(self.optimizers[who[1]]):
                self._refuse("backward on some ranks", now=False)
            self.optimizers[who[1]].is_zeroed_between = False
            self.optimizers[who[1]].changed.clear()
        elif not set_to_none:
            # In .grad itself zeroing cannot be told from other changes, which clip_grad_norm_ has not seen.
            for optimizer in self.optimizers:
                if optimizer.clip is not None:
                    there = set(self._gradients(optimizer)) & set(names)
                    optimizer.changed |= {name for name in there if not self._is_reduced_here(name)}
        self._zero(names, set_to_none)
        if who != "model" and who[0] == "optimizer":
            self.optimizers[who[1]].dropped.clear()
        for optimizer in self.optimizers:
            optimizer.is_zeroed_between |= who == "model" and self._is_uneven(optimizer)
            if set(optimizer.names) <= set(names):
                optimizer.clip, optimizer.is_clip_stale, optimizer.is_used = None, False, False

    def _zero(self, names: list[str], set_to_none: bool) -> None:
        for optimizer in self.optimizers:
            for held in optimizer.held.values():
                held -= set(names)
            if set_to_none:
                optimizer.changed -= set(names)
                if not optimizer.is_used:
                    optimizer.dropped |= set(filter(self._is_reduced_here, self._gradients(optimizer))) & set(
                        names
                    )
        for name in names:
            for own in [self.averaged, *self.local]:
                if name in own and set_to_none:
                    del own[name]
                elif name in own:
                    own[name] = np.zeros_like(own[name])
                    if self._is_reduced_here(name):
                        self.zeroed.add(name)
            if set_to_none:
                self.zeroed.discard(name)

    def grad_none(self, names: list[str], rank: int | None = None) -> None:
        self._no_clip()
        if rank is None:
            _ensure(not any(self._is_reduced_here(n) for n in names) or not self._has_local(names))
            _ensure(not any(map(self._is_uneven, self.optimizers)))
            _ensure(not self.zeroed & set(names))
            self._zero(names, True)
            return
        _ensure(self.world > 1 and not self._has_local() and not self.zeroed)
        name = names[0]
        optimizer = self._optimizer_of(name)
        _ensure(name in self.averaged and self.slots[name].shape != () and self.averaged[name].size > 0)
        _ensure(optimizer is not None and len(self._gradients(optimizer)) > 1)
        assert optimizer is not None
        _ensure(all(np.isfinite(g).all() for g in self._gradients(optimizer).values()))
        self._refuse("a gradient on some ranks", now=False)

    def grad_scale(self, names: list[str], factor: float, rank: int | None = None) -> None:
        self._no_clip()
        _ensure(self.how not in data.REDUCED_HERE or not self._has_local())
        _ensure(not self.zeroed & set(names))
        # A rank that backward has not reached has no .grad to scale.
        _ensure(not any(map(self._is_uneven, self.optimizers)))
        if rank is not None:
            optimizer = self._optimizer_of(names[0])
            _ensure(
                self.world > 1 and len(names) == 1 and names[0] in self.averaged and optimizer is not None
            )
            assert optimizer is not None
            _ensure(self.averaged[names[0]].size > 0 and not self._is_dtensor(names[0]))
            _ensure(self._is_reduced_here(names[0]) or optimizer.steps < CHECKED_STEPS)
            _ensure(np.isfinite(self._norm(self.slots)))
            self._refuse("gradients scaled differently", now=False)
            return
        for name in names:
            for own in [self.averaged, *self.local]:
                if name in own:
                    own[name] = own[name] * factor

    def grad_add(self, names: list[str], value: float) -> None:
        self._no_clip()
        _ensure(not self._has_local(names) and not self.zeroed)
        existing = [name for name in names if name in self.averaged]
        _ensure(not any(self._is_dtensor(name) for name in names) and bool(existing))
        if any(self._is_reduced_here(name) for name in existing):
            self._refuse("edited after it was reduced", now=True)
            return
        for name in existing:
            self.averaged[name] = self.averaged[name] + value * np.sign(
                data.gradient(self.slots[name], 0, 0, 0)
            )

    def grad_assign(self, names: list[str], key: int) -> None:
        """Stage 1: the same gradient on all ranks; stage 2: each rank's own."""
        self._no_clip()
        _ensure(not any(self._is_dtensor(name) or self._layer(name) in self.frozen for name in names))
        _ensure(not self._has_local() and not self.zeroed)
        if self.how in data.REDUCED_HERE:
            optimizer = self._optimizer_of(names[0])
            _ensure(optimizer is not None and set(names) <= optimizer.registered)
            assert optimizer is not None
            if optimizer.dropped & set(
                names
            ):  # setting it to None before cannot be told from assigning over it
                self._refuse("assigned over a reduced gradient", now=False)
                return
            if self._gradients(optimizer):
                _ensure(not optimizer.is_used and names[0] in self.averaged and len(names) == 1)
                _ensure(np.isfinite(self._norm(self.slots)))
                self._refuse("assigned over a reduced gradient", now=False)
                return
        for name in names:
            for rank in range(self.world):
                at = self.program.source_of(rank) if self.how in data.REDUCED_HERE else 0
                value = data.gradient(self.slots[name], self._layer(name), at, key)
                if self.how in data.REDUCED_HERE:
                    self.local[rank][name] = value
                else:
                    self.averaged[name] = value

    def read_norms(self) -> None:
        """The 2-norm of every ``.grad``."""
        _ensure(not self._has_local() and not self.zeroed)
        _ensure(not any(map(self._is_uneven, self.optimizers)))
        self._no_clip()
        norms = {name: float(np.sqrt(np.sum(g * g))) for name, g in self.averaged.items()}
        self._observation = Observation(norms=norms)
        self._read(self.optimizers)

    def clip(self, kind: str, optimizer: int, limit: float, differs: float | None = None) -> None:
        """``differs``: the last rank's limit."""
        chosen = self.optimizers[optimizer]
        if kind == "torch":
            self._no_clip()
            _ensure(not any(map(self._is_uneven, self.optimizers)))
            _ensure(not self._has_local() and not self.zeroed and not self.how.startswith("mixed"))
            norm = self._norm(self.slots)
            _ensure(differs is None and bool(self.averaged))
            # torch rounds the norm of a bfloat16 gradient to bfloat16, and scales all gradients by a factor of it.
            _ensure(not self._mixes(self.averaged))
            factor = min(1.0, limit / (norm + 1e-6)) if np.isfinite(norm) else np.nan
            self.averaged = {name: g * factor for name, g in self.averaged.items()}
            self._read(self.optimizers)
        else:
            _ensure(not chosen.is_clip_stale)
            _ensure(self.how in data.REDUCED_HERE or not self._has_local(chosen.names))
            _ensure(not chosen.is_zeroed_between)
            if not self._catches_up(chosen):
                _ensure(differs is None)
                # On a rank that has nothing to reduce clip_grad_norm_ communicates nothing, and the next step raises.
                self._refuse("backward on some ranks", now=False)
                return
            self._register(chosen)
            self._fold(chosen.registered)
            self._settled(chosen)
            chosen.changed.clear()
            norm = self._norm(chosen.names)
            before = 1.0 if chosen.clip is None else chosen.clip
            if differs is not None:
                _ensure(
                    self.world > 1 and np.isfinite(norm) and norm > 2 * max(limit, differs) and before == 1.0
                )
                self._refuse("clip differs", now=False)
                return
            norm *= before
            chosen.clip = before * (limit / norm if norm > limit else 1.0)
        if np.isfinite(norm):
            self._observation = Observation(number=norm)

    # -- steps --------------------------------------------------------------------------------------

    def step(self, missing: int | None = None) -> None:
        """Every optimizer's; ``missing``: the rank that omits it."""
        here = (self.phase, self.index + 1)
        if missing is not None:
            # Elsewhere the next backward's collectives wait for the rank that is in the step, as without an optimizer.
            _ensure(self.how == "stage2" and self.world > 1 and self.refusal is None and bool(self.averaged))
            _ensure(np.isfinite(self._norm(self.slots)))
        self._check_step()
        catches_up = all(map(self._catches_up, self.optimizers))
        if self.refusal is not None:
            if self.refusal.key != "backward on some ranks":
                _ensure(all(self._gradients(optimizer) for optimizer in self.optimizers) and catches_up)
                _ensure(not any(o.is_zeroed_between or o.changed for o in self.optimizers))
            self.refusal.last, self.ended = here, True
            return
        for key, happened in (
            ("backward on some ranks", not catches_up),
            ("zeroed between reductions", any(o.is_zeroed_between for o in self.optimizers)),
            ("changed after it was clipped", any(o.changed for o in self.optimizers)),
        ):
            if happened:
                _ensure(missing is None)
                self._refuse(key, now=True)
                return
        if missing is not None:
            self._refuse("a step less", now=False)
            return
        for optimizer in self.optimizers:
            self._step(optimizer)
        self._observation = self._after_step()

    def closure_step(self, parts: list[list[int]], key: int) -> None:
        """A step whose closure makes zero_grad and backward."""
        self._no_clip()
        _ensure(len(self.optimizers) == 1 and self.refusal is None)
        kept = copy.deepcopy((self.averaged, self.local, self.zeroed, self.optimizers))
        try:
            self._zero(list(self.slots), True)
            self.backward(parts, key)
            self._check_step()
            _ensure(not any(map(self._is_uneven, self.optimizers)))
        except Undefined:
            self.averaged, self.local, self.zeroed, self.optimizers = kept
            raise
        self.step()

    def _check_step(self) -> None:
        for optimizer in self.optimizers:
            names = [n for n in optimizer.names if self._layer(n) not in self.frozen]
            _ensure(not optimizer.is_clip_stale)
            local = self._has_local(n for n in names if not self._is_reduced_here(n))
            _ensure(not local and optimizer.skips_in_a_row < MOST_SKIPS)
            _ensure(not (optimizer.is_used and optimizer.clip is not None))

    def _after_step(self) -> Observation:
        return Observation(
            weights={name: self._held(name).copy() for name in self.slots},
            ratios=[optimizer.ratios for optimizer in self.optimizers],
            skipped=[optimizer.skipped for optimizer in self.optimizers],
            is_rough=self.is_rough,
            are_ratios_loose=self.are_ratios_loose,
        )

    def _held(self, name: str) -> Array:
        """A parameter as the ranks hold it."""
        return (
            self.lamb.of_whole(self.lamb.params, name) if self.stored is None else self.stored.weights[name]
        )

    def _looseness(self) -> float:
        """The relative error of gradients, of their norm and of the weights' norms."""
        loose = 2 * REDUCED[self.settings.get("reduce_dtype")]
        if self.stored is not None and self._is_low_precision:
            loose += 2.0**-7
        return loose

    @property
    def _is_low_precision(self) -> bool:
        return any(slot.dtype == "bfloat16" for slot in self.slots.values())

    def _step(self, optimizer: _Optimizer) -> None:
        self._register(optimizer)
        self._fold(optimizer.registered)
        self._settled(optimizer)
        gradients = self._gradients(optimizer)
        optimizer.steps += 1
        optimizer.is_used = True
        clip = 1.0 if optimizer.clip is None else optimizer.clip
        optimizer.is_clip_stale, optimizer.clip = optimizer.clip is not None, None
        if any(not np.isfinite(g).all() for g in gradients.values()):
            optimizer.skipped += 1
            optimizer.skips_in_a_row += 1
            optimizer.ratios = {}
            if self.stored is not None:
                self.stored.check(optimizer.registered)
            return
        optimizer.skips_in_a_row = 0
        self.is_rough |= clip < 1 and self._mixes(gradients)
        lamb = self.lamb
        for names, group in zip(optimizer.groups, optimizer.options, strict=True):
            facts = {**VARIANT_FACTS[group.get("variant", "lamb")], **group, "eps": 1e-6}
            for part in (part for name in names for part in lamb.parts[name]):
                lamb.options[part] = {key: facts[key] for key in lamb.options[part]}
                for excluded, key in (
                    (lamb.no_decay, "exclude_from_weight_decay"),
                    (lamb.no_adapt, "exclude_from_layer_adaptation"),
                ):
                    excluded.discard(part)
                    if any(re.search(pattern, lamb.whole[part]) for pattern in group.get(key, ())):
                        excluded.add(part)
        lamb.max_grad_norm = optimizer.max_grad_norm
        lamb.loose = self._looseness()
        is_first = not any(lamb.steps[part] for name in optimizer.registered for part in lamb.parts[name])
        lamb.step({name: g * clip for name, g in gradients.items()})
        if self.stored is not None:
            self.are_ratios_loose = self.stored.rounds_written or "lars" in str(
                self.program.options["variant"]
            )
            self.stored.stepped(optimizer.registered, gradients, is_first)
        limit = lamb.max_grad_norm
        self.is_rough |= limit is not None and lamb.grad_norm > 0.9 * limit and self._mixes(gradients)
        optimizer.ratios = dict(lamb.ratios)

    def _mixes(self, gradients: Iterable[str]) -> bool:
        """Whether a norm of these gradients has the rounding of bfloat16 and scales others.

        A bfloat16 gradient that was rounded k times is off by k·2⁻⁹ at most, and so is the norm. A step that it clips
        changes elements of u by 2k·2⁻⁹, and after the ratio a weight by lr·4k·2⁻⁹ of its norm, at most. Where
        all steps clip alike it cancels, so that it rarely comes near.
        """
        return len({self.slots[name].dtype == "bfloat16" for name in gradients}) > 1

    def amp_step(
        self,
        parts: list[list[int]],
        key: int,
        unscale: bool,
        clip: list[Any] | None = None,
        nan: int | None = None,
    ) -> None:
        """zero_grad, scaled backward, clip, scaler.step, update, zero_grad."""
        self._no_clip()
        _ensure(not self.how.startswith("mixed") and self.refusal is None)
        _ensure(clip is None or (unscale and (clip[0] == "torch" or len(self.optimizers) == 1)))
        used = {slot.name for part in parts for i in part for slot in self.program.layers[i]}
        used = {name for name in used if self._layer(name) not in self.frozen}
        for optimizer in self.optimizers:
            _ensure(
                bool(used & optimizer.registered)
                and used <= {n for o in self.optimizers for n in o.registered}
            )
        _ensure(not any(map(self._is_uneven, self.optimizers)))
        kept = copy.deepcopy((self.averaged, self.local, self.zeroed, self.optimizers))
        try:
            self._zero(list(self.slots), True)
            self.backward(parts, key, nan=nan)
            self._check_step()
            # On a rank that backward does not reach GradScaler finds no .grad, before it calls the optimizer: it
            # unscales none, and sees no infinity; without any inf check it raises there.
            is_uneven = any(map(self._is_uneven, self.optimizers))
            if is_uneven:
                _ensure(nan is None and self.program.wrapper != "accelerate")
                _ensure(
                    all(any(o.reductions[r] for o in self.optimizers) for r in range(self.world)) or unscale
                )
        except Undefined:
            self.averaged, self.local, self.zeroed, self.optimizers = kept
            raise
        if is_uneven and unscale:
            self._refuse("unscaled on some ranks", now=True)
            return
        if clip is not None:
            self.clip(clip[0], 0, clip[1])
        for optimizer in self.optimizers:
            before = replace(optimizer)
            self._step(optimizer)
            if self.program.wrapper == "accelerate" and optimizer.skipped > before.skipped:
                # GradScaler does not see that the wrapped optimizer supports it, and skips the step itself: the
                # optimizer has made no step.
                optimizer.skipped, optimizer.skips_in_a_row = before.skipped, before.skips_in_a_row
                optimizer.steps, optimizer.ratios = before.steps, before.ratios
        self._observation = self._after_step()
        self._zero(list(self.slots), True)
        for optimizer in self.optimizers:
            optimizer.clip, optimizer.is_clip_stale, optimizer.is_used = None, False, False
            optimizer.is_zeroed_between = False

    # -- options, parameters ------------------------------------------------------------------------

    def edit(self, optimizer: int, group: int, option: str, value: Any, rank: int | None = None) -> None:
        """``rank``: the only rank that edits."""
        chosen = self.optimizers[optimizer]
        _ensure(group < len(chosen.groups))
        if rank is not None:
            now = chosen.max_grad_norm if option == "max_grad_norm" else chosen.options[group].get(option)
            _ensure(self.world > 1 and now != value and option in REFUSALS)
            self._refuse(option, now=False)
        elif option == "max_grad_norm":
            chosen.max_grad_norm = value
        else:
            if option.startswith("exclude"):
                _ensure(all(any(re.search(p, n) for n in chosen.groups[group]) for p in value))
            chosen.options[group][option] = value

    def freeze(self, layer: int) -> None:
        names = [slot.name for slot in self.program.layers[layer]]
        _ensure(self.how in ("averaged", "stage2") and layer not in self.frozen)
        _ensure(all(self._layer(name) == layer for name in names) and not self.zeroed & set(names))
        _ensure(not self._has_local(names) and not any(name in self.averaged for name in names))
        _ensure(not any(name in names for i in self._other_layers(layer) for name in i))
        self.frozen.add(layer)

    def _other_layers(self, layer: int) -> list[list[str]]:
        return [[slot.name for slot in slots] for i, slots in enumerate(self.program.layers) if i != layer]

    def unfreeze(self, layer: int) -> None:
        _ensure(layer in self.frozen and self.how in ("averaged", "stage2"))
        self.frozen.discard(layer)

    def add_group(self, optimizer: int, layer: int, options: dict[str, Any]) -> None:
        names = self.program.names_of([layer])
        _ensure(not any(set(names) & set(o.names) for o in self.optimizers) and layer not in self.frozen)
        _ensure(self.how not in data.WITH_DTENSORS and not self._has_local())
        chosen = self.optimizers[optimizer]
        self._no_clip()
        _ensure(not chosen.is_zeroed_between and not chosen.changed)
        if not self._catches_up(chosen):
            self._refuse("backward on some ranks", now=True)
            return
        self._settled(chosen)
        chosen.lagging = set(range(self.world))
        chosen.groups.append(names)
        chosen.options.append(self._group_options(options))
        self.lamb.formats.update({name: self._format(name, options) for name in names})
        self._register(chosen)

    def rewrite(self, names: list[str], factor: float, way: str) -> None:
        """Write weights on every rank: in place, by ``.data =`` or by vector_to_parameters."""
        _ensure(not any(self._is_dtensor(name) for name in names))
        slots = [self.slots[name] for name in names]
        # parameters_to_vector views parameters flat, and concatenates them.
        _ensure(
            way != "vector" or (len({s.dtype for s in slots}) == 1 and not any(s.transposed for s in slots))
        )
        for name in names:
            if self.stored is not None:
                registered = any(name in optimizer.registered for optimizer in self.optimizers)
                self.stored.write(name, self._held(name) * factor, registered)
            for part in self.lamb.parts[name] if self.stored is None else ():
                self.lamb.params[part] = self.lamb.params[part] * factor

    def evaluate(self, key: int) -> None:
        """The loss of all layers, without gradients."""
        terms = np.concatenate(
            [
                np.ravel(self._held(slot.name) * data.gradient(slot, layer, 0, key))
                for layer, slots in enumerate(self.program.layers)
                for slot in slots
            ]
        )
        self._observation = Observation(number=float(terms.sum()), terms=float(np.abs(terms).sum()))

    def averages(self) -> None:
        """The averages of the weights, as parameters hold them in ``averaged``."""
        _ensure(self.stored is not None and self.settings.get("ema_decay") is not None)
        _ensure(self.refusal is None and not self.zeroed)
        assert self.stored is not None
        for optimizer in self.optimizers:
            _ensure(any(self.lamb.steps[self.lamb.parts[name][0]] for name in optimizer.registered))
            _ensure(all(n in optimizer.registered or self._layer(n) in self.frozen for n in optimizer.names))
        registered = {name for optimizer in self.optimizers for name in optimizer.registered}
        self.stored.check(registered)
        self._observation = Observation(
            weights={
                n: self.stored.average(n) if n in registered else self._held(n).copy() for n in self.slots
            }
        )

    # -- state --------------------------------------------------------------------------------------

    def save(self, number: int, form: str) -> None:
        """``form``: "local", "full", "whole" (as "full", loaded by load_state_dict) or "checkpoint"."""
        _ensure(form != "checkpoint" or len(self.optimizers) == 1)
        held = self.stored and (self.stored.weights, self.stored.averages, self.stored.written)
        self.snapshots[number] = (
            form,
            copy.deepcopy((self.lamb.params, self.lamb.m, self.lamb.v, self.lamb.steps, held)),
            [
                (
                    copy.deepcopy(o.groups),
                    copy.deepcopy(o.options),
                    o.max_grad_norm,
                    o.skipped,
                    set(o.registered),
                )
                for o in self.optimizers
            ],
        )

    def load(self, number: int, weights: bool) -> None:
        """Load a snapshot; all but "checkpoint" leave the weights unless ``weights``."""
        _ensure(number in self.snapshots and self.refusal is None)
        _ensure(not any(optimizer.changed for optimizer in self.optimizers))
        form, (params, m, v, steps, held), saved = self.snapshots[number]
        has_masters = self._is_low_precision or self.settings.get("gather_dtype") is not None
        _ensure(weights or (form != "checkpoint" and not has_masters))
        for optimizer, (groups, _, _, _, registered) in zip(self.optimizers, saved, strict=True):
            _ensure(
                groups == optimizer.groups and registered == optimizer.registered and optimizer.clip is None
            )
        for optimizer, (_, options, clip, skipped, _) in zip(self.optimizers, saved, strict=True):
            optimizer.options, optimizer.skips_in_a_row = copy.deepcopy(options), 0
            if form == "checkpoint":
                optimizer.max_grad_norm, optimizer.skipped = clip, skipped
            for part in (part for name in optimizer.names for part in self.lamb.parts[name]):
                self.lamb.m[part], self.lamb.v[part] = m[part].copy(), v[part].copy()
                self.lamb.steps[part] = steps[part]
        if weights:
            self.lamb.params = {name: value.copy() for name, value in params.items()}
        if self.stored is not None:
            if weights:
                self.stored.weights, self.stored.written = copy.deepcopy((held[0], held[2]))
            self.stored.averages = copy.deepcopy(held[1])
            self._look()

    def look(self) -> None:
        """After a checkpoint was loaded at the start of a phase."""
        _ensure(self.stored is not None)
        assert self.stored is not None
        if self.seen is not None:
            assert self.seen.weights is not None
            self.stored.resumed({n for o in self.optimizers for n in o.registered}, self.seen.weights)
        self._look()

    def _look(self) -> None:
        assert self.stored is not None
        self.stored.check({name for optimizer in self.optimizers for name in optimizer.registered})
        self._observation = Observation(weights={name: self._held(name).copy() for name in self.slots})

    def end_phase(self, form: str) -> None:
        """Write that from which the next phase resumes: a "checkpoint", or weights and `full_state_dict`, "whole"."""
        _ensure(len(self.optimizers) == 1 and self.refusal is None)
        self.form = form
        _ensure(self.stored is None or not self.stored.written)

    # -- what frameworks do to models ---------------------------------------------------------------

    def copy(self, way: str) -> None:
        """Go on with a copy of model and optimizers."""
        _ensure(self.how in ("averaged", "stage2") and not self.program.wrapper)
        _ensure(not self.averaged and not self._has_local() and not self.program.overlap_forward)
        _ensure(not self.zeroed and not self.frozen)
        if self.world > 1:
            self._refuse("copied over several ranks", now=True)
            return
        for optimizer in self.optimizers:
            optimizer.skipped = optimizer.skips_in_a_row = optimizer.steps = 0
            optimizer.ratios = {}
            optimizer.dropped.clear()

    def copy_model(self) -> None:
        """Copy the model, and continue with the original."""
        _ensure(self.how in ("averaged", "stage2") and not self.averaged and not self._has_local())

    def replace(self) -> None:
        """New parameters with the values of the old ones, in the model and in the groups; then `zero_grad`, by which
        optimizers register them. (Otherwise stage 2 would reduce the next gradients at the step.)"""
        _ensure(self.how in ("averaged", "stage2") and not self.program.wrapper)
        _ensure(not self.averaged and not self._has_local() and not self.program.overlap_forward)
        _ensure(not self.zeroed and not self.frozen and self.refusal is None)
        self._no_clip()
        for optimizer in self.optimizers:
            optimizer.skips_in_a_row = 0

    def share_memory(self) -> None:
        _ensure(self.how not in data.WITH_DTENSORS)

    def to(self, device: str) -> None:
        _ensure(self.how not in data.WITH_DTENSORS)

    def half(self) -> None:
        _ensure(self.how in ("averaged", "stage2") and not self.averaged and not self._has_local())
        self._refuse("converted", now=False)


def replayed(program: Program) -> Replay:
    """Raises Undefined where the contract leaves an operation open."""
    replay = Replay(program)
    for phase in program.phases:
        replay.start(phase)
        for op in phase.ops:
            replay.apply(op)
    if replay.refusal is not None and not replay.ended:
        raise Undefined
    return replay
