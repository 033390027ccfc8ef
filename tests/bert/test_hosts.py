"""The recipe on several hosts: network namespaces joined by limited links, through `launch/torchrun.sh`."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb import faults
from sharded_lamb.checkpoint import read_contents
from sharded_lamb.cluster import local as cluster
from sharded_lamb.cluster.namespaces import Host, NetworkError, network, run_together
from tests import interpreter
from tests.bert.test_command import write_config
from tests.bert.test_train import trained
from tests.training import assert_same_bits


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    try:
        with network(3, rate=2e8) as made:
            yield made
    except NetworkError as error:
        pytest.skip(str(error))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MAX_RESTARTS", "0")
    monkeypatch.setenv("VIRTUAL_ENV", str(interpreter.prefix()))
    return monkeypatch


@pytest.mark.parametrize(("count", "preflight", "rendezvous"), [(2, "1", "c10d"), (3, "0", "static")])
def test_hosts_train_to_the_same_bits_as_one(
    count: int,
    preflight: str,
    rendezvous: str,
    tree: dict[str, Any],
    tmp_path: Path,
    hosts: list[Host],
    settings: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tree, tmp_path)
    settings.setenv("PREFLIGHT", preflight)
    settings.setenv("PREFLIGHT_ARGS", f"--config {config} --writes {tmp_path / 'run'} --mb 1")
    program = ["-m", "sharded_lamb.bert", "--config", str(config)]
    codes = run_together(cluster.tasks(hosts[:count], program, ranks=1, rendezvous=rendezvous), timeout=200)
    assert codes == [0] * count
    trained(count, tree, tmp_path / "one")
    newest = Path("checkpoints", "step-00000006")
    results, expected = read_contents(tmp_path / "run" / newest), read_contents(tmp_path / "one" / newest)
    assert_same_bits(results.weights, expected.weights)
    for name, state in expected.states.items():
        assert_same_bits(results.states[name], state)
    assert (f"preflight: {count} ranks" in capfd.readouterr().out) == (preflight == "1")


def test_a_cable_that_is_pulled_ends_in_an_error_that_names_the_peer_and_put_back_it_goes_on(
    tree: dict[str, Any],
    tmp_path: Path,
    hosts: list[Host],
    settings: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Pulled in the middle of a run, until both hosts have said so; then they meet again, and the bits are the same."""
    phases = [{**tree["phases"][0], "steps": 12}]
    often = {"every_steps": 2, "keep": 0}
    tree = {**tree, "phases": phases, "checkpoint": often, "faults": {"hang_timeout_s": 4}}
    config = write_config(tree, tmp_path)
    for name, value in {
        "PREFLIGHT": "0",
        "MAX_RESTARTS": "3",
        faults.VARIABLE: "slow@step:seconds=0.3",
    }.items():
        settings.setenv(name, value)
    program = ["-m", "sharded_lamb.bert", "--config", str(config), "--resume", "auto"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_together, cluster.tasks(hosts[:2], program, ranks=1), timeout=200)
        said = _wait_for(lambda: _rows(tmp_path / "run") >= 5, running, capfd)
        hosts[1].cut()
        try:
            said += _wait_for(lambda: False, running, capfd, until="watchdog (on rank 0)")
        finally:
            hosts[1].mend()
        assert running.result(200) == [0, 0]
    said += "".join(capfd.readouterr())
    assert "rank 1 (host" in said.split("watchdog (on rank 0)")[1], said
    trained(2, {**tree, "faults": {}}, tmp_path / "one")
    newest = Path("checkpoints", "step-00000012")
    assert_same_bits(
        read_contents(tmp_path / "run" / newest).weights, read_contents(tmp_path / "one" / newest).weights
    )
    assert "from step " in said


def _rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _wait_for(
    what: Callable[[], bool],
    running: Future[Any],
    capfd: pytest.CaptureFixture[str],
    until: str | None = None,
) -> str:
    """What was said until then."""
    said = ""
    for _ in range(1200):
        said += "".join(capfd.readouterr())
        if what() or (until is not None and until in said):
            return said
        assert not running.done(), said
        time.sleep(0.05)
    raise AssertionError(said)
