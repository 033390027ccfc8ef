"""A fixture for the tests that run under Triton's interpreter."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_lamb.core import rule


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """A Triton interpreter that takes a tenth of the time, and a reference with IEEE square roots in fp64."""
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

    of_scalar = functools.cache(interpreter._get_np_dtype)  # which makes a table at every call

    def numpy_type(dtype: Any) -> Any:
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)

    def correct_root(x: Tensor) -> Tensor:
        """On CPUs torch's fp64 root is MKL's, which is off by one ulp in 0.6 % of values."""
        return torch.from_numpy(np.sqrt(x.numpy())) if x.dtype == torch.float64 else root(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", numpy_type)
        # It computes of every integer operation whether it overflows, and asserts an object that is always true.
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(rule, "root", correct_root)
        yield
