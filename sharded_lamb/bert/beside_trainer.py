"""`python -m sharded_lamb.bert trainer`: the recipe beside Hugging Face's Trainer, and with parts of it replaced."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharded_lamb.bench import report
from sharded_lamb.bench.timing import Spread, quotients
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import BatchSource, MicroBatch
from sharded_lamb.bert.masking import masker_of, require_masked_only
from sharded_lamb.bert.model import Losses, build_bert, hf_config, padded_vocabulary
from sharded_lamb.bert.optim import sharded_backend
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.shards import PackedSamples, write_atomically
from sharded_lamb.bert.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from sharded_lamb.comm import devices
from sharded_lamb.comm.progress import with_progress
from sharded_lamb.recipes.training.precision import resolve_precision
from sharded_lamb.recipes.training.ranks import Ranks, use_threads
from sharded_lamb.recipes.training.stateless_rng import key_of

ROUNDS = 5
LR = 1e-4
IGNORED = -100  # Hugging Face's label of a position that is not predicted
RECIPE, TRAINER = "the recipe", "Trainer"
COUNTED = (
    "Steps of forward, backward, reduction, clipping and update, without the making of batches; the slowest rank's "
    "time of a turn, Trainer's after its first step. Tokens without padding. 'rows': samples in rows of the full "
    "length, attention over the whole row, with a mask. 'every position': the head over the vocabulary on all of "
    "them. 'torch': DistributedDataParallel and torch.optim.AdamW(fused=True) on every rank, in place of ShardedLamb "
    "in stage 2."
)


@dataclass(frozen=True)
class Batch(MicroBatch):
    """A micro-batch, and the same samples in [B, L] rows."""

    rows: Tensor  # [B, L] int64, with masks
    real: Tensor  # [B, L] int64: 1, and 0 for padding
    row_labels: Tensor  # [B, L] int64; IGNORED where nothing is predicted


class ReplacedLosses(Losses):
    """`Losses` with the choices of Hugging Face's own model in place of ours."""

    def __init__(self, bert: Any, *, autocast: bool, in_rows: bool, every_position: bool) -> None:
        super().__init__(bert, nsp=False, autocast=autocast)
        self._in_rows, self._every = in_rows, every_position

    def _sums(self, batch: MicroBatch) -> Tensor:
        assert isinstance(batch, Batch)
        if self._in_rows:
            core = self.module.bert
            mask = batch.real.bool()[:, None, None, :]
            hidden = core.encoder(
                core.embeddings(input_ids=batch.rows), attention_mask=mask
            ).last_hidden_state
            hidden, labels = hidden.flatten(0, 1), batch.row_labels.flatten()
        else:
            hidden = self._hidden(batch)
            labels = torch.full_like(batch.tokens, IGNORED)
            labels[batch.output_positions] = batch.labels
        if not self._every:
            kept = (labels != IGNORED).nonzero()[:, 0]
            hidden, labels = hidden.index_select(0, kept), labels[kept]
        logits = self.module.cls.predictions(hidden).float()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        zero = torch.zeros_like(loss.detach())
        return torch.stack([loss, zero, zero, zero])


class Way(Protocol):
    """One of the trainings that are compared."""

    def turn(self, batches: Sequence[Sequence[Batch]]) -> float:
        """Seconds of this rank for one step a batch. Collective.

        Args:
            batches: [step][rank].
        """


class Loop:
    """A loop of ours. ``train``: a batch's forward and backward; ``update``: clipping and the step."""

    def __init__(
        self, ranks: Ranks, train: Callable[[Batch, Tensor], object], update: Callable[[], object]
    ) -> None:
        self._ranks, self._train, self._update = ranks, train, update

    def turn(self, batches: Sequence[Sequence[Batch]]) -> float:
        device = self._ranks.device
        devices.synchronize(device)
        begin = time.perf_counter()
        for step in batches:
            batch = step[self._ranks.rank]
            self._train(batch, torch.tensor([1 / len(batch.labels), 1.0], device=device))
            self._update()
        devices.synchronize(device)
        return time.perf_counter() - begin


def sharded(ranks: Ranks, config: RunConfig, losses: Losses) -> Loop:
    """The recipe's backend in stage 2."""
    backend = sharded_backend(config, losses)

    def train(batch: Batch, scale: Tensor) -> object:
        return backend.accumulate(batch, scale, last=True, entered=lambda section: None)

    return Loop(ranks, train, lambda: backend.step(LR))


def replicated(ranks: Ranks, config: RunConfig, losses: Losses) -> Loop:
    """DDP and torch's AdamW on every rank."""
    wrapped = nn.parallel.DistributedDataParallel(losses)
    optimizer = torch.optim.AdamW(losses.parameters(), lr=LR, fused=True)
    limit = config.optimizer.max_grad_norm

    def train(batch: Batch, scale: Tensor) -> None:
        (wrapped(batch)[:2] * scale).sum().backward()

    def update() -> None:
        if limit is not None:
            nn.utils.clip_grad_norm_(losses.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()

    return Loop(ranks, train, update)


class HuggingFace:
    """A Trainer with its default optimizer and model; a new one each turn, whose first step is not timed."""

    def __init__(self, ranks: Ranks, config: RunConfig, vocabulary: Vocabulary) -> None:
        from transformers import BertForMaskedLM

        shape = hf_config(config.model, padded_vocabulary(vocabulary, config.model), vocabulary.pad)
        torch.manual_seed(config.seed)
        model: Any = BertForMaskedLM(shape)
        self._ranks, self._config, self._model = ranks, config, model.to(ranks.device)
        self.optimizer: str = ""

    def turn(self, batches: Sequence[Sequence[Batch]]) -> float:
        import transformers

        names = {"input_ids": "rows", "attention_mask": "real", "labels": "row_labels"}
        samples = [
            {key: getattr(batch, name)[i].cpu() for key, name in names.items()}
            for step in (batches[0], *batches)
            for batch in step
            for i in range(len(batch.rows))
        ]
        device, ends = self._ranks.device, list[float]()

        class Times(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                devices.synchronize(device)
                ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                max_steps=len(batches) + 1,
                per_device_train_batch_size=len(batches[0][0].rows),
                learning_rate=LR,
                max_grad_norm=self._config.optimizer.max_grad_norm or 0.0,
                bf16=self._config.speed.precision == "bf16_autocast",
                use_cpu=device.type == "cpu",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = transformers.Trainer(self._model, arguments, train_dataset=samples, callbacks=[Times()])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        self.optimizer = arguments.optim
        return ends[-1] - ends[0]


def compare(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Trains `phases.0.steps` steps a turn of `batch.max_micro_batch` samples a rank, every way in turn. Collective.

    Returns:
        The content of trainer.json, which the first rank prints as a table and writes into the run folder.

    Raises:
        ValueError: `data.nsp` or `masking.causal_fraction` is set, or the corpus gives no sample.
    """
    require_masked_only(config)
    if config.data.nsp:
        raise ValueError(
            "data.nsp=True: expected false, since the comparison is of masked language modelling"
        )
    use_threads(config.speed.threads)
    config = replace(config, speed=replace(config.speed, precision=resolve_precision(config.speed.precision)))
    length = config.phases[0].sequence_length
    folder = ranks.from_first(lambda: prepare(config, length))
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    batches = _batches(config, folder, vocabulary, ranks)
    theirs = HuggingFace(ranks, config, vocabulary)
    ways: dict[str, Way] = {**_own_ways(config, vocabulary, ranks), TRAINER: theirs}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in with_progress([*ways] * (1 + ROUNDS), "trainer"):
        seconds[name].append(float(ranks.gather([ways[name].turn(batches)]).max()))
    seconds = {name: turns[1:] for name, turns in seconds.items()}  # without the warm-up
    tokens = sum(len(batch.tokens) for step in batches for batch in step)
    places = sum(batch.rows.numel() for step in batches for batch in step)
    result = {
        **report.about(ranks.device),
        "command": shlex.join(["python", "-m", "sharded_lamb.bert", *sys.argv[1:]]),
        "counted": COUNTED,
        "model": config.to_dict()["model"],
        "precision": config.speed.precision,
        "sequence_length": length,
        "samples_a_rank": len(batches[0][0].rows),
        "steps_a_turn": len(batches),
        "share_of_padding": round(1 - tokens / places, 3),
        "optimizer_of_trainer": theirs.optimizer,
        "summary": summarize(seconds, tokens),
        "turns_s": seconds,
    }
    if ranks.is_first:
        print("\n".join([_table(result["summary"]), "", COUNTED]), flush=True)
        path = Path(config.run_dir) / "trainer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, report.dumped(result).encode())
    return result


def _batches(config: RunConfig, folder: Path, vocabulary: Vocabulary, ranks: Ranks) -> list[list[Batch]]:
    """[step][rank], on this rank's device; the same on every rank."""
    key = key_of(config.seed, "trainer")
    masker = masker_of(config, 0, vocabulary, key)
    source = BatchSource(PackedSamples(folder, "train"), vocabulary, masker, key)
    size = config.max_micro_batch(config.phases[0])

    def batch(number: int) -> Batch:
        indices = np.arange(number * size, (number + 1) * size)
        rows = source.samples.rows(source.sample_numbers(indices))
        masked, chosen = masker(rows, indices)
        micro = MicroBatch.of(rows, chosen, masked, None, None, pad=vocabulary.pad, cls=vocabulary.cls)
        real, labels = (rows != vocabulary.pad).astype(np.int64), np.where(chosen, rows, IGNORED)
        in_rows = [torch.from_numpy(array).to(ranks.device) for array in (masked, real, labels)]
        return Batch(*vars(micro.to(ranks.device)).values(), *in_rows)

    world = ranks.world_size
    return [[batch(step * world + rank) for rank in range(world)] for step in range(config.phases[0].steps)]


def _own_ways(config: RunConfig, vocabulary: Vocabulary, ranks: Ranks) -> dict[str, Way]:
    autocast = config.speed.precision == "bf16_autocast"

    def replaced(*, in_rows: bool = False, every_position: bool = False) -> Losses:
        bert = build_bert(config, vocabulary).to(ranks.device)
        return ReplacedLosses(bert, autocast=autocast, in_rows=in_rows, every_position=every_position)

    recipe = Losses(build_bert(config, vocabulary).to(ranks.device), nsp=False, autocast=autocast)
    return {
        RECIPE: sharded(ranks, config, recipe),
        "rows": sharded(ranks, config, replaced(in_rows=True)),
        "every position": sharded(ranks, config, replaced(every_position=True)),
        "torch": replicated(ranks, config, replaced()),
        "rows, every position, torch": replicated(ranks, config, replaced(in_rows=True, every_position=True)),
    }


def summarize(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, dict[str, Any]]:
    """For each way: tokens a second, and that over the recipe's and over Trainer's, round by round."""
    return {
        name: {
            "tokens_per_s": asdict(Spread.of([tokens / turn for turn in turns])),
            "to_recipe": asdict(Spread.of(quotients(seconds[RECIPE], turns))),
            "to_trainer": asdict(Spread.of(quotients(seconds[TRAINER], turns))),
        }
        for name, turns in seconds.items()
    }


def _table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{row['tokens_per_s']['median']:,.0f}",
            f"{row['tokens_per_s']['low']:,.0f}-{row['tokens_per_s']['high']:,.0f}",
            f"{row['to_recipe']['median']:.2f}x",
            f"{row['to_trainer']['median']:.2f}x",
        ]
        for name, row in summary.items()
    ]
    return report.table(["", "tokens/s", "quartiles", "to the recipe", "to Trainer"], rows)
