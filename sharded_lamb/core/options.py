"""Parameter groups → `ParameterOptions`: Python values to device tensors, made anew only when a value changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.rule import ParameterOptions


def _row(group: Mapping[str, Any]) -> tuple[float, ...]:
    """One group's options as numbers, in the order that `_assemble` reads them."""
    beta1, beta2 = group["betas"]
    inside = group["eps_inside_sqrt"]
    phi = group["weight_norm_clip"] or (0.0, math.inf)
    clip = group["trust_clip"] or (0.0, math.inf)
    return (
        beta1,
        beta2,
        1 - beta1 if group["grad_averaging"] else 1.0,
        1 - beta2,
        float(group["bias_correction"] is True),
        float(group["bias_correction"] == "lr"),
        group["eps"] if inside else 0.0,
        0.0 if inside else group["eps"],
        0.0 if group["adam_w_mode"] else group["weight_decay"],
        group["weight_decay"] if group["adam_w_mode"] else 0.0,
        *phi,
        *clip,
        float(group["adapt_without_decay"]),
    )


class OptionTable:
    """The options of all parameters on the device of the update.

    The tensors are read by the host only when they are made; a step whose groups hold the same values as
    the step before makes none.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        group_of: Sequence[int],
        decays: Sequence[bool],
        adapts: Sequence[bool],
        is_fp64: Sequence[bool],
        device: torch.device,
    ) -> None:
        self._groups = groups
        self._group_of = torch.tensor(group_of, dtype=torch.int64, device=device)
        self._decays = torch.tensor(decays, dtype=torch.float64, device=device)
        self._adapts = torch.tensor(adapts, dtype=torch.bool, device=device)
        self._wide = torch.tensor(is_fp64, dtype=torch.bool, device=device)
        self._device = device
        self._rows: list[tuple[float, ...]] | None = None
        self._options: ParameterOptions | None = None
        self._lrs: list[float] | None = None
        self._lr: Tensor | None = None

    def __len__(self) -> int:
        return len(self._group_of)

    def options(self) -> ParameterOptions:
        """The groups' options of now, one entry a parameter."""
        rows = [_row(group) for group in self._groups]
        if self._options is None or rows != self._rows:
            self._rows, self._options = rows, self._assemble(rows)
        return self._options

    def lr(self) -> Tensor:
        """[P] fp64: each parameter's learning rate; a tensor lr is read on the device, never by the host."""
        values = [group["lr"] for group in self._groups]
        if any(isinstance(value, Tensor) for value in values):
            self._lrs = None
            parts = [
                torch.as_tensor(value).to(self._device, torch.float64, non_blocking=True).reshape(())
                for value in values
            ]
            return torch.stack(parts)[self._group_of]
        if self._lr is None or values != self._lrs:
            self._lrs = values
            self._lr = self._on_device(values)[self._group_of]
        return self._lr

    def _on_device(self, values: Sequence[Any]) -> Tensor:
        """Without waiting for the device, as a plain copy to it would."""
        host = torch.tensor(values, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)

    def _assemble(self, rows: Sequence[tuple[float, ...]]) -> ParameterOptions:
        table = self._on_device(rows)[self._group_of]
        columns = table.unbind(dim=1)
        l2, decay = columns[8] * self._decays, columns[9] * self._decays
        names = [field.name for field in fields(ParameterOptions)]
        named = dict(zip(names, columns[:-1], strict=False))
        named.update(l2=l2, decay=decay, is_fp64=self._wide)
        named["adapts"] = self._adapts & (columns[-1].bool() | (l2 + decay > 0))
        return ParameterOptions(**named)
