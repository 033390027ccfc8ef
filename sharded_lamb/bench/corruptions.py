"""Loads damaged checkpoints: every rank must refuse each by name, or load it right.

torchrun --nproc-per-node 2 -m sharded_lamb.bench.corruptions --count 500 --json corruptions.json
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import ShardedLamb, checkpoint
from sharded_lamb.bench.report import about, dumped
from sharded_lamb.core.host_values import as_tensor

Damage = Callable[[random.Random, Path, Path], str]
"""(random numbers, a checkpoint, another of the same run) → description of the damage, for the report."""


def _any_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def flip_a_bit(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} of {path.name} flipped"


def zero_a_block(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    path.write_bytes(data)
    return f"512 bytes of {path.name} zeroed from {at} on"


def truncate(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    size = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.name} truncated to {size} bytes"


def extend(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))
    return f"{path.name} extended"


def delete(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    path.unlink()
    return f"{path.name} deleted"


def swap(rng: random.Random, folder: Path, other: Path) -> str:
    one, two = rng.sample(sorted(folder.iterdir()), 2)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    return f"{one.name} and {two.name} swapped"


def from_another(rng: random.Random, folder: Path, other: Path) -> str:
    path = rng.choice(sorted(other.iterdir()))
    shutil.copy(path, folder / path.name)
    return f"{path.name} of another step"


def garbage(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    path.write_bytes(rng.randbytes(rng.randrange(path.stat().st_size + 1)))
    return f"{path.name} of random bytes"


def folder_for_file(rng: random.Random, folder: Path, other: Path) -> str:
    path = _any_file(rng, folder)
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def unexpected_file(rng: random.Random, folder: Path, other: Path) -> str:
    (folder / f"{rng.randrange(10**6)}.tmp").write_bytes(rng.randbytes(10))
    return "a file more"


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    flip_a_bit,
    flip_a_bit,
    zero_a_block,
    truncate,
    extend,
    delete,
    swap,
    from_another,
    garbage,
    folder_for_file,
    unexpected_file,
)


def _build() -> tuple[nn.Module, ShardedLamb]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 17), nn.LayerNorm(17), nn.Linear(17, 5))
    return model, ShardedLamb(model.named_parameters(), lr=0.01, stage=1)


def _step(model: nn.Module, opt: ShardedLamb, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device="cpu")
    opt.step()


def _loaded_state(model: nn.Module, opt: ShardedLamb) -> dict[str, Tensor]:
    """The tensors on this rank that a load writes."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for place, state in opt.state_dict()["state"].items():
        tensors |= {f"{place}.{kind}": as_tensor(value).clone() for kind, value in state.items()}
    tensors |= {
        f"lr {i}": torch.tensor(float(group["lr"]), device="cpu") for i, group in enumerate(opt.param_groups)
    }
    return tensors


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class Trial:
    """An intact checkpoint, another of the same run, and a model that loads damaged copies. Collective."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.model, self.opt = _build()
        for number in range(2):
            _step(self.model, self.opt, number)
            checkpoint.save(folder / f"whole-{number}", self.model, self.opt, {"position": {"step": number}})
        self.expected = _loaded_state(self.model, self.opt)

    def run(self, seed: int) -> dict[str, Any]:
        """Damage a copy and load it; returns the damage and this rank's outcome. Collective."""
        damaged, damage = self.folder / "damaged", ""
        if self.rank == 0:
            rng = random.Random(seed)
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(self.folder / "whole-1", damaged)
            damage = rng.choice(DAMAGES)(rng, damaged, self.folder / "whole-0")
        if dist.is_initialized():
            dist.barrier()
        for p in self.model.parameters():
            p.data.fill_(7)  # shows parameters that are not loaded
        before = _loaded_state(self.model, self.opt)
        try:
            extra = checkpoint.load(damaged, self.model, self.opt, {"position": {}})
        except checkpoint.CheckpointError as error:
            named = str(damaged) in str(error)
            outcome = (
                "refused" if named and _same(_loaded_state(self.model, self.opt), before) else "refused badly"
            )
            return {"seed": seed, "did": damage, "outcome": outcome, "message": str(error)}
        except Exception as error:
            return {
                "seed": seed,
                "did": damage,
                "outcome": "failed",
                "message": f"{type(error).__name__}: {error}",
            }
        right = _same(_loaded_state(self.model, self.opt), self.expected) and extra["position"] == {"step": 1}
        return {
            "seed": seed,
            "did": damage,
            "outcome": "loaded right" if right else "loaded wrong",
            "message": "",
        }


def _report(rows: list[dict[str, Any]], counts: Counter[str], count: int) -> str:
    module = "-m sharded_lamb.bench.corruptions"
    command = f"torchrun --nproc-per-node {len(rows[0]['outcomes'])} {module} --count {count}"
    return dumped({**about(torch.device("cpu")), "command": command, "counts": counts, "rows": rows})


GOOD = ("refused", "loaded right")


def main() -> int:
    """Returns 1 if some rank neither refused a damaged checkpoint by name nor loaded it right, else 0."""
    parser = argparse.ArgumentParser(prog="python -m sharded_lamb.bench.corruptions", description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first damage")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    folder = [tempfile.mkdtemp(prefix="corruptions-")]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, src=0)
    trial = Trial(Path(folder[0]))
    rows: list[dict[str, Any]] = []
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        seen: list[Any] = [trial.run(seed)]
        if dist.is_initialized():
            seen *= dist.get_world_size()
            dist.all_gather_object(seen, seen[trial.rank])
        rows.append({**seen[0], "message": seen[0]["message"].replace(folder[0], "FOLDER")})
        rows[-1]["outcomes"] = [one["outcome"] for one in seen]
    bad = [row for row in rows if not {*row["outcomes"]} <= {*GOOD} or len({*row["outcomes"]}) > 1]
    if trial.rank == 0:
        counts = Counter(row["outcome"] for row in rows)
        print(
            f"{len(rows)} damaged checkpoints: "
            + ", ".join(f"{n} {what}" for what, n in counts.most_common())
        )
        for row in bad:
            print(f"  {row}", file=sys.stderr)
        if chosen.json:
            chosen.json.write_text(_report(rows, counts, chosen.count))
        shutil.rmtree(folder[0])
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
