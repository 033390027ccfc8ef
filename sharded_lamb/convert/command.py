"""``sharded-lamb convert``: the table of formats, reading, writing, and the notes on losses."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint, read_contents, write_contents
from sharded_lamb.comm.progress import with_progress
from sharded_lamb.convert import adam, apex, files, lamb, sgd, timm
from sharded_lamb.convert.common import Converted
from sharded_lamb.convert.deepspeed import WHY, read_deepspeed
from sharded_lamb.convert.inspect import checkpoint_of
from sharded_lamb.convert.positional import HOW, MODEL_KEYS, Unordered, in_order
from sharded_lamb.convert.tensorflow import from_tensorflow
from sharded_lamb.convert.weights import from_weights, read_weights, to_weights
from sharded_lamb.core.hyperparams import VARIANTS, check_max_grad_norm, validate_group

Read = Callable[[argparse.Namespace], Converted[InMemoryCheckpoint]]
Write = Callable[[Path, InMemoryCheckpoint], Converted[str]]
"""Returns a line about what it wrote, and notes about what it could not write."""


@dataclass(frozen=True)
class Format:
    """A checkpoint format. A direction that is None is not supported."""

    what: str
    read: Read | None
    write: Write | None
    is_folder: bool = False
    is_numbered: bool = False  # whether parameters are written by their place in the optimizer, not by name
    takes: tuple[str, ...] = ()  # the options of reading that the format uses


def _positional(convert: Callable[..., Converted[InMemoryCheckpoint]]) -> Read:
    def read(chosen: argparse.Namespace) -> Converted[InMemoryCheckpoint]:
        file = dict(files.read_torch(Path(chosen.source)))
        if {"state", "param_groups"} <= file.keys():  # an optimizer's state dict alone
            file = {"optimizer": file}
        if chosen.weights is not None:
            file["model"] = _weights(chosen.weights)
        names = None if chosen.names is None else files.read_names(chosen.names)
        return convert(file, names) if chosen.variant is None else convert(file, names, chosen.variant)

    return read


def _weights(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors" or path.is_dir():
        return Unordered(read_weights(str(path)))
    file = files.read_torch(path)
    return next((file[key] for key in MODEL_KEYS if isinstance(file.get(key), Mapping)), file)


def _to_torch(convert: Callable[[InMemoryCheckpoint], Converted[dict[str, Any]]]) -> Write:
    def write(target: Path, contents: InMemoryCheckpoint) -> Converted[str]:
        content, notes = convert(contents)
        files.write_torch(target, content)
        return described(contents, content["optimizer"]), notes

    return write


def _read_folder(chosen: argparse.Namespace) -> Converted[InMemoryCheckpoint]:
    return _ordered(read_contents(checkpoint_of(Path(chosen.source))), chosen), []


def _ordered(contents: InMemoryCheckpoint, chosen: argparse.Namespace) -> InMemoryCheckpoint:
    return contents if chosen.names is None else in_order(contents, files.read_names(chosen.names))


def _write_folder(target: Path, contents: InMemoryCheckpoint) -> Converted[str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_contents(target, contents)
    return described(contents), []


def _read_deepspeed(chosen: argparse.Namespace) -> Converted[InMemoryCheckpoint]:
    if not chosen.trust_pickle:
        raise ValueError(WHY)
    names = None if chosen.names is None else files.read_names(chosen.names)
    return read_deepspeed(Path(chosen.source), names, chosen.variant)


def _read_tensorflow(chosen: argparse.Namespace) -> Converted[InMemoryCheckpoint]:
    renames = [_pair(rename, "--rename", "REGEX=REPLACEMENT") for rename in chosen.rename]
    contents, notes = from_tensorflow(files.read_npz(Path(chosen.source)), renames, chosen.variant)
    if chosen.names is None and FORMATS[chosen.to].is_numbered:
        raise ValueError(
            f"--to {chosen.to} numbers parameters, and TensorFlow's files do not keep a model's order: {HOW}"
        )
    return _ordered(contents, chosen), notes


def _write_weights(target: Path, contents: InMemoryCheckpoint) -> Converted[str]:
    weights, notes = to_weights(contents)
    files.write_safetensors(target, weights)
    return described(replace(contents, weights=weights, states={})), notes


_POSITIONAL_OPTIONS = ("names", "weights", "variant")
FORMATS: dict[str, Format] = {
    "sharded_lamb": Format(
        "a folder of sharded_lamb.checkpoint: everything",
        _read_folder,
        _write_folder,
        is_folder=True,
        takes=("names",),
    ),
    "lamb": Format(
        "a file {model, optimizer} for Lamb and ShardedLamb.load_full_state_dict: everything",
        _positional(lamb.from_lamb),
        _to_torch(lamb.to_lamb),
        is_numbered=True,
        takes=("names", "weights"),
    ),
    "timm": Format(
        "a file {model, optimizer} of timm's Lamb: no masters",
        _positional(timm.from_timm),
        _to_torch(timm.to_timm),
        is_numbered=True,
        takes=_POSITIONAL_OPTIONS,
    ),
    "adam": Format(
        "a file {model, optimizer} of torch.optim.Adam or AdamW: no masters, no ratio, no clipping",
        _positional(adam.from_adam),
        _to_torch(adam.to_adam),
        is_numbered=True,
        takes=_POSITIONAL_OPTIONS,
    ),
    "sgd": Format(
        "a file {model, optimizer} of torch.optim.SGD under a LARS, or of timm's Lars: no masters, no steps",
        _positional(sgd.from_sgd),
        _to_torch(sgd.to_sgd),
        is_numbered=True,
        takes=_POSITIONAL_OPTIONS,
    ),
    "apex": Format(
        "a file {model, optimizer} of apex's FusedLAMB, and amp's 'master params' when read",
        _positional(apex.from_apex),
        _to_torch(apex.to_apex),
        is_numbered=True,
        takes=_POSITIONAL_OPTIONS,
    ),
    "deepspeed": Format(
        "a folder of engine.save_checkpoint, ZeRO 0 to 3: everything but schedulers; needs --trust-pickle",
        _read_deepspeed,
        None,
        is_folder=True,
        takes=("names", "variant", "trust_pickle"),
    ),
    "tensorflow": Format(
        "an .npz of LAMBOptimizer's variables, <var>/lamb_m, <var>/lamb_v and global_step: no options",
        _read_tensorflow,
        None,
        takes=("names", "rename", "variant"),
    ),
    "safetensors": Format(
        "weights only: a file; for reading also a folder or name of Hugging Face",
        lambda chosen: from_weights(read_weights(chosen.source)),
        _write_weights,
    ),
}


def directions() -> str:
    """Returns the table of formats."""
    rows = [f"  {'format':<14}from  to   what"]
    for name, form in FORMATS.items():
        read, write = ("yes" if way else "-" for way in (form.read, form.write))
        rows.append(f"  {name:<14}{read:<6}{write:<5}{form.what}")
    return "\n".join(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``convert``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Converts a checkpoint between programs. Prints a line for each thing that the target cannot hold. Holds the "
        "whole checkpoint in memory."
    )
    parser.epilog = "formats:\n" + directions()
    parser.add_argument("source", help="a file, a folder, or with safetensors a name on Hugging Face's Hub")
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--from", dest="form", required=True, choices=[n for n, f in FORMATS.items() if f.read]
    )
    parser.add_argument("--to", required=True, choices=[n for n, f in FORMATS.items() if f.write])
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    reading = parser.add_argument_group("information that a source lacks")
    reading.add_argument(
        "--names",
        "--model-names",
        type=Path,
        metavar="FILE",
        help="parameters' names in the optimizer's order: a JSON list, or one per line",
    )
    reading.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of an optimizer that was saved alone"
    )
    reading.add_argument("--variant", choices=sorted(VARIANTS), help="default: the format's own")
    reading.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of all groups, or max_grad_norm; the value in JSON (lr: initial_lr of schedulers too)",
    )
    reading.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="REGEX=REPLACEMENT",
        help="tensorflow: applied to variables' names, before the table for BERT",
    )
    reading.add_argument(
        "--trust-pickle",
        action="store_true",
        help="deepspeed: let its code load pickles, which can run any code",
    )


def _read(reader: Read, chosen: argparse.Namespace) -> Converted[InMemoryCheckpoint]:
    """Runs a reader; errors of other libraries become a ValueError that names the source."""
    try:
        return reader(chosen)
    except (OSError, ImportError):
        raise
    except ValueError as error:
        if str(chosen.source) in str(error):
            raise
        raise ValueError(f"{chosen.source}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{chosen.source} cannot be read as {chosen.form}: {type(error).__name__}: {error}. It is damaged, or has "
            f"another format"
        ) from error


def run(chosen: argparse.Namespace) -> int:
    """Returns the exit code. Under torchrun only the first rank runs.

    Raises:
        ValueError, OSError, ImportError: the source cannot be read, the target exists, or an option is wrong.
    """
    if int(os.environ.get("RANK", "0")):
        return 0
    source, target = FORMATS[chosen.form], FORMATS[chosen.to]
    assert source.read is not None
    assert target.write is not None
    _check_options(chosen, source)
    inputs = (chosen.source, chosen.weights, chosen.names)
    files.check_target(chosen.target, inputs, target.is_folder, chosen.force)
    work = with_progress(("read", "write"), "convert")
    next(work)
    contents, notes = _read(source.read, chosen)
    if not contents.groups and chosen.to not in ("sharded_lamb", "safetensors"):
        raise ValueError(f"{chosen.source} holds weights only: convert it to sharded_lamb or safetensors")
    if contents.groups:
        check_max_grad_norm(contents.optimizer.get("max_grad_norm"))
    contents = _set(contents, [_pair(given, "--set", "KEY=VALUE") for given in chosen.set])
    next(work)
    written, more = target.write(chosen.target, contents)
    notes += more
    work.close()
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {chosen.target} ({chosen.to}): {written}")
    return 0


def _check_options(chosen: argparse.Namespace, source: Format) -> None:
    """Raises ValueError for an option without effect."""
    for option in (*_POSITIONAL_OPTIONS, "rename", "trust_pickle"):
        if getattr(chosen, option) and option not in source.takes:
            users = [name for name, form in FORMATS.items() if option in form.takes]
            flag = option.replace("_", "-")
            raise ValueError(
                f"--{flag} is for --from {', '.join(users)}, and has no effect with {chosen.form}"
            )


def _pair(given: str, flag: str, form: str) -> tuple[str, str]:
    key, separator, value = given.partition("=")
    if not separator or not key:
        raise ValueError(f"{flag} must be {form}, got {given!r}")
    return key, value


def _set(contents: InMemoryCheckpoint, given: Sequence[tuple[str, str]]) -> InMemoryCheckpoint:
    """Returns the contents with the options of ``--set``. Raises ValueError for unknown or invalid ones."""
    options, optimizer = {}, dict(contents.optimizer)
    for key, text in given:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--set {key}={text}: the value is not JSON ({error}); strings need quotes"
            ) from error
        if key == "variant":
            raise ValueError(
                "--set variant would change a name but no option: --set the options themselves, or give --variant "
                "if the source's format takes it"
            )
        if key == "max_grad_norm":
            check_max_grad_norm(value)
            optimizer[key] = value
        elif not contents.groups or key not in contents.groups[0]["options"]:
            known = (
                sorted(contents.groups[0]["options"])
                if contents.groups
                else "none, since it holds weights only"
            )
            raise ValueError(f"--set {key}: the options of this checkpoint are {known}, and max_grad_norm")
        else:
            options[key] = tuple(value) if isinstance(value, list) else value
    groups = [{**group, "options": _over(group["options"], options)} for group in contents.groups]
    for group in groups:
        validate_group(group["options"])
    return replace(contents, groups=groups, optimizer=optimizer)


def _over(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group's options, overridden by ``given``. A new ``lr`` also sets the schedulers' ``initial_lr``."""
    both = {"initial_lr": given["lr"]} if "lr" in given and "initial_lr" in own else {}
    return {**own, **both, **given}


def described(contents: InMemoryCheckpoint, written: Mapping[str, Any] | None = None) -> str:
    """Returns a one-line summary; ``written``: the optimizer's state dict that was made of it."""
    elements = sum(value.numel() for value in contents.weights.values())
    steps = sorted({int(state["step"]) for state in contents.states.values()})
    states = contents.states if written is None else written["state"]
    groups = contents.groups if written is None else written["param_groups"]
    masters = sum("master" in state for state in states.values())
    said = f"{len(contents.weights)} tensors of {elements:,} elements"
    if not contents.states:
        return f"{said}, weights only"
    at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    ending = "s" * (len(groups) != 1)
    return f"{said}, {len(states)} with moments ({masters} with masters), {at}, {len(groups)} group{ending}"
