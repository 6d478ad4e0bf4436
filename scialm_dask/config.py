"""Settings, presets and configuration; arguments checked by the types and intervals of their annotations."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import os
import re
import reprlib
import sys
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

from scialm_dask.errors import InputError

RankPolicy = Literal["paper", "adaptive"]
Method = Literal["denoise", "complete"]
Stop = Literal["residual", "held-out"]
Preset = Literal["auto", "denoise", "complete", "paper"]
_LEAST_BYTES = 10**6  # no Python process starts in less: the unit was forgotten

_PRESETS: dict[str, dict[str, Any]] = {
    "denoise": {"method": "denoise", "max_rank": 64},
    "complete": {},
    "paper": {
        "rank_policy": "paper",
        "stop": "residual",
        "scaling": (0.0, 0.0),
        "max_rank": None,
        "svd_passes": 30,
        "svd_tolerance": 3e-4,
    },
}
_OF_DENOISING = ("method", "max_rank", "scaling", "svd_passes", "seed")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Settings of an imputation. Symbols are those of the paper [1]_.

    Parameters
    ----------
    method : {"complete", "denoise"}, default="complete"
        ``"denoise"``: low rank plus sparse by count splitting, from raw counts; uses only `max_rank`, `scaling`,
        `svd_passes` and `seed`. ``"complete"``: completion of the zeros, Algorithm 3.
    rank_policy : {"adaptive", "paper"}, default="adaptive"
        ``"paper"``: equation 13. ``"adaptive"``: every singular value above the threshold.
    stop : {"held-out", "residual"}, default="held-out"
        ``"residual"``: when ‖P_Ω(D − A)‖ / ‖D‖ < ε, with D and A scaled. ``"held-out"``: when the error on a small
        hidden share of the observed entries has not fallen for `patience` iterations; the best iterate is kept.
    epsilon : float in (0, 1), default=1e-4
        The residual ε to stop at.
    max_iterations : int, default=1000
        Maximum number of iterations.
    first_rank, increment : int, default=5, 200
        The parameters sv₀ and R of equation 13.
    max_rank : int or None, default=128
        Maximum number of singular values, which bounds memory and time. None means no limit. `impute`, `IALM` and the
        command line take ``"none"`` for no limit; there None keeps the value of the preset.
    validation : float in (0, 1), default=0.02
        Share of each gene's observed entries to hide for the held-out stop.
    patience : int, default=2
        Iterations without a lower held-out error before stopping.
    scaling : (float, float) or None, default=None
        Exponents (g, c). Before the fit each gene is divided by (mean of its observed entries)^g and each cell by (size
        factor)^c; afterwards the factors are scaled back. (½, ½) evens out counting noise; (0, 0) is as published.
        None means (½, ½), but cells are scaled only if their totals are known.
    svd_passes : int, default=2
        Maximum number of passes over the data per SVD.
    svd_tolerance : float in [0, 1], default=0
        An SVD stops early once its thresholded values change by less than this. 0 makes all passes.
    seed : int, default=0
        Seed of all random draws.

    Raises
    ------
    InputError
        If a value has the wrong type, is out of range, or is not one of the choices.

    References
    ----------
    .. [1] Liu, Wang and Gao, Computational and Structural Biotechnology Journal, 2024.

    Examples
    --------
    >>> from scialm_dask import Settings
    >>> Settings(method="denoise", max_rank=64).max_rank
    64
    >>> Settings(max_rank=0)
    Traceback (most recent call last):
        ...
    scialm_dask.errors.InputError: max_rank is 0; give a whole number of at least 1 or None
    """

    method: Method = "complete"
    rank_policy: RankPolicy = "adaptive"
    stop: Stop = "held-out"
    epsilon: Share = 1e-4
    max_iterations: Count = 1000
    first_rank: Count = 5
    increment: Count = 200
    max_rank: Count | None = 128
    validation: Share = 0.02
    patience: Count = 2
    scaling: tuple[Ratio, Ratio] | None = None
    svd_passes: Count = 2
    svd_tolerance: Ratio = 0.0
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def exponents(self) -> tuple[float, float]:
        """Exponents (g, c) of genes and cells."""
        return (0.5, 0.5) if self.scaling is None else self.scaling

    @property
    def idle(self) -> dict[str, tuple[str, str]]:
        """Settings that have no effect: for each, the reason, and the settings it goes with."""
        idle: dict[str, tuple[str, str]] = {}
        if self.method == "denoise":
            others = (name for name in self.__dataclass_fields__ if name not in _OF_DENOISING)
            return dict.fromkeys(others, ("method denoise", "the presets complete and paper"))
        if self.rank_policy == "adaptive":
            why = "rank_policy adaptive", "rank_policy paper, as in preset paper"
            idle |= {"first_rank": why, "increment": why}
        if self.stop == "residual":
            why = "stop residual", "stop held-out, as in preset complete"
            idle |= {"validation": why, "patience": why}
        if self.svd_passes < 3:  # nothing is compared before the third
            idle["svd_tolerance"] = f"svd_passes {self.svd_passes}", "svd_passes of 3 or more, as in preset paper"
        return idle

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON and ``uns``.

        Returns
        -------
        dict
            All fields.

        Examples
        --------
        >>> Settings().as_dict()["scaling"]
        (0.5, 0.5)
        """
        return asdict(self) | {"scaling": self.exponents}


def preset(name: str, **changes: Any) -> Settings:
    """Return the settings of a preset, with changes; None keeps the value of the preset.

    `max_rank` may also be ``"none"``, no limit, and `scaling` ``"none"``, ``"poisson"`` or two comma-separated numbers.
    Raises `InputError` if there is no such preset or field, or a value is invalid or has no effect (`Settings.idle`).
    """
    unknown = [field for field in changes if field not in Settings.__dataclass_fields__]
    if unknown:
        raise InputError(f"no setting is called {unknown[0]}; there are {', '.join(Settings.__dataclass_fields__)}")
    changes = {field: value for field, value in changes.items() if value is not None}
    if isinstance(words := changes.get("scaling"), str):
        named = {"none": "0,0", "poisson": "0.5,0.5"}
        try:
            gene, cell = named.get(words, words).split(",")
            changes["scaling"] = float(gene), float(cell)
        except ValueError:
            raise InputError(f"scaling is {words!r}; give none, poisson, or two exponents such as 0.75,0.5") from None
    if isinstance(words := changes.get("max_rank"), str):
        try:
            changes["max_rank"] = None if words == "none" else int(words)
        except ValueError:
            raise InputError(f"max_rank is {words!r}; give a number, or none for no limit") from None
    if validated("preset", name, Preset) not in _PRESETS:
        raise InputError(f"preset is {name!r}, which depends on the matrix; choose one of {', '.join(_PRESETS)}")
    settings = Settings(**{**_PRESETS[name], **changes})
    for field, (because, wanted) in settings.idle.items():
        if field in changes:
            raise InputError(f"{field} has no effect with preset {name} ({because}); it goes with {wanted}")
    return settings


def configured(name: str, given: Any = None) -> Any:
    """Return `given`, or if it is None, ``scialm.NAME`` of Dask's configuration.

    Dask reads the environment (``DASK_SCIALM__WORKER_MEMORY``), then files in ``~/.config/dask``, then the shipped
    ``scialm.yaml``, of which a commented copy is put into that folder.
    """
    import dask

    defaults = _shipped_defaults()
    absent = object()
    if any(dask.config.get(f"scialm.{known}", absent) is absent for known in defaults):
        # not yet set, or removed with a temporary configuration that was older than they
        dask.config.update_defaults({"scialm": defaults})
    unknown = {key.replace("_", "-") for key in dask.config.get("scialm")} - defaults.keys()
    if unknown:
        raise InputError(
            f"scialm.{min(unknown)} in Dask's configuration is unknown; choose one of {', '.join(sorted(defaults))}"
        )
    return dask.config.get(f"scialm.{name}") if given is None else given


def bytes_of(name: str, limit: float | str | None) -> int | None:
    """Return a size such as ``"8 GB"`` in bytes, or None. Raises `InputError` if it is no size or less than 1 MB."""
    from dask.utils import parse_bytes

    try:
        found = None if limit is None else int(parse_bytes(limit))
    except (ValueError, OverflowError):
        raise InputError(f"{name} is {limit!r}; give a number with a unit, such as 8GB") from None
    if found is not None and found < _LEAST_BYTES:
        meant = f"{limit}GB" if re.fullmatch(r"[1-9]\d{0,3}", str(limit)) else "8GB"
        raise InputError(f"{name} is {limit!r}, {found} bytes; give 1 MB at least: {meant}?")
    return found


def seconds_of(name: str) -> float:
    """Return ``scialm.NAME`` of Dask's configuration, a time, in seconds."""
    from dask.utils import parse_timedelta

    words = configured(name)
    try:
        return float(parse_timedelta(words))
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{name} is {words!r}; give a time with a unit, such as 30s") from None


@functools.cache
def _shipped_defaults() -> dict[str, Any]:
    """Return our defaults, and put a commented copy beside those of Dask's other packages."""
    import dask
    import yaml

    path = Path(__file__).with_name("scialm.yaml")
    dask.config.ensure_file(source=str(path))
    defaults: dict[str, Any] = yaml.safe_load(path.read_text())["scialm"]
    return defaults


class Interval(NamedTuple):
    """Limits of a number, for `Annotated`. An `open` interval lacks its ends. None holds NaN or infinity."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a number is in the interval."""
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
_UNCHECKED = (Any, bool, object)  # anything can be true or false
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a function against its annotations before each call; see `validated`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given, kinds = signature.bind(*args, **kwargs), _kinds(function)
        for name, value in given.arguments.items():
            given.arguments[name] = validated(name, value, kinds.get(name, Any))
        return function(*given.args, **given.kwargs)

    return call


def check_fields(made: Any) -> None:
    """Check the fields of a dataclass, frozen or not, against its annotations; see `validated`."""
    for name, kind in _kinds(made.__class__).items():
        object.__setattr__(made, name, validated(name, getattr(made, name), kind))


def validated(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as an instance of `kind`. Raises `InputError` about `name` if it is something else.

    NumPy numbers become Python numbers, and iterables tuples. Booleans do not count as numbers. A `kind` is a class,
    `Annotated` with an `Interval`, `Literal`, ``tuple``, ``Sequence``, ``Callable``, or a union of these. A name that
    only type checkers can resolve accepts anything.
    """
    try:
        return _as(value, kind)
    except TypeError:
        verb = "choose" if get_origin(kind) is Literal else "give"
        raise InputError(f"{name} is {short_repr(value)}; {verb} {_words(kind)}") from None


def short_repr(value: Any) -> str:
    """Return any value as half a line of text."""
    return " ".join(_short.repr(value).split())


def _as(value: Any, kind: Any) -> Any:
    """Return `value` as an instance of `kind`. Raises `TypeError` if it is something else."""
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
    """Return a kind in words."""
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


@functools.cache
def _kinds(thing: Any) -> dict[str, Any]:
    """Return the evaluated annotations of a function or class; names that only type checkers import are `Any`."""
    names = defaultdict(lambda: Any, vars(builtins) | vars(sys.modules[thing.__module__]))
    return typing.get_type_hints(thing, localns=names, include_extras=True)
