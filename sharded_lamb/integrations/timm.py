"""`ShardedLamb` in timm's optimizer factory: ``import sharded_lamb.integrations.timm``, then ``--opt shardedlamb``.

The name has no underscore: timm takes what stands before one as a prefix, and ``sharded_lamb`` as its own ``lamb``.
"""

from collections.abc import Callable
from typing import Any

from timm.optim._optim_factory import OptimInfo, default_registry
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from sharded_lamb import ShardedLamb

default_registry.register(
    OptimInfo(
        name="shardedlamb",
        opt_class=ShardedLamb,
        description="LAMB with its state sharded over ranks and exact trust ratios",
        has_betas=True,
    )
)


def named_groups(
    *, weight_decay: float = 0.0, layer_decay: float | None = None, **options: Any
) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """timm's groups with the parameters' names, which its own lack, for patterns and messages.

        create_optimizer_v2(model, "shardedlamb", param_group_fn=named_groups(weight_decay=0.05, layer_decay=0.75))

    Args:
        weight_decay, layer_decay: as for ``create_optimizer_v2``, which ignores its own beside ``param_group_fn``.
        options: of timm's ``param_groups_layer_decay`` (with ``layer_decay``) or ``param_groups_weight_decay``.
    """

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        exempt: set[str] = getattr(model, "no_weight_decay", set)()
        own = {"weight_decay": weight_decay, "no_weight_decay_list": exempt, **options}
        if layer_decay is None:
            split = param_groups_weight_decay(model, **own)
        else:
            split = param_groups_layer_decay(model, layer_decay=layer_decay, **own)
        names = {p: name for name, p in model.named_parameters()}
        return [{**group, "params": [(names[p], p) for p in group["params"]]} for group in split]

    return groups
