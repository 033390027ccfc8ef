"""Folders of small images, and the settings of a model that trains in a second."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")
if importlib.util.find_spec("sklearn") is None:  # its import takes 1.6 s, and few tests need it
    pytest.skip("sklearn is not installed", allow_module_level=True)

CLASSES = ("ant", "bee", "cat")
SPLITS = {"train": 8, "validation": 3, "test": 3}


def write_images(folder: Path) -> Path:
    """PNGs in a folder a class in a folder a split: a class has its own gray, and noise."""
    draw = np.random.default_rng(5)
    for split, count in SPLITS.items():
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 60, (10, 12, 3), np.uint8) + np.uint8(80 * number)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_images` writes them; not to be changed."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for `datasets`."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tree(images: Path, cache: str) -> dict[str, Any]:
    """A configuration as plain data, of a model of 2,667 parameters; `run_dir` is to be set by the test."""
    return {
        "seed": 3,
        "model": {
            "name": "small-vit",
            "options": {"patch": 4, "width": 16, "depth": 1, "heads": 2, "dropout": 0.1},
        },
        "data": {"source": str(images), "cache": cache, "size": 8, "crop": 1.0},
        "schedule": {
            "epochs": 3,
            "lr": 0.02,
            "global_batch": 12,
            "max_micro_batch": 4,
            "warmup_epochs": 1,
        },
        "checkpoint": {"every_steps": 2, "keep": 0},
        "speed": {"precision": "fp32", "threads": 1},  # two threads beside other tests spin
    }
