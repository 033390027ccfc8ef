"""Hugging Face's Trainer on two ranks, which wraps the model in DDP: exact, and resumed from its own checkpoints."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_lamb import ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.integrations import regression
from tests.integrations.regression import Regression
from tests.sharding.test_whole_states import begin_anew

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def arguments(folder: str, **options: Any) -> Any:
    from transformers import TrainingArguments

    defaults = {
        "max_steps": 4,
        "learning_rate": 0.02,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(folder, **{**defaults, **options})


def trainer_of(
    folder: str,
    callbacks: Any = (),
    lamb: Mapping[str, Any] | None = None,
    made: str = "class",
    **options: Any,
) -> Any:
    """``made``: how the Trainer gets its optimizer."""
    from transformers import Trainer

    from sharded_lamb.integrations.transformers import ShardedLambFactory

    begin_anew()
    model = Regression()
    keywords = {"lr": 0.02, **(lamb or {})}
    made_by = {
        "class": lambda: {"optimizer_cls_and_kwargs": (ShardedLamb, keywords)},
        "factory": lambda: {"optimizer_cls_and_kwargs": (ShardedLambFactory, keywords)},
        "object": lambda: {"optimizers": (ShardedLamb(model.named_parameters(), **keywords), None)},
    }
    return Trainer(
        model,
        arguments(folder, **options),
        train_dataset=regression.DATA,
        eval_dataset=regression.DATA[:4],
        callbacks=list(callbacks),
        **made_by[made](),
    )


# -- exact ------------------------------------------------------------------------------------------------------------


def warmup(step: int) -> float:
    """``linear`` with two steps of warm-up, of four."""
    return 0.02 * (step / 2 if step < 2 else (4 - step) / 2)


EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Trainer's arguments, the reference's
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"micro_batches": 2}),
    "clipping": ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
    "schedule": ({"lr_scheduler_type": "linear", "warmup_steps": 2}, {"lr": warmup}),
}


def trained(rank: int, folder: str, options: Mapping[str, Any], lamb: Mapping[str, Any]) -> dict[str, Any]:
    trainer = trainer_of(folder, lamb=lamb, **options)
    trainer.train()
    return {
        "weights": regression.weights_of(trainer.model),
        "seen": trainer.model.seen,
        "wrapped": type(trainer.model_wrapped).__name__,
        "norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
    }


@pytest.mark.parametrize("case", EXACT)
def test_the_trainer_follows_lamb_over_the_global_batch(case: str, tmp_path: Path) -> None:
    options, expected = EXACT[case]
    ranks = run_ranks(2, trained, str(tmp_path), {**options, "logging_steps": 1}, {})
    assert [found["wrapped"] for found in ranks] == ["DistributedDataParallel"] * 2
    oracle = regression.follow([found["seen"] for found in ranks], **expected)
    for found in ranks:
        regression.assert_follows(found["weights"], oracle)
        assert found["norms"][-1] == pytest.approx(
            oracle.grad_norm, rel=1e-4
        )  # before clipping, over all ranks
    if case == "clipping":
        assert min(ranks[0]["norms"]) > 0.5


NO_ADAPTATION = ["bias$", "norm", "^scale$"]
NAMED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # options, parameters without decay
    "object": ({"exclude_from_weight_decay": ["bias$", "norm"]}, regression.NO_DECAY),
    "factory": ({}, regression.NO_DECAY),
    "factory, patterns": ({"exclude_from_weight_decay": ["^last"]}, ("last.weight", "last.bias")),
}


def trained_with_names(rank: int, folder: str, made: str, lamb: Mapping[str, Any]) -> dict[str, Any]:
    options = {"exclude_from_layer_adaptation": NO_ADAPTATION, "weight_decay": 0.2, **lamb}
    trainer = trainer_of(folder, lamb=options, made=made, weight_decay=0.7)
    trainer.train()
    return {
        "weights": regression.weights_of(trainer.model),
        "seen": trainer.model.seen,
        "ratios": trainer.optimizer.optimizer.trust_ratios(),
    }


@pytest.mark.parametrize("case", NAMED)
def test_patterns_match_the_models_names(case: str, tmp_path: Path) -> None:
    lamb, no_decay = NAMED[case]
    ranks = run_ranks(2, trained_with_names, str(tmp_path), case.partition(",")[0], lamb)
    oracle = regression.follow(
        [found["seen"] for found in ranks], no_decay=no_decay, no_adapt=regression.NO_ADAPT, weight_decay=0.2
    )
    for found in ranks:
        regression.assert_follows(found["weights"], oracle)
        assert found["ratios"] == pytest.approx(oracle.ratios, rel=1e-4)


def nameless(rank: int, folder: str) -> None:
    trainer_of(folder, lamb={"exclude_from_layer_adaptation": NO_ADAPTATION}).train()


def test_patterns_for_the_trainers_nameless_groups_are_an_error_that_names_the_factory(
    tmp_path: Path,
) -> None:
    for kind, message in run_ranks_expecting_errors(2, nameless, str(tmp_path)).values():
        assert kind == "ValueError"
        assert "sharded_lamb.integrations.transformers.ShardedLambFactory" in message


def test_training_arguments_know_no_other_optimizers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sharded_lamb"):
        arguments(str(tmp_path), optim="sharded_lamb")


def trained_in_bf16(rank: int, folder: str) -> tuple[list[list[int]], dict[str, Tensor]]:
    """(what it has seen, its weights)."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Steps the reference with the gradients that the optimizer gets."""

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            grads = {n: p.grad.double().numpy() for n, p in trainer.model.named_parameters()}
            oracle.step(grads)

    trainer = trainer_of(folder, [Watch()], bf16=True, max_grad_norm=0.5)
    oracle = training.oracle_run(
        regression.weights_of(trainer.model), [], lr=0.02, no_decay=regression.NO_DECAY
    )
    kinds: set[torch.dtype] = set()
    trainer.model.last.register_forward_hook(lambda *call: kinds.add(call[-1].dtype))
    trainer.train()
    assert kinds == {torch.bfloat16}
    assert oracle.grad_norm <= 0.5 * (1 + 1e-6)
    regression.assert_follows(regression.weights_of(trainer.model), oracle)
    return trainer.model.seen, regression.weights_of(trainer.model)


def test_the_trainer_in_bf16_autocast(tmp_path: Path) -> None:
    """Exact for the gradients that autocast gives, which are near those of float64."""
    ranks = run_ranks(2, trained_in_bf16, str(tmp_path))
    oracle = regression.follow([seen for seen, _ in ranks], max_grad_norm=0.5)
    for _, weights in ranks:
        regression.assert_follows(weights, oracle, tolerance=3e-2)


def test_stage_2_in_the_trainer_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """The Trainer wraps the model in DDP by itself."""
    for kind, message in run_ranks_expecting_errors(2, trained, str(tmp_path), {}, {"stage": 2}).values():
        assert kind == "ValueError"
        assert "pass the bare model, or use stage=1" in message
        assert "Trainer and Accelerate's prepare wrap the model by themselves" in message


# -- saves and resumes ------------------------------------------------------------------------------------------------


def bits(trainer: Any) -> dict[str, Tensor]:
    """Weights and whole state, on the first rank. Collective."""
    whole = trainer.optimizer.optimizer.full_state_dict()
    found = regression.weights_of(trainer.model)
    for position, entry in (whole or {"state": {}})["state"].items():
        found.update({f"{position}/{key}": torch.as_tensor(value) for key, value in entry.items()})
    return found


def resumable(rank: int, folder: str, resume: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback

    from sharded_lamb.integrations.transformers import ShardedLambCallback

    found: dict[str, Any] = {"consolidated": []}
    consolidate = ShardedLamb.consolidate_state_dict

    def counted(optimizer: ShardedLamb, to: int = 0) -> None:
        found["consolidated"].append(trainer.state.global_step)
        consolidate(optimizer, to)

    class Begin(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            found["begin"] = bits(trainer)

    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(ShardedLamb, "consolidate_state_dict", counted)
        trainer = trainer_of(folder, [Begin(), ShardedLambCallback()], **{"max_steps": 6, **options})
        trainer.train(resume_from_checkpoint=resume)
    found["warnings"] = [str(w.message) for w in caught if "ShardedLamb" in str(w.message)]
    return {**found, "end": bits(trainer)}


SAVES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    # options, steps at which the state is consolidated, checkpoints that are left
    "steps": ({"save_strategy": "steps", "save_steps": 4}, [4, 6], [4, 6]),
    "epoch": (
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 16},
        [2, 4],
        [2, 4],
    ),
    "best": (
        {
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "metric_for_best_model": "loss",
            "label_names": ["y"],
            "load_best_model_at_end": True,
            "save_total_limit": 2,
        },
        [2, 4, 6],
        [4, 6],
    ),
}


@pytest.mark.parametrize("strategy", SAVES)
def test_every_save_of_the_trainer_resumes_to_the_same_bits(strategy: str, tmp_path: Path) -> None:
    options, consolidated, left = SAVES[strategy]
    ranks = run_ranks(2, resumable, str(tmp_path), None, options)
    assert [found["consolidated"] for found in ranks] == [consolidated, consolidated]
    assert [found["warnings"] for found in ranks] == [[], []]
    assert sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")) == left
    checkpoint = str(tmp_path / f"checkpoint-{left[0]}")
    resumed = run_ranks(2, resumable, str(tmp_path / "again"), checkpoint, options)
    assert [found["warnings"] for found in resumed] == [[], []]
    training.assert_same_bits(resumed[0]["end"], ranks[0]["end"])


def test_a_checkpoint_of_the_trainer_resumes_at_another_number_of_ranks(tmp_path: Path) -> None:
    """Two ranks, one, and two again: each begins with the bits with which the one before ended."""
    before = None
    for step, world in enumerate((2, 1, 2)):
        options = {"max_steps": 2 * step + 2, "save_strategy": "steps", "save_steps": 100}
        resume = str(tmp_path / f"checkpoint-{2 * step}") if step else None
        found = run_ranks(world, resumable, str(tmp_path), resume, options)[0]
        assert found["warnings"] == []
        if before is not None:
            training.assert_same_bits(found["begin"], before)
        before = found["end"]


def without_callback(rank: int, folder: str) -> None:
    options = {"max_steps": 2, "save_strategy": "steps"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(folder, **options).train()
    told = [str(w.message) for w in caught if "call consolidate_state_dict() on every rank" in str(w.message)]
    assert len(told) == (rank == 0)
    trainer_of(folder, **{**options, "max_steps": 4}).train(resume_from_checkpoint=f"{folder}/checkpoint-2")


def test_without_the_callback_the_save_warns_and_the_resume_is_an_error(tmp_path: Path) -> None:
    for kind, message in run_ranks_expecting_errors(2, without_callback, str(tmp_path)).values():
        assert kind == "ValueError"
        assert "saved by rank 0 of 2, and this is rank 1 of 2" in message


def test_models_alone_are_saved_without_a_consolidation(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_only_model": True}
    for found in run_ranks(2, resumable, str(tmp_path), None, options):
        assert found["consolidated"] == found["warnings"] == []
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not list(tmp_path.glob("checkpoint-2/optimizer*"))


def refused(rank: int, folder: str, kind: str) -> None:
    from sharded_lamb.integrations.transformers import ShardedLambCallback

    trainer = trainer_of(folder, [ShardedLambCallback()], save_on_each_node=kind == "nodes")
    if kind == "AdamW":
        trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {})
    trainer.train()


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("AdamW", "TypeError", "the Trainer's optimizer is AdamW"),
        ("nodes", "ValueError", "save_on_each_node=True: only the first rank has the whole state"),
    ],
)
def test_the_callback_refuses_what_it_cannot_keep(kind: str, error: str, text: str, tmp_path: Path) -> None:
    for raised, message in run_ranks_expecting_errors(2, refused, str(tmp_path), kind).values():
        assert raised == error
        assert text in message


@pytest.mark.parametrize(("distributed", "calls"), [("MULTI_GPU", 1), ("FSDP", 0)])
def test_under_fsdp_nothing_is_gathered(
    distributed: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP in the Trainer needs GPUs: the callback alone, and a wrapper as Accelerate's."""
    from transformers import TrainerControl, TrainerState

    from sharded_lamb.integrations.transformers import ShardedLambCallback

    lamb = ShardedLamb(Regression().named_parameters())
    kind = SimpleNamespace(distributed_type=distributed)
    wrapped = SimpleNamespace(
        optimizer=lamb, param_groups=lamb.param_groups, state=lamb.state, accelerator_state=kind
    )
    consolidated: list[int] = []
    monkeypatch.setattr(ShardedLamb, "consolidate_state_dict", lambda _, to=0: consolidated.append(to))
    callback, state, control = ShardedLambCallback(), TrainerState(), TrainerControl(should_save=True)
    callback.on_train_begin(arguments(str(tmp_path)), state, control, optimizer=wrapped)
    state.global_step = 1
    for _ in range(2):  # once for one step
        callback.on_step_end(arguments(str(tmp_path)), state, control, optimizer=wrapped)
        callback.on_epoch_end(arguments(str(tmp_path)), state, control, optimizer=wrapped)
    assert len(consolidated) == calls
