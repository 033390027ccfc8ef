"""What a pretraining run is: frozen, typed settings.

pydantic checks types and keys when `config_io` reads them; `__post_init__` checks values, wherever they come from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from sharded_lamb.core.hyperparams import VARIANTS

_STRICT = ConfigDict(extra="forbid")

Auto = Literal["auto"]
Parallel = Literal["zero2", "ddp+zero1", "fsdp2", "deepspeed"]
Precision = Literal["auto", "fp32", "bf16_autocast", "bf16"]


def require(holds: bool, name: str, value: object, expectation: str, remedy: str = "") -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expectation}" + (f"; {remedy}" if remedy else ""))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of BERT. `pretrained` starts from the weights of a Hugging Face folder instead."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    pretrained: str | None = None
    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    unigram_bias: bool = False  # start the prediction bias at the corpus' log frequencies
    pad_vocab_to: int = 8  # tensor cores want dimensions that are multiples of 8

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "intermediate_size", "max_positions", "pad_vocab_to"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a positive number")
        require(
            self.hidden_size % self.heads == 0,
            "model.hidden_size",
            self.hidden_size,
            f"a multiple of model.heads={self.heads}",
        )
        for name in ("dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "a number in [0, 1)")


@dataclass(frozen=True)
class TokenizerConfig:
    """A Hugging Face tokenizer folder (`path`), or the WordPiece vocabulary to train on the corpus."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    path: str | None = None
    vocab_size: int = 30522
    lowercase: bool = True
    sample_documents: int | None = 200_000  # train on about so many, drawn evenly; null: on all (in memory)
    min_frequency: int = 2

    def __post_init__(self) -> None:
        require(self.vocab_size >= 16, "tokenizer.vocab_size", self.vocab_size, "at least 16 pieces")


@dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it is packed. `source` takes paths, globs, fsspec URLs, or `builtin`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    source: tuple[str, ...] = ("builtin",)
    format: Literal["auto", "text", "jsonl", "parquet", "arrow"] = "auto"
    text_field: str = "text"
    prepared: str = "runs/data"  # folder that holds prepared shards, one subfolder for each setting
    on_bad: Literal["error", "skip"] = "error"  # what a broken or empty file does
    heldout_fraction: float = 0.01
    nsp: bool = False
    pack: bool = True  # several documents in one sequence; attention stays inside each
    workers: int = 0  # processes that tokenize; 0 is one for each core
    unit_documents: int = 20_000  # documents in one restartable unit of work

    def __post_init__(self) -> None:
        require(len(self.source) > 0, "data.source", self.source, "at least one path, glob or 'builtin'")
        require(
            0 <= self.heldout_fraction < 1,
            "data.heldout_fraction",
            self.heldout_fraction,
            "a number in [0, 1)",
        )
        require(self.workers >= 0, "data.workers", self.workers, "0 (one for each core) or more")
        require(self.unit_documents > 0, "data.unit_documents", self.unit_documents, "a positive number")


@dataclass(frozen=True)
class MaskingConfig:
    """Dynamic masking: of `probability` of the tokens, 80 % become [MASK], 10 % a random piece, 10 % stay."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    probability: float = 0.15
    whole_word: bool = False
    max_predictions: int | None = None  # cap for one sequence; null: probability x length, rounded up

    def __post_init__(self) -> None:
        require(0 < self.probability < 1, "masking.probability", self.probability, "a number in (0, 1)")
        require(
            self.max_predictions is None or self.max_predictions > 0,
            "masking.max_predictions",
            self.max_predictions,
            "null or a positive number",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """ShardedLamb's keywords. `variant: adamw` is the twin that leaves the trust ratio out.

    Five defaults are BERT's own and hold for every variant: betas and weight_decay (arXiv 1810.04805, appendix A.2);
    eps, max_grad_norm and exclude_from_weight_decay (optimization.py of google-research/bert). The variant fills the
    other rule options unless they are set.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    variant: str = "lamb"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    exclude_from_weight_decay: tuple[str, ...] = (r"bias$", r"LayerNorm")
    # variant: as the variant has it; null: the same patterns as for decay
    exclude_from_layer_adaptation: tuple[str, ...] | Literal["variant"] | None = "variant"
    adapt_without_decay: bool | None = None  # null: as the variant has it
    bias_correction: bool | None = None  # null: as the variant has it
    bucket_mb: float = 32

    def __post_init__(self) -> None:
        require(
            self.variant in VARIANTS,
            "optimizer.variant",
            self.variant,
            f"one of {', '.join(sorted(VARIANTS))}",
        )
        require(self.eps > 0, "optimizer.eps", self.eps, "a positive number")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "optimizer.max_grad_norm",
            self.max_grad_norm,
            "null or a positive number",
            "null switches clipping off",
        )
        for beta in self.betas:
            require(0 <= beta < 1, "optimizer.betas", self.betas, "two numbers in [0, 1)")

    def keywords(self) -> dict[str, Any]:
        """The options of the LAMB rule that are set here, for every way of sharding; the variant fills the others."""
        options = dataclasses.asdict(self)
        del options["bucket_mb"]
        for name, left_out in _LEFT_TO_VARIANT.items():
            if options[name] == left_out:
                del options[name]
        return options


_LEFT_TO_VARIANT = {
    "exclude_from_layer_adaptation": "variant",
    "adapt_without_decay": None,
    "bias_correction": None,
}
"""Settings of `OptimizerConfig` → the value by which they leave theirs to the variant."""


@dataclass(frozen=True)
class RampConfig:
    """Grow the global batch linearly from `start` to the phase's batch over the first `steps` steps."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    start: int
    steps: int

    def __post_init__(self) -> None:
        require(
            self.start > 0 and self.steps > 0, "ramp", self, "a positive start and a positive number of steps"
        )


@dataclass(frozen=True)
class PhaseConfig:
    """One stretch of training: BERT has two, at sequence length 128 and then 512."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    steps: int
    global_batch: int
    sequence_length: int = 128
    name: str = "phase"
    lr: float | Auto = "auto"
    warmup_fraction: float | Auto = "auto"
    decay_power: float = 1.0
    ramp: RampConfig | None = None
    max_predictions: int | None = None  # overrides masking.max_predictions
    max_micro_batch: int | None = None  # overrides batch.max_micro_batch

    def __post_init__(self) -> None:
        require(self.steps > 0, "phases.steps", self.steps, "a positive number")
        require(self.global_batch > 0, "phases.global_batch", self.global_batch, "a positive number")
        require(self.sequence_length >= 8, "phases.sequence_length", self.sequence_length, "at least 8")
        require(self.lr == "auto" or float(self.lr) > 0, "phases.lr", self.lr, "'auto' or a positive number")
        require(
            self.warmup_fraction == "auto" or 0 <= float(self.warmup_fraction) < 1,
            "phases.warmup_fraction",
            self.warmup_fraction,
            "'auto' or a number in [0, 1)",
        )
        if self.ramp is not None:
            require(
                self.ramp.start <= self.global_batch and self.ramp.steps <= self.steps,
                "phases.ramp",
                self.ramp,
                f"a start up to global_batch={self.global_batch} and steps up to {self.steps}",
            )


@dataclass(frozen=True)
class BatchConfig:
    """How many sequences go through the model at once on one rank; accumulation follows."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    max_micro_batch: int = 32

    def __post_init__(self) -> None:
        require(self.max_micro_batch > 0, "batch.max_micro_batch", self.max_micro_batch, "a positive number")


@dataclass(frozen=True)
class SpeedConfig:
    """Precision and memory switches of the model."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    precision: Precision = "fp32"  # auto: bf16_autocast where the hardware multiplies bf16, else fp32
    compile: bool = False
    activation_checkpointing: bool = False
    threads: int = 0  # CPU threads of a rank; 0 is cores / local ranks
    peak_tflops: float | None = None  # for MFU; null: known for the GPU, else measured with a matmul

    def __post_init__(self) -> None:
        require(self.threads >= 0, "speed.threads", self.threads, "0 (cores / local ranks) or more")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """For `parallel: deepspeed`. `config` is a ds_config JSON whose sections are taken over (offload, say), but for
    those that other settings of this file decide, which are refused."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    zero_stage: Literal[1, 2, 3] = 2
    config: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and how many saves are kept (0 keeps all)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    every_steps: int = 1000
    every_minutes: float | None = None
    keep: int = 2
    requeue_exit_code: int = 75  # EX_TEMPFAIL: saved on SIGTERM or SIGUSR1, start me again

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "checkpoint.every_steps", self.every_steps, "a positive number")
        require(self.keep >= 0, "checkpoint.keep", self.keep, "0 (all) or more")
        require(
            0 < self.requeue_exit_code < 256,
            "checkpoint.requeue_exit_code",
            self.requeue_exit_code,
            "1 to 255",
        )


@dataclass(frozen=True)
class FaultsConfig:
    """When a rank hangs, each says which one it is, and ends; torchrun starts them again. null: they wait for it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    hang_timeout_s: float | None = (
        600.0  # that no rank comes further by a micro-batch, save or held-out batch
    )

    def __post_init__(self) -> None:
        require(
            self.hang_timeout_s is None or self.hang_timeout_s > 0,
            "faults.hang_timeout_s",
            self.hang_timeout_s,
            "null or a positive number of seconds",
        )


@dataclass(frozen=True)
class LogConfig:
    """What is recorded; every step always has its row in metrics.jsonl."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    trust_ratio_steps: int = 10
    heldout_batches: int | None = None  # null: the whole held-out split
    fill_mask: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.trust_ratio_steps > 0, "log.trust_ratio_steps", self.trust_ratio_steps, "a positive number"
        )


@dataclass(frozen=True)
class RunConfig:
    """The whole run."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    phases: tuple[PhaseConfig, ...]
    run_dir: str = "runs/bert"
    start_from: str | None = None  # a checkpoint whose weights and moments this run starts with
    seed: int = 1
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
        require(0 <= self.seed < 2**63, "seed", self.seed, "a number in [0, 2^63)")
        for index, phase in enumerate(self.phases):
            require(
                phase.sequence_length <= self.model.max_positions,
                f"phases.{index}.sequence_length",
                phase.sequence_length,
                f"at most model.max_positions={self.model.max_positions}",
            )

    def max_predictions(self, phase: PhaseConfig) -> int:
        """Room for masked positions in one sequence of `phase`."""
        cap = phase.max_predictions or self.masking.max_predictions
        return cap or math.ceil(self.masking.probability * phase.sequence_length)

    def max_micro_batch(self, phase: PhaseConfig) -> int:
        return phase.max_micro_batch or self.batch.max_micro_batch

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def digest(self) -> str:
        """Hash of what decides the training's numbers: a resumed run must have the same one."""
        kept = {
            k: v
            for k, v in self.to_dict().items()
            if k
            not in ("run_dir", "start_from", "checkpoint", "faults", "log", "parallel", "deepspeed", "speed")
        }
        kept["data"] = {k: v for k, v in kept["data"].items() if k not in ("prepared", "workers")}
        kept["optimizer"].pop("bucket_mb")
        if self.optimizer.exclude_from_layer_adaptation == "variant":
            filled = VARIANTS[self.optimizer.variant]["exclude_from_layer_adaptation"]
            kept["optimizer"]["exclude_from_layer_adaptation"] = filled
        for phase in kept["phases"]:
            phase.pop("max_micro_batch")
        kept.pop("batch")
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
