"""A fixture for the tests that run under Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_lamb.core import rule


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Triton's interpreter, at a fifth of its time, and a reference of which every operation is IEEE's."""
    from triton.runtime import interpreter

    patched: set[Any] = set()
    patch_lang, root = interpreter._patch_lang, rule.root

    def patch_once(function: Any) -> Any:
        """For a function that a kernel calls, which the interpreter patches anew at every call and never restores."""
        if function not in patched:
            patched.add(function)
            patch_lang(function)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        patch_once(self.fn)
        return self.rewrite()(*arguments, **named)

    def correct_root(x: Tensor) -> Tensor:
        """MKL's, of which torch's fp64 root is made on CPUs, is an ulp off in 0.6 % of values."""
        return torch.from_numpy(np.sqrt(x.numpy())) if x.dtype == torch.float64 else root(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(rule, "root", correct_root)
        yield
