"""Schedule, order, transforms, loss and model against timm, torchvision, PIL or formulas written here."""

import importlib
import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.config_io import build_config
from sharded_lamb.recipes.vision.batches import TrainBatches
from sharded_lamb.recipes.vision.config import DataConfig, LossConfig, ScheduleConfig, VisionConfig
from sharded_lamb.recipes.vision.images import open_splits
from sharded_lamb.recipes.vision.model import Batch, Losses, build_model, build_optimizer, layer_of
from sharded_lamb.recipes.vision.schedule import Schedule
from sharded_lamb.recipes.vision.transforms import preprocess


def config_of(**sections: Any) -> VisionConfig:
    data = {"size": 8, "mean": [0.3], "std": [0.4], "crop": 1.0}
    return build_config(VisionConfig, {"data": data, "schedule": {"epochs": 2, "lr": 0.1}, **sections})


def order(repeats: int, batch: int, epoch: int) -> np.ndarray[Any, Any]:
    """The numbers of images of one epoch on the digits."""
    config = config_of(augment={"repeats": repeats})
    split = open_splits(config.data).splits["train"]
    in_epoch = len(split.labels) // batch
    batches = TrainBatches(split, config, BatchPlan(9 * in_epoch, batch, 1, batch, batch, 0), in_epoch)
    return batches.numbers(np.arange(epoch * in_epoch * batch, (epoch + 1) * in_epoch * batch))


def test_an_epoch_sees_an_image_at_most_once_in_an_order_of_its_own() -> None:
    first, second = order(1, 100, 0), order(1, 100, 1)
    assert len(first) == len(set(first.tolist())) == 1000
    assert set(first.tolist()) < set(range(1078))
    assert np.mean(first == second) < 0.01


def test_repeated_augmentation_puts_copies_into_one_batch_as_timm_s_sampler_does() -> None:
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    file = f"{spec.submodule_search_locations[0]}/data/distributed_sampler.py"
    found = importlib.util.spec_from_file_location("distributed_sampler", file)
    assert found
    assert found.loader
    timm = importlib.util.module_from_spec(found)
    found.loader.exec_module(timm)
    sampler = timm.RepeatAugSampler(range(1078), num_replicas=1, rank=0, num_repeats=3, selected_round=0)
    theirs, ours = list(sampler)[:999], order(3, 333, 0)
    for own in (theirs, ours.tolist()):
        assert len(set(own)) == 333
        assert [own[3 * n : 3 * n + 3] for n in range(333)] == [[own[3 * n]] * 3 for n in range(333)]


def test_the_schedule_is_timm_s() -> None:
    from tests.integrations.timm_cases import real_timm

    settings = ScheduleConfig(
        epochs=20, lr=3e-3, global_batch=8, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5
    )
    schedule = Schedule(settings, steps_per_epoch=4)
    with real_timm():
        group = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
        timm = importlib.import_module("timm.scheduler.cosine_lr").CosineLRScheduler(
            group, t_initial=20, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6
        )
        for epoch in range(20):
            timm.step(epoch)
            expected = group.param_groups[0]["lr"]
            ours = [schedule.lr(4 * epoch), schedule.lr(4 * epoch + 3)]
            assert ours == pytest.approx([expected, expected], rel=1e-12)
    assert schedule.lr(20) == pytest.approx(1e-5 + (3e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2)


def test_preprocessing_is_pil_s_and_torchvision_s() -> None:
    draw = np.random.default_rng(0)
    wide = Image.fromarray(draw.integers(0, 255, (20, 31, 3), np.uint8))
    ours = preprocess(DataConfig(crop=0.8), 16)(wide)
    resized = np.asarray(wide.resize((31, 20), Image.Resampling.BICUBIC))[2:18, 8:24]  # round(7.5) is 8
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = torch.from_numpy(((resized / 255 - mean) / std).transpose(2, 0, 1))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    small = preprocess(DataConfig(crop=1.0), 10)(wide)
    assert small.shape == (3, 10, 10)
    cut = np.asarray(wide.resize((15, 10), Image.Resampling.BICUBIC))[:, 2:12]
    torch.testing.assert_close(
        small[0].double(), torch.from_numpy((cut[..., 0] / 255 - 0.485) / 0.229), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "smoothing"),
    [
        (LossConfig(), 0.0),
        (LossConfig(kind="ce", label_smoothing=0.1), 0.1),
        (LossConfig(kind="bce"), 0.1),
        (LossConfig(kind="bce", target_threshold=0.2), 0.0),
    ],
)
def test_losses_are_their_formulas(settings: LossConfig, smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    share = torch.tensor([[0.7], [1.0], [0.15], [0.5]])
    targets = (share * torch.eye(3)[[0, 1, 2, 0]] + (1 - share) * torch.eye(3)[[1, 2, 0, 2]]) * (
        1 - smoothing
    ) + smoothing / 3
    loss, right = Losses(torch.nn.Identity(), settings, autocast=False)(Batch(logits, targets)).tolist()
    z, t = logits.double().numpy(), targets.double().numpy()
    if settings.kind == "ce":
        expected = -(t * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum()
    else:
        t = (t > settings.target_threshold).astype(float) if settings.target_threshold is not None else t
        p = 1 / (1 + np.exp(-z))
        expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum() / 3
    assert loss == pytest.approx(expected, rel=1e-6)
    assert right == (z.argmax(1) == targets.numpy().argmax(1)).sum()


def test_the_small_vit_s_options_and_layers() -> None:
    model = build_model(config_of(model={"options": {"width": 16, "depth": 2, "patch": 4}}), 10)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    layers = {layer_of(name) for name, _ in model.named_parameters()}
    assert layers == {"positions", "patches", "blocks.0", "blocks.1", "norm", "head"}
    again = build_model(config_of(model={"options": {"width": 16, "depth": 2, "patch": 4}}), 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_ratio_blocks_reach_the_optimizer() -> None:
    model_options = {"options": {"width": 16, "depth": 1, "patch": 4}}
    config = config_of(model=model_options, optimizer={"ratio_blocks": {"in_proj_weight": 3}})
    model = build_model(config, 10)
    optimizer = build_optimizer(config, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    fused = [name for name in optimizer.trust_ratios() if "in_proj_weight" in name]
    assert fused == [f"blocks.0.self_attn.in_proj_weight[{i}]" for i in range(3)]
    optimizer.close()
    plain = config_of(model=model_options)
    assert "ratio_blocks" not in plain.trained_settings()["optimizer"]
    assert config.digest() != plain.digest()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optimizer.ratio_blocks.qkv=0",
            "optimizer.ratio_blocks.qkv=0: expected a number of blocks >= 1, or dim0",
        ),
        ("optimizer.variant=lamp", "optimizer.variant='lamp': expected one of"),
        ("loss.target_threshold=0.2", "loss.target_threshold=0.2: expected null unless loss.kind is bce"),
        ("model.drop_path=0.1", "model.drop_path=0.1: expected 0 with small-vit"),
        ("data.mean=[0.1,0.2]", r"data.mean=\(0.1, 0.2\): expected 1 or 3 numbers"),
        ("schedule.epoch=3", "unknown key 'schedule.epoch': did you mean 'epochs'"),
        ("data.crop=0", r"data.crop=0: expected a number in \(0, 1\]"),
        ("data.validation_size=16", "data.validation_size=16: expected null or data.size=8 with small-vit"),
    ],
)
def test_bad_settings_are_named(override: str, said: str) -> None:
    tree = {"data": {"size": 8}, "schedule": {"epochs": 1, "lr": 0.1}}
    with pytest.raises(ValueError, match=said):
        build_config(VisionConfig, tree, [override])
