"""`DeepSpeedLamb`: exact LAMB over the tensors that DeepSpeed's ZeRO 0, 1, 2, 3 makes of a model.

DeepSpeed averages, clips and partitions gradients, calls `step` with its own partitions in place of the parameters, and
sends the weights out again. What is done here::

    partitions, .grad ─► which parameter lies where           mapping.py, once, proved over all ranks
                            │  small all-reduce (a)           summary.py: non-finite (skip_nonfinite)
                            ▼  pass 1: m, v; Σw², Σu²         engine.py → kernels
                     small all-reduce (b): [2 x P] fp64       engine.py
                            ▼  pass 2: w                      engine.py → kernels

Not a line of LAMB's arithmetic is here: it is the same engine that `ShardedLamb` runs on.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives, Traffic
from sharded_lamb.comm.consistency import check_consistency, describe_group, propagate_errors
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core import rule
from sharded_lamb.core.hyperparams import fill
from sharded_lamb.core.parameters import NamedParameter, check_parameter
from sharded_lamb.deepspeed import calling, keys, whole
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, find_partitions
from sharded_lamb.deepspeed.proof import prove
from sharded_lamb.deepspeed.stepped import StateKeeper, Stepped, params_of
from sharded_lamb.gradients.summary import GradientSummary, agree
from sharded_lamb.kernels import Kernel, choose
from sharded_lamb.kernels.engine import Update, gradient_square_sums
from sharded_lamb.optim.base import PATTERN_OPTIONS, LambOptimizer
from sharded_lamb.optim.skips import SkipCounter

logger = logging.getLogger("sharded_lamb")


class DeepSpeedLamb(LambOptimizer):
    """LAMB for DeepSpeed's engine: ``"optimizer": {"type": "ShardedLamb", "params": {…}}`` in its config.

    Every parameter's trust ratio is exact although ZeRO steps flat partitions in which parameters begin and end
    anywhere: ratios of a partition as a whole, which any other LAMB computes there, are another optimizer's.

    Collectives a call of `step`, on a group of its own, whatever the number of parameters: one all-reduce of 2 P fp64
    norms, and one of 3 P fp64 gradient facts unless ``skip_nonfinite=False``; none without ZeRO. DeepSpeed calls it
    once a parameter group under ZeRO 1 and 2, once a subgroup under ZeRO 3, once in all otherwise. The first step also
    proves the mapping: one all-reduce of 2 P fp64, and an agreement through the store.

    A parameter whose gradient is 0 on every rank counts as one without a gradient (DeepSpeed hands zeros for those) and
    is left untouched, unless ``skip_nonfinite=False``: then it decays. Steps are counted per partition.

    Args:
        params: as DeepSpeed passes them. Names, for patterns, are found in the engine or by `name_parameters`.
        lr, betas, eps, weight_decay: as for `Lamb`; with ``variant="deepspeed"`` eps is 1e-8 and weight_decay 0 if not
            given.
        variant: "lamb" (the default) or any of `VARIANTS`; "deepspeed" keeps the step size of configs written for
            DeepSpeed's Lamb: bias correction on the learning rate, ratios in (0.01, 10).
        skip_nonfinite: a call of `step` whose gradients are non-finite on any rank is left out on all. DeepSpeed itself
            leaves the whole step out before, but in fp32 without ZeRO and where ``bf16.check_grad_overflow`` is off:
            there, of several groups, those with finite gradients move.
        max_consecutive_skips: after as many in a row, an error on every rank.
        options: the rule's options as for `Lamb`, and the keys of DeepSpeed's Lamb: ``max_coeff``, ``min_coeff``,
            ``eps_inside_sqrt``, ``bias_correction``. OneBitLamb's keys are accepted with a warning.

    Raises:
        ValueError: an option out of range; patterns without names; a way of sharding that is not supported. At the
            first `step`, on every rank: partitions that cannot be mapped, ranks that disagree.
    """

    _clip_remedy = 'set "gradient_clipping" at the top of the DeepSpeed config to'
    _name_remedy = (
        "DeepSpeed passes none, and neither its engine nor sharded_lamb.deepspeed.initialize made this optimizer. Call "
        "sharded_lamb.deepspeed.name_parameters(model) before"
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        variant: str = "lamb",
        skip_nonfinite: bool = True,
        max_consecutive_skips: int = 10,
        **options: Any,
    ) -> None:
        engine = calling.calling_engine()
        if engine is not None:
            calling.check_supported(engine)
        rule_options = keys.translate(variant, options)
        clip = None if engine is None else calling.clipping(engine) or None
        self._check_clipping(fill(variant, rule_options)["max_grad_norm"], clip, engine is not None)
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        scalars = {**keys.scalar_defaults(variant), **{k: v for k, v in given.items() if v is not None}}
        if max_consecutive_skips < 1:
            raise ValueError(f"max_consecutive_skips must be >= 1, got {max_consecutive_skips!r}")
        self._skip_nonfinite, self._max_skips = skip_nonfinite, max_consecutive_skips
        super().__init__(
            calling.with_names(params, engine), scalars, variant, {**rule_options, "max_grad_norm": clip}
        )
        self._rows: list[NamedParameter] = list(self._named_parameters())
        for name, p, _ in self._rows:
            check_parameter(name, p)
        for group in self.param_groups:  # DeepSpeed replaces "params": names of its tensors they are not
            group.pop("param_names", None)
        self._groups = list(self.param_groups)  # DeepSpeed's steps swap the list, not the groups
        self._keeper = StateKeeper(self.state)
        self._kernels: dict[torch.device, Kernel] = {}  # partitions may lie on several: offload
        self._held: OptimizerPartitions | None = None
        self._called = self._proved = False
        self._everyone: Collectives  # all ranks
        self._collectives: Collectives  # those among which parameters are cut
        self._stepped: dict[tuple[int, ...], Stepped] = {}
        self._skipped_before = 0  # by calls that were forgotten, or as a checkpoint said
        self._last: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # parameters of a call → ratios, moved
        self._options_then = self._options_now()

    @staticmethod
    def _check_clipping(wanted: float | None, clip: float | None, known: bool) -> None:
        """DeepSpeed clips before the optimizer sees gradients: a variant that clips needs it to do so."""
        if wanted is None or wanted == clip:
            return
        if not known:
            logger.warning('this variant clips gradients: set "gradient_clipping": %g in the config', wanted)
            return
        raise ValueError(
            f"this variant clips gradients at {wanted}, and under DeepSpeed clipping is DeepSpeed's: set "
            f'"gradient_clipping": {wanted} at the top of its config (it is {clip} now)'
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at construction: DeepSpeed partitions the groups that it is given. Raises ValueError later.

        A group may have DeepSpeed's keys too.
        """
        if self._constructed:
            raise ValueError(
                "DeepSpeed has partitioned the parameters already: pass all groups to initialize()"
            )
        if isinstance(param_group, dict):
            rule = {key: value for key, value in param_group.items() if key in keys.RULE_KEYS}
            rest = {key: value for key, value in param_group.items() if key not in rule}
            param_group = {**rest, **keys.translate(rest.get("variant", self.defaults["variant"]), rule)}
        super().add_param_group(param_group)

    # -- the step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One LAMB step of what DeepSpeed put into the groups. Collective under ZeRO. Returns the closure's loss.

        Raises:
            ValueError: at the first step: partitions that cannot be mapped (on every rank).
            RuntimeError: too many steps in a row were skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if not tensors:
            return loss
        held = self._mapped()
        self._take_on_state(held)
        first, self._called = not self._called, True
        if first and self._is_probe(held):
            return loss
        if not self._proved:
            prove(self._rows, held, self._everyone)
            self._proved = True
        self._update(self._stepped_of(tensors, held))
        self._options_then = self._options_now()
        return loss

    def _mapped(self) -> OptimizerPartitions:
        """What lies where; found and agreed on at the first call. Collective then."""
        if self._held is None:
            world = Topology.of(None, None)
            with propagate_errors(world):
                held = find_partitions(self, self._rows, self._groups)
                for device in {partition.tensor.device for partition in held.partitions}:
                    self._kernel_on(device)
            check_consistency(world, self._description(held))
            here = (world.global_rank,)
            device = calling.accelerator_device()
            self._everyone = Collectives(world, device)
            alone = Topology(here, here, here, world.global_rank)
            self._collectives = self._everyone if held.sharded else Collectives(alone, device)
            self._held = held
            if world.rank == 0:
                logger.info(self._summary(held, len(world.everyone)))
        return self._held

    def _description(self, held: OptimizerPartitions) -> list[tuple[str, Any]]:
        described: list[tuple[str, Any]] = [("construction", "ok"), ("partitions", held.kind)]
        described += [
            (f"options of group {i}", describe_group(group)) for i, group in enumerate(self._groups)
        ]
        described += [
            (f"parameter {i}", [name, list(getattr(p, "ds_shape", p.shape)), str(p.dtype)])
            for i, (name, p, _) in enumerate(self._rows)
        ]
        described.append(("kernel", self._kernel_names()))
        return [*described, ("tensors of a step", [list(x.params) for x in held.partitions])]

    def _is_probe(self, held: OptimizerPartitions) -> bool:
        """FP16_UnfusedOptimizer steps once in its constructor with all gradients 0, to have the state made.

        Moments and decay would make a real step of it: u = λw, ratio 1/λ, every weight smaller by η.
        """
        copies = all(x.tensor is not self._rows[x.params[0]][1] for x in held.partitions)
        return (
            copies
            and not held.sharded
            and not any(x.tensor.grad is not None and bool(x.tensor.grad.any()) for x in held.partitions)
        )

    def _stepped_of(self, tensors: list[Tensor], held: OptimizerPartitions) -> Stepped:
        key = tuple(map(id, tensors))
        if key not in self._stepped:
            of = {id(partition.tensor): partition for partition in held.partitions}
            if not of.keys() >= set(key):
                raise RuntimeError(
                    "DeepSpeed steps a tensor that was not there at the first step: a partition was made anew since, "
                    "and what lies where in it is not known. Construct the engine again and load a checkpoint"
                )
            partitions = [of[one] for one in key]
            rows = [self._rows[param] for param in params_of(partitions)]
            device = tensors[0].device
            self._stepped[key] = Stepped(
                partitions, self._option_table(rows, device), SkipCounter(device, self._max_skips)
            )
        return self._stepped[key]

    def _update(self, stepped: Stepped) -> None:
        stepped.skips.check([self._rows[param][0] for param in stepped.params])
        shards = stepped.shards(self.state)
        facts = self._facts(stepped, shards) if self._skip_nonfinite else None
        moved = torch.tensor(stepped.present()).to(stepped.device, non_blocking=True)
        if facts is not None:
            skip = facts.bad.any()
            stepped.skips.record(skip, facts.bad)
            # DeepSpeed hands zeros where no rank has a gradient; decay alone would shrink the weight by η a step.
            moved = (facts.square_sums > 0) & ~skip
            if stepped.device.type == "cpu" and skip:
                self._record(stepped, torch.ones(len(moved)), moved)
                return
        step, counts = stepped.next_steps(moved, self.state)
        options, one = stepped.table.options(), torch.ones((), dtype=torch.float64, device=stepped.device)
        kernel = self._kernel_on(stepped.device)
        update = Update(kernel, shards, options, step=step, active=moved, grad_scale=one)
        square_sums = update.moments_and_norms()
        self._collectives.all_reduce_small(square_sums)
        ratios = rule.ratios_of_sums(square_sums, options)
        for _ in update.apply(rule.step_sizes(stepped.table.lr(), ratios, options, step, moved)):
            pass  # DeepSpeed gathers all partitions after the step
        stepped.write_steps(counts, self.state)
        self._record(stepped, ratios, moved)

    def _kernel_names(self) -> str:
        return " and ".join(sorted({kernel.name for kernel in self._kernels.values()}))

    def _kernel_on(self, device: torch.device) -> Kernel:
        if device not in self._kernels:
            self._kernels[device] = choose("auto", device)
        return self._kernels[device]

    def _facts(self, stepped: Stepped, shards: list[Any]) -> GradientSummary:
        """(a): what all ranks must know of the gradients before any moment is written."""
        count = len(stepped.params)
        sums = gradient_square_sums(self._kernel_on(stepped.device), shards, count, stepped.device)
        return agree(self._collectives, sums, stepped.present(), [False] * count)

    def _record(self, stepped: Stepped, ratios: Tensor, moved: Tensor) -> None:
        self._last[stepped.params] = ratios, moved

    # -- state --------------------------------------------------------------------------------------

    def _take_on_state(self, held: OptimizerPartitions) -> None:
        """State for every tensor at once: DeepSpeed links all groups' states after the first group's step."""
        if not self._keeper.ensure([partition.tensor for partition in held.partitions]):
            return
        if held.kind == "ZeRO-3":
            self._repair_groups()
        patterns = [[options[name] for name in PATTERN_OPTIONS] for options in self._options_now()]
        if patterns != [[options[name] for name in PATTERN_OPTIONS] for options in self._options_then]:
            self._forget_calls()  # a universal checkpoint was loaded, and groups' options came with it

    def _forget_calls(self) -> None:
        """Options or state are others now."""
        self._skipped_before = self.skipped_steps
        self._stepped.clear()

    def _repair_groups(self) -> None:
        """Loading a universal checkpoint under ZeRO-3 gives all groups the options of the first: undo that.

        A learning rate that differed between groups keeps its share of the first group's.
        """
        now, then = self._options_now(), self._options_then
        if (
            len(now) < 2
            or any(options != now[0] for options in now)
            or all(options == then[0] for options in then)
        ):
            return
        logger.warning(
            "the universal checkpoint gave all groups the options of the first; theirs are restored"
        )
        for group, before in zip(self._groups[1:], then[1:], strict=True):
            shares = before["lr"] / then[0]["lr"] if then[0]["lr"] else 1.0
            group.update({**before, "lr": now[0]["lr"] * shares})

    def _options_now(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in group.items() if key != "params"} for group in self._groups]

    def _load_tensors(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        for tensor in (tensor for group in self.param_groups for tensor in group["params"]):
            self._keeper.load(tensor, states.get(tensor))

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        super()._load_groups([self._understood(saved) for saved in saved_groups])
        self._forget_calls()

    def _understood(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved group of ours as it is; of another optimizer (DeepSpeed's Lamb), what is known here, in our terms."""
        if "variant" in saved:
            return saved
        rule = {key: value for key, value in saved.items() if key in keys.RULE_KEYS}
        scalars = {key: value for key, value in saved.items() if key in keys.SCALARS}
        return {**scalars, **keys.translate(self.defaults["variant"], rule)}

    def full_state_dict(self) -> dict[str, Any] | None:
        """Whole state tensors on the first rank's CPU, as `ShardedLamb.full_state_dict` gives them; None elsewhere.

        Collective; one parameter at a time. ``master`` (the fp32 weights) is always there.
        """
        held = self._mapped()
        self._take_on_state(held)
        states = whole.gather(self._rows, held, self.state, self._collectives)
        if dist.get_rank() != 0:
            return None
        return {"state": states, "param_groups": whole.groups_of_rows(self._rows, self._groups)}

    def load_full_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Load what `full_state_dict` gave here or in `ShardedLamb`, or `Lamb`'s state, at any stage and world size.

        Collective; before any step or between steps. ``master`` entries are written to the model's weights too.

        Args:
            state_dict: on the first rank; others pass None.

        Raises:
            ValueError: on every rank, where the first rank's state does not fit.
        """
        held = self._mapped()
        self._take_on_state(held)
        with propagate_errors(self._everyone.topology, always=True):
            if dist.get_rank() == 0:
                saved_groups = whole.check(self._rows, held, state_dict)
        groups: list[Any] = [saved_groups if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(groups, 0)
        whole.scatter(self._rows, held, self.state, state_dict)
        for group, saved in zip(self._groups, groups[0], strict=True):
            group.update(saved)
        self._forget_calls()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer inside a DeepSpeed engine cannot be pickled or copied: save the engine (save_checkpoint), or "
            "full_state_dict()"
        )

    # -- what happened ------------------------------------------------------------------------------

    def trust_ratios(self) -> dict[str, float]:
        """{name: ratio} of the parameters that the last step moved; the same on every rank. Reads the device."""
        found: dict[str, float] = {}
        for params, (ratios, moved) in self._last.items():
            rows = zip(params, ratios.tolist(), moved.tolist(), strict=True)
            found.update({self._rows[param][0]: ratio for param, ratio, moves in rows if moves})
        return found

    def get_lamb_coeffs(self) -> list[float]:
        """The ratios of `trust_ratios`, in the order of the parameters: DeepSpeed's own name for them."""
        ratios = self.trust_ratios()
        return [ratios[name] for name, _, _ in self._rows if name in ratios]

    @property
    def skipped_steps(self) -> int:
        """Calls of `step` left out here for non-finite gradients, not those DeepSpeed left out. Reads the device."""
        return self._skipped_before + sum(stepped.skips.total for stepped in self._stepped.values())

    @skipped_steps.setter
    def skipped_steps(self, total: int) -> None:
        self._skipped_before += total - self.skipped_steps

    @property
    def traffic(self) -> Traffic:
        """Collectives and bytes that this rank sent, by name, since the first step."""
        return self._collectives.traffic if self._held is not None else Traffic()

    def _summary(self, held: OptimizerPartitions, ranks: int) -> str:
        tensors = sum(len(partition.params) for partition in held.partitions)
        return (
            f"ShardedLamb in DeepSpeed ({held.kind}): {ranks} ranks, {tensors} tensors in {len(held.partitions)} "
            f"partitions, kernel {self._kernel_names()}, variant {self.defaults['variant']}"
        )
