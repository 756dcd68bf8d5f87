"""Configs: frozen dataclasses that read from TOML, from `key=value`, and go to and from JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from varcli.errors import ConfigError, unknown_name

Config = TypeVar("Config")

_SHOWN = 60  # characters of a value in an error
_FINGERPRINT = re.compile(r"[0-9a-f]{16,}")

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_LISTS = {int: "whole numbers such as 1,2,4", float: "numbers such as 0.5,0.9", str: "names such as a,b"}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config's fields as JSON-ready values: tuples become lists, paths become text."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        values[field.name] = value
    return values


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from a mapping of field names, as read from JSON or TOML.

    Raises ConfigError for an unknown key (naming the nearest) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise unknown_name("config key", key, names)
    return cls(**{key: _convert(key, value, hints[key]) for key, value in values.items()})


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with some fields changed, checked as in `from_dict`."""
    return from_dict(type(config), {**_init_values(config), **values})


def changed(config: Any) -> set[str]:
    """Return the names of the fields that are not at their defaults."""
    now, default = to_dict(config), to_dict(type(config)())
    return {name for name in now if now[name] != default[name]}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings with those of tables named as `--set` names them, e.g. tokenizer.width."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any], is_strict: bool = False) -> dict[str, str]:
    """Say of each setting that differs what it was and is, e.g. "batch_size was 8, now 16"; tables as in `flatten`.

    is_strict: a setting that one side does not know counts as None there, else it is left out. Fingerprints are cut short,
    and long values are not spelled out.
    """
    before, now = flatten(before), flatten(now)
    known = dict.fromkeys((*now, *before)) if is_strict else [key for key in now if key in before]
    found: dict[str, str] = {}
    for key in known:
        was, value = before.get(key), now.get(key)
        if was != value:
            texts = [_show(was), _show(value)]
            is_told = texts[0] != texts[1] and max(map(len, texts)) <= _SHOWN
            found[key] = f"{key} was {texts[0]}, now {texts[1]}" if is_told else f"other {key}"
    return found


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_show, value)) or "none"
    text = "none" if value is None else str(value)
    return text[:6] if isinstance(value, str) and _FINGERPRINT.fullmatch(text) else text


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError if it is missing or does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config `{path}`: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config `{path}` is not valid TOML: {error}") from None


def parse_assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` texts; a value is TOML where it parses (`0.1`, `true`, `[1, 2]`), else plain text; `none` is None."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"`--set` takes key=value, but got `{pair}`", "e.g. --set weight_decay=0.05")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = None if text.strip().lower() == "none" else text.strip()
        values[key.strip()] = value
    return values


def _init_values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Fit a JSON or TOML value to a field's annotation; raises ConfigError if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        for choice in choices[:-1]:
            try:
                return _convert(key, value, choice)
            except ConfigError:
                continue
        return _convert(key, value, choices[-1])
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, (hint, Mapping)):
            raise ConfigError(f"config key `{key}` takes a table of settings, but got {value!r}")
        return value if isinstance(value, hint) else from_dict(hint, value)
    if origin is tuple:
        return _convert_tuple(key, value, arguments[0])
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"config key `{key}` takes a number that is finite, but got {value}")
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise unknown_name(key, str(value), [str(argument) for argument in arguments])
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    if hint is Any or origin is dict:
        return value
    wanted = _WORDS.get(hint) or getattr(hint, "__name__", str(hint))
    raise ConfigError(f"config key `{key}` takes {wanted}, but got {value!r}")


def _convert_tuple(key: str, value: Any, inner: Any) -> tuple[Any, ...]:
    """Fit a list, or what `--set` makes of `frozen=encoder,decoder`, `patch_nums=1,2,4` and `ema_decays=0.9999`."""
    entries = [value] if isinstance(value, (int, float)) else value
    if isinstance(value, str):
        texts = [text.strip() for text in value.split(",") if text.strip()]
        entries = texts if inner is str else [parse_assignments([f"{key}={text}"])[key] for text in texts]
    if isinstance(entries, (list, tuple)):
        with contextlib.suppress(ConfigError):
            return tuple(_convert(key, entry, inner) for entry in entries)
    wanted = _LISTS.get(inner, "a list")
    raise ConfigError(f"config key `{key}` takes {wanted}, but got {value!r}")
