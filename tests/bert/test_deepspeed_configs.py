"""configs/deepspeed: every file trains a step, and says what its README says."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb.bert.config import load_config
from sharded_lamb.bert.schedule import build_schedule
from tests.harness import run_ranks

pytest.importorskip("deepspeed")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted((CONFIGS / "deepspeed").glob("*.json"))
README = (CONFIGS / "deepspeed" / "README.md").read_text()


class Tiny(torch.nn.Module):
    """Names as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(24, 24)
        self.LayerNorm = torch.nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x)).float().square().mean()


def shrunk(path: Path) -> dict[str, Any]:
    """The file with 2 sequences a rank in place of its batch."""
    config: dict[str, Any] = json.loads(path.read_text())
    config.pop("train_batch_size", None)
    return {**config, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}


def steps_with(rank: int, paths: list[Path]) -> dict[str, Any]:
    """{file: (stage, the optimizer's class, variant, whether weights decay, how far the weights moved)}."""
    import deepspeed
    from deepspeed.utils import groups, safe_get_full_fp32_param

    import sharded_lamb.deepspeed  # noqa: F401

    importlib.reload(groups)
    deepspeed.logger.setLevel("ERROR")
    linear = torch.nn.functional.linear
    results = {}
    for path in paths:
        torch.manual_seed(1)
        engine = deepspeed.initialize(model=Tiny(), config=shrunk(path))[0]
        start = safe_get_full_fp32_param(engine.module.dense.weight).clone()
        for _ in range(3):  # DeepSpeed's schedulers give the first two steps a rate of 0
            engine.backward(engine(torch.randn(2, 24, dtype=torch.bfloat16)))
            engine.step()
        end = safe_get_full_fp32_param(engine.module.dense.weight)
        group = engine.basic_optimizer.param_groups[0]
        names = sorted(engine.basic_optimizer.trust_ratios())
        lamb = engine.basic_optimizer
        results[path.stem] = (
            engine.zero_optimization_stage(),
            type(lamb).__name__,
            group["variant"],
            group["lr"],
            names,
            float((end - start).norm()),
        )
        torch.distributed.barrier()
        engine.destroy()
    torch.nn.functional.linear = linear  # ZeRO 3 replaces it
    importlib.reload(groups)
    return results


def test_every_file_trains() -> None:
    assert len(FILES) == 7
    both = run_ranks(2, steps_with, FILES)
    assert both[0] == both[1]
    for path in FILES:
        stage, kind, variant, lr, names, moved = both[0][path.stem]
        assert kind == "DeepSpeedLamb"
        assert stage == int(re.sub(r"\D", "", path.stem)) if path.stem.startswith("zero") else 1
        assert variant == ("lamb" if path.stem.startswith("zero") else "apex")
        assert names == ["LayerNorm.bias", "LayerNorm.weight", "dense.bias", "dense.weight"]
        assert 0 < lr <= 6e-3
        assert moved > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_explained(path: Path) -> None:
    assert f"`{path.name}`" in README


@pytest.mark.parametrize("number", [1, 2])
def test_bert_large_is_the_recipes(number: int) -> None:
    recipe = load_config(CONFIGS / f"bert-large-phase{number}.yaml")
    config = json.loads((CONFIGS / "deepspeed" / f"bert-large-phase{number}.json").read_text())
    (phase,) = recipe.phases
    params, scheduler = config["optimizer"]["params"], config["scheduler"]["params"]
    assert config["train_batch_size"] == phase.global_batch
    assert config["train_micro_batch_size_per_gpu"] == recipe.max_micro_batch(phase)
    assert config["gradient_clipping"] == recipe.optimizer.max_grad_norm
    assert params["lr"] == scheduler["warmup_max_lr"] == phase.lr
    assert scheduler["total_num_steps"] == phase.steps
    assert scheduler["warmup_num_steps"] == build_schedule(phase).warmup_steps
    for name in ("variant", "eps", "weight_decay"):
        assert params[name] == getattr(recipe.optimizer, name)
    for name in ("betas", "exclude_from_weight_decay"):
        assert tuple(params[name]) == getattr(recipe.optimizer, name)


def published_rates(rank: int, steps: int) -> list[float]:
    """The rates of an engine that README's scheduler drives, in a phase of ``steps``."""
    import deepspeed
    from deepspeed.utils import groups

    import sharded_lamb.deepspeed  # noqa: F401

    importlib.reload(groups)
    deepspeed.logger.setLevel("ERROR")
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "published" in s)
    space: dict[str, Any] = {"torch": torch}
    exec(snippet.split("\n\n\nengine")[0], space)
    engine = deepspeed.initialize(
        model=Tiny(),
        config=shrunk(CONFIGS / "deepspeed" / "bert-large-phase1.json"),
        lr_scheduler=lambda optimizer: space["published"](optimizer, steps=steps),
    )[0]
    rates = []
    for _ in range(steps):
        rates.append(engine.basic_optimizer.param_groups[0]["lr"])
        engine.backward(engine(torch.randn(2, 24, dtype=torch.bfloat16)))
        engine.step()
    torch.distributed.barrier()
    engine.destroy()
    importlib.reload(groups)
    return rates


def test_the_scheduler_of_the_readme_is_the_published_one() -> None:
    steps = 20
    (phase,) = load_config(CONFIGS / "bert-large-phase1.yaml", [f"phases.0.steps={steps}"]).phases
    schedule = build_schedule(phase)
    rates = run_ranks(2, published_rates, steps)[0]
    assert rates[0] == 0
    after = range(schedule.warmup_steps + 1, steps)
    assert [rates[step] for step in after] == pytest.approx([schedule.lr(step) for step in after])
    assert rates[3] == pytest.approx(6e-3 * 3 / steps / 0.2843)
