"""Attention over documents without padding, against Hugging Face's own model over padded rows, in float64."""

import json
from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sharded_lamb.bert import attention
from sharded_lamb.bert.__main__ import main
from sharded_lamb.bert.attention import Documents, attend
from sharded_lamb.bert.config import build_config
from sharded_lamb.bert.data import BatchSource
from sharded_lamb.bert.model import Losses, build_bert, compile_layers
from sharded_lamb.bert.padding import PaddedLosses
from tests.bert.conftest import LENGTH
from tests.bert.test_data import source_of

PARTS = [{"nsp": False, "pack": True}, {"nsp": False, "pack": False}, {"nsp": True, "pack": True}]
IDS = ["packed", "one document a row", "pairs"]


def ours_and_theirs(
    tree: dict[str, Any], data: dict[str, Any], *overrides: str
) -> tuple[BatchSource, Any, Any]:
    """(samples, the recipe's model, Hugging Face's with the same weights), in float64."""
    tree = {**tree, "data": {**tree["data"], **data}}
    source, vocabulary, _ = source_of(tree, nsp=data["nsp"])
    bert = build_bert(build_config(tree, ["model.layers=2", *overrides]), vocabulary).double()
    theirs = type(bert)(bert.config).double()
    theirs.load_state_dict(bert.state_dict())
    return source, bert, theirs.train()


def padded_sums(theirs: Any, source: BatchSource, indices: Any) -> Tensor:
    """[2] sums of the losses of Hugging Face's model over rows [B, L] with a mask."""
    vocabulary, numbers = source._vocabulary, source.sample_numbers(indices)
    rows, follows = source.samples.rows(numbers), None
    if source.samples.manifest.nsp:
        rows, follows = source._next_sentences(rows, numbers, indices)
    masked, chosen = source._masker(rows, indices)
    document, position, segment = (np.zeros_like(rows) for _ in range(3))
    for b, row in enumerate(rows):
        number = place = seps = 0
        for i, piece in enumerate(row):
            if piece == vocabulary.pad:
                continue
            if piece == vocabulary.cls:
                number, place, seps = number + 1, 0, 0
            document[b, i], position[b, i] = number, place
            segment[b, i] = min(seps, 1) if follows is not None else 0
            place += 1
            seps += piece == vocabulary.sep
    inside = torch.from_numpy(document[:, None, :, None] == document[:, None, None, :])
    out = theirs(
        input_ids=torch.from_numpy(masked),
        attention_mask=inside,
        token_type_ids=torch.from_numpy(segment),
        position_ids=torch.from_numpy(position),
    )
    logits = out.prediction_logits if follows is not None else out.logits
    labels = torch.from_numpy(np.where(chosen, rows, -100))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    if follows is None:
        return torch.stack([loss, torch.zeros_like(loss)])
    pair = F.cross_entropy(out.seq_relationship_logits, torch.from_numpy(follows), reduction="sum")
    return torch.stack([loss, pair])


def documents_of(*lengths: int, limit: int = 16, varlen: bool = False) -> Documents:
    return replace(Documents.of(np.sort(lengths), limit), has_varlen=varlen)


def qkv(documents: Documents, dtype: torch.dtype, device: str = "cpu", width: int = 8) -> list[Tensor]:
    shape = int(documents.offsets[-1]), 2, width
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("data", PARTS, ids=IDS)
def test_losses_and_gradients_are_those_of_padded_rows(tree: dict[str, Any], data: dict[str, Any]) -> None:
    source, bert, theirs = ours_and_theirs(tree, data)
    indices = np.arange(24)
    batch = source.micro_batch(indices)
    assert len(batch.documents.groups) > 4, "the documents have no mixed lengths"
    assert len(batch.tokens) < 24 * LENGTH, "the rows have no padding"
    ours = Losses(bert, nsp=data["nsp"])(batch)[:2]
    expected = padded_sums(theirs, source, indices)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)  # logits are summed in fp32
    ours.sum().backward()
    expected.sum().backward()
    its = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(its) > 30
    for name, grad in its.items():
        mine = bert.get_parameter(name).grad
        assert (mine - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("data", PARTS, ids=IDS)
def test_the_forward_that_is_measured_beside_it_has_the_same_losses(
    tree: dict[str, Any], data: dict[str, Any]
) -> None:
    source, bert, _ = ours_and_theirs(tree, data)
    batch = source.micro_batch(np.arange(24))
    nsp = data["nsp"]
    torch.testing.assert_close(
        PaddedLosses(bert, nsp=nsp)(batch), Losses(bert, nsp=nsp)(batch), rtol=1e-6, atol=1e-6
    )


def test_parameters_keep_their_names_and_order_and_the_model_its_own_inputs(tree: dict[str, Any]) -> None:
    _, bert, theirs = ours_and_theirs(tree, PARTS[0])
    assert [name for name, _ in bert.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert list(bert.state_dict()) == list(theirs.state_dict())
    ids, kept = torch.randint(5, 99, (3, 11)), torch.arange(11) < torch.tensor([[11], [4], [7]])
    ours, expected = (
        model.bert(input_ids=ids, attention_mask=kept).last_hidden_state[kept] for model in (bert, theirs)
    )
    torch.testing.assert_close(ours, expected)


def test_dropout_acts_in_training_only(tree: dict[str, Any]) -> None:
    source, bert, _ = ours_and_theirs(tree, PARTS[0], "model.attention_dropout=0.5")
    losses, batch = Losses(bert, nsp=False), source.micro_batch(np.arange(24))
    first, second = losses(batch), losses(batch)
    assert not torch.equal(first, second)
    losses.eval()
    assert torch.equal(losses(batch), losses(batch))


@pytest.mark.parametrize("lengths", [(16, 16, 16), (4, 4, 4, 9)])
def test_no_attention_is_given_a_mask_or_a_padded_token(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0, is_causal: bool = False
    ) -> Tensor:
        assert attn_mask is None
        assert not is_causal
        seen.append(tuple(q.shape))
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    documents = documents_of(*lengths)
    _, _, v = tensors = qkv(documents, torch.float32)
    assert torch.equal(attend(*tensors, documents, 0.0), v)
    assert seen == [(n, 2, length, 8) for length, n in sorted(Counter(lengths).items())]


@pytest.mark.parametrize(
    ("dtype", "width", "varlen", "lengths", "takes"),
    [
        (torch.bfloat16, 64, True, (4, 9), True),
        (torch.float16, 256, True, (4, 9), True),
        (torch.float32, 64, True, (4, 9), False),
        (torch.bfloat16, 12, True, (4, 9), False),
        (torch.bfloat16, 264, True, (4, 9), False),
        (torch.bfloat16, 64, False, (4, 9), False),
        (torch.bfloat16, 64, True, (16, 16), False),
    ],
)
def test_flash_attention_takes_documents_of_any_lengths_where_it_runs(
    dtype: torch.dtype,
    width: int,
    varlen: bool,
    lengths: tuple[int, ...],
    takes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(attention, "varlen", lambda *args: taken.append(args) or args[0])
    documents = documents_of(*lengths, varlen=varlen)
    attend(*qkv(documents, dtype, width=width), documents, 0.0)
    assert bool(taken) == takes


def test_the_operator_takes_these_arguments() -> None:
    """On the meta device, which checks arguments and gives shapes: forward, backward, dropout."""
    documents = documents_of(3, 5, 5, 11, varlen=True)
    tensors = qkv(documents, torch.bfloat16, "meta", width=64)
    documents = replace(documents, offsets=documents.offsets.to("meta"))
    out = attend(*tensors, documents, 0.1)
    assert "Flash" in type(out.grad_fn).__name__ or "Select" in type(out.grad_fn).__name__
    assert (out.shape, out.dtype) == ((24, 2, 64), torch.bfloat16)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in tensors)
    arguments = [
        argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments
    ]
    assert arguments[:8] == ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p"]


def test_layers_are_compiled_once_for_any_lengths(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, with flash attention's operator in the graph."""
    compiled = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=compiled))
    config = build_config(tree, ["model.layers=2"])
    bert = build_bert(config, SimpleNamespace(size=64, pad=0)).to("meta", torch.bfloat16)  # type: ignore[arg-type]
    torch._dynamo.reset()
    compile_layers(bert)
    for lengths in ((3, 5, 5, 11), (4, 9), (2, 3, 4, 5, 6, 16), (7, 8, 9)):
        documents = documents_of(*lengths, varlen=True)
        hidden = torch.zeros(1, sum(lengths), 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        on_meta = replace(documents, offsets=documents.offsets.to("meta"))
        bert.bert.encoder(hidden, documents=on_meta).last_hidden_state.sum().backward()
    assert compiled.frame_count == 1
    flash = [n for graph in compiled.graphs for n in graph.graph.nodes if "flash" in str(n.target)]
    assert len(flash) == 1


def test_the_measurement_trains_both_ways_to_the_same_losses(tree: dict[str, Any], tmp_path: Path) -> None:
    """Through its command. Speeds are not asserted."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**tree, "run_dir": str(tmp_path / "run")}))  # JSON is YAML
    overrides = ["data.nsp=true", "phases.0.steps=3", "batch.max_micro_batch=8"]
    assert main(["padding", "--config", str(config), *overrides]) == 0
    result = json.loads((tmp_path / "run" / "padding.json").read_text())
    assert result["largest relative difference of a loss"] < 1e-5
    ours, theirs = result["last loss"].values()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert 0 < result["share of padding"] < 0.9
    assert min(result["forward and backward, tokens/s"].values()) > 0


def test_the_measurement_needs_a_learning_rate(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree))
    assert main(["padding", "--config", str(config), "phases.0.lr=auto"]) == 1
    assert "phases.0.lr='auto': expected a number" in capsys.readouterr().err
