"""DeepSpeed's checkpoints (``engine.save_checkpoint``; ZeRO 0 to 3) → contents, read by DeepSpeed's own code.

ZeRO 1 to 3: `deepspeed.utils.zero_to_fp32` joins masters from all ranks' partitions, and moments likewise. Step counts
and options are the first rank's.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert import positional
from sharded_lamb.convert.adam import adam_notes, adam_options, check_adam
from sharded_lamb.convert.apex import apex_options
from sharded_lamb.convert.common import (
    Converted,
    Note,
    group_options,
    moment_state,
    scalars_of,
    weights_of,
)
from sharded_lamb.convert.recognition import foreign_keys, looks_like
from sharded_lamb.convert.timm import timm_options
from sharded_lamb.core.hyperparams import GROUP_OPTIONS
from sharded_lamb.core.names import normalize
from sharded_lamb.core.rule import moments_of

WHY = (
    "DeepSpeed's files are pickles, and its code loads them without limits, so that a file from an untrusted source "
    "can run any code: give --trust-pickle if you trust it"
)
_COUNTS = ("global_steps", "global_samples")
_OF_ENGINE = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "sparse_tensor_module_names", "skipped_steps", *_COUNTS),
    *(
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
        "autotp_uc_info",
        "checkpoint_parallel_dims",
    ),
}
"""Keys of a model file that are read here or say nothing of training; others are schedulers' and ``client_state``."""


def read_deepspeed(
    source: Path, names: Sequence[str] | None = None, variant: str | None = None
) -> Converted[InMemoryCheckpoint]:
    """Reads a checkpoint of DeepSpeed. Loads pickles, which can run any code.

    Args:
        source: the folder passed to ``save_checkpoint``, whose ``latest`` is followed, or the folder of a tag.
        names: parameters' names in the optimizer's order, for files without ZeRO, which lack them.
        variant: the options' variant, if the optimizer was not this package's.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: there is no checkpoint, or it is a universal one, or of tensor, pipeline or expert parallelism.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reading DeepSpeed's checkpoints needs DeepSpeed: pip install deepspeed ({error})"
        ) from None
    folder = _tagged(source)
    if (folder / "zero").is_dir():
        raise ValueError(
            f"{folder} is a universal checkpoint, which lacks step counts: give the checkpoint it was made from"
        )
    model = _load(_first_model_file(folder))
    if model.get("mp_world_size", 1) != 1 or _parallel(model) or any(folder.glob("*expert*")):
        raise ValueError(
            f"{folder} was written under tensor, pipeline or expert parallelism, which is not supported"
        )
    if not any(folder.glob("*_optim_states.pt")):
        return _of_whole(model, names, variant)
    return _of_partitions(folder, model, variant)


def _tagged(source: Path) -> Path:
    if any(source.glob("*model_states.pt")):
        return source
    if not (source / "latest").is_file():
        raise ValueError(
            f"{source} is not a checkpoint of DeepSpeed: expected a folder with latest or *_model_states.pt"
        )
    return source / (source / "latest").read_text(encoding="utf-8").strip()


def _first_model_file(folder: Path) -> Path:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} lacks the first rank's model states (mp_rank_00)")


def _parallel(model: Mapping[str, Any]) -> bool:
    degrees = model.get("checkpoint_parallel_dimensions") or {}
    return any(degrees.get(key, 1) not in (1, None) for key in ("pp_degree", "tp_degree"))


# -- ZeRO 1, 2, 3 --------------------------------------------------------------------------------------------


def _of_partitions(
    folder: Path, model: Mapping[str, Any], variant: str | None
) -> Converted[InMemoryCheckpoint]:
    partitions = _Partitions(folder)
    shapes = model["param_shapes"]  # one {name: shape} per group, or per subgroup in ZeRO 3
    base = partitions.bases[0]
    owners = _owners(base["param_groups"], len(shapes))
    masters = partitions.whole("fp32")
    kinds = moments_of(lars=bool(base["param_groups"][0].get("lars")))
    moments = {kind: partitions.whole(kind) for kind in kinds}
    weights, aliases, notes = _weights(model, masters, partitions.stage)

    states: dict[str, dict[str, Tensor]] = {}
    members: list[list[str]] = [[] for _ in base["param_groups"]]
    for place, part in enumerate(shapes):
        step = _step(base["state"].get(place, {}), base["param_groups"][owners[place]])
        for name in map(normalize, part):
            members[owners[place]].append(name)
            own = {kind: whole[name] for kind, whole in moments.items() if name in whole}
            states[name] = moment_state(name, weights[name], own, step, kinds)
            if not torch.equal(masters[name].to(weights[name].dtype), weights[name]):
                raise ValueError(
                    f"the master of {name!r} in DeepSpeed's partitions is not the model's weight: the partitions hold "
                    f"parameters in another order than the checkpoint lists"
                )
            if weights[name].dtype != masters[name].dtype:
                states[name]["master"] = masters[name]
    options, said = _options(base["param_groups"], variant)
    groups = [{"names": names, "options": own} for names, own in zip(members, options, strict=True)]
    clip = _clip(partitions.optimizers[0], model)
    wide = {"max_grad_norm": clip, "skipped_steps": int(model.get("skipped_steps", 0))}
    return InMemoryCheckpoint(
        weights, states, groups, wide, _extra(model), aliases
    ), notes + said + _left_out(model)


class _Partitions:
    """The partitions of all ranks, joined by the functions of DeepSpeed's ``zero_to_fp32``.

    `ds_to_universal` is not used: its table of slices is wrong under ``round_robin_gradients``.
    """

    def __init__(self, folder: Path) -> None:
        from deepspeed.utils import zero_to_fp32

        with _silence():
            files = zero_to_fp32.get_optim_files(str(folder))
            self.optimizers = [_load(Path(file), mmap=True)["optimizer_state_dict"] for file in files]
            self.models = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(str(folder)))
        # With grad_accum_dtype fp32, ZeRO 1 in bf16 is BF16_Optimizer, which names no stage and has ZeRO 1's layout.
        self.stage = int(self.optimizers[0].get("zero_stage", 1))
        count = self.optimizers[0]["partition_count"]
        self.world_size = max(count) if isinstance(count, list) else int(count)
        if self.world_size != len(files):
            raise ValueError(
                f"{folder} is of {self.world_size} ranks, but has the partitions of {len(files)}"
            )
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        self.bases = [optimizer[key] for optimizer in self.optimizers]

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Returns {parameter: whole tensor} of a moment, or of "fp32": masters, buffers and frozen parameters."""
        from deepspeed.utils import zero_to_fp32

        flat = [self._flat(rank, kind) for rank in range(self.world_size)]
        without_frozen = kind != "fp32"
        with _silence():
            if self.stage == 3:
                tensors = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(
                    self.world_size, flat, self.models, without_frozen
                )
            else:
                paddings = self.optimizers[0].get("param_alignment_paddings")
                tensors = zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(
                    self.world_size, flat, self.models, without_frozen, paddings
                )
            return {normalize(n): t for n, t in zero_to_fp32.to_torch_tensor(tensors).items()}

    def _flat(self, rank: int, kind: str) -> list[Tensor]:
        """Returns a rank's partition of each group or subgroup."""
        if kind == "fp32":
            key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            return list(self.optimizers[rank][key])
        state = self.bases[rank]["state"]
        lacking = [place for place in sorted(state) if kind not in state[place]]
        if lacking or not state:
            raise ValueError(
                f"the checkpoint lacks {kind} of some group: its optimizer was not Adam or LAMB, or had made no step"
            )
        return [state[place][kind] for place in sorted(state)]


def _load(file: Path, **options: Any) -> Mapping[str, Any]:
    content: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=False, **options)
    return content


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppresses the output and progress bars of DeepSpeed's tools."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _owners(groups: Sequence[Mapping[str, Any]], parts: int) -> list[int]:
    """Returns the group of each part. ZeRO 3 splits groups into subgroups, which a group's "params" number."""
    by_place = {place: number for number, group in enumerate(groups) for place in group["params"]}
    if sorted(by_place) == list(range(parts)):
        return [by_place[place] for place in range(parts)]
    if len(groups) in (1, parts):
        return [0] * parts if len(groups) == 1 else list(range(parts))
    raise ValueError(
        f"the checkpoint has {len(groups)} groups in {parts} parts, and does not map parts to groups"
    )


def _step(state: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
    step = state.get("step", group.get("step"))
    if step is None:
        raise ValueError(
            f"the checkpoint has no step count: its optimizer's state has {sorted(map(str, state))}"
        )
    return step


def _weights(
    model: Mapping[str, Any], masters: Mapping[str, Tensor], stage: int
) -> tuple[dict[str, Tensor], dict[str, str], list[Note]]:
    """Returns weights and buffers in the model's dtypes, aliases and notes. ZeRO 3 files hold placeholder weights."""
    tied = {normalize(name): normalize(first) for name, first in (model.get("shared_params") or {}).items()}
    weights, aliases, notes = weights_of(model["module"])
    weights = {name: value for name, value in weights.items() if name not in tied}
    if stage == 3:
        weights = {name: masters[name].to(value.dtype) for name, value in weights.items()}
    return weights, aliases | tied, notes


# -- without ZeRO --------------------------------------------------------------------------------------------


def _of_whole(
    model: Mapping[str, Any], names: Sequence[str] | None, variant: str | None
) -> Converted[InMemoryCheckpoint]:
    """Reads an optimizer with numbered parameters; fp16 and bf16 runs of DeepSpeed's Lamb hold masters beside it."""
    optimizer = model.get("optimizer")
    if optimizer is None:
        raise ValueError(
            "the checkpoint has no optimizer state: the files of its ranks' partitions are missing"
        )
    if "fp32_groups_flat" in optimizer:
        raise ValueError(
            "the checkpoint is of DeepSpeed's fused fp16 optimizer, whose flat masters are not supported"
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
    contents = InMemoryCheckpoint(read.weights, states, groups, wide, _extra(model), read.aliases)
    return contents, notes + said + _left_out(model)


def _step_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    return _step(state, group)


# -- options -------------------------------------------------------------------------------------------------


def _options(groups: Sequence[Mapping[str, Any]], variant: str | None) -> Converted[list[dict[str, Any]]]:
    """Returns our options unchanged; those of DeepSpeed's Lamb or an Adam as their variant, with a note."""
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
    for form, of_theirs in (("timm", timm_options), ("apex", apex_options)):
        if looks_like(groups, form):
            return [of_theirs(group, variant) for group in groups], foreign_keys(groups, form)
    check_adam(groups)
    taken = variant or "adamw"
    note = (
        f"the optimizer is neither ShardedLamb nor DeepSpeed's Lamb: variant {taken} is assumed (--variant)"
    )
    # torch's key; DeepSpeed's Adam decouples by default.
    filled = [{"decoupled_weight_decay": True, **group} for group in groups]
    return [group_options(taken, adam_options(group)) for group in filled], [note, *adam_notes(filled)]


def _of_their_lamb(group: Mapping[str, Any]) -> dict[str, Any]:
    own = {**scalars_of(group), "trust_clip": (float(group["min_coeff"]), float(group["max_coeff"]))}
    if "bias_correction" in group:
        own["bias_correction"] = "lr" if group["bias_correction"] else False
    return own


def _clip(optimizer: Mapping[str, Any], model: Mapping[str, Any]) -> float | None:
    """Returns the norm DeepSpeed clipped at; 1.0, its default, if the config has none."""
    config = model.get("ds_config") or {}
    config = config if isinstance(config, Mapping) else {}
    clip = optimizer.get("clip_grad", config.get("gradient_clipping", 1.0))
    return float(clip) or None


def _extra(model: Mapping[str, Any]) -> dict[str, Any]:
    counts = {key: int(model[key]) for key in _COUNTS if isinstance(model.get(key), int)}
    return {"deepspeed": counts} if counts else {}


def _left_out(model: Mapping[str, Any]) -> list[Note]:
    kept = [str(key) for key, value in model.items() if key not in _OF_ENGINE and value is not None]
    return [f"left out: {', '.join(kept)}"] if kept else []
