"""The real timm Lamb, Adam and AdamW continue a converted run like ours, and the reverse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from sharded_lamb.checkpoint.in_memory import read_contents
from tests.convert import cases
from tests.harness import run_ranks
from tests.timm_peer import load_timm_lamb, load_timm_lars

MORE = range(4, 9)
CLIP = 3.0
Make = Callable[[Any], torch.optim.Optimizer]


def timm_of(**options: Any) -> Make:
    timm_lamb = load_timm_lamb()
    return lambda groups: timm_lamb(groups, max_grad_norm=CLIP, **options)  # type: ignore[call-arg]


LARS: dict[str, Any] = {"variant": "torch_lars", "trust_coefficient": 1.0}
PEERS: list[tuple[str, dict[str, Any], Callable[[], Make]]] = [
    ("timm", {"variant": "timm", "max_grad_norm": CLIP}, timm_of),
    ("timm", {"variant": "timm", "max_grad_norm": CLIP, "trust_clip": (0.0, 1.0)}, timm_of),
    (
        "timm",
        {"variant": "timm", "max_grad_norm": CLIP, "decoupled_decay": True, "corrected_weight_decay": 0.5},
        timm_of,
    ),
    ("timm", {"variant": "timm", "max_grad_norm": CLIP, "caution": True}, timm_of),
    ("timm", {"variant": "nvlamb", "max_grad_norm": CLIP, "grad_averaging": False}, timm_of),
    ("adam", {"variant": "adamw"}, lambda: torch.optim.AdamW),
    ("adam", {"variant": "adamw", "adam_w_mode": False}, lambda: torch.optim.Adam),
    ("adam", {"variant": "adamw"}, lambda: torch.optim.Adam),
    ("sgd", LARS, load_timm_lars),
    ("sgd", {**LARS, "variant": "lars", "nesterov": True}, load_timm_lars),
    ("sgd", {**LARS, "larc_clip": True, "adapt_without_decay": False}, load_timm_lars),
    ("sgd", {**LARS, "exclude_from_layer_adaptation": ["all"]}, lambda: torch.optim.SGD),
]


@pytest.mark.parametrize("patterns", [(), cases.PATTERNS])
@pytest.mark.parametrize(("form", "options", "peer"), PEERS)
def test_a_peer_continues_like_us(
    form: str, options: dict[str, Any], peer: Callable[[], Make], patterns: list[str], tmp_path: Path
) -> None:
    """The file's options override the peer's constructor; patterns become groups."""
    model, optimizer = cases.trained(**options, exclude_from_weight_decay=patterns)
    cases.saved(tmp_path / "ours", model, optimizer)
    cases.convert(tmp_path / "ours", tmp_path / "file", "sharded_lamb", form)
    names = [
        group["param_names"] for group in cases.load_file(tmp_path / "file")["optimizer"]["param_groups"]
    ]
    assert len(names) == (2 if patterns else 1)

    make = peer()
    start, end = cases.continued(tmp_path / "file", lambda net: make(cases.groups_of(net, names)))
    cases.assert_close(start, cases.params(model), 0.0)
    cases.train(model, optimizer, MORE)
    cases.assert_moved(end, start)
    cases.assert_close(end, cases.params(model))


@pytest.mark.parametrize("patterns", [(), cases.PATTERNS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trust_clip": True},
        {"caution": True},
        {"decoupled_decay": True, "corrected_weight_decay": True},
        {"always_adapt": True, "grad_averaging": False, "bias_correction": False},
    ],
)
def test_we_continue_like_timm(options: dict[str, Any], patterns: list[str], tmp_path: Path) -> None:
    model = cases.net()
    peer = timm_of(**cases.LAMB, **options)(_peer_groups(model, patterns))
    cases.train(model, peer, range(4))
    fixed = {"caution": options.get("caution", False)}
    _go_on_with_ours(tmp_path, "timm", model, peer, ["--variant", "timm"], **fixed)


def test_timms_caution_does_not_become_lans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cases.net()
    peer = timm_of(caution=True)(model.parameters())
    cases.train(model, peer, range(1))
    torch.save({"model": model.state_dict(), "optimizer": peer.state_dict()}, tmp_path / "theirs")
    command = (tmp_path / "theirs", tmp_path / "x", "--from", "timm", "--to", "lamb", "--variant", "lans")
    assert "caution=True beside nesterov=True" in cases.refused(capsys, *command)


@pytest.mark.parametrize("patterns", [(), cases.PATTERNS])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_we_continue_like_adam(kind: Make, patterns: list[str], tmp_path: Path) -> None:
    model = cases.net()
    peer = kind(_peer_groups(model, patterns), **cases.LAMB)  # type: ignore[call-arg]
    cases.train(model, peer, range(4))
    _go_on_with_ours(tmp_path, "adam", model, peer, [])


@pytest.mark.parametrize("patterns", [(), cases.PATTERNS])
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"always_adapt": True}, []),
        ({"nesterov": True, "trust_clip": True}, []),
        ({"dampening": 0.9}, ["--variant", "lars"]),
    ],
)
def test_we_continue_like_timms_lars(
    options: dict[str, Any], more: list[str], patterns: list[str], tmp_path: Path
) -> None:
    model = cases.net()
    common = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "trust_coeff": 1.0}
    peer = load_timm_lars()(_peer_groups(model, patterns), **common, **options)  # type: ignore[call-arg]
    cases.train(model, peer, range(4))
    fixed = {"lars": True, "nesterov": options.get("nesterov", False)}
    _go_on_with_ours(tmp_path, "sgd", model, peer, more, **fixed)


def test_sgd_alone_continues_with_the_assumed_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LARS that wraps SGD saves SGD's state: its own options are the user's to set."""
    model = cases.net()
    peer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    cases.train(model, peer, range(4))
    options = ["--set", 'exclude_from_layer_adaptation=["all"]']
    _go_on_with_ours(tmp_path, "sgd", model, peer, options, lars=True)
    assert "note: the file is SGD's" in capsys.readouterr().out


def _peer_groups(model: nn.Module, patterns: list[str]) -> Any:
    """One group without names, or two with names: parameters that match no pattern first."""
    if not patterns:
        return model.parameters()
    named = list(model.named_parameters())
    excluded = [name for name, _ in named if name.endswith("bias") or "norm" in name]
    return [
        {"params": [pair for pair in named if pair[0] not in excluded]},
        {"params": [pair for pair in named if pair[0] in excluded], "weight_decay": 0.0},
    ]


def _go_on_with_ours(
    folder: Path, form: str, model: nn.Module, peer: Any, options: list[str], **fixed: bool
) -> None:
    """``fixed``: options that only construction sets."""
    torch.save({"model": model.state_dict(), "optimizer": peer.state_dict()}, folder / "theirs")
    cases.convert(folder / "theirs", folder / "ours", form, "sharded_lamb", *options)
    own = cases.net(seed=9)
    groups = [list(group["names"]) for group in read_contents(folder / "ours").groups]
    # The options must be the file's: those of a new optimizer would fail.
    variant = "torch_lars" if fixed.pop("lars", False) else "deepspeed"
    optimizer = Lamb(cases.groups_of(own, groups), lr=9.0, variant=variant, **fixed)
    checkpoint.load(folder / "ours", own, optimizer)
    start = cases.params(own)
    cases.assert_close(start, cases.params(model), 0.0)
    cases.train(model, peer, MORE)
    cases.train(own, optimizer, MORE)
    cases.assert_moved(cases.params(own), start)
    cases.assert_close(cases.params(own), cases.params(model))


def bf16_run(rank: int, folder: str) -> dict[str, Tensor]:
    """Saves bf16 weights with masters on two ranks; returns the masters after more steps."""
    model = cases.net().to(torch.bfloat16)
    optimizer = ShardedLamb(
        model.named_parameters(), **cases.LAMB, variant="timm", max_grad_norm=CLIP, stage=1
    )
    cases.train(model, optimizer, range(4))
    checkpoint.save(Path(folder) / "ours", model, optimizer)
    cases.train(model, optimizer, MORE)
    full = optimizer.full_state_dict()
    if full is None:
        return {}
    names = [name for name, _ in model.named_parameters()]
    return {name: full["state"][i]["master"].clone() for i, name in enumerate(names)}


def test_masters_of_a_sharded_bf16_run_become_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masters, _ = run_ranks(2, bf16_run, str(tmp_path))
    cases.convert(tmp_path / "ours", tmp_path / "file", "sharded_lamb", "timm")
    assert "weights are written as their float32 masters" in capsys.readouterr().out
    make = timm_of()
    start, end = cases.continued(tmp_path / "file", lambda net: make(net.parameters()))
    assert all(value.dtype == torch.float32 for value in end.values())
    cases.assert_moved(end, start)
    cases.assert_close(end, masters)


@pytest.mark.parametrize("form", ["timm", "adam", "apex", "lamb"])
@pytest.mark.parametrize("options", [{"variant": "adamw"}, {"variant": "timm"}, {"variant": "apex"}])
def test_round_trips_are_bitwise_equal(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    cases.saved(tmp_path / "ours", *cases.trained(**options))
    back, _ = cases.through(tmp_path, form, tmp_path / "ours")
    before = read_contents(tmp_path / "ours")
    cases.same_contents(back, before, groups=form == "lamb")
    assert [group["names"] for group in back.groups] == [group["names"] for group in before.groups]
    assert [group["options"]["lr"] for group in back.groups] == [0.02]


def test_a_timm_run_keeps_its_options_in_a_round_trip(tmp_path: Path) -> None:
    cases.saved(
        tmp_path / "ours", *cases.trained(variant="timm", trust_clip=(0.0, 1.0), bias_correction=False)
    )
    back, _ = cases.through(tmp_path, "timm", tmp_path / "ours")
    cases.same_contents(back, read_contents(tmp_path / "ours"))


def sharded(rank: int, folder: str) -> None:
    model = cases.net().to(torch.bfloat16)
    optimizer = ShardedLamb(
        model.named_parameters(),
        **cases.LAMB,
        stage=1,
        max_grad_norm=2.0,
        exclude_from_weight_decay=["bias$"],
        ema_decay=0.5,
    )
    cases.train(model, optimizer, range(3))
    checkpoint.save(
        Path(folder) / "ours", model, optimizer, {"position": {"epoch": 3, "seen": torch.arange(4)}}
    )


def test_lamb_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Including masters, averages and extra; Lamb and load_full_state_dict accept it."""
    run_ranks(2, sharded, str(tmp_path))
    back, said = cases.through(tmp_path, "lamb", tmp_path / "ours", capsys)
    before = read_contents(tmp_path / "ours")
    cases.same_contents(back, before)
    for kind in ("master", "ema"):
        assert all(state[kind].dtype == torch.float32 for state in back.states.values())
    cases.convert(tmp_path / "ours", tmp_path / "timms", "sharded_lamb", "timm")
    assert "the average of the weights (ema) is left out" in capsys.readouterr().out
    assert torch.equal(back.extra["position"].pop("seen"), before.extra["position"].pop("seen"))
    assert back.extra == before.extra == {"position": {"epoch": 3}}
    assert "ShardedLamb.load_full_state_dict reads them; Lamb has no masters" in said

    model = cases.net(seed=9).to(torch.bfloat16)
    file = cases.load_file(tmp_path / "lamb")
    model.load_state_dict(file["model"])
    optimizer = ShardedLamb(model.named_parameters())
    optimizer.load_full_state_dict(file["optimizer"])
    full = optimizer.full_state_dict()
    assert full is not None
    for place, (name, _) in enumerate(model.named_parameters()):
        for kind in ("step", "exp_avg", "exp_avg_sq", "master"):
            assert torch.equal(full["state"][place][kind], before.states[name][kind]), (name, kind)
    single = Lamb(model.named_parameters())
    single.load_state_dict(file["optimizer"])
    assert single.param_groups[0]["exclude_from_weight_decay"] == ("bias$",)
