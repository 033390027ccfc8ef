"""Uneven inputs: `torch.distributed.algorithms.join.Join` over a DistributedDataParallel model and a `ShardedLamb`.

A rank that has joined still holds shards, and updates them with the gradients, options and GradScaler of the first
rank that has not: it receives them at the beginning of each step. Inside `Join`, a clip is followed by its step, for
which a joined rank waits.
"""

import copy
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb.gradients.ddp import instances
from sharded_lamb.optim.lifetime import ClosableOptimizer


class JoinableOptimizer(ClosableOptimizer, Joinable):
    """A `ClosableOptimizer` for the context manager `Join`, in stage 1."""

    _groups_of_join: tuple[Any, Any]  # the constructor's process_group and mesh

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """The hook that steps on joined ranks; takes no keyword arguments.

        Raises:
            ValueError: stage 2 or 3, which reduce gradients outside of `step`.
        """
        if self.stages != "1":
            raise ValueError(
                f"Join got a ShardedLamb of stage {self.stages}: uneven inputs need stage=1 with "
                f"DistributedDataParallel, whose collectives a joined rank can repeat. Use it, or give every rank as "
                f"many batches"
            )
        return _StepHook(self)

    @property
    def join_device(self) -> torch.device:
        """The device of the parameters."""
        return self._store.device

    @property
    def join_process_group(self) -> Any:
        """The constructor's process group or one-dimensional mesh; by default the default process group.

        Raises:
            ValueError: the mesh has two dimensions and not all ranks.
        """
        group, mesh = self._groups_of_join
        if group is not None:
            return group
        if mesh is None or mesh.size() == dist.get_world_size():
            return dist.group.WORLD
        if mesh.ndim == 1:
            return mesh.get_group()
        raise ValueError(
            "Join needs one process group of all ranks of the optimizer, and its 2-D mesh has no such group: "
            "construct ShardedLamb with process_group= instead"
        )

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the averaged gradients by their global norm."""
        raise NotImplementedError

    def _meet_joined(self, clip: float | None = None) -> None:
        """Let joined ranks take part in a step, or in `clip_grad_norm_` with ``clip``. Collective inside `Join`."""
        if self._live.has_joined or self._collectives.world_size == 1:
            return
        if not self._join_config.enable:
            self._reject_lone_join()
            return
        if clip is None:
            Join.notify_join_context(self)
        active = self._active_ranks(True)
        if len(active) < self._collectives.world_size:
            self._exchange(active[0], clip)

    def step_as_joined(self) -> None:
        """Take part in the next step of the ranks that have not joined."""
        self._live.has_joined = True
        try:
            clip: float | None = 1.0
            while clip is not None:
                clip = self._exchange(self._active_ranks(False)[0])
                if clip is None:
                    self.step()
                else:
                    self.clip_grad_norm_(clip)
        finally:
            self._live.has_joined = False
            self._live.grad_scale = self._live.found_inf = None
            for p in self._store.params:
                p.grad = None

    def _active_ranks(self, is_active: bool) -> list[int]:
        """Indices of the ranks that have not joined. One small all-reduce."""
        flags = torch.zeros(self._collectives.world_size, dtype=torch.float64, device=self._store.device)
        flags[self._store.topology.rank] = float(is_active)
        self._collectives.all_reduce_small(flags)
        return flags.nonzero().flatten().tolist()

    def _exchange(self, source: int, clip: float | None = None) -> float | None:
        """Send everything that a step reads from the rank of index ``source`` to the joined ranks; returns its clip.

        One broadcast of a small object, and one of each gradient.
        """
        store, group = self._store, self._collectives.everyone
        assert group is not None
        is_source = store.topology.rank == source
        box: list[Any] = [self._announced(clip) if is_source else None]
        dist.broadcast_object_list(box, store.topology.everyone[source], group=group.pg)
        clip, present, scaler, groups, max_grad_norm = box[0]
        if self._live.has_joined:
            self._live.grad_scale, self._live.found_inf = (
                None if value is None else torch.tensor(value, device=store.device) for value in scaler
            )
            self.max_grad_norm = max_grad_norm
            for group_options, options in zip(self.param_groups, groups, strict=True):
                group_options.update(options)
        for p, has_gradient in zip(store.params, present, strict=True):
            if has_gradient:
                sent = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                if is_source and p.grad is not None:
                    sent = p.grad.contiguous()
                self._collectives.broadcast(sent, source)
            if self._live.has_joined:
                p.grad = sent if has_gradient else None
        if self._live.has_joined:
            self._note_clipped()  # the same gradients, received again
        # Drops the summary that an earlier clip_grad_norm_ made: the joined ranks have new gradients.
        self._gradients.zero(set_to_none=True)
        return clip

    def _announced(self, clip: float | None) -> tuple[Any, ...]:
        scaler = [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        options = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in self.param_groups
        ]
        return (
            clip,
            [p.grad is not None for p in self._store.params],
            [None if value is None else float(value) for value in scaler],
            copy.deepcopy(options),
            self.max_grad_norm,
        )

    def _reject_lone_join(self) -> None:
        """Raises ValueError if a model with these parameters is inside a `Join` that lacks this optimizer."""
        if self._live.ddp is None:
            own = set(map(id, self._store.params))
            models = instances(DistributedDataParallel) if self.stages == "1" else ()
            self._live.ddp = [
                weakref.ref(ddp) for ddp in models if any(id(p) in own for p in ddp.parameters())
            ]
        for model in self._live.ddp:
            ddp: Any = model()
            if ddp is not None and ddp._join_config.enable:
                raise ValueError(
                    "the model is inside join() without this optimizer, whose step a joined rank would not take part "
                    "in: use `with Join([model, optimizer]):` of torch.distributed.algorithms.join instead of "
                    "`with model.join():`"
                )


class _StepHook(JoinHook):
    def __init__(self, optimizer: JoinableOptimizer) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """Repeat the collectives of a step."""
        self._optimizer.step_as_joined()
