"""BERT as transformers builds it, trained on the masked places only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharded_lamb.bert.config import ModelConfig, Precision, RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.tokenizer import Pieces

_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}  # flash attention where torch has it


class Losses(torch.nn.Module):
    """The forward pass of pretraining around a Hugging Face BERT, for DDP, DeepSpeed and torch.compile to wrap.

    Returns [4]: the sums of the masked-piece loss, of the next-sentence loss, and of the right guesses of
    each. Sums, not means: only the caller knows what the whole global batch holds.
    """

    def __init__(self, bert: Any, *, nsp: bool, autocast: bool = False) -> None:
        super().__init__()
        # Called `module`, as wrappers call what they wrap: parameters are known by BERT's own names.
        self.module, self._nsp, self._autocast = bert, nsp, autocast

    def forward(self, batch: MicroBatch) -> Tensor:
        # Inside, because DeepSpeed's engine switches off what is switched on around it.
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self._autocast):
            return self._sums(batch)

    def _sums(self, batch: MicroBatch) -> Tensor:
        core = self.module.bert
        attention = None
        if batch.documents is not None:
            attention = (batch.documents[:, None, :, None] == batch.documents[:, None, None, :]).contiguous()
        hidden = core(
            input_ids=batch.tokens,
            attention_mask=attention,
            token_type_ids=batch.segments,
            position_ids=batch.positions,
        )
        # [B, L, H] -> [M, H]: the vocabulary-wide head sees nothing but predicted places.
        picked = hidden.last_hidden_state.flatten(0, 1).index_select(0, batch.places)
        logits = self.module.cls.predictions(picked).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        right = (logits.detach().argmax(1) == batch.labels).sum()
        if not self._nsp:
            zero = torch.zeros_like(loss.detach())
            return torch.stack([loss, zero, right.to(loss.dtype), zero])
        assert batch.follows is not None
        pair = self.module.cls.seq_relationship(hidden.pooler_output).float()
        pair_loss = F.cross_entropy(pair, batch.follows, reduction="sum")
        pair_right = (pair.detach().argmax(1) == batch.follows).sum()
        return torch.stack([loss, pair_loss, right.to(loss.dtype), pair_right.to(loss.dtype)])


@dataclass(frozen=True)
class ModelSize:
    """Counts that the FLOP and memory formulas need."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    def flops(self, tokens: int, predicted: int, length: int) -> int:
        """Floating point operations of forward and backward over `tokens` places, padding included.

        6 per weight and place (2 forward, 4 backward) for the matrices of the layers, and of the head for
        predicted places; 12 · length · hidden per layer and place for attention (QKᵀ and AV). Lookups, norms,
        softmax, recomputation under activation checkpointing and the optimizer are left out.
        """
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        body = self.layers * (6 * layer + 12 * length * self.hidden)
        head = 6 * (self.hidden**2 + self.hidden * self.vocabulary)
        return tokens * body + predicted * head


def padded_vocabulary(pieces: Pieces, config: ModelConfig) -> int:
    return -(-pieces.size // config.pad_vocab_to) * config.pad_vocab_to


def hf_config(config: ModelConfig, vocabulary: int, pad: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
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


def resolve_precision(precision: Precision) -> Precision:
    """What `auto` means here: mixed precision where bf16 is multiplied in hardware (else it is emulated)."""
    if precision != "auto":
        return precision
    able = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return "bf16_autocast" if fast else "fp32"


def build_bert(config: RunConfig, pieces: Pieces, unigram: Path | None = None) -> Any:
    """BertForPreTraining (with next-sentence prediction) or BertForMaskedLM, from `config.seed` or a folder.

    Raises:
        ValueError: the pretrained folder does not fit.
    """
    from transformers import BertForMaskedLM, BertForPreTraining

    kind = BertForPreTraining if config.data.nsp else BertForMaskedLM
    torch.manual_seed(config.seed)
    if config.model.pretrained is not None:
        bert = _load_pretrained(kind, config.model.pretrained, pieces)
    else:
        bert = kind(hf_config(config.model, padded_vocabulary(pieces, config.model), pieces.pad))
        if config.model.unigram_bias and unigram is not None:
            _start_at_unigram(bert, np.load(unigram))
    if config.speed.activation_checkpointing:
        bert.gradient_checkpointing_enable({"use_reentrant": False})
    if config.speed.precision == "bf16":
        bert = bert.to(torch.bfloat16)
    return bert.train()


def _load_pretrained(kind: Any, folder: str, pieces: Pieces) -> Any:
    if not Path(folder).is_dir():
        raise ValueError(f"model.pretrained={folder!r}: no such folder; give one that save_pretrained wrote")
    bert = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if bert.config.vocab_size < pieces.size:
        raise ValueError(
            f"model.pretrained={folder!r}: its vocabulary of {bert.config.vocab_size} is smaller than the "
            f"tokenizer's {pieces.size}; set tokenizer.path to the tokenizer it was trained with"
        )
    return bert


def _start_at_unigram(bert: Any, counts: Any) -> None:
    """Begin at the unigram entropy instead of log(vocabulary): what the first steps would learn anyway."""
    bias = bert.cls.predictions.bias
    seen = torch.ones(bias.numel(), dtype=torch.float64)  # one more for each: no log of 0
    seen[: len(counts)] += torch.from_numpy(counts)
    with torch.no_grad():
        bias.copy_((seen / seen.sum()).log())


def whole_bert(bert: Any, weights: dict[str, Tensor]) -> Any:
    """A BERT of the same shape on the CPU that holds `weights` (all of its parameters, by name).

    The trained one's parameters don't save well: they are views of flat buckets, or cut over ranks.
    """
    fresh = type(bert)(bert.config).to(next(iter(weights.values())).dtype)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(weights[name])
    return fresh.train(bert.training)


def parameters_to_train(bert: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in bert.named_parameters() if p.requires_grad]
