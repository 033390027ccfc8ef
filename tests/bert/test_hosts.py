"""The recipe on several hosts: network namespaces joined by limited links, through `launch/torchrun.sh`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb.bench import cluster
from sharded_lamb.bench.namespaces import Host, NetworkError, network, run_together
from sharded_lamb.checkpoint import read_contents
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
    tree = {
        **tree,
        "speed": {"threads": 1},
    }  # else two on hosts of their own, and other sums in matrix products
    config = write_config(tree, tmp_path)
    settings.setenv("PREFLIGHT", preflight)
    settings.setenv("PREFLIGHT_ARGS", f"--config {config} --writes {tmp_path / 'run'} --mb 1")
    program = ["-m", "sharded_lamb.bert", "--config", str(config)]
    codes = run_together(cluster.tasks(hosts[:count], program, ranks=1, rendezvous=rendezvous), timeout=200)
    assert codes == [0] * count
    trained(count, tree, tmp_path / "one")
    newest = Path("checkpoints", "step-00000006")
    found, expected = read_contents(tmp_path / "run" / newest), read_contents(tmp_path / "one" / newest)
    assert_same_bits(found.weights, expected.weights)
    for name, state in expected.states.items():
        assert_same_bits(found.states[name], state)
    assert (f"preflight: {count} ranks" in capfd.readouterr().out) == (preflight == "1")
