"""Programs of the battery that need processes of their own."""

import pytest

from sharded_lamb.gpu_check import processes
from sharded_lamb.gpu_check.battery import LeftOut
from sharded_lamb.gpu_check.training import CPU


def test_the_first_rank_that_fails_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    rows = processes.rows_of("tests.gpu_check.program", CPU, 2, 60)
    assert rows == [{"rank": 0, "of": 2, "device": "cpu"}]
    assert "rank 1 has failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("tests.gpu_check.no_program", LeftOut, "No module named tests.gpu_check.no_program"),
        ("keyword", RuntimeError, "no output"),
    ],
)
def test_a_program_without_rows_is_no_result(module: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        processes.rows_of(module, CPU, 1, 60)
