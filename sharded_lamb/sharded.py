"""`ShardedLamb`: LAMB whose state is cut over ranks, with exact trust ratios.

How the parts work together in a step::

    gradients ─(reduce-scatter)─► my slices, Σg²          reduction.py (stage 2), buckets.py (stage 1)
                     │  small all-reduce (a)              facts.py
                     ▼  pass 1: m, v; Σw², Σu²            engine.py → kernels
        small all-reduce (b): [2 x P] fp64                engine.py
                     │  pass 2: w                         engine.py → kernels
    parameters ◄─(all-gather)── my slices                 collectives.py
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_lamb import rule, state
from sharded_lamb.agreement import Description, check_agreement, describe_group, told_to_all
from sharded_lamb.averaged import AveragedGradients
from sharded_lamb.base import LambOptimizer, called_by
from sharded_lamb.collectives import Collectives, Pending, Topology, Traffic
from sharded_lamb.engine import gradient_square_sums, lamb_step
from sharded_lamb.facts import GradientFacts, SkipCounter
from sharded_lamb.holdings import Holdings, Plan, Settings
from sharded_lamb.hyperparams import RuleOptions, check_max_grad_norm
from sharded_lamb.kernels import Kernel, ReferenceKernel
from sharded_lamb.options import OptionTable
from sharded_lamb.reduction import BackwardReducer

logger = logging.getLogger("sharded_lamb")


@dataclass(frozen=True, slots=True)
class _LastStep:
    ratios: Tensor  # [P] fp64
    moved: Tensor  # [P] bool
    grad_norm: Tensor  # fp64 scalar


class ShardedLamb(LambOptimizer):
    """LAMB (arXiv 1904.00962) with optimizer state cut over ranks, exact for every parameter.

    Parameters become views of flat buckets. Each rank keeps moments (and fp32 masters of fp16 and bf16
    parameters) for its equal part of every bucket, updates that part, and gathers the others'.

    Collectives a step, on groups of its own: two small all-reduces whatever the number of parameters,
    ((a) gradient norm, finiteness and presence, 3 P fp64; (b) weight and update norms, 2 P fp64), one all-gather a
    bucket, and in stage 2 one reduce-scatter a bucket during backward.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts of either. Frozen parameters cost
            nothing and join when they are unfrozen.
        lr, betas, eps, weight_decay, variant, and further rule options: as for `Lamb`.
        stage: 1: ``.grad`` holds gradients averaged over ranks, as DistributedDataParallel leaves them.
            2: ``.grad`` is each rank's own; it is reduced during backward, averaged, and freed.
        process_group: the ranks that share the state; default: all.
        mesh: instead of ``process_group``: 1-D, or 2-D (replicate, shard): shard inside, replicate across.
        bucket_mb: MiB of parameters a bucket, > 0.
        master_dtype: of the copy that is updated, where the parameters' dtype differs.
        state_dtype: of the moments. (float64 parameters have float64 masters and moments.)
        reduce_dtype: of gradients on the wire in stage 2; None: the parameters' dtype.
        overlap: stage 2: reduce buckets as backward fills them; False: all at the end of backward.
        skip_nonfinite: a non-finite gradient on any rank leaves the step out on every rank: nothing moves. (Stage 1:
            a non-finite averaged gradient; each rank looks at its own slices of it.)
        max_consecutive_skips: after as many in a row, an error on every rank.

    Raises:
        ValueError, TypeError: a wrong option or parameter; ranks that disagree on names, shapes, dtypes or options
            (on every rank, within seconds).
        RuntimeError: ranks that do not construct it; WORLD_SIZE > 1 without a process group.

    Construction is collective: an agreement through the store, new groups, a broadcast of the weights of
    the first rank.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "lamb",
        stage: Literal[1, 2] = 1,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        bucket_mb: float = 32,
        master_dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype | None = None,
        overlap: bool = True,
        skip_nonfinite: bool = True,
        max_consecutive_skips: int = 10,
        **options: Unpack[RuleOptions],
    ) -> None:
        topology = Topology.of(process_group, mesh)
        with told_to_all(topology):
            self._settings = Settings(
                stage,
                bucket_mb,
                master_dtype,
                state_dtype,
                reduce_dtype,
                overlap,
                skip_nonfinite,
                max_consecutive_skips,
            )
            self._holdings = Holdings(self, topology, self._settings)
            scalars = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            super().__init__(params, scalars, variant, options)
        plan = self._agreed_plan()
        self._kernel: Kernel = ReferenceKernel()
        self._collectives = Collectives(topology, plan.device)
        self._gradients: AveragedGradients | BackwardReducer
        if stage == 1:
            self._gradients = AveragedGradients(self._collectives, self._square_sums)
        else:
            self._gradients = BackwardReducer(self._collectives, self._square_sums, overlap=overlap)
        self._skips = SkipCounter(plan.device, max_consecutive_skips)
        self._clip: Tensor | None = None
        self._last: _LastStep | None = None
        self._summarized = False
        self._take_on(plan)

    # -- what is optimized --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the options of `ShardedLamb`'s groups. Collective after construction."""
        super().add_param_group(param_group)
        if self._constructed:
            try:
                self._take_on(self._agreed_plan())
            except (ValueError, TypeError, RuntimeError):
                self.param_groups.pop()
                raise

    def _agreed_plan(self) -> Plan:
        """Where the parameters go that want gradients and are not held yet; the same on every rank. Collective."""
        held = self._holdings
        with told_to_all(held.topology):
            plan = held.plan(list(self._named_parameters()))
        description: Description = [("construction", "ok"), ("settings", self._settings.described())]
        description.append(("max_grad_norm", self.max_grad_norm))
        description += [
            (f"options of group {i}", describe_group(group)) for i, group in enumerate(self.param_groups)
        ]
        description += [
            (f"parameter {i}", [name, list(p.shape), str(p.dtype), p.device.type])
            for i, (name, p, _) in enumerate(plan.rows, start=len(held.params))
        ]
        description += [("parameters", len(plan.layout.numels)), ("layout", plan.layout.digest())]
        check_agreement(held.topology, description)
        return plan

    def _take_on_unfrozen(self) -> None:
        held = self._holdings.index
        if any(p.requires_grad and p not in held for group in self.param_groups for p in group["params"]):
            self._take_on(self._agreed_plan())

    def _take_on(self, plan: Plan) -> None:
        """Collective: broadcasts the weights of the first rank."""
        held = self._holdings
        self._gradients.settle()
        buckets = held.adopt(plan, self._collectives)
        self._table: OptionTable = self._option_table(held.rows, plan.device)
        self._gradients.extend([name for name, _, _ in plan.rows], [p for _, p, _ in plan.rows], buckets)
        for param, entry in sorted(state.local_states(held.layout, held.buckets, held.step).items()):
            self.state[held.params[param]] = entry

    # -- the step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One LAMB step on every rank. Collective. Returns the closure's loss, or None.

        Raises:
            RuntimeError: a parameter was moved out of its bucket, too many steps in a row were skipped, or (stage 2)
                gradients were changed after they were reduced.
            ValueError: stage 1 got gradients that are not averaged over ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = self._holdings
        self._take_on_unfrozen()
        if not held.buckets:
            return loss
        held.check_attached()
        self._skips.check(held.names)
        found_inf = getattr(self, "found_inf", None)
        self._update(self._gradients.ready(found_inf), found_inf)
        self._gradients.stepped()
        self._clip = None
        if not self._summarized and held.topology.rank == 0:
            logger.info(held.summary(self._table, self._kernel.name, str(self.defaults["variant"])))
        self._summarized = True
        return loss

    def _update(self, facts: GradientFacts, found_inf: Tensor | None) -> None:
        held, collectives = self._holdings, self._collectives
        skip = self._must_skip(facts, found_inf)
        self._skips.record(skip, facts.bad)
        inverse = self._inverse_scale()
        grad_norm = facts.norm(self._table.options().wide) * inverse
        moved = (facts.present > 0) & ~skip
        if held.device.type == "cpu" and skip:
            self._last = _LastStep(torch.ones_like(held.step), moved, grad_norm)
            return
        if held.device.type != "cpu":  # the host does not know: coefficients of 0 must meet no nan
            for bucket in held.buckets:
                bucket.shard.grad.masked_fill_(skip, 0)
        clip = torch.ones_like(grad_norm) if self._clip is None else self._clip
        clip = clip * rule.clip_factor(grad_norm * clip, self.max_grad_norm)
        step = held.step + moved
        gathers: list[Pending] = []
        ratios = lamb_step(
            self._kernel,
            [bucket.shard for bucket in held.buckets],
            self._table.options(),
            lr=self._table.lr(),
            step=step,
            active=moved,
            grad_scale=torch.where(skip, torch.zeros_like(clip), inverse * clip),
            sum_over_ranks=self._sum_norms,
            written=lambda index: gathers.append(collectives.all_gather(held.buckets[index].flat)),
        )
        held.step.copy_(step)
        for pending in gathers:
            pending.wait()
        torch.autograd.graph.increment_version(
            held.params
        )  # a graph made before the step must not go unnoticed
        self._last = _LastStep(ratios, moved, grad_norm)

    def _sum_norms(self, square_sums: Tensor) -> None:
        """(b): every element counts once, so replicas but the first add nothing."""
        if not self._holdings.topology.is_first_replica:
            square_sums.zero_()
        self._collectives.all_reduce_small(square_sums)

    def _must_skip(self, facts: GradientFacts, found_inf: Tensor | None) -> Tensor:
        """Bool scalar on the device, the same on every rank."""
        skip = facts.found_inf | self._gradients.is_partial(facts)
        if self._settings.skip_nonfinite:
            skip = skip | facts.bad.any()
        if found_inf is not None:
            skip = skip | (found_inf.to(skip.device).reshape(()) > 0)
        return skip

    def _inverse_scale(self) -> Tensor:
        """What turns the held gradients into the true ones: GradScaler's inverse scale, or 1. fp64 scalar."""
        inverse = torch.ones((), dtype=torch.float64, device=self._holdings.device)
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            inverse = inverse / scale.to(inverse.device, torch.float64).reshape(())
        unscaled = self._gradients.unscale_factor()
        return inverse if unscaled is None else inverse * unscaled

    # -- gradients ----------------------------------------------------------------------------------

    def _square_sums(self) -> Tensor:
        shards = [bucket.shard for bucket in self._holdings.buckets]
        return gradient_square_sums(self._kernel, shards, len(self._holdings.params), self._holdings.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients: ``.grad``, and in stage 2 what was reduced, once nothing is in flight any more."""
        self._gradients.zero()
        self._clip = None
        super().zero_grad(set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Stage 2: backward inside accumulates in ``.grad`` and sends nothing; the next one outside reduces all.

        Stage 1 reduces nothing itself: there it does nothing (use DistributedDataParallel's).
        """
        before, self._gradients.enabled = self._gradients.enabled, False
        try:
            yield
        finally:
            self._gradients.enabled = before

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the averaged gradients by their global norm, at the coming step. Collective.

        Returns:
            The norm before clipping (fp32 scalar), the same bits on every rank.
        """
        check_max_grad_norm(max_norm)
        self._take_on_unfrozen()
        if not self._holdings.buckets:
            return torch.zeros(())
        facts = self._gradients.ready(None)
        unscaled = self._gradients.unscale_factor()
        norm = facts.norm(self._table.options().wide)
        norm = norm if unscaled is None else norm * unscaled
        self._clip = rule.clip_factor(norm, max_norm)
        return norm.float()

    # -- state --------------------------------------------------------------------------------------

    def _load_tensors(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        held = self._holdings
        for name, p in zip(held.names, held.params, strict=True):
            if p not in states:
                raise ValueError(f"the state dict has no state of {name!r}: it is of another model")
            state.check_local(name, self.state[p], states[p])
        for p in held.params:
            state.load_local(self.state[p], states[p])

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        super()._load_groups(saved_groups)
        self._table = self._option_table(
            self._holdings.rows, self._holdings.device
        )  # patterns may have changed
        self._skips.reset()

    def state_dict(self) -> dict[str, Any]:
        """This rank's slices, stamped: save every rank's own, and load it on the same rank of as many.

        Warns where a framework asks for it that saves the first rank's only (Hugging Face's Trainer).
        """
        if self._collectives.world_size > 1 and called_by("transformers.trainer"):
            warnings.warn(
                "transformers' Trainer saves the optimizer of rank 0 only, and state_dict() of a ShardedLamb over "
                f"{self._collectives.world_size} ranks holds rank 0's slices only: this checkpoint cannot resume the "
                "optimizer. Save full_state_dict() in a TrainerCallback, or set save_only_model=True",
                UserWarning,
                stacklevel=2,
            )
        return super().state_dict()

    def full_state_dict(self) -> dict[str, Any] | None:
        """Whole state tensors on the first rank's CPU, as `Lamb.load_state_dict` takes them; None elsewhere.

        Collective; streamed, so that no rank but the first ever holds more than a bucket of others' state.
        ``master`` entries (fp32 weights of fp16 and bf16 parameters) are there beside the moments.
        """
        held = self._holdings
        states = state.gather_full(self._collectives, held.layout, held.buckets, held.step)
        if states is None:
            return None
        packed = super().state_dict()
        order = [p for group in self.param_groups for p in group["params"]]
        whole = {place: states[held.index[p]] for place, p in enumerate(order) if p in held.index}
        return {"state": whole, "param_groups": packed["param_groups"]}

    def load_full_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Load what `full_state_dict` or `Lamb.state_dict` gave, at any number of ranks. Collective.

        Args:
            state_dict: on the first rank; others pass None.

        Raises:
            ValueError: on every rank, where the first rank's state does not fit.
        """
        held = self._holdings
        first = held.topology.rank == 0
        with told_to_all(held.topology, always=True):
            if first:
                saved = state.check_complete(state_dict)
                self._check_saved_groups(saved["param_groups"])
                order = [p for group in self.param_groups for p in group["params"]]
                states = state.by_index(saved["state"], [held.index.get(p) for p in order])
                state.check_full(held.names, [tuple(p.shape) for p in held.params], states)
        groups: list[Any] = [state_dict["param_groups"] if first and state_dict is not None else None]
        if held.topology.everyone[1:]:
            dist.broadcast_object_list(groups, held.topology.everyone[0], group=self._collectives.everyone)
        state.scatter_full(self._collectives, held.buckets, held.step, states if first else None)
        self._load_groups(groups[0])

    def __getstate__(self) -> dict[str, Any]:
        if self._collectives.world_size > 1:
            raise TypeError(
                "a ShardedLamb over several ranks holds one rank's slices and process groups, and cannot be pickled or "
                "copied: use state_dict() on every rank, or full_state_dict()"
            )
        return {
            "settings": self._settings,
            "defaults": self.defaults,
            "max_grad_norm": self.max_grad_norm,
            "param_groups": self.param_groups,
            "full": self.full_state_dict(),
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        settings: Settings = pickled["settings"]
        defaults = dict(pickled["defaults"])
        keywords = {name: getattr(settings, name) for name in settings.__slots__}
        self.__init__(  # type: ignore[misc]
            pickled["param_groups"], **keywords, **defaults, max_grad_norm=pickled["max_grad_norm"]
        )
        self.load_full_state_dict(pickled["full"])

    # -- what happened ------------------------------------------------------------------------------

    def trust_ratios(self) -> dict[str, float]:
        """{name: ratio} of the parameters that the last step moved; the same on every rank. Reads the device."""
        if self._last is None:
            return {}
        rows = zip(self._holdings.names, self._last.ratios.tolist(), self._last.moved.tolist(), strict=False)
        return {name: ratio for name, ratio, moved in rows if moved}

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's averaged gradients, unscaled, before clipping. Reads the device."""
        return None if self._last is None else float(self._last.grad_norm.item())

    @property
    def skipped_steps(self) -> int:
        """Steps left out for non-finite gradients since construction. Reads the device."""
        return self._skips.total

    @property
    def traffic(self) -> Traffic:
        """Collectives and bytes that this rank sent, by name, since construction."""
        return self._collectives.traffic

    def expected_bytes(self) -> dict[str, int]:
        """Bytes that a step sends by its formula, by the names of `traffic`.

        A stage-1 optimizer's first two steps add 2 W fp64 to the small ones.
        """
        return self._holdings.bytes_on_wire()

    def memory(self) -> dict[str, int]:
        """Bytes on this rank: parameters, masters, moments, gradient_shards, staging."""
        return {**self._holdings.bytes_by_kind(), "staging": self._gradients.staging_bytes()}
