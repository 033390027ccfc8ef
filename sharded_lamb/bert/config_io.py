"""YAML files and command-line overrides → `RunConfig`, with errors that name the key and the nearest right one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from sharded_lamb.bert.config import RunConfig, require


def _nearest(key: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, choices, n=1, cutoff=0.5)
    listing = ", ".join(sorted(choices))
    return f"did you mean {close[0]!r}? (keys here: {listing})" if close else f"keys here: {listing}"


def _inner_dataclass(annotation: Any) -> Any:
    """The dataclass inside an annotation such as `RampConfig | None` or `tuple[PhaseConfig, ...]`."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    for argument in get_args(annotation):
        found = _inner_dataclass(argument)
        if found is not None:
            return found
    return None


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Names of the settings beside the last element of `location`."""
    current: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, str):
            inner = _inner_dataclass(get_type_hints(current).get(part))
            current = inner if inner is not None else current
    return [f.name for f in dataclasses.fields(current)]


def _readable(error: ValidationError, origin: str) -> ValueError:
    lines = []
    for item in error.errors():
        location = [part for part in item["loc"] if part not in ("float", "int", "literal['auto']")]
        name = ".".join(str(part) for part in location)
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"unknown key {name!r}: {_nearest(str(location[-1]), _fields_at(location))}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"key {name!r} is required but not set")
        elif item["type"] == "value_error":
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{name}={item['input']!r}: {item['msg'].lower()}")
    return ValueError(f"{origin}: " + "; ".join(dict.fromkeys(lines)))


def _set(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Write `value` at a path such as `model.layers` or `phases.0.lr` of nested dicts and lists."""
    at: Any = tree
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at, list):
            require(
                part.isdigit() and int(part) < len(at),
                dotted,
                value,
                f"an index below {len(at)} in place of {part!r}",
            )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        else:
            raise ValueError(
                f"{dotted}={value!r}: {'.'.join(parts[:depth])!r} is a value, it has no keys inside"
            )


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> RunConfig:
    """Validate nested plain data, after `key=value` overrides whose values are YAML.

    Raises:
        ValueError: an unknown key (named, with the nearest right one), a wrong value, or a malformed
        override.
    """
    plain = json.loads(json.dumps(tree))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        require(bool(equals and dotted), "override", override, "key=value, such as model.layers=2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML ({error})") from None
        _set(plain, dotted, _number(value))
    try:
        return TypeAdapter(RunConfig).validate_python(plain)
    except ValidationError as error:
        raise _readable(error, origin) from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads `6e-3` as text; people write it as a number."""
    if isinstance(value, str):
        try:
            return float(value) if value.strip()[:1] in "+-.0123456789" and value.strip() else value
        except ValueError:
            return value
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides.

    Raises:
        ValueError: the file is missing or not a mapping, or what `build_config` refuses.
    """
    return build_config(_read_yaml(Path(path)), overrides, origin=str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file as plain data, over that of the file its key `base` names (lists are replaced as a whole)."""
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {path.parent / close[0]}?" if close else "give the path of a YAML file"
        raise ValueError(f"--config {path}: no such file; {hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"--config {path}: expected a mapping of keys to values, found {type(tree).__name__}"
        )
    tree = _number(tree)
    base = tree.pop("base", None)
    return tree if base is None else merged_over(_read_yaml(path.parent / str(base)), tree)


def merged_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of ``above`` over those of ``below``."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merged_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False)
    return text
