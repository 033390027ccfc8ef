"""YAML files and overrides → a recipe's settings, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sharded_lamb.recipes.training.settings import plain, require
from sharded_lamb.recipes.training.shipped import names as shipped_names
from sharded_lamb.recipes.training.shipped import path_of

Settings = TypeVar("Settings")


def _nearest(key: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, choices, n=1, cutoff=0.5)
    listing = ", ".join(sorted(choices))
    return f"did you mean {close[0]!r}? (keys here: {listing})" if close else f"keys here: {listing}"


_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _inner_dataclass(annotation: Any) -> Any:
    """The dataclass inside an annotation such as `RampConfig | None` or `tuple[PhaseConfig, ...]`."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    inner = (_inner_dataclass(argument) for argument in get_args(annotation))
    return next((settings for settings in inner if settings is not None), None)


def _expectation(annotation: Any) -> str:
    """The values that an annotation allows, in the words of its constraints: "'auto' or a positive number"."""
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) is Literal:
        return " or ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        described = [item.description for item in get_args(annotation) if isinstance(item, FieldInfo)]
        return next(text for text in described if text)
    members = [_expectation(argument) for argument in reversed(get_args(annotation))]
    return " or ".join(dict.fromkeys(members))


def _locate(root: Any, location: Sequence[int | str]) -> tuple[str, Sequence[str], Any]:
    """(dotted name of a setting, the names beside it, its annotation) from pydantic's path to it in ``root``."""
    parts: list[str] = []
    names: list[str] = []
    annotation: Any = None
    settings: Any = root
    for part in location:
        if isinstance(part, int):
            parts.append(str(part))
        elif settings is not None:  # else a union's member, which pydantic appends to the path
            parts.append(part)
            names = [field.name for field in dataclasses.fields(settings)]
            annotation = get_type_hints(settings, include_extras=True).get(part)
            settings = _inner_dataclass(annotation)
    return ".".join(parts), names, annotation


def _as_list(name: str, annotation: Any, value: Any) -> str:
    """`: data.source=[my.txt]` for a single value of a list of any length."""
    has_any_length = any(Ellipsis in get_args(inner) for inner in (annotation, *get_args(annotation)))
    return f": {name}=[{value}]" if has_any_length and isinstance(value, str | int | float) else ""


def _readable(error: ValidationError, settings: Any, origin: str) -> ValueError:
    errors = [(*_locate(settings, item["loc"]), item) for item in error.errors()]
    out_of_range = {name for name, _, _, item in errors if item["type"] in _RANGE_ERRORS}
    lines = []
    for name, choices, annotation, item in errors:
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"unknown key {name!r}: {_nearest(name.rpartition('.')[2], choices)}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"key {name!r} is required but not set")
        elif item["type"] == "value_error":
            lines.append(str(item["ctx"]["error"]))
        elif item["type"] == "tuple_type":
            lines.append(
                f"{name}={item['input']!r}: expected a list{_as_list(name, annotation, item['input'])}"
            )
        elif item["type"] in _RANGE_ERRORS:
            lines.append(f"{name}={item['input']!r}: expected {_expectation(annotation)}")
        elif name not in out_of_range:  # else an error of another member of the same union
            lines.append(f"{name}={item['input']!r}: {item['msg'].lower()}")
    return ValueError(f"{origin}: " + "; ".join(dict.fromkeys(lines)))


def _set(tree: DictConfig, dotted: str, value: object) -> None:
    """Write `value` at a path such as `model.layers` or `phases.0.lr`.

    OmegaConf replaces a value by keys below it, and its index errors name neither value nor remedy.

    Raises:
        ValueError: the path passes through a value, or an index is out of range.
    """
    node: Any = OmegaConf.to_container(tree)
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            valid = part.isdigit() and int(part) < len(node)
            require(valid, dotted, value, f"an index below {len(node)} in place of {part!r}")
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.get(part)
        elif node is not None:
            raise ValueError(
                f"{dotted}={value!r}: {'.'.join(parts[:depth])!r} is a value, it has no keys inside"
            )
    OmegaConf.update(tree, dotted, value, merge=False)


def _parse(text: str) -> Any:
    """YAML as plain data, with OmegaConf's numbers: YAML 1.1 reads `6e-3` as text. `${…}` stays text.

    Raises:
        YAMLError, OmegaConfBaseException: malformed.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return plain["value"]


def build_config(
    settings: type[Settings], tree: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "config"
) -> Settings:
    """Validate nested plain data as ``settings``, a dataclass, after `key=value` overrides whose values are YAML.

    Raises:
        ValueError: an unknown key (the message has the nearest valid one), an invalid value, or a malformed override.
    """
    merged = OmegaConf.create(dict(tree))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        valid = bool(equals and dotted) and "[" not in dotted  # OmegaConf reads phases[0] as phases.0
        require(valid, "override", override, "key=value, such as model.layers=2 or phases.0.lr=0.01")
        try:
            value = _parse(text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(
                f"override {override!r}: the value is not valid YAML, or has a malformed ${{…}} ({error})"
            ) from None
        _set(merged, dotted, value)
    try:
        return TypeAdapter(settings).validate_python(OmegaConf.to_container(merged))
    except ValidationError as error:
        raise _readable(error, settings, origin) from None


def load_config(settings: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file, or a shipped one by its name, and apply overrides.

    Raises:
        ValueError: the file is missing or not a mapping, or as in `build_config`.
    """
    shipped = str(path) in shipped_names() and not Path(path).exists()
    tree = read_yaml(path_of(str(path)) if shipped else Path(path))
    return build_config(settings, tree, overrides, origin=str(path))


def read_yaml(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """The file as plain data, merged over the file in its key `base` (a list replaces the whole list).

    ``above``: the files whose `base` it is.
    """
    if path.resolve() in above:
        raise ValueError(f"--config {above[0]}: the `base` of {above[-1]} leads back to {path}")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = (
            f"did you mean {path.parent / close[0]}?" if close else "give the path of a YAML file, or a name"
        )
        hint += "" if close else f" that is shipped ({', '.join(n for n in shipped_names() if '/' not in n)})"
        raise ValueError(f"--config {path}: no such file; {hint}")
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML, or a malformed ${{…}}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"--config {path}: expected a mapping of keys to values, found {type(tree).__name__}"
        )
    base = tree.pop("base", None)
    if base is None:
        return tree
    return merged_over(read_yaml(path.parent / str(base), [*above, path.resolve()]), tree)


def merged_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of ``above`` over those of ``below``.

    Unlike `OmegaConf.merge` it takes a list over a mapping and the reverse: the error with the key is pydantic's.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merged_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def dump_config(config: Any) -> str:
    """The resolved configuration as YAML for `load_config`."""
    text: str = yaml.safe_dump(plain(config), sort_keys=False)
    return text
