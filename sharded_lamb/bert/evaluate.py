"""Evaluation: held-out loss and accuracy, and fill-mask samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sharded_lamb.bert.data import BatchSource
from sharded_lamb.recipes.training.ranks import Ranks


@dataclass(frozen=True)
class HeldOut:
    """Means over the predictions in the held-out split."""

    loss: float
    accuracy: float
    predictions: int
    nsp_accuracy: float | None


def held_out(
    losses: Any,
    source: BatchSource,
    batch: int,
    ranks: Ranks,
    limit: int | None,
    beat: Callable[[str], None] = lambda _: None,
) -> HeldOut:
    """Evaluates the split; masks are keyed by sample and batches are world-size independent, so results are too.

    ``beat`` is called before every batch.
    """
    total = len(source.samples) if limit is None else min(len(source.samples), limit * batch)
    starts = range(0, total, batch)
    sums = np.zeros(6)
    was_training = losses.training
    losses.eval()
    with torch.no_grad():
        for turn in range(0, len(starts), ranks.world_size):
            number = turn + ranks.rank
            beat(f"held-out batch {number}")
            # A rank without a batch in the last turn repeats the last one: forward gathers sharded parameters together.
            start = starts[min(number, len(starts) - 1)]
            micro = source.micro_batch(np.arange(start, min(start + batch, total)), shuffled=False)
            out = losses(micro.to(ranks.device))
            if number < len(starts):
                sums += [*out.double().tolist(), len(micro.labels), micro.documents.count]
    losses.train(was_training)
    loss, other, right, other_right, predictions, documents = ranks.sum(sums.tolist())
    nsp = None
    if source.samples.manifest.nsp:
        nsp = other_right / documents
    else:  # causal documents
        loss, right = loss + other, right + other_right
    return HeldOut(loss / max(1, predictions), right / max(1, predictions), int(predictions), nsp)


def check_sentences(tokenizer: Any, sentences: tuple[str, ...], max_positions: int) -> None:
    """Raises ValueError for a sentence that `fill_mask` cannot complete."""
    for sentence in sentences:
        ids = tokenizer(sentence)["input_ids"]
        if tokenizer.mask_token_id not in ids:
            raise ValueError(f"log.fill_mask {sentence!r}: expected {tokenizer.mask_token} in it")
        if len(ids) > max_positions:
            raise ValueError(
                f"log.fill_mask {sentence!r}: it has {len(ids)} pieces, expected at most {max_positions} "
                f"(model.max_positions)"
            )


def fill_mask(
    bert: Any, tokenizer: Any, sentences: tuple[str, ...], *, next_piece: bool, top: int = 5
) -> list[dict[str, Any]]:
    """The `top` likeliest pieces for the first [MASK] of each sentence, as checked by `check_sentences`.

    ``next_piece``: at the position before it.
    """
    results: list[dict[str, Any]] = []
    device = next(bert.parameters()).device
    was_training = bert.training
    bert.eval()
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"].to(device)
        blanks = (ids[0] == tokenizer.mask_token_id).nonzero()
        with torch.no_grad():
            hidden = bert.bert(input_ids=ids).last_hidden_state[0, blanks[0, 0] - int(next_piece)]
            chances = bert.cls.predictions(hidden[None]).float()[0, : len(tokenizer)].softmax(0)
        values, pieces = chances.topk(top)
        guesses = [
            {"piece": tokenizer.convert_ids_to_tokens(int(i)), "probability": round(float(v), 4)}
            for v, i in zip(values, pieces, strict=True)
        ]
        results.append({"sentence": sentence, "guesses": guesses})
    bert.train(was_training)
    return results
