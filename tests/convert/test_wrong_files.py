"""Files of another optimizer than --from names, each rejected by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert import cases
from tests.timm_peer import load_timm_lamb

FILES = ("lamb", "timm", "adam", "apex")


def file_of(peer: Any, model: cases.Net, path: Path, steps: int = 2) -> Path:
    cases.train(model, peer, range(steps))
    torch.save({"model": model.state_dict(), "optimizer": peer.state_dict()}, path)
    return path


# -- another optimizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FILES)
def test_a_file_of_another_format_is_rejected(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moments and steps may have the same keys, but the update rule differs."""
    ours = cases.saved(tmp_path / "ours", *cases.trained())
    cases.convert(ours, tmp_path / "file", "sharded_lamb", form)
    for wrong in {*FILES} - {form}:
        said = cases.refused(
            capsys, tmp_path / "file", tmp_path / "x", "--from", wrong, "--to", "sharded_lamb"
        )
        if form != "adam":
            assert f"looks like --from {form}, not like --from {wrong}" in said
        assert not (tmp_path / "x").exists()
    cases.convert(tmp_path / "file", tmp_path / "x", form, "sharded_lamb")


def test_a_file_of_timm_itself_is_rejected_by_other_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cases.net()
    file = file_of(load_timm_lamb()(model.parameters()), model, tmp_path / "file")
    for wrong in ("lamb", "adam", "apex"):
        said = cases.refused(capsys, file, tmp_path / "x", "--from", wrong, "--to", "sharded_lamb")
        assert f"has 'always_adapt' and looks like --from timm, not like --from {wrong}" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximize": True}, "maximize=True, which is not supported"),
        ({"momentum": 0.9, "dampening": 0.5}, "dampening=0.5 with momentum=0.9"),
    ],
)
def test_options_of_sgd_that_lars_lacks(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cases.net()
    file = file_of(torch.optim.SGD(model.parameters(), **options), model, tmp_path / "file")
    assert message in cases.refused(capsys, file, tmp_path / "x", "--from", "sgd", "--to", "sharded_lamb")


def test_adams_file_is_refused_as_sgds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would lose both moments."""
    model = cases.net()
    file = file_of(torch.optim.AdamW(model.parameters()), model, tmp_path / "file")
    said = cases.refused(capsys, file, tmp_path / "x", "--from", "sgd", "--to", "sharded_lamb")
    assert "SGD's have no 'betas': give the file's format with --from" in said


def test_lars_and_lamb_are_refused_by_formats_of_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lars = cases.saved(tmp_path / "lars", *cases.trained(variant="lars"))
    for form in ("timm", "adam", "apex"):
        said = cases.refused(capsys, lars, tmp_path / "x", "--from", "sharded_lamb", "--to", form)
        assert "the checkpoint is of LARS, with one moment of 'scale'" in said
    lamb = cases.saved(tmp_path / "lamb", *cases.trained())
    said = cases.refused(capsys, lamb, tmp_path / "x", "--from", "sharded_lamb", "--to", "sgd")
    assert "the checkpoint is not of LARS" in said


@pytest.mark.parametrize(
    ("kind", "steps", "message"),
    [
        (torch.optim.SGD, 2, "has 'dampening' and looks like --from sgd, not like --from"),
        (torch.optim.NAdam, 0, "has 'momentum_decay' and looks like NAdam, which is not supported"),
        (torch.optim.RAdam, 2, "they are RAdam's, which is another update rule"),
        (torch.optim.Adamax, 2, "has no exp_avg_sq"),
        (torch.optim.Rprop, 0, "no betas: it is of another optimizer"),
        (torch.optim.Rprop, 2, "has no exp_avg"),
        (torch.optim.LBFGS, 0, "no betas: it is of another optimizer"),
    ],
)
def test_other_optimizers_of_torch_are_rejected(
    kind: Any, steps: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cases.net()
    file = file_of(kind(model.parameters()), model, tmp_path / "file", steps)
    said = cases.refused(capsys, file, tmp_path / "x", "--from", "adam", "--to", "sharded_lamb")
    assert message in said
