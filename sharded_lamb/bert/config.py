"""The settings of a pretraining run, frozen and typed.

pydantic checks keys, types and ranges, also in `dataclasses.replace`; `__post_init__` checks settings against each
other. `training.config_io` puts a constraint's ``description`` into its error messages: the expected value, in words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.recipes.training import config_io
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.settings import (
    STRICT,
    CheckpointConfig,
    FaultsConfig,
    Fraction,
    LocalPath,
    Positive,
    PositiveFloat,
    Precision,
    RatioBlocks,
    Seed,
    check_ratio_blocks,
    digest_of,
    plain,
    require,
)
from sharded_lamb.recipes.training.shipped import check_user

Auto = Literal["auto"]
OpenFraction = Annotated[float, Field(gt=0, lt=1, description="a number in (0, 1)")]
Parallel = Literal["zero2", "ddp+zero1", "fsdp2", "deepspeed"]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The shape of BERT. `pretrained` loads the weights and shape of a Hugging Face folder instead."""

    pretrained: str | None = None
    hidden_size: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    intermediate_size: Positive = 3072
    max_positions: Positive = 512
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    initializer_range: float = 0.02
    unigram_bias: bool = False  # start the prediction bias at the corpus' log frequencies
    pad_vocab_to: Positive = 8  # tensor cores want dimensions that are multiples of 8

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.heads == 0,
            "model.hidden_size",
            self.hidden_size,
            f"a multiple of model.heads={self.heads}",
        )


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """A Hugging Face tokenizer folder (`path`), or a WordPiece vocabulary to train on the corpus."""

    path: str | None = None
    vocab_size: Annotated[int, Field(ge=16, description="at least 16 pieces")] = 30522
    lowercase: bool = True
    sample_documents: int | None = 200_000  # train on a sample of about this size; null: on all (in memory)
    min_frequency: int = 2


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The text and its packing. `source` takes paths, globs, fsspec URLs, or `builtin`."""

    source: tuple[str, ...] = ("builtin",)
    format: Literal["auto", "text", "jsonl", "parquet", "arrow"] = "auto"
    text_field: str = "text"
    prepared: LocalPath = "runs/data"  # folder of prepared shards, one subfolder for each setting
    on_bad: Literal["error", "skip"] = "error"  # reaction to a broken or empty file
    heldout_fraction: Fraction = 0.01
    nsp: bool = False
    pack: bool = True  # several documents in one sequence; attention stays inside each
    # processes that tokenize; 0 is one for each core
    workers: Annotated[int, Field(ge=0, description="0 (one for each core) or more")] = 0
    unit_documents: Positive = 20_000  # documents in one restartable unit of work

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "data.source", self.source, "at least one path, glob or 'builtin'")


@dataclass(frozen=True, config=STRICT)
class MaskingConfig:
    """Dynamic masking: of `probability` of the tokens, 80 % become [MASK], 10 % a random piece, 10 % stay.

    With a `causal_fraction`, GPT-BERT's two objectives (arXiv 2410.24159, section 2.1): every piece is predicted at the
    position before it; in that share of the samples no piece is masked, all are predicted, and attention is causal.
    """

    probability: OpenFraction = 0.15
    final_probability: OpenFraction | None = None  # reached linearly over all phases; null: `probability`
    causal_fraction: Annotated[float, Field(ge=0, le=1, description="a number in [0, 1]")] | None = None
    whole_word: bool = False
    max_predictions: Positive | None = None  # cap for one sequence; null: probability x length, rounded up

    @property
    def last_probability(self) -> float:
        return self.probability if self.final_probability is None else self.final_probability


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """ShardedLamb's keywords. `variant: adamw` is the twin without a trust ratio.

    Five defaults are BERT's own and hold for every variant: betas and weight_decay (arXiv 1810.04805, appendix A.2);
    eps, max_grad_norm and exclude_from_weight_decay (optimization.py of google-research/bert). The variant fills the
    other rule options unless they are set.
    """

    variant: str = "lamb"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0, description="0 or more")] = 0.01
    max_grad_norm: (
        Annotated[float, Field(gt=0, description="a positive number; null switches clipping off")] | None
    ) = 1.0
    exclude_from_weight_decay: tuple[str, ...] = (r"bias$", r"LayerNorm")
    # variant: as the variant has it; null: the same patterns as for decay
    exclude_from_layer_adaptation: tuple[str, ...] | Literal["variant"] | None = "variant"
    adapt_without_decay: bool | None = None  # null: as the variant has it
    bias_correction: bool | None = None  # null: as the variant has it
    ratio_blocks: RatioBlocks | None = None  # parameters with several ratios: {qkv: 3, experts: dim0}
    bucket_mb: float = 32
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of the moments
    # bits beside each bf16 weight that make its fp32 master (8: of 24 bits); 0: whole masters
    store_param_remainders: Literal[0, 8, 16] = 0
    gather_dtype: Literal["bfloat16", "float8_e4m3fn"] | None = None  # of updated parameters on the wire
    reduce_dtype: Literal["bfloat16", "float8_e4m3fn"] | None = None  # of gradients on the wire, in zero2
    # evaluate and export averages of the weights over the steps; over those of a phase, without `cosine`
    ema_decay: OpenFraction | None = None

    def __post_init__(self) -> None:
        require(
            self.variant in VARIANTS,
            "optimizer.variant",
            self.variant,
            f"one of {', '.join(sorted(VARIANTS))}",
        )
        check_ratio_blocks("optimizer.ratio_blocks", self.ratio_blocks)

    def keywords(self) -> dict[str, Any]:
        """The options of the LAMB rule that are set here, for every way of sharding; the variant fills the others."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in _STORAGE}
        for name, left_out in _LEFT_TO_VARIANT.items():
            if options[name] == left_out:
                del options[name]
        return options


_STORAGE = {
    **{"bucket_mb": 32, "state_dtype": "float32", "gather_dtype": None, "reduce_dtype": None},
    "ema_decay": None,
    "store_param_remainders": 0,
}
"""Settings of `OptimizerConfig` outside of the LAMB rule → their defaults."""

_NOT_DEEPSPEEDS = ("state_dtype", "store_param_remainders", "gather_dtype", "ema_decay")

_LEFT_TO_VARIANT = {
    "exclude_from_layer_adaptation": "variant",
    "adapt_without_decay": None,
    "bias_correction": None,
    "ratio_blocks": None,
}
"""Settings of `OptimizerConfig` → the value with which the variant fills them."""


@dataclass(frozen=True, config=STRICT)
class RampConfig:
    """Grow the global batch linearly from `start` to the phase's batch over the first `steps` steps."""

    start: Positive
    steps: Positive
    multiple_of: Positive | None = None  # what batches are rounded down to; null: `start`

    def __post_init__(self) -> None:
        if self.multiple_of is not None:
            divides, value = self.start % self.multiple_of == 0, self.multiple_of
            require(divides, "phases.ramp.multiple_of", value, f"a divisor of start={self.start}")


@dataclass(frozen=True, config=STRICT)
class PhaseConfig:
    """One phase of training: BERT has two, at sequence length 128 and then 512."""

    steps: Positive
    global_batch: Positive
    sequence_length: Annotated[int, Field(ge=8, description="at least 8")] = 128
    name: str = "phase"
    lr: PositiveFloat | Auto = "auto"
    warmup_fraction: Fraction | Auto = "auto"
    decay_power: float = 1.0
    ramp: RampConfig | None = None
    max_predictions: Positive | None = None  # overrides masking.max_predictions
    max_micro_batch: Positive | None = None  # overrides batch.max_micro_batch

    def __post_init__(self) -> None:
        if self.ramp is not None:
            require(
                self.ramp.start <= self.global_batch and self.ramp.steps <= self.steps,
                "phases.ramp",
                self.ramp,
                f"a start up to global_batch={self.global_batch} and steps up to {self.steps}",
            )


@dataclass(frozen=True, config=STRICT)
class CosineConfig:
    """One learning rate for all phases: linear warmup, then half a cosine from `lr` to `final_fraction` of it.

    Moments, step counts and averages continue from phase to phase. `warmup_fraction` is of all steps.
    """

    lr: PositiveFloat
    warmup_fraction: Fraction = 0.0
    final_fraction: Fraction = 0.0


@dataclass(frozen=True, config=STRICT)
class BatchConfig:
    """Sequences in one forward of a rank, at most; accumulation follows."""

    max_micro_batch: Positive = 32


@dataclass(frozen=True, config=STRICT)
class SpeedConfig:
    """Precision and memory switches of the model."""

    precision: Precision = "fp32"  # auto: bf16_autocast where the hardware multiplies bf16, else fp32
    compile: bool = False
    activation_checkpointing: bool = False
    # CPU threads of a rank
    threads: Annotated[int, Field(ge=0, description="0 (cores / local ranks) or more")] = 0
    peak_tflops: PositiveFloat | None = None  # for MFU; null: the GPU's data sheet, else a matmul's speed


@dataclass(frozen=True, config=STRICT)
class DeepSpeedConfig:
    """For `parallel: deepspeed`. `config` is a ds_config JSON with further sections (offload, say); a section that
    contradicts other settings of this file is an error."""

    zero_stage: Literal[1, 2, 3] = 2
    config: LocalPath | None = None


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """Records beyond the row of every step in metrics.jsonl."""

    trust_ratio_steps: Positive = 10
    heldout_batches: Positive | None = None  # null: the whole held-out split
    heldout_steps: Positive | None = (
        None  # steps between evaluations of the held-out split; null: at the end only
    )
    fill_mask: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The whole run."""

    phases: tuple[PhaseConfig, ...]
    run_dir: LocalPath = "runs/bert"
    cosine: CosineConfig | None = None  # instead of a schedule of every phase
    start_from: LocalPath | None = None  # a checkpoint with the run's initial weights and moments
    seed: Seed = 1
    parallel: Parallel = "zero2"
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require(len(self.phases) > 0, "phases", self.phases, "at least one phase")
        for index, phase in enumerate(self.phases):
            require(
                phase.sequence_length <= self.model.max_positions,
                f"phases.{index}.sequence_length",
                phase.sequence_length,
                f"at most model.max_positions={self.model.max_positions}",
            )
        require(
            self.masking.causal_fraction is None or not self.data.nsp,
            "masking.causal_fraction",
            self.masking.causal_fraction,
            "null with data.nsp: true, whose pairs are bidirectional",
        )
        for index, phase in enumerate(self.phases if self.cosine else ()):
            for name in ("lr", "warmup_fraction"):
                value = getattr(phase, name)
                require(
                    value == "auto", f"phases.{index}.{name}", value, "auto with cosine, which sets the rate"
                )
        for name in _NOT_DEEPSPEEDS:
            value = getattr(self.optimizer, name)
            require(
                self.parallel != "deepspeed" or value == _STORAGE[name],
                f"optimizer.{name}",
                value,
                f"{_STORAGE[name]} with parallel: deepspeed, which stores and gathers by itself",
            )
        require(
            self.speed.precision == "bf16" or not self.optimizer.store_param_remainders,
            "optimizer.store_param_remainders",
            self.optimizer.store_param_remainders,
            f"0 with speed.precision: {self.speed.precision}, whose weights are no bf16 halves of masters",
        )
        require(
            self.parallel == "zero2" or self.optimizer.reduce_dtype is None,
            "optimizer.reduce_dtype",
            self.optimizer.reduce_dtype,
            f"null with parallel: {self.parallel}, where gradients are reduced outside of the optimizer",
        )

    def max_predictions(self, phase: PhaseConfig) -> int:
        """Upper bound of masked positions in one sequence of `phase`."""
        cap, masking = phase.max_predictions or self.masking.max_predictions, self.masking
        return cap or math.ceil(max(masking.probability, masking.last_probability) * phase.sequence_length)

    def max_micro_batch(self, phase: PhaseConfig) -> int:
        return phase.max_micro_batch or self.batch.max_micro_batch

    def plan_batches(self, phase: PhaseConfig, world_size: int) -> BatchPlan:
        """Raises: ValueError that lists the world sizes and batches that fit."""
        ramp = phase.ramp
        return BatchPlan(
            steps=phase.steps,
            global_batch=phase.global_batch,
            world_size=world_size,
            max_micro_batch=self.max_micro_batch(phase),
            ramp_start=ramp.start if ramp else phase.global_batch,
            ramp_steps=ramp.steps if ramp else 0,
            ramp_multiple=ramp.multiple_of if ramp else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def digest(self) -> str:
        """Hash of `trained_settings`: a resumed run must have the same one."""
        return digest_of(self.trained_settings())

    def trained_settings(self) -> dict[str, Any]:
        """The settings that determine the training's numbers."""
        kept = {
            k: v
            for k, v in self.to_dict().items()
            if k
            not in ("run_dir", "start_from", "checkpoint", "faults", "log", "parallel", "deepspeed", "speed")
        }
        kept["data"] = {k: v for k, v in kept["data"].items() if k not in ("prepared", "workers")}
        kept["optimizer"].pop("bucket_mb")
        # Runs before these settings have the same digest.
        for name in (*_NOT_DEEPSPEEDS, "reduce_dtype"):
            if kept["optimizer"][name] == _STORAGE[name]:
                kept["optimizer"].pop(name)
        if not kept["optimizer"]["ratio_blocks"]:
            kept["optimizer"].pop("ratio_blocks")
        for name in ("final_probability", "causal_fraction"):
            if kept["masking"][name] is None:
                kept["masking"].pop(name)
        if self.cosine is None:
            kept.pop("cosine")
        if self.optimizer.exclude_from_layer_adaptation == "variant":
            filled = VARIANTS[self.optimizer.variant]["exclude_from_layer_adaptation"]
            kept["optimizer"]["exclude_from_layer_adaptation"] = filled
        for phase in kept["phases"]:
            phase.pop("max_micro_batch")
            if phase["ramp"] is not None and phase["ramp"]["multiple_of"] is None:
                phase["ramp"].pop("multiple_of")
        kept.pop("batch")
        return kept


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> RunConfig:
    """As `training.config_io.build_config`."""
    return config_io.build_config(RunConfig, tree, overrides, origin)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `training.config_io.load_config`."""
    check_user(path, "bert")
    return config_io.load_config(RunConfig, path, overrides)
