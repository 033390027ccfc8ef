"""Wrappers of optimizers: reads reach the optimizer, and so must everything that its methods or GradScaler write."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.timeline import Timeline
from tests import training
from tests.harness import run_ranks
from tests.oracle import OracleLamb

SHAPES = {"weight": (37, 23), "bias": (37,), "scale": ()}
LR = 0.05


class Subclassing:
    """As Fabric's: of the optimizer's class, so that methods run on the wrapper; reads go inside."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.__class__ = type("Wrapped" + type(inner).__name__, (Subclassing, type(inner)), {})  # type: ignore[assignment]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._inner.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Copying(Subclassing):
    """As older Fabric's and Composer's: also a copy of the optimizer's attributes."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.__dict__.update({key: value for key, value in vars(inner).items() if key != "step"})


class Forwarding:
    """Reads go inside, methods run inside, attributes that are set stay outside."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Sharpness(torch.optim.Optimizer):
    """As the published SAM (arXiv 2010.01412): the base optimizer's keywords become defaults of the wrapper, and its
    groups the base's.
    """

    def __init__(self, params: Any, base: type, rho: float, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        moved = [p.grad * (self.param_groups[0]["rho"] / norm) for p in params]
        torch._foreach_add_(params, moved)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(params, moved)
        self.base.step()


WRAPPERS = (Subclassing, Copying, Forwarding)
MAKERS: dict[str, Callable[..., Any]] = {
    "Lamb": Lamb,
    "stage 1": lambda params, **options: ShardedLamb(params, stage=1, **options),
    "stage 2": lambda params, **options: ShardedLamb(params, stage=2, **options),
}


def gradients(step: int) -> dict[str, Tensor]:
    return {
        name: training.draw(shape, "g", name, step) * (10 if step == 0 else 0.1)
        for name, shape in SHAPES.items()
    }


def oracle_of(params: Mapping[str, Tensor], **options: Any) -> OracleLamb:
    return OracleLamb({name: p.detach().double().numpy() for name, p in params.items()}, lr=LR, **options)


def follow(oracle: OracleLamb, grads: Mapping[str, Tensor]) -> None:
    oracle.step({name: g.double().numpy() for name, g in grads.items()})


def backward(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], scale: Callable[[Tensor], Tensor]
) -> None:
    scale(torch.stack([(p * grads[name]).sum() for name, p in params.items()]).sum()).backward()


def same(loss: Tensor) -> Tensor:
    return loss


@pytest.mark.parametrize("wrap", [Subclassing, Copying])
@pytest.mark.parametrize("made", MAKERS)
def test_max_grad_norm_written_on_a_wrapper_clips(made: str, wrap: type) -> None:
    params = training.parameters(SHAPES)
    opt = wrap(MAKERS[made](params.items(), lr=LR))
    oracle = oracle_of(params, max_grad_norm=1.0)
    opt.max_grad_norm = 1.0
    for step in range(3):
        backward(params, gradients(step), same)
        opt.step()
        opt.zero_grad()
        follow(oracle, gradients(step))
    training.assert_follows(params, oracle)
    assert opt.max_grad_norm == 1.0
    assert opt.trust_ratios() == pytest.approx(oracle.ratios, rel=1e-5)
    assert opt.grad_norm == pytest.approx(oracle.grad_norm, rel=1e-5)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_clip_grad_norm_on_a_wrapper_clips_the_next_step_alone(stage: int, wrap: type) -> None:
    params = training.parameters(SHAPES)
    opt = wrap(ShardedLamb(params.items(), lr=LR, stage=stage))
    oracle = oracle_of(params)
    for step in range(4):
        oracle.max_grad_norm = 1.0 if step != 2 else None
        backward(params, gradients(step), same)
        if step != 2:
            opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
        follow(oracle, gradients(step))
    training.assert_follows(params, oracle)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("made", MAKERS)
def test_grad_scaler_steps_a_wrapper(made: str, wrap: type) -> None:
    params = training.parameters(SHAPES)
    opt = wrap(MAKERS[made](params.items(), lr=LR, eps=0.1))  # a scale of gradients shows beside a large eps
    oracle = oracle_of(params, eps=0.1)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        grads = gradients(step + 1)
        if step == 1:
            grads["bias"][3] = torch.inf
        backward(params, grads, scaler.scale)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if step != 1:
            follow(oracle, grads)
    training.assert_follows(params, oracle)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


def wrapped_over_ranks(rank: int, wrap: type, stage: int) -> None:
    """Stage 2 gets each rank's own gradients, in two backwards; stage 1 the average."""
    params = training.parameters(SHAPES)
    model = nn.ParameterDict({name: p for name, p in params.items() if name != "scale"})
    opt = wrap(ShardedLamb([params["weight"], params["bias"]], lr=LR, stage=stage, bucket_mb=0.001))
    opt.add_param_group({"params": [params["scale"]], "lr": LR})
    oracle = oracle_of(params, max_grad_norm=0.7)
    opt.overlap_forward(model)
    timeline = Timeline()
    for step in range(3):
        own = gradients(2 * step + 1 + rank if stage == 2 else step + 1)
        average = {n: (gradients(2 * step + 1)[n] + gradients(2 * step + 2)[n]) / 2 for n in SHAPES}
        with opt.record(timeline):
            if stage == 2:
                sent = opt.traffic.calls["reduce_scatter"]
                with opt.no_sync():
                    backward(params, {name: g / 4 for name, g in own.items()}, same)
                assert opt.traffic.calls["reduce_scatter"] == sent
                backward(params, {name: g * 3 / 4 for name, g in own.items()}, same)
            else:
                backward(params, own, same)
            opt.clip_grad_norm_(0.7)
            opt.step()
        opt.synchronize()
        opt.zero_grad()
        follow(oracle, average if stage == 2 else own)
        opt.load_state_dict(opt.state_dict())
    training.assert_follows(params, oracle)
    assert timeline.spans


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_every_method_works_on_a_wrapper(stage: int, wrap: type) -> None:
    run_ranks(2, wrapped_over_ranks, wrap, stage)


@pytest.mark.parametrize("made", MAKERS)
def test_accelerates_optimizer(made: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    params = training.parameters(SHAPES)
    inner = MAKERS[made](params.items(), lr=LR, eps=0.1, max_grad_norm=1.0)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    opt = accelerate.optimizer.AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    oracle = oracle_of(params, eps=0.1, max_grad_norm=1.0)
    for step in range(3):
        backward(params, gradients(step), scaler.scale)
        opt.step()
        opt.zero_grad()
        follow(oracle, gradients(step))
    training.assert_follows(params, oracle)
    assert not opt.step_was_skipped


@pytest.mark.parametrize("base", [Lamb, ShardedLamb])
def test_a_wrapper_that_repeats_the_keywords_in_its_groups(base: type) -> None:
    options = {
        "lr": LR,
        "max_grad_norm": 1.0,
        **({"stage": 1, "bucket_mb": 1.0} if base is ShardedLamb else {}),
    }
    params = training.parameters(SHAPES)
    oracle = oracle_of(params, max_grad_norm=1.0)
    opt = Sharpness(list(params.values()), base, rho=0.05, **options)
    assert not {"stage", "bucket_mb", "max_grad_norm"} & opt.base.param_groups[0].keys()

    def square() -> None:
        opt.zero_grad()
        backward({name: p**2 for name, p in params.items()}, gradients(0), same)

    for _ in range(3):
        square()
        values = {name: p.detach().double() for name, p in params.items()}
        grads = {name: 2 * value * gradients(0)[name] for name, value in values.items()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        moved = {name: value + 0.05 * grads[name] / norm for name, value in values.items()}
        follow(oracle, {name: 2 * value * gradients(0)[name] for name, value in moved.items()})
        opt.step(square)
    training.assert_follows(params, oracle)


@pytest.mark.parametrize("base", [Lamb, ShardedLamb])
@pytest.mark.parametrize("blocks", [{"weight": 2}, None])
def test_ratio_blocks_repeated_in_groups_are_the_optimizers(
    base: type, blocks: dict[str, Any] | None
) -> None:
    group = {"params": [("weight", nn.Parameter(torch.ones(4, 3)))], "ratio_blocks": blocks}
    opt = base([group], ratio_blocks=blocks)
    assert opt.ratio_blocks == (blocks or {})
    assert "ratio_blocks" not in opt.param_groups[0]
    opt.zero_grad()
    with pytest.raises(ValueError, match=r"ratio_blocks=\{'bias': 2\} in a parameter group"):
        base([{**group, "ratio_blocks": {"bias": 2}}], ratio_blocks=blocks)


def test_another_value_of_the_optimizers_own_option_in_a_group_is_refused() -> None:
    group = {"params": [nn.Parameter(torch.ones(3))], "stage": 2}
    with pytest.raises(ValueError, match="stage=2 in a parameter group: it is of the whole optimizer"):
        ShardedLamb([group], stage=1)
    with pytest.raises(
        ValueError, match=r"max_grad_norm=2\.0 in a parameter group: clipping is by the global norm"
    ):
        Lamb([{**group, "stage": 1, "max_grad_norm": 2.0}], max_grad_norm=1.0)


@pytest.mark.parametrize("made", MAKERS)
def test_state_that_a_wrapper_adds_before_the_first_step_changes_nothing(made: str) -> None:
    """As schedulefree's wrapper, whose z is in the base optimizer's state."""
    params = training.parameters(SHAPES)
    opt, oracle = MAKERS[made](params.items(), lr=LR), oracle_of(params)
    for p in params.values():
        opt.state[p]["z"] = p.detach().clone()
    for step in range(2):
        backward(params, gradients(step), same)
        opt.step()
        opt.zero_grad()
        follow(oracle, gradients(step))
    training.assert_follows(params, oracle)
    assert all("z" in opt.state[p] for p in params.values())
