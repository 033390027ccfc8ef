"""What a file leaves out is the variant's to fill, and what it says wins over the variant."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sharded_lamb import Lamb, checkpoint
from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert.apex import from_apex
from sharded_lamb.convert.common import weights_of, widest_weights
from sharded_lamb.convert.deepspeed import _left_out as deepspeed_left_out
from sharded_lamb.convert.deepspeed import _options as from_deepspeed
from sharded_lamb.convert.timm import from_timm
from tests.convert import cases
from tests.harness import run_ranks

SCALARS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
Read = Callable[[dict[str, Any], str | None], dict[str, Any]]


def read_by(convert: Callable[..., Any]) -> Read:
    def read(group: dict[str, Any], variant: str | None) -> dict[str, Any]:
        weight = torch.ones(3)
        state = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
        groups = [{**SCALARS, "step": 1, "params": [0], **group}]
        file = {"model": {"w": weight}, "optimizer": {"state": {0: state}, "param_groups": groups}}
        contents, _ = convert(file, ["w"], variant)
        return dict(contents.groups[0]["options"])

    return read


FORMATS: dict[str, tuple[dict[str, Any], Read]] = {  # a group's marks, and what reads it
    "timm": ({"trust_clip": False}, read_by(from_timm)),
    "apex": ({"max_grad_norm": 1.0}, read_by(from_apex)),
    "deepspeed": (
        {"max_coeff": 10.0, "min_coeff": 0.01},
        lambda group, variant: from_deepspeed([{**SCALARS, **group}], variant)[0][0],
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_variant_fills_what_the_file_leaves_out(form: str) -> None:
    marks, read = FORMATS[form]
    assert read(marks, "paper_v3")["bias_correction"] is False
    assert read(marks, "paper_v3")["adapt_without_decay"] is True
    assert read(marks, None)["bias_correction"] == ("lr" if form == "deepspeed" else True)
    assert read(marks, None)["adapt_without_decay"] is (form == "deepspeed")


@pytest.mark.parametrize("form", FORMATS)
def test_the_file_wins_over_the_variant(form: str) -> None:
    marks, read = FORMATS[form]
    said = read({**marks, "bias_correction": True}, "paper_v3")["bias_correction"]
    assert said == ("lr" if form == "deepspeed" else True)
    assert read({**marks, "bias_correction": False}, "lamb")["bias_correction"] is False


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"maximize": True}, "maximize=True, which is not supported"),
        ({"decoupled_weight_decay": False}, "they are RAdam's"),
        ({"momentum_decay": 0.004}, "it is of NAdam, which is not supported"),
    ],
)
def test_deepspeed_refuses_what_adam_refuses(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_deepspeed([{**SCALARS, **group}], None)
    _, notes = from_deepspeed([{**SCALARS, "amsgrad": True, "decoupled_weight_decay": True}], None)
    assert any("max_exp_avg_sq of amsgrad=True is left out" in note for note in notes)


def test_timms_lamb_under_deepspeed_keeps_its_options() -> None:
    group = {**SCALARS, "trust_clip": True, "always_adapt": True, "max_grad_norm": 1.0}
    options, notes = from_deepspeed([group], None)
    assert (options[0]["variant"], options[0]["trust_clip"], notes) == ("timm", (0.0, 1.0), [])


def test_client_state_is_noted() -> None:
    model = {
        "module": {},
        "ds_config": {},
        "lr_scheduler": {"a": 1},
        "global_steps": 3,
        "epoch": 7,
        "skipped_steps": 0,
    }
    assert deepspeed_left_out(model) == ["left out: lr_scheduler, epoch"]


def test_what_a_file_holds_beside_its_model_and_optimizer_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's CheckpointSaver writes its settings as a Namespace; "optim" is torch's tutorials' key."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    model.weight.sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.param_groups[0].update(lr_scale=0.7, name="head")
    file = {
        **{"state_dict": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3},
        **{"state_dict_ema": model.state_dict(), "args": argparse.Namespace(lr=1.0)},
    }
    torch.save(file, tmp_path / "file")
    cases.convert(tmp_path / "file", tmp_path / "ours", "adam", "sharded_lamb")
    said = capsys.readouterr().out
    assert "left out of the file: epoch, state_dict_ema, args" in said
    assert "name of the groups left out, which Adam does not have" in said
    cases.convert(tmp_path / "ours", tmp_path / "back", "sharded_lamb", "adam")
    group = torch.load(tmp_path / "back", weights_only=True)["optimizer"]["param_groups"][0]
    kept = ("initial_lr", "max_lr", "min_lr", "lr_scale")
    assert {key: group[key] for key in kept} == {key: optimizer.param_groups[0][key] for key in kept}

    torch.save(optimizer.state_dict(), tmp_path / "alone")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights")
    weights = ("--weights", str(tmp_path / "weights"))
    cases.convert(tmp_path / "alone", tmp_path / "alone.pt", "adam", "lamb", *weights)
    onto = (tmp_path / "alone", tmp_path / "weights", "--force", "--from", "adam", "--to", "lamb", *weights)
    assert "is the source itself" in cases.refused(capsys, *onto)
    (tmp_path / "names").write_bytes("\ufeffweight\nbias\n".encode())
    names = ("--names", str(tmp_path / "names"))
    cases.convert(tmp_path / "alone", tmp_path / "named.pt", "adam", "lamb", *weights, *names)
    (tmp_path / "names").write_bytes(b"w\xe9ight\n")
    command = (tmp_path / "alone", tmp_path / "x", "--from", "adam", "--to", "lamb", *weights, *names)
    assert f"{tmp_path / 'names'} is not UTF-8" in cases.refused(capsys, *command)
    torch.save({**file, "args": Path("x")}, tmp_path / "file")
    command = (tmp_path / "file", tmp_path / "x", "--from", "adam", "--to", "lamb")
    assert "it holds pathlib.PosixPath. Save it anew" in cases.refused(capsys, *command)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([1, 2], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.loaded = state


def test_tied_weights_that_a_file_holds_once_and_extra_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors holds tied weights once; TransformerEngine's extra state is a tensor."""
    from safetensors.torch import save_file

    model = Tied()
    optimizer = torch.optim.AdamW([("embed.weight", model.embed.weight)])
    model.embed.weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "weights.safetensors")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "both")
    weights = ("--weights", str(tmp_path / "weights.safetensors"))
    cases.convert(tmp_path / "optimizer", tmp_path / "once", "adam", "sharded_lamb", *weights)
    cases.convert(tmp_path / "both", tmp_path / "twice", "adam", "sharded_lamb")
    assert "_extra_state of the model's state dict is left out" in capsys.readouterr().out
    for folder in ("once", "twice"):
        other = Tied()
        loaded = Lamb(other.named_parameters(), variant="adamw")
        checkpoint.load(tmp_path / folder, other, loaded)
        assert torch.equal(other.head.weight, model.head.weight)
        assert torch.equal(
            loaded.state[other.embed.weight]["exp_avg"], optimizer.state[model.embed.weight]["exp_avg"]
        )


def test_groups_keys_of_the_users_own_are_noted_where_they_have_no_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = Lamb([{"params": list(model.named_parameters()), "purpose": "head"}])
    model.weight.sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "ours", model, optimizer)
    for form in ("adam", "timm", "apex"):
        cases.convert(tmp_path / "ours", tmp_path / form, "sharded_lamb", form)
        assert "note: purpose of the groups left out\n" in capsys.readouterr().out
    cases.convert(tmp_path / "ours", tmp_path / "lamb", "sharded_lamb", "lamb")
    cases.convert(tmp_path / "lamb", tmp_path / "back", "lamb", "sharded_lamb")
    assert "left out" not in capsys.readouterr().out


def test_masters_of_the_weights_own_dtype_are_not_rounded() -> None:
    state = {"step": torch.tensor(1.0), "master": torch.ones(2) + 1e-6}
    for dtype, rounds in ((torch.float32, False), (torch.bfloat16, True)):
        contents = InMemoryCheckpoint({"w": torch.ones(2, dtype=dtype)}, {"w": state}, [])
        weights, (note,) = widest_weights(contents)
        assert torch.equal(weights["w"], state["master"])
        assert ("the model rounds them on loading" in note) is rounds


def read_shard(rank: int) -> str:
    mesh = init_device_mesh("cpu", (1,))
    shard = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(
        ValueError, match=r"weight is one rank's shard \(a DTensor\): save the whole tensors"
    ) as caught:
        weights_of({"weight": shard})
    return str(caught.value)


def test_one_ranks_shards_are_no_model() -> None:
    assert all("full_state_dict=True" in said for said in run_ranks(1, read_shard))
