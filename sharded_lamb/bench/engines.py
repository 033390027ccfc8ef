"""DeepSpeed's ZeRO as a contestant. Imported only where deepspeed is: that takes seconds."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import sharded_lamb.deepspeed as plugin
from sharded_lamb.bench.contestants import Contestant
from sharded_lamb.bench.workload import Synthetic


class Engine(Contestant):
    """An engine of ZeRO 1 or 2 in fp32, without clipping.

    ``timm``: the class that steps DeepSpeed's flat partitions, which it takes for parameters; None: our plugin.
    """

    def __init__(
        self,
        model: Synthetic,
        stage: int,
        options: Mapping[str, Any],
        timm: type[torch.optim.Optimizer] | None,
    ) -> None:
        deepspeed.logger.setLevel("ERROR")
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 where a config says nothing
        }
        keywords: dict[str, Any] = {}
        if timm is None:
            plugin.register()
            params = {**options, "betas": list(options["betas"])}
            config["optimizer"] = {"type": "ShardedLamb", "params": params}
        else:
            config["zero_allow_untested_optimizer"] = True
            made: Any = timm
            keywords["optimizer"] = made(model.parameters(), max_grad_norm=None, **options)
        engine, *_ = deepspeed.initialize(model=model, config=config, **keywords)
        super().__init__(model, engine, engine)

    def iterate(self) -> None:
        """As DeepSpeed's users write it; `step` zeroes the gradients."""
        self.optimizer.backward(self.forward())
        self.optimizer.step()

    def close(self) -> None:
        dist.barrier()
        self.optimizer.destroy()
