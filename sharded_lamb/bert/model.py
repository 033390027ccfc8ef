"""BERT as transformers builds it, with the prediction head on the positions that predict only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharded_lamb.bert.attention import Documents, use_documents
from sharded_lamb.bert.config import ModelConfig, RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.tokenizer import Vocabulary

_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}  # flash attention where torch has it


class Losses(torch.nn.Module):
    """The forward pass of pretraining around a Hugging Face BERT, for DDP, DeepSpeed and torch.compile to wrap.

    Returns [4]: the sums of the loss of masked pieces, of the loss of the second objective, and of the right guesses of
    each. The second one is next sentences with ``nsp``, else the next pieces of causal documents. They are no means:
    only the caller knows the counts of the whole global batch.
    """

    def __init__(self, bert: Any, *, nsp: bool, autocast: bool = False) -> None:
        super().__init__()
        # Named `module`, as in other wrappers: parameters keep BERT's own names.
        self.module, self._nsp, self._autocast = bert, nsp, autocast

    def forward(self, batch: MicroBatch) -> Tensor:
        # Inside forward, because DeepSpeed's engine disables autocast around it.
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self._autocast):
            return self._sums(batch)

    def _sums(self, batch: MicroBatch) -> Tensor:
        hidden = self._hidden(batch)
        # [T, H] -> [M, H]: the vocabulary-wide head runs on the positions that predict only.
        picked = hidden.index_select(0, batch.output_positions)
        logits = self.module.cls.predictions(picked).float()
        if batch.causal_labels:
            sizes = [len(logits) - batch.causal_labels, batch.causal_labels]
            parts = zip(torch.split(logits, sizes), torch.split(batch.labels, sizes), strict=True)
            (loss, right), (causal_loss, causal_right) = (_summed(*part) for part in parts)
            return torch.stack([loss, causal_loss, right, causal_right])
        loss, right = _summed(logits, batch.labels)
        if not self._nsp:
            zero = torch.zeros_like(loss.detach())
            return torch.stack([loss, zero, right, zero])
        assert batch.follows is not None
        first = hidden.index_select(0, batch.documents.offsets[:-1])
        pair = self.module.cls.seq_relationship(self.module.bert.pooler(first[:, None])).float()
        pair_loss, pair_right = _summed(pair, batch.follows)
        return torch.stack([loss, pair_loss, right, pair_right])

    def _hidden(self, batch: MicroBatch) -> Tensor:
        return encode_documents(self.module.bert, batch)


def _summed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropies, number of right guesses) of [n, classes] and [n]."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return loss, (logits.detach().argmax(1) == labels).sum().to(loss.dtype)


def encode_documents(core: Any, batch: MicroBatch) -> Tensor:
    """[T, H], the output of a `BertModel`. All documents are one sequence of Hugging Face's modules."""
    embedded = core.embeddings(
        input_ids=batch.tokens[None],
        token_type_ids=batch.segments[None],
        position_ids=batch.positions[None],
    )
    hidden: Tensor = core.encoder(embedded, documents=batch.documents).last_hidden_state
    return hidden[0]


@dataclass(frozen=True)
class ModelSize:
    """Counts for the FLOP and memory formulas."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    def flops(self, tokens: int, predicted: int, pairs: int) -> int:
        """Floating point operations of forward and backward.

        6 per weight and token (2 forward, 4 backward) for the matrices of the layers, and of the head at masked
        positions; 12 · hidden per layer and pair of tokens for attention (QKᵀ and AV). Not counted: lookups, norms,
        softmax, recomputation under activation checkpointing, the optimizer.
        """
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        body = self.layers * (6 * layer * tokens + 12 * self.hidden * pairs)
        head = 6 * (self.hidden**2 + self.hidden * self.vocabulary)
        return body + predicted * head


def padded_vocabulary(vocabulary: Vocabulary, config: ModelConfig) -> int:
    return -(-vocabulary.size // config.pad_vocab_to) * config.pad_vocab_to


def hf_config(config: ModelConfig, vocab_size: int, pad: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        initializer_range=config.initializer_range,
        pad_token_id=pad,
        **_ATTENTION,
    )


def model_size(bert: Any) -> ModelSize:
    shape = bert.config
    return ModelSize(
        parameters=sum(p.numel() for p in bert.parameters()),
        layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        vocabulary=shape.vocab_size,
    )


def build_bert(config: RunConfig, vocabulary: Vocabulary, unigram: Path | None = None) -> Any:
    """BertForPreTraining (with next-sentence prediction) or BertForMaskedLM, from `config.seed` or a folder.

    Raises:
        ValueError: the pretrained folder does not fit.
    """
    from transformers import BertForMaskedLM, BertForPreTraining

    kind = BertForPreTraining if config.data.nsp else BertForMaskedLM
    torch.manual_seed(config.seed)
    if config.model.pretrained is not None:
        bert = _load_pretrained(kind, config.model.pretrained, vocabulary)
    else:
        bert = kind(hf_config(config.model, padded_vocabulary(vocabulary, config.model), vocabulary.pad))
        if config.model.unigram_bias and unigram is not None:
            _start_at_unigram(bert, np.load(unigram))
    use_documents(bert)
    if config.speed.activation_checkpointing:
        bert.gradient_checkpointing_enable({"use_reentrant": False})
    if config.speed.precision == "bf16":
        bert = bert.to(torch.bfloat16)
    return bert.train()


def _load_pretrained(kind: Any, folder: str, vocabulary: Vocabulary) -> Any:
    if not Path(folder).is_dir():
        raise ValueError(f"model.pretrained={folder!r}: no such folder; give one that save_pretrained wrote")
    bert = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if bert.config.vocab_size < vocabulary.size:
        raise ValueError(
            f"model.pretrained={folder!r}: its vocabulary of {bert.config.vocab_size} is smaller than the "
            f"tokenizer's {vocabulary.size}; set tokenizer.path to the model's own tokenizer"
        )
    return bert


def _start_at_unigram(bert: Any, counts: Any) -> None:
    """Start at the loss that the first steps would reach anyway: the unigram entropy instead of log(vocabulary)."""
    bias = bert.cls.predictions.bias
    seen = torch.ones(bias.numel(), dtype=torch.float64, device="cpu")  # add-one smoothing: no log of 0
    seen[: len(counts)] += torch.from_numpy(counts)
    with torch.no_grad():
        bias.copy_((seen / seen.sum()).log())


def whole_bert(bert: Any, weights: dict[str, Tensor]) -> Any:
    """A BERT of the same shape on the CPU with the values of `weights` (all of its parameters, by name).

    The trained model's own parameters don't save well: they are views of flat buckets, or sharded over ranks.
    """
    fresh = type(bert)(bert.config).to(next(iter(weights.values())).dtype)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(weights[name])
    return fresh.train(bert.training)


def compile_layers(bert: Any) -> None:
    """Compile each encoder layer by itself: parameters keep their names, and hooks fire layer by layer in backward,
    so that reductions overlap it. One compiled whole is one node of autograd, whose hooks fire at its end.
    """
    for layer in bert.bert.encoder.layer:
        layer.compile()
    bert.bert.encoder.register_forward_pre_hook(_mark_lengths, with_kwargs=True)


def _mark_lengths(encoder: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
    """Numbers of tokens and documents differ from batch to batch, unless documents are full: compile once for all."""
    documents: Documents | None = kwargs.get("documents")
    if documents is not None and not documents.are_full:
        torch._dynamo.maybe_mark_dynamic(args[0], 1)
        torch._dynamo.maybe_mark_dynamic(documents.offsets, 0)


def parameters_to_train(bert: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in bert.named_parameters() if p.requires_grad]
