"""open_clip's own trainer on a rank of the harness: real open_clip and timm, with a stand-in for torchvision.

The stand-in resizes where torchvision would crop at random, so that a resumed run sees the images of a whole one.
"""

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.recipes.vision.timm_cases import timm_with_names

IMAGES, SIDE = 16, 16
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 1},
}
OPTIONS = {
    **{"model": "tiny", "dataset-type": "csv", "batch-size": 4, "workers": 0, "save-frequency": 1},
    **{"lr": 1e-2, "eps": 1e-6, "wd": 0.01, "warmup": 1},
    **{"device": "cpu", "dist-backend": "gloo", "precision": "fp32"},
}
ARGUMENTS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def write_data(folder: Path) -> None:
    from PIL import Image

    noise, rows = np.random.default_rng(0), ["filepath\ttitle"]
    for number in range(IMAGES):
        pixels = noise.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{folder / f'{number}.png'}\tnumber {number} is {number * 7}")
    (folder / "data.csv").write_text("\n".join(rows) + "\n")
    (folder / "tiny.json").write_text(json.dumps(MODEL))


class _Resize:
    def __init__(self, size: Any, **options: Any) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def __call__(self, image: Any) -> Any:
        return image.resize(self.size)


class _Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


def _to_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class _Normalize:
    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


@contextmanager
def real_open_clip() -> Iterator[Any]:
    """Our integration with open_clip; the modules are forgotten at the end, and handlers of its logging."""
    ours = (
        "open_clip",
        "open_clip_train",
        "sharded_lamb.integrations.timm",
        "sharded_lamb.integrations.open_clip",
    )
    handlers, level = [*logging.root.handlers], logging.root.level
    try:
        with timm_with_names():
            transforms = sys.modules["torchvision.transforms"]
            for name in ("RandomResizedCrop", "Resize", "CenterCrop"):
                setattr(transforms, name, _Resize)
            transforms.Compose, transforms.Normalize = _Compose, _Normalize  # type: ignore[attr-defined]
            transforms.functional.to_tensor = _to_tensor  # type: ignore[attr-defined]
            yield importlib.import_module("sharded_lamb.integrations.open_clip")
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level
        for name in list(sys.modules):
            if name.startswith(ours):
                del sys.modules[name]


def _on_cpu(model: torch.nn.Module, device_ids: object, **options: Any) -> DistributedDataParallel:
    """open_clip passes ``device_ids`` on the CPU too, where DDP refuses them."""
    return DistributedDataParallel(model, **options)


def trained(rank: int, folder: Path, runs: list[list[str]]) -> list[str]:
    """The runs of open_clip's trainer, in turn. The optimizers' classes."""
    made = []
    with (
        real_open_clip() as ours,
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(torch.nn.parallel, "DistributedDataParallel", _on_cpu),
    ):
        import open_clip
        from timm.optim._optim_factory import OptimInfo, default_registry

        from sharded_lamb import Lamb

        default_registry.register(OptimInfo(name="wholelamb", opt_class=Lamb))
        open_clip.add_model_config(folder / "tiny.json")
        inner = ours.program.train_one_epoch

        def noted(*arguments: Any, **options: Any) -> None:
            made.append(type(arguments[4]).__name__)
            inner(*arguments, **options)

        data = ["--train-data", str(folder / "data.csv"), "--logs", str(folder / "logs")]
        with mock.patch.object(ours.program, "train_one_epoch", noted):
            for run in runs:
                ours.main([*ARGUMENTS, *data, *run])
    return made
