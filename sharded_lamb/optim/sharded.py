"""`ShardedLamb`: LAMB with its state sharded over ranks and exact trust ratios.

The parts of a step::

    gradients ─(reduce-scatter)─► own slices, Σg²         gradients/reducer.py (stage 2), averaged.py (1, 3)
                     │  small all-reduce (a)              gradients/summary.py
                     ▼  pass 1: m, v; Σw², Σu²            kernels/engine.py
        small all-reduce (b): [2 x P] fp64, checksum      optim/agreed_options.py
                     │  pass 2: w                         kernels/engine.py
    parameters ◄─(all-gather)── own slices                comm/collectives.py
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable
from torch.distributed.device_mesh import DeviceMesh

from sharded_lamb.comm.consistency import propagate_errors
from sharded_lamb.comm.forward_gathers import Watch
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core import rule
from sharded_lamb.core.hyperparams import RuleOptions, check_max_grad_norm, fill, flag
from sharded_lamb.core.parameters import grad_dtype_of
from sharded_lamb.gradients.summary import GradientSummary, check_present
from sharded_lamb.kernels.engine import Update
from sharded_lamb.optim.agreed_options import collective
from sharded_lamb.optim.averages import AveragingOptimizer
from sharded_lamb.optim.grad_scaler import receives_grad_scale
from sharded_lamb.optim.step_results import LastStep
from sharded_lamb.sharding.param_store import ParamStore
from sharded_lamb.sharding.placements import materialized, root_ranks
from sharded_lamb.sharding.shard_plan import SETTINGS, Settings

logger = logging.getLogger("sharded_lamb")


class ShardedLamb(AveragingOptimizer):
    """LAMB (arXiv 1904.00962) with its state sharded over ranks and the exact trust ratio of every parameter.

    Parameters move into flat buckets, each with a storage of its own. Each rank stores moments (and fp32 masters of
    fp16 and bf16 parameters) for its equal shard of every bucket, updates that shard, and all-gathers the bucket. A
    step starts from weights written before it, in place or by ``.data =`` with the same shape, dtype and device.
    Parameters in shared memory stay there, so that other processes see every update, at two copies of them per step.
    A model that is moved to another device later (``model.to(device)``, Accelerate's ``prepare``) is followed, with its
    state, by the next `zero_grad`, `load_state_dict`, `clip_grad_norm_` or `step`; in stage 2 before backward. So are
    parameters that were replaced in the groups by others of the same names and shapes (Accelerate's FSDP2).

    DTensor parameters (``fully_shard``, HSDP, tensor parallel) keep their memory: they are stage 3, detected
    automatically, whatever ``stage`` is for plain parameters beside them. Each rank updates its local parts and stores
    their moments; norms are summed over the ranks that shard a parameter, each element once.

    Collectives per step, on process groups of its own: two small all-reduces, whatever the number P of parameters
    ((a) gradient norm, finiteness and presence, 3 P fp64; (b) weight and update norms, 2 P fp64 (3 P with ``nesterov``,
    4 P with ``caution``, in any group; P with ``lars``), and 6 of a checksum of all options, since a rank that steps
    with another one is an error on every rank), one all-gather per bucket, and in stage 2 one reduce-scatter per bucket
    during backward. With DTensors only, no clipping and ``skip_nonfinite=False``, (a) and (b) are one all-reduce of
    2 P more; stage 2 beside DTensors makes (a) twice. Each ratio block beyond a parameter's first adds one fp64 to (a)
    and as many as a parameter to (b).

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts of either. Frozen parameters take no
            optimizer memory and are registered when unfrozen. Plain parameters and DTensors mix.
        lr, betas, eps, weight_decay, variant: as for `Lamb`, and so are the rule options: bias_correction,
            grad_averaging, adam_w_mode, eps_inside_sqrt, max_grad_norm, trust_clip, weight_norm_clip,
            exclude_from_weight_decay, exclude_from_layer_adaptation, adapt_without_decay, normalize_grad, nesterov,
            decoupled_decay, corrected_weight_decay, lars, trust_coefficient, momentum_includes_lr, larc_clip, caution,
            ratio_blocks (exact also where a shard ends inside a block).
        stage: 1: ``.grad`` holds gradients averaged over ranks, as DistributedDataParallel leaves them.
            2: ``.grad`` is each rank's own gradient; backward reduces, averages and frees it, and leaves a tensor
            without memory: its norm is the averaged gradient's, and it can be scaled by a number, zeroed or set to None
            (on every rank alike), which leaves the parameter out of the step. Its values are NaN; other edits raise
            RuntimeError. Buffers (BatchNorm's statistics) stay each rank's own; DDP would broadcast the first rank's.
            (DTensors' gradients are read from ``.grad`` in both.)
        process_group: the ranks that share the state; default: the ranks of the DTensors' root mesh, else all ranks.
        mesh: instead of ``process_group``: 1-D (shard), or 2-D (replicate, shard).
        bucket_mb: MiB of parameters per bucket, > 0.
        master_dtype: dtype of the master weights, which exist where it differs from the parameters' dtype.
        state_dtype: dtype of the moments; not float16, in which second moments underflow. (float64 parameters have
            float64 masters and moments.) torch.int8: 8 bits, with a scale for 256 elements
            (`sharded_lamb.kernels.block_codes`). A parameter group's ``state_dtype`` counts for its parameters.
        reduce_dtype: dtype of gradients on the wire in stage 2; None: their own, which is the parameters' dtype unless
            ``p.grad_dtype`` is another one. NCCL sums in it, and averages 16-bit gradients; on gloo sums are fp32. A
            narrower one than the gradients', torch.bfloat16 or torch.float8_e4m3fn with a power of two per 256
            elements, rounds every rank's gradient, the owner's and a single rank's too; the owner sums in fp32 and in
            rank order on every backend (`sharded_lamb.gradients.compressed`). A non-finite element stays non-finite,
            and changes no other. Refused in stage 1 and for DTensors, whose gradients DistributedDataParallel and FSDP2
            reduce.
        overlap: stage 2: reduce buckets as backward fills them; False: all at the end of backward.
        skip_nonfinite: a non-finite gradient on any rank skips the step on every rank, which changes nothing. (Stage 1:
            a non-finite averaged gradient; each rank checks its own slices of it.)
        max_consecutive_skips: after so many skips in a row `step` raises DivergedError, a RuntimeError, on every rank.
        kernel: "cpp" (CPU; from the wheel, else compiled on first use), "triton" (GPU), "torch" (stock operations, any
            device), or "auto": the kernel that the environment variable SHARDED_LAMB_KERNEL names, else the fastest
            that works. The same bits in each; the same kernel on all ranks.
        store_param_remainders: store only the low 16 bits of each fp32 master of bfloat16 parameters; the bf16 weight
            holds the high 16 (`sharded_lamb.kernels.remainders`): 2 bytes instead of 4. 8: masters of 24 bits, whose
            low 8 are stored: 1 byte; a step rounds to them, and loses changes below 2⁻¹⁶ of a weight. State dicts still
            contain fp32 masters. A weight written between steps wins to within half a bf16 ulp, before the first step
            exactly. Parameters of other dtypes have whole masters.
        ema_decay: keep an exponential moving average of the weights, fp32, sharded like the moments: average ←
            ema_decay average + (1 - ema_decay) w after every step that is not skipped, from the first step's w on
            (torch.optim.swa_utils.AveragedModel). See `averaged`; in state dicts it is ``ema``.
        gather_dtype: dtype in which updated parameters travel, if narrower than theirs; None: their own.
            torch.bfloat16, or torch.float8_e4m3fn with a power of two per 256 elements
            (`sharded_lamb.comm.wire_formats` states the errors). After a step every rank holds the same rounded weights
            in the parameters' dtype; the exact ones are masters, which then float32 parameters have too. A weight
            written between steps wins exactly. float64 parameters travel as they are; DTensors, which FSDP2 gathers,
            are refused.

    Raises:
        ValueError, TypeError: an invalid option or parameter; disagreement on names, shapes, dtypes or options
            (on every rank, within seconds).
        RuntimeError: some ranks do not construct it; WORLD_SIZE > 1 without a process group.

    Construction is collective: ranks compare options through the store, create process groups, and broadcast the first
    rank's plain weights.
    """

    _step_supports_amp_scaling = property(receives_grad_scale)
    registered_keys = ("state_dtype",)

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
        kernel: str = "auto",
        store_param_remainders: bool | int = False,
        ema_decay: float | None = None,
        gather_dtype: torch.dtype | None = None,
        **options: Unpack[RuleOptions],
    ) -> None:
        """Construct it on every rank; see the class."""
        caller = sys._getframe(1).f_globals.get("__name__")
        if caller == "torch.distributed.optim.zero_redundancy_optimizer":  # each rank passes other parameters
            raise ValueError(
                "ZeroRedundancyOptimizer gives each rank whole parameters of its own, and ShardedLamb shards those "
                "that all ranks have: construct ShardedLamb itself in its place, or pass optimizer_class=Lamb"
            )
        Joinable.__init__(self)
        self._groups_of_join = process_group, mesh
        params = materialized(params)
        topology = Topology.of(process_group, mesh, root_ranks(params))
        with propagate_errors(topology):
            self._settings = Settings(
                stage=stage,
                bucket_mb=bucket_mb,
                master_dtype=master_dtype,
                state_dtype=state_dtype,
                reduce_dtype=reduce_dtype,
                overlap=overlap,
                skip_nonfinite=skip_nonfinite,
                max_consecutive_skips=max_consecutive_skips,
                kernel=kernel,
                store_param_remainders=store_param_remainders,
                ema_decay=ema_decay,
                gather_dtype=gather_dtype,
                lars=flag("lars", fill(variant, options)["lars"]),
            )
            scalars = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            super().__init__(params, scalars, variant, options)
            self._live.store = ParamStore(self, topology, self._settings, self._ratio_blocks)
        self._build()
        self._close_on_deletion()

    def _is_own(self, name: str, value: Any) -> bool:
        if name in SETTINGS - {*self.registered_keys, *self.defaults}:
            return bool(getattr(self._settings, name) == value)
        return super()._is_own(name, value)

    def _check_keys(self, group: Mapping[str, Any]) -> None:
        super()._check_keys(group)
        for name in SETTINGS - {*self.registered_keys, *self.defaults}:
            if name in group:
                raise ValueError(
                    f"{name}={group[name]!r} in a parameter group: it is of the whole optimizer, so pass {name} to it"
                )

    # -- the step -----------------------------------------------------------------------------------

    @collective
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One LAMB step on every rank. Collective. Returns the closure's loss, or None.

        Raises:
            RuntimeError: a parameter has another dtype or shape than at construction, or only some are on another
                device; too many steps in a row were skipped; (stage 2) gradients were assigned after they were reduced.
            ValueError: stage 1 got gradients that are not averaged over ranks; on every rank: an option in a group is
                invalid, or ranks have other options or edited reduced gradients in other ways (on a GPU one step
                later), and no weight was changed.
            TypeError: a sparse gradient, or a plain gradient of a DTensor.
        """
        self._check_open()
        self._check_shows_weights()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._meet_joined()
        self.synchronize()
        self._register_changed()
        store = self._store
        if not store.params:
            return loss
        store.reattach()
        self._state_changed()
        live = self._live
        try:
            if self._skips.check(live.results):
                self._raise_disagreement()
        except RuntimeError:
            self._gradients.settle()  # every rank raises: their messages arrive before a group ends
            raise
        problem = self._option_problem(alone=self._collectives.world_size == 1)
        live.clip = self._clip_factor(for_step=True)
        decides = self._settings.skip_nonfinite or live.max_grad_norm is not None or live.clip is not None
        decides |= self._any("normalize_grad")
        may_defer = not decides and live.found_inf is None
        if live.has_deferred and not may_defer:  # ranks without this change send a deferred summary now
            layers = (len(self._sums) + 1) * len(store.layers)
            self._agree_at_once([store.step.new_zeros(layers + len(store.step))], problem)
        # Ranks without a change to may_defer=True wait for (a) now.
        summary = self._gradients.ready(live.found_inf, may_defer=may_defer and live.may_defer)
        summary = summary.without(live.removed, (), store.layers)
        live.may_defer, live.has_deferred = may_defer, not summary.agreed
        self._update(summary, problem)
        live.edits = 0
        self._gradients.stepped()
        self._drop_clip()
        if not live.is_summarized and store.topology.rank == 0:
            logger.info(store.summary(self._table, self._kernel.name, str(self.defaults["variant"])))
        live.is_summarized = True
        return loss

    def _update(self, summary: GradientSummary, problem: Exception | None) -> None:
        store, traffic, live = self._store, self._collectives.traffic, self._live
        expand = store.layers.expand
        skip = self._must_skip(summary)
        inverse = expand(self._inverse_scale())
        is_fp64 = self._table.is_fp64
        grad_norm = summary.norm(is_fp64, inverse)
        steps = store.step + (present := (summary.present > 0) & ~skip)
        updated = expand(present)
        if store.device.type == "cpu" and skip:
            self._skips.record(skip)
            live.results.last = [
                LastStep(self._table, updated, skip, summary.square_sums, inverse, grad_norm)
            ]
            return
        if problem is not None:
            self._sum_norms(store.step.new_zeros(len(self._sums), len(updated)), summary, problem)
        clip = torch.ones_like(grad_norm) if live.clip is None else expand(live.clip)
        clipped_norm = summary.norm(is_fp64, inverse * clip) if clip.ndim else grad_norm * clip
        clip = clip * rule.clip_factor(clipped_norm, live.max_grad_norm)
        options, step = self._table.options(), expand(steps)
        scale = rule.gradient_scales(inverse * clip, summary.square_sums, options)
        scale = torch.where(skip, torch.zeros_like(scale), scale)
        update = Update(self._kernel, options, step=step, active=updated, grad_scale=scale)
        with traffic.computing("pass 1"):
            for gather in store.gathers:
                gather.resync()
            sums = update.moments_and_norms(self._gradients.shards())
        summary, differs = self._sum_norms(sums, summary)
        self._skips.record(skip, differs)
        square_sums, lr = update.square_sums(sums), self._table.lr()
        ratios = rule.ratios_of_sums(square_sums, options, lr, summary.square_sums, scale)
        step_sizes = rule.step_sizes(lr, ratios, options, step, updated & ~differs)
        units = self._gradients.units() if options.pass_2_reads_gradients else store.units()
        written = update.apply(units, step_sizes, lr, are_gathered=self._collectives.has_peers)
        for index in traffic.computing_each("pass 2", written):
            if index < len(store.gathers):
                store.gathers[index].start()
        self._update_averages(updated & ~differs)
        store.step.copy_(steps)
        self._gathers.finish_or_defer(store.gathers, [bucket.params for bucket in store.buckets])
        self._gathers.wait(store.shared_buckets())
        store.write_shared()
        # backward through a graph from before the step must raise.
        torch.autograd.graph.increment_version(store.params)
        grad_norm, sums = summary.norm(is_fp64, inverse), summary.square_sums
        live.results.last = [
            LastStep(self._table, updated, skip, sums, inverse, grad_norm, square_sums, ratios)
        ]

    def _sum_norms(
        self, sums: Tensor, summary: GradientSummary, problem: Exception | None = None
    ) -> tuple[GradientSummary, Tensor]:
        """All-reduce (b). Every element counts once: only its owner adds it, other replicas add 0.

        Returns:
            The summary, and whether ranks differ in the options of this step: bool scalar, False on a CPU.
        """
        sums *= self._store.owner_mask
        parts = [sums]
        if not summary.agreed:
            parts += [summary.square_sums.clone(), summary.present.clone()]
        differs = self._all_reduce_agreed(parts, problem)
        if not summary.agreed:
            summary = summary.summed(*parts[1:])
            if summary.present.device.type == "cpu":
                world, names = self._collectives.world_size, self._store.names
                check_present(summary, names, world, dtensors=range(len(names)))
        return summary, differs

    def _must_skip(self, summary: GradientSummary) -> Tensor:
        """Bool scalar on the device, the same on every rank."""
        found_inf = self._live.found_inf
        skip = summary.found_inf | self._gradients.is_partial(summary)
        if self._settings.skip_nonfinite:
            skip = skip | summary.bad.any()
        if found_inf is not None:
            # GradScaler's is the number 0 if no parameter has elements.
            skip = skip | (torch.as_tensor(found_inf, device=skip.device).reshape(()) > 0)
        return skip

    def _inverse_scale(self) -> Tensor:
        """The factor that unscales the stored gradients: GradScaler's inverse scale, or 1; fp64 scalar, or [P]."""
        inverse = torch.ones((), dtype=torch.float64, device=self._store.device)
        scale = self._live.grad_scale
        if scale is not None:
            inverse = inverse / scale.to(inverse.device, torch.float64).reshape(())
        unscaled = self._gradients.unscale_factor()
        return inverse if unscaled is None else inverse * unscaled

    # -- gradients ----------------------------------------------------------------------------------

    @collective
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero gradients: ``.grad`` and, in stage 2, reduced ones, after waiting for exchanges in flight.

        Args:
            set_to_none: False: the next step uses gradients of 0 where backward adds no other.
        """
        self._check_open()
        moved = []
        if self._settings.stage == 2 and not set_to_none and self._store.has_moved:
            moved = [p for p in self._store.params if p.grad is not None]
        in_place = not set_to_none and not moved and not self._successors()
        self._gradients.zero(set_to_none=not in_place)
        self._drop_clip()
        super().zero_grad(set_to_none or bool(moved))
        self._follow()
        for p in moved:
            p.grad = torch.zeros_like(p, dtype=grad_dtype_of(p))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Stage 2: backward inside accumulates in ``.grad`` and sends nothing; the next one outside reduces the sum.

        Has no effect in stage 1, which reduces nothing itself (use DistributedDataParallel's).
        """
        before, self._gradients.enabled = self._gradients.enabled, False
        try:
            yield
        finally:
            self._gradients.enabled = before

    @collective
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the averaged gradients by their global norm, in the next step. Collective.

        Gradients that are zeroed before that step take their factor with them; a second call clips what the first left.
        With DTensors the step summarizes gradients again: one small all-reduce more than with ``max_grad_norm``.

        Returns:
            The norm before clipping: fp32 scalar, the same bits on every rank.

        Raises:
            ValueError: ``max_norm`` is not > 0; or as `step`.
        """
        self._check_open()
        limit = check_max_grad_norm(max_norm, "max_norm")
        self._meet_joined(clip=limit)
        self._register_changed()
        if not self._store.params:
            return torch.zeros((), device="cpu")
        summary = self._gradients.ready(None, keep=True).without(self._live.removed, (), self._store.layers)
        unscaled = self._gradients.unscale_factor()
        one = torch.ones((), dtype=torch.float64, device=self._store.device)
        before = self._clip_factor(for_step=False)
        if before is None:
            self._drop_clip()
            before = one
        scale = self._store.layers.expand(before if unscaled is None else before * unscaled)
        norm = summary.norm(self._table.is_fp64, scale)
        self._clip_by(before * rule.clip_factor(norm, limit), limit)
        return norm.float()

    # -- gathers behind the next forward ---------------------------------------------------------------

    def overlap_forward(self, module: nn.Module) -> Watch:
        """From now on all-gather parameters during the next forward of ``module``, which waits for each when needed.

        Between a step and that forward, parameters hold old values of other ranks' slices. A module's forward and
        ``state_dict`` wait automatically; other code that reads parameters (an average of weights, a forward that
        reads a submodule's parameter before calling it) must call `synchronize` first. Not for models under
        torch.compile. The first forward records which modules are called; the step waits for all other parameters.

        Returns:
            A handle whose ``remove()`` ends the overlap.

        Raises:
            ValueError: the module has none of this optimizer's parameters.
        """
        self._check_open()
        return self._gathers.watch(module, [p for group in self.param_groups for p in group["params"]])

    def synchronize(self) -> None:
        """Wait until every parameter is gathered; without `overlap_forward`, `step` does so before it returns."""
        self._gathers.wait()
