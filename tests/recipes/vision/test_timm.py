"""timm's models, mixing, layer decay and transforms in the recipe; what becomes of a configuration without timm."""

import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sharded_lamb.recipes.training.config_io import build_config, load_config
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.training.sharded_backend import set_lr
from sharded_lamb.recipes.vision import train as module
from sharded_lamb.recipes.vision.batches import Read, mixed
from sharded_lamb.recipes.vision.config import VisionConfig
from sharded_lamb.recipes.vision.images import open_splits
from sharded_lamb.recipes.vision.model import Batch, build_model, build_optimizer
from sharded_lamb.recipes.vision.transforms import mixing, training_transform
from tests.harness import run_ranks
from tests.recipes.vision.timm_cases import timm_with_names

CONFIGS = Path(__file__).parents[3] / "configs"
TIMM = [
    "model={name: test_vit, drop_path: 0.1, options: {img_size: 16}}",
    "data.size=16",
    "augment.mix={mixup_alpha: 0.8, cutmix_alpha: 1.0}",
    "loss={kind: bce, target_threshold: 0.0}",
    "optimizer.layer_decay=0.5",
    "schedule.epochs=1",
]


UNUSABLE_MIX = {
    "{mixup: 0.8}": "TypeError: ",
    "{mixup_alpha: abc}": "TypeError: ",
    "{mixup_alpha: -1, cutmix_alpha: 0}": "AssertionError: ",
    "{mixup_alpha: 1, mode: foo}": "ValueError: expected one of batch, pair, elem as mode",
}
UNUSABLE_MODELS = {
    "model={name: test_vit, options: {img_size: 16}}": "data.size=24: AssertionError: ",
    "model={name: test_resnet, options: {features_only: true}}": "data.size=24: TypeError: the model returns a list",
    "model={name: test_resnet, options: {global_pool: ''}}": "data.size=24: RuntimeError: ",
}


def vision(tree: dict[str, Any], *overrides: str) -> VisionConfig:
    return build_config(VisionConfig, tree, overrides)


def groups_of(config: VisionConfig) -> dict[str, tuple[float, float]]:
    """{parameter: (its decay, its rate where the schedule's is 1)}"""
    model = build_model(config, 3)
    optimizer = build_optimizer(config, model)
    set_lr(optimizer, 1.0)
    names = {p: name for name, p in model.named_parameters()}
    rates = {
        names[p]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    optimizer.close()
    return rates


def mixed_twice(config: VisionConfig) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for key in (5, 5, 6):
        images, targets = torch.arange(4.0).expand(16, 3, 4).transpose(0, 2)[..., None], torch.eye(4)
        batch = mixed(Batch(images.clone(), targets), mixing(config, 4), key)
        batches.append((batch.images, batch.targets))
    return batches


def drawn(config: VisionConfig) -> tuple[dict[str, Any], list[Tensor]]:
    """(keywords of `create_transform`, what places 0, 1 and 0 of one image become), by a transform that draws."""
    split = open_splits(config.data).splits["train"]
    with mock.patch("timm.data.create_transform") as create:
        create.return_value = lambda image: torch.rand(3, 8, 8)
        read = Read(split, config, is_training=True)
        return {**create.call_args.kwargs, "size": create.call_args.args}, [
            read[(n, 7)][0] for n in (0, 1, 0)
        ]


def refusals(tree: dict[str, Any]) -> list[str]:
    found = []
    for override in ("model.name=resnet51", "model={name: test_vit, options: {depht: 3}}"):
        with pytest.raises(ValueError, match="model") as caught:
            build_model(vision(tree, override), 3)
        found.append(str(caught.value))
    for keywords in UNUSABLE_MIX:
        with pytest.raises(ValueError, match="mix") as caught:
            mixing(vision(tree, f"augment.mix={keywords}"), 3)
        found.append(str(caught.value))
    for override in UNUSABLE_MODELS:
        with pytest.raises(ValueError, match="model") as caught:
            build_model(vision(tree, override, "data.size=24"), 3)
        found.append(str(caught.value))
    odd = vision(tree, *TIMM, "schedule.max_micro_batch=3", "run_dir=unused")
    with pytest.raises(ValueError, match="augment") as caught:
        module.run(odd, None, Ranks.start())
    return [*found, str(caught.value)]


def with_timm(rank: int, tree: dict[str, Any], run_dir: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    with timm_with_names():
        config = vision(tree, *TIMM, f"run_dir={run_dir}", "log.picture=false")
        transformed = vision(tree, "augment.transform={auto_augment: 3a, hflip: 0.5}")
        return {
            "metrics": module.run(config, None, Ranks.start()).metrics,
            "groups": groups_of(config),
            "mixed": mixed_twice(config),
            "drawn": drawn(transformed),
            "refusals": refusals(tree),
        }


@pytest.fixture(scope="module")
def results(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One import of timm for all."""
    found: dict[str, Any] = run_ranks(1, with_timm, tree, str(tmp_path_factory.mktemp("timm")), timeout=240)[
        0
    ]
    return found


def test_a_timm_model_trains(results: dict[str, Any]) -> None:
    assert results["metrics"]["heldout_images"] == 9
    assert 0 < results["metrics"]["heldout_loss"] < 2


def test_layer_decay_scales_rates_and_spares_what_the_model_names(results: dict[str, Any]) -> None:
    groups = results["groups"]
    assert groups["head.weight"] == (0.02, 1.0)
    assert groups["head.bias"] == (0.0, 1.0)
    assert groups["pos_embed"][0] == 0.0
    depth = 1 + max(int(name.split(".")[1]) for name in groups if name.startswith("blocks."))
    for block in range(depth):
        assert groups[f"blocks.{block}.mlp.fc1.weight"] == (0.02, 0.5 ** (depth - block))


def test_mixing_is_a_function_of_the_key(results: dict[str, Any]) -> None:
    (images, targets), (again, _), (other, _) = results["mixed"]
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert torch.equal(targets.sum(1), torch.ones(4))
    share = targets.diagonal()[:, None]  # images are constant, so their means are mixed as targets are
    expected = share[:, 0] * torch.arange(4.0) + (1 - share[:, 0]) * torch.arange(4.0).flip(0)
    torch.testing.assert_close(images.mean((1, 2, 3)), expected)


def test_random_transforms_are_a_function_of_the_place(results: dict[str, Any]) -> None:
    keywords, (first, second, again) = results["drawn"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert keywords["size"] == (8,)
    assert keywords["is_training"] is True
    assert (keywords["auto_augment"], keywords["hflip"], keywords["mean"][0]) == ("3a", 0.5, 0.485)


def test_what_timm_does_not_know_or_cannot_use_is_named(results: dict[str, Any]) -> None:
    unknown, option, *unusable, odd = results["refusals"]
    assert unknown.startswith("model.name='resnet51': expected 'small-vit' or one of timm.list_models()")
    assert "depht" in option
    for said, expected in zip(unusable, [*UNUSABLE_MIX.values(), *UNUSABLE_MODELS.values()], strict=True):
        assert re.match(r"(augment.mix=\{.*\}: |model.name='\w+', model.options=.*, )", said)
        assert expected in said
    assert odd.startswith(
        "augment.mix mixes pairs: expected micro-batches of even sizes, got [3]; change schedule.max"
    )


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (
            lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8),
            "TypeError: it makes torch.uint8 of an image",
        ),
        ((lambda image: image,) * 3, "TypeError: 'tuple' object is not callable"),  # separate=True
    ],
)
def test_transforms_that_make_no_images_are_refused(
    tree: dict[str, Any], images: Path, made: Any, says: str
) -> None:
    data = mock.Mock(create_transform=mock.Mock(return_value=made))
    config = vision(tree, f"data.source={images}", "augment.transform={hflip: 0.5}")
    with (
        mock.patch("sharded_lamb.recipes.vision.transforms.timm_for", return_value=data),
        pytest.raises(ValueError, match=rf"augment.transform=\{{'hflip': 0.5\}}: {re.escape(says)}"),
    ):
        training_transform(config)


def test_without_timm_one_line_says_what_to_install(tree: dict[str, Any]) -> None:
    with mock.patch.dict(sys.modules, {"timm": None}):
        for config, refused in (
            (vision(tree, "model.name=resnet50"), lambda config: build_model(config, 3)),
            (vision(tree, "augment.transform={hflip: 0.5}"), training_transform),
            (vision(tree, "augment.mix={mixup_alpha: 0.8}"), lambda config: mixing(config, 3)),
        ):
            with pytest.raises(
                ValueError, match=r"needs timm and a torchvision .* 'sharded-lamb\[vision\]'$"
            ) as caught:
                refused(config)
            assert "\n" not in str(caught.value)


def test_digits_take_no_transform(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected null for the digits"):
        training_transform(vision(tree, "data.source=digits", "augment.transform={hflip: 0.5}"))


PUBLISHED: dict[str, dict[str, Any]] = {
    "deit3-base": {"lr": 3e-3, "weight_decay": 0.05, "epochs": 800, "drop_path": 0.2, "size": 192},
    "deit3-small": {"lr": 4e-3, "weight_decay": 0.05, "epochs": 800, "drop_path": 0.05, "size": 224},
    "rsb-a1": {"lr": 5e-3, "weight_decay": 0.01, "epochs": 600, "drop_path": 0.05, "size": 224},
    "rsb-a2": {"lr": 5e-3, "weight_decay": 0.02, "epochs": 300, "drop_path": 0.05, "size": 224},
    "rsb-a3": {"lr": 8e-3, "weight_decay": 0.02, "epochs": 100, "drop_path": 0.0, "size": 160},
}
MIXING = {"deit3-base": 0.8, "deit3-small": 0.8, "rsb-a1": 0.2, "rsb-a2": 0.1, "rsb-a3": 0.1}
AUGMENT = {
    "rsb-a1": "rand-m7-mstd0.5-inc1",
    "rsb-a2": "rand-m7-mstd0.5-inc1",
    "rsb-a3": "rand-m6-mstd0.5-inc1",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configurations_are_as_published(name: str) -> None:
    config = load_config(VisionConfig, f"vision-{name}")
    flat = {"lr": config.schedule.lr, "weight_decay": config.optimizer.weight_decay}
    flat |= {"epochs": config.schedule.epochs, "drop_path": config.model.drop_path, "size": config.data.size}
    assert flat == PUBLISHED[name]
    assert config.schedule.global_batch == 2048
    assert config.schedule.warmup_epochs == 5
    assert config.augment.repeats == (1 if name == "rsb-a3" else 3)
    assert config.loss.kind == "bce"
    assert config.loss.label_smoothing == (0.1 if name == "rsb-a1" else 0.0)
    assert config.optimizer.ema_decay is None
    mix, transform = config.augment.mix, config.augment.transform
    assert mix is not None
    assert (mix["mixup_alpha"], mix["cutmix_alpha"]) == (MIXING[name], 1.0)
    assert transform is not None
    assert transform["auto_augment"] == AUGMENT.get(name, "3a")
    assert {path.stem for path in CONFIGS.glob("vision-*.yaml")} == {f"vision-{known}" for known in PUBLISHED}
