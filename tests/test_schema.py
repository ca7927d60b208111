import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import ConfigError
from schema import Matches, Within, assemble, convert, describe, flatten, kind_of_default, leaves, unknown_key

SHARE = Annotated[float, Within(0, below=1)]


@dataclass(frozen=True)
class Inner:
    depth: int
    found: str = "worked out"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    width: float
    names: tuple[str, ...] = field(default_factory=tuple)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (True, bool, True),
        (3, int, 3),
        (3, float, 3.0),
        (7, str, "7"),
        (None, int | None, None),
        ("sgd", Literal["adam", "sgd"], "sgd"),
        (0.5, tuple[SHARE, ...], (0.5,)),
        ([0.5, 0], tuple[SHARE, ...], (0.5, 0.0)),
        ([3, "bag"], tuple[int | str, ...], (3, "bag")),
        (2.5, kind_of_default(None), 2.5),
        ("cuda:1", Annotated[str, Matches(r"cpu|cuda:\d", "a device")], "cuda:1"),
    ],
)
def test_what_fits_is_converted(value, kind, expected):
    converted = convert("key", value, kind)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, bool),
        ("true", bool),
        (True, int),
        (3.0, int),
        ("3", int),
        (None, int),
        (True, float),
        ("0.5", float),
        (math.nan, float),
        (math.inf, float),
        (0.5, str),
        (True, str),
        ([], tuple[int, ...]),
        ([1, None], tuple[int, ...]),
        ("ADAM", Literal["adam", "sgd"]),
        (True, Literal[1, 2]),
        (0, Annotated[float, Within(0, above_low=True)]),
        ("cpu\n", Annotated[str, Matches(r"cpu", "a device")]),
        ({"a": 1}, int),
        ([1], kind_of_default(None)),
    ],
)
def test_what_does_not_fit_is_refused_with_key_value_and_what_is_valid(value, kind):
    with pytest.raises(ConfigError, match=r"^the\.key: .+; must be .+") as caught:
        convert("the.key", value, kind)
    assert describe(kind) in str(caught.value)


@given(st.floats())
def test_a_share_is_accepted_exactly_from_zero_to_below_one(value):
    try:
        accepted = convert("ratio", value, SHARE) == value
    except ConfigError:
        accepted = False
    assert accepted == (0 <= value < 1)


def test_the_element_at_fault_is_named():
    with pytest.raises(ConfigError, match=r"^ratio: 1\.5 in \[0\.5, 1\.5\]; must be a list"):
        convert("ratio", [0.5, 1.5], tuple[SHARE, ...])


def test_fields_with_a_default_are_no_keys():
    assert leaves(Outer) == {"inner.depth": int, "width": float}
    assert assemble(Outer, {"inner.depth": 2, "width": 0.5}) == Outer(Inner(2), 0.5)


def test_flatten_keeps_empty_groups_and_lists():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


KEYS = ["seed", "training.epochs", "training.lr", "pruning.pruning_ratio"]


@pytest.mark.parametrize(
    ("key", "fragment"),
    [
        ("sed", "did you mean seed? Keys: seed, training, pruning"),
        ("trainin", "did you mean training?"),
        ("epochs", "did you mean training.epochs?"),
        ("pruning.ratio", "did you mean pruning.pruning_ratio? Keys of pruning: pruning_ratio"),
        ("training.epoch.x", "Keys of training: epochs, lr"),
        ("training", "is a group, set one of its keys: epochs, lr"),
        ("xyzzy", "no such key. Keys: seed"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, fragment):
    message = str(unknown_key(key, 5, KEYS))
    assert message.startswith(f"{key}: 5; ")
    assert fragment in message
