"""WordPiece: train the same pieces in every run, or load a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_lamb.bert.config import TokenizerConfig

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ALPHABET = 1000  # characters that get a piece of their own; rarer ones become [UNK]
_COUNTED_CHARACTERS = 200_000_000
_LONGEST_WORD = 100  # characters; WordPiece makes a longer word [UNK]


@dataclass(frozen=True)
class Vocabulary:
    """The properties of a vocabulary that the data and the model need."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    special: tuple[int, ...]
    continues_word: NDArray[np.bool_]  # [size]: the piece continues the word before it
    sentence_end: tuple[int, ...]

    @property
    def ordinary(self) -> NDArray[np.int64]:
        """Ids that may replace a masked token at random."""
        keep = np.ones(self.size, bool)
        keep[list(self.special)] = False
        return np.flatnonzero(keep)


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Any:
    """A WordPiece tokenizer of exactly `vocab_size` pieces, the same in every run.

    The library's trainer numbers the first pieces in the order of a hash map, and the numbers break ties between
    equally frequent merges. Passing the alphabet in sorted order, word-initial and continuing, fixes both. Words that
    become [UNK] for their length train no pieces: the trainer's time is quadratic in a word's length.

    Raises:
        ValueError: the corpus has too few different words for the vocabulary, or too many characters.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = list(documents)
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    alphabet = _alphabet(texts, normalizer)
    if not alphabet:
        raise ValueError("the corpus is empty: its documents contain only whitespace; check data.source")
    scratch = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    scratch.normalizer = normalizer
    long_words = pre_tokenizers.Split(Regex(f"^.{{{_LONGEST_WORD + 1},}}$"), "removed")
    scratch.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), long_words])
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*SPECIAL, *(f"##{c}" for c in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    scratch.train_from_iterator(texts, trainer)
    vocabulary = scratch.get_vocab()
    if len(vocabulary) != config.vocab_size:
        raise ValueError(f"tokenizer.vocab_size={config.vocab_size}: {_misfit(len(vocabulary), config)}")
    return _as_bert(vocabulary, normalizer)


def _misfit(pieces: int, config: TokenizerConfig) -> str:
    if pieces > config.vocab_size:
        return f"the characters of this corpus alone take {pieces} pieces; use {-pieces // 8 * -8} or more"
    remedy = f"use {pieces // 8 * 8} or fewer, or more text" if pieces >= 16 else "use more text"
    return f"this corpus gives {pieces} pieces (seen at least {config.min_frequency} times); {remedy}"


def _alphabet(texts: list[str], normalizer: Any) -> list[str]:
    counts: Counter[str] = Counter()
    counted = 0
    for text in texts:
        counts.update(normalizer.normalize_str(text))
        counted += len(text)
        if counted > _COUNTED_CHARACTERS:
            break
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return sorted(c for c, _ in ranked[:_ALPHABET] if not c.isspace())


def _as_bert(vocabulary: dict[str, int], normalizer: Any) -> Any:
    """The vocabulary in a tokenizer whose only special pieces are BERT's five."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, lowercase: bool, max_length: int) -> None:
    """Write a Hugging Face folder that `AutoTokenizer` reads."""
    from transformers import BertTokenizer

    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokens: dict[str, Any] = dict(zip(names, SPECIAL, strict=True))
    wrapped = BertTokenizer(
        tokenizer_object=tokenizer,
        do_lower_case=lowercase,
        model_max_length=max_length,
        **tokens,
    )
    wrapped.save_pretrained(str(folder))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder, as transformers wraps it.

    Raises:
        ValueError: the folder has no tokenizer, or one without BERT's special tokens.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(
            f"tokenizer.path={str(folder)!r}: no such folder; give one that save_pretrained wrote"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer.path={str(folder)!r}: the tokenizer cannot be loaded ({error}); give a folder that "
            f"save_pretrained wrote"
        ) from error
    for role in ("pad", "cls", "sep", "mask"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise ValueError(
                f"tokenizer.path={str(folder)!r}: expected BERT's special tokens, it has no {role} token"
            )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of the rules and the vocabulary."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    continues = np.zeros(size, bool)
    for piece, number in vocabulary.items():
        continues[number] = piece.startswith("##")
    return Vocabulary(
        size=size,
        pad=tokenizer.pad_token_id,
        cls=tokenizer.cls_token_id,
        sep=tokenizer.sep_token_id,
        mask=tokenizer.mask_token_id,
        special=tuple(sorted(tokenizer.all_special_ids)),
        continues_word=continues,
        sentence_end=tuple(vocabulary[mark] for mark in ".!?" if mark in vocabulary),
    )


def encode(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """Piece ids of each text, without special tokens; a literal `[MASK]` in a text is ordinary text."""
    for encoding in _plain(tokenizer).encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def encode_with_offsets(tokenizer: Any, texts: list[str]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """`encode`, with the first character of each piece in the text as given, and the one after its last."""
    for encoding in _plain(tokenizer).encode_batch(texts, add_special_tokens=False):
        yield encoding.ids, [begin for begin, _ in encoding.offsets], [end for _, end in encoding.offsets]


def _plain(tokenizer: Any) -> Any:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend
