"""What a fine-tuning starts from: the encoder of a run's folder or of a Hugging Face folder."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import checkpoint
from sharded_lamb.bert.attention import use_documents
from sharded_lamb.bert.config import load_config
from sharded_lamb.bert.model import build_bert
from sharded_lamb.bert.tokenizer import load_tokenizer, vocabulary_of
from sharded_lamb.checkpoint import Checkpoints, read_contents
from sharded_lamb.recipes.training.stateless_rng import key_of

_TOKENIZERS = ("tokenizer.json", "vocab.txt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Encoder:
    """A BERT's shape, its weights by the names of `BertModel` (None: random), and its tokenizer.

    Without a pooler among the weights (no next-sentence prediction), a classifier's pooler is random.
    """

    source: str
    config: Any  # transformers.BertConfig
    weights: dict[str, Tensor] | None  # fp32, on the CPU
    tokenizer: Any

    def with_head(self, kind: Any, outputs: int, seed: int) -> Any:
        """A Hugging Face model of class ``kind`` over documents without padding; its head has random weights.

        The pooler's weights are left out where ``kind`` has no pooler.
        """
        config = deepcopy(self.config)
        config.num_labels = outputs
        torch.manual_seed(key_of(seed, "weights") >> 1)
        model = kind(config)
        own = dict(model.bert.named_parameters())
        with torch.no_grad():
            for name, value in (self.weights or {}).items():
                if name in own or not name.startswith("pooler."):
                    own[name].copy_(value)
        use_documents(model)
        return model


def read_encoder(folder: Path, *, with_weights: bool = True) -> Encoder:
    """The encoder of a run's newest checkpoint, else of its folder ``hf``, or of a Hugging Face folder.

    Averages of the weights are read where the run keeps them: they are what it evaluates and exports.

    Raises:
        ValueError: the folder is neither, or has no weights (if they are wanted) or no tokenizer.
        CheckpointError: the run's newest checkpoint is damaged.
    """
    if (folder / "config.json").is_file():
        return _of_hugging_face(folder, with_weights)
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"--from {folder}: expected a run's folder (config.yaml) or a Hugging Face folder (config.json)"
        )
    checkpoints = Checkpoints(folder / "checkpoints").candidates()
    if checkpoints or not with_weights:
        return _of_run(folder, checkpoints[0] if with_weights else None)
    if not (folder / "hf" / "config.json").is_file():
        raise ValueError(
            f"--from {folder}: the run has no weights, neither in checkpoints/ nor in hf/; pretrain it, or fine-tune "
            f"from --weights random"
        )
    return _of_hugging_face(folder / "hf", with_weights)


def _of_run(folder: Path, saved: Path | None) -> Encoder:
    tokenizer = _tokenizer(folder / "tokenizer")
    config = load_config(str(folder / "config.yaml"), [])
    bert = build_bert(config, vocabulary_of(tokenizer))
    if saved is None:
        return Encoder(str(folder), bert.config, None, tokenizer)
    checkpoint.load(saved, bert)
    if config.optimizer.ema_decay:
        states = read_contents(saved).states
        averages = {name: state["ema"] for name, state in states.items() if "ema" in state}
        bert.load_state_dict(averages, strict=False)
    return Encoder(str(saved), bert.config, _values(bert.bert), tokenizer)


def _of_hugging_face(folder: Path, with_weights: bool) -> Encoder:
    import transformers

    tokenizer = _tokenizer(folder)
    config = transformers.AutoConfig.from_pretrained(str(folder))
    if config.model_type != "bert":
        raise ValueError(f"--from {folder}: its model is {config.model_type!r}, expected 'bert'")
    if config.vocab_size < vocabulary_of(tokenizer).size:
        raise ValueError(
            f"--from {folder}: the model's vocabulary of {config.vocab_size} is smaller than the tokenizer's "
            f"{vocabulary_of(tokenizer).size}; expected the model's own tokenizer"
        )
    if not with_weights:
        return Encoder(str(folder), config, None, tokenizer)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ValueError(f"--from {folder}: no weights; expected {_WEIGHTS[0]}")
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()  # heads that are not read are listed at length otherwise
    logging.disable_progress_bar()
    model: Any = transformers.BertModel
    bert, info = model.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
    missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
    if missing or info["mismatched_keys"]:
        raise ValueError(
            f"--from {folder}: its weights are not those of its config.json: missing {sorted(missing)[:3]}, of "
            f"other shapes {sorted(info['mismatched_keys'])[:3]}"
        )
    values = _values(bert)
    return Encoder(
        str(folder), config, {n: w for n, w in values.items() if n not in info["missing_keys"]}, tokenizer
    )


def _values(core: Any) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in core.named_parameters()}


def _tokenizer(folder: Path) -> Any:
    # transformers would make an empty tokenizer of a folder that has none.
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"{folder}: no tokenizer there; expected {' or '.join(_TOKENIZERS)}")
    return load_tokenizer(folder)
