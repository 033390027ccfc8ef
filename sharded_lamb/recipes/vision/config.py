"""The settings of a vision run, frozen and typed; `training.config_io` puts their descriptions into errors."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.recipes.training.settings import (
    STRICT,
    CheckpointConfig,
    FaultsConfig,
    Fraction,
    LocalPath,
    Positive,
    PositiveFloat,
    RatioBlocks,
    Seed,
    check_ratio_blocks,
    digest_of,
    plain,
    require,
)

DIGITS = "digits"
"""`data.source` for scikit-learn's digits."""

SMALL_VIT = "small-vit"
"""`model.name` for `small_vit.SmallViT`, which needs no timm."""

NotNegative = Annotated[float, Field(ge=0, description="0 or more")]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """`small-vit`, or a name of timm's. `options` are keywords of `SmallViT`, or of `timm.create_model`."""

    name: str = SMALL_VIT
    drop_path: Fraction = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_small = self.name == SMALL_VIT
        require(not is_small or not self.drop_path, "model.drop_path", self.drop_path, f"0 with {SMALL_VIT}")


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Images with labels. `source` is `digits`, or a folder as `datasets.load_dataset` or `load_from_disk` read it:
    a folder per class in a folder per split (ImageFolder), Parquet, WebDataset's tar files, or `save_to_disk`'s."""

    source: str = DIGITS
    train: str = "train"
    validation: str = "validation"
    test: str | None = None  # evaluated once, at the end
    image: str = "image"  # columns of the data set
    label: str = "label"
    on_bad: Literal["error", "skip"] = "error"  # reaction to wrong labels and broken images
    size: Positive = 224
    validation_size: Positive | None = None  # null: size
    crop: Annotated[float, Field(gt=0, le=1, description="a number in (0, 1]")] = 0.875  # of validation
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's; as many as channels, 3 or 1
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)
    cache: str | None = None  # folder of `datasets`; null: its default
    workers: Annotated[int, Field(ge=0, description="0 (none) or more")] = 0  # processes of a rank that read

    def __post_init__(self) -> None:
        channels = len(self.mean)
        require(channels in (1, 3), "data.mean", self.mean, "1 or 3 numbers, one a channel")
        require(len(self.std) == channels, "data.std", self.std, f"{channels} numbers, as in data.mean")


@dataclass(frozen=True, config=STRICT)
class AugmentConfig:
    """`transform`: keywords of `timm.data.create_transform` for training; null: as in validation. `mix`: keywords of
    `timm.data.Mixup`; null: off. `repeats`: copies of an image in one global batch (repeated augmentation)."""

    transform: dict[str, Any] | None = None
    mix: dict[str, Any] | None = None
    repeats: Positive = 1


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Cross-entropy, or the mean over classes of binary cross-entropies."""

    kind: Literal["ce", "bce"] = "ce"
    label_smoothing: Fraction = 0.0
    target_threshold: Fraction | None = None  # bce: targets above it are 1, others 0; null: soft targets

    def __post_init__(self) -> None:
        if self.target_threshold is not None:
            value = self.target_threshold
            require(self.kind == "bce", "loss.target_threshold", value, "null unless loss.kind is bce")
            require(
                not self.label_smoothing,
                "loss.target_threshold",
                value,
                f"null with loss.label_smoothing={self.label_smoothing}, which it would undo",
            )


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """ShardedLamb's keywords, and timm's layer decay. `variant` fills the rule's other options."""

    variant: str = "lamb"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-6
    weight_decay: NotNegative = 0.02
    max_grad_norm: PositiveFloat | None = 1.0  # null: no clipping
    exclude_from_weight_decay: tuple[str, ...] = ("ndim<=1",)  # and what the model's no_weight_decay() names
    layer_decay: Annotated[float, Field(gt=0, le=1, description="a number in (0, 1]")] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1, description="a number in (0, 1)")] | None = None
    ratio_blocks: RatioBlocks | None = None  # parameters with several ratios: {qkv: 3}

    def __post_init__(self) -> None:
        known = ", ".join(sorted(VARIANTS))
        require(self.variant in VARIANTS, "optimizer.variant", self.variant, f"one of {known}")
        check_ratio_blocks("optimizer.ratio_blocks", self.ratio_blocks)

    def keywords(self) -> dict[str, Any]:
        """Of ShardedLamb, for every parameter."""
        own = asdict(self)
        del own["layer_decay"], own["exclude_from_weight_decay"]
        return own


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """Epochs, batch, and timm's cosine of the epoch: warmup from `warmup_lr`, then from `lr` to `min_lr`."""

    epochs: Positive
    lr: PositiveFloat
    global_batch: Positive = 2048
    max_micro_batch: Positive = 256  # images in one forward of a rank, at most; accumulation follows
    warmup_epochs: Annotated[int, Field(ge=0, description="0 or more")] = 5
    warmup_lr: NotNegative = 1e-6
    min_lr: NotNegative = 1e-6


@dataclass(frozen=True, config=STRICT)
class SpeedConfig:
    """Switches that change rounding at most."""

    precision: Literal["auto", "fp32", "bf16_autocast"] = (
        "auto"  # bf16_autocast where the hardware has bf16, else fp32
    )
    channels_last: bool = False
    threads: Annotated[int, Field(ge=0, description="0 (cores / local ranks) or more")] = 0


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """Records beyond the row of every step in metrics.jsonl."""

    trust_ratio_steps: Positive = 50
    validation_epochs: Positive = 1  # epochs between evaluations of the validation split
    picture: bool = True  # curves.png, at the end


@dataclass(frozen=True, config=STRICT)
class VisionConfig:
    """The whole run."""

    schedule: ScheduleConfig
    run_dir: LocalPath = "runs/vision"
    seed: Seed = 1
    stage: Literal[1, 2] = 2
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        size, other = self.data.size, self.data.validation_size
        is_one = self.model.name != SMALL_VIT or other in (None, size)
        require(is_one, "data.validation_size", other, f"null or data.size={size} with {SMALL_VIT}")

    def digest(self) -> str:
        """Hash of `trained_settings`: a resumed run must have the same one."""
        return digest_of(self.trained_settings())

    def trained_settings(self) -> dict[str, Any]:
        """The settings that determine the training's numbers."""
        aside = ("run_dir", "stage", "speed", "checkpoint", "faults", "log")
        kept = {name: value for name, value in plain(self).items() if name not in aside}
        kept["data"] = {
            k: v for k, v in kept["data"].items() if k not in ("source", "test", "cache", "workers")
        }
        if not kept["optimizer"]["ratio_blocks"]:  # runs before this setting have the same digest
            kept["optimizer"].pop("ratio_blocks")
        return kept
