"""The oracle of programs that round: it continues from what the run has stored, as near as the formats promise.

Moments are within a code of the exact ones. For the stored moments, ratios and weights are exact again: a step's
error does not grow over steps, and tolerances are those of float32. What no step updates keeps its bits.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from tests.comm import wire_oracle
from tests.fuzz.program import Array, Slot
from tests.oracle import OracleLamb, split_blocks

State = dict[str, dict[str, Array]]
"""{parameter: {kind of state: whole values}}; ``master`` is the weight where there is none."""

MOMENTS = ("exp_avg", "exp_avg_sq")
EXACT = 5e-6
"""Of float32 arithmetic, relative: norm-wise for weights, by element for moments of a step."""

MOMENT = {
    "float32": (EXACT, 0.0, 0.0),
    "bfloat16": (2.0**-7, 0.0, 0.0),
    "int8": (2.0**-4, 2.0**-10, 2.0**-18),
}
"""By ``state_dtype``: the error of a moment relative to itself, and to the largest of a first and a second one."""

REMAINDER = {0: 0.0, 16: 2.0**-23, 8: 2.0**-15}
"""The relative error of a master, by bits of its remainder."""

LOADED = 2.0**-3
"""Of a weight under another ``gather_dtype`` than that of the run which saved it."""

OF_MASTERS = ("store_param_remainders", "gather_dtype")

WRITTEN = 2.0**-8
"""Of a master whose remainder is older than its weight."""

REDUCED = {None: 0.0, "bfloat16": 2.0**-8, "float8_e4m3fn": 2.0**-3}
"""The relative error of a gradient, by ``reduce_dtype``. Contributions of ranks have the same sign."""


class WrongNumber(Exception):
    """An observation differs from the oracle's."""


def require_near(what: str, seen: Array, right: Array, error: Array | float) -> None:
    """``error``: by element."""
    off = np.abs(seen - right) - error
    if not (off <= 0).all():
        at = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
        raise WrongNumber(f"{what} is {seen[at]:.9g}, and {right[at]:.9g} is right, of {seen.size} elements")


def require_norm_near(what: str, seen: Array, right: Array, error: float) -> None:
    """``error``: relative, of the norm."""
    gap, size = float(np.linalg.norm(seen - right)), float(np.linalg.norm(right))
    if not gap <= error * size:
        raise WrongNumber(f"{what} is off by {gap / size:.2g} of its norm")


def in_model(slot: Slot, master: Array, gather: str | None) -> Array:
    """A master as all ranks hold it in the model."""
    values = torch.from_numpy(np.asarray(master))
    if slot.dtype == "float64":
        return values.numpy()
    weights = values.float().to(getattr(torch, slot.dtype))
    if gather is not None and (gather, slot.dtype) != ("bfloat16", "bfloat16"):
        if slot.transposed:
            return in_model(Slot(slot.name, slot.shape[::-1], slot.dtype), master.T, gather).T
        weights = wire_oracle.received(weights, getattr(torch, gather))
    return weights.double().numpy()


class StoredLamb(OracleLamb):
    """Takes moments and masters from ``state`` after each step; without it, keeps its own."""

    def __init__(self, params: Mapping[str, Array], blocks: Mapping[str, int]) -> None:
        super().__init__(params, blocks=blocks)
        self.parts = {name: [part for part, whole in self.whole.items() if whole == name] for name in params}
        self.formats: dict[str, str] = {}  # of moments, by parameter
        self.loose = 0.0  # relative error of the step's gradients
        self.state: State | None = None  # that the run holds after the step

    def of_whole(self, values: Mapping[str, Array], name: str) -> Array:
        """``values`` of a parameter's parts, joined."""
        parts = [values[part] for part in self.parts[name]]
        return parts[0] if name not in self.blocks else np.concatenate(parts)

    def put(self, values: dict[str, Array], name: str, whole: Array) -> None:
        """Set the parts of a parameter."""
        values.update(split_blocks({name: np.array(whole, dtype=np.float64)}, self.blocks))

    def stored(self, kind: str, name: str, exact: Array) -> Array:
        whole = self.whole[name]
        if self.state is None:
            return exact
        seen = split_blocks({whole: self.state[whole][kind]}, self.blocks)[name]
        if seen.size:
            relative, *finest = MOMENT[self.formats[whole]]
            top = np.abs(exact).max()
            error = (relative + 4 * self.loose) * np.abs(exact) + finest[MOMENTS.index(kind)] * top
            if self.options[name]["lars"]:  # gradient and decay may have opposite signs
                error = error + (2 * self.loose + EXACT) * top / (1 - self.options[name]["betas"][0])
            require_near(f"{kind} of {name}", seen, exact, error * 1.01 + 1e-37)
        return seen


class Stored:
    """What the ranks of a program that rounds hold, beside the moments and masters of ``lamb``."""

    def __init__(self, lamb: StoredLamb, slots: Mapping[str, Slot]) -> None:
        self.lamb, self.slots = lamb, slots
        self.weights = {name: lamb.of_whole(lamb.params, name).copy() for name in slots}  # in the model
        self.written: set[str] = set()  # by the user, since the last step
        self.averages: dict[str, Array] = {}
        self.settings: dict[str, Any] = {}
        self.converts: set[str] = (
            set()
        )  # parameters whose state a phase has in other formats than the one before

    def begin(self, settings: Mapping[str, Any], formats: Mapping[str, str]) -> None:
        """A phase with these settings; ``formats``: {parameter: its ``state_dtype``}."""
        is_other = any(settings.get(name) != self.settings.get(name) for name in OF_MASTERS)
        before, self.lamb.formats = self.lamb.formats, dict(formats)
        self.converts = {name for name in formats if is_other or formats[name] != before.get(name)}
        self.settings = dict(settings)

    def gather(self) -> str | None:
        return self.settings.get("gather_dtype")

    @property
    def rounds_written(self) -> bool:
        """Whether a remainder changes a weight that the user wrote."""
        return any(self.bits(name) for name in self.written)

    def register(self, names: Collection[str]) -> None:
        for name in names:
            self.averages.setdefault(name, self.weights[name].copy())

    def average(self, name: str) -> Array:
        """As a parameter holds it."""
        return in_model(self.slots[name], self.averages[name], None)

    def write(self, name: str, value: Array, is_registered: bool) -> None:
        """The user writes a weight."""
        self.weights[name] = value
        self.lamb.put(self.lamb.params, name, value)
        if is_registered:
            self.written.add(name)

    def bits(self, name: str) -> int:
        """Of the remainder of a master."""
        setting = self.settings.get("store_param_remainders", False)
        return {False: 0, True: 16}.get(setting, 8) if self.slots[name].dtype == "bfloat16" else 0

    def stepped(self, names: Collection[str], updated: Collection[str], is_first: bool) -> None:
        """Take masters and averages from the run. ``names``: registered; ``is_first``: no parameter had a step."""
        lamb, decay = self.lamb, self.settings.get("ema_decay")
        for name in names:
            exact = lamb.of_whole(lamb.params, name)
            master = exact if lamb.state is None else lamb.state[name]["master"]
            bits = self.bits(name)
            error = EXACT + self._loose(name) if name in updated else 0.0
            if name in updated:
                error += REMAINDER[bits]
            if name in self.written and bits:
                error += WRITTEN
            require_norm_near(f"the master of {name}", master, exact, error)
            lamb.put(lamb.params, name, master)
            self.weights[name] = in_model(self.slots[name], master, self.gather())
            if decay is not None and updated:
                average = self.averages[name]
                average = master if is_first else average + (1 - decay) * (master - average)
                seen = average if lamb.state is None else lamb.state[name]["ema"]
                require_norm_near(f"the average of {name}", seen, average, EXACT)
                self.averages[name] = seen
        self.written -= set(names)
        self.check(names)

    def _loose(self, name: str) -> float:
        """Of a weight, where the update is made of the gradient too."""
        options = self.lamb.options[self.lamb.parts[name][0]]
        return 2 * self.lamb.loose * options["lr"] * bool(options["nesterov"])

    def check(self, names: Collection[str], *, converts: Collection[str] = ()) -> None:
        """The run's state is the oracle's to the bit, but for masters that a step will replace.

        ``converts``: parameters whose state was loaded into other formats.
        """
        lamb = self.lamb
        if lamb.state is None:
            return
        for name in names:
            state = lamb.state[name]
            for kind, values in zip(MOMENTS, (lamb.m, lamb.v), strict=True):
                if kind not in state:
                    continue
                right = lamb.of_whole(values, name)
                if name in converts and right.size:
                    relative, *finest = MOMENT[lamb.formats[name]]
                    error = relative * np.abs(right) + finest[MOMENTS.index(kind)] * np.abs(right).max()
                    require_near(f"the converted {kind} of {name}", state[kind], right, error)
                    lamb.put(values, name, state[kind])
                else:
                    require_near(f"the kept {kind} of {name}", state[kind], right, 0.0)
            if name not in self.written:
                right = lamb.of_whole(lamb.params, name)
                error = REMAINDER[self.bits(name)] if name in converts else 0.0
                require_near(f"the kept master of {name}", state["master"], right, error * np.abs(right))
                lamb.put(lamb.params, name, state["master"])
            if "ema" in state:
                require_near(f"the kept average of {name}", state["ema"], self.averages[name], 0.0)
            steps = {lamb.steps[part] for part in lamb.parts[name]}
            if steps != {int(state["step"])}:
                raise WrongNumber(f"{name} has had {int(state['step'])} steps, and {steps} are right")

    def resumed(self, names: Collection[str], weights: Mapping[str, Array]) -> None:
        """The run has loaded the checkpoint of the phase before. ``weights``: in its model."""
        self.check(names, converts=self.converts)
        for name in self.converts:
            require_norm_near(f"the loaded {name}", weights[name], self.weights[name], LOADED)
            self.weights[name] = weights[name]
