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
        (torch.optim.NAdam, 0, "it is of NAdam, which is not supported"),
        (torch.optim.RAdam, 2, "they are RAdam's, which is another update rule"),
        (torch.optim.Adamax, 2, "has exp_inf, which Adam does not have"),
        (torch.optim.Rprop, 0, "no betas: it is of another optimizer"),
        (torch.optim.Rprop, 2, "has prev, step_size, which Adam does not have"),
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


def adam_like(model: cases.Net, groups: dict[str, Any], **state: Any) -> dict[str, Any]:
    """A file with zeros for both moments."""
    params = list(model.parameters())
    own = {"exp_avg": torch.zeros, "exp_avg_sq": torch.ones}
    states = {i: {k: make(p.shape) for k, make in own.items()} | state for i, p in enumerate(params)}
    group = {
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "params": [*range(len(params))],
    }
    optimizer = {"state": states, "param_groups": [group | groups]}
    return {"model": model.state_dict(), "optimizer": optimizer}


@pytest.mark.parametrize(
    ("form", "groups", "state", "message"),
    [
        (
            "timm",
            {"step": 5, "bias_correction": True},
            {},
            "no always_adapt or trust_clip, which groups of timm's",
        ),
        (
            "apex",
            {"step": 5, "bias_correction": True},
            {},
            "no grad_averaging or max_grad_norm, which groups of Fused",
        ),
        (
            "timm",
            {"step": 5, "trust_clip": False, "lookahead_k": 6},
            {},
            "it is of Lookahead around another, which",
        ),
        (
            "apex",
            {"grad_averaging": True, "weight_decouple": True},
            {},
            "it is of one of pytorch_optimizer's, which",
        ),
        ("adam", {}, {"step": 1.0, "trust_ratio": 1.0}, "has trust_ratio, which Adam does not have"),
    ],
)
def test_moments_of_other_rules_have_the_same_names(
    form: str,
    groups: dict[str, Any],
    state: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(adam_like(cases.net(), groups, **state), tmp_path / "file")
    said = cases.refused(capsys, tmp_path / "file", tmp_path / "x", "--from", form, "--to", "sharded_lamb")
    assert message in said


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.ASGD])
def test_other_optimizers_are_no_sgd(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cases.net()
    file = file_of(kind(model.parameters()), model, tmp_path / "file")
    said = cases.refused(capsys, file, tmp_path / "x", "--from", "sgd", "--to", "sharded_lamb")
    assert "no dampening or trust_coeff, which groups of SGD have" in said


def test_two_tensors_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One would replace the other."""
    from safetensors.torch import save_file

    weights = {"fc.weight": torch.ones(2), "module.fc.weight": torch.zeros(2)}
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"model": weights, "optimizer": adam_like(cases.net(), {})["optimizer"]}, tmp_path / "file")
    for file, form in (("weights.safetensors", "safetensors"), ("file", "adam")):
        said = cases.refused(capsys, tmp_path / file, tmp_path / "x", "--from", form, "--to", "sharded_lamb")
        assert "two tensors of the model are called 'fc.weight' once wrappers' prefixes are removed" in said


def test_a_norm_to_clip_at_that_no_optimizer_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"step": 5, "trust_clip": False, "max_grad_norm": 0.0}
    torch.save(adam_like(cases.net(), groups), tmp_path / "file")
    said = cases.refused(capsys, tmp_path / "file", tmp_path / "x", "--from", "timm", "--to", "sharded_lamb")
    assert "max_grad_norm must be a number > 0" in said
