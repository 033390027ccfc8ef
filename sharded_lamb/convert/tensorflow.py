"""TensorFlow's LAMBOptimizer: an .npz of variables, their slots `<var>/lamb_m` and `<var>/lamb_v`, and global_step.

BERT's names in Google's checkpoints become Hugging Face's. Kernels are (in, out) in TensorFlow and (out, in) in torch,
so they and their slots are transposed. Make the .npz with `tf.train.load_checkpoint` and ``numpy.savez``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert.common import Converted, Note, group_options, moment_state

SLOTS = {"lamb_m": "exp_avg", "lamb_v": "exp_avg_sq", "adam_m": "exp_avg", "adam_v": "exp_avg_sq"}
"""{slot: kind}. Google's ALBERT names LAMB's slots adam_m and adam_v."""

TRANSPOSED = re.compile(r"(^|/)kernel$")
BERT: tuple[tuple[str, str], ...] = (
    (r"^(bert/embeddings/\w+_embeddings)$", r"\1/weight"),
    (r"(^|/)layer_(\d+)(?=/)", r"\1layer/\2"),
    (r"/kernel$", "/weight"),
    (r"/output_weights$", "/weight"),
    (r"/output_bias$", "/bias"),
    (r"/gamma$", "/weight"),
    (r"/beta$", "/bias"),
)
"""(regex, replacement) from variables to Hugging Face's names, applied in turn; then slashes become dots."""

TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
"""{other name in Hugging Face's heads: the name of TensorFlow's variable}."""

EXCLUDED = ("LayerNorm", "layer_norm", "bias")
"""Patterns that BERT's and ALBERT's pretraining excludes from decay."""


def from_tensorflow(
    arrays: Mapping[str, np.ndarray], renames: Sequence[tuple[str, str]] = (), variant: str | None = None
) -> Converted[InMemoryCheckpoint]:
    """{variable: array} → contents. ``renames``: (regex, replacement) for variables' names, before `BERT`.

    Raises:
        ValueError: a variable has one slot only, two variables share a name, there are no slots, or the file is of
            tf.train.Checkpoint or Keras, whose names are paths through objects.
    """
    if "_CHECKPOINTABLE_OBJECT_GRAPH" in arrays:
        raise ValueError(
            f"the file is of tf.train.Checkpoint or Keras, whose names are paths through objects, such as "
            f"{next(iter(arrays))}: write an .npz of the variables under their own names, with their slots "
            f"<var>/lamb_m and <var>/lamb_v, and global_step"
        )
    variables = {
        name: array for name, array in arrays.items() if _slot(name) is None and name != "global_step"
    }
    names = _names(list(variables), renames)
    weights = {names[name]: _tensor(array, name) for name, array in variables.items()}
    step = _step(arrays["global_step"]) if "global_step" in arrays else None
    raw: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        slot = _slot(name)
        if slot is None:
            continue
        variable = name.rsplit("/", 1)[0]
        if variable not in names:
            raise ValueError(f"the file has {name} but no variable {variable}")
        raw.setdefault(names[variable], {})[slot] = _tensor(array, variable)
    if not raw:
        raise ValueError(
            f"the file has no slots {', '.join(SLOTS)}: its variables look like {next(iter(arrays), None)!r}"
        )
    if step is None:
        raise ValueError(
            "the file has no global_step, which LAMB's bias correction needs: add it to the .npz"
        )
    states = {name: moment_state(name, weights[name], state, step) for name, state in raw.items()}
    options, notes = _options(weights, list(states), variant)
    without = [name for name in weights if name not in states]
    if without:
        notes.append(
            f"{len(without)} variables have no slots, and are in no group of the optimizer: {without[0]}"
        )
    tied = {name: first for name, first in TIED.items() if first in weights and _has_head(weights)}
    groups = [{"names": list(states), "options": options}]
    return InMemoryCheckpoint(
        weights, states, groups, {"max_grad_norm": None, "skipped_steps": 0}, {}, tied
    ), notes


def _has_head(weights: Mapping[str, Tensor]) -> bool:
    return "cls.predictions.bias" in weights


def _slot(name: str) -> str | None:
    return SLOTS.get(name.rsplit("/", 1)[-1]) if "/" in name else None


def _names(variables: Sequence[str], renames: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Returns {variable: our name}."""
    names: dict[str, str] = {}
    for variable in variables:
        name = variable
        for pattern, replacement in (*renames, *BERT):
            try:
                name = re.sub(pattern, replacement, name)
            except (re.error, IndexError) as error:
                raise ValueError(f"--rename {pattern}={replacement}: {error}") from error
        name = name.replace("/", ".")
        if name in names.values():
            other = next(key for key, value in names.items() if value == name)
            raise ValueError(
                f"{variable} and {other} would both be called {name!r}: distinguish them with --rename"
            )
        names[variable] = name
    return names


def _step(array: np.ndarray) -> float:
    if array.size != 1:
        raise ValueError(f"global_step has shape {array.shape}, expected one number")
    return float(array.reshape(()))


def _tensor(array: np.ndarray, variable: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{variable} is {array.dtype}, expected numbers")
    native = array.astype(array.dtype.newbyteorder("="))  # copied: an .npz may free its arrays
    tensor = torch.from_numpy(native)
    if TRANSPOSED.search(variable) is None or tensor.dim() < 2:
        return tensor
    if tensor.dim() > 2:
        raise ValueError(
            f"{variable} has shape {tuple(tensor.shape)}: kernels of more than two dimensions have another layout in "
            f"torch, which depends on their kind. Store it and its slots in torch's layout, under a name without "
            f"'kernel', and --rename that"
        )
    return tensor.t().contiguous()


def _options(
    weights: Mapping[str, Tensor], trained: Sequence[str], variant: str | None
) -> Converted[dict[str, Any]]:
    patterns = tuple(p for p in EXCLUDED if any(re.search(p, name) for name in trained))
    own = {} if variant else {"exclude_from_weight_decay": patterns, "exclude_from_layer_adaptation": None}
    options = group_options(variant or "paper_v3", own)
    notes: list[Note] = [
        f"TensorFlow checkpoints hold no options: variant {options['variant']}, lr {options['lr']}, betas "
        f"{options['betas']}, eps {options['eps']}, weight_decay {options['weight_decay']}, no decay and no adaptation "
        f"for {', '.join(options['exclude_from_weight_decay']) or 'nothing'}; --set KEY=VALUE for others"
    ]
    return options, notes
