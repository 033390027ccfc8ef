"""Options that the ranks of a step agree on: a checksum in all-reduce (b), an error on every rank if one differs."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

from sharded_lamb.comm.consistency import Description, describe_groups
from sharded_lamb.comm.stalls import raised
from sharded_lamb.comm.step_agreement import StepAgreement
from sharded_lamb.core.eager import run_eagerly
from sharded_lamb.optim.base import LambOptimizer, Live

P = ParamSpec("P")
T = TypeVar("T")


def collective(method: Callable[P, T]) -> Callable[P, T]:
    """Decorator: if ``method`` raises on some ranks only, ranks that wait for them raise too (`comm.stalls`)."""

    @run_eagerly
    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            raised(error)
            raise

    return call


@dataclass(slots=True)
class AgreedLive(Live):
    """See `Live`."""

    agreement: StepAgreement | None = None


class AgreedOptions(LambOptimizer):
    """A `LambOptimizer` whose ranks must step with equal options."""

    _live: AgreedLive
    _live_class = AgreedLive

    @property
    def _agreement(self) -> StepAgreement:
        assert self._live.agreement is not None
        return self._live.agreement

    def _option_problem(self, *, alone: bool) -> Exception | None:
        """The error of an invalid option, for `_all_reduce_agreed`; raised here if this rank is ``alone``."""
        try:
            self._check_options()
        except (ValueError, TypeError) as error:
            if alone:
                raise
            return error
        return None

    def _step_facts(self) -> Description:
        """Facts that a step uses beside the groups' options, equal on all ranks: (label, value)."""
        scale = self._live.grad_scale
        is_remote = scale is not None and scale.device.type != "cpu"
        shown = "on the device" if is_remote else None if scale is None else float(scale)
        facts: Description = [("max_grad_norm", self._live.max_grad_norm), ("scale of GradScaler", shown)]
        edits = self._gradient_edits()
        if edits is not None and edits.device.type == "cpu":
            facts.append(("checksum of edits of .grad and of the reductions that it holds", int(edits)))
        return facts

    def _gradient_edits(self) -> Tensor | None:
        """See `GradientSource.edits`."""
        return None

    def _described_edits(self) -> Description:
        """See `GradientSource.described_edits`."""
        return []

    def _all_reduce_agreed(self, parts: Sequence[Tensor], problem: Exception | None = None) -> Tensor:
        """All-reduce (b): sum ``parts`` over ranks, in place, with a checksum of all options.

        The host never reads a learning rate or loss scale on an accelerator: the checksum includes its bits there.

        Returns:
            Whether ranks differ: bool scalar on the device; always False on a CPU.

        Raises:
            ValueError: ranks differ (on a CPU).
            Exception: ``problem``, if all ranks have the same.
        """
        facts: Hashable = str(problem)
        on_device: list[Tensor] = []
        if problem is None:
            of_groups, on_device = self._option_facts()
            scale = self._live.grad_scale
            if scale is not None and scale.device.type != "cpu":
                on_device.append(scale)
            edits = self._gradient_edits()
            if edits is not None and edits.device.type != "cpu":
                on_device.append(edits)
            facts = (*of_groups, *map(repr, self._step_facts()))
        differs = self._agreement.all_reduce(parts, facts, on_device)
        if (problem is not None or differs.device.type == "cpu") and differs:
            self._raise_disagreement(problem)
        if problem is not None:
            raise problem
        return differs

    def _agree_at_once(self, parts: Sequence[Tensor], problem: Exception | None) -> None:
        """`_all_reduce_agreed` that raises at once on a GPU too, where it synchronizes."""
        if self._all_reduce_agreed(parts, problem):
            self._raise_disagreement()

    def _raise_disagreement(self, problem: Exception | None = None) -> None:
        """Raise ValueError on every rank, after `_all_reduce_agreed` has found a difference. Collective."""
        if problem is not None:
            described: Description = [("options", f"{type(problem).__name__}: {problem}")]
        else:
            described = [
                ("options", "valid"),
                *self._described_edits(),
                *self._step_facts(),
                *describe_groups(self._groups_of_options()),
            ]
        self._agreement.refuse(described)
