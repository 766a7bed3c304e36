"""Configs are frozen dataclasses. Here they cross the process edge: `key=value` words and manifests."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from registry.errors import ConfigError, nearest

C = TypeVar("C")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Every Config sets `__pydantic_config__ = STRICT`, so a misspelt key is an error and not a default."""


def override(config: C, words: Iterable[str]) -> C:
    """`config` with `key=value` words applied (dots reach into nested configs).

    Raises ConfigError naming the key that does not exist or the value that does not fit.
    """
    assert is_dataclass(config)
    assert not isinstance(config, type)
    values: dict[str, Any] = asdict(config)
    for word in words:
        key, eq, text = word.partition("=")
        if not eq:
            raise ConfigError(f"{word!r} is not key=value.")
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key!r}: {part!r} has no fields.")
        node[last] = _literal(text)
    return parse(type(config), values)


def parse(cls: type[C], values: Mapping[str, Any]) -> C:
    """A `cls` from plain values; unknown keys, missing keys and wrong types raise ConfigError."""
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        given = repr(first.get("input"))
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _keys(cls, [str(part) for part in first["loc"][:-1]])
            raise ConfigError(
                f"{cls.__qualname__} has no key {where[:80]!r} (got {given[:80]}). Keys: "
                f"{nearest(str(first['loc'][-1]), known)}."
            ) from None
        way = ""
        if first["type"] == "tuple_type":
            way = f" A list is written {where}='[{_listed(first['input'])[:80]}]'."
        raise ConfigError(f"{cls.__qualname__}.{where}: {first['msg']} (got {given[:80]}).{way}") from None


def _listed(given: Any) -> str:
    """Members of the list that was meant, as TOML."""
    parts = [p.strip() for p in given.split(",")] if isinstance(given, str) else [str(given)]
    return ", ".join(p if _literal(p) != p else f'"{p}"' for p in parts)


def _keys(cls: Any, path: Sequence[str]) -> list[str]:
    """Names of the fields of the config that `path` leads to; of the whole one where it leads to no config."""
    at = cls
    for part in path:
        found = get_type_hints(at).get(part) if is_dataclass(at) else None
        at = found if is_dataclass(found) else at
    return [f.name for f in fields(at)]


def _literal(text: str) -> Any:
    """What a word's right side means: TOML, or JSON for those who write lists and tables so, else the word itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        with contextlib.suppress(ValueError):
            if text[:1] in ("[", "{"):
                return json.loads(text)
        return text
