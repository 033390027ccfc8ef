"""Hugging Face's Trainer: an optimizer that knows names, and a callback that keeps its state in checkpoints.

Imports transformers.
"""

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sharded_lamb.checkpoint.rank_group import bare_optimizer
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.sharded import ShardedLamb


class ShardedLambFactory:
    """Makes a `ShardedLamb` of named parameters: ``Trainer(…, optimizer_cls_and_kwargs=(ShardedLambFactory, {…}))``.

    The Trainer gives ``(ShardedLamb, …)`` parameters without names, which patterns and reports need; it gives a factory
    the model, which may come from ``model_init``. The keywords are `ShardedLamb`'s. Without
    ``exclude_from_weight_decay``, biases and weights of norms have no weight decay, as the Trainer decides it.
    ``TrainingArguments.weight_decay`` and ``learning_rate`` have no effect on it.
    """

    def __call__(self, model: nn.Module, **options: Any) -> ShardedLamb:
        """Collective. Raises as `ShardedLamb` does."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if "exclude_from_weight_decay" in options:
            return ShardedLamb(named, **options)
        rule: Any = Trainer.get_decay_parameter_names  # reads nothing of a Trainer
        decays = set(rule(None, model))
        groups: list[dict[str, Any]] = [
            {"params": [(name, p) for name, p in named if name in decays]},
            {"params": [(name, p) for name, p in named if name not in decays], "weight_decay": 0.0},
        ]
        return ShardedLamb([group for group in groups if group["params"]], **options)


class ShardedLambCallback(TrainerCallback):
    """Makes every ``checkpoint-N`` of the Trainer hold the whole state of a `ShardedLamb`.

    The Trainer saves what the first rank's ``state_dict()`` returns. Where it is about to save, the callback calls
    `ShardedLamb.consolidate_state_dict` on every rank, so that the file holds whole tensors and any number of
    ranks resumes from it. It does nothing at other steps, with ``save_only_model``, with `Lamb`, and under FSDP and
    DeepSpeed, whose state the Trainer saves from every rank.

    Pass it last: it sees a save that is requested by callbacks before it. Without it, ``state_dict()`` warns at the
    save, and resuming raises ValueError.

    Raises:
        TypeError: at the start of training, the optimizer is not this package's.
        ValueError: at the start of training, ``save_on_each_node`` with several nodes: only the first rank has the
            whole state.
    """

    def __init__(self) -> None:
        self._is_training = False
        self._consolidated_at: int | None = None  # global step

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        self._is_training, self._consolidated_at = True, None
        inner = bare_optimizer(optimizer)
        if not isinstance(inner, LambOptimizer):
            kind = type(getattr(inner, "optimizer", inner)).__name__
            raise TypeError(
                f"ShardedLambCallback keeps the state of a ShardedLamb, and the Trainer's optimizer is {kind}: pass "
                f"the Trainer optimizers=(ShardedLamb(…), None), or leave the callback out"
            )
        if isinstance(inner, ShardedLamb) and args.save_on_each_node and args.world_size > 1:
            raise ValueError(
                "save_on_each_node=True: only the first rank has the whole state of a ShardedLamb, and the other "
                "nodes would save slices: save to storage that all nodes see, or use sharded_lamb.checkpoint"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._is_training = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        if control.should_save:
            self._consolidate(args, state, optimizer)

    on_epoch_end = on_step_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        """The Trainer decides after this event whether it saves the best model: the same comparison, made before."""
        if args.save_strategy != "best":
            saves = control.should_save
        else:
            saves = _is_best(args, state, metrics or {})
        if saves:
            self._consolidate(args, state, optimizer)

    def _consolidate(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        inner = bare_optimizer(optimizer)
        if not isinstance(inner, ShardedLamb) or _is_saved_by_fsdp(optimizer):
            return
        if not self._is_training or args.save_only_model or state.global_step in (0, self._consolidated_at):
            return
        inner.consolidate_state_dict()
        self._consolidated_at = state.global_step


def _is_saved_by_fsdp(optimizer: Any) -> bool:
    """Whether Accelerate saves the state of every rank by torch.distributed.checkpoint."""
    return getattr(getattr(optimizer, "accelerator_state", None), "distributed_type", None) == "FSDP"


def _is_best(args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> bool:
    """As ``Trainer._determine_best_metric``."""
    name = args.metric_for_best_model
    if name is None:
        return False
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:  # of another of several datasets
        return False
    is_better = operator.gt if args.greater_is_better else operator.lt
    worst = float("-inf") if args.greater_is_better else float("inf")
    best = worst if state.best_metric is None else state.best_metric
    return bool(is_better(metrics[name], best))
