import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from sharded_lamb.__main__ import main
from sharded_lamb.bert import dryrun, optim
from sharded_lamb.bert.config import CosineConfig, build_config, load_config
from sharded_lamb.bert.dryrun import describe
from sharded_lamb.bert.ds_config import ds_config
from sharded_lamb.recipes.training.config_io import dump_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAIRS = ("bert-quickstart", "bert-base", "bert-large-phase1", "bert-large-phase2", "bert-large-64k-paper")


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("model.layrs=2", "'model.layrs'", "'layers'"),
        ("sede=2", "'sede'", "'seed'"),
        ("phases.0.global_bacth=8", "'phases.0.global_bacth'", "'global_batch'"),
        ("phases.0.ramp={strat: 2, steps: 3}", "'phases.0.ramp.strat'", "'start'"),
        ("optimizer.weight_decai=0.1", "'optimizer.weight_decai'", "'weight_decay'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(
    tree: dict[str, Any], override: str, key: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match="unknown key") as error:
        build_config(tree, [override])
    assert f"unknown key {key}: did you mean {nearest}?" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers=two", r"model\.layers='two': .*integer"),
        ("model.layers=0", r"model\.layers=0: expected a positive number"),
        ("model.hidden_size=33", r"model\.hidden_size=33: expected a multiple of model\.heads=2"),
        ("parallel=zero3", r"parallel='zero3': .*'zero2'"),
        ("masking.probability=15", r"masking\.probability=15: expected a number in \(0, 1\)"),
        (
            "phases.0.sequence_length=64",
            r"phases\.0\.sequence_length=64: expected at most model\.max_positions=32",
        ),
        ("phases.1.lr=1", r"phases\.1\.lr=1: expected an index below 1"),
        ("seed.value=1", r"'seed' is a value, it has no keys"),
        ("layers", r"override='layers': expected key=value"),
        ("data.source=my.txt", r"data\.source='my\.txt': expected a list: data\.source=\[my\.txt\]$"),
        ("optimizer.betas=0.9", r"optimizer\.betas=0\.9: expected a list$"),
        ("phases={lr: 1}", r"phases=\{'lr': 1\}: expected a list$"),
        ("phases[0].lr=1", r"override='phases\[0\]\.lr=1': expected key=value, .* or phases\.0\.lr"),
        ("phases.0.lr=-1", r"phases\.0\.lr=-1: expected 'auto' or a positive number$"),
        ("phases.0.ramp={start: 0, steps: 3}", r"phases\.0\.ramp\.start=0: expected a positive number$"),
        ("optimizer.eps=0", r"optimizer\.eps=0: expected a positive number$"),
        ("optimizer.betas=[0.9, 1]", r"optimizer\.betas\.1=1: expected a number in \[0, 1\)$"),
        ("optimizer.max_grad_norm=0", r"=0: expected null or a positive number; null switches clipping off$"),
        ("checkpoint.requeue_exit_code=256", r"checkpoint\.requeue_exit_code=256: expected 1 to 255$"),
        ("run_dir=[", r"override 'run_dir=\[': the value is not valid YAML"),
        ("phases.0.max_predictions=-1", r"phases\.0\.max_predictions=-1: expected null or a positive number"),
        ("phases.0.max_micro_batch=0", r"phases\.0\.max_micro_batch=0: expected null or a positive number"),
        ("log.heldout_batches=-1", r"log\.heldout_batches=-1: expected null or a positive number"),
        ("speed.peak_tflops=0", r"speed\.peak_tflops=0: expected null or a positive number"),
        ("phases=[]", r"phases=\(\): expected at least one phase"),
        ("data.source=[]", r"data\.source=\(\): expected at least one"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    tree: dict[str, Any], override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(tree, [override])


def test_overrides_reach_nested_and_listed_settings(tree: dict[str, Any]) -> None:
    config = build_config(
        tree, ["phases.0.lr=6e-3", "data.source=[a, b]", "phases.0.ramp.start=2", "phases.0.ramp.steps=4"]
    )
    assert config.phases[0].lr == 0.006
    assert config.data.source == ("a", "b")
    assert config.phases[0].ramp is not None
    assert config.phases[0].ramp.start == 2


def test_a_tilde_is_the_home_folder(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    config = build_config(tree, ["run_dir=~/runs/a", "data.prepared='~/data'", "start_from='~/b'"])
    assert (config.run_dir, config.data.prepared, config.start_from) == (
        "/elsewhere/runs/a",
        "/elsewhere/data",
        "/elsewhere/b",
    )


def test_a_dollar_sign_is_text(tree: dict[str, Any]) -> None:
    assert build_config(tree, ["run_dir=runs/${USER}"]).run_dir == "runs/${USER}"


def test_settings_are_checked_wherever_they_come_from(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        dataclasses.replace(build_config(tree).phases[0], steps=0)


def test_the_resolved_configuration_reads_back(tree: dict[str, Any]) -> None:
    config = build_config(tree, ["phases.0.lr=auto", "log.fill_mask=['a [MASK]']"])
    assert build_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("command", "config", "user"),
    [
        (["pretrain"], "vision-rsb-a2", "`sharded-lamb vision train`"),
        (["vision", "train"], "bert-quickstart", "`sharded-lamb pretrain`"),
        (["vision", "train"], "deepspeed/zero1", "DeepSpeed"),
    ],
)
def test_a_configuration_of_another_command_is_named(
    command: list[str], config: str, user: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--config", config]) == 2
    said = f"sharded-lamb {command[0]}: --config {config}: {config} is a configuration of {user}\n"
    assert capsys.readouterr().err == said


def test_files_that_are_no_configuration_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(
        ValueError, match=r"--config .*a\.yaml: the `base` of .*b\.yaml leads back to .*a\.yaml"
    ):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"--config .*c\.yaml: not valid YAML"):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_names_a_near_one() -> None:
    with pytest.raises(
        ValueError, match=r"bert-quikstart\.yaml: no such file; did you mean .*bert-quickstart"
    ):
        load_config(CONFIGS / "bert-quikstart.yaml")


def test_the_digest_ignores_where_and_how_fast(tree: dict[str, Any]) -> None:
    config = build_config(tree)
    for same in (
        "run_dir=x",
        "speed.compile=true",
        "checkpoint.keep=9",
        "batch.max_micro_batch=3",
        "parallel=ddp+zero1",
    ):
        assert build_config(tree, [same]).digest() == config.digest()
    for other in ("seed=4", "phases.0.lr=0.02", "model.dropout=0.1", "optimizer.eps=1e-8", "data.nsp=true"):
        assert build_config(tree, [other]).digest() != config.digest()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("bert-*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_describes_itself(path: Path) -> None:
    text = describe(load_config(path), 8)
    assert "global batch" in text
    assert path.read_text().startswith("#"), "each says where its settings come from"


@pytest.mark.parametrize("name", PAIRS)
def test_each_config_has_a_twin_that_differs_in_the_optimizer_only(name: str) -> None:
    lamb, adamw = load_config(CONFIGS / f"{name}.yaml"), load_config(CONFIGS / f"{name}-adamw.yaml")
    assert lamb.optimizer.variant != "adamw"
    assert adamw.optimizer.variant == "adamw"
    assert [_without_lr(p) for p in lamb.phases] == [_without_lr(p) for p in adamw.phases]
    same = {
        "run_dir": "",
        "start_from": None,
        "phases": lamb.phases,
        "optimizer": dataclasses.replace(lamb.optimizer, variant="adamw"),
    }
    assert dataclasses.replace(lamb, **same) == dataclasses.replace(
        adamw, **{**same, "optimizer": adamw.optimizer}
    )


def _without_lr(phase: Any) -> Any:
    return dataclasses.replace(phase, lr="auto")


def test_the_published_settings_of_bert_large() -> None:
    one, two = (load_config(CONFIGS / f"bert-large-phase{n}.yaml") for n in (1, 2))
    first, second = one.phases[0], two.phases[0]
    assert (first.global_batch, first.sequence_length, first.max_predictions) == (65536, 128, 20)
    assert (first.lr, first.steps, first.warmup_fraction, first.decay_power) == (6e-3, 7038, 0.2843, 0.5)
    assert (second.global_batch, second.sequence_length, second.max_predictions) == (32768, 512, 80)
    assert (second.lr, second.steps, second.warmup_fraction, second.decay_power) == (4e-3, 1563, 0.128, 0.5)
    assert "336,232,258 parameters" in describe(one, 8)
    paper = load_config(CONFIGS / "bert-large-64k-paper.yaml")
    assert sum(phase.steps for phase in paper.phases) == 8599


def test_the_published_settings_of_gpt_bert() -> None:
    """arXiv 2410.24159, table 3 (STRICT) and section 2.2; the batch of its script at each step, within 2 %."""
    config = load_config(CONFIGS / "bert-gpt-bert-babylm.yaml")
    shape = config.model
    assert (shape.layers, shape.hidden_size, shape.intermediate_size, shape.heads) == (12, 768, 2560, 12)
    assert (config.masking.causal_fraction, config.tokenizer.vocab_size) == (1 / 16, 16384)
    assert config.cosine == CosineConfig(lr=0.01, warmup_fraction=0.016, final_fraction=0.1)
    rule = config.optimizer
    assert (rule.betas, rule.eps, rule.weight_decay, rule.max_grad_norm) == ((0.9, 0.98), 1e-8, 0.1, 2.0)
    step, total = 0, sum(phase.steps for phase in config.phases)
    assert total == 15625
    for number, phase in enumerate(config.phases):
        plan = config.plan_batches(phase, 64)
        for at in range(0, phase.steps, 97):
            full = 32768 * 128 / phase.sequence_length
            published = full / 4 * (1 - (step + at) / total) + full * (step + at) / total
            assert abs(plan.batch_at(at) / published - 1) < 0.02, (number, at)
        step += phase.steps
    described = describe(config, 64)
    assert "averages 5 MiB" in described
    assert "cosine to 0.001 after 15,625 steps of all phases" in described


def test_formats_of_state_and_gathers_reach_the_optimizer(tree: dict[str, Any]) -> None:
    formats = ["optimizer.state_dtype=int8", "optimizer.gather_dtype=bfloat16"]
    remainders = ["optimizer.store_param_remainders=8", "speed.precision=bf16"]
    config = build_config(tree, [*formats, *remainders, "optimizer.reduce_dtype=float8_e4m3fn"])
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    with mock.patch.object(optim, "parameters_to_train", torch.nn.Module.named_parameters):
        optimizer = optim.build_optimizer(config, model, 2)
    assert optimizer.memory()["moments"] == 2 * 2 * 260
    assert optimizer.memory()["masters"] == 2 * 256
    assert optimizer.gather_dtype == torch.bfloat16
    assert optimizer._settings.reduce_dtype == torch.float8_e4m3fn
    optimizer.close()


def test_formats_are_not_deepspeeds_and_runs_without_them_keep_their_digest(tree: dict[str, Any]) -> None:
    plain = build_config(tree, [])
    named = {"state_dtype", "store_param_remainders", "gather_dtype", "reduce_dtype"}
    assert not named & plain.trained_settings()["optimizer"].keys()
    with pytest.raises(ValueError, match=r"store_param_remainders=16.*0 with speed\.precision: fp32"):
        build_config(tree, ["optimizer.store_param_remainders=16"])
    tree = {**tree, "speed": {**tree["speed"], "precision": "bf16"}}
    plain = build_config(tree, [])
    formats = ("state_dtype=int8", "gather_dtype=bfloat16", "store_param_remainders=16")
    for override in (f"optimizer.{name}" for name in formats):
        assert build_config(tree, [override]).digest() != plain.digest()
        with pytest.raises(ValueError, match="with parallel: deepspeed, which stores and gathers by itself"):
            build_config(tree, [override, "parallel=deepspeed"])
    override = "optimizer.reduce_dtype=bfloat16"
    assert build_config(tree, [override]).digest() != plain.digest()
    for parallel in ("deepspeed", "fsdp2", "ddp+zero1"):
        with pytest.raises(ValueError, match=r"null with parallel: .*, where gradients are reduced outside"):
            build_config(tree, [override, f"parallel={parallel}"])


def test_a_dry_run_counts_masters_of_24_bits(tree: dict[str, Any]) -> None:
    bits = ("store_param_remainders=8", "store_param_remainders=16", "store_param_remainders=0")
    sizes = []
    for name in bits:
        config = build_config(tree, [f"optimizer.{name}", "speed.precision=bf16"])
        bert = torch.nn.Module()
        bert.weight = torch.nn.Parameter(torch.zeros(4, 256, dtype=torch.bfloat16))
        with mock.patch.object(dryrun, "parameters_to_train", torch.nn.Module.named_parameters):
            sizes.append(dryrun.memory(config, bert, 1)["optimizer state"])
    assert [size - 1024 * 8 for size in sizes] == [1024, 2048, 4096]


BLOCKS = "optimizer.ratio_blocks={weight: 2, ^bias: dim0}"


def test_ratio_blocks_reach_the_optimizer_and_deepspeed(tree: dict[str, Any]) -> None:
    config = build_config(tree, [BLOCKS])
    model = torch.nn.Linear(3, 2)
    with mock.patch.object(optim, "parameters_to_train", torch.nn.Module.named_parameters):
        optimizer = optim.build_optimizer(config, model, 1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert sorted(optimizer.trust_ratios()) == ["bias[0]", "bias[1]", "weight[0]", "weight[1]"]
        optimizer.close()
        inside = build_config(tree, [BLOCKS, "optimizer.state_dtype=int8"])
        with pytest.raises(ValueError, match=r"'weight' .* has 2 ratio blocks and 8-bit moments"):
            optim.build_optimizer(inside, model, 1)
    params = ds_config(build_config(tree, [BLOCKS, "parallel=deepspeed"]), 1)["optimizer"]["params"]
    assert params["ratio_blocks"] == {"weight": 2, "^bias": "dim0"}
    plain = build_config(tree, [])
    assert "ratio_blocks" not in plain.trained_settings()["optimizer"]
    assert config.digest() != plain.digest() == build_config(tree, ["optimizer.ratio_blocks={}"]).digest()


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("{qkv: 0}", r"optimizer.ratio_blocks.qkv=0: expected a number of blocks >= 1, or dim0"),
        ("{qkv: rows}", r"optimizer.ratio_blocks.qkv='rows': expected a number of blocks"),
        ("{qkv: true}", r"optimizer.ratio_blocks.qkv=True: expected"),
        ("{'(': 2}", r"optimizer.ratio_blocks: '\(' is not a regular expression"),
        ("[qkv]", "optimizer.ratio_blocks="),
    ],
)
def test_ratio_blocks_that_no_model_can_have_are_refused(
    tree: dict[str, Any], blocks: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        build_config(tree, [f"optimizer.ratio_blocks={blocks}"])
