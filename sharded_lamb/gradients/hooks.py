"""Hooks around the accumulation of gradients in ``.grad``."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.eager import run_eagerly


class AccumulationHooks:
    """Calls ``before(param)`` and ``after(param)`` around every accumulation; holds their object weakly.

    A model may outlive its optimizer. The hook before is on the AccumulateGrad node, not on the tensor, where it would
    fire under torch.autograd.grad too. A parameter that is converted or moved, and perhaps back, gets another node: its
    first gradient after that comes without ``before``, and `after` puts the hook on the new node. A swapped parameter
    (``torch.utils.swap_tensors``) loses both hooks until `renew`.
    """

    def __init__(self, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        """``before``, ``after``: methods of one object."""
        self._before, self._after = weakref.WeakMethod(before), weakref.WeakMethod(after)
        self._handles: list[Any] = []
        self._params: dict[int, Tensor] = {}
        self._nodes: dict[int, tuple[Any, Any]] = {}  # with their hooks; parameters reference them weakly
        self._swappable: dict[int, int] = {}  # addresses of what torch swaps; nodes keep that alive
        self._announced: set[int] = set()

    def register(self, param: int, p: Tensor) -> None:
        """Register both hooks of parameter number ``param``."""
        self._params[param] = p
        self._register_before(param, p)
        this = weakref.ref(self)

        @run_eagerly
        def after_accumulation(p: Tensor) -> None:
            hooks = this()
            after = None if hooks is None else hooks._after()
            if hooks is None or after is None:
                return
            if param not in hooks._announced:
                hooks._register_before(param, p)
            hooks._announced.discard(param)
            after(param)

        untyped: Any = p
        self._handles.append(untyped.register_post_accumulate_grad_hook(after_accumulation))

    def renew(self) -> list[int]:
        """Register the hooks of parameters again that were swapped, and return these parameters."""
        swapped = []
        for param, p in self._params.items():
            if p._cdata != self._swappable[param] and p.requires_grad:
                swapped.append(param)
                untyped: Any = p
                # Registers all that the dictionary holds, which torch keeps, but calls no longer.
                untyped._post_accumulate_grad_hooks = untyped._post_accumulate_grad_hooks
                self._register_before(param, p)
        return swapped

    def _register_before(self, param: int, p: Tensor) -> None:
        this = weakref.ref(self)
        self._swappable[param] = p._cdata

        @run_eagerly
        def before_accumulation(grads: tuple[Tensor | None, ...]) -> None:
            hooks = this()
            before = None if hooks is None else hooks._before()
            if hooks is not None and before is not None and grads[0] is not None:
                hooks._announced.add(param)
                before(param)

        if param in self._nodes:
            self._nodes[param][1].remove()
        node: Any = torch.autograd.graph.get_gradient_edge(p).node
        self._nodes[param] = node, node.register_prehook(before_accumulation)

    def close(self) -> None:
        """Remove all hooks."""
        for handle in [*self._handles, *(handle for _, handle in self._nodes.values())]:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._params.clear()


def reject_compiled_autograd() -> None:
    """Raises RuntimeError inside a backward that torch.compile compiles, which drops callbacks at its end."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise RuntimeError(
            "stage=2 reduces gradients during backward, and compiled autograd does not tell when it ends: compile the "
            "forward only (torch.compile(model), loss.backward() outside), or set "
            "torch._dynamo.config.compiled_autograd = False"
        )
