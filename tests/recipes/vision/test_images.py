"""Folders: what is wrong with them is named and counted, and refused or left out as configured."""

import errno
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
from PIL import Image

from sharded_lamb.recipes.training.config_io import build_config
from sharded_lamb.recipes.vision.batches import Read
from sharded_lamb.recipes.vision.config import DataConfig, VisionConfig
from sharded_lamb.recipes.vision.images import open_splits
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.recipes.vision.conftest import CLASSES, SPLITS
from tests.recipes.vision.test_train import train


def settings(tree: dict[str, Any], *overrides: str) -> DataConfig:
    return build_config(VisionConfig, tree, overrides).data


@pytest.fixture
def copy(images: Path, tmp_path: Path) -> Path:
    """The images, to be damaged."""
    return shutil.copytree(images, tmp_path / "images")


def test_a_folder_is_its_files(tree: dict[str, Any], images: Path) -> None:
    opened = open_splits(settings(tree, "data.test=test"))
    assert opened.classes == CLASSES
    for split, count in SPLITS.items():
        read = opened.splits[split]
        assert read.labels.tolist() == [number for number in range(3) for _ in range(count)]
        for number in (0, len(read.labels) - 1):
            path = images / split / CLASSES[read.labels[number]] / Path(read.name(number)).name
            assert np.array_equal(np.asarray(read.image(number)), np.asarray(Image.open(path)))
    assert opened.left_out == {}


def test_gray_folders_and_saved_data_sets(tree: dict[str, Any], images: Path, tmp_path: Path) -> None:
    import datasets

    saved = datasets.load_dataset(str(images), cache_dir=tree["data"]["cache"])
    saved.save_to_disk(str(tmp_path / "saved"))
    gray = ["data.mean=[0.5]", "data.std=[0.5]"]
    one, two = (
        open_splits(settings(tree, *gray, f"data.source={source}")) for source in (images, tmp_path / "saved")
    )
    assert one.digest() == two.digest()
    assert one.classes == two.classes
    pixels = [np.asarray(opened.splits["train"].image(3)) for opened in (one, two)]
    assert np.array_equal(*pixels)
    assert pixels[0].shape == (10, 12)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.validation=dev",
            r"data.validation='dev': .* has no such split; it has test, train, validation",
        ),
        ("data.label=class", r"data.label='class': no such column in train; there are: image, label"),
        ("data.source=nowhere", r"data.source='nowhere': expected 'digits' or a folder"),
    ],
)
def test_splits_and_columns_that_are_not_there(tree: dict[str, Any], override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_splits(settings(tree, override))


def test_a_split_that_the_digits_do_not_have() -> None:
    with pytest.raises(
        ValueError, match=r"data.validation='dev': digits has no such split; it has test, train, vali"
    ):
        open_splits(DataConfig(size=8, validation="dev"))


def test_the_digits_are_in_three_splits_without_an_image_in_two(tree: dict[str, Any]) -> None:
    opened = open_splits(DataConfig(size=8, test="test"))
    numbers = [[split.name(n) for n in range(len(split.labels))] for split in opened.splits.values()]
    assert [len(own) for own in numbers] == [1078, 360, 359]
    assert len({name for own in numbers for name in own}) == 1797
    assert np.bincount(opened.splits["test"].labels).min() > 20
    assert opened.splits["train"].image(0).size == (8, 8)


def test_wrong_labels_are_named_counted_and_refused_or_left_out(tree: dict[str, Any], copy: Path) -> None:
    (copy / "validation" / "dog").mkdir()
    for name in ("0", "1"):
        shutil.copy(copy / "train" / "ant" / "0.png", copy / "validation" / "dog" / f"{name}.png")
    source = f"data.source={copy}"
    said = r"data.validation: 2 of 11 labels are no class of the training split: 'dog' \(2, the first: .*/dog/0.png\)"
    with pytest.raises(ValueError, match=said):
        open_splits(settings(tree, source))
    opened = open_splits(settings(tree, source, "data.on_bad=skip"))
    assert opened.classes == CLASSES
    assert opened.left_out == {"validation": 2}
    assert len(opened.splits["validation"].labels) == 9


def test_rows_without_a_label_are_wrong_too(tree: dict[str, Any], images: Path, tmp_path: Path) -> None:
    import datasets

    files = [str(images / "train" / "ant" / f"{number}.png") for number in range(4)]
    rows = {"image": files, "label": [7, -1, 9, None]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=table, validation=table).save_to_disk(str(tmp_path / "saved"))
    source = f"data.source={tmp_path / 'saved'}"
    with pytest.raises(
        ValueError, match=r"data.train: 2 of 4 labels .*: none \(1, the first: .*1.png\), none \(1"
    ):
        open_splits(settings(tree, source))
    opened = open_splits(settings(tree, source, "data.on_bad=skip"))
    assert opened.classes == ("7", "9")
    assert opened.splits["train"].labels.tolist() == [0, 1]
    assert Path(opened.splits["train"].name(1)).name == "2.png"


def test_broken_images_raise_on_every_rank_or_are_replaced_and_counted(
    tree: dict[str, Any], copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One is no image at all, and one is cut short."""
    (copy / "train" / "bee" / "2.png").write_bytes(b"not an image")
    cut = copy / "validation" / "cat" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    overrides = [f"data.source={copy}", "schedule.epochs=1"]
    errors = run_ranks_expecting_errors(2, train, tree, str(tmp_path / "error"), overrides)
    for _, message in errors.values():
        assert "1 broken image in " in message
        assert message.endswith("bee/2.png; set data.on_bad=skip to read the next image instead")
    metrics = run_ranks(2, train, tree, str(tmp_path / "skip"), [*overrides, "data.on_bad=skip"])
    assert [own["heldout_images"] for own in metrics] == [8, 8]
    assert metrics[0]["heldout_broken_images"] == 1
    rows = (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()
    assert sum('"broken_images": 1' in row for row in rows) == 1


def test_a_broken_image_is_replaced_by_the_next_that_is_not(tree: dict[str, Any], copy: Path) -> None:
    for name in ("bee/2", "bee/3"):
        (copy / "train" / f"{name}.png").write_bytes(b"not an image")
    size = struct.pack(
        ">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0
    )  # PIL refuses it by an error that is no OSError
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", size), (b"IDAT", b""))
    ]
    (copy / "train" / "bee" / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    config = build_config(VisionConfig, tree, [f"data.source={copy}"])
    read = Read(open_splits(config.data).splits["train"], config, is_training=True)
    image, label, broken = read[(0, 10)]  # bee/2
    following, _, whole = read[(0, 13)]
    assert (image == following).all()
    assert (label, Path(broken).name, whole) == (1, "2.png", "")


def test_an_image_is_not_broken_when_the_machine_is(tree: dict[str, Any], images: Path) -> None:
    config = build_config(VisionConfig, tree, [f"data.source={images}", "data.on_bad=skip"])
    read = Read(open_splits(config.data).splits["train"], config, is_training=True)
    many = OSError(errno.EMFILE, "Too many open files")
    with (
        mock.patch("PIL.Image.open", side_effect=many),
        pytest.raises(OSError, match=r"files, as .*\.png was read"),
    ):
        read[(0, 3)]
    with mock.patch("PIL.Image.open", side_effect=MemoryError), pytest.raises(MemoryError):
        read[(0, 3)]


def test_splits_are_folders_whatever_their_classes_are_called(tree: dict[str, Any], tmp_path: Path) -> None:
    """Left to itself `datasets` takes every folder with "train" in its name for the training split."""
    for split, count in (("train", 3), ("val", 2)):
        for label in ("bullet_train", "latest", "train"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / f"{number}.png")
    source = f"data.source={tmp_path / 'images'}"
    config = build_config(VisionConfig, tree, [source])
    opened = open_splits(config.data)
    assert opened.classes == ("bullet_train", "latest", "train")
    for field, folder, count in (("train", "train", 3), ("validation", "val", 2)):
        split = opened.splits[field]
        names = [split.name(number) for number in range(len(split.labels))]
        assert len({*names}) == len(names) == 3 * count
        assert {Path(name).parent.parent.name for name in names} == {folder}
    with pytest.raises(ValueError, match="has no such split"):
        open_splits(build_config(VisionConfig, tree, [source, "data.test=test"]).data)


def test_values_of_16_bits_are_scaled(tree: dict[str, Any], tmp_path: Path) -> None:
    """PIL's ``convert`` cuts them at 255: every image would be white."""
    for split in ("train", "validation"):
        for label, value in (("dark", 257 * 3), ("bright", 257 * 250)):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(2):
                image = Image.fromarray(np.full((4, 4), value, np.uint16))
                image.save(tmp_path / "images" / split / label / f"{number}.png")
    config = build_config(VisionConfig, tree, [f"data.source={tmp_path / 'images'}"])
    split = open_splits(config.data).splits["train"]
    seen = {int(np.asarray(split.image(number)).max()) for number in range(len(split.labels))}
    assert seen == {3, 250}
    deep = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    deep.save(tmp_path / "images" / "train" / "dark" / "0.tiff")
    (tmp_path / "images" / "train" / "dark" / "0.png").unlink()
    split = open_splits(config.data).splits["train"]
    with pytest.raises(ValueError, match="an image of 32 bits a pixel"):
        [split.image(number) for number in range(len(split.labels))]


def test_splits_with_their_own_codes_of_the_same_classes(tree: dict[str, Any], tmp_path: Path) -> None:
    def rows(names: list[str]) -> datasets.Dataset:
        images = [Image.fromarray(np.full((4, 4, 3), 100 * i, np.uint8)) for i in range(3)]
        labels = [names.index(name) for name in ("ant", "bee", "cat")]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    splits = {"train": rows(["ant", "bee", "cat"]), "validation": rows(["cat", "ant", "bee"])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    opened = open_splits(build_config(VisionConfig, tree, [f"data.source={tmp_path / 'saved'}"]).data)
    for split in opened.splits.values():
        assert [opened.classes[label] for label in split.labels] == ["ant", "bee", "cat"]

    splits["train"] = splits["train"].select([0, 1])  # "cat" is a class of which it has no image
    shutil.rmtree(tmp_path / "saved")
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="1 of 3 labels are no class of the training split: 'cat'"):
        open_splits(build_config(VisionConfig, tree, [f"data.source={tmp_path / 'saved'}"]).data)
