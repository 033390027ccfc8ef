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
    """A Triton interpreter that takes a fifth of the time, and a reference with IEEE square roots in fp64."""
    from triton.runtime import interpreter

    patched: set[Any] = set()
    patch_lang, root = interpreter._patch_lang, rule.root

    def patch_once(function: Any) -> Any:
        """Patch a kernel's function once; the interpreter would patch it at every call and never restores it."""
        if function not in patched:
            patched.add(function)
            patch_lang(function)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        patch_once(self.fn)
        return self.rewrite()(*arguments, **named)

    def correct_root(x: Tensor) -> Tensor:
        """On CPUs torch's fp64 root is MKL's, which is off by one ulp in 0.6 % of values."""
        return torch.from_numpy(np.sqrt(x.numpy())) if x.dtype == torch.float64 else root(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(rule, "root", correct_root)
        yield
