"""Draws a program from a seed: operations at random, of which `Replay` drops those that the contract leaves open."""

import random
import re
from dataclasses import replace
from math import prod
from typing import Any

from tests.fuzz import program as data
from tests.fuzz.program import Group, Op, Phase, Program, Slot
from tests.fuzz.replay import Replay, Undefined, replayed

MOST_OPERATIONS = 40
MOST_BLOCKS = 17  # each is a layer to the oracle
SHAPES = [
    (),
    (1,),
    (7,),
    (0, 3),
    (13, 5),
    (31,),
    (17, 3, 2),
    (64, 9),
    (300,),
    (2, 2),
    (5, 0, 2),
    (257,),
    (6, 256),
]
SHARDABLE = [(7,), (13, 5), (31,), (17, 3, 2), (64, 9), (1,), (3, 4), (257,), (6, 256)]
STATE_DTYPES = ["float32", "bfloat16", "int8", "int8"]
WIRE_DTYPES = [None, "bfloat16", "float8_e4m3fn"]
PLAIN_VARIANTS = ["lamb", "paper_v3", "paper_v1", "deepspeed", "timm"]
"""Those that ``caution`` goes with."""
VARIANTS = [*PLAIN_VARIANTS, "lans", "lans", "lars", "torch_lars"]
PATTERNS = [[], [r"\.a$"], [r"^layers\.0\."], [r"layers"]]


def generate(seed: int, without: frozenset[str] = frozenset()) -> Program:
    """The program of ``seed``; the same on every machine.

    ``without``: kinds of operations, their arguments or values of those, and wrappers, that it does not
        have; "two": optimizers.
    """
    generator = _Generator(seed, without)
    for _ in range(100):
        program = generator.program()
        try:
            replayed(program)
        except Undefined:  # what the contract refuses never came to a step
            continue
        return program
    raise AssertionError(f"no program for seed {seed}")


def _words(op: Op) -> set[str]:
    words = {op.kind}
    for name, value in op.args.items():
        if value is not None:
            words |= {name, *map(str, value if isinstance(value, list) else [value])}
    return words


class _Generator:
    def __init__(self, seed: int, without: frozenset[str]) -> None:
        self.seed, self.rng, self.without = seed, random.Random(seed), without
        self.key = 0
        self.saved = 0
        self.follows = self.rng.random() < 0.5
        self.variant = self.rng.choice(VARIANTS) if self.rng.random() < 0.4 else "lamb"

    # -- the model and its optimizers -----------------------------------------------------------------

    def program(self) -> Program:
        rng = self.rng
        hows = [self._how() for _ in range(2 if rng.random() < (0.35 if self.follows else 0.15) else 1)]
        resumes = len(hows) > 1
        sharded = any(how in data.WITH_DTENSORS for how in hows)
        layers = self._layers(sharded)
        bare = sharded or "ddp" in hows
        numbers = list(range(len(layers)))
        tied = any(
            not slot.name.startswith(f"layers.{i}.") for i, layer in enumerate(layers) for slot in layer
        )
        held_out = numbers.pop() if not tied and not sharded and not resumes and rng.random() < 0.15 else None
        frozen = (numbers[-1],) if not tied and not bare and len(numbers) > 1 and rng.random() < 0.15 else ()
        optimizers = self._optimizers(
            numbers, two=not resumes and len(numbers) > 1 and rng.random() < 0.2 and "two" not in self.without
        )
        self.low = any(slot.dtype == "bfloat16" for layer in layers for slot in layer)
        settings = {
            "bucket_mb": rng.choice([0.001, 0.004, 32]),
            "overlap": rng.random() < 0.8,
            "ema_decay": rng.choice([None, 0.5, 0.9]) if self.follows else None,
        }
        plain = not bare and not resumes
        wrapper = rng.choice(["accelerate", "inherits", "copies"])
        program = Program(
            seed=self.seed,
            layers=layers,
            options={
                **self._options(),
                **self._rule(),
                "max_grad_norm": rng.choice([None, None, 0.5, 5.0]),
                "ratio_blocks": self._ratio_blocks(optimizers, layers) if rng.random() < 0.5 else None,
            },
            settings=settings,
            wrapper=wrapper if rng.random() < 0.25 and wrapper not in self.without else "",
            overlap_forward=plain and rng.random() < 0.1,
            phases=(),
            follows=self.follows,
            same=rng.random() < 0.2,
        )
        self.held_out = held_out
        replay = Replay(program)
        for number, how in enumerate(hows):
            if number:
                optimizers = tuple(
                    tuple(
                        Group(
                            tuple(dict.fromkeys(int(n.split(".")[1]) for n in names)),
                            {key: value for key, value in options.items() if key == "caution"},
                        )
                        for names, options in zip(o.groups, o.options, strict=True)
                    )
                    for o in replay.optimizers
                )
                frozen = tuple(sorted(replay.frozen)) if how in ("averaged", "stage2") else ()
            if replay.ended or replay.refusal is not None:
                break
            phase = Phase(
                self._world(),
                how,
                optimizers,
                frozen,
                (),
                self._formats(how, is_whole=replay.form == "whole"),
            )
            replay.start(phase)
            ops = self._operations(replay, last=number == len(hows) - 1)
            program = replace(program, phases=(*program.phases, replace(phase, ops=tuple(ops))))
            if ops[-1].kind != "end_phase":
                break
        return program

    def _how(self) -> str:
        weights = {"averaged": 4, "ddp": 3, "stage2": 8, "sharded": 3, "mixed1": 1, "mixed2": 1}
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def _world(self) -> int:
        return self.rng.choices([1, 2, 3], [2, 5, 3])[0]

    def _layers(self, sharded: bool) -> tuple[tuple[Slot, ...], ...]:
        rng = self.rng
        one_dtype = rng.choices(["float32", "bfloat16", "float64"], [6, 3, 1] if self.follows else [8, 1, 1])[
            0
        ]
        layers: list[tuple[Slot, ...]] = []
        for i in range(rng.randint(2, 4)):
            dtype = one_dtype
            if not sharded and rng.random() < 0.1:
                dtype = rng.choice(["float32", "bfloat16", "float64"])
            slots = []
            for attribute in "abc"[: rng.randint(1, 3)]:
                shape = rng.choice(SHARDABLE if sharded else SHAPES)
                transposed = not sharded and len(shape) == 2 and rng.random() < 0.2
                slots.append(Slot(f"layers.{i}.{attribute}", shape, dtype, transposed))
            layers.append(tuple(slots))
        if not sharded and rng.random() < 0.2:
            source = rng.choice(layers[0])
            layers[-1] = (*layers[-1][:-1], source)
            if all(slot.name == source.name for slot in layers[-1]):
                layers[-1] = (Slot(f"layers.{len(layers) - 1}.a", (7,), source.dtype), source)
        return tuple(layers)

    def _optimizers(self, numbers: list[int], two: bool) -> tuple[tuple[Group, ...], ...]:
        rng = self.rng
        if two:
            cut = rng.randint(1, len(numbers) - 1)
            return (Group(tuple(numbers[:cut])),), (Group(tuple(numbers[cut:])),)
        if len(numbers) > 1 and rng.random() < 0.4:
            cut = rng.randint(1, len(numbers) - 1)
            return ((Group(tuple(numbers[:cut])), Group(tuple(numbers[cut:]), self._group_options())),)
        return ((Group(tuple(numbers)),),)

    def _options(self) -> dict[str, Any]:
        rng = self.rng
        options = {
            "lr": rng.choice([0.02, 0.05, 0.1]),
            "betas": rng.choice([(0.9, 0.999), (0.8, 0.9), (0.0, 0.99)]),
            "weight_decay": rng.choice([0.0, 0.01, 0.3]),
        }
        if self.variant in PLAIN_VARIANTS and rng.random() < 0.2:
            options["caution"] = True
        return options

    def _group_options(self) -> dict[str, Any]:
        own = self.follows and self.rng.random() < 0.4
        return {**self._options(), **({"state_dtype": self.rng.choice(STATE_DTYPES)} if own else {})}

    def _rule(self) -> dict[str, Any]:
        return {"variant": self.variant, **({"trust_coefficient": 0.2} if "lars" in self.variant else {})}

    def _formats(self, how: str, *, is_whole: bool) -> dict[str, Any]:
        """The formats of a phase: of state, and of messages where the optimizer sends them."""
        rng = self.rng
        remainders = rng.choice([False, True, 8] if self.follows else [False, True]) if self.low else False
        if not self.follows:
            return {"store_param_remainders": remainders}
        formats = {"state_dtype": rng.choice(STATE_DTYPES), "store_param_remainders": remainders}
        if how not in data.WITH_DTENSORS:
            formats["gather_dtype"] = rng.choice(WIRE_DTYPES)
            if is_whole:
                formats["gather_dtype"] = None
            if formats["gather_dtype"] == "float8_e4m3fn":
                formats["store_param_remainders"] = False
        if how == "stage2":
            formats["reduce_dtype"] = rng.choice(WIRE_DTYPES)
        return formats

    def _ratio_blocks(
        self, optimizers: tuple[tuple[Group, ...], ...], layers: tuple[tuple[Slot, ...], ...]
    ) -> dict[str, Any] | None:
        """Every pattern matches a parameter that is there at construction, and perhaps some that are added later."""
        chosen: dict[str, Any] = {}
        for slot in {slot.name: slot for layer in layers for slot in layer}.values():
            rows, row = (slot.shape[0], prod(slot.shape[1:])) if slot.shape else (1, 1)
            counts = [n for n in range(2, max(rows, 2) + 1) if rows % n == 0]
            # A ratio block of 8-bit moments begins at a multiple of 256 elements.
            if counts and rows <= MOST_BLOCKS and not slot.transposed and not (self.follows and row % 256):
                chosen[slot.name] = self.rng.choice(counts)
        there = {s.name for group in optimizers[0] for number in group.layers for s in layers[number]}
        if len(optimizers) > 1 or not there & set(chosen):
            return None
        if self.rng.random() < 0.5:
            return {f"^({'|'.join(map(re.escape, chosen))})$": "dim0"}
        return {f"^{re.escape(name)}$": count for name, count in chosen.items() if name in there}

    # -- operations -----------------------------------------------------------------------------------

    def _operations(self, replay: Replay, last: bool) -> list[Op]:
        ops: list[Op] = []
        # A weight that another gather_dtype rounded would be taken for one that the user wrote.
        is_whole = replay.settings.get("gather_dtype") is None and self.seed % 2
        end = Op("end_phase", {"form": "whole" if is_whole else "checkpoint"})
        if replay.phase and self.follows:
            replay.apply(Op("look"))
            ops.append(Op("look"))
        length = self.rng.randint(4, MOST_OPERATIONS - 2)

        def add(op: Op) -> bool:
            if self.without & _words(op):
                return False
            try:
                replay.apply(op)
            except Undefined:
                return False
            ops.append(op)
            return True

        for _ in range(20 * length):
            if replay.ended or len(ops) >= length:
                break
            if replay.refusal is not None:
                self._lead_to_error(replay, add)
                break
            for op in self._scene(replay, late=len(ops) > length // 2):
                add(op)
                if replay.ended:
                    break
        if not replay.ended and replay.refusal is not None:
            self._lead_to_error(replay, add)
        if not replay.ended:
            if last:
                add(Op("zero_grad", {"who": "model", "set_to_none": True}))
                add(self._backward(replay))
                add(Op("step"))
            elif not add(end):  # what was written has no step yet
                add(Op("zero_grad", {"who": "model", "set_to_none": True}))
                add(self._backward(replay))
                add(Op("step"))
                add(end)
        return ops

    def _lead_to_error(self, replay: Replay, add: Any) -> None:
        if not add(Op("step")):
            add(self._backward(replay, whole=True))
            add(Op("step"))

    def _scene(self, replay: Replay, late: bool) -> list[Op]:
        """A few operations that belong together."""
        scenes = {self._train: 10, self._gradients: 5, self._edit: 2, self._state: 2, self._handling: 3}
        if late:
            scenes[self._difference] = 2
        return self.rng.choices(list(scenes), list(scenes.values()))[0](replay)

    def _train(self, replay: Replay) -> list[Op]:
        rng, world = self.rng, replay.world
        if rng.random() < 0.2:
            clip = [rng.choice(["ours", "torch"]), rng.choice([0.3, 3.0])] if rng.random() < 0.4 else None
            nan = rng.randrange(world) if rng.random() < 0.2 else None
            args = {**self._backward(replay).args, "unscale": clip is not None or rng.random() < 0.5}
            args.pop("collective", None)
            return [Op("amp_step", {**args, "clip": clip, "nan": nan})]
        if rng.random() < 0.1:
            args = self._backward(replay).args
            return [Op("closure_step", {"parts": args["parts"], "key": args["key"]})]
        ops = [self._zero(replay)] if rng.random() < 0.85 else []
        ops.append(self._backward(replay))
        if rng.random() < 0.3:
            ops.append(self._backward(replay))
        if rng.random() < 0.3:
            ops.append(Op("read_norms"))
        if rng.random() < 0.3:
            kind = rng.choice(["ours", "torch"])
            optimizer = rng.randrange(len(replay.optimizers))
            ops.append(
                Op("clip", {"kind": kind, "optimizer": optimizer, "limit": rng.choice([0.3, 3.0, 1e4])})
            )
        if rng.random() < 0.9:
            ops.append(Op("step"))
        return ops

    def _backward(self, replay: Replay, whole: bool = False, **more: Any) -> Op:
        rng, world = self.rng, replay.world
        numbers = [i for i in range(len(replay.program.layers)) if self._is_in_use(replay, i)]
        part = (
            numbers if whole or rng.random() < 0.6 else [i for i in numbers if rng.random() < 0.6] or numbers
        )
        parts = [part] * world
        if not whole and replay.how not in data.WITH_DTENSORS and rng.random() < 0.3:
            parts = [[i for i in numbers if rng.random() < 0.7] or numbers[:1] for _ in range(world)]
        self.key += 1
        args: dict[str, Any] = {"parts": parts, "key": self.key, **more}
        common = [i for i in numbers if all(i in own for own in parts)]
        if not whole and common and "fail" not in more and rng.random() < 0.1:
            args["collective"] = rng.choice(common)
        return Op("backward", args)

    def _is_in_use(self, replay: Replay, layer: int) -> bool:
        names = replay.program.names_of([layer])
        return any(set(names) <= set(optimizer.names) for optimizer in replay.optimizers)

    def _zero(self, replay: Replay) -> Op:
        rng = self.rng
        who: Any = "model"
        if rng.random() < 0.6:
            who = ["optimizer", rng.randrange(len(replay.optimizers))]
        elif rng.random() < 0.3:
            who = ["layer", rng.randrange(len(replay.program.layers))]
        return Op("zero_grad", {"who": who, "set_to_none": rng.random() < 0.8})

    def _gradients(self, replay: Replay) -> list[Op]:
        """What users do to gradients between backward and step."""
        rng = self.rng
        kind = rng.choice(
            ["none", "scale", "assign", "no_sync", "fail", "nan", "zero", "clip twice", "step again"]
        )
        if kind == "none":
            return [Op("grad_none", {"names": self._names(replay)}), Op("step")]
        if kind == "scale":
            return [
                Op("grad_scale", {"names": self._names(replay), "factor": rng.choice([0.5, 0.37, 3.0, 0.0])})
            ]
        if kind == "assign":
            self.key += 1
            return [Op("grad_assign", {"names": self._names(replay), "key": self.key})]
        if kind == "no_sync":
            return [self._backward(replay, sync=False), self._backward(replay)]
        if kind == "fail":
            lowest = rng.randrange(len(replay.program.layers) + 1)
            fail = [lowest if rng.random() < 0.6 else None for _ in range(replay.world)]
            after = [self._zero(replay)] if rng.random() < 0.7 else []
            return [self._backward(replay, fail=fail), *after, self._backward(replay), Op("step")]
        if kind == "nan":
            return [self._backward(replay, nan=rng.randrange(replay.world)), Op("step"), self._zero(replay)]
        if kind == "zero":
            return [self._zero(replay), self._backward(replay)]
        if kind == "clip twice":
            limits = [0.5, 2.0] if rng.random() < 0.5 else [2.0, 0.5]
            clips = [Op("clip", {"kind": "ours", "optimizer": 0, "limit": limit}) for limit in limits]
            return [*clips, Op("step"), self._zero(replay)]
        return [Op("step")]

    def _names(self, replay: Replay) -> list[str]:
        rng = self.rng
        names = [n for optimizer in replay.optimizers for n in optimizer.names]
        return rng.sample(names, rng.choice([1, 1, 2, len(names)]) if len(names) > 1 else 1)

    def _edit(self, replay: Replay) -> list[Op]:
        rng = self.rng
        optimizer = rng.randrange(len(replay.optimizers))
        option, value = self._option()
        return [
            Op("edit", {"optimizer": optimizer, "group": rng.randrange(2), "option": option, "value": value})
        ]

    def _option(self) -> tuple[str, Any]:
        rng = self.rng
        choices: dict[str, list[Any]] = {
            "lr": [0.03, 0.07, 0.0],
            "weight_decay": [0.0, 0.2],
            "betas": [(0.7, 0.95), (0.9, 0.99)],
            "max_grad_norm": [None, 0.7, 50.0],
            "exclude_from_weight_decay": PATTERNS,
            "exclude_from_layer_adaptation": PATTERNS,
        }
        option = rng.choice(list(choices))
        return option, rng.choice(choices[option])

    def _state(self, replay: Replay) -> list[Op]:
        rng = self.rng
        self.saved += 1
        ops = [
            Op(
                "save",
                {
                    "number": self.saved,
                    "form": rng.choices(["local", "full", "whole", "checkpoint"], [3, 2, 2, 1])[0],
                },
            )
        ]
        if rng.random() < 0.4:
            ops += [*self._train(replay)]
        return [*ops, Op("load", {"number": self.saved, "weights": rng.random() < 0.6})]

    def _handling(self, replay: Replay) -> list[Op]:
        """What frameworks do to the model and to parameters."""
        rng = self.rng
        if replay.frozen and rng.random() < 0.4:
            return [Op("unfreeze", {"layer": layer}) for layer in sorted(replay.frozen)]
        if self.held_out is not None and not self._is_in_use(replay, self.held_out) and rng.random() < 0.4:
            optimizer = rng.randrange(len(replay.optimizers))
            return [
                Op(
                    "add_group",
                    {"optimizer": optimizer, "layer": self.held_out, "options": self._group_options()},
                )
            ]
        kinds = [
            "freeze",
            "rewrite",
            "copy",
            "model",
            "share",
            "to",
            "evaluate",
            "evaluate",
            "replace",
            "averages",
        ]
        kind = rng.choice(kinds)
        layer = rng.randrange(len(replay.program.layers))
        if kind == "freeze":
            return [Op("zero_grad", {"who": "model", "set_to_none": True}), Op("freeze", {"layer": layer})]
        if kind == "rewrite":
            way = rng.choice(["copy", "copy", "data", "vector"])
            return [
                Op("rewrite", {"names": self._names(replay), "factor": rng.choice([0.5, 2.0]), "way": way})
            ]
        if kind == "copy" and (replay.world == 1 or rng.random() < 0.2):
            zero = Op("zero_grad", {"who": "model", "set_to_none": True})
            return [zero, Op("copy", {"way": rng.choice(["deepcopy", "pickle"])})]
        if kind == "averages" and self.follows:
            return [Op("averages")]
        if kind == "replace":
            return [Op("zero_grad", {"who": "model", "set_to_none": True}), Op("replace")]
        if kind == "model":
            return [Op("zero_grad", {"who": "model", "set_to_none": True}), Op("copy_model")]
        if kind == "share" and rng.random() < 0.3:
            return [Op("share_memory")]
        if kind == "to":
            return [Op("to", {"device": rng.choice(["cpu", "cpu:0"])})]
        self.key += 1
        return [Op("evaluate", {"key": self.key})]

    def _difference(self, replay: Replay) -> list[Op]:
        """One operation that differs on one rank, or one that the contract refuses."""
        rng = self.rng
        kind = rng.choice(["edit", "edit", "none", "scale", "clip", "assign", "add", "step", "half"])
        rank = rng.randrange(replay.world)
        start = [Op("zero_grad", {"who": "model", "set_to_none": True}), self._backward(replay, whole=True)]
        if kind == "edit":
            option, value = self._option()
            args = {"optimizer": 0, "group": 0, "option": option, "value": value}
            return [Op("edit", {**args, "rank": rank})]
        if kind == "none":
            return [*start, Op("grad_none", {"names": self._names(replay)[:1], "rank": rank})]
        if kind == "scale":
            args = {"names": self._names(replay)[:1], "factor": 3.0, "rank": rank}
            return [*start, Op("grad_scale", args)]
        if kind == "clip":
            return [*start, Op("clip", {"kind": "ours", "optimizer": 0, "limit": 0.1, "differs": 0.2})]
        if kind == "assign":
            self.key += 1
            return [*start, Op("grad_assign", {"names": self._names(replay)[:1], "key": self.key})]
        if kind == "add":
            return [*start, Op("grad_add", {"names": self._names(replay)[:1], "value": 0.25})]
        if kind == "step":
            return [*start, Op("step", {"missing": rank}), self._backward(replay, whole=True)]
        return [start[0], Op("half")]
