"""`python -m sharded_lamb.bert padding`: the recipe's forward beside one over padded rows, on the same batches."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_lamb import Lamb
from sharded_lamb.bench.report import about
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import BatchSource, MicroBatch
from sharded_lamb.bert.masking import masker_of, require_masked_only
from sharded_lamb.bert.model import Losses, build_bert, parameters_to_train
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.shards import PackedSamples, write_atomically
from sharded_lamb.bert.tokenizer import load_tokenizer, vocabulary_of
from sharded_lamb.recipes.training.stateless_rng import key_of


class PaddedLosses(Losses):
    """`Losses` with each document in a row of its own, as long as the longest may be, and a mask."""

    def _hidden(self, batch: MicroBatch) -> Tensor:
        offsets, limit = batch.documents.offsets.long(), batch.documents.limit
        columns = torch.arange(limit, device=offsets.device)
        real = columns < offsets.diff()[:, None]  # [D, L]
        place = (offsets[:-1, None] + columns).clamp(max=len(batch.tokens) - 1)
        tokens, segments, positions = (
            torch.where(real, x[place], 0) for x in (batch.tokens, batch.segments, batch.positions)
        )
        bidirectional = batch.documents.count - batch.documents.causal_count
        seen = real[:, None, None, :]  # [D, 1, L or 1, L]
        if bidirectional < len(real):
            causal = torch.arange(len(real), device=offsets.device) >= bidirectional
            seen = seen & ~(causal[:, None, None, None] & (columns > columns[:, None]))
        core = self.module.bert
        hidden: Tensor = core.encoder(
            core.embeddings(input_ids=tokens, token_type_ids=segments, position_ids=positions),
            attention_mask=None if batch.documents.are_full and bidirectional == len(real) else seen,
        ).last_hidden_state
        return hidden[real]


class _Run:
    """One of the two trainings."""

    def __init__(self, config: RunConfig, kind: type[Losses], vocabulary: Any) -> None:
        self._losses = kind(
            build_bert(config, vocabulary),
            nsp=config.data.nsp,
            autocast=config.speed.precision == "bf16_autocast",
        )
        lr = config.phases[0].lr
        assert lr != "auto"
        named = parameters_to_train(self._losses.module)
        self._optimizer = Lamb(named, lr=lr, **config.optimizer.keywords())
        self.seconds, self.losses = 0.0, list[float]()

    def step(self, batch: MicroBatch) -> None:
        begin = time.perf_counter()
        sums = self._losses(batch)
        (sums[0] / len(batch.labels) + sums[1] / batch.documents.count).backward()
        self.seconds += time.perf_counter() - begin
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(float(sums[0].detach()) / len(batch.labels))


def compare(config: RunConfig) -> Path:
    """Train `phases.0.steps` steps of one micro-batch both ways, in turns; writes padding.json into the run folder.

    Raises:
        ValueError: `phases.0.lr` is auto, `masking.causal_fraction` is set, or the corpus gives no sample.
    """
    require_masked_only(config)
    phase, folder = config.phases[0], prepare(config, config.phases[0].sequence_length)
    if phase.lr == "auto":
        raise ValueError("phases.0.lr='auto': expected a number here; pass phases.0.lr=0.005")
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    key = key_of(config.seed, "padding")
    masker = masker_of(config, 0, vocabulary, key)
    source = BatchSource(PackedSamples(folder, "train"), vocabulary, masker, key)
    ways = {"documents": Losses, "padded rows": PaddedLosses}
    runs = {name: _Run(config, kind, vocabulary) for name, kind in ways.items()}
    size, tokens, places = config.max_micro_batch(phase), 0, 0
    for step in range(phase.steps + 1):
        batch = source.micro_batch(np.arange(step * size, (step + 1) * size))
        for run in runs.values():
            run.step(batch)
        if step == 0:  # warm-up
            for run in runs.values():
                run.seconds = 0.0
        else:
            tokens += len(batch.tokens)
            places += batch.documents.count * batch.documents.limit
    ours, theirs = (np.array(run.losses) for run in runs.values())
    result = {
        "about": {
            **about(torch.device("cpu")),
            "command": shlex.join(["python", "-m", "sharded_lamb.bert", *sys.argv[1:]]),
        },
        "model": config.to_dict()["model"],
        "sequence_length": phase.sequence_length,
        "micro_batch": size,
        "nsp": config.data.nsp,
        "steps": phase.steps,
        "share of padding": round(1 - tokens / places, 3),
        "forward and backward, tokens/s": {name: round(tokens / run.seconds) for name, run in runs.items()},
        "last loss": {name: run.losses[-1] for name, run in runs.items()},
        "largest relative difference of a loss": float((abs(ours - theirs) / theirs).max()),
    }
    path = Path(config.run_dir) / "padding.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1), flush=True)
    return path
