"""apex's FusedLAMB, which needs a GPU: files in its source's layout, of a run of the float64 oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharded_lamb import Lamb, checkpoint
from sharded_lamb.checkpoint.in_memory import read_contents
from tests import training
from tests.convert import cases
from tests.oracle import OracleLamb, variant_options

KEYS = {
    "lr",
    "bias_correction",
    "betas",
    "eps",
    "weight_decay",
    "grad_averaging",
    "max_grad_norm",
    "step",
    "params",
}
"""Keys of a group after a step, as in apex/optimizers/fused_lamb.py."""


def oracle_run(variant: str, steps: range, oracle: OracleLamb | None = None) -> OracleLamb:
    start = {name: value.numpy() for name, value in cases.params(cases.net()).items()}
    if oracle is None:
        oracle = OracleLamb(start, **cases.LAMB, **variant_options(variant, start))
        for name in ("norm.weight", "norm.bias"):
            oracle.options[name]["weight_decay"] = 0.0
    for step in steps:
        grads = {n: training.draw(p.shape, "gradient", n, step).bfloat16().double() for n, p in start.items()}
        oracle.step({name: grad.numpy() for name, grad in grads.items()})
    return oracle


def apex_file(oracle: OracleLamb, model: cases.Net, half: bool = False) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    decayed, rest = [n for n in names if "norm" not in n], [n for n in names if "norm" in n]
    common = {
        "lr": 0.02,
        "bias_correction": True,
        "betas": (0.9, 0.98),
        "eps": 1e-6,
        "grad_averaging": True,
        "max_grad_norm": 1.0,
        "step": 4,
    }
    positions = {name: i for i, name in enumerate([*decayed, *rest])}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.asarray(oracle.params[name])))
    masters = [p.detach().clone() for n in [*decayed, *rest] for p in [dict(model.named_parameters())[n]]]
    state = {
        place: {
            "exp_avg": torch.from_numpy(np.asarray(oracle.m[name])).float(),
            "exp_avg_sq": torch.from_numpy(np.asarray(oracle.v[name])).float(),
        }
        for name, place in positions.items()
    }
    groups = [
        {**common, "weight_decay": 0.1, "params": [positions[n] for n in decayed]},
        {**common, "weight_decay": 0.0, "params": [positions[n] for n in rest]},
    ]
    file = {
        "model": (model.half() if half else model).state_dict(),
        "optimizer": {"state": state, "param_groups": groups},
    }
    return {**file, "master params": masters} if half else file


@pytest.mark.parametrize("variant", ["apex", "nvlamb"])
def test_we_continue_like_the_oracle(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = oracle_run(variant, range(4))
    torch.save(apex_file(oracle, cases.net()), tmp_path / "theirs")
    named = [n for n, _ in cases.net().named_parameters() if "norm" not in n] + ["norm.weight", "norm.bias"]
    (tmp_path / "names").write_text("\n".join(named))
    given = ["--variant", variant] if variant != "apex" else []
    cases.convert(
        tmp_path / "theirs", tmp_path / "ours", "apex", "sharded_lamb", "--names", f"{tmp_path}/names", *given
    )
    assert ("do not hold use_nvlamb and adam_w_mode" in capsys.readouterr().out) is (variant == "apex")

    model = cases.net(seed=9)
    optimizer = Lamb(cases.groups_of(model, [named[:-2], named[-2:]]))
    checkpoint.load(tmp_path / "ours", model, optimizer)
    cases.train(model, optimizer, range(4, 9))
    oracle_run(variant, range(4, 9), oracle)
    expected = {name: torch.from_numpy(np.asarray(value)) for name, value in oracle.params.items()}
    cases.assert_close(cases.params(model), expected, 2e-6)


def test_masters_of_amp(tmp_path: Path) -> None:
    oracle = oracle_run("apex", range(4))
    file = apex_file(oracle, cases.net(), half=True)
    torch.save(file, tmp_path / "theirs")
    named = [n for n, _ in cases.net().named_parameters() if "norm" not in n] + ["norm.weight", "norm.bias"]
    (tmp_path / "names").write_text("\n".join(named))
    cases.convert(
        tmp_path / "theirs", tmp_path / "ours", "apex", "sharded_lamb", "--names", f"{tmp_path}/names"
    )
    contents = read_contents(tmp_path / "ours")
    for name, master in zip(named, file["master params"], strict=True):
        assert contents.weights[name].dtype == torch.float16
        assert torch.equal(contents.states[name]["master"], master)


@pytest.mark.parametrize("to", ["sharded_lamb", "timm"])
def test_masters_of_amp_replace_weights_that_it_saved_in_fp32(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """O2's state_dict() is fp32 with fp16's values. One parameter was never stepped, as a frozen one."""
    file = apex_file(oracle_run("apex", range(4)), cases.net(), half=True)
    file["model"] = {name: value.float() for name, value in file["model"].items()}
    del file["optimizer"]["state"][0]
    torch.save(file, tmp_path / "theirs")
    named = [n for n, _ in cases.net().named_parameters() if "norm" not in n] + ["norm.weight", "norm.bias"]
    (tmp_path / "names").write_text("\n".join(named))
    cases.convert(tmp_path / "theirs", tmp_path / "to", "apex", to, "--names", f"{tmp_path}/names")
    rounded = sum(
        not torch.equal(file["model"][name], master)
        for name, master in zip(named, file["master params"], strict=True)
    )
    assert rounded > 3
    assert f"{rounded} weights are replaced by amp's masters" in capsys.readouterr().out
    is_ours = to == "sharded_lamb"
    weights = read_contents(tmp_path / "to").weights if is_ours else cases.load_file(tmp_path / "to")["model"]
    for name, master in zip(named, file["master params"], strict=True):
        assert torch.equal(weights[name], master), name


def test_written_files_have_the_keys_of_fused_lamb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = cases.trained(variant="apex", exclude_from_weight_decay=cases.PATTERNS)
    cases.saved(tmp_path / "ours", model, optimizer)
    cases.convert(tmp_path / "ours", tmp_path / "file", "sharded_lamb", "apex")
    said = capsys.readouterr().out
    assert "use_nvlamb=False, adam_w_mode=True, max_grad_norm=1.0" in said
    file = cases.load_file(tmp_path / "file")
    own = dict(model.named_parameters())
    for group in file["optimizer"]["param_groups"]:
        assert group.keys() == KEYS | {"param_names"}
        assert group["step"] == 4
        for place, name in zip(group["params"], group["param_names"], strict=True):
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1)
            state = file["optimizer"]["state"][place]
            assert state.keys() == {"exp_avg", "exp_avg_sq"}
            assert torch.equal(state["exp_avg"], optimizer.state[own[name]]["exp_avg"])
