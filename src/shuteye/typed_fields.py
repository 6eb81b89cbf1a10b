"""Checks of what users give: fields are held to their annotations, and what is of another type is refused by name.

Ranges are checked by each value itself. Nothing is guessed: `True` is no number, `"no"` is no `False`,
and where an integer is meant a float is refused, even 16.0. Numbers of other libraries (numpy) become Python's own: no
others can be sent to an engine in another process.
"""

from __future__ import annotations

import math
import numbers
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shuteye.errors import InvalidRequest

MISFIT = object()
"""What `Kind.fitted` gives for a value of another type."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an annotation asks of a value.

    Attributes:
        expected: as an error words it.
        fitted: a value as the field keeps it, or `MISFIT`.
        plain: types of which every value fits as it is.
    """

    expected: str
    fitted: Callable[[Any], object]
    plain: frozenset[type] = frozenset()


def settle_types(value: Any, *, of: str = "", param: str | None = None) -> None:
    """To be called by the `__post_init__` of a dataclass, before it looks at ranges.

    Args:
        of: what the fields belong to, for messages, if their names alone say too little.
        param: the caller's field, if it is not the one of `value`.

    Raises:
        InvalidRequest: a field is of another type than its annotation.
    """
    for name, kind, plain in _annotated(value.__class__):
        given = getattr(value, name)
        if type(given) in plain:
            continue
        kept = kind.fitted(given)
        if kept is MISFIT:
            field = f"{name} of {of}" if of else name
            raise InvalidRequest(f"{field} must be {kind.expected}, got {reprlib.repr(given)}.", param=param or name)
        if kept is not given:
            object.__setattr__(value, name, kept)


def require_instance(given: object, kind: type[Any], *, param: str) -> None:
    """Refuse parameters that are not the object a call takes, such as a dict of its fields.

    Raises:
        InvalidRequest: names `param`.
    """
    if not isinstance(given, kind):
        raise InvalidRequest(f"{param} must be a {kind.__name__}, got {reprlib.repr(given)}.", param=param)


@cache
def _annotated(owner: Any) -> tuple[tuple[str, Kind, frozenset[type]], ...]:
    """The fields of a dataclass, what each asks for, and the plain types of that."""
    hints = get_type_hints(owner)
    kinds = ((field.name, kind_of(hints[field.name])) for field in fields(owner))
    return tuple((name, kind, kind.plain) for name, kind in kinds)


def kind_of(hint: Any) -> Kind:
    """What an annotation asks for.

    Raises:
        TypeError: an annotation of a form that no value has had so far.
    """
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _either(tuple(map(kind_of, arguments)))
    if origin is Literal:
        return _choice(arguments)
    if origin in (Sequence, tuple):
        return _sequence(kind_of(arguments[0]), as_tuple=origin is tuple)
    if origin is dict:
        return _mapping(kind_of(arguments[0]), kind_of(arguments[1]))
    if isinstance(hint, type) and origin is None:
        return Kind(f"a {hint.__name__}", lambda value: value if isinstance(value, hint) else MISFIT)
    raise TypeError(f"no kind of value is known for the annotation {hint!r}")


def _integer(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return MISFIT
    return int(value)


def _number(value: object) -> object:
    if type(value) is float:  # nearly always, and asking `numbers` costs ten times as much
        return value if math.isfinite(value) else MISFIT
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return MISFIT
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        return MISFIT
    return number if math.isfinite(number) else MISFIT


def _text(value: object) -> object:
    return str.__str__(value) if isinstance(value, str) else MISFIT


def _misfit(_value: object) -> object:
    return MISFIT


_SIMPLE = {
    Any: Kind("anything", lambda value: value),
    types.NoneType: Kind("None", _misfit, frozenset({types.NoneType})),
    bool: Kind("True or False", _misfit, frozenset({bool})),
    int: Kind("an integer", _integer, frozenset({int})),
    float: Kind("a finite number", _number),
    str: Kind("a text", _text, frozenset({str})),
}


def _either(kinds: tuple[Kind, ...]) -> Kind:
    def fitted(value: Any) -> object:
        for kind in kinds:
            kept = value if type(value) in kind.plain else kind.fitted(value)
            if kept is not MISFIT:
                return kept
        return MISFIT

    return Kind(" or ".join(kind.expected for kind in kinds), fitted, frozenset().union(*(one.plain for one in kinds)))


def _choice(choices: tuple[str, ...]) -> Kind:
    named = ", ".join(map(repr, choices))
    return Kind(
        named if len(choices) == 1 else f"one of {named}",
        lambda value: str.__str__(value) if isinstance(value, str) and value in choices else MISFIT,
    )


def _sequence(item: Kind, *, as_tuple: bool) -> Kind:
    kept_as_they_are = (tuple,) if as_tuple else (list, tuple)

    def fitted(value: Any) -> object:
        if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
            return MISFIT
        if type(value) in kept_as_they_are and item.plain.issuperset(map(type, value)):
            return value
        kept = tuple(map(item.fitted, value))
        return MISFIT if any(one is MISFIT for one in kept) else kept

    return Kind(f"a list of {_plural(item.expected)}", fitted)


def _mapping(key: Kind, value: Kind) -> Kind:
    def fitted(given: Any) -> object:
        if not isinstance(given, Mapping):
            return MISFIT
        kept = {key.fitted(one): value.fitted(other) for one, other in given.items()}
        return MISFIT if MISFIT in kept or any(one is MISFIT for one in kept.values()) else kept

    return Kind(f"a dict of {_plural(key.expected)} to {_plural(value.expected)}", fitted)


def _plural(expected: str) -> str:
    """Of "a text": "texts"."""
    article, _, noun = expected.partition(" ")
    if article not in ("a", "an"):
        return expected
    return noun.replace("list of", "lists of") if noun.startswith("list of") else f"{noun}s"


def require(ok: bool, param: str, expected: str, seen: object) -> None:
    """Refuse `seen` unless it is `ok`.

    Raises:
        InvalidRequest: names the parameter, what was seen and what was expected.
    """
    if not ok:
        raise InvalidRequest(f"{param} must be {expected}, got {reprlib.repr(seen)}.", param=param)


def require_sendable(name: str, key: str) -> None:
    """Refuse an API key that does not fit into a header as it is. No message ever holds a key.

    Raises:
        InvalidRequest: it is empty, or has spaces around it or a line break in it; `param` is `name`.
    """
    if not key.strip():
        raise InvalidRequest(f"{name} must not be empty; leave it out to use no key.", param=name)
    if key != key.strip() or not key.isprintable():
        raise InvalidRequest(
            f"{name} begins or ends with a space, or holds a line break or the like, which no client can send; "
            "was it read from a file with its last line break?",
            param=name,
        )
