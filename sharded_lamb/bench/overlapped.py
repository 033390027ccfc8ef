"""One rank of `sharded_lamb.bench.overlap`: the same training under each configuration, in turn, each on a timeline."""

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
from sharded_lamb.timeline import Timeline, draw

CONFIGURATIONS = {
    "none": "no overlap",
    "backward": "gradients behind backward",
    "both": "and parameters behind the next forward",
}
"""Name in files: title."""

TRACED = 5
"""Iterations from which one is drawn; the one before them fills the wire."""


@dataclass(frozen=True)
class Work:
    """What is trained, and how often. ``bucket_mb`` in MiB; ``batch`` sequences a rank."""

    layers: int
    hidden: int
    vocabulary: int
    batch: int
    sequence: int
    bucket_mb: float
    rounds: int
    iterations: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "vocabulary", "batch", "sequence", "rounds", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be >= 1, got {getattr(self, name)}")
        if self.hidden % 64:
            raise ValueError(f"--hidden must be a multiple of 64 (the size of a head), got {self.hidden}")


def build(work: Work) -> nn.Module:
    """A BERT in small, without dropout.

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


class Trainee:
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
        )
        if name == "both":
            self.optimizer.overlap_forward(self.model)
        self._done = 0

    def iterate(self, timeline: Timeline) -> None:
        """One iteration; each rank has batches of its own, the same under every configuration."""
        generator = torch.Generator().manual_seed(1_000_003 * dist.get_rank() + self._done)
        size = (self.work.batch, self.work.sequence)
        tokens = torch.randint(self.work.vocabulary, size, generator=generator)
        with timeline.span("forward"):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        with timeline.span("backward"):
            loss.backward()
        with timeline.span("step"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._done += 1

    def block(self) -> dict[str, Any]:
        """Some iterations, to the end of the last gather: what one of them took, in seconds and bytes."""
        timeline, count = Timeline(dist.get_rank()), self.work.iterations
        dist.barrier()
        start = time.perf_counter()
        with self.optimizer.record(timeline):
            for _ in range(count):
                self.iterate(timeline)
            self.optimizer.synchronize()
        seconds = time.perf_counter() - start
        found = timeline.summary()
        marks: dict[str, float] = found["seconds"]["marks"]
        return {
            "iteration": seconds / count,
            **{name: marks[name] / count for name in ("forward", "backward", "step")},
            "compute": {name: value / count for name, value in found["seconds"]["compute"].items()},
            "collectives": {
                kind: {name: value if name == "hidden" else value / count for name, value in row.items()}
                for kind, row in found["collectives"].items()
            },
        }

    def typical_iteration(self) -> Timeline:
        """What overlaps one iteration, with the gathers of the step before it: that of median length, on all ranks."""
        timeline = Timeline(dist.get_rank())
        dist.barrier()
        edges = []
        with self.optimizer.record(timeline):
            for _ in range(1 + TRACED):
                edges.append(timeline.clock())
                self.iterate(timeline)
            self.optimizer.synchronize()
        edges.append(timeline.clock())
        lengths = torch.tensor(edges[2:], dtype=torch.float64) - torch.tensor(
            edges[1:-1], dtype=torch.float64
        )
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
        index = 1 + int(lengths.argsort()[TRACED // 2])
        low, high = edges[index], edges[index + 1]
        timeline.spans = [span for span in timeline.spans if span.end > low and span.start < high]
        return timeline


def compare(work: Work, folder: Path) -> None:
    """Writes ``result.json``, and a trace and a picture of one iteration of each configuration, to ``folder``.

    Joins the process group that the environment describes.
    """
    dist.init_process_group("gloo")
    trainees = {name: Trainee(name, work) for name in CONFIGURATIONS}
    for trainee in trainees.values():  # hooks and order are learnt, gradients compared, memory touched
        trainee.block()
    rounds = []
    for index in range(work.rounds):
        order = list(trainees)[index % len(trainees) :] + list(trainees)[: index % len(trainees)]
        rounds.append({name: trainees[name].block() for name in order})
    timelines = {name: trainee.typical_iteration() for name, trainee in trainees.items()}
    same = _same([list(trainee.model.parameters()) for trainee in trainees.values()])
    for name, timeline in timelines.items():
        timeline.save(folder / f"{name}.rank{dist.get_rank()}.json")
    dist.barrier()
    _on_first(lambda: _write(folder, rounds, timelines, same, trainees["none"]))
    dist.destroy_process_group()


def _write(
    folder: Path,
    rounds: Sequence[dict[str, Any]],
    timelines: dict[str, Timeline],
    same: bool,
    trainee: Trainee,
) -> None:
    for name in timelines:
        parts = [folder / f"{name}.rank{rank}.json" for rank in range(dist.get_world_size())]
        Timeline.merge(parts, folder / f"{name}.trace.json")
        for part in parts:
            part.unlink()
    if importlib.util.find_spec("matplotlib") is not None:
        draw({CONFIGURATIONS[name]: timeline for name, timeline in timelines.items()}, folder / "overlap.png")
    numel = sum(p.numel() for p in trainee.model.parameters())
    content = {"rounds": rounds, "same_weights": same, "parameters": numel}
    (folder / "result.json").write_text(json.dumps(content))


def _same(models: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all have the same bits, on every rank. Collective."""
    equal = all(torch.equal(p, q) for model in models[1:] for p, q in zip(models[0], model, strict=True))
    agreed = torch.tensor(int(equal))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed.item())


def _on_first(act: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()
