"""Dataclasses from tables of values, each value checked: what config.py is read with.

An unknown key is an error that names the nearest known one; a value of the wrong type is an error that names the
type.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_NEEDED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a table"}
RUNTIME = {"runtime": True}  # says where or how fast to run, never what comes out: may differ on a rerun


def require(holds: object, name: str, value: Any, needed: str) -> None:
    """Raises ValueError when it does not hold."""
    if not holds:
        raise ValueError(f"{name} = {value!r}: it must be {needed}")


@dataclass(frozen=True)
class Range:
    """Of a number, in a setting's annotation: `Annotated[float, Range(0, above=True)]`. Finite in any case."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # not low itself
    below: bool = False  # not high itself

    def __contains__(self, value: float) -> bool:
        enough = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            low = f"{'>' if self.above else '>='} {self.low:g}"
            return "finite" if math.isinf(self.low) else f"{low}, and finite"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Section:
    """Settings that belong together; each is in its range, however they were made."""

    def __post_init__(self) -> None:
        _check_ranges(self, {item.name: getattr(self, item.name) for item in dataclasses.fields(self)})


def _check_ranges(section: Section, values: Mapping[str, Any], where: str | None = None) -> None:
    """where: the section's place in the file, for messages; by default its own name."""
    where = type(section).__name__.lower() if where is None else where
    kinds = typing.get_type_hints(type(section), include_extras=True)
    for key, value in values.items():
        _check_range(value, kinds[key], f"{where}.{key}" if where and where != "config" else key)


def _check_range(value: Any, kind: Any, name: str) -> None:
    for part in typing.get_args(kind):
        if isinstance(part, Range) and value is not None:
            needed = str(part).removesuffix(", and finite" if isinstance(value, int) else "")
            require(value in part, name, value, needed)
        elif (
            typing.get_origin(part) is Annotated and value is not None
        ):  # of a list, or of what may be left out
            for number in value if isinstance(value, tuple) else [value]:
                _check_range(number, part, name)


def as_tables(section: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if item.metadata.get("runtime") or value is None:
            continue
        if dataclasses.is_dataclass(value):
            value = as_tables(value)
        tables[item.name] = list(value) if isinstance(value, tuple) else value
    return tables


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1, "c": {}}} -> {"a.b": 1, "a.c": {}}."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"got {override!r}: an override is section.key=value, for instance seed=1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted string
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def build(section: Any, tables: Mapping[str, Any], where: str) -> Any:
    """A copy of the dataclass `section` with the values of `tables` put in, each checked."""
    fields = {item.name: item for item in dataclasses.fields(section)}
    kinds = typing.get_type_hints(type(section))
    changed: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{where}.{key}" if where else key
        if key not in fields:
            elsewhere = list(_places(section, key, where))
            raise ValueError(f"unknown setting {name!r}{_nearest(key, fields, where, elsewhere)}")
        present = getattr(section, key)
        if dataclasses.is_dataclass(present):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{name} is a section: give its settings as {name}.KEY = VALUE, not {value!r}"
                )
            changed[key] = build(present, value, name)
        elif isinstance(present, dict):
            changed[key] = merge(present, _checked(value, kinds[key], name))
        else:
            changed[key] = _checked(value, kinds[key], name)
    _check_ranges(section, changed, where)
    try:
        return dataclasses.replace(section, **changed)
    except ValueError as error:  # a section knows its own name only
        raise ValueError(str(error).replace(f"{type(section).__name__.lower()}.", f"{where}.", 1)) from None


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _places(section: Any, key: str, where: str) -> Iterator[str]:
    """Where below the section a setting of that name is."""
    for item in dataclasses.fields(section):
        value, name = getattr(section, item.name), f"{where}.{item.name}" if where else item.name
        if item.name == key:
            yield name
        elif dataclasses.is_dataclass(value):
            yield from _places(value, key, name)


def _nearest(key: str, known: Mapping[str, Any], where: str, elsewhere: Sequence[str]) -> str:
    if elsewhere:
        return f"; there is {', '.join(elsewhere)}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    place = f"[{where}]" if where else "the top level"
    if close:
        return f"; the nearest in {place} is {close[0]!r}"
    return f"; {place} knows {', '.join(sorted(known))}"


def _checked(value: Any, kind: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ValueError(f"{name} = {value!r}: it must be one of {', '.join(map(repr, choices))}")
        return value
    if origin in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return _checked(value, kind, name)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name} = {value!r}: a list is needed, for instance [1.0, 2.0]")
        return tuple(_checked(part, typing.get_args(kind)[0], name) for part in value)
    if origin is dict:
        kind = dict
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value != value:  # NaN
        raise ValueError(f"{name} = {value!r}: {_NEEDED[kind]} is needed")
    return value
