"""Typed keys: what a configuration may hold, read off dataclasses, and one clear message for whatever does not fit.

Keys are dotted (`training.epochs`). Types are annotations: bool, int, float, str, None, unions of them, Literal,
`tuple[X, ...]` for lists, and `Annotated` with a limit. They are taken strictly: "3", 3.0 and true are no integers,
and 0 is not false; only a text may be typed as an integer.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from errors import ConfigError

NAMES_OF_TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a text", NoneType: "null"}


@dataclass(frozen=True)
class Within:
    """A limit for numbers: `low` <= value < `below`, or `low` < value when `above_low`."""

    low: float
    below: float = math.inf
    above_low: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above_low else self.low <= value) and value < self.below

    def __str__(self) -> str:
        lower = f"above {self.low}" if self.above_low else f"of at least {self.low}"
        return lower if self.below == math.inf else f"{lower} and below {self.below}"


@dataclass(frozen=True)
class Matches:
    """A limit for texts: the whole text matches `pattern`, which `meaning` puts into words."""

    pattern: str
    meaning: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return f"that is {self.meaning}"


class _Misfit(Exception):
    """Carries the value that does not fit: the one converted, or the element of it at fault."""


def show(value: Any) -> str:
    """`value` as the user would type it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def listed(items: Iterable[Any]) -> str:
    return ", ".join(item if isinstance(item, str) else show(item) for item in items)


def describe(kind: Any) -> str:
    """The annotation `kind` in words that follow "must be"."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return " ".join([describe(arguments[0]), *map(str, kind.__metadata__)])
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(describe, arguments))
    if get_origin(kind) is Literal:
        return f"one of {listed(arguments)}" if len(arguments) > 1 else listed(arguments)
    if get_origin(kind) is tuple:
        return f"a list of one or more, each {describe(arguments[0])}"
    return NAMES_OF_TYPES[kind]


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as the annotation `kind` wants it; lists become tuples, and a single value a list of one.

    Raises ConfigError with the key, the value and what would be valid.
    """
    try:
        return _fit(value, kind)
    except _Misfit as misfit:
        fault = misfit.args[0]
        given = show(value) if fault is value else f"{show(fault)} in {show(value)}"
        raise ConfigError(f"{key}: {given}; must be {describe(kind)}") from None


def _fit(value: Any, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        fitted = _fit(value, arguments[0])
        fits = all(limit.holds(fitted) for limit in kind.__metadata__)
    elif origin in (Union, UnionType):
        return _fit_any(value, arguments)
    elif origin is tuple:
        elements = value if isinstance(value, list) else [value]
        fitted = tuple(_fit(element, arguments[0]) for element in elements)
        fits = len(fitted) > 0
    elif origin is Literal:
        fitted, fits = value, any(type(value) is type(word) and value == word for word in arguments)
    elif kind is float:
        fits = type(value) in (int, float) and math.isfinite(value)
        fitted = float(value) if fits else None
    elif kind is str:
        fitted, fits = str(value), type(value) in (str, int)  # run_name=7 is a name
    else:
        fitted, fits = value, type(value) is kind
    if not fits:
        raise _Misfit(value)
    return fitted


def _fit_any(value: Any, kinds: Iterable[Any]) -> Any:
    for kind in kinds:
        try:
            return _fit(value, kind)
        except _Misfit:
            continue
    raise _Misfit(value)


def kind_of_default(default: Any) -> Any:
    """The annotation that a default stands for; null says nothing, so that any single value fits."""
    return bool | int | float | str | None if default is None else type(default)


def _configured(group: type) -> dict[str, Any]:
    """Field name -> annotation, without the fields that have a default: those are worked out, never configured."""
    hints = get_type_hints(group, include_extras=True)
    return {f.name: hints[f.name] for f in fields(group) if f.default is MISSING and f.default_factory is MISSING}


def leaves(group: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> annotation, for every key that the dataclass `group` and those in it hold."""
    found = {}
    for name, kind in _configured(group).items():
        key = f"{prefix}{name}"
        found.update(leaves(kind, f"{key}.") if is_dataclass(kind) else {key: kind})
    return found


def assemble(group: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `group` from dotted keys."""
    arguments = {}
    for name, kind in _configured(group).items():
        key = f"{prefix}{name}"
        arguments[name] = assemble(kind, values, f"{key}.") if is_dataclass(kind) else values[key]
    return group(**arguments)


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; an empty mapping stays a value, so that no key is lost."""
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat.update(flatten(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value})
    return flat


def unknown_key(key: str, value: Any, valid: Iterable[str]) -> ConfigError:
    """The error for a `key` that is not among the `valid` dotted keys: names the nearest one and its neighbours."""
    groups = {name.rpartition(".")[0] for name in valid} - {""}
    if key in groups:
        return ConfigError(f"{key}: {show(value)}; is a group, set one of its keys: {listed(_members(key, valid))}")
    nearest = max((*groups, *valid), key=lambda name: _likeness(key, name))
    hint = f", did you mean {nearest}?" if _likeness(key, nearest) > 0.6 else "."
    parent = key
    while parent and parent not in groups:
        parent = parent.rpartition(".")[0]
    place = f"Keys of {parent}" if parent else "Keys"
    return ConfigError(f"{key}: {show(value)}; no such key{hint} {place}: {listed(_members(parent, valid))}")


def _members(group: str, valid: Iterable[str]) -> list[str]:
    prefix = f"{group}." if group else ""
    return list(dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in valid if name.startswith(prefix)))


def _likeness(key: str, name: str) -> float:
    """How alike the last parts of two dotted keys are, 0 to 1, and a little more for the same group."""
    (group, _, last), (other_group, _, other_last) = key.rpartition("."), name.rpartition(".")
    spelling = difflib.SequenceMatcher(None, last, other_last).ratio()
    part_of = 0.7 if last in other_last.split("_") else 0.0  # ratio for pruning_ratio
    return max(spelling, part_of) + 0.1 * (group == other_group)
