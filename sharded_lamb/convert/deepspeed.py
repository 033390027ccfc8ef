"""DeepSpeed's checkpoints (``engine.save_checkpoint``; ZeRO 0 to 3) → contents, read by DeepSpeed's own code.

ZeRO 1 to 3: `deepspeed.checkpoint.ds_to_universal` puts masters and moments together from all ranks' partitions, in a
folder that is deleted again; frozen weights of ZeRO 3 come from `deepspeed.utils.zero_to_fp32`. Step counts and options
are read from the first rank's file.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.checkpoint.contents import Contents
from sharded_lamb.convert import positional
from sharded_lamb.convert.common import Converted, Note, group_options, moment_state, scalars_of, weights_of
from sharded_lamb.hyperparams import GROUP_OPTIONS
from sharded_lamb.names import normalize

WHY = (
    "DeepSpeed's files are pickles and its own code opens them without limits, so that a file from an untrusted place "
    "can run anything: give --trust-pickle if you trust it"
)
_COUNTS = ("global_steps", "global_samples")


def read_deepspeed(
    source: Path, scratch: Path, names: Sequence[str] | None = None, variant: str | None = None
) -> Converted[Contents]:
    """Contents of a checkpoint. Pickles are trusted.

    Args:
        source: the folder given to ``save_checkpoint``, whose ``latest`` is followed, or that of one tag.
        scratch: a folder to put parts of 12 bytes an element into, for as long as this takes.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: no such checkpoint, or one that cannot be read: tensor and pipeline parallelism, universal ones.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reading DeepSpeed's checkpoints needs DeepSpeed: pip install deepspeed ({error})"
        ) from None
    root, tag = _tagged(source)
    folder = root / tag
    if (folder / "zero").is_dir():
        raise ValueError(
            f"{folder} is a universal checkpoint, without step counts: give the one it was made from"
        )
    first = _first_model_file(folder)
    model = torch.load(first, map_location="cpu", weights_only=False)
    if model.get("mp_world_size", 1) != 1 or _parallel(model):
        raise ValueError(f"{folder} was written under tensor or pipeline parallelism, which is not supported")
    files = sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    if not files:
        return _of_whole(model, names, variant)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".universal-") as made:
        return _of_partitions(root, tag, files[0], model, Path(made), variant)


def _tagged(source: Path) -> tuple[Path, str]:
    if any(source.glob("*model_states.pt")):
        return source.parent, source.resolve().name
    if not (source / "latest").is_file():
        raise ValueError(
            f"{source} is no checkpoint of DeepSpeed: expected a folder with latest, or with *_model_states.pt in it"
        )
    return source, (source / "latest").read_text().strip()


def _first_model_file(folder: Path) -> Path:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no file of model states of the first rank (mp_rank_00)")


def _parallel(model: Mapping[str, Any]) -> bool:
    degrees = model.get("checkpoint_parallel_dimensions") or {}
    return any(degrees.get(key, 1) not in (1, None) for key in ("pp_degree", "tp_degree"))


# -- ZeRO 1, 2, 3 --------------------------------------------------------------------------------------------


def _of_partitions(
    root: Path, tag: str, optimizer_file: Path, model: Mapping[str, Any], made: Path, variant: str | None
) -> Converted[Contents]:
    optimizer = torch.load(optimizer_file, map_location="cpu", weights_only=False)["optimizer_state_dict"]
    stage = int(optimizer["zero_stage"])
    _to_universal(root / tag, made)
    shapes = model["param_shapes"]  # a {name: shape} a group, or a subgroup in ZeRO 3
    base = optimizer["optimizer_state_dict"] if stage == 3 else optimizer["base_optimizer_state"]
    owners = _owners(base["param_groups"], len(shapes))
    weights, aliases, notes = _weights(root, tag, model, made, shapes, stage)

    states: dict[str, dict[str, Tensor]] = {}
    members: list[list[str]] = [[] for _ in base["param_groups"]]
    for place, part in enumerate(shapes):
        step = _step(base["state"].get(place, {}), base["param_groups"][owners[place]])
        for raw, shape in part.items():
            name = normalize(raw)
            members[owners[place]].append(name)
            saved = {kind: _universal(made, raw, kind, shape) for kind in ("exp_avg", "exp_avg_sq")}
            present = {kind: value for kind, value in saved.items() if value is not None}
            if present:
                states[name] = moment_state(name, weights[name], present, step)
                master = _universal(made, raw, "fp32", shape)
                if master is not None and weights[name].dtype != master.dtype:
                    states[name]["master"] = master
    options, said = _options(base["param_groups"], variant)
    groups = [{"names": names, "options": own} for names, own in zip(members, options, strict=True)]
    wide = {"max_grad_norm": _clip(optimizer, model), "skipped_steps": int(model.get("skipped_steps", 0))}
    left = _left_out(model)
    return Contents(weights, states, groups, wide, _extra(model), aliases), notes + said + left


def _to_universal(folder: Path, made: Path) -> None:
    """DeepSpeed's converter, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(made),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ZeRO 1 and 2 want client state that only Megatron writes, or this
    )
    with _silence():
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed's tools print, and draw progress bars of every tensor."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _universal(made: Path, name: str, kind: str, shape: torch.Size) -> Tensor | None:
    """One tensor that DeepSpeed's converter put together, flat under ZeRO 3; None where it found none."""
    file = made / "zero" / name / f"{kind}.pt"
    if not file.is_file():
        return None
    found = torch.load(file, map_location="cpu", weights_only=True)
    value = found["param"] if isinstance(found, dict) else found
    return value.reshape(shape) if isinstance(value, Tensor) else None


def _owners(groups: Sequence[Mapping[str, Any]], parts: int) -> list[int]:
    """The group of each part: ZeRO 3 cuts groups into subgroups, which are a group's "params"."""
    by_place = {place: number for number, group in enumerate(groups) for place in group["params"]}
    if sorted(by_place) == list(range(parts)):
        return [by_place[place] for place in range(parts)]
    if len(groups) in (1, parts):
        return [0] * parts if len(groups) == 1 else list(range(parts))
    raise ValueError(
        f"the checkpoint has {len(groups)} groups in {parts} parts, and does not say which is whose"
    )


def _step(state: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
    step = state.get("step", group.get("step"))
    if step is None:
        raise ValueError(
            f"the checkpoint has no step count: its optimizer's state has {sorted(map(str, state))}"
        )
    return step


def _weights(
    root: Path,
    tag: str,
    model: Mapping[str, Any],
    made: Path,
    shapes: Sequence[Mapping[str, torch.Size]],
    stage: int,
) -> tuple[dict[str, Tensor], dict[str, str], list[Note]]:
    """Weights in the model's dtype, buffers, frozen ones; and tied names."""
    tied = {normalize(name): normalize(first) for name, first in (model.get("shared_params") or {}).items()}
    weights, aliases, notes = weights_of(model["module"])
    weights = {name: value for name, value in weights.items() if name not in tied}
    aliases |= tied
    if stage == 3:  # the module holds placeholders
        for raw, shape in (pair for part in shapes for pair in part.items()):
            whole = _universal(made, raw, "fp32", shape)
            assert whole is not None, f"DeepSpeed's converter left out {raw}"
            weights[normalize(raw)] = whole.to(weights[normalize(raw)].dtype)
        frozen = [normalize(name) for name in model.get("frozen_param_shapes") or {}]
        if frozen:
            whole_model = _whole_model(root, tag)
            for name in frozen:
                weights[name] = whole_model[name].to(weights[name].dtype)
    return weights, aliases, notes


def _whole_model(root: Path, tag: str) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _silence():
        found = get_fp32_state_dict_from_zero_checkpoint(str(root), tag=tag)
    return {normalize(name): value for name, value in found.items()}


# -- without ZeRO --------------------------------------------------------------------------------------------


def _of_whole(
    model: Mapping[str, Any], names: Sequence[str] | None, variant: str | None
) -> Converted[Contents]:
    """An optimizer by place; fp16 and bf16 runs of DeepSpeed's Lamb keep masters beside it."""
    optimizer = model.get("optimizer")
    if optimizer is None:
        raise ValueError(
            "the checkpoint has no optimizer's state: files of its ranks' partitions are missing"
        )
    if "fp32_groups_flat" in optimizer:
        raise ValueError(
            "the checkpoint was written by DeepSpeed's fused fp16 optimizer, whose flat masters are not read"
        )
    base = optimizer.get("optimizer_state_dict", optimizer)
    read, notes = positional.read({"model": model["module"], "optimizer": base}, names)
    states = read.states(_step_of)
    for own, masters in zip(read.names, optimizer.get("fp32_groups") or [], strict=False):
        for name, master in zip(own, masters, strict=True):
            if name in states and master.dtype != read.weights[name].dtype:
                states[name]["master"] = master.detach()
    options, said = _options(read.groups, variant)
    groups = [{"names": own, "options": chosen} for own, chosen in zip(read.names, options, strict=True)]
    wide = {"max_grad_norm": _clip(optimizer, model), "skipped_steps": int(model.get("skipped_steps", 0))}
    contents = Contents(read.weights, states, groups, wide, _extra(model), read.aliases)
    return contents, notes + said + _left_out(model)


def _step_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    return _step(state, group)


# -- options -------------------------------------------------------------------------------------------------


def _options(groups: Sequence[Mapping[str, Any]], variant: str | None) -> Converted[list[dict[str, Any]]]:
    """Ours as they are; those of DeepSpeed's Lamb, and of an Adam, as the variants that they are."""
    ours = all("variant" in group for group in groups)
    lamb = all("max_coeff" in group for group in groups)
    if ours and variant is None:
        own = [
            {key: value for key, value in group.items() if key in GROUP_OPTIONS} | scalars_of(group)
            for group in groups
        ]
        return [group_options(g["variant"], o) for g, o in zip(groups, own, strict=True)], []
    if lamb:
        return [group_options(variant or "deepspeed", _of_their_lamb(group)) for group in groups], []
    taken = variant or "adamw"
    note = f"the optimizer is neither ShardedLamb nor DeepSpeed's Lamb: variant {taken} is assumed; --variant for more"
    return [group_options(taken, scalars_of(group)) for group in groups], [note]


def _of_their_lamb(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **scalars_of(group),
        "bias_correction": "lr" if group.get("bias_correction", True) else False,
        "trust_clip": (float(group["min_coeff"]), float(group["max_coeff"])),
    }


def _clip(optimizer: Mapping[str, Any], model: Mapping[str, Any]) -> float | None:
    """What DeepSpeed clipped at: 1.0 where its config says nothing."""
    config = model.get("ds_config") or {}
    config = config if isinstance(config, Mapping) else {}
    clip = optimizer.get("clip_grad", config.get("gradient_clipping", 1.0))
    return float(clip) or None


def _extra(model: Mapping[str, Any]) -> dict[str, Any]:
    counts = {key: int(model[key]) for key in _COUNTS if isinstance(model.get(key), int)}
    return {"deepspeed": counts} if counts else {}


def _left_out(model: Mapping[str, Any]) -> list[Note]:
    kept = [key for key in ("lr_scheduler", "data_sampler", "random_ltd") if model.get(key) is not None]
    return [f"left out: {', '.join(kept)}"] if kept else []
