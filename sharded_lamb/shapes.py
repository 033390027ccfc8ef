"""Lists of parameter shapes: test inputs for an optimizer without a model."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, fan_in: int, fan_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (fan_out, fan_in)
    yield f"{name}.bias", (fan_out,)


def _bert_layer(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("query", "key", "value"):
        yield from _linear(f"{name}.attention.self.{part}", width, width)
    yield from _linear(f"{name}.attention.output.dense", width, width)
    yield from _layer_norm(f"{name}.attention.output.LayerNorm", width)
    yield from _linear(f"{name}.intermediate.dense", width, 4 * width)
    yield from _linear(f"{name}.output.dense", 4 * width, width)
    yield from _layer_norm(f"{name}.output.LayerNorm", width)


def bert(layers: int, width: int, vocabulary: int = 30_528) -> Shapes:
    """BERT for pretraining (Devlin et al.) with a tied decoder; vocabulary padded to a multiple of 8, as NVIDIA's."""

    def parts() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "embeddings.word_embeddings.weight", (vocabulary, width)
        yield "embeddings.position_embeddings.weight", (512, width)
        yield "embeddings.token_type_embeddings.weight", (2, width)
        yield from _layer_norm("embeddings.LayerNorm", width)
        for layer in range(layers):
            yield from _bert_layer(f"encoder.layer.{layer}", width)
        yield from _linear("pooler.dense", width, width)
        yield from _linear("cls.predictions.transform.dense", width, width)
        yield from _layer_norm("cls.predictions.transform.LayerNorm", width)
        yield "cls.predictions.bias", (vocabulary,)
        yield from _linear("cls.seq_relationship", width, 2)

    return dict(parts())


def _tiny() -> Shapes:
    """Edge cases: primes, one element, a scalar, an empty tensor, more than a block, and a layer of each kind."""
    awkward: Shapes = {
        "scalar": (),
        "one": (1,),
        "empty": (0, 7),
        "prime": (257,),
        "odd": (31, 37),
        "conv.weight": (8, 3, 3, 3),
    }
    return {**awkward, **bert(layers=1, width=32, vocabulary=128)}


def named(name: str) -> Shapes:
    """The shapes {name: shape} of the list called ``name``.

    Raises:
        ValueError: there is no such list.
    """
    makers: dict[str, Callable[[], Shapes]] = {
        "tiny": _tiny,
        "bert-base": lambda: bert(layers=12, width=768),
        "bert-large": lambda: bert(layers=24, width=1024),
        "many-tiny": lambda: {f"tiny.{index}": (200,) for index in range(10_000)},
        "many-small": lambda: {f"small.{index}": (1000,) for index in range(10_000)},
    }
    if name not in makers:
        raise ValueError(f"shapes must be one of {sorted(makers)}, got {name!r}")
    return makers[name]()


def read_json(path: Path) -> Any:
    """The content of a user's JSON file.

    Raises:
        ValueError: it is damaged; the message names it.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{path} is not JSON: {error}") from None


def load(name: str) -> Mapping[str, Sequence[int]]:
    """The list called ``name``, or that of a JSON file ``{name: shape}`` (``name`` ends in .json).

    Raises:
        ValueError: there is no such list, or the file holds no JSON object of shapes.
        OSError: the file cannot be read.
    """
    if not name.endswith(".json"):
        return named(name)
    listed = read_json(Path(name))
    if not isinstance(listed, dict) or not all(isinstance(shape, list) for shape in listed.values()):
        raise ValueError(f"{name} must hold a JSON object {{name: [size, …]}}")
    return listed
