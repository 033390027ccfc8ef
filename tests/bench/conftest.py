"""Benchmarks collect garbage before every turn; of all imported modules that would take a fifth of a second."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _modules_are_no_garbage() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()
