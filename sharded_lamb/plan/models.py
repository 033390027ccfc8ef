"""The parameter shapes of a Hugging Face config's model, without memory for them."""

from pathlib import Path

import torch
from torch import nn

from sharded_lamb.shapes import Shapes, read_json


def shapes_of_config(path: str) -> Shapes:
    """{name: shape} of a model's parameters; tied ones once.

    Args:
        path: of a config.json or its folder. The model is the first of its ``architectures``; without any, that of
            AutoModel.

    Raises:
        ImportError: transformers is not installed.
        ValueError: transformers does not know the config.
        OSError: there is no such file.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise OSError(f"--config {path}: no such file. Give the path of a Hugging Face config.json")
    content = read_json(file)
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(f"--config {path} has no model_type, by which Hugging Face finds the model")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"--config needs transformers (pip install transformers): {error}") from None
    config = transformers.AutoConfig.from_pretrained(file)
    named = next(iter(content.get("architectures") or ()), None)
    model: nn.Module
    with torch.device("meta"):
        if named is None:
            model = transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        else:
            kind = getattr(transformers, named, None)
            if kind is None:
                raise ValueError(f"--config {path}: transformers has no model {named!r} (its architectures)")
            model = kind(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
