"""Rank 0's prints, and its files in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import PhaseConfig, RunConfig
from sharded_lamb.bert.evaluate import fill_mask
from sharded_lamb.bert.model import ModelSize
from sharded_lamb.bert.schedule import Cosine, Schedule
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.config_io import dump_config
from sharded_lamb.recipes.training.ranks import Ranks


def begin(run_dir: Path, config: RunConfig, tokenizer: Any) -> None:
    """Creates the run folder with the resolved configuration and the tokenizer."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    tokenizer.save_pretrained(str(run_dir / "tokenizer"))


def headline(config: RunConfig, size: ModelSize, ranks: Ranks, flops: float, flops_source: str) -> str:
    parallel: str = config.parallel
    if parallel == "deepspeed":
        parallel = f"DeepSpeed ZeRO {config.deepspeed.zero_stage}"
    return (
        f"BERT of {size.parameters:,} parameters, {parallel} on {ranks.world_size} ranks ({ranks.device.type}), "
        f"{config.optimizer.variant}, {config.speed.precision}; MFU against {flops / 1e12:.2f} TFLOP/s a rank "
        f"({flops_source})"
    )


def phase_line(phase: PhaseConfig, schedule: Schedule | Cosine, plan: BatchPlan, begin_at: int) -> str:
    resumed = f", from step {begin_at}" if begin_at else ""
    ramp = f" (from {plan.ramp_start} over {plan.ramp_steps} steps)" if plan.ramp_steps else ""
    return (
        f"phase {phase.name!r}: {plan.steps} steps of {plan.global_batch}{ramp} x {phase.sequence_length} "
        f"= {plan.world_size} ranks x {plan.accumulation(plan.steps)} accumulated; "
        f"{schedule.describe()}{resumed}"
    )


def finish(run_dir: Path, config: RunConfig, bert: Any, tokenizer: Any, row: dict[str, Any]) -> None:
    """Writes the Hugging Face folder and fill_mask.json, and prints a summary. `bert` is unsharded."""
    save_hugging_face(bert, tokenizer, run_dir / "hf")
    next_piece = config.masking.causal_fraction is not None
    blanks = fill_mask(bert, tokenizer, config.log.fill_mask, next_piece=next_piece)
    (run_dir / "fill_mask.json").write_text(json.dumps(blanks, indent=1))
    for blank in blanks:
        guesses = ", ".join(f"{g['piece']} {g['probability']:.0%}" for g in blank["guesses"])
        print(f"  {blank['sentence']}  ->  {guesses}")
    print(f"unigram entropy of the corpus: {row['unigram_entropy']:.3f}")
    if row["heldout_loss"] is not None:
        print(
            f"held-out loss: {row['heldout_loss']:.3f}, accuracy on masked pieces: "
            f"{row['heldout_accuracy']:.1%}"
        )
    if "heldout_causal_loss" in row:
        print(
            f"held-out loss of causal samples: {row['heldout_causal_loss']:.3f}, accuracy: "
            f"{row['heldout_causal_accuracy']:.1%}"
        )
    print(f"{row['tokens']:,} tokens at {row['mean_tokens_per_s']:,.0f} a second", flush=True)


def save_hugging_face(bert: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder for `from_pretrained`."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    bert.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
