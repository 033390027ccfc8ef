"""What a ds_config means beside the same words in Python, in the Trainer's hands, and without the import."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharded_lamb import Lamb, ShardedLamb
from tests.deepspeed import cases
from tests.harness import run_ranks

pytest.importorskip("deepspeed")


def test_the_trainers_auto_gives_its_epsilon_and_not_lambs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    for epsilon, arguments in ((1e-8, {}), (1e-6, {"adam_epsilon": 1e-6})):
        config = HfTrainerDeepSpeedConfig(cases.config(1, params={"lr": 0.01, "eps": "auto"}))
        config.trainer_config_process(
            TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **arguments)
        )
        assert config.config["optimizer"]["params"]["eps"] == epsilon


def test_the_variant_of_deepspeed_has_its_epsilon_and_decay_in_a_config_alone() -> None:
    """README says so: no variant of Python's fills eps and weight_decay."""
    from sharded_lamb.deepspeed import DeepSpeedLamb

    params = list(nn.Linear(2, 2).parameters())
    for make, expected in (
        (DeepSpeedLamb, (1e-8, 0.0)),
        (ShardedLamb, (1e-6, 0.01)),
        (Lamb, (1e-6, 0.01)),
    ):
        kind: Any = make
        group = kind(params, variant="deepspeed").param_groups[0]
        assert (group["eps"], group["weight_decay"]) == expected


def without_import(rank: int) -> None:
    import deepspeed

    import sharded_lamb.deepspeed as plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.optim, "ShardedLamb")
        with pytest.raises(AssertionError, match="ShardedLamb is not a supported DeepSpeed Optimizer"):
            deepspeed.initialize(model=cases.tiny(), config=cases.config(1))
    plugin.register()


def test_a_missing_import_gives_deepspeeds_own_message() -> None:
    run_ranks(1, without_import)
