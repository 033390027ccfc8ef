"""Trust ratios of a LAMB that takes DeepSpeed's flat partitions for parameters, relative to the exact ones.

    torchrun --nproc-per-node 2 -m sharded_lamb.bench.naive_ratios

LAMB's step of a tensor is η (‖w‖/‖u‖) u, so its length is η ‖w‖, whichever optimizer computes it. A BERT encoder trains
for some steps under each ZeRO stage; at the last one, ‖w after - w before‖ / (η ‖w before‖) of every tensor is the
quotient of the used and the exact ratio. "naive" is a LAMB that does not know partitions (`sharded_lamb.Lamb`; every
LAMB for whole tensors behaves alike there).
"""

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    import sharded_lamb.deepspeed as plugin
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}; pip install 'sharded-lamb[deepspeed,bert]'")
from sharded_lamb import Lamb
from sharded_lamb.bench.report import dumped
from sharded_lamb.pictures import figure

LR = 1e-3


def build(layers: int, hidden: int, seed: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = BertForMaskedLM(config)
    return model


def quotients(stage: int, naive: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """{parameter: ratio used / exact ratio} at the last step. Collective."""
    model = build(arguments.layers, arguments.hidden, arguments.seed)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    if naive:
        config["zero_allow_untested_optimizer"] = True
        optimizer = Lamb(model.parameters(), lr=LR, weight_decay=0.01)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    else:
        config["optimizer"] = {"type": "ShardedLamb", "params": {"lr": LR, "weight_decay": 0.01}}
        engine, *_ = deepspeed.initialize(model=model, config=config)
    generator = torch.Generator().manual_seed(arguments.seed + dist.get_rank())
    before = {}
    for step in range(arguments.steps):
        tokens = torch.randint(0, 8192, (arguments.batch, 64), generator=generator, device="cpu").to(
            engine.device
        )
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        if step == arguments.steps - 1:
            before = masters(engine.module)
        engine.step()
    after = masters(engine.module)
    engine.destroy()
    return {
        name: float((after[name] - before[name]).norm() / (LR * before[name].norm()))
        for name in before
        if before[name].any()
    }


def masters(module: nn.Module) -> dict[str, Tensor]:
    weights = {}
    for name, p in module.named_parameters():
        value = safe_get_full_fp32_param(p)
        weights[name] = (p if value is None else value).detach().double().clone()
    return weights


def summarize(by_name: Mapping[str, float]) -> dict[str, Any]:
    ordered = sorted(by_name, key=lambda name: by_name[name])
    within = sum(abs(quotient - 1) <= 0.1 for quotient in by_name.values())
    return {
        "tensors": len(ordered),
        "least": by_name[ordered[0]],
        "least_of": ordered[0],
        "median": by_name[ordered[len(ordered) // 2]],
        "most": by_name[ordered[-1]],
        "most_of": ordered[-1],
        "within_10_percent": within / len(ordered),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | least | median | most | tensors within 10 % |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['least']:.2f}x | {row['median']:.2f}x | {row['most']:.2f}x | {row['within_10_percent']:.0%} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One line a row of `table`: least to most, with the median as a dot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture, (axes,) = figure.stacked(7.5, [2.4])
    for place, (name, row) in enumerate(rows.items()):
        color = "tab:blue" if "ShardedLamb" in name else "tab:red"
        axes.plot(
            [row["least"], row["most"]], [place, place], color=color, linewidth=5, solid_capstyle="butt"
        )
        axes.plot([row["median"]], [place], "o", color=color, markeredgecolor="white", markersize=9)
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.5, 1, 2, 5, 10, 50], ["0.05", "0.1", "0.5", "1", "2", "5", "10", "50"])
    axes.set_xlim(0.03, 60)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("trust ratio used over the exact one, least, median and most of all tensors")
    figure.save(picture, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table on the first rank; returns 0."""
    parser = argparse.ArgumentParser(prog="sharded_lamb.bench.naive_ratios")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 64 a rank")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers to this file as JSON")
    parser.add_argument("--png", type=Path, help="draw them into this file")
    chosen = parser.parse_args(arguments)
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed(verbose=False)
    plugin.register()
    rows = {}
    for stage in chosen.stages:
        for name, naive in (("naive", True), ("ShardedLamb", False)):
            rows[f"ZeRO-{stage}, {name}"] = summarize(quotients(stage, naive, chosen))
    if dist.get_rank() == 0:
        print(table(rows))
        if chosen.png is not None:
            draw(rows, chosen.png)
        if chosen.out is not None:
            about = {
                "date": str(datetime.date.today()),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
            versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
            model = {"layers": chosen.layers, "hidden": chosen.hidden, "steps": chosen.steps}
            content = {
                **about,
                **versions,
                "ranks": dist.get_world_size(),
                **model,
                "ratio over exact ratio": rows,
            }
            chosen.out.write_text(dumped(content))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
