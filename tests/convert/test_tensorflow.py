"""An .npz of TensorFlow's LAMB for a tiny BERT, from a float64 oracle with TensorFlow's names and orientation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharded_lamb import Lamb, checkpoint
from sharded_lamb.checkpoint.in_memory import read_contents
from tests import training
from tests.convert import cases
from tests.oracle import OracleLamb, variant_options

WIDE, INNER, WORDS, PLACES = 8, 16, 23, 10
DENSE = (WIDE, WIDE)
LAYER = {
    "attention/self/query": (DENSE, "attention.self.query"),
    "attention/self/key": (DENSE, "attention.self.key"),
    "attention/self/value": (DENSE, "attention.self.value"),
    "attention/output/dense": (DENSE, "attention.output.dense"),
    "intermediate/dense": ((WIDE, INNER), "intermediate.dense"),
    "output/dense": ((INNER, WIDE), "output.dense"),
}


def variables() -> dict[str, tuple[tuple[int, ...], str, bool]]:
    """Returns {TensorFlow's name: (shape, Hugging Face's name, whether it is transposed)}, written by hand."""
    table: dict[str, tuple[tuple[int, ...], str, bool]] = {
        "bert/embeddings/word_embeddings": ((WORDS, WIDE), "bert.embeddings.word_embeddings.weight", False),
        "bert/embeddings/token_type_embeddings": (
            (2, WIDE),
            "bert.embeddings.token_type_embeddings.weight",
            False,
        ),
        "bert/embeddings/position_embeddings": (
            (PLACES, WIDE),
            "bert.embeddings.position_embeddings.weight",
            False,
        ),
        "bert/pooler/dense/kernel": (DENSE, "bert.pooler.dense.weight", True),
        "bert/pooler/dense/bias": ((WIDE,), "bert.pooler.dense.bias", False),
        "cls/predictions/transform/dense/kernel": (DENSE, "cls.predictions.transform.dense.weight", True),
        "cls/predictions/transform/dense/bias": ((WIDE,), "cls.predictions.transform.dense.bias", False),
        "cls/predictions/output_bias": ((WORDS,), "cls.predictions.bias", False),
        "cls/seq_relationship/output_weights": ((2, WIDE), "cls.seq_relationship.weight", False),
        "cls/seq_relationship/output_bias": ((2,), "cls.seq_relationship.bias", False),
    }
    norms = {"bert/embeddings": "bert.embeddings", "cls/predictions/transform": "cls.predictions.transform"}
    for layer in range(2):
        google, hugging_face = f"bert/encoder/layer_{layer}", f"bert.encoder.layer.{layer}"
        for name, (shape, ours) in LAYER.items():
            table[f"{google}/{name}/kernel"] = (shape, f"{hugging_face}.{ours}.weight", True)
            table[f"{google}/{name}/bias"] = (shape[1:], f"{hugging_face}.{ours}.bias", False)
        norms[f"{google}/attention/output"] = f"{hugging_face}.attention.output"
        norms[f"{google}/output"] = f"{hugging_face}.output"
    for google, hugging_face in norms.items():
        table[f"{google}/LayerNorm/gamma"] = ((WIDE,), f"{hugging_face}.LayerNorm.weight", False)
        table[f"{google}/LayerNorm/beta"] = ((WIDE,), f"{hugging_face}.LayerNorm.bias", False)
    return table


TABLE = variables()


def gradient(name: str, step: int) -> np.ndarray:
    """In TensorFlow's orientation."""
    return np.asarray(training.draw(TABLE[name][0], "gradient", name, step).numpy())


def tf_run() -> OracleLamb:
    start = {name: training.draw(shape, "weight", name).numpy() for name, (shape, _, _) in TABLE.items()}
    excluded = {name for name in start if "LayerNorm" in name or "bias" in name}
    oracle = OracleLamb(start, lr=0.01, **variant_options("paper_v3", start, excluded, excluded))
    for step in range(3):
        oracle.step({name: gradient(name, step) for name in TABLE})
    return oracle


def npz_of(oracle: OracleLamb, slots: tuple[str, str] = ("lamb_m", "lamb_v")) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {"global_step": np.int64(3)}  # type: ignore[dict-item]
    for name, value in oracle.params.items():
        arrays[name] = value.astype(np.float32)
        arrays[f"{name}/{slots[0]}"] = oracle.m[name].astype(np.float32)
        arrays[f"{name}/{slots[1]}"] = oracle.v[name].astype(np.float32)
    return arrays


def tiny_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=PLACES,
    )
    return transformers.BertForPreTraining(config)


def ours(value: np.ndarray, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(value.T if TABLE[name][2] else value)).double()


@pytest.mark.parametrize("slots", [("lamb_m", "lamb_v"), ("adam_m", "adam_v")])
def test_a_bert_continues_like_in_tensorflow(
    slots: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = tf_run()
    np.savez(tmp_path / "bert.npz", **npz_of(oracle, slots))
    cases.convert(tmp_path / "bert.npz", tmp_path / "ours", "tensorflow", "sharded_lamb", "--set", "lr=0.01")
    said = capsys.readouterr().out
    assert "TensorFlow checkpoints hold no options: variant paper_v3" in said
    assert "no adaptation for LayerNorm, bias" in said

    model = tiny_bert()
    optimizer = Lamb(model.named_parameters())
    checkpoint.load(tmp_path / "ours", model, optimizer)  # checks names and shapes, tied ones included
    x = torch.randn(3, WIDE)
    google = (
        x.double().numpy() @ oracle.params["bert/pooler/dense/kernel"]
        + oracle.params["bert/pooler/dense/bias"]
    )
    assert np.allclose(model.bert.pooler.dense(x).detach().numpy(), google, atol=1e-5)

    own = dict(model.named_parameters())
    for step in range(3, 6):
        for name, (_, here, _) in TABLE.items():
            own[here].grad = ours(gradient(name, step), name).float()
        optimizer.step()
        oracle.step({name: gradient(name, step) for name in TABLE})
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}
    weights = {here: own[here].detach() for _, here, _ in TABLE.values()}
    assert weights.keys() == own.keys()
    expected = {here: ours(oracle.params[name], name) for name, (_, here, _) in TABLE.items()}
    cases.assert_close(weights, expected, 2e-6)


def test_formats_that_number_parameters_need_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorFlow's readers list variables in any order; many have one shape, so that moments fit other layers."""
    arrays, model = npz_of(tf_run()), tiny_bert()
    shuffled = sorted(arrays, key=lambda name: name[::-1])
    np.savez(tmp_path / "bert.npz", **{name: arrays[name] for name in shuffled})
    names = [name for name, _ in model.named_parameters()]
    (tmp_path / "names.txt").write_text("\n".join(names))
    where = (tmp_path / "bert.npz", tmp_path / "numbered.pt", "--from", "tensorflow", "--to")
    for form in ("lamb", "adam", "timm", "sgd", "apex"):
        assert "do not keep a model's order: give --names" in cases.refused(capsys, *where, form)

    cases.convert(tmp_path / "bert.npz", tmp_path / "ours", "tensorflow", "sharded_lamb")
    ordered = ("--names", str(tmp_path / "names.txt"))
    cases.convert(tmp_path / "bert.npz", tmp_path / "direct.pt", "tensorflow", "lamb", *ordered)
    cases.convert(tmp_path / "ours", tmp_path / "chained.pt", "sharded_lamb", "lamb", *ordered)
    for file in ("direct.pt", "chained.pt"):
        saved = torch.load(tmp_path / file, weights_only=True)
        assert saved["optimizer"]["param_groups"][0]["param_names"] == names
        optimizer = Lamb(model.named_parameters())
        optimizer.load_state_dict(saved["optimizer"])
        for google, (_, here, _) in TABLE.items():
            moment = optimizer.state[dict(model.named_parameters())[here]]["exp_avg"]
            assert torch.equal(moment, ours(arrays[f"{google}/lamb_m"], google).float()), here

    (tmp_path / "names.txt").write_text("\n".join([*names[1:], "other"]))
    ours_to_lamb = (tmp_path / "ours", tmp_path / "x.pt", "--from", "sharded_lamb", "--to", "lamb", *ordered)
    assert f"--names lacks {names[0]} (1 names)" in cases.refused(capsys, *ours_to_lamb)
    (tmp_path / "names.txt").write_text("\n".join([*names, "other"]))
    assert "--names has unknown other (1 names)" in cases.refused(capsys, *ours_to_lamb)


def test_other_names_by_rename(tmp_path: Path) -> None:
    """--rename applies to TensorFlow's names, before kernels are renamed to weights."""
    arrays = {
        "global_step": np.int64(7),
        "tower/fc/kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "tower/fc/kernel/lamb_m": np.ones((2, 3), np.float32),
        "tower/fc/kernel/lamb_v": np.ones((2, 3), np.float32),
        "tower/fc/scale": np.ones(2, np.float32),
    }
    np.savez(tmp_path / "file.npz", **arrays)
    rename = ("--rename", r"^tower/(\w+)/(kernel|scale)=model/\1/\2")
    cases.convert(tmp_path / "file.npz", tmp_path / "ours", "tensorflow", "sharded_lamb", *rename)
    contents = read_contents(tmp_path / "ours")
    assert contents.weights["model.fc.weight"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert contents.states["model.fc.weight"]["exp_avg"].shape == (3, 2)
    assert contents.groups[0]["names"] == ["model.fc.weight"]
    assert set(contents.weights) == {"model.fc.weight", "model.fc.scale"}


def test_incomplete_variables_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {
        "global_step": np.int64(7),
        "a/kernel": np.ones((2, 3), np.float32),
        "a/kernel/lamb_m": np.ones((2, 3), np.float32),
        "a/kernel/lamb_v": np.ones((2, 3), np.float32),
    }
    broken: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in whole.items() if not k.endswith("lamb_v")}, "has no exp_avg_sq"),
        ({k: v for k, v in whole.items() if k != "global_step"}, "has no global_step"),
        ({k: v for k, v in whole.items() if k != "a/kernel"}, "no variable a/kernel"),
        ({"a/kernel": whole["a/kernel"]}, "has no slots"),
        ({**whole, "a/gamma": np.ones(3)}, "would both be called 'a.weight'"),
        ({**whole, "a/kernel": np.array([["x"]])}, "expected numbers"),
        ({"_CHECKPOINTABLE_OBJECT_GRAPH": np.array(b"x"), **whole}, "is of tf.train.Checkpoint or Keras"),
    ]
    for number, (arrays, message) in enumerate(broken):
        np.savez(tmp_path / f"{number}.npz", **arrays)
        where = (
            tmp_path / f"{number}.npz",
            tmp_path / "ours",
            "--from",
            "tensorflow",
            "--to",
            "sharded_lamb",
        )
        assert message in cases.refused(capsys, *where), message
        assert not (tmp_path / "ours").exists()
