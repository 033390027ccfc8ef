"""The recorder of norms, and its sinks with the real libraries, offline."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.telemetry import (
    HeatMap,
    LayerNormRecorder,
    LayerNorms,
    Sink,
    to_mlflow,
    to_tensorboard,
    to_wandb,
)
from tests import training

NAN = float("nan")
Norms = dict[str, LayerNorms]
Records = list[tuple[int, Norms]]
RECORDS: Records = [
    (
        0,
        {
            "a.weight": LayerNorms(1.5, 2.5, 3.5, 0.5),
            "b (group 1, parameter 0)": LayerNorms(1.0, 2.0, NAN, 4.0),
        },
    ),
    (10, {"a.weight": LayerNorms(1.25, 2.25, 3.25, 0.25)}),
    (20, {}),  # a skipped step
]
EXPECTED: dict[str, list[tuple[int, float]]] = {
    "weight_norm/a.weight": [(0, 1.5), (10, 1.25)],
    "update_norm/a.weight": [(0, 2.5), (10, 2.25)],
    "gradient_norm/a.weight": [(0, 3.5), (10, 3.25)],
    "trust_ratio/a.weight": [(0, 0.5), (10, 0.25)],
    "weight_norm/b (group 1, parameter 0)": [(0, 1.0)],
    "update_norm/b (group 1, parameter 0)": [(0, 2.0)],
    "trust_ratio/b (group 1, parameter 0)": [(0, 4.0)],
}


def give(sink: Sink) -> None:
    for step, norms in RECORDS:
        sink(step, norms)


class Trained:
    """Steps of an optimizer: its norms right after each, and a sink's records, with the step during which they came."""

    def __init__(self, opt: Any, params: Mapping[str, Parameter], every: int, steps: Sequence[int]) -> None:
        self.read: dict[int, Norms] = {}
        self.got: list[tuple[int, int, Norms]] = []
        with LayerNormRecorder(opt, [self], every) as recorder:
            for self.now in steps:
                training.give(params, training.own_gradients(0, self.now))
                opt.step()
                self.read[self.now] = opt.layer_norms()
                recorder.step(self.now)
            self.now += 1

    def __call__(self, step: int, norms: Mapping[str, LayerNorms]) -> None:
        self.got.append((self.now, step, dict(norms)))


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_record_is_one_step_late_and_of_its_own_step(cls: Any) -> None:
    params = training.parameters()
    run = Trained(cls(params.items(), lr=0.1), params, 2, range(5))
    assert [(now, step) for now, step, _ in run.got] == [(1, 0), (3, 2), (5, 4)]
    assert all(norms == run.read[step] for _, step, norms in run.got)
    assert len({norms["fc.weight"] for norms in run.read.values()}) == 5


def test_a_skipped_step_has_no_norms() -> None:
    p = Parameter(torch.ones(3))
    opt, got = ShardedLamb([("p", p)]), Records()
    with LayerNormRecorder(opt, [lambda step, norms: got.append((step, dict(norms)))]) as recorder:
        for step, value in enumerate((1.0, NAN)):
            p.grad = torch.full((3,), value)
            opt.step()
            recorder.step(step)
    assert [(step, list(norms)) for step, norms in got] == [(0, ["p"]), (1, [])]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="every must be >= 1, an int, got 0"):
        LayerNormRecorder(Lamb([Parameter(torch.ones(1))]), [], every=0)
    with pytest.raises(ValueError, match="of='ratios' is no field"):
        HeatMap("ratios")
    with pytest.raises(ValueError, match="no step with norms"):
        HeatMap().save("map.png")


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        give(to_tensorboard(writer))
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {
        tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert tags == EXPECTED


def records_of(file: Path) -> Iterator[Any]:
    """The records of a run of wandb: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost beside a program that logs its own steps, although records are one step late."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(console="off"))
    try:
        sink = to_wandb(run)
        for now in range(4):
            run.log({"loss": now / 4}, step=now)
            if now:
                sink(*RECORDS[now - 1])
    finally:
        run.finish()
        wandb.teardown()
    (file,) = tmp_path.rglob("*.wandb")
    records = list(records_of(file))
    axes = {each.metric.glob_name: each.metric.step_metric for each in records if each.HasField("metric")}
    assert axes == {
        f"{kind}/*": "layer_norms_step"
        for kind in ("weight_norm", "update_norm", "gradient_norm", "trust_ratio")
    }
    found: dict[str, list[tuple[int, float]]] = {}
    losses = []
    for record in (each.history for each in records if each.HasField("history")):
        row = {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.item}
        if "loss" in row:
            losses.append((row["_step"], row["loss"]))
        for name in row.keys() & EXPECTED.keys():
            found.setdefault(name, []).append((int(row["layer_norms_step"]), row[name]))
    assert found == EXPECTED
    assert losses == [(now, now / 4) for now in range(4)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More metrics than one request of MLflow's may have, and a name with characters that it refuses."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    many = {f"{i}": LayerNorms(1.0, 1.0, 1.0, float(i)) for i in range(251)}
    with mlflow.start_run() as run:
        give(to_mlflow())
        to_mlflow(run.info.run_id)(30, many)
    client = mlflow.MlflowClient()
    assert len(client.get_run(run.info.run_id).data.metrics) == 4 * 251 + len(EXPECTED)
    for name, values in EXPECTED.items():
        allowed = name.replace("(", "_").replace(")", "_").replace(",", "_")
        history = client.get_metric_history(run.info.run_id, allowed)
        assert [(metric.step, metric.value) for metric in history] == values


def test_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters by steps; a skipped step, an unknown norm and 0 are masked, so that the background shows."""
    drawn = []
    monkeypatch.setattr("sharded_lamb.pictures.heat_map.save", lambda figure, path: drawn.append(figure))
    extremes: Records = [(30, {"a.weight": LayerNorms(0.0, 0.0, 0.0, 1e-3)})]
    for of in ("ratio", "gradient"):
        heat_map = HeatMap(of)
        for step, norms in RECORDS + extremes:
            heat_map(step, norms)
        heat_map.save(tmp_path / "map.png")
    for figure, title, expected in (
        (drawn[0], "trust ratio", [[0.5, 0.25, None, 1e-3], [4.0, None, None, None]]),
        (drawn[1], "gradient norm", [[3.5, 3.25, None, None], [None, None, None, None]]),
    ):
        axis = figure.axes[0]
        (mesh,) = axis.collections
        assert mesh.get_array().tolist() == expected
        assert type(mesh.norm).__name__ == "LogNorm"
        assert axis.get_title() == title
        assert [label.get_text() for label in axis.get_yticklabels()] == [
            "a.weight",
            "b (group 1, parameter 0)",
        ]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "10", "20", "30"]
        assert axis.get_ylim() == (2.0, 0.0)  # the first parameter is at the top


def test_the_heat_maps_file(tmp_path: Path) -> None:
    heat_map = HeatMap()
    heat_map(0, RECORDS[2][1])
    heat_map(1, {"a": LayerNorms(1.0, 1.0, 1.0, 0.0)})  # nothing to scale by
    heat_map.save(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
