"""`DeepSpeedLamb`: LAMB with exact trust ratios over the partitions of DeepSpeed's ZeRO 0, 1, 2, 3.

DeepSpeed averages, clips and partitions gradients, calls `step` with its partitions in place of the parameters, and
all-gathers the weights. This module does the rest::

    partitions, .grad ─► segments of parameters               mapping.py, once, proved over all ranks
                            │  small all-reduce (a)           summary.py: non-finite (skip_nonfinite)
                            ▼  pass 1: m, v; Σw², Σu²         engine.py → kernels
                     small all-reduce (b): [2 x P] fp64       agreed_options.py
                            ▼  pass 2: w                      engine.py → kernels

LAMB's arithmetic is in the engine, which `ShardedLamb` shares.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives, Traffic
from sharded_lamb.comm.consistency import Description, check_consistency, describe_groups, propagate_errors
from sharded_lamb.comm.step_agreement import StepAgreement
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core import rule
from sharded_lamb.core.host_values import to_device
from sharded_lamb.core.hyperparams import fill, flag, integer, validate_group
from sharded_lamb.core.layers import Layers
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import NamedParameter, check_parameter, named, shape_of
from sharded_lamb.deepspeed import engine_probe, full_state, keys
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, find_partitions
from sharded_lamb.deepspeed.proof import prove
from sharded_lamb.deepspeed.step_tensors import StateKeeper, StepTensors, params_of
from sharded_lamb.gradients.summary import GradientSummary, agree
from sharded_lamb.kernels import Kernel, choose
from sharded_lamb.kernels.engine import Update, gradient_square_sums
from sharded_lamb.optim.agreed_options import AgreedLive, AgreedOptions, collective
from sharded_lamb.optim.base import States
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.optim.step_results import LastStep, StepResults

logger = logging.getLogger("sharded_lamb")


@dataclass(slots=True)
class _Live(AgreedLive):
    partitions: OptimizerPartitions | None = None
    is_called: bool = False
    is_proved: bool = False
    everyone: Collectives | None = None  # all ranks
    collectives: Collectives | None = None  # the ranks that share parameters
    skipped_before: int = 0  # by discarded entries of ``_step_tensors``, or from a checkpoint
    last_options: list[dict[str, Any]] = field(default_factory=list)


class DeepSpeedLamb(AgreedOptions):
    """LAMB for DeepSpeed's engine: ``"optimizer": {"type": "ShardedLamb", "params": {…}}`` in its config.

    Every parameter's trust ratio is exact, although ZeRO steps flat partitions in which parameters start and end at any
    element; other LAMB implementations compute the ratio of a partition there, which is a different algorithm.

    Collectives per call of `step`, on a dedicated group, for any number of parameters: one all-reduce of 2 P fp64
    norms (3 P with ``nesterov``, 4 P with ``caution``, P with ``lars``) and 6 of a checksum of all options, and one of
    the fp64 gradient summary (3 P + 1) unless ``skip_nonfinite=False``; none without ZeRO. DeepSpeed calls it once per
    parameter group under ZeRO 1 and 2, once per subgroup under ZeRO 3, else once per step. The first step also checks
    consistency through the store and proves the mapping: one all-reduce of 4 P fp64.

    A parameter whose gradient is 0 on every rank counts as one without a gradient (DeepSpeed passes zeros for those)
    and is unchanged; with ``skip_nonfinite=False`` it decays. Each partition has one step count.

    Args:
        params: as DeepSpeed passes them. Names, for patterns, come from the engine or from `name_parameters`.
        lr, betas, eps, weight_decay: as for `Lamb`; with ``variant="deepspeed"`` the defaults are eps 1e-8 and
            weight_decay 0.
        variant: "lamb" (the default) or any of `VARIANTS`; "deepspeed" keeps the step size of configs written for
            DeepSpeed's Lamb: bias correction on the learning rate, ratios in (0.01, 10).
        skip_nonfinite: skip a call of `step` on all ranks if gradients are non-finite on any rank. DeepSpeed itself
            skips such a step earlier, except in fp32 without ZeRO and with ``bf16.check_grad_overflow`` off: there,
            with several groups, those with finite gradients are updated.
        max_consecutive_skips: raise on every rank after this many skips in a row.
        options: the rule's options as for `Lamb`, and the keys of DeepSpeed's Lamb: ``max_coeff``, ``min_coeff``,
            ``eps_inside_sqrt``, ``bias_correction``. OneBitLamb's keys are accepted with a warning.

    Raises:
        ValueError: an option is out of range; patterns without names; unsupported sharding. At the first `step`, on
            every rank: partitions that cannot be mapped, ranks that disagree.
        TypeError: an unknown option; a complex, integer or sparse parameter.
    """

    _live: _Live
    _live_class = _Live
    _clip_remedy = 'set "gradient_clipping" at the top of the DeepSpeed config to'
    _name_remedy = (
        "DeepSpeed passes none, and neither its engine nor sharded_lamb.deepspeed.initialize constructed this "
        "optimizer: call sharded_lamb.deepspeed.name_parameters(model) before"
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
        engine = engine_probe.constructing_engine()
        if engine is not None:
            engine_probe.check_supported(engine)
        rule_options = keys.translate(variant, options)
        clip = None if engine is None else engine_probe.clipping(engine) or None
        self._check_clipping(fill(variant, rule_options)["max_grad_norm"], clip, engine is not None)
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        scalars = {**keys.scalar_defaults(variant), **{k: v for k, v in given.items() if v is not None}}
        self._skip_nonfinite = flag("skip_nonfinite", skip_nonfinite)
        self._max_skips = integer("max_consecutive_skips", max_consecutive_skips, 1, ">= 1, an int")
        self._groups: list[dict[str, Any]] = []  # DeepSpeed's steps replace the list, but not the groups
        self._names: dict[int, list[tuple[str | None, Tensor]]] = {}  # by the id of the group
        super().__init__(
            engine_probe.with_names(params, engine), scalars, variant, {**rule_options, "max_grad_norm": clip}
        )
        self._rows: list[NamedParameter] = list(self._named_parameters())
        for name, p, _ in self._rows:
            check_parameter(name, p)
        for group in self.param_groups:  # DeepSpeed replaces "params", so the names would no longer match
            self._names[id(group)] = list(named(group))
            group.pop("param_names", None)
        self._groups += self.param_groups
        self._state_keeper = StateKeeper(self.state, self.moments)
        self._kernels: dict[torch.device, Kernel] = {}  # partitions may be on several devices: offload
        self._step_tensors: dict[tuple[int, ...], StepTensors] = {}  # by the ids of the stepped tensors
        self._results: dict[tuple[int, ...], StepResults] = {}  # by parameters
        self._accept_options()
        self._live.last_options = self._current_options()

    def _groups_of_options(self) -> list[dict[str, Any]]:
        return self._groups or self.param_groups

    def _members(self, group: Mapping[str, Any]) -> Iterable[tuple[str | None, Tensor]]:
        return self._names.get(id(group)) or named(group)

    @staticmethod
    def _check_clipping(wanted: float | None, clip: float | None, known: bool) -> None:
        """DeepSpeed clips before `step`: a variant that clips needs the same value in DeepSpeed's config."""
        if wanted is None or wanted == clip:
            return
        if not known:
            logger.warning('this variant clips gradients: set "gradient_clipping": %g in the config', wanted)
            return
        raise ValueError(
            f"this variant clips gradients at {wanted}, and DeepSpeed clips before the optimizer sees them: set "
            f'"gradient_clipping": {wanted} at the top of its config (it is {clip} now)'
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group at construction; raises ValueError later, since DeepSpeed has partitioned the groups.

        A group may also have DeepSpeed's keys.
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

    @collective
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One LAMB step of the tensors that DeepSpeed put into the groups. Collective under ZeRO. Returns the loss.

        Raises:
            ValueError: at the first step, on every rank: partitions that cannot be mapped, ranks that disagree.
            RuntimeError: too many steps in a row were skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if not tensors:
            return loss
        partitions = self._find_partitions()
        self._ensure_state(partitions)
        first, self._live.is_called = not self._live.is_called, True
        if first and self._is_probe(partitions):
            return loss
        if not self._live.is_proved:
            prove(self._rows, partitions, self._everyone)
            self._live.is_proved = True
        self._update(self._step_tensors_of(tensors, partitions))
        self._live.last_options = self._current_options()
        return loss

    def _find_partitions(self) -> OptimizerPartitions:
        """This rank's partitions. Collective at the first call, which maps and compares them."""
        if self._live.partitions is None:
            world = Topology.of(None, None)
            with propagate_errors(world):
                partitions = find_partitions(self, self._rows, self._groups)
                for device in {partition.tensor.device for partition in partitions.local}:
                    self._kernel_on(device)
            check_consistency(world, self._description(partitions))
            here = (world.global_rank,)
            device = engine_probe.accelerator_device()
            self._live.everyone = Collectives(world, device)
            alone = Topology(here, here, here, world.global_rank)
            self._live.collectives = self._everyone if partitions.sharded else Collectives(alone, device)
            self._live.agreement = StepAgreement(self._collectives)
            self._live.partitions = partitions
            if world.rank == 0:
                logger.info(self._summary(partitions, len(world.everyone)))
        return self._live.partitions

    @property
    def _everyone(self) -> Collectives:
        return cast(Collectives, self._live.everyone)  # since the first step

    @property
    def _collectives(self) -> Collectives:
        return cast(Collectives, self._live.collectives)

    def _description(self, partitions: OptimizerPartitions) -> Description:
        description: Description = [("construction", "ok"), ("partitions", partitions.kind)]
        description += describe_groups(self._groups)
        description += [
            (f"parameter {i}", [name, list(shape_of(p)), str(p.dtype)])
            for i, (name, p, _) in enumerate(self._rows)
        ]
        description += [("kernel", self._kernel_names()), ("ratio_blocks", self.ratio_blocks)]
        return [*description, ("tensors of a step", [list(x.params) for x in partitions.local])]

    def _is_probe(self, partitions: OptimizerPartitions) -> bool:
        """Whether this is the step with zero gradients by which FP16_UnfusedOptimizer's constructor creates the state.

        Decay would make it an update: u = λw, ratio 1/λ, every weight smaller by η.
        """
        copies = all(x.tensor is not self._rows[x.params[0]][1] for x in partitions.local)
        return (
            copies
            and not partitions.sharded
            and not any(x.tensor.grad is not None and bool(x.tensor.grad.any()) for x in partitions.local)
        )

    def _step_tensors_of(self, tensors: list[Tensor], partitions: OptimizerPartitions) -> StepTensors:
        key = tuple(map(id, tensors))
        if key not in self._step_tensors:
            by_id = {id(partition.tensor): partition for partition in partitions.local}
            if not by_id.keys() >= set(key):
                raise RuntimeError(
                    "DeepSpeed steps a tensor that did not exist at the first step: it has replaced a partition since, "
                    "and the parameters in it are unknown. Construct the engine again and load a checkpoint"
                )
            stepped = [by_id[tensor_id] for tensor_id in key]
            rows = [self._rows[param] for param in params_of(stepped)]
            device = tensors[0].device
            table = OptionTable(rows, Layers.named(rows, self._ratio_blocks), device)
            skips = SkipCounter(device, self._max_skips)
            self._step_tensors[key] = StepTensors(stepped, table, skips, self.moments)
        return self._step_tensors[key]

    def _update(self, tensors: StepTensors) -> None:
        results = self._results.setdefault(tensors.params, StepResults())
        if tensors.skips.check(results):
            self._raise_disagreement()
        problem = self._option_problem(alone=self._collectives.world_size == 1)
        shards = tensors.shards(self.state)
        summarizes = self._skip_nonfinite or self._any("normalize_grad") or self._any("lars")
        summary = self._gradient_summary(tensors, shards) if summarizes else None
        layers, skip, sums = tensors.table.layers, None, None
        updated = layers.expand(to_device(tensors.present(), None, tensors.device))
        if summary is not None:
            skip, sums = summary.bad.any(), summary.square_sums
            # DeepSpeed passes zeros if no rank has a gradient; decay alone would shrink the weight by η per step.
            updated = layers.expand(layers.any_of(sums > 0)) & ~skip
            if tensors.device.type == "cpu" and skip:
                tensors.skips.record(skip)
                results.last = [LastStep(tensors.table, updated, skip, sums)]
                return
        if problem is not None:
            zeros = torch.zeros(len(self._sums), len(updated), dtype=torch.float64, device=tensors.device)
            self._all_reduce_agreed([zeros], problem)
        step, counts = tensors.next_steps(updated, self.state)
        options, scale = tensors.table.options(), torch.ones((), dtype=torch.float64, device=tensors.device)
        if summary is not None:
            scale = rule.gradient_scales(scale, summary.square_sums, options)
        update = Update(self._kernel_on(tensors.device), options, step=step, active=updated, grad_scale=scale)
        norm_sums = update.moments_and_norms(shards)
        differs = self._all_reduce_agreed([norm_sums])
        square_sums = update.square_sums(norm_sums)
        tensors.skips.record(torch.zeros_like(differs) if skip is None else skip, differs)
        ratios = rule.ratios_of_sums(square_sums, options, lr := tensors.table.lr(), sums, scale)
        step_sizes = rule.step_sizes(lr, ratios, options, step, updated & ~differs)
        list(update.apply([shards], step_sizes, lr, are_gathered=False))  # DeepSpeed gathers partitions
        tensors.write_steps(counts, self.state)
        results.last = [LastStep(tensors.table, updated, skip, sums, square_sums=square_sums, ratios=ratios)]

    def _kernel_names(self) -> str:
        return " and ".join(sorted({kernel.name for kernel in self._kernels.values()}))

    def _kernel_on(self, device: torch.device) -> Kernel:
        if device not in self._kernels:
            self._kernels[device] = choose("auto", device)
        return self._kernels[device]

    def _gradient_summary(self, tensors: StepTensors, shards: list[Any]) -> GradientSummary:
        """All-reduce (a): the gradient summary that all ranks need before they write moments."""
        kernel, present = self._kernel_on(tensors.device), tensors.present()
        sums = gradient_square_sums(kernel, shards, len(tensors.table), tensors.device)
        return agree(self._collectives, sums, present, [False] * len(present))

    # -- state --------------------------------------------------------------------------------------

    def _ensure_state(self, partitions: OptimizerPartitions) -> None:
        """Create the state of all tensors at once: DeepSpeed links all groups' states after the first group's step."""
        if not self._state_keeper.ensure([partition.tensor for partition in partitions.local]):
            return
        if partitions.kind == "ZeRO-3":
            self._repair_groups()

    def _discard_step_tensors(self) -> None:
        """Call after options or state changed."""
        self._live.skipped_before = self.skipped_steps
        self._step_tensors.clear()

    def _repair_groups(self) -> None:
        """Undo that loading a universal checkpoint under ZeRO-3 gives all groups the options of the first.

        A learning rate that differed between groups keeps its ratio to the first group's.
        """
        current, last = self._current_options(), self._live.last_options
        if (
            len(current) < 2
            or any(options != current[0] for options in current)
            or all(options == last[0] for options in last)
        ):
            return
        logger.warning(
            "the universal checkpoint gave all groups the options of the first; each group's own options are restored"
        )
        for group, before in zip(self._groups[1:], last[1:], strict=True):
            ratio = before["lr"] / last[0]["lr"] if last[0]["lr"] else 1.0
            group.update({**before, "lr": current[0]["lr"] * ratio})

    def _current_options(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in group.items() if key != "params"} for group in self._groups]

    def _load_states(self, states: States) -> None:
        for tensor in (tensor for group in self.param_groups for tensor in group["params"]):
            self._state_keeper.load(tensor, states.get(tensor))

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        super()._load_groups([self._translated(saved) for saved in saved_groups])
        self._discard_step_tensors()

    def _translated(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved group; of another optimizer (DeepSpeed's Lamb), its known options, translated."""
        if "variant" in saved:
            return saved
        rule = {key: value for key, value in saved.items() if key in keys.RULE_KEYS}
        scalars = {key: value for key, value in saved.items() if key in keys.SCALARS}
        return {**scalars, **keys.translate(self.defaults["variant"], rule)}

    def full_state_dict(self) -> dict[str, Any] | None:
        """Full state tensors on the first rank's CPU, as from `ShardedLamb.full_state_dict`; None elsewhere.

        Collective; one parameter at a time. Always contains ``master`` (the fp32 weights).
        """
        partitions = self._find_partitions()
        self._ensure_state(partitions)
        states = full_state.gather(self._rows, partitions, self.state, self.moments, self._collectives)
        if dist.get_rank() != 0:
            return None
        return {"state": states, "param_groups": full_state.groups_of_rows(self._rows, self._groups)}

    def load_full_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Load a full state dict of this class or `ShardedLamb`, or `Lamb`'s state dict, at any stage and world size.

        Collective; call before the first step or between steps. Also writes ``master`` entries to the model's weights.

        Args:
            state_dict: on the first rank; others pass None.

        Raises:
            ValueError: on every rank, if the first rank's state does not fit.
        """
        partitions = self._find_partitions()
        self._ensure_state(partitions)
        with propagate_errors(self._everyone.topology, always=True):
            if dist.get_rank() == 0:
                saved_groups = full_state.check(self._rows, partitions, self.moments, state_dict)
        groups: list[Any] = [saved_groups if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(groups, 0)
        full_state.scatter(self._rows, partitions, self.state, self.moments, state_dict)
        for group, saved in zip(self._groups, groups[0], strict=True):
            group.update(saved)
            group.update(validate_group(group))
        self._accept_options()
        self._discard_step_tensors()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer inside a DeepSpeed engine cannot be pickled or copied: save the engine (save_checkpoint), or "
            "full_state_dict()"
        )

    # -- results ------------------------------------------------------------------------------------

    def _step_results(self) -> list[StepResults]:
        return list(self._results.values())

    def get_lamb_coeffs(self) -> list[float]:
        """The ratios of `trust_ratios` in parameter order, a list: the name that DeepSpeed's Lamb uses."""
        ratios = self.trust_ratios()
        names = Layers.named(self._rows, self._ratio_blocks).names([name for name, _, _ in self._rows])
        return [ratios[name] for name in names if name in ratios]

    @property
    def skipped_steps(self) -> int:
        """Calls of `step` skipped for non-finite gradients, without those that DeepSpeed skips. Synchronizes."""
        return self._live.skipped_before + sum(tensors.skips.total for tensors in self._step_tensors.values())

    @skipped_steps.setter
    def skipped_steps(self, total: int) -> None:
        self._live.skipped_before += total - self.skipped_steps

    @property
    def traffic(self) -> Traffic:
        """Collectives and bytes sent by this rank since the first step, by name."""
        return self._collectives.traffic if self._live.partitions is not None else Traffic()

    def _summary(self, partitions: OptimizerPartitions, ranks: int) -> str:
        tensors = sum(len(partition.params) for partition in partitions.local)
        return (
            f"ShardedLamb in DeepSpeed ({partitions.kind}): {ranks} ranks, {tensors} tensors in "
            f"{len(partitions.local)} partitions, kernel {self._kernel_names()}, variant {self.defaults['variant']}"
        )
