"""`parallel: deepspeed`: BERT in DeepSpeed's engine. DeepSpeed's ZeRO shards it; the optimizer is `DeepSpeedLamb`."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.ds_config import ds_config
from sharded_lamb.bert.model import Losses, parameters_to_train
from sharded_lamb.checkpoint import Checkpoints, InMemoryCheckpoint, RankGroup, read_contents, write_contents
from sharded_lamb.recipes.training.sharded_backend import Entered, restart_steps, set_lr
from sharded_lamb.telemetry import LayerNorms


class EngineBackend:
    """A `TrainBackend`. ZeRO 3 gathers parameters only while their module runs."""

    def __init__(self, config: RunConfig, losses: Losses, world_size: int) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "parallel='deepspeed': DeepSpeed is not installed; pip install 'sharded-lamb[deepspeed]'"
            )
        import sharded_lamb.deepspeed

        os.environ.setdefault(
            "LOCAL_RANK", "0"
        )  # DeepSpeed requires it; without a launcher there is one rank
        self.model, self.losses = losses.module, losses
        # The master of an fp32 parameter equals the parameter, which checkpoints contain already.
        self._trained = [(name, p.dtype == torch.float32) for name, p in parameters_to_train(self.model)]
        self._linear = torch.nn.functional.linear  # ZeRO 3 replaces it, for the whole process
        self._engine: Any = sharded_lamb.deepspeed.initialize(
            model=losses, config=ds_config(config, world_size)
        )[0]
        if config.speed.compile:
            self._engine.compile()
        self._lamb: Any = self._engine.basic_optimizer

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        out: Tensor = self._engine(batch)
        entered("backward")
        faults.point("backward")
        # `scale` already divides by the global batch: do not divide by the number of micro-batches.
        self._engine.backward((out[:2] * scale).sum(), scale_wrt_gas=False)
        return out.detach()

    def step(self, lr: float) -> None:
        set_lr(self._lamb, lr)
        self._engine.step()

    def restart_steps(self) -> None:
        restart_steps(self._lamb)

    def grad_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def layer_norms(self) -> dict[str, LayerNorms]:
        norms: dict[str, LayerNorms] = self._lamb.layer_norms()
        return norms

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()  # `RunConfig` refuses optimizer.ema_decay

    def weights(self) -> dict[str, Tensor] | None:
        from deepspeed import zero

        first = torch.distributed.get_rank() == 0
        whole = {}
        for name, p in self.model.named_parameters():
            with zero.GatheredParameters([p]):  # a no-op for unpartitioned parameters
                if first:
                    whole[name] = p.detach().cpu().clone().contiguous()
        return whole if first else None

    def save(self, checkpoints: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        """The first rank writes unsharded tensors: partitions are DeepSpeed's format."""
        weights, full = self.weights(), self._lamb.full_state_dict()

        def write() -> None:
            assert weights is not None
            path = checkpoints.path(step)
            write_contents(path, self._contents(weights, full, extra))
            checkpoints.commit(path)

        self._ranks().first(write)

    def _contents(
        self, weights: dict[str, Tensor], full: dict[str, Any], extra: dict[str, Any]
    ) -> InMemoryCheckpoint:
        own = self.model.state_dict(keep_vars=True)  # ZeRO 3 leaves its parameters empty
        first = {id(tensor): name for name, tensor in reversed(own.items())}
        aliases = {name: first[id(tensor)] for name, tensor in own.items() if first[id(tensor)] != name}
        states = {}
        for index, (name, is_master) in enumerate(self._trained):
            state = dict(full["state"][index])
            if is_master:
                del state["master"]
            states[name] = state
        names = [name for name, _ in self._trained]
        groups = [
            {
                "names": [names[index] for index in group["params"]],
                "options": {
                    key: value for key, value in group.items() if key not in ("params", "param_names")
                },
            }
            for group in full["param_groups"]
        ]
        whole = {name: weights.get(name, tensor.cpu()) for name, tensor in own.items() if name not in aliases}
        optimizer = {"max_grad_norm": self._lamb.max_grad_norm, "skipped_steps": self._lamb.skipped_steps}
        return InMemoryCheckpoint(whole, states, groups, optimizer, extra, aliases)

    def load(self, path: Path, *, options: bool) -> dict[str, Any]:
        def read() -> tuple[dict[str, Any], int]:
            contents.append(read_contents(path))
            return contents[0].extra, contents[0].optimizer.get("skipped_steps", 0)

        contents: list[InMemoryCheckpoint] = []  # on the first rank
        extra, skipped = self._ranks().first(read)
        template = self._lamb.full_state_dict()
        state = self._ranks().each(
            lambda: self._state(contents[0], template, path, options) if contents else None
        )
        self._lamb.load_full_state_dict(state)
        if options:
            self._lamb.skipped_steps = skipped
        return extra

    def _state(
        self, contents: InMemoryCheckpoint, template: dict[str, Any], path: Path, options: bool
    ) -> dict[str, Any]:
        """The argument of `DeepSpeedLamb.load_full_state_dict`. Raises ValueError if parameters' names differ."""
        names = [name for name, _ in self._trained]
        saved_names = [name for group in contents.groups for name in group["names"]]
        if sorted(saved_names) != sorted(names):
            mismatched = sorted({*saved_names} ^ {*names})
            raise ValueError(
                f"checkpoint {path} is of another model: their parameters differ in {mismatched[:5]}; check run_dir "
                f"and model"
            )
        # DeepSpeed copies weights from masters; a master that was not saved equals the weight.
        states = {
            index: {"master": contents.weights[name].float(), **contents.states[name]}
            for index, name in enumerate(names)
        }
        groups = [dict(group) for group in template["param_groups"]]
        if options:
            for group, saved in zip(groups, contents.groups, strict=True):
                group.update(saved["options"])
        return {"state": states, "param_groups": groups}

    def _ranks(self) -> RankGroup:
        return RankGroup.of()

    def close(self) -> None:
        self._engine.destroy()
        torch.nn.functional.linear = self._linear
