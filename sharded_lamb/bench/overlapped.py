"""One rank of `sharded_lamb.bench.overlap`: trains under each configuration in turn and records timelines."""

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.comm.wire_formats import GATHER_DTYPES
from sharded_lamb.timeline import Timeline, draw

CONFIGURATIONS = {
    "none": "no overlap",
    "backward": "gradients behind backward",
    "both": "and parameters behind the next forward",
}
"""{name in files: title}."""

TRACED = 5
"""Recorded iterations, from which one is drawn; one more precedes them and fills the link."""


@dataclass(frozen=True)
class Work:
    """The model and the number of iterations. ``bucket_mb``: MiB; ``batch``: sequences a rank."""

    layers: int
    hidden: int
    vocabulary: int
    batch: int
    sequence: int
    bucket_mb: float
    rounds: int
    iterations: int
    seed: int
    gather_dtype: str = "none"  # or one of `GATHER_DTYPES`
    reduce_dtype: str = "none"  # likewise

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "vocabulary", "batch", "sequence", "rounds", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be >= 1, got {getattr(self, name)}")
        if self.hidden % 64:
            raise ValueError(f"--hidden must be a multiple of 64 (the size of a head), got {self.hidden}")


def build(work: Work) -> nn.Module:
    """A small BERT without dropout.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(work.seed)
    config = BertConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 64,
        intermediate_size=4 * work.hidden,
        max_position_embeddings=work.sequence,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = BertForMaskedLM(config)
    return model


class Configured:
    """A model and its optimizer under one configuration."""

    def __init__(self, name: str, work: Work) -> None:
        self.work, self.model = work, build(work)
        self.optimizer = ShardedLamb(
            self.model.named_parameters(),
            lr=1e-3,
            stage=2,
            bucket_mb=work.bucket_mb,
            overlap=name != "none",
            max_grad_norm=1.0,
            gather_dtype=GATHER_DTYPES.get(work.gather_dtype),
            reduce_dtype=GATHER_DTYPES.get(work.reduce_dtype),
        )
        if name == "both":
            self.optimizer.overlap_forward(self.model)
        self._done = 0

    def iterate(self, timeline: Timeline) -> None:
        """One iteration; each rank has batches of its own, the same under every configuration."""
        generator = torch.Generator().manual_seed(1_000_003 * dist.get_rank() + self._done)
        size = (self.work.batch, self.work.sequence)
        tokens = torch.randint(self.work.vocabulary, size, generator=generator, device="cpu")
        with timeline.span("forward"):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        with timeline.span("backward"):
            loss.backward()
        with timeline.span("step"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._done += 1

    def block(self) -> dict[str, Any]:
        """Run ``iterations`` to the end of the last gather; returns seconds and bytes per iteration. Collective."""
        timeline, count = Timeline(dist.get_rank()), self.work.iterations
        dist.barrier()
        start = time.perf_counter()
        with self.optimizer.record(timeline):
            for _ in range(count):
                self.iterate(timeline)
            self.optimizer.synchronize()
        seconds = time.perf_counter() - start
        summary = timeline.summary()
        marks: dict[str, float] = summary["seconds"]["marks"]
        return {
            "iteration": seconds / count,
            **{name: marks[name] / count for name in ("forward", "backward", "step")},
            "compute": {name: value / count for name, value in summary["seconds"]["compute"].items()},
            "collectives": {
                kind: {name: value if name == "hidden" else value / count for name, value in row.items()}
                for kind, row in summary["collectives"].items()
            },
        }

    def typical_iteration(self) -> Timeline:
        """Spans that overlap the iteration of median length, gathers of the step before included. Collective."""
        timeline = Timeline(dist.get_rank())
        dist.barrier()
        edges = []
        with self.optimizer.record(timeline):
            for _ in range(1 + TRACED):
                edges.append(timeline.clock())
                self.iterate(timeline)
            self.optimizer.synchronize()
        edges.append(timeline.clock())
        lengths = torch.tensor(edges[2:], dtype=torch.float64, device="cpu") - torch.tensor(
            edges[1:-1], dtype=torch.float64, device="cpu"
        )
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
        index = 1 + int(lengths.argsort()[TRACED // 2])
        low, high = edges[index], edges[index + 1]
        timeline.spans = [span for span in timeline.spans if span.end > low and span.start < high]
        return timeline


def compare(work: Work, folder: Path) -> None:
    """Write ``result.json``, a trace of one iteration of each configuration, and a picture to ``folder``.

    Joins the process group that the environment describes. Collective.
    """
    dist.init_process_group("gloo")
    configured = {name: Configured(name, work) for name in CONFIGURATIONS}
    for each in configured.values():  # learns the order of hooks, compares gradients, touches memory
        each.block()
    rounds = []
    for index in range(work.rounds):
        order = list(configured)[index % len(configured) :] + list(configured)[: index % len(configured)]
        rounds.append({name: configured[name].block() for name in order})
    timelines = {name: each.typical_iteration() for name, each in configured.items()}
    same = _same([list(each.model.parameters()) for each in configured.values()])
    for name, timeline in timelines.items():
        timeline.save(folder / f"{name}.rank{dist.get_rank()}.json")
    dist.barrier()
    _on_first(lambda: _write(folder, rounds, timelines, same, configured["none"]))
    dist.destroy_process_group()


def _write(
    folder: Path,
    rounds: Sequence[dict[str, Any]],
    timelines: dict[str, Timeline],
    same: bool,
    configured: Configured,
) -> None:
    for name in timelines:
        parts = [folder / f"{name}.rank{rank}.json" for rank in range(dist.get_world_size())]
        Timeline.merge(parts, folder / f"{name}.trace.json")
        for part in parts:
            part.unlink()
    if importlib.util.find_spec("matplotlib") is not None:
        draw({CONFIGURATIONS[name]: timeline for name, timeline in timelines.items()}, folder / "overlap.png")
    numel = sum(p.numel() for p in configured.model.parameters())
    content = {"rounds": rounds, "same_weights": same, "parameters": numel}
    (folder / "result.json").write_text(json.dumps(content))


def _same(models: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all models have the same bits on every rank. Collective."""
    equal = all(torch.equal(p, q) for model in models[1:] for p, q in zip(models[0], model, strict=True))
    agreed = torch.tensor(int(equal), device="cpu")
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed.item())


def _on_first(act: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()
