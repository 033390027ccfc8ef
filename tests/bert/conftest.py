"""A small corpus on disk, and the settings of a BERT that trains in a second."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

LENGTH = 32
VOCABULARY = 1024


def paragraphs() -> list[str]:
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())][:30]
    joined = "\n\n".join(topics)
    return [" ".join(part.split()) for part in joined.split("\n\n") if part.strip()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of blank-line-separated documents."""
    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    path.write_text("\n\n".join(paragraphs()))
    return path


@pytest.fixture(scope="session")
def tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration as plain data; `run_dir` is to be set by the test."""
    return {
        "seed": 3,
        "model": {
            "hidden_size": 32,
            "layers": 1,
            "heads": 2,
            "intermediate_size": 64,
            "max_positions": LENGTH,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "tokenizer": {"vocab_size": VOCABULARY},
        "data": {
            "source": [str(corpus)],
            "prepared": str(tmp_path_factory.mktemp("prepared")),
            "heldout_fraction": 0.02,
            "workers": 1,  # others would spawn interpreters
        },
        "phases": [
            {"steps": 6, "global_batch": 12, "sequence_length": LENGTH, "lr": 0.01, "warmup_fraction": 0.2}
        ],
        "checkpoint": {"every_steps": 100, "keep": 0},  # the last step is saved in any case
        "speed": {
            "peak_tflops": 1.0,
            "threads": 1,
        },  # else every run measures it; two threads beside other tests spin
    }


@pytest.fixture(scope="session")
def run_folder(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves behind, by its own writers: settings, tokenizer, a checkpoint, a Hugging Face folder."""
    from sharded_lamb.bert import outputs
    from sharded_lamb.bert.config import build_config
    from sharded_lamb.bert.model import build_bert
    from sharded_lamb.bert.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_of
    from sharded_lamb.checkpoint import Checkpoints

    folder = tmp_path_factory.mktemp("finetune") / "run"
    config = build_config(tree, [f"run_dir={folder}"])
    settings = config.tokenizer
    save_tokenizer(train_tokenizer(paragraphs(), settings), folder / "tokenizer", settings.lowercase, LENGTH)
    tokenizer = load_tokenizer(folder / "tokenizer")
    bert = build_bert(config, vocabulary_of(tokenizer))
    outputs.begin(folder, config, tokenizer)
    Checkpoints(folder / "checkpoints").save(2, bert)
    outputs.save_hugging_face(bert, tokenizer, folder / "hf")
    return folder


@pytest.fixture(scope="session")
def encoder(run_folder: Path) -> Any:
    from sharded_lamb.bert.finetune.encoder import read_encoder

    return read_encoder(run_folder)
