"""DeepSpeed's ZeRO 0 to 3 against ShardedLamb alone: ``python -m sharded_lamb.gpu_check.zero cpu|cuda``.

Processes of their own, since DeepSpeed keeps a process group and changes torch. Prints a row a combination.
"""

import os
import sys
import traceback
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import ShardedLamb
from sharded_lamb.gpu_check import processes
from sharded_lamb.gpu_check.battery import relative_difference
from sharded_lamb.gpu_check.training import reconstruction_loss, small_data, small_model, train_small

STEPS = 5
SCALE_POWER = 8
"""fp16's initial loss scale is 2 to this power, so that no step is skipped."""


def main(kind: str) -> int:
    device = processes.joined_group(kind)
    expected = train_small(
        lambda model: ShardedLamb(model.named_parameters(), lr=0.01, stage=2, max_grad_norm=1.0),
        device,
        steps=STEPS,
    ).weights
    import deepspeed

    import sharded_lamb.deepspeed  # noqa: F401  # registers the optimizer

    deepspeed.logger.setLevel("ERROR")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    for dtype in ("fp32", "bf16", *(("fp16",) if device.type == "cuda" else ())):
        for stage in range(4):
            row: dict[str, Any] = {"zero": f"{dtype} ZeRO {stage}"}
            try:
                row["difference"] = relative_difference(_trained(deepspeed, dtype, stage, device), expected)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            processes.print_row(row)
    return 0


def _trained(deepspeed: Any, dtype: str, stage: int, device: torch.device) -> list[Tensor]:
    """Weights after training, whole, fp32, on the CPU."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "ShardedLamb", "params": {"lr": 0.01, "weight_decay": 0.01}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if dtype == "fp16":
        config[dtype]["initial_scale_power"] = SCALE_POWER
    model = small_model(torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    try:
        for x in small_data(device, STEPS):
            engine.backward(reconstruction_loss(engine, x.to(next(engine.module.parameters()).dtype)))
            engine.step()
        params = list(model.parameters())
        with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
            return [p.detach().float().cpu().clone() for p in params]
    finally:
        engine.destroy()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
