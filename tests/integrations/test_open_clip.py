"""open_clip's trainer, whole: two ranks, checkpoints, a resumed run."""

import importlib.util
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.integrations import open_clip_cases
from tests.training import assert_same_bits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("open_clip_train") is None,
    reason="needs open_clip: pip install --no-deps open_clip_torch ftfy wcwidth webdataset braceexpand",
)
OURS = ["--opt", "timm/shardedlamb"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoints of: a run of two epochs, its second epoch again, and the whole run with `Lamb`."""
    folder = tmp_path_factory.mktemp("open_clip")
    open_clip_cases.write_data(folder)
    first = folder / "logs" / "whole" / "checkpoints" / "epoch_1.pt"
    runs = [
        [*OURS, "--name", "whole", "--epochs", "2"],
        [*OURS, "--name", "resumed", "--epochs", "2", "--resume", str(first)],
        ["--opt", "timm/wholelamb", "--name", "lamb", "--epochs", "2"],
    ]
    made = run_ranks(2, open_clip_cases.trained, folder, runs)
    assert made == [["ShardedLamb"] * 3 + ["Lamb"] * 2] * 2
    return {
        name: torch.load(folder / "logs" / name / "checkpoints" / "epoch_2.pt", weights_only=True)
        for name in ("whole", "resumed", "lamb")
    }


def test_it_trains_as_lamb_over_the_global_batch(saved: dict[str, Any]) -> None:
    weights, expected = (saved[name]["state_dict"] for name in ("whole", "lamb"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)


def test_the_checkpoint_holds_the_state_of_all_ranks(saved: dict[str, Any]) -> None:
    sizes = [saved[name]["optimizer"] for name in ("whole", "lamb")]
    ours, whole = ({key: state["exp_avg"].shape for key, state in each["state"].items()} for each in sizes)
    assert ours == whole
    assert len(ours) == len(saved["whole"]["state_dict"])


def test_a_run_resumes_to_the_same_bits(saved: dict[str, Any]) -> None:
    whole, resumed = saved["whole"], saved["resumed"]
    assert_same_bits(resumed["state_dict"], whole["state_dict"])
    for key, state in whole["optimizer"]["state"].items():
        assert_same_bits(resumed["optimizer"]["state"][key], state)
