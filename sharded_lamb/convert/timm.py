"""timm's Lamb: numbered parameters, a step count per group, excluded parameters in groups without decay."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert import positional
from sharded_lamb.convert.common import (
    Converted,
    Note,
    differing,
    flags_of,
    group_options,
    left_out,
    scalars_of,
    widest_weights,
)
from sharded_lamb.convert.grouping import PlainGroup, lost_options, plain_groups
from sharded_lamb.convert.recognition import check_format, check_states, foreign_keys

_FLAGS = {
    "bias_correction": "bias_correction",
    "grad_averaging": "grad_averaging",
    "adapt_without_decay": "always_adapt",
    "decoupled_decay": "decoupled_decay",
    "caution": "caution",
}
_TIMM_CLIP = (0.0, 1.0)  # trust_clip=True there: the ratio is at most 1


def from_timm(
    file: Mapping[str, Any], names: Sequence[str] | None = None, variant: str | None = None
) -> Converted[InMemoryCheckpoint]:
    """{"model", "optimizer"} → contents.

    Raises:
        ValueError: parameters cannot be named, or options are not supported.
    """
    read, notes = positional.read(file, names)
    check_format(read.groups, "timm")
    check_states(read.raw_states, "timm")
    notes += foreign_keys(read.groups, "timm")
    clips = {group.get("max_grad_norm") for group in read.groups}
    clip = next(iter(clips)) if len(clips) == 1 else read.groups[0].get("max_grad_norm")
    if len(clips) > 1:
        notes.append(
            f"groups have max_grad_norm {sorted(map(str, clips))}, but clipping is over all groups: {clip} is used"
        )

    contents = InMemoryCheckpoint(
        read.weights,
        read.states(lambda group, state: group.get("step")),
        read.named_groups(partial(timm_options, variant=variant)),
        {"max_grad_norm": clip, "skipped_steps": 0},
        {},
        read.aliases,
    )
    return contents, notes


def timm_options(group: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    """Options of a group of timm's Lamb."""
    own: dict[str, Any] = flags_of(group, _FLAGS)
    if "trust_clip" in group:
        own["trust_clip"] = _TIMM_CLIP if group["trust_clip"] else None
    if group.get("decoupled_decay") and group.get("corrected_weight_decay"):
        own["corrected_weight_decay"] = float(group["max_lr_snapshot"])
    return group_options(variant or "timm", {**scalars_of(group), **own})


def to_timm(contents: InMemoryCheckpoint) -> Converted[dict[str, Any]]:
    """InMemoryCheckpoint → {"model", "optimizer"}, the latter for ``timm.optim.Lamb.load_state_dict``."""
    weights, notes = widest_weights(contents)
    groups, cut = plain_groups(contents)
    steps, behind = positional.group_steps([group.names for group in groups], contents.states)
    clip = contents.optimizer.get("max_grad_norm")
    packed = [
        positional.PositionalGroup(group.names, {**_group(group, clip), "step": step})
        for group, step in zip(groups, steps, strict=True)
    ]
    file = positional.write(weights, contents.aliases, packed, positional.moments(contents.states))
    notes += [*cut, *behind, *_lost(groups), *left_out(contents)]
    notes.append(f"timm reads max_grad_norm from its constructor: Lamb(…, max_grad_norm={clip})")
    return file, notes


def _group(group: PlainGroup, clip: float | None) -> dict[str, Any]:
    options = group.options
    return {
        **scalars_of(options),
        "weight_decay": group.weight_decay,
        "bias_correction": options["bias_correction"] is not False,
        "grad_averaging": options["grad_averaging"],
        "max_grad_norm": clip,
        "trust_clip": _clip_of(options) == _TIMM_CLIP,
        "always_adapt": group.adapts if group.weight_decay == 0 else bool(options["adapt_without_decay"]),
        "caution": bool(options["caution"]),
        "decoupled_decay": bool(options["decoupled_decay"]),
        "corrected_weight_decay": bool(options["corrected_weight_decay"]),
        "max_lr_snapshot": float(options["corrected_weight_decay"] or options["lr"]),
        "foreach": None,
    }


def _clip_of(options: Mapping[str, Any]) -> tuple[float, float] | None:
    clip = options["trust_clip"]
    return None if clip is None else (float(clip[0]), float(clip[1]))


def _lost(groups: list[PlainGroup]) -> list[Note]:
    kept = {"bias_correction", "grad_averaging", "trust_clip", "decoupled_decay", "caution"}
    notes = lost_options(groups, kept, "timm's Lamb")
    notes += differing(
        "bias_correction",
        ["lr" for group in groups if group.options["bias_correction"] == "lr"],
        True,
        "timm's Lamb corrects bias inside the ratio only: its updates will differ",
    )
    clips = [_clip_of(group.options) for group in groups]
    notes += differing(
        "trust_clip",
        [clip for clip in clips if clip not in (None, _TIMM_CLIP)],
        None,
        f"timm's Lamb supports only None and {_TIMM_CLIP}: ratios will not be clipped",
    )
    fixed = [name for group in groups if group.weight_decay and not group.adapts for name in group.names]
    if fixed:
        notes.append(
            f"timm's Lamb applies a ratio wherever there is decay: {len(fixed)} parameters had decay and no ratio "
            f"({fixed[0]}), and will have one"
        )
    return notes
