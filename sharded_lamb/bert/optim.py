"""Which optimizer a configuration asks for, and what a new phase does to it."""

from __future__ import annotations

from typing import Any, Literal

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.model import parameters_to_train

STAGES: dict[str, Literal[1, 2]] = {"ddp+zero1": 1, "zero2": 2}
_LATER = ("fsdp2", "deepspeed")


def check_parallel(config: RunConfig) -> Literal[1, 2]:
    """ShardedLamb's stage.

    Raises:
        ValueError: a way of sharding that this version does not have yet.
    """
    if config.parallel in _LATER:
        raise ValueError(
            f"parallel={config.parallel!r}: arrives with a later version; use one of {sorted(STAGES)} "
            f"until then"
        )
    return STAGES[config.parallel]


def build_optimizer(config: RunConfig, bert: Any, stage: Literal[1, 2]) -> Any:
    """ShardedLamb over the model's parameters, named as the model names them."""
    from sharded_lamb import ShardedLamb

    settings = config.optimizer
    options: dict[str, Any] = {}
    for name in ("adapt_without_decay", "bias_correction"):
        if getattr(settings, name) is not None:  # null leaves it to the variant
            options[name] = getattr(settings, name)
    return ShardedLamb(
        parameters_to_train(bert),
        lr=0.0,  # the schedule sets it before every step
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        variant=settings.variant,
        max_grad_norm=settings.max_grad_norm,
        exclude_from_weight_decay=settings.exclude_from_weight_decay,
        exclude_from_layer_adaptation=settings.exclude_from_layer_adaptation,
        stage=stage,
        bucket_mb=settings.bucket_mb,
        **options,
    )


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def restart_steps(optimizer: Any) -> None:
    """Begin a phase as BERT's phase 2 does: moments stay, step counts (so bias corrections) start over."""
    for state in optimizer.state.values():
        state["step"].zero_()


def gradient_norm(optimizer: Any) -> float | None:
    norm = optimizer.grad_norm
    return None if norm is None else float(norm)


def trust_ratios(optimizer: Any) -> dict[str, float]:
    return {name: float(ratio) for name, ratio in optimizer.trust_ratios().items()}
