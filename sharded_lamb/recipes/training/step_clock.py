"""Seconds of a step by section, on the timeline of the device, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SECTIONS = ("data", "forward", "backward", "log", "optimizer")
"""Of a step. `log` reads and writes the numbers of the step before."""


class StepClock:
    """The sections of one step. A GPU's are between events on its stream, which are read once they have completed."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # (section that begins, event or host time)

    def enter(self, section: str) -> None:
        """End the section before, and begin this one."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        self._marks.append((section, event if self._on_gpu else time.perf_counter()))

    def end(self) -> None:
        """End the last section."""
        self.enter("")

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Wait for this step. Values of the device that are read inside wait for none that was started since."""
        if not self._on_gpu:
            yield
            return
        self._marks[-1][1].synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            yield

    def seconds(self) -> list[float]:
        """Of each of `SECTIONS`. To be called after `end`, inside `completed`."""
        totals = dict.fromkeys(SECTIONS, 0.0)
        for (section, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[section] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        return list(totals.values())
