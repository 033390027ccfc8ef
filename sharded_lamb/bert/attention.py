"""Self-attention over documents that lie one after another in one sequence of tokens, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Documents:
    """The documents of T tokens, the shortest first; in a mixture, bidirectional ones before causal ones."""

    offsets: Tensor  # [D + 1] int32: each document's first token, then T
    groups: tuple[tuple[int, int], ...]  # (documents, their length), by length
    limit: int  # no document is longer
    are_full: bool  # every document has `limit` tokens
    has_varlen: bool = False  # the device runs flash attention over documents of any lengths
    is_causal: bool = False  # a token attends to itself and those before it, else to all of its document
    parts: tuple[Documents, ...] = ()  # of a mixture: the bidirectional documents, the causal ones

    @staticmethod
    def of(lengths: NDArray[np.int64], limit: int, causal: int = 0) -> Documents:
        """``lengths``: [D], ascending; the last ``causal`` of them, which are causal, apart from the others."""
        parts: tuple[Documents, ...] = ()
        if 0 < causal < len(lengths):
            own, others = lengths[: len(lengths) - causal], lengths[len(lengths) - causal :]
            parts = Documents.of(own, limit), Documents.of(others, limit, causal)
            groups = parts[0].groups + parts[1].groups
        else:
            each, counts = np.unique(lengths, return_counts=True)
            groups = tuple(zip(counts.tolist(), each.tolist(), strict=True))
        offsets = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        full = all(length == limit for _, length in groups)
        return Documents(offsets, groups, limit, full, is_causal=causal == len(lengths), parts=parts)

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.groups)

    @property
    def causal_count(self) -> int:
        return self.parts[1].count if self.parts else self.count * self.is_causal

    @property
    def tokens(self) -> int:
        return sum(count * length for count, length in self.groups)

    @property
    def pairs(self) -> int:
        """Pairs of tokens of which the first attends to the second."""
        if self.parts:
            return sum(part.pairs for part in self.parts)
        each = ((n, length * (length + 1) // 2 if self.is_causal else length**2) for n, length in self.groups)
        return sum(count * pairs for count, pairs in each)

    def to(self, device: torch.device) -> Documents:
        has_varlen = (
            device.type == "cuda"
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
        )
        offsets, parts = (
            self.offsets.to(device, non_blocking=True),
            tuple(part.to(device) for part in self.parts),
        )
        return replace(self, offsets=offsets, has_varlen=has_varlen, parts=parts)

    def pinned(self) -> Documents:
        return replace(
            self, offsets=self.offsets.pin_memory(), parts=tuple(part.pinned() for part in self.parts)
        )


class DocumentAttention(nn.Module):
    """Replaces a `BertSelfAttention` and keeps its submodules: parameters keep their names.

    Full documents take SDPA without a mask. Others take flash attention's kernel for documents of any lengths where it
    runs (a GPU of compute capability 8.0, 16-bit values, heads of 8, 16 … 256), else SDPA for each length.
    """

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = replaced.query, replaced.key, replaced.value
        self._heads: int = replaced.num_attention_heads
        self._dropout: float = replaced.dropout.p

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        documents: Documents | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, T, H] over ``documents``, or [B, L, H] as Hugging Face's own, with an optional mask."""
        shape = (*hidden_states.shape[:-1], self._heads, -1)
        q, k, v = (project(hidden_states).view(shape) for project in (self.query, self.key, self.value))
        dropout = self._dropout if self.training else 0.0
        if documents is None:
            out = _dense(q, k, v, dropout, attention_mask)
        else:
            out = attend(q[0], k[0], v[0], documents, dropout)[None]
        return out.flatten(-2), None


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float) -> Tensor:
    """[T, heads, width] each → [T, heads, width]: attention inside each document."""
    if documents.parts:
        mixed: Tensor = by_part(q, k, v, documents, dropout)
        return mixed
    if documents.are_full:
        q, k, v = (x.view(-1, documents.limit, *x.shape[1:]) for x in (q, k, v))
        return _dense(q, k, v, dropout, is_causal=documents.is_causal).flatten(0, 1)
    if documents.has_varlen and q.dtype in _FLASH_DTYPES and q.shape[2] % 8 == 0 and q.shape[2] <= 256:
        return varlen(q, k, v, documents, dropout)
    out: Tensor = by_length(q, k, v, documents, dropout)
    return out


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float) -> Tensor:
    # The operator under torch.nn.attention.varlen, which has no dropout.
    offsets, limit = documents.offsets, documents.limit
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        offsets,
        offsets,
        limit,
        limit,
        dropout,
        is_causal=documents.is_causal,
        return_debug_mask=False,
    )[0]
    return out


def _dense(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """[B, L, heads, width] each → [B, L, heads, width]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    return out.transpose(1, 2).contiguous()


# Outside of compiled graphs, which would be specialized to the number of tokens of each part.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def by_part(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float) -> Tensor:
    """`attend` over bidirectional and causal documents."""
    sizes = [part.tokens for part in documents.parts]
    cuts = zip(documents.parts, *(torch.split(x, sizes) for x in (q, k, v)), strict=True)
    return torch.cat([attend(query, key, value, part, dropout) for part, query, key, value in cuts])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def by_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float) -> Tensor:
    """`attend` on any device, in any dtype."""
    sizes = [count * length for count, length in documents.groups]
    parts = []
    for (_, length), *group in zip(
        documents.groups, *(torch.split(x, sizes) for x in (q, k, v)), strict=True
    ):
        query, key, value = (x.view(-1, length, *x.shape[1:]) for x in group)
        parts.append(_dense(query, key, value, dropout, is_causal=documents.is_causal).flatten(0, 1))
    return torch.cat(parts)


def use_documents(bert: Any) -> None:
    """Replace the attention of every encoder layer of a Hugging Face BERT."""
    for layer in bert.bert.encoder.layer:
        layer.attention.self = DocumentAttention(layer.attention.self)
