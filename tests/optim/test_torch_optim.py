"""torch's own optimizer checks, run against `Lamb` and `ShardedLamb` on one rank.

Their inputs come from torch.testing._internal.common_optimizers, which is private: if torch lacks it, or its
requirement (expecttest) is not installed, the tests that need it skip with the reason. The others rewrite cases of
torch's test_optim for these two.
"""

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sharded_lamb import Lamb, ShardedLamb
from tests import training

CLASSES = [Lamb, ShardedLamb]
pytestmark = pytest.mark.parametrize("cls", CLASSES)

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "decay": {"weight_decay": 0.1},
    "no decay": {"weight_decay": 0.0},
    "L2": {"weight_decay": 0.1, "adam_w_mode": False},
    "clip": {"max_grad_norm": 0.1},
    "apex": {"variant": "apex"},
    "deepspeed": {"variant": "deepspeed"},
    "adamw": {"variant": "adamw", "betas": (0.8, 0.95)},
}
every_config = pytest.mark.parametrize("config", CONFIGS)


def options_of(config: str) -> dict[str, Any]:
    return copy.deepcopy(CONFIGS[config])


@pytest.fixture
def common() -> ModuleType:
    try:
        return importlib.import_module("torch.testing._internal.common_optimizers")
    except ImportError as error:
        pytest.skip(f"torch's private test helpers cannot be imported here: {error}")


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model: nn.Module, step: int) -> Tensor:
    loss = (model(training.draw((5, 4), "x", step)) - training.draw((5, 3), "y", step)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, opt: Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        backward(model, step)
        opt.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- through OptimizerInfo -----------------------------------------------------------------------------------


def info_of(common: ModuleType, cls: type[Optimizer]) -> Any:
    inputs = [common.OptimizerInput(params=None, kwargs=options_of(name), desc=name) for name in CONFIGS]
    adam = next(info for info in common.optim_db if info.optim_cls is torch.optim.Adam)
    return common.OptimizerInfo(
        cls,
        optim_inputs_func=lambda device, dtype=None: inputs,
        optim_error_inputs_func=common.get_error_inputs_for_all_optims,
        scheduler_inputs=adam.scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
    )


def test_torchs_error_inputs(cls: type[Optimizer], common: ModuleType) -> None:
    """Mistakes that every torch optimizer must report, with the same error type."""
    own_messages = {"Tensor lr must be 1-element": r"lr must be a number or a tensor of one element"}
    error_inputs = info_of(common, cls).optim_error_inputs_func("cpu", torch.float32)
    assert len(error_inputs) >= 6
    for wrong in error_inputs:
        given = wrong.optimizer_error_input
        params = given.params if given.params is not None else [Parameter(torch.ones(1, 1))]
        if wrong.error_type is UserWarning:
            error = pytest.raises(
                ValueError, match=r"'group0\.param1' is passed twice"
            )  # torch steps it twice
            with pytest.warns(UserWarning, match=wrong.error_regex), error:
                cls(params, **given.kwargs)
        else:
            with pytest.raises(
                wrong.error_type, match=own_messages.get(wrong.error_regex, wrong.error_regex)
            ):
                cls(params, **given.kwargs)


def test_loss_falls_under_torchs_schedulers(cls: type[Optimizer], common: ModuleType) -> None:
    """torch's test_forloop_goes_right_direction: a least-squares problem, with each of Adam's schedules.

    Every schedule meets every third of the inputs, and every input a third of the schedules.
    """
    info = info_of(common, cls)
    for first_input, makers in enumerate(info.scheduler_inputs):
        for given in info.optim_inputs_func("cpu")[first_input % 3 :: 3]:
            model = small_model()
            opt = info.optim_cls(model.parameters(), **copy.deepcopy(given.kwargs))
            schedules = [make(opt) for make in makers]
            first = backward(model, 0).item()
            for _ in range(20):
                opt.zero_grad()
                loss = backward(model, 0)
                opt.step()
                for schedule in schedules:
                    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
                        schedule.step(loss.detach())
                    else:
                        schedule.step()
            opt.zero_grad()
            assert backward(model, 0).item() < first, given.desc


# -- groups and learning rates -------------------------------------------------------------------------------


@every_config
def test_steps_after_load_state_dict_are_bit_equal(cls: type[Optimizer], config: str) -> None:
    """torch's test_state_dict_deterministic: a copy that loaded the state makes bit-equal steps."""
    model = small_model()
    opt = cls(model.parameters(), **options_of(config))
    train(model, opt, range(3))
    other_model = copy.deepcopy(small_model())
    other_model.load_state_dict(model.state_dict())
    other = cls(other_model.parameters(), **options_of(config))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(3, 6))
    train(other_model, other, range(3, 6))
    training.assert_same_bits(values(other_model), values(model))
    assert other.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def test_groups_weight_decay(cls: type[Optimizer]) -> None:
    """torch's test_param_groups_weight_decay: with zero gradients u is λw, which is 0 without decay."""
    a, b = Parameter(torch.full((3,), 2.0)), Parameter(torch.full((3,), 2.0))
    opt = cls(
        [{"params": [a], "weight_decay": 0.5}, {"params": [b]}],
        weight_decay=0.0,
        lr=0.1,
        exclude_from_layer_adaptation=("all",),
    )
    a.grad, b.grad = torch.zeros(3), torch.zeros(3)
    opt.step()
    torch.testing.assert_close(a.detach(), torch.full((3,), 2.0 - 0.1 * 0.5 * 2.0))
    assert torch.equal(b.detach(), torch.full((3,), 2.0))


def test_groups_lr(cls: type[Optimizer]) -> None:
    a, b, c = (Parameter(torch.full((3,), 2.0)) for _ in range(3))
    opt = cls(
        [{"params": [a], "lr": 0.5}, {"params": [b]}, {"params": [c], "lr": 0.0}], lr=0.25, weight_decay=0.0
    )
    for p in (a, b, c):
        p.grad = torch.ones(3)
    opt.step()  # ratio 2, u = 1
    torch.testing.assert_close(a.detach(), torch.full((3,), 1.0))
    torch.testing.assert_close(b.detach(), torch.full((3,), 1.5))
    assert torch.equal(c.detach(), torch.full((3,), 2.0))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("per_group", [False, True])
def test_tensor_lr_equals_float_lr(cls: type[Optimizer], shape: tuple[int, ...], per_group: bool) -> None:
    models = [small_model(), small_model()]
    lr = torch.full(shape, 0.0125)
    if per_group:
        opts: list[Optimizer] = [cls([{"params": models[0].parameters(), "lr": lr}])]
    else:
        opts = [cls(models[0].parameters(), lr=lr)]
    opts.append(cls(models[1].parameters(), lr=0.0125))
    for steps in (range(2), range(2, 4)):
        for model, opt in zip(models, opts, strict=True):
            train(model, opt, steps)
        lr.fill_(0.05)  # written in place, as schedulers do
        opts[1].param_groups[0]["lr"] = 0.05
    for name, value in values(models[0]).items():
        torch.testing.assert_close(value, values(models[1])[name])
    assert opts[0].param_groups[0]["lr"] is lr


def test_schedulers_chained(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters(), lr=0.1)
    warmup = lr_scheduler.LinearLR(opt, 0.5, 1.0, total_iters=2)
    schedule = lr_scheduler.SequentialLR(opt, [warmup, lr_scheduler.StepLR(opt, 1, 0.1)], [2])
    seen = []
    for step in range(5):
        train(model, opt, range(step, step + 1))
        seen.append(opt.param_groups[0]["lr"])
        schedule.step()
    assert seen == pytest.approx([0.05, 0.075, 0.1, 0.01, 0.001])


def test_lr_zero_leaves_parameters(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters(), lr=0.0, weight_decay=0.1)
    before = values(model)
    train(model, opt, range(3))
    training.assert_same_bits(values(model), before)


def test_zero_gradients_without_decay_are_a_noop(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters(), weight_decay=0.0)
    before = values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    training.assert_same_bits(values(model), before)


def test_add_param_group_equals_two_from_the_start(cls: type[Optimizer]) -> None:
    one, other = small_model(), small_model()
    opt = cls(one[0].parameters(), lr=0.01)
    opt.add_param_group({"params": list(one[2].parameters()), "lr": 0.03, "weight_decay": 0.2})
    both = cls(
        [
            {"params": other[0].parameters(), "lr": 0.01},
            {"params": other[2].parameters(), "lr": 0.03, "weight_decay": 0.2},
        ]
    )
    train(one, opt, range(3))
    train(other, both, range(3))
    training.assert_same_bits(values(one), values(other))
    assert opt.param_groups[1]["eps"] == opt.defaults["eps"]


def test_add_param_group_rejects_bad_groups(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters())
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [model[0].weight]})
    with pytest.raises(TypeError, match="a parameter group must be a dict, got list"):
        opt.add_param_group([model[0].weight])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eps must be a finite number > 0.*got -1"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "eps": -1})
    assert len(opt.param_groups) == 1
    train(model, opt, range(1))


def test_missing_gradients(cls: type[Optimizer]) -> None:
    """torch's test_step_is_noop_when_params_have_no_grad, and a parameter that gets one later."""
    model = small_model()
    opt = cls(model.parameters(), weight_decay=0.1)
    before = values(model)
    opt.step()
    training.assert_same_bits(values(model), before)
    model[0].requires_grad_(False)
    train(model, opt, range(1))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])
    model[0].requires_grad_(True)
    train(model, opt, range(1, 2))
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert opt.state[model[0].weight]["step"].item() == 1
    assert opt.state[model[2].weight]["step"].item() == 2


def test_zero_grad(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters())
    backward(model, 0)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@every_config
def test_gradients_are_never_written(cls: type[Optimizer], config: str) -> None:
    model = small_model()
    opt = cls(model.parameters(), **options_of(config))
    backward(model, 0)
    grads = {name: (p.grad, p.grad._version) for name, p in model.named_parameters() if p.grad is not None}
    opt.step()
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0]
        assert p.grad._version == grads[name][1]


def test_closure(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters())
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        calls.append(1)
        return backward(model, 0)

    first, second = opt.step(closure), opt.step(closure)
    assert len(calls) == 2
    assert second < first
    assert opt.step() is None


def test_step_under_no_grad_and_after(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters())
    backward(model, 0)
    with torch.no_grad():
        opt.step()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# -- hooks, copies, names ------------------------------------------------------------------------------------


def test_step_hooks(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters())
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post")),
        opt.register_step_pre_hook(lambda o, a, k: seen.append("pre")),
        opt.register_step_post_hook(lambda o, a, k: seen.append("post")),
    ]
    train(model, opt, range(1))
    for handle in handles:
        handle.remove()
    train(model, opt, range(1, 2))
    assert sorted(seen[:2]) == ["global pre", "pre"]
    assert sorted(seen[2:]) == ["global post", "post"]


def test_state_dict_hooks(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters())
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda o, state: seen.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["save pre", "save post", "load pre", "load post"]


def test_load_state_dict_pre_hook_may_replace(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.parameters(), lr=0.5)
    state = opt.state_dict()
    changed = {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.125}]}
    opt.register_load_state_dict_pre_hook(lambda o, given: changed)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.125


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@every_config
@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle])
def test_copies_resume_bit_exactly(cls: type[Optimizer], config: str, way: Callable[[Any], Any]) -> None:
    model = small_model()
    opt = cls(model.parameters(), **options_of(config))
    train(model, opt, range(2))
    other_model, other = way((model, opt))
    assert type(other) is cls
    train(other_model, other, range(2, 4))
    train(model, opt, range(2, 4))
    training.assert_same_bits(values(other_model), values(model))
    assert {key: other.defaults[key] for key in opt.defaults} == opt.defaults
    assert other.max_grad_norm == opt.max_grad_norm


def test_a_copy_has_its_own_schedule(cls: type[Optimizer]) -> None:
    """Stepping a copy's schedule leaves the original's learning rate unchanged."""
    model = small_model()
    opt = cls(model.parameters(), lr=0.1)
    other_model, other = copy.deepcopy((model, opt))
    schedule = lr_scheduler.StepLR(other, 1, 0.5)
    train(other_model, other, range(1))
    schedule.step()
    assert (opt.param_groups[0]["lr"], other.param_groups[0]["lr"]) == (0.1, 0.05)


@every_config
def test_repr_has_own_options_and_none_of_foreach(cls: type[Optimizer], config: str) -> None:
    text = repr(cls(small_model().parameters(), **options_of(config)))
    assert text.startswith(cls.__name__)
    for option in ("lr", "betas", "eps", "weight_decay", "variant", "trust_clip"):
        assert f"{option}: " in text
    for absent in ("foreach", "fused", "capturable", "differentiable", "maximize"):
        assert absent not in text


def test_defaults_reach_groups(cls: type[Optimizer]) -> None:
    opt = cls([{"params": [Parameter(torch.ones(2))], "lr": 0.5}], lr=0.1, betas=(0.5, 0.6), variant="nvlamb")
    assert opt.defaults["lr"] == 0.1
    assert {**opt.defaults, "lr": 0.5} == {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    assert opt.max_grad_norm == 1.0


def test_named_parameters(cls: type[Optimizer]) -> None:
    model = small_model()
    opt = cls(model.named_parameters(), exclude_from_weight_decay=("ndim<=1",))
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == names
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    train(model, opt, range(1))
    assert list(opt.trust_ratios()) == names
    unnamed_model = small_model()
    unnamed = cls(unnamed_model.parameters())
    unnamed.load_state_dict({**opt.state_dict()})
    assert "param_names" not in unnamed.param_groups[0]
    train(unnamed_model, unnamed, range(1))
    assert list(unnamed.trust_ratios()) == [f"group0.param{i}" for i in range(4)]


def test_a_generator_of_parameters(cls: type[Optimizer]) -> None:
    def parameters() -> Iterator[Parameter]:
        yield from small_model().parameters()

    assert len(cls(parameters()).param_groups[0]["params"]) == 4
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls(iter(()))
