"""Accelerate: ``save_state`` that holds the whole state of a `ShardedLamb`. Imports nothing of Accelerate."""

from typing import Any

from sharded_lamb.checkpoint.rank_group import bare_optimizer
from sharded_lamb.optim.sharded import ShardedLamb


def register(accelerator: Any, *optimizers: Any) -> None:
    """Makes ``accelerator.save_state`` hold the whole state of ``optimizers``; any number of ranks can load it.

    Call it once, on every rank, after ``accelerator.prepare``, with the optimizers that it returned. Accelerate saves
    the first rank's ``state_dict()``: before it does, every `ShardedLamb` gathers its state there
    (`ShardedLamb.consolidate_state_dict`, collective). Under FSDP, Accelerate saves every rank's state and nothing is
    gathered; parameters that ``prepare`` replaced are registered now (collective) rather than in the first step.

    Raises:
        TypeError: an optimizer is no `ShardedLamb`, wrapped or not.
        ValueError: ``save_on_each_node`` with several ranks: only the first one has the whole state.
    """
    known = [bare_optimizer(optimizer) for optimizer in optimizers]
    strange = [type(one).__name__ for one in known if not isinstance(one, ShardedLamb)]
    if strange or not known:
        raise TypeError(
            f"register(accelerator, optimizer) takes ShardedLamb optimizers, got {strange or 'none'}"
        )
    gathers = accelerator.distributed_type != "FSDP"
    if gathers and accelerator.project_configuration.save_on_each_node and accelerator.num_processes > 1:
        raise ValueError(
            "save_on_each_node=True: only the first rank has the whole state of a ShardedLamb, and the other nodes "
            "would save slices: save to storage that all nodes see, or use sharded_lamb.checkpoint"
        )
    for optimizer in known:
        optimizer.register_replaced()

    def consolidate(models: list[Any], weights: list[Any], folder: str) -> None:
        for optimizer in known:
            optimizer.consolidate_state_dict()

    if gathers:
        accelerator.register_save_state_pre_hook(consolidate)
