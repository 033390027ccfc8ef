"""What groups and states of each optimizer's file have: files of another update rule are refused, other keys noted.

Moments of many optimizers have the same names, and mean something else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharded_lamb.convert.common import CARRIED, Note, keys_of

_ALL = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "step", "foreach", *CARRIED}
_OF_TORCH = {"maximize", "fused", "capturable", "differentiable"}
_MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq"})


@dataclass(frozen=True)
class Look:
    """One format's groups and states."""

    title: str
    marks: frozenset[str] = frozenset()  # keys, of which every group has one or more
    known: frozenset[str] = frozenset()  # more that they may have, beside `_ALL`
    states: frozenset[str] = _MOMENTS


LOOKS = {
    "lamb": Look("Lamb and ShardedLamb", frozenset({"variant"})),
    "timm": Look(
        "timm's Lamb",
        frozenset({"trust_clip", "always_adapt"}),
        frozenset(
            {
                *("bias_correction", "grad_averaging", "max_grad_norm"),
                *("caution", "decoupled_decay", "corrected_weight_decay", "max_lr_snapshot"),
            }
        ),
    ),
    "apex": Look("FusedLAMB", frozenset({"grad_averaging", "max_grad_norm"}), frozenset({"bias_correction"})),
    "sgd": Look(
        "SGD",
        frozenset({"dampening", "trust_coeff"}),
        frozenset({"momentum", "nesterov", "trust_clip", "always_adapt", *_OF_TORCH}),
        frozenset({"momentum_buffer"}),
    ),
    "adam": Look(
        "Adam",
        known=frozenset({"amsgrad", "decoupled_weight_decay", "bias_correction", "correct_bias", *_OF_TORCH}),
        states=_MOMENTS | {"max_exp_avg_sq"},
    ),
}

_MARKS = {
    "variant": "lamb",
    "trust_coeff": "sgd",
    "dampening": "sgd",
    "always_adapt": "timm",
    "trust_clip": "timm",
    "max_coeff": "deepspeed",
    "grad_averaging": "apex",
    "max_grad_norm": "apex",
}
"""{group key: its format}, the first match counts."""

_UNSUPPORTED = {
    "momentum_decay": "NAdam",
    "lookahead_k": "Lookahead around another",
    "weight_decouple": "one of pytorch_optimizer's",
}
"""{group key: an optimizer of another update rule}."""


def looks_like(groups: Sequence[Mapping[str, Any]], form: str) -> bool:
    """Whether all groups have the keys that those of ``form`` have."""
    return all(LOOKS[form].marks & group.keys() for group in groups)


def check_format(groups: Sequence[Mapping[str, Any]], form: str) -> None:
    """Raises ValueError if a group is of another format, since its moments follow another update rule."""
    look = LOOKS[form]
    for group in groups:
        other = next((name for key, name in _UNSUPPORTED.items() if key in group), None)
        if other is not None:
            raise ValueError(
                f"a parameter group has {keys_of(group)}: it is of {other}, which is not supported"
            )
        if form == "sgd" and "betas" in group:
            raise ValueError(
                f"a parameter group has {keys_of(group)}, and SGD's have no 'betas': give the file's format with --from"
            )
        mark = next((key for key in _MARKS if key in group), None)
        if mark is not None and _MARKS[mark] != form:
            raise ValueError(
                f"a parameter group has {mark!r} and looks like --from {_MARKS[mark]}, not like --from {form}"
            )
        if look.marks and not look.marks & group.keys():
            raise ValueError(
                f"a parameter group has {keys_of(group)} but no {' or '.join(sorted(look.marks))}, which groups of "
                f"{look.title} have: give the file's format with --from, if convert has it"
            )


def check_states(states: Mapping[str, Mapping[str, Any]], form: str) -> None:
    """Raises ValueError if a state holds what those of ``form`` do not."""
    for name, state in states.items():
        foreign = sorted(map(str, state.keys() - LOOKS[form].states))
        if foreign:
            raise ValueError(
                f"the state of {name!r} has {', '.join(foreign)}, which {LOOKS[form].title} does not have: it is of "
                f"another optimizer"
            )


def foreign_keys(groups: Iterable[Mapping[str, Any]], form: str) -> list[Note]:
    """A note of keys that groups of ``form`` do not have, which are left out."""
    look = LOOKS[form]
    foreign = sorted({str(key) for group in groups for key in group} - _ALL - look.marks - look.known)
    if not foreign:
        return []
    return [
        f"{', '.join(foreign)} of the groups left out, which {look.title} does not have: if its optimizer had another "
        f"update rule, its moments do not serve here"
    ]
