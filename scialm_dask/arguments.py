"""Arguments of the types that they are annotated with, or one line that says what is wanted instead."""

from __future__ import annotations

import builtins
import functools
import inspect
import os
import reprlib
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from scialm_dask.errors import InputError

__all__ = ["check_fields", "checked", "short_repr", "validated"]

P = ParamSpec("P")
T = TypeVar("T")

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
    """Give `value` as what it is annotated with.

    Parameters
    ----------
    name
        What to call it in messages.
    value
        Numbers of NumPy become Python's, and what can be iterated over a tuple. Truth values are no numbers here.
    kind
        A class, `Literal`, ``tuple``, ``Sequence``, ``Callable``, or a union of these. What only type checkers can see
        may be anything.

    Raises
    ------
    InputError
        If it is something else.
    """
    try:
        return _as(value, kind)
    except TypeError:
        verb = "choose" if get_origin(kind) is Literal else "give"
        raise InputError(f"{name} is {short_repr(value)}; {verb} {_words(kind)}") from None


def short_repr(value: Any) -> str:
    """Write any value in half a line."""
    return " ".join(_short.repr(value).split())


def _as(value: Any, kind: Any) -> Any:
    """Do what `validated` does, with a TypeError for what is something else."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
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


def _words(kind: Any) -> str:
    """Say what is wanted."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        *others, last = (_words(part) for part in parts)
        return f"{', '.join(others)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(parts)}" if len(parts) > 1 else str(parts[0])
    if origin in (tuple, Sequence):
        return f"{'a list of' if origin is Sequence else len(parts)} {_NAMES[parts[0]]}s"
    if kind is type(None):
        return "None"
    name = _NAMES.get(origin or kind) or kind.__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


class _Names(dict[str, Any]):
    """Names of a module; what is imported for type checkers alone may be anything."""

    def __missing__(self, name: str) -> Any:
        return Any


@functools.cache
def _kinds(thing: Any) -> dict[str, Any]:
    """Annotations, evaluated."""
    return typing.get_type_hints(thing, localns=_Names(vars(builtins) | vars(sys.modules[thing.__module__])))
