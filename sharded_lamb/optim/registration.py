"""Registers parameters: at construction, once they are unfrozen, and where the model moves to."""

import operator
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.consistency import Description, check_consistency, describe_groups, propagate_errors
from sharded_lamb.comm.step_agreement import StepAgreement
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import Grouping
from sharded_lamb.gradients.averaged import AveragedGradients
from sharded_lamb.gradients.mixed import MixedGradients
from sharded_lamb.gradients.reducer import BackwardReducer
from sharded_lamb.gradients.source import GradientSource, Registration
from sharded_lamb.kernels import Kernel
from sharded_lamb.optim.agreed_options import collective
from sharded_lamb.optim.joining import JoinableOptimizer
from sharded_lamb.optim.skips import SkipCounter
from sharded_lamb.optim.step_results import StepResults
from sharded_lamb.sharding.param_store import ParamStore
from sharded_lamb.sharding.shard_plan import ShardPlan


class RegisteringOptimizer(JoinableOptimizer):
    """A `JoinableOptimizer` that builds its parts from its parameters."""

    @torch.inference_mode(False)  # tensors made in it would make the model's parameters inference tensors
    def _build(self) -> None:
        """Register the parameters that require gradients in an empty store, on their device. Collective."""
        live, topology = self._live, self._store.topology
        plan, live.kernel = self._agreed_plan()
        live.collectives = Collectives(topology, plan.wire_device)
        live.gradients = self._make_gradients()
        live.skips = SkipCounter(plan.device, self._settings.max_consecutive_skips)
        live.agreement = StepAgreement(live.collectives)
        self._register(plan)

    def _follow(self) -> None:
        store, live = self._store, self._live
        successors = self._successors()
        if not successors and not store.has_moved:
            return
        self._check_open()
        self.synchronize()
        registered, skipped = [successors.get(i, p) for i, p in enumerate(store.params)], self.skipped_steps
        before, now = store.step.device, registered[0].device
        dtypes = [str(group.get("state_dtype")) for group in self.param_groups]
        description = [("device that the model was moved to", now.type), ("state_dtype of groups", dtypes)]
        check_consistency(store.topology, description)
        self._check_options()  # before anything is closed
        if self._settings.stage == 2 and any(grad is not None for grad in self._gradients.identities()):
            change, call = "parameters were replaced", "replacing them"
            if not successors:
                change, call = f"model was moved from {before} to {now}", "model.to(…)"
            raise RuntimeError(
                f"the {change}, and backward reduced gradients before this ShardedLamb could follow: call "
                f"optimizer.zero_grad() after {call}, or construct the optimizer after it"
            )
        has_state = bool(store.step.any()) if successors else not live.is_new
        whole = self._gather(0) if has_state else None
        live.gradients.close()
        live.collectives.close()
        live.gathers.forget_buckets()
        live.store = ParamStore(store.optimizer, store.topology, self._settings, self._ratio_blocks)
        live.results, live.scanned = StepResults(), None
        self._drop_clip()
        self.state.clear()
        live.entries.forget()
        self._build()
        live.skips.set_total(skipped)
        if has_state:
            self.register_stateful(registered)
            self._scatter(None if whole is None else {registered[i]: saved for i, saved in whole.items()})

    def _scan(self) -> None:
        """Note edits of the groups, and take over those of ``optimizer.state``."""
        self._live.bad_edit = None
        try:
            self._note_groups()
            self._take_state_edits()
        except ValueError as error:
            self._live.bad_edit = error

    def _note_groups(self) -> None:
        """Note which parameters of the groups are not registered, and the group of each registered one, if any.

        Those in no group keep the options that they had, for reports: no step updates them.
        """
        store, live, now = self._store, self._live, Grouping(self.param_groups)
        if now.equals(live.scanned):
            return
        self._follow_names()
        group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        live.scanned, live.frozen_params = now, [p for p in now.params if p not in store.index]
        live.removed = [i for i, p in enumerate(store.params) if p not in group_of]
        live.entries.look_again()
        live.grouped = hash(tuple(group_of.get(p, -1) for p in store.params))
        before = [group for _, _, group in store.rows]
        store.rows[:] = [
            (name, p, self.param_groups[group_of[p]] if p in group_of else group)
            for name, p, group in store.rows
        ]
        if not all(map(operator.is_, before, (group for _, _, group in store.rows))):
            live.table = OptionTable(store.rows, store.layers, store.device)

    def _check_options(self) -> None:
        """Also raises what the last scan found wrong, so that every rank raises it."""
        super()._check_options()
        if self._live.bad_edit is not None:
            raise self._live.bad_edit

    def _step_facts(self) -> Description:
        live = self._live
        return [
            *super()._step_facts(),
            ("max_norm of clip_grad_norm_", live.max_norm),
            ("hash of the parameters' groups", live.grouped),
            ("hash of edits of optimizer.state", live.edits),
        ]

    def _successors(self) -> dict[int, Tensor]:
        """{registered parameter: the new one of its name and shape in its place}; empty unless all removed have one.

        fully_shard replaces a model's parameters by DTensors, and Accelerate then those in the groups.
        """
        store, live = self._store, self._live
        self._scan()
        if not live.removed or not live.frozen_params:
            return {}
        new = {name: p for name, p, _ in self._named_parameters() if p not in store.index}
        found = {i: new.get(store.names[i]) for i in live.removed}
        are_alike = all(p is not None and p.shape == store.params[i].shape for i, p in found.items())
        return {i: p for i, p in found.items() if p is not None} if are_alike else {}

    @collective
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, with `ShardedLamb`'s group options. Collective after construction."""
        self._check_open()
        if self._constructed:
            self._follow()
        super().add_param_group(param_group)
        if self._constructed:
            try:
                self._register(self._agreed_plan()[0])
            except (ValueError, TypeError, RuntimeError):
                self.param_groups.pop()
                raise

    def _agreed_plan(self) -> tuple[ShardPlan, Kernel]:
        """The plan for parameters that require gradients and are not in the store yet, and the kernel.

        The same on every rank. Collective.
        """
        store = self._store
        with propagate_errors(store.topology):
            plan = store.plan(list(self._named_parameters()))
            kernel = kernels.choose(self._settings.kernel, plan.device)
        description: Description = [("construction", "ok"), ("settings", self._settings.described())]
        description.append(("kernel", kernel.name))
        description.append(("max_grad_norm", self.max_grad_norm))
        description.append(("ratio_blocks", self.ratio_blocks))
        description += describe_groups(self.param_groups)
        description += plan.described(len(store.params))
        check_consistency(store.topology, description)
        return plan, kernel

    def _register_changed(self) -> None:
        """Register parameters that moved to another device, or that were unfrozen. Collective if there are any."""
        self._follow()
        store, live = self._store, self._live
        if live.scanned is None and live.bad_edit is None:  # all parameters were registered anew
            self._scan()
        if any(p.requires_grad for p in live.frozen_params):
            if live.removed:
                removed = store.names[live.removed[0]]
                raise RuntimeError(
                    f"parameter {removed!r} is no longer in a parameter group and new ones are (fully_shard and "
                    f"Accelerate's prepare replace parameters by new ones): construct ShardedLamb after that, from the "
                    f"parameters that the model has then"
                )
            self._register_new()

    def _register_new(self) -> None:
        self._register(self._agreed_plan()[0])
        self._live.scanned = None

    @torch.inference_mode(False)
    def _register(self, plan: ShardPlan) -> None:
        """Register the plan's parameters. Collective: broadcasts the first rank's weights."""
        store = self._store
        self.synchronize()
        self._gradients.settle()
        buckets = store.register(plan, self._collectives)
        self._live.table = OptionTable(store.rows, store.layers, plan.device)
        first = len(store.params) - len(plan.rows)
        self._gradients.extend(
            Registration(
                names=store.names[first:],
                params=store.params[first:],
                members=frozenset(range(first, len(store.params))),
                buckets=buckets,
                dtensors=store.dtensors,
                replicas=store.replicas(),
                layers=store.layers,
                owner_mask=store.owner_mask,
                steps=store.step,
            )
        )
        self._refresh_state()
        self._live.consolidated = None

    def _make_gradients(self) -> GradientSource:
        collectives, kernel, dtensors = self._collectives, self._kernel, self._store.dtensors
        averaged = AveragedGradients(collectives, kernel, dtensors)
        if self._settings.stage == 1:
            return averaged
        return MixedGradients(BackwardReducer(collectives, kernel, overlap=self._settings.overlap), averaged)
