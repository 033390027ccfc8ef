"""The convert command: errors, notes, and parameters' names."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.__main__ import main
from sharded_lamb.checkpoint.in_memory import read_contents
from sharded_lamb.convert.command import FORMATS
from tests import interpreter
from tests.convert import cases
from tests.test_readme import readme


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return cases.saved(tmp_path / "ours", *cases.trained(max_grad_norm=2.0), epoch=3)


def theirs(folder: Path, groups: int = 1) -> Path:
    """Writes a file of AdamW without parameters' names."""
    model = cases.net()
    own = list(model.parameters())
    peer = torch.optim.AdamW([{"params": own[:2]}, {"params": own[2:]}] if groups == 2 else own)
    cases.train(model, peer, range(2))
    torch.save({"model": model.state_dict(), "optimizer": peer.state_dict()}, folder / "theirs")
    return folder / "theirs"


# -- names ---------------------------------------------------------------------------------------------------


def test_names_of_several_groups_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups are not in the model's order: norm.weight and norm.bias would be swapped."""
    command = (theirs(tmp_path, groups=2), tmp_path / "ours", "--from", "adam", "--to", "sharded_lamb")
    said = cases.refused(capsys, *command)
    assert "2 groups are not in the model's order: give --names FILE" in said
    assert "named_parameters()" in said
    names = [name for name, _ in cases.net().named_parameters()]
    for number, text in enumerate((json.dumps(names), "\n".join([*names, ""]))):
        (tmp_path / f"names{number}").write_text(text)
        cases.convert(*command[:2], "adam", "sharded_lamb", "--names", f"{tmp_path}/names{number}", "--force")
        groups = read_contents(tmp_path / "ours").groups
        assert [group["names"] for group in groups] == [names[:2], names[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:-1], "has 6 names, but the optimizer has 7 parameters"),
        (lambda names: [*names[:-1], "fc.bia"], "'fc.bia' is not in the model"),
        (lambda names: [*names[:-1], names[0]], "is named twice"),
        (lambda names: names[::-1], "the names are not in the optimizer's order"),
        (lambda names: [*names[:-1], 3], "must be a list of strings"),
    ],
)
def test_wrong_names(change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, _ in cases.net().named_parameters()]
    (tmp_path / "names").write_text(json.dumps(change(names)))
    command = (theirs(tmp_path), tmp_path / "ours", "--from", "adam", "--to", "sharded_lamb")
    assert message in cases.refused(capsys, *command, "--names", tmp_path / "names")
    assert not (tmp_path / "ours").exists()


def test_a_run_folder_means_its_last_checkpoint(tmp_path: Path) -> None:
    """As for ``inspect``."""
    model, optimizer = cases.trained(3)
    checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").save(3, model, optimizer)
    cases.convert(tmp_path / "run", tmp_path / "w.safetensors", "sharded_lamb", "safetensors")
    assert (tmp_path / "w.safetensors").is_file()


def test_one_group_is_in_the_models_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Buffers and tied names are not counted as parameters."""
    cases.convert(theirs(tmp_path), tmp_path / "ours", "adam", "sharded_lamb")
    assert "the model's order is assumed, scale to head.bias" in capsys.readouterr().out
    names = [name for name, _ in cases.net().named_parameters()]
    assert read_contents(tmp_path / "ours").groups[0]["names"] == names


def test_a_frozen_parameter_makes_the_order_doubtful(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cases.net()
    peer = torch.optim.Adam(list(model.parameters())[1:])
    torch.save({"model": model.state_dict(), "optimizer": peer.state_dict()}, tmp_path / "theirs")
    said = cases.refused(
        capsys, tmp_path / "theirs", tmp_path / "ours", "--from", "adam", "--to", "sharded_lamb"
    )
    assert "its model has 7 tensors, but the optimizer has 6 parameters: give --names" in said


def test_weights_of_an_optimizer_saved_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cases.load_file(theirs(tmp_path))
    torch.save(file["optimizer"], tmp_path / "alone")
    torch.save(file["model"], tmp_path / "model")
    command = (tmp_path / "alone", tmp_path / "ours", "--from", "adam", "--to", "sharded_lamb")
    assert "give the weights with --weights" in cases.refused(capsys, *command)
    cases.convert(*command[:2], "adam", "sharded_lamb", "--weights", str(tmp_path / "model"))
    assert read_contents(tmp_path / "ours").states.keys() == {n for n, _ in cases.net().named_parameters()}


def test_weights_of_safetensors_have_no_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file is sorted by name: layers of one shape would exchange their moments from the tenth on."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(11)))
    peer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    peer.step()
    torch.save(peer.state_dict(), tmp_path / "alone")
    names = [name for name, _ in model.named_parameters()]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert list(load_file(tmp_path / "model.safetensors")) != names
    command = (tmp_path / "alone", tmp_path / "ours", "--from", "adam", "--to", "sharded_lamb")
    weights = ("--weights", str(tmp_path / "model.safetensors"))
    assert "has the parameters' order: give --names FILE" in cases.refused(capsys, *command, *weights)
    (tmp_path / "names").write_text("\n".join(names))
    cases.convert(*command[:2], "adam", "sharded_lamb", *weights, "--names", f"{tmp_path}/names")
    states = read_contents(tmp_path / "ours").states
    for name, p in model.named_parameters():
        assert torch.equal(states[name]["exp_avg"], peer.state[p]["exp_avg"]), name


def test_an_optimizer_that_names_its_parameters_in_place_of_numbers(tmp_path: Path) -> None:
    """FSDP.optim_state_dict() and torch.distributed.checkpoint's get_optimizer_state_dict() do, in any order."""
    file = cases.load_file(theirs(tmp_path))
    names = [name for name, _ in cases.net().named_parameters()]
    state, (group,) = file["optimizer"]["state"], file["optimizer"]["param_groups"]
    file["optimizer"]["state"] = {names[place]: state[place] for place in reversed(range(len(names)))}
    group["params"] = names[::-1]
    torch.save(file, tmp_path / "theirs")
    cases.convert(tmp_path / "theirs", tmp_path / "ours", "adam", "sharded_lamb")
    states = read_contents(tmp_path / "ours").states
    for place, name in enumerate(names):
        assert torch.equal(states[name]["exp_avg"], state[place]["exp_avg"]), name


def test_a_checkpoint_of_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cases.load_file(theirs(tmp_path))
    for optimizers in (1, 2):
        states = [file["optimizer"]] * optimizers
        torch.save({"state_dict": file["model"], "optimizer_states": states}, tmp_path / f"{optimizers}.ckpt")
    cases.convert(tmp_path / "1.ckpt", tmp_path / "ours", "adam", "sharded_lamb")
    assert read_contents(tmp_path / "ours").states.keys() == {n for n, _ in cases.net().named_parameters()}
    command = (tmp_path / "2.ckpt", tmp_path / "two", "--from", "adam", "--to", "sharded_lamb")
    assert "the file has 2 optimizers, expected one" in cases.refused(capsys, *command)


# -- rejected files ------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_pickles_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful(), "optimizer": {}}, tmp_path / "theirs")
    for form in ("lamb", "timm", "adam", "apex"):
        said = cases.refused(
            capsys, tmp_path / "theirs", tmp_path / "x", "--from", form, "--to", "safetensors"
        )
        assert "cannot be read as tensors and plain data" in said
    assert not (tmp_path / "harm").exists()


def test_files_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello")
    torch.save([1], tmp_path / "list")
    torch.save({"model": {}, "optimizer": {"a": 1}}, tmp_path / "empty")
    for name, message in (
        ("text", "cannot be read as tensors and plain data"),
        ("list", "holds a list, expected a dict"),
        ("empty", "expected state and param_groups"),
        ("nothing", "is not a file"),
    ):
        said = cases.refused(capsys, tmp_path / name, tmp_path / "x", "--from", "timm", "--to", "lamb")
        assert message in said


def test_slices_of_one_rank_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cases.net()
    optimizer = ShardedLamb(model.named_parameters())
    states = {place: {**state} for place, state in optimizer.state_dict()["state"].items()}
    plain = {p: {k: torch.zeros(3) for k in state} for p, state in states.items()}
    groups = optimizer.state_dict()["param_groups"]
    torch.save(
        {"model": model.state_dict(), "optimizer": {"state": plain, "param_groups": groups}}, tmp_path / "f"
    )
    said = cases.refused(capsys, tmp_path / "f", tmp_path / "x", "--from", "lamb", "--to", "sharded_lamb")
    assert "is one rank's slice" in said


# -- options -------------------------------------------------------------------------------------------------


def test_options_without_effect_are_rejected(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (ours, tmp_path / "x", "--from", "sharded_lamb", "--to", "lamb")
    for option in (["--variant", "timm"], ["--trust-pickle"], ["--rename", "a=b"], ["--weights", "x"]):
        assert "has no effect with sharded_lamb" in cases.refused(capsys, *command, *option)


def test_set(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--set", "lr=0.5", "--set", "betas=[0.8, 0.9]", "--set", "max_grad_norm=null")
    cases.convert(ours, tmp_path / "new", "sharded_lamb", "sharded_lamb", *given)
    contents = read_contents(tmp_path / "new")
    assert contents.groups[0]["options"] == {
        **read_contents(ours).groups[0]["options"],
        "lr": 0.5,
        "betas": (0.8, 0.9),
    }
    assert contents.optimizer["max_grad_norm"] is None
    command = (ours, tmp_path / "x", "--from", "sharded_lamb", "--to", "lamb", "--set")
    for wrong, message in (
        ("lr=-1", "lr must be a finite number >= 0"),
        ("lr=fast", "the value is not JSON"),
        ("rl=1", "the options of this checkpoint are"),
        ("lr", "--set must be KEY=VALUE"),
        ("max_grad_norm=0", "max_grad_norm must be a number > 0"),
        ('variant="apex"', "--set variant would change a name but no option: --set the options themselves"),
    ):
        assert message in cases.refused(capsys, *command, wrong)


@pytest.mark.parametrize(
    ("given", "expected"), [(["lr=0.5"], 0.25), (["initial_lr=0.2", "lr=0.5"], 0.1), (["eps=0.1"], 0.01)]
)
def test_a_new_lr_outlives_torchs_schedulers(given: list[str], expected: float, tmp_path: Path) -> None:
    """Schedulers continue from ``initial_lr``."""

    def halved(optimizer: Lamb, last: int) -> None:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5, last_epoch=last)

    model, optimizer = cases.trained(1)
    halved(optimizer, -1)
    cases.saved(tmp_path / "ours", model, optimizer)
    options = [word for pair in given for word in ("--set", pair)]
    cases.convert(tmp_path / "ours", tmp_path / "new", "sharded_lamb", "sharded_lamb", *options)
    checkpoint.load(tmp_path / "new", model, optimizer)
    halved(optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == expected


# -- notes ---------------------------------------------------------------------------------------------------

SAID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("timm", {"variant": "deepspeed"}, ["bias_correction=lr", "trust_clip=(0.01, 10.0)"]),
    ("timm", {"weight_norm_clip": (0.0, 10.0)}, ["timm's Lamb has no weight_norm_clip=(0.0, 10.0)"]),
    ("timm", {"eps_inside_sqrt": True}, ["timm's Lamb has no eps_inside_sqrt=True"]),
    ("timm", {"adam_w_mode": False}, ["timm's Lamb has no adam_w_mode=False"]),
    ("timm", {"exclude_from_layer_adaptation": ["fc"]}, ["2 parameters had decay and no ratio (fc.weight)"]),
    ("timm", {"max_grad_norm": 2.0}, ["Lamb(…, max_grad_norm=2.0)", "extra is left out: epoch"]),
    (
        "adam",
        {"max_grad_norm": 2.0},
        ["Adam has no trust ratio: the updates of 7", "clip_grad_norm_(model.parameters(), 2"],
    ),
    ("adam", {"variant": "adamw", "grad_averaging": False}, ["Adam has no grad_averaging=False"]),
    ("adam", {"variant": "adamw", "adam_w_mode": False}, ["load it into Adam"]),
    ("apex", {"variant": "nvlamb"}, ["use_nvlamb=True, adam_w_mode=True, max_grad_norm=1.0"]),
    ("apex", {"variant": "deepspeed"}, ["not on the learning rate", "FusedLAMB has no trust_clip"]),
    (
        "safetensors",
        {},
        ["weights only: moments", "tied weights are written once (head.weight = embed.weight)"],
    ),
]


@pytest.mark.parametrize(("to", "options", "messages"), SAID)
def test_losses_are_noted(
    to: str, options: dict[str, Any], messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = cases.saved(tmp_path / "ours", *cases.trained(**options), epoch=3)
    cases.convert(ours, tmp_path / "file", "sharded_lamb", to)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for message in messages:
        assert any(message in note for note in notes), (message, notes)


@pytest.mark.parametrize(
    ("to", "ending"),
    [
        ("sharded_lamb", "7 with moments (0 with masters), step 4, 1 group"),
        ("timm", "7 with moments (0 with masters), step 4, 2 groups"),
        ("safetensors", "elements, weights only"),
    ],
)
def test_the_last_line_is_of_what_was_written(
    to: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = cases.saved(tmp_path / "ours", *cases.trained(exclude_from_weight_decay=["bias"]))
    cases.convert(ours, tmp_path / "file", "sharded_lamb", to)
    assert capsys.readouterr().out.splitlines()[-1].endswith(ending)


@pytest.mark.parametrize("to", ["timm", "apex"])
def test_steps_that_differ_are_noted(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = cases.trained(2)
    model.fc.bias.grad = None
    own = [p for name, p in model.named_parameters() if name != "fc.bias"]
    for p in own:
        p.grad = torch.ones_like(p)
    optimizer.step()
    cases.saved(tmp_path / "ours", model, optimizer)
    cases.convert(tmp_path / "ours", tmp_path / "file", "sharded_lamb", to)
    assert "1 parameters with fewer steps (fc.bias has 2) take their group's" in capsys.readouterr().out
    assert cases.load_file(tmp_path / "file")["optimizer"]["param_groups"][0]["step"] == 3


def test_a_parameter_without_state_stays_without(tmp_path: Path) -> None:
    model = cases.net()
    optimizer = Lamb(model.named_parameters())
    model.fc.bias.grad = torch.ones(6)
    optimizer.step()
    cases.saved(tmp_path / "ours", model, optimizer)
    for form in ("lamb", "timm", "adam", "apex"):
        back, _ = cases.through(tmp_path, form, tmp_path / "ours")
        assert back.states.keys() == {"fc.bias"}
        assert len(back.groups[0]["names"]) == 7


# -- files of another optimizer than --from names ------------------------------------------------------------


def test_an_adam_is_not_taken_for_timms_lamb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its groups have none of the keys that theirs have, and its moments are those of another rule."""
    for form in ("timm", "apex"):
        command = (theirs(tmp_path), tmp_path / "x", "--from", form, "--to", "lamb")
        title = "timm's Lamb" if form == "timm" else "FusedLAMB"
        assert f"which groups of {title} have: give the file's format" in cases.refused(capsys, *command)


_OF_ANY_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
_UNSURE = "does not hold whether decay was decoupled"


@pytest.mark.parametrize(
    ("more", "corrects", "decouples", "says"),
    [
        ({"correct_bias": False}, False, True, f"{_UNSURE}.*assumed is decoupled"),  # transformers' AdamW
        ({"bias_correction": False, "step": 2}, False, True, f"{_UNSURE}.*assumed is decoupled"),  # FusedAdam
        ({"bias_correction": True, "step": 2}, True, True, f"{_UNSURE}.*assumed is decoupled"),
        ({"amsgrad": False}, True, False, f"{_UNSURE}.*assumed is added to gradients"),  # torch before 2.6
        ({"decoupled_weight_decay": True, "amsgrad": False}, True, True, None),
        (
            {"wd_ratio": 0.1, "delta": 0.1, "amsgrad": False},
            True,
            False,
            "delta, wd_ratio of the groups left out",
        ),
    ],
)
def test_an_adam_keeps_its_own_rule(
    more: dict[str, Any],
    corrects: bool,
    decouples: bool,
    says: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = torch.load(theirs(tmp_path))
    params = file["optimizer"]["param_groups"][0]["params"]
    file["optimizer"]["param_groups"] = [{**_OF_ANY_ADAM, **more, "params": params}]
    torch.save(file, tmp_path / "theirs")
    cases.convert(tmp_path / "theirs", tmp_path / "ours", "adam", "sharded_lamb")
    said = capsys.readouterr().out
    assert re.search(says, said) if says else _UNSURE not in said
    (group,) = read_contents(tmp_path / "ours").groups
    assert group["options"]["bias_correction"] is corrects
    assert group["options"]["adam_w_mode"] is decouples


def test_an_sgd_is_not_taken_for_an_adam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cases.net()
    peer = torch.optim.SGD(model.parameters(), momentum=0.9)
    file = {"model": model.state_dict(), "optimizer": peer.state_dict()}
    torch.save(file, tmp_path / "fresh")
    cases.train(model, peer, range(1))
    torch.save({**file, "optimizer": peer.state_dict()}, tmp_path / "moved")
    file["optimizer"]["param_groups"] = []
    torch.save(file, tmp_path / "empty")
    for name, message in (
        ("fresh", "looks like --from sgd, not like --from adam"),
        ("moved", "looks like --from sgd, not like --from adam"),
        ("empty", "has no parameter groups"),
    ):
        assert message in cases.refused(
            capsys, tmp_path / name, tmp_path / "x", "--from", "adam", "--to", "lamb"
        )


def test_weights_alone_are_no_optimizer(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases.convert(ours, tmp_path / "w.safetensors", "sharded_lamb", "safetensors")
    command = (tmp_path / "w.safetensors", tmp_path / "x", "--from", "safetensors", "--to", "timm")
    assert "holds weights only" in cases.refused(capsys, *command)


# -- as a program --------------------------------------------------------------------------------------------


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own; all other tests call `main`."""
    command = [interpreter.python(), "-m", "sharded_lamb", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_convert_as_a_program(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = program("convert", missing, tmp_path / "x", "--from", "timm", "--to", "lamb")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{missing} is not a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_as_a_program(ours: Path) -> None:
    done = program("inspect", ours, "--check")
    assert done.returncode == 0, done.stderr
    assert f"{ours}: step 4" in done.stdout
    assert "ok       manifest.json" in done.stdout


# -- formats -------------------------------------------------------------------------------------------------


def test_help_and_readme_have_the_same_directions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    printed = capsys.readouterr().out.split("formats:", 1)[1]
    for name, form in FORMATS.items():
        yes = ["yes" if way else "-" for way in (form.read, form.write)]
        assert re.search(rf"^ +{name} +{yes[0]} +{yes[1]} ", printed, re.MULTILINE), name
        assert re.search(rf"^\| `{name}` \| {yes[0]} \| {yes[1]} \|", readme("convert"), re.MULTILINE), name


def test_commands_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the README's commands in order."""
    model, optimizer = cases.trained(3, variant="timm")
    checkpoint.Checkpoints(tmp_path / "runs" / "mine").save(3, model, optimizer)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^sharded-lamb (?:inspect|convert) .*$", readme("convert"), flags=re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    own = cases.net(seed=9)
    again = Lamb(own.named_parameters())
    checkpoint.load("runs/theirs", own, again)
    assert again.param_groups[0]["lr"] == 1e-3
    for p, other in zip(own.parameters(), model.parameters(), strict=True):
        assert torch.equal(again.state[p]["exp_avg"], optimizer.state[other]["exp_avg"])
