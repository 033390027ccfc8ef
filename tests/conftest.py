"""Settings and fixtures of the whole suite."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests import harness

# Examples share two cores with worker processes, so their wall time says nothing: no deadline. The same
# examples every time, so that a failure seen anywhere is seen everywhere; "explore" searches for new ones.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(scope="session", autouse=True)
def _worker_pools() -> Iterator[None]:
    yield
    harness.shutdown_pools()
