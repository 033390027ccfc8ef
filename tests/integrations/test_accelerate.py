"""Accelerate on two ranks: one-line prepare with DDP and with FSDP2, exact, and resumed from its own folders."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from sharded_lamb import ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.integrations import regression
from tests.integrations.regression import Regression
from tests.sharding.test_whole_states import begin_anew

pytest.importorskip("accelerate")
KINDS = pytest.mark.parametrize("kind", ["ddp", "fsdp2", "stage 2"])


def accelerator_of(kind: str, **options: Any) -> Any:
    """On a CPU, Accelerate selects no FSDP, but runs it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin_anew()
    accelerator = Accelerator(cpu=True, **options)
    if kind.startswith("fsdp2"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="size_based_wrap",
            min_num_params=50,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT" if kind == "fsdp2, full" else "SHARDED_STATE_DICT",
        )
        if options.get("mixed_precision"):
            plugin.set_mixed_precision(options["mixed_precision"])
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


class Run:
    """The canonical program. "stage 2": the model is prepared without DDP."""

    def __init__(self, kind: str, clip: float | None = None, **options: Any) -> None:
        self.accelerator, self.clip = accelerator_of(kind, **options), clip
        self.bare = Regression(scalar=not kind.startswith("fsdp2"))
        self.lamb = ShardedLamb(
            self.bare.named_parameters(),
            lr=0.02,
            exclude_from_weight_decay=["bias$", "norm"],
            stage=2 if kind == "stage 2" else 1,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(self.lamb, lambda step: 1 / (1 + step))
        prepared = self.lamb, DataLoader(regression.DATA, batch_size=2), schedule
        if kind == "stage 2":
            self.model = self.accelerator.prepare_model(self.bare, evaluation_mode=True)
            self.optimizer, self.loader, self.schedule = self.accelerator.prepare(*prepared)
        else:
            self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
                self.bare, *prepared
            )

    def train(self, batches: int, skip: int = 0) -> None:
        loader = self.accelerator.skip_first_batches(self.loader, skip)
        for batch, _ in zip(loader, range(batches), strict=False):
            with self.accelerator.accumulate(self.model):
                (loss,) = self.model(**batch)
                self.accelerator.backward(loss)
                if self.clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        found = {name.removeprefix("module."): p.detach() for name, p in self.model.named_parameters()}
        return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in found.items()}

    def bits(self) -> dict[str, Tensor]:
        found = {name: value.clone() for name, value in self.weights().items()}
        for position, entry in (self.lamb.full_state_dict() or {"state": {}})["state"].items():
            found.update({f"{position}/{key}": torch.as_tensor(value) for key, value in entry.items()})
        return found


# -- exact ------------------------------------------------------------------------------------------------------------


def rate(step: int) -> float:
    """Accelerate steps a schedule once for each rank."""
    return 0.02 / (1 + 2 * step)


EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"micro_batches": 2}),
    "clipping": ({"clip": 0.5}, {"max_grad_norm": 0.5}),
}


def trained(rank: int, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    run = Run(kind, **options)
    run.train(4)
    return {
        "weights": run.weights(),
        "seen": run.bare.seen,
        "ratios": run.lamb.trust_ratios(),
        "model": type(run.model).__name__,
    }


@KINDS
@pytest.mark.parametrize("case", EXACT)
def test_accelerate_follows_lamb_over_the_global_batch(case: str, kind: str) -> None:
    options, expected = EXACT[case]
    ranks = run_ranks(2, trained, kind, options)
    wrapped = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPRegression", "stage 2": "Regression"}[kind]
    assert [found["model"] for found in ranks] == [wrapped, wrapped]
    oracle = regression.follow(
        [found["seen"] for found in ranks], lr=rate, scalar=kind != "fsdp2", **expected
    )
    for found in ranks:
        regression.assert_follows(found["weights"], oracle)
        assert found["ratios"] == pytest.approx(oracle.ratios, rel=1e-4)


def trained_in_bf16(rank: int, kind: str) -> dict[str, Any]:
    """Steps the reference with the gradients that the optimizer gets."""
    run = Run(kind, mixed_precision="bf16")
    oracle = training.oracle_run(run.weights(), [], no_decay=regression.NO_DECAY)
    step = run.lamb.step

    def watched(closure: Any = None) -> None:
        for options in oracle.options.values():
            options["lr"] = run.lamb.param_groups[0]["lr"]
        grads = own or {name.removeprefix("module."): p.grad for name, p in run.model.named_parameters()}
        whole = {n: (g.full_tensor() if isinstance(g, DTensor) else g).double() for n, g in grads.items()}
        for grad in whole.values() if own else ():
            dist.all_reduce(grad)
            grad /= 2
        oracle.step({name: grad.numpy() for name, grad in whole.items()})
        step(closure)

    own: dict[str, Tensor] = {}  # stage 2 leaves none in .grad
    for name, p in run.bare.named_parameters() if kind == "stage 2" else ():
        p.register_hook(lambda grad, name=name: own.update({name: grad.clone()}))
    kinds: set[torch.dtype] = set()
    run.bare.last.register_forward_hook(lambda *call: kinds.add(call[-1].dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.lamb, "step", watched)
        run.train(4)
    assert kinds == {torch.bfloat16}
    regression.assert_follows(run.weights(), oracle)
    return {"weights": run.weights(), "seen": run.bare.seen}


@KINDS
def test_accelerate_in_bf16(kind: str) -> None:
    """Exact for the gradients that bf16 gives, which are near those of float64."""
    ranks = run_ranks(2, trained_in_bf16, kind)
    oracle = regression.follow([found["seen"] for found in ranks], lr=rate, scalar=kind != "fsdp2")
    for found in ranks:
        regression.assert_follows(found["weights"], oracle, tolerance=3e-2)


def in_stage_2_beside_ddp(rank: int) -> None:
    accelerator = accelerator_of("ddp")
    model = Regression()
    optimizer = ShardedLamb(model.named_parameters(), lr=0.02, stage=2)
    prepared, _ = accelerator.prepare(model, optimizer)
    batch = {key: torch.stack([entry[key] for entry in regression.DATA[:2]]) for key in ("x", "y", "number")}
    accelerator.backward(prepared(**batch)[0])


def test_stage_2_beside_ddp_is_an_error_that_says_what_to_do() -> None:
    for kind, message in run_ranks_expecting_errors(2, in_stage_2_beside_ddp).values():
        assert kind == "ValueError"
        assert "pass the bare model, or use stage=1" in message


# -- saves and resumes ------------------------------------------------------------------------------------------------


def saved(rank: int, kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(bits at the save, bits at the end, our warnings)."""
    from sharded_lamb.integrations.accelerate import register

    run = Run(kind, clip=0.5)
    register(run.accelerator, run.optimizer)
    run.train(2)
    at_save = run.bits()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.accelerator.save_state(folder)
        run.lamb.state_dict()
    told = [str(w.message) for w in caught if "ShardedLamb" in str(w.message)]
    if kind.startswith("fsdp2"):  # nothing was gathered
        assert "is this rank's slices" in told.pop()
    run.train(2, skip=2)
    return at_save, run.bits(), told


def resumed(rank: int, kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(bits after the load, bits at the end, our warnings)."""
    run = Run(kind, clip=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.accelerator.load_state(folder)
    loaded = run.bits()
    run.train(2, skip=2)
    return loaded, run.bits(), [str(w.message) for w in caught if "ShardedLamb" in str(w.message)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, full", "stage 2"])
def test_save_state_and_load_state_resume_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    before = run_ranks(2, saved, kind, str(tmp_path))
    after = run_ranks(2, resumed, kind, str(tmp_path))
    assert [found[2] for found in (*before, *after)] == [[]] * 4
    for moment in (0, 1):
        training.assert_same_bits(after[0][moment], before[0][moment])


def test_a_state_that_two_ranks_saved_loads_on_one(tmp_path: Path) -> None:
    before = run_ranks(2, saved, "ddp", str(tmp_path))
    loaded, _, told = run_ranks(1, resumed, "ddp", str(tmp_path))[0]
    assert told == []
    training.assert_same_bits(loaded, before[0][0])


def test_a_state_that_one_rank_saved_loads_on_two(tmp_path: Path) -> None:
    before = run_ranks(1, saved, "ddp", str(tmp_path))
    loaded, _, told = run_ranks(2, resumed, "ddp", str(tmp_path))[0]
    assert told == []
    training.assert_same_bits(loaded, before[0][0])


def prepared_with_state(rank: int) -> list[str]:
    """The warnings of ``prepare`` and of a ``state_dict`` after it; the state is as before."""
    accelerator = accelerator_of("ddp")
    model = Regression()
    optimizer = ShardedLamb(model.named_parameters(), lr=0.02)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = training.bits_of(optimizer, dict(model.named_parameters()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, prepared = accelerator.prepare(model, optimizer)
        told = len(caught)
        prepared.state_dict()
    training.assert_same_bits(training.bits_of(optimizer, dict(model.module.named_parameters())), before)
    assert len(caught) > told
    return [str(w.message) for w in caught[:told] if "ShardedLamb" in str(w.message)]


def test_an_optimizer_with_state_is_prepared_without_a_warning() -> None:
    assert run_ranks(2, prepared_with_state) == [[], []]


def test_other_optimizers_are_refused() -> None:
    from sharded_lamb.integrations.accelerate import register

    other = torch.optim.AdamW(Regression().parameters())
    with pytest.raises(TypeError, match=r"takes ShardedLamb optimizers, got \['AdamW'\]"):
        register(None, other)
    with pytest.raises(TypeError, match="takes ShardedLamb optimizers, got none"):
        register(None)


def registered_for_each_node(rank: int) -> None:
    from accelerate.utils import ProjectConfiguration

    from sharded_lamb.integrations.accelerate import register

    run = Run("ddp", project_config=ProjectConfiguration(save_on_each_node=True))
    register(run.accelerator, run.optimizer)


def test_saving_on_each_node_is_an_error() -> None:
    for kind, message in run_ranks_expecting_errors(2, registered_for_each_node).values():
        assert kind == "ValueError"
        assert "save_on_each_node=True: only the first rank has the whole state" in message
