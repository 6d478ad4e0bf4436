"""Arguments of the types, and within the intervals, that they are annotated with; else one line says what is wanted."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import os
import reprlib
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

from scialm_dask.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")


class Interval(NamedTuple):
    """Limits of a number, for `Annotated`; without its ends where `open`. NaN and infinity lie in none."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether a number lies within."""
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        return inside and value != math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"over {self.low}" if self.open else f"of at least {self.low}"
        return f"between {self.low} and {self.high}" if self.open else f"from {self.low} to {self.high}"


Count = Annotated[int, Interval(1)]
Natural = Annotated[int, Interval(0)]
Weight = Annotated[float, Interval(0)]
Share = Annotated[float, Interval(0, 1, open=True)]
Ratio = Annotated[float, Interval(0, 1)]

_NUMBERS: dict[Any, tuple[type, Callable[[Any], Any]]] = {int: (Integral, int), float: (Real, float)}
_NAMES = {int: "whole number", float: "number", str: "word", os.PathLike: "path", Callable: "function"}
_UNCHECKED = (Any, bool, object)  # everything has a truth
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check what a function is given by its annotations, before it begins; see `validated`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given, kinds = signature.bind(*args, **kwargs), _kinds(function)
        for name, value in given.arguments.items():
            given.arguments[name] = validated(name, value, kinds.get(name, Any))
        return function(*given.args, **given.kwargs)

    return call


def check_fields(made: Any) -> None:
    """Check the fields of a dataclass, frozen or not, by its annotations; see `validated`."""
    for name, kind in _kinds(made.__class__).items():
        object.__setattr__(made, name, validated(name, getattr(made, name), kind))


def validated(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as what it is annotated with; raises `InputError`, which calls it `name`, if it is something else.

    Numbers of NumPy become Python's, and what can be iterated over a tuple. Truth values are no numbers here. A `kind`
    is a class, `Annotated` with an `Interval`, `Literal`, ``tuple``, ``Sequence``, ``Callable``, or a union of these;
    what only type checkers can see may be anything.
    """
    try:
        return _as(value, kind)
    except TypeError:
        verb = "choose" if get_origin(kind) is Literal else "give"
        raise InputError(f"{name} is {short_repr(value)}; {verb} {_words(kind)}") from None


def short_repr(value: Any) -> str:
    """Return any value in half a line."""
    return " ".join(_short.repr(value).split())


def _as(value: Any, kind: Any) -> Any:
    """Do what `validated` does, with a TypeError for what is something else."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number = _as(value, parts[0])
        if parts[1].holds(number):
            return number
    elif origin in (Union, UnionType):
        for part in parts:
            try:
                return _as(value, part)
            except TypeError:
                continue
    elif origin in (tuple, Sequence):
        if isinstance(value, Iterable) and not isinstance(value, str | bytes):
            items = tuple(_as(item, parts[0]) for item in value)
            if origin is Sequence or len(items) == len(parts):
                return items
    elif origin is Literal:
        if isinstance(value, str) and value in parts:
            return value
    elif kind in _NUMBERS:
        number, plain = _NUMBERS[kind]
        if isinstance(value, number) and not isinstance(value, bool):
            return plain(value)
    elif kind in _UNCHECKED or isinstance(value, origin or kind):
        return value
    raise TypeError


def _words(kind: Any, plural: str = "") -> str:
    """Say what is wanted."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_words(parts[0], plural)} {parts[1]}"
    if origin in (Union, UnionType):
        *others, last = map(_words, parts)
        return f"{', '.join(others)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(parts)}" if len(parts) > 1 else str(parts[0])
    if origin in (tuple, Sequence):
        return f"{'a list of' if origin is Sequence else len(parts)} {_words(parts[0], 's')}"
    if kind is type(None):
        return "None"
    name = _NAMES.get(origin or kind) or kind.__name__
    return f"{name}{plural}" if plural else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


class _Names(dict[str, Any]):
    """Names of a module; what is imported for type checkers alone may be anything."""

    def __missing__(self, name: str) -> Any:
        return Any


@functools.cache
def _kinds(thing: Any) -> dict[str, Any]:
    """Annotations, evaluated."""
    names = _Names(vars(builtins) | vars(sys.modules[thing.__module__]))
    return typing.get_type_hints(thing, localns=names, include_extras=True)
